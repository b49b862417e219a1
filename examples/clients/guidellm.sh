#!/bin/sh
# GuideLLM: how many requests at once the server holds. TOKENIZER is the checkpoint's folder.
#
#     pip install guidellm
#     sh examples/clients/guidellm.sh http://127.0.0.1:8000 MODEL TOKENIZER
set -eu
guidellm run --backend "kind=openai_http,target=$1,model=$2" --tokenizer "kind=hf_auto,model=$3" \
    --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=8 \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 --output kind=console --disable-progress

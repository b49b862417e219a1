#!/bin/sh
# GuideLLM: how many requests at once the server holds. TOKENIZER is the checkpoint's folder.
#
#     pip install guidellm
#     sh examples/clients/guidellm.sh http://127.0.0.1:8000 MODEL TOKENIZER
set -eu
guidellm benchmark run --target "$1" --model "$2" --processor "$3" \
    --profile concurrent --rate 2 --max-requests 8 --data "prompt_tokens=64,output_tokens=16" --outputs console

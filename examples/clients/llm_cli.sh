#!/bin/sh
# The `llm` command line: a model of its own in its list of OpenAI-compatible ones.
#
#     pip install llm
#     sh examples/clients/llm_cli.sh http://127.0.0.1:8000 MODEL
set -eu
url=$1 model=$2
LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH
trap 'rm -rf "$LLM_USER_PATH"' EXIT
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: isthmus
  model_name: $model
  api_base: $url/v1
  api_key_name: isthmus
YAML
llm keys set isthmus --value "${ISTHMUS_API_KEY:-none}"
llm -m isthmus -o max_tokens 60 "Name a city by the sea."
llm -m isthmus -o max_tokens 60 --no-stream "Name a city by the sea."

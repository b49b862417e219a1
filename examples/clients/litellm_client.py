"""LiteLLM: a chat, a stream, and what it makes of a conversation that is too long.

    pip install litellm
    python examples/clients/litellm_client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request

import litellm


def main(url: str) -> None:
    key = os.environ.get("ISTHMUS_API_KEY", "none")
    listed = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(listed) as answer:
        model = json.load(answer)["data"][0]
    options = {"model": f"openai/{model['id']}", "api_base": f"{url}/v1", "api_key": key, "max_tokens": 60}
    question = [{"role": "user", "content": "Name a city by the sea."}]

    print("chat      ", litellm.completion(messages=question, **options).choices[0].message.content)
    chunks = litellm.completion(messages=question, stream=True, **options)
    print("stream    ", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    try:
        litellm.completion(messages=[{"role": "user", "content": "sea " * 10 * model["max_model_len"]}], **options)
    except litellm.ContextWindowExceededError as error:
        print("too long  ", type(error).__name__)


if __name__ == "__main__":
    main(sys.argv[1])

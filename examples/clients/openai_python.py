"""OpenAI's client for Python: a chat, a stream, a format, the Responses API.

    pip install openai
    python examples/clients/openai_python.py http://127.0.0.1:8000
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("ISTHMUS_API_KEY", "none"))
    model = client.models.list().data[0].id
    question = [{"role": "user", "content": "Name a city by the sea."}]

    answer = client.chat.completions.create(model=model, messages=question, max_tokens=60)
    print("chat      ", answer.choices[0].message.content, answer.usage.total_tokens, "tokens")

    print("stream    ", end=" ")
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        model=model, messages=question, max_tokens=60, stream=True, stream_options=options
    ):
        print("".join(choice.delta.content or "" for choice in chunk.choices), end="")
    print()

    properties = {"sunny": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["sunny"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model=model, messages=question, response_format=form, max_tokens=200)
    print("format    ", answer.choices[0].message.content)

    answer = client.responses.create(model=model, input="Name a city by the sea.", max_output_tokens=60)
    print("responses ", answer.output_text, answer.usage.total_tokens, "tokens")


if __name__ == "__main__":
    main(sys.argv[1])

"""LangChain: a chat, a stream, and an answer in a format.

    pip install langchain-openai
    python examples/clients/langchain_client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import os
import sys

from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """Whether the sun shines."""

    sunny: bool


def main(url: str) -> None:
    key = os.environ.get("ISTHMUS_API_KEY", "none")
    model = OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0].id
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=model, max_tokens=60)

    print("chat      ", chat.invoke("Name a city by the sea.").content)
    print("stream    ", "".join(chunk.content for chunk in chat.stream("Name a city by the sea.")))
    form = chat.with_structured_output(Weather, method="json_schema")
    print("format    ", form.invoke("Does the sun shine at noon in the desert?"))


if __name__ == "__main__":
    main(sys.argv[1])

"""Streams one completion and says how long its first token took: what `helm test` runs."""

import json
import os
import time
from typing import Annotated

import httpx
import typer

from deploy.application import API_KEY_VARIABLE

_MAX_TOKENS = 16


class SmokeError(Exception):
    """One line that says what was wrong with the answer."""


def stream_one(url: str, prompt: str, timeout_s: float) -> tuple[str, float]:
    """The text, and the seconds until its first piece. Raises SmokeError."""
    keys = os.environ.get(API_KEY_VARIABLE, "").split()
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout_s) as client:
            model = _checked(client.get("/v1/models")).json()["data"][0]["id"]
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": _MAX_TOKENS,
                "temperature": 0,
                "stream": True,
            }
            begin, first_s, text, is_done = time.monotonic(), 0.0, "", False
            with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                for line in _checked(response).iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        is_done = True
                    elif data:
                        first_s = first_s or time.monotonic() - begin
                        text += _text_of(json.loads(data))
    except httpx.HTTPError as error:
        raise SmokeError(f"{url}: {error or type(error).__name__}") from None
    if not text or not is_done:
        raise SmokeError(f"the stream ended {'without [DONE]' if text else 'without text'}: {text!r}")
    return text, first_s


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        raise SmokeError(f"{response.url}: {response.status_code}: {response.text[:500]}")
    return response


def _text_of(event: dict) -> str:
    if "error" in event:
        raise SmokeError(f"the stream ended with an error: {event['error'].get('message')}")
    return "".join(choice["text"] for choice in event["choices"])


def main(
    url: str,
    prompt: Annotated[str, typer.Option()] = "The capital of France is",
    timeout_s: Annotated[float, typer.Option(help="Without a byte.")] = 60,
) -> None:
    try:
        text, first_s = stream_one(url, prompt, timeout_s)
    except SmokeError as error:
        raise SystemExit(f"smoke: {error}") from None
    print(f"{prompt!r} + {text!r}; first token after {first_s * 1e3:.0f} ms")


if __name__ == "__main__":
    typer.run(main)

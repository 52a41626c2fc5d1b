"""A terminal client: streams answers from any server with the OpenAI API."""

import json
from collections.abc import Iterator

import httpx
from rich.console import Console

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 120.0


class ChatError(Exception):
    """One line that says why there is no conversation."""


class ChatSession:
    """A conversation with one model; every turn sends all earlier ones."""

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        api_key: str | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        self._client = httpx.Client(
            base_url=base_url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout
        )
        self._console = Console()
        self._max_tokens = max_tokens
        self._messages = [{"role": "system", "content": system}] if system else []
        self._model = model or self._first_model()

    def run(self) -> None:
        """Ask and answer until end of input."""
        self._console.print(f"[dim]{self._model}. Ctrl-C stops an answer, Ctrl-D leaves.[/]")
        while True:
            try:
                question = self._console.input("[bold cyan]> [/]").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if question:
                self._turn(question)

    def _turn(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for text in self.stream_answer():
                answer += text
                self._console.out(text, end="", highlight=False)
        except KeyboardInterrupt:
            self._console.print(" [dim](stopped)[/]", end="")
        except ChatError as error:
            self._messages.pop()
            self._console.print(f"[red]{error}[/]")
            return
        self._console.print()
        self._messages.append({"role": "assistant", "content": answer})

    def stream_answer(self) -> Iterator[str]:
        """Text of the answer to the messages so far, as it comes. Raises ChatError."""
        body: dict[str, object] = {"model": self._model, "messages": self._messages, "stream": True}
        if self._max_tokens:
            body["max_tokens"] = self._max_tokens
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ChatError(_message(response))
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise ChatError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise ChatError(f"{self._client.base_url}: {error or type(error).__name__}") from None

    def _first_model(self) -> str:
        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise ChatError(
                f"no server at {self._client.base_url}: {error or type(error).__name__}"
            ) from None
        if response.status_code != 200:
            raise ChatError(_message(response))
        name: str = response.json()["data"][0]["id"]
        return name


def _message(response: httpx.Response) -> str:
    try:
        message: str = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
    return message

"""Who asks: the API key of a request, as its caller's rights."""

import hmac
from collections.abc import Mapping

from serving.errors import ApiError
from serving.state import ReplicaState
from serving.telemetry.exchange import Exchange
from serving.tenants.visit import Visit

_NEEDS_KEY = ("/v1", "/tokenize", "/detokenize")


class Callers:
    """Knows the operator's keys and the tenants'."""

    def __init__(self, state: ReplicaState) -> None:
        self._gate = state.gate
        self._keys = tuple(key.encode() for key in state.settings.api_keys)

    @property
    def need_keys(self) -> bool:
        """False where everybody may come in."""
        return bool(self._keys or self._gate)

    def visit(self, path: str, headers: Mapping[bytes, bytes], exchange: Exchange) -> Visit:
        """Raises ApiError 401 without a key that is known, where keys are asked for."""
        if not self.need_keys or not path.startswith(_NEEDS_KEY):
            return Visit()
        given = _key(headers)
        if not given:
            raise ApiError(
                401,
                "You didn't provide an API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # Every key is compared, so that the time taken says nothing about which one came close.
        if sum(hmac.compare_digest(given, key) for key in self._keys):
            return Visit()
        if self._gate is not None and (visit := self._gate.visit(given, exchange)) is not None:
            return visit
        raise ApiError(
            401,
            "Incorrect API key provided.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _key(headers: Mapping[bytes, bytes]) -> bytes:
    """OpenAI's clients send a bearer token, Anthropic's also `x-api-key`, which counts where both are; empty
    without either.
    """
    if own := headers.get(b"x-api-key", b"").strip():
        return own
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""

"""How a prompt becomes one vector."""

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ParameterError

Pooling = Literal["mean", "last"]
"""Over the tokens' last hidden states, behind the final norm: their mean, or the last one alone."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Parameters of one embedding; validated at birth.

    Raises:
        ParameterError: naming the field and the allowed values.
    """

    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            allowed = " or ".join(get_args(Pooling))
            raise ParameterError("pooling", f"must be {allowed}, got {self.pooling!r}")

    @property
    def needs_every_token(self) -> bool:
        """Also those whose keys and values a cached prefix has: their hidden states are not kept."""
        return self.pooling == "mean"

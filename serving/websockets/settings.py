"""What an operator may set about WebSockets."""

from pydantic import BaseModel, ConfigDict, Field

MAX_SESSION_S = 3600.0
"""After which a connection is closed when its request has ended. The cluster's own limit of a connection lies
beyond it.
"""


class WebSocketSettings(BaseModel):
    """The `serving.websocket` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_connections: int = Field(default=128, ge=0)
    """Open at a time on each replica; beyond it 503, which sends the handshake on to another one."""
    idle_timeout_s: float = Field(default=300.0, gt=0)
    """Without a request for so long, a connection is closed."""
    allowed_origins: tuple[str, ...] = ()
    """Of other hosts' web pages that may connect where no key is asked for: 'https://app.example', or '*'."""

"""Requests that come over a connection of long standing: no router chose their replica, but all routers are
to know of them.
"""

import uuid
from collections.abc import Mapping

from serving.dispatch.headers import FLIGHT, ROUTE, FlightNote
from serving.dispatch.prompts import routed_request
from serving.routing.prefix_index import PrefixIndex
from serving.tiers import Tier

# Of an answer without a limit.
_EXPECTED_TOKENS = 256


def unrouted_headers(body: bytes, tiers: Mapping[str, Tier]) -> dict[str, str]:
    """What a router would have sent along with `body`, but where to report to: to every router, then."""
    request = routed_request(uuid.uuid4().hex, body, len(body), tiers)
    expected_tokens = min(_EXPECTED_TOKENS, request.max_output_tokens or _EXPECTED_TOKENS)
    note = FlightNote(
        request.request_id,
        request.prompt_tokens,
        expected_tokens,
        request.priority,
        prefixes=PrefixIndex.entries(request.block_hashes),
    )
    return {FLIGHT: note.write(), ROUTE: "policy=none; reason=connection"}

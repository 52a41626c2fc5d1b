"""Kept answers, whichever replica keeps them."""

import re
from collections.abc import Awaitable, Callable, Sequence

from serving.api.responses.items import (
    FunctionCallItem,
    Item,
    ItemReference,
    KnownItem,
    MessageItem,
    conversation_of,
)
from serving.api.responses.objects import OutputItem, OutputMessage, Response
from serving.api.responses.requests import ResponseRequest
from serving.api.responses.store import ResponseStore, StoredResponse
from serving.errors import ApiError
from serving.tools import Message

_IS_ID = re.compile(r"resp_[A-Za-z0-9-]+_[0-9a-f]{32}")

AskPeers = Callable[[str, str | None, bool], Awaitable[StoredResponse | None]]
"""A response by its id, for this owner, from the replica that keeps it; with True it is forgotten there.
Raises ApiError 503 where that replica may be one that did not answer.
"""


class KeptResponses:
    """This replica's store, and those of its peers for ids that are not its own.

    peers: None where this replica is alone.
    """

    def __init__(self, store: ResponseStore, replica: str, peers: AskPeers | None) -> None:
        self.store = store
        self.id_prefix = f"resp_{replica}_"
        self._peers = peers

    async def get(self, response_id: str, owner: str | None) -> StoredResponse | None:
        return self.store.get(response_id, owner) or await self._ask(response_id, owner, forget=False)

    async def pop(self, response_id: str, owner: str | None) -> StoredResponse | None:
        return self.store.pop(response_id, owner) or await self._ask(response_id, owner, forget=True)

    async def conversation(self, body: ResponseRequest, owner: str | None) -> tuple[Message, ...]:
        """The previous response's, where there is one, and the request's items.

        Raises ApiError 400 or 404 for what is not kept, ParameterError for calls and outputs that do not fit.
        """
        before: tuple[Message, ...] = ()
        if body.previous_response_id is not None:
            before = (await self._previous(body.previous_response_id, owner)).conversation
        return conversation_of(before, await self._known(body.items, owner))

    async def _previous(self, response_id: str, owner: str | None) -> StoredResponse:
        if (stored := await self.get(response_id, owner)) is not None:
            return stored
        raise ApiError(
            400,
            f"Previous response with id '{response_id}' not found. A response is kept for "
            f"{self.store.settings.ttl_s:g} s at most, while there is room and its replica runs; without it, "
            "send the conversation as input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )

    async def _known(self, items: Sequence[Item], owner: str | None) -> list[KnownItem]:
        """The items, references replaced by what they refer to."""
        return [
            await self._referred(item.id, owner) if isinstance(item, ItemReference) else item
            for item in items
        ]

    async def _referred(self, item_id: str, owner: str | None) -> KnownItem:
        response_id = "resp_" + item_id.partition("_")[2].rpartition("_")[0]
        stored = await self.get(response_id, owner)
        kept = () if stored is None else Response.model_validate_json(stored.response).output
        for item in kept:
            if item.id == item_id:
                return _as_input(item)
        raise ApiError(404, f"Item with id '{item_id}' not found.", param="input", code="item_not_found")

    async def _ask(self, response_id: str, owner: str | None, *, forget: bool) -> StoredResponse | None:
        if self._peers is None or response_id.startswith(self.id_prefix) or not _IS_ID.fullmatch(response_id):
            return None
        return await self._peers(response_id, owner, forget)


def _as_input(item: OutputItem) -> KnownItem:
    if isinstance(item, OutputMessage):
        return MessageItem(role="assistant", content="".join(part.text for part in item.content), id=item.id)
    return FunctionCallItem(
        type="function_call", call_id=item.call_id, name=item.name, arguments=item.arguments, id=item.id
    )

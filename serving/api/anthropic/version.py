"""The `anthropic-version` header, which Anthropic's API asks for."""

from typing import Annotated

from fastapi import Header

from serving.api.anthropic.errors import VERSION_HEADER
from serving.errors import ApiError

_NAME = VERSION_HEADER.decode()
# The second one has no sampling parameters, which this server takes in both, and refuses blocks that are
# refused here anyway: for what is served, they are the same.
_VERSIONS = ("2023-06-01", "2026-10-21")


async def check_version(
    version: Annotated[str | None, Header(alias=_NAME, json_schema_extra={"enum": list(_VERSIONS)})] = None,
) -> None:
    """Raises ApiError 400 for a version that is not served, and for none."""
    if version in _VERSIONS:
        return
    allowed = " or ".join(_VERSIONS)
    problem = "is required" if version is None else f"{version!r} is not a version of this API"
    raise ApiError(
        400, f"Header '{_NAME}': {problem}; send {allowed}.", param=_NAME, code="invalid_api_version"
    )

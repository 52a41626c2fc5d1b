"""One request on its way through a replica, as far as its caller's rights go."""

from serving.errors import ApiError


class Visit:
    """Of a caller who is no tenant: an operator's key, or nobody's where none is asked for. All is allowed.

    Every route that computes something calls these, in this order: `check_model`, `tier` and `check_tier`
    where it has tiers, `admit`. The rest is `FrontDoor`'s.
    """

    tenant: str | None = None

    def may_use(self, model: str) -> bool:
        return True

    def check_model(self, model: str) -> None:
        """Raises ApiError 404, which is what a model that does not exist gets."""

    def tier(self, asked: str | None) -> str | None:
        """The tier to serve, where the request asked for this one or for none."""
        return asked

    def check_tier(self, tier: str) -> None:
        """tier: its own name, no alias of it. Raises ApiError 403 naming the allowed ones."""

    async def admit(self, prompt_tokens: int, max_output_tokens: int | None) -> None:
        """Count the request against its tenant's limits. Calls after the first do nothing.

        max_output_tokens: over all choices; None where the request sets no limit.
        Raises ApiError 429 with Retry-After, or 503.
        """

    def headers(self, *, is_anthropic: bool) -> dict[str, str]:
        """For the response, named as in Anthropic's API or in OpenAI's."""
        return {}

    def leave(self) -> None:
        """The last byte goes. Idempotent."""


def model_not_found(model: str) -> ApiError:
    """Whether there is such a model is not told to who may not use it."""
    return ApiError(
        404,
        f"The model '{model}' does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )

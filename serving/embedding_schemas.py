"""POST /v1/embeddings: OpenAI's shapes, and how to pool."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from engine import PoolingParams
from engine.pooling_params import Pooling
from serving.schemas import Prompt, Strict, StrictInt


class EmbeddingRequest(Strict):
    """`pooling` is an extension, named as other servers name it."""

    model: Annotated[str, StringConstraints(min_length=1)]
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: str | None = None
    service_tier: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    pooling: Pooling | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)

    def pooling_params(self) -> PoolingParams:
        return PoolingParams(self.pooling or "mean")


class Embedding(BaseModel):
    """`embedding` is a list of numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage

"""Inference on one accelerator: scheduling, KV cache, model, sampling. Knows no server."""

from engine.api import InferenceEngine
from engine.config import EngineConfig
from engine.constraint import Constraint
from engine.errors import (
    EngineDeadError,
    EngineError,
    ModelLoadError,
    OutOfMemoryError,
    ParameterError,
    PromptTooLongError,
)
from engine.outputs import (
    EngineStats,
    FinishReason,
    ModelInfo,
    PositionLogprobs,
    RequestOutput,
    RequestTimings,
    StepKind,
    StepTimes,
    TokenLogprob,
)
from engine.pooling_params import PoolingParams
from engine.sampling_params import SamplingParams
from engine.step_cost import StepCost
from engine.urgency import MAX_PRIORITY, Urgency

__all__ = [
    "MAX_PRIORITY",
    "Constraint",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineStats",
    "FinishReason",
    "InferenceEngine",
    "ModelInfo",
    "ModelLoadError",
    "OutOfMemoryError",
    "ParameterError",
    "PoolingParams",
    "PositionLogprobs",
    "PromptTooLongError",
    "RequestOutput",
    "RequestTimings",
    "SamplingParams",
    "StepCost",
    "StepKind",
    "StepTimes",
    "TokenLogprob",
    "Urgency",
]

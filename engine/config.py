"""The engine's configuration: frozen, checked at birth, each default written once."""

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ParameterError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
CoreLocation = Literal["auto", "thread", "process"]
Precision = Literal["fp8", "bf16"]
KVCacheDType = Literal["auto", "fp8"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine on one accelerator.

    Args:
        model: path of a GGUF file or of a directory with config.json, safetensors and tokenizer.
        served_model_name: the name clients use; None takes the path's last part.
        device: `auto` takes the GPU where there is one.
        dtype: `auto` keeps packed weights packed (GGUF) and takes float32 on the CPU, bfloat16 on a GPU;
            any other value dequantizes the weights to it.
        max_model_len: prompt plus output tokens of one request; None takes the model's own limit.
        block_size: tokens of one KV block.
        kv_cache_bytes: memory for the KV cache; None takes 1 GiB on the CPU, 90% of what is free on a GPU.
        kv_cache_dtype: `auto` is bfloat16 on a GPU, float32 on the CPU. `fp8` is e4m3 with a scale for each
            token and head: twice the tokens in the same memory, less exact. It needs a Hopper GPU and packed
            weights.
        num_blocks: overrides `kv_cache_bytes` (tests).
        max_num_seqs: most requests that run at the same time.
        token_budget: most tokens computed in one step (decode tokens first, then prompt chunks). It bounds
            how long a prompt holds up the streams beside it. None takes 128 on the CPU (about 0.1 s for a
            135M model on two cores, and larger chunks gain nothing there), 2,048 on a GPU.
        step_target_s: what a step with running streams should take: as many sequences run, and prompt chunks
            beside them are as large, as this allows by measured durations. Infinite: no such limit. None: no
            limit on the CPU; on a GPU 9 ms, or two decode steps where these are longer, for chunks alone, and
            they grow all the same where prompts would wait for more than half a second.
        enable_prefix_caching: reuse blocks of equal prompt prefixes.
        speculative_tokens: most tokens drafted for one request in a step (what followed its last tokens when
            they occurred before) and verified together; outputs are the same with and without. It is a
            limit: a request whose drafts do not pay gets none. 0 is off; None takes 0 on the CPU, 7 on a
            GPU, where 8 tokens read the weights once (the fused kernels allow 15).
        prefill_precision: of products of more than 256 prompt tokens on a Hopper GPU, where the weights have
            at most 4 bits: `fp8` (e4m3 operands) is about twice as fast as `bf16`, and less exact.
        num_threads: CPU threads of the model; None takes every core this process may use.
        core: run the EngineCore in a thread of this process, or in a process of its own. auto takes a process
            on a GPU: there the core's Python and the server's would wait for each other several times a step
            (8B on an H100: 64 streams over HTTP 5.2 ms a token, 4.2 without the server). On the CPU a second
            process would take a core from the kernels.

    Raises:
        ParameterError: naming the field.
    """

    model: str
    served_model_name: str | None = None
    device: Device = "auto"
    dtype: DType = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_bytes: int | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    num_blocks: int | None = None
    max_num_seqs: int = 64
    token_budget: int | None = None
    step_target_s: float | None = None
    enable_prefix_caching: bool = True
    speculative_tokens: int | None = None
    prefill_precision: Precision = "fp8"
    num_threads: int | None = None
    core: CoreLocation = "auto"

    def __post_init__(self) -> None:
        if self.block_size != 16:
            # The CPU and GPU attention kernels tile by this; one size keeps them simple.
            raise ParameterError("block_size", f"must be 16, got {self.block_size}")
        for name in (
            "max_num_seqs",
            "token_budget",
            "max_model_len",
            "num_blocks",
            "num_threads",
            "kv_cache_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(name, f"must be at least 1, got {value}")
        if self.step_target_s is not None and not self.step_target_s > 0:
            raise ParameterError("step_target_s", f"must be above 0, got {self.step_target_s}")
        if self.prefill_precision not in get_args(Precision):
            raise ParameterError("prefill_precision", f"must be fp8 or bf16, got {self.prefill_precision}")
        if self.kv_cache_dtype not in get_args(KVCacheDType):
            raise ParameterError("kv_cache_dtype", f"must be auto or fp8, got {self.kv_cache_dtype}")
        if self.speculative_tokens is not None and self.speculative_tokens < 0:
            raise ParameterError("speculative_tokens", f"must be at least 0, got {self.speculative_tokens}")
        if self.token_budget is not None and self.token_budget < self.max_num_seqs:
            raise ParameterError(
                "token_budget",
                f"must be at least max_num_seqs ({self.max_num_seqs}), so that every running request can "
                f"decode in each step; got {self.token_budget}",
            )

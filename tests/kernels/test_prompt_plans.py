"""How prompts' products are cut and which way they take, by an H100's measured rates; no GPU is asked."""

import pytest

from kernels.cuda import prompt, prompt_fp8

LLAMA_70B = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))


@pytest.fixture(autouse=True)
def _h100(monkeypatch):
    for module in (prompt, prompt_fp8):
        monkeypatch.setattr(module, "num_blocks", lambda: 132)
    own = prompt_fp8.plan, prompt_fp8.is_faster, prompt_fp8.beats_float16
    for function in own:
        function.cache_clear()
    yield
    for function in own:
        function.cache_clear()


@pytest.mark.parametrize(("n", "k"), LLAMA_70B)
def test_packed_weights_are_multiplied_up_to_some_hundred_tokens(n, k):
    assert prompt_fp8.is_faster(512, n, k)
    assert not prompt_fp8.is_faster(2048, n, k)


def test_a_matrix_that_would_leave_blocks_for_a_second_round_takes_smaller_ones():
    assert prompt_fp8.plan(512, 8192, 8192)[0] == 256  # 128 blocks on 132 multiprocessors
    assert prompt_fp8.plan(512, 10240, 8192)[0] == 192  # 160 blocks of 256 tokens would be two whole rounds


# us, measured with weights cold (docs/benchmarks/kernel-notes.md).
@pytest.mark.parametrize(
    ("tokens", "n", "k", "measured_us"),
    [(512, 8192, 8192, 59.9), (512, 57344, 8192, 414), (512, 4096, 14336, 67.1), (1024, 28672, 4096, 245)],
)
def test_predicted_durations(tokens, n, k, measured_us):
    assert prompt_fp8.plan(tokens, n, k)[1] == pytest.approx(measured_us, rel=0.13)


@pytest.mark.parametrize(
    ("n", "unit_bytes", "is_gated", "rows"),
    [
        (57344, 2176, True, 448),  # 128 blocks for 132 multiprocessors; of 128 rows, some had 3 and some 4
        (57344, 4096, True, 128),  # a stage of so many bytes leaves no room for three
        (35840, 2176, True, 288),
        (28672, 2176, True, 128),  # one tile a warp would not pay
        (59392, 1088, False, 464),
        (8192, 2176, False, 128),
    ],
)
def test_sixteen_tokens_of_a_large_matrix_take_one_round(n, unit_bytes, is_gated, rows):
    assert prompt.plan(16, n, 32, unit_bytes, is_gated=is_gated).rows == rows
    assert prompt.plan(17, n, 32, unit_bytes, is_gated=is_gated).rows == 128


@pytest.mark.parametrize(
    ("n", "k", "is_e4m3"),
    [*((n, k, True) for n, k in LLAMA_70B), (28672, 4096, True), (4096, 4096, False), (4096, 14336, False)],
)
def test_prompts_of_some_hundred_tokens(n, k, is_e4m3):
    """In float16 8B's take 103, 20 and 51 us, and 8192 x 8192 takes 57."""
    assert prompt_fp8.beats_float16(256, n, k) == is_e4m3
    assert not prompt_fp8.beats_float16(128, n, k)

"""`kernels` is also the import name of a package that transformers probes for; both live in one process."""

import subprocess
import sys

import pytest

PROGRAM = """
{imports}
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
import kernels
assert hasattr(kernels, "attention_block") and not hasattr(kernels, "get_kernel")
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
                                     num_hidden_layers=1, num_attention_heads=2))
print(tuple(model(torch.tensor([[1, 2]])).logits.shape))
"""


@pytest.mark.parametrize("imports", ["import kernels", "import transformers"])
def test_both_import_in_one_process(imports):
    program = PROGRAM.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "(1, 2, 32)", done.stderr[-2000:]

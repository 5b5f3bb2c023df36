"""Small Llama-shaped models in every format, through Transformers on a card, beside dense twins.

The golden checkpoints: each was written by its format's own tool, with the weights that it means.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

from .machine import ROOT

pytestmark = pytest.mark.gpu

GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
COMPILED = (
    "awq-gemm-g128", "bnb-int8", "bnb-nf4", "ct-int3-sym-g128", "gptq-2b-asym-g32",
    "gptq-4b-sym-g64-actorder", "gptq-8b-sym-g128",
)  # fmt: skip
BOUND = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative Frobenius error of logits: two ways to round sums, through all layers."""

PROMPT = [
    [1, 5, 9, 17, 33, 65, 2, 77, 54, 100, 101, 6],
    [7, 3, 8, 1, 20, 91, 44, 31, 2, 9, 111, 12],
]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """Let Transformers use qplug, which may be on the path alone, whatever else is installed."""
    from qplug import transformers

    with transformers.use("gptq", "awq", "bitsandbytes", "compressed-tensors", "auto-round"):
        yield


def load(name: str, dtype: torch.dtype, device: torch.device):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=dtype).to(device).eval()
    return model, copy.deepcopy(model).dequantize().to(dtype).to(device)


def kernels(model) -> set[str]:
    """Return the kernels that a model's quantized linears run."""
    from qplug.transformers.linear import QuantLinear

    return {
        module._prepared.kernel
        for module in model.modules()
        if isinstance(module, QuantLinear) and module._prepared is not None
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", list(BOUND), ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dense_twin(name, dtype, device):
    model, twin = load(name, dtype, device)
    for prompt in (PROMPT, [PROMPT[0][:1]], PROMPT * 8):
        tokens = torch.tensor(prompt, device=device)
        with torch.no_grad():
            found, expected = model(tokens).logits, twin(tokens).logits
        assert error(found, expected) <= BOUND[dtype]
    chosen = kernels(model)
    assert chosen
    assert all(kernel.startswith("triton_") for kernel in chosen), chosen


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_give_the_same_logits(name, device):
    model, twin = load(name, torch.bfloat16, device)
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for shift in range(4):  # compiled, recorded, replayed
            tokens = torch.tensor(PROMPT, device=device).roll(shift, 1)
            found = compiled(tokens, use_cache=False).logits.clone()
            assert error(found, twin(tokens, use_cache=False).logits) <= BOUND[torch.bfloat16]
    torch.compiler.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_greedy_tokens_are_those_of_the_dense_twin(name, device):
    model, twin = load(name, torch.float16, device)
    prompt = torch.tensor(PROMPT[:1], device=device)
    options = {"max_new_tokens": 16, "do_sample": False}
    found, expected = (one.generate(prompt, **options)[0].tolist() for one in (model, twin))
    for at in range(prompt.shape[1], min(len(found), len(expected))):
        if found[at] != expected[at]:  # allowed where the twin's two best are a tie
            with torch.no_grad():
                logits = twin(torch.tensor([expected[:at]], device=device)).logits[0, -1].float()
            gap = logits[expected[at]] - logits[found[at]]
            assert gap <= 2 * BOUND[torch.float16] * logits.abs().max(), (at, float(gap))
            return


def test_every_format_has_a_model():
    configs = [json.loads((GOLDEN / name / "config.json").read_text()) for name in NAMES]
    methods = {config["quantization_config"]["quant_method"] for config in configs}
    assert {"gptq", "awq", "bitsandbytes", "compressed-tensors", "auto-round"} <= methods

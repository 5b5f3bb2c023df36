"""Stock vLLM on CUDA and on a CPU, and with humming: versions 0.21 to 0.33.

Looked at: `gptq.py` of 0.21.0 and what took its place in 0.22.1; `auto_gptq.py`, `auto_awq.py`,
`utils/gptq_utils.py`, `utils/marlin_utils.py`, `kernels/linear/mixed_precision/cpu.py` of 0.26.0 to
0.33.0; `humming.py` of 0.32.0 and 0.33.0 with humming-kernels 0.1.19. `run` means: 0.32.0 on a CPU,
which `integration/vllm/test_stock.py` does again.
"""

from __future__ import annotations

from shlex import quote

from . import vllm_rules as rules
from .facts import Facts
from .rules import Engine


def _serve(facts: Facts, folder: str) -> str:
    ranks = f" --tensor-parallel-size {facts.ranks}" if facts.ranks > 1 else ""
    return f"vllm serve {quote(folder)}{ranks}"


def _serve_humming(facts: Facts, folder: str) -> str:
    return f"{_serve(facts, folder)} --quantization humming"


VLLM = Engine(
    key="vllm",
    title="vLLM",
    first="0.21",
    last="0.33",
    stock=True,
    command=_serve,
    rules={
        "gptq": (*rules.GPTQ, rules.CUDA_RUNS),
        "gptq_v2": (*rules.GPTQ, rules.CUDA_RUNS),
        "gptq_p": (rules.PLANAR, *rules.GPTQ, rules.CUDA_RUNS),
        "awq": (*rules.AWQ, rules.OTHER_AWQ_GROUPS, rules.CUDA_RUNS),
        "compressed-tensors": (
            *rules.COMPRESSED,
            rules.COMPRESSED_CUDA,
            rules.COMPRESSED_RUNS,
        ),
        **dict.fromkeys(rules.OTHER_AWQ, rules.NOT_GEMM),
        **dict.fromkeys(rules.BITSANDBYTES, rules.BNB),
        "autoround_gptq": (*rules.INC, *rules.AUTOROUND_GPTQ, rules.CUDA_RUNS),
        "autoround_awq": (*rules.INC, rules.OTHER_AWQ_GROUPS, rules.CUDA_RUNS),
        "autoround": (*rules.INC, rules.AUTOROUND_NATIVE),
        "canonical": (rules.UNKNOWN_METHOD,),
    },
)
VLLM_CPU = Engine(
    key="vllm-cpu",
    title="vLLM on a CPU",
    first="0.26",
    last="0.32",
    stock=True,
    command=_serve,
    rules={
        "gptq": (*rules.GPTQ, *rules.CPU_ONLY, rules.CPU_RUNS),
        "gptq_v2": (*rules.GPTQ, *rules.CPU_ONLY, rules.CPU_RUNS),
        "gptq_p": (*rules.GPTQ, *rules.CPU_ONLY, rules.CPU_RUNS),
        "awq": (*rules.AWQ, rules.ODD_GROUPS, *rules.CPU_ONLY, rules.CPU_RUNS),
        "compressed-tensors": (
            *rules.COMPRESSED,
            rules.COMPRESSED_CPU,
            *rules.CPU_ONLY[1:],
            rules.COMPRESSED_RUNS,
        ),
        **dict.fromkeys(rules.OTHER_AWQ, rules.NOT_GEMM),
        **dict.fromkeys(rules.BITSANDBYTES, rules.NO_BITSANDBYTES),
        "autoround_gptq": (*rules.INC, *rules.CPU_ONLY, *rules.AUTOROUND_GPTQ, rules.CPU_RUNS),
        "autoround_awq": (*rules.INC, rules.ODD_GROUPS, *rules.CPU_ONLY, rules.CPU_RUNS),
        "autoround": (*rules.INC, rules.AUTOROUND_NATIVE),
        "canonical": (rules.UNKNOWN_METHOD,),
    },
)
VLLM_HUMMING = Engine(
    key="vllm+humming",
    title="vLLM with humming",
    first="0.32",
    last="0.33",
    stock=False,
    command=_serve_humming,
    rules={
        "gptq": rules.HUMMING,
        "gptq_v2": rules.HUMMING,
        "awq": rules.HUMMING,
        **dict.fromkeys(
            (*rules.OTHER_AWQ, *rules.AUTOROUND, *rules.BITSANDBYTES), rules.NOT_LOOKED_AT
        ),
        **dict.fromkeys(("gptq_p", "compressed-tensors", "canonical"), rules.NOT_LOOKED_AT),
    },
)

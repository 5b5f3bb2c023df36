"""Stock Transformers 5.0 to 5.23 with the packages that its quantizers ask for.

Looked at: `quantizers/quantizer_gptq.py`, `quantizer_awq.py`, `utils/quantization_config.py` of
5.0.0 to 5.23.0; GPTQModel 7.7.0, which computes for both. `integration/transformers/test_stock.py`
tries what needs no package.
"""

from __future__ import annotations

from . import compressed as ct
from . import properties as has
from .facts import OLD, SIDE, TEXT, Facts
from .rules import Engine, Outcome, Rule
from .vllm_rules import AUTOROUND, BITSANDBYTES, OTHER_AWQ

REFUSED, WRONG, RUNS, UNTESTED = Outcome.REFUSED, Outcome.WRONG, Outcome.RUNS, Outcome.UNTESTED
PACKAGES = {
    "gptq": "optimum gptqmodel",
    "gptq_v2": "optimum gptqmodel",
    "gptq_p": "optimum gptqmodel>=7.3.4",
    "awq": "gptqmodel accelerate",
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes accelerate"),
    **dict.fromkeys(OTHER_AWQ, "gptqmodel accelerate"),
    **dict.fromkeys(AUTOROUND, "auto-round"),
    "compressed-tensors": "compressed-tensors",
}
"""Format -> what its stock quantizer imports."""
LOAD = "AutoModelForCausalLM.from_pretrained({!r})"


def _in_side_file(facts: Facts) -> str | None:
    if facts.place != SIDE:
        return None
    return "config.json has no quantization_config: linears get random weights"


def _in_text_config(facts: Facts) -> str | None:
    found = "the block is in text_config, which is not looked at: linears get random weights"
    return found if facts.place == TEXT else None


def _in_old_key(facts: Facts) -> str | None:
    found = "the block is named compression_config, which is not looked at"
    return found if facts.place == OLD else None


def _without_method(facts: Facts) -> str | None:
    return None if facts.block.get("quant_method") else "the config has no quant_method"


def _odd_method(facts: Facts) -> str | None:
    method = facts.block.get("quant_method")
    if not isinstance(method, str) or method == method.lower():
        return None
    return f"quant_method {method!r} is unknown in this spelling: linears get random weights"


def _without_bits(facts: Facts) -> str | None:
    block = facts.block
    if any(block.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
        return None
    return "the config has neither load_in_4bit nor load_in_8bit"


def _other_name(facts: Facts) -> str | None:
    method = facts.block.get("quant_method")
    if method == "auto-round":
        return None
    return f"quant_method {method!r} is unknown: linears get random weights"


def _alias(facts: Facts) -> str | None:
    size = facts.block.get("q_group_size")
    if size in (None, 128) or facts.block.get("group_size") is not None:
        return None
    return f"q_group_size {size} is not read, and group size 128 taken"


def _overridden(facts: Facts) -> str | None:
    if not facts.block.get("dynamic"):
        return None
    return "its config class drops `dynamic`: modules named there are built like the others"


def _legacy_zeros(facts: Facts) -> str | None:
    if not any(scheme.zero_rule == "legacy3" for scheme in facts.linears.values()):
        return None
    return "GPTQModel 7.7 misreads the zeros of its own 3-bit files up to 6.0.3"


def _saturated_zeros(facts: Facts) -> str | None:
    count = sum(
        scheme.zeros.at_maxq
        for scheme in facts.linears.values()
        if scheme.zero_rule == "plain" and scheme.zeros is not None
    )
    if not count:
        return None
    return f"GPTQModel takes {count} zeros for others than their writer meant"


def _installed(facts: Facts) -> str:
    return ""


def load(facts: Facts, folder: str, *, with_packages: bool = True) -> str:
    """Return the code that loads a folder, and what its stock quantizer needs."""
    packages = PACKAGES.get(facts.format) if with_packages else None
    return LOAD.format(folder) + (f"  # pip install {packages}" if packages else "")


FOUND = (
    Rule(
        what="no block in config.json",
        met=_in_side_file,
        outcome=WRONG,
        source="run, 5.19.0",
    ),
    Rule(
        what="the block in text_config",
        met=_in_text_config,
        outcome=WRONG,
        until="5.15",
        source="read, 5.12.1 and 5.15.1",
    ),
    Rule(
        what="no quant_method",
        met=_without_method,
        outcome=REFUSED,
        source="run, 5.23.0",
        repair=has.state_method,
    ),
    Rule(
        what="a quant_method that is not in lower case",
        met=_odd_method,
        outcome=WRONG,
        source="run, 5.23.0",
        repair=has.state_method,
    ),
)
"""Rules about a config that Transformers does not find, or takes for another."""
IN_OLD_KEY = Rule(
    what="the block in compression_config",
    met=_in_old_key,
    outcome=UNTESTED,
    source="",
)
_EXPERTS = Rule(
    what="quantized experts, which its model classes hold fused",
    met=has.experts,
    outcome=UNTESTED,
    source="",
)
_RUNS = Rule(
    what="everything else, with the packages",
    met=_installed,
    outcome=RUNS,
    source="read, quantizer_gptq.py, quantizer_awq.py, GPTQModel 7.7.0",
)
_GPTQ = (
    *FOUND,
    Rule(
        what="a `dynamic`, which the config class drops",
        met=_overridden,
        outcome=UNTESTED,
        source="run, 5.23.0: the config alone",
    ),
    Rule(
        what="3-bit zeros of GPTQModel up to 6.0.3",
        met=_legacy_zeros,
        outcome=WRONG,
        source="run, GPTQModel 7.7.0",
    ),
    Rule(
        what="zeros stored as 2^bits - 1 by AutoGPTQ",
        met=_saturated_zeros,
        outcome=WRONG,
        source="read, GPTQModel 7.7.0",
    ),
    _EXPERTS,
    _RUNS,
)
_AWQ_LAYERS = (
    *FOUND,
    Rule(
        what="another AWQ layout than GEMM: GPTQModel has layers for it, with CUDA kernels",
        met=lambda facts: "GPTQModel has layers for it, with CUDA kernels",
        outcome=UNTESTED,
        source="read, GPTQModel 7.7.0",
    ),
)
_BITSANDBYTES = (
    *FOUND[:2],
    Rule(
        what="neither load_in_4bit nor load_in_8bit: the type is unknown then",
        met=_without_bits,
        outcome=WRONG,
        source="read, quantizers/auto.py",
    ),
    Rule(
        what="absmax that was saved after a forward on a CPU",
        met=has.transposed_absmax,
        outcome=WRONG,
        source="run, bitsandbytes 0.50.2",
    ),
    Rule(
        what="NF4 and FP4 in one file",
        met=has.mixed_tables,
        outcome=UNTESTED,
        source="",
    ),
    _RUNS,
)
_AUTOROUND = (
    *FOUND,
    Rule(
        what="another quant_method than auto-round",
        met=_other_name,
        outcome=WRONG,
        source="run, 5.23.0: the config alone",
        repair=has.state_method,
    ),
    _EXPERTS,
    _RUNS,
)
TRANSFORMERS = Engine(
    key="transformers",
    title="Transformers",
    first="5.0",
    last="5.23",
    stock=True,
    command=load,
    rules={
        "gptq": _GPTQ,
        "gptq_v2": _GPTQ,
        "gptq_p": _GPTQ,
        "awq": (
            *FOUND,
            Rule(
                what="q_group_size without group_size",
                met=_alias,
                outcome=WRONG,
                source="run, 5.23.0: the config alone",
                repair=lambda facts: {"group_size": facts.block["q_group_size"]},
            ),
            _EXPERTS,
            _RUNS,
        ),
        **dict.fromkeys(BITSANDBYTES, _BITSANDBYTES),
        **dict.fromkeys(OTHER_AWQ, _AWQ_LAYERS),
        **dict.fromkeys(AUTOROUND, _AUTOROUND),
        "compressed-tensors": (
            *FOUND,
            IN_OLD_KEY,
            Rule(
                what="actorder is group or dynamic",
                met=ct.order,
                outcome=REFUSED,
                source="run, 5.23.0 with compressed-tensors 0.20.0",
            ),
            Rule(
                what="zero points",
                met=ct.asymmetric,
                outcome=REFUSED,
                source="run, 5.23.0 with compressed-tensors 0.18.0 to 0.20.0",
            ),
            Rule(
                what="bits that do not divide 32, which releases before 0.18 packed otherwise",
                met=ct.odd_bits,
                outcome=UNTESTED,
                source="run, 5.23.0: the old packing does not load",
            ),
            _EXPERTS,
            _RUNS,
        ),
        "canonical": (
            *FOUND,
            Rule(
                what="qplug's own form",
                met=lambda facts: "no file named model.safetensors",
                outcome=REFUSED,
                source="run, 5.23.0",
            ),
        ),
    },
)

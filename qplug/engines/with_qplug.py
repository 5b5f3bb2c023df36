"""vLLM and Transformers with qplug installed: what this version of it serves and loads."""

from __future__ import annotations

from shlex import quote

from ..vllm.served import METHODS, refusal
from . import properties as has
from .facts import SIDE, Facts
from .rules import Engine, Outcome, Rule
from .stock_transformers import FOUND, IN_OLD_KEY, load
from .vllm_rules import AUTOROUND, BITSANDBYTES, OTHER_AWQ

OURS = "run, this version"


def _refused(facts: Facts) -> str | None:
    for module, scheme in facts.linears.items():
        if reason := refusal(module, scheme):
            return f"{module}: {reason}"
    return None


def _without_method(facts: Facts) -> str | None:
    return None if facts.place == SIDE else has.without_method(facts)


def _served(facts: Facts) -> str:
    return ""


def _serve(facts: Facts, folder: str) -> str:
    scales = " --kv-cache-dtype fp8" if facts.kv_scales else ""
    return f"vllm serve {quote(folder)} --quantization {METHODS[facts.format]}{scales}"


def _load(facts: Facts, folder: str) -> str:
    return load(facts, folder, with_packages=False)


_RULES = (
    Rule(
        what="no quant_method in the block of config.json",
        met=_without_method,
        outcome=Outcome.REFUSED,
        source=OURS,
        repair=has.state_method,
    ),
    Rule(
        what="linears that the plugin does not serve",
        met=_refused,
        outcome=Outcome.REFUSED,
        source=OURS,
    ),
    Rule(
        what="a fused layer (qkv, gate and up) with dense and quantized parts",
        met=has.half_quantized,
        outcome=Outcome.REFUSED,
        source=OURS,
    ),
    Rule(what="everything else", met=_served, outcome=Outcome.RUNS, source=OURS),
)
_WITH_NOTHING = Rule(
    what="everything else, with nothing besides",
    met=_served,
    outcome=Outcome.RUNS,
    source="run, 5.15 to 5.23",
)
_LOADED = (*FOUND, _WITH_NOTHING)
_BY_BITS = (*FOUND[:2], _WITH_NOTHING)
"""bitsandbytes is known by `load_in_4bit` and `load_in_8bit` too."""
_CANONICAL = Rule(
    what="qplug's own form",
    met=lambda facts: "a form that no engine has layers for; convert it",
    outcome=Outcome.REFUSED,
    source=OURS,
)
VLLM_QPLUG = Engine(
    key="vllm+qplug",
    title="vLLM with qplug",
    first="0.28",
    last="0.33",
    stock=False,
    command=_serve,
    rules=dict.fromkeys(METHODS, _RULES) | {"canonical": (_CANONICAL,)},
)
TRANSFORMERS_QPLUG = Engine(
    key="transformers+qplug",
    title="Transformers with qplug",
    first="5.15",
    last="5.23",
    stock=False,
    command=_load,
    rules=dict.fromkeys(("gptq", "gptq_v2", "gptq_p", "awq", *OTHER_AWQ, *AUTOROUND), _LOADED)
    | dict.fromkeys(BITSANDBYTES, _BY_BITS)
    | {
        "compressed-tensors": (*FOUND, IN_OLD_KEY, _WITH_NOTHING),
        "canonical": (_CANONICAL,),
    },
)

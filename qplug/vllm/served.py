"""What the plugin serves, without vLLM: the plugin refuses by it, and `qplug inspect` answers."""

from __future__ import annotations

import re

from qplug_converters.scheme import Scheme

METHODS = {
    **dict.fromkeys(("awq", "awq_gemv", "awq_gemv_fast", "llm_awq"), "qplug-awq"),
    **dict.fromkeys(("gptq", "gptq_v2", "gptq_p"), "qplug-gptq"),
    **dict.fromkeys(("autoround", "autoround_gptq", "autoround_awq"), "qplug-auto-round"),
    **dict.fromkeys(("bnb-nf4", "bnb-fp4", "bnb-int8"), "qplug-bitsandbytes"),
    "compressed-tensors": "qplug-compressed-tensors",
}
"""Format -> the name that `--quantization` takes."""
KV_SCALE = re.compile(r"(output_scale|[qkv]_scale|kv_scale|[qkv]_zero_point)$")
"""Tensors that some tools store inside a linear and that belong to the attention layer."""


def refusal(module: str, scheme: Scheme) -> str | None:
    """Return why a linear of a checkpoint is not served, or `None`."""
    path = module.split(".")
    if "experts" in path:
        return "quantized experts (MoE) are not served yet"
    if path[-1] in ("lm_head", "embed_out", "embed_tokens"):
        return "a quantized head or embedding is not served yet"
    return None


def parameter_name(part: str) -> str:
    """Return what a part is called in a layer: a parameter has no dot in its name."""
    return part.replace(".", "_")

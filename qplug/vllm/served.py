"""What the plugin serves, without vLLM: the plugin refuses by it, and `qplug inspect` answers."""

from __future__ import annotations

import re

from qplug_converters.scheme import Scheme

METHODS = {"awq": "qplug-awq", "gptq": "qplug-gptq", "gptq_v2": "qplug-gptq"}
"""Format -> the name that `--quantization` takes."""
SERVED_BITS = 4
KV_SCALE = re.compile(r"(output_scale|[qkv]_scale|kv_scale|[qkv]_zero_point)$")
"""Tensors that some tools store inside a linear and that belong to the attention layer."""


def refusal(module: str, scheme: Scheme) -> str | None:
    """Return why a linear of a checkpoint is not served, or `None`."""
    path = module.split(".")
    if "experts" in path:
        return "quantized experts (MoE) are not served yet"
    if path[-1] in ("lm_head", "embed_out", "embed_tokens"):
        return "a quantized head or embedding is not served yet"
    if scheme.bits != SERVED_BITS:
        return f"{scheme.bits}-bit linears are not served yet, only {SERVED_BITS}-bit ones"
    if scheme.act_order:
        return "act order (a g_idx that is not in order) is not served yet"
    return None


def alike(scheme: Scheme) -> tuple[object, ...]:
    """Return what the linears that vLLM fuses into one layer must have in common."""
    return scheme.in_features, scheme.bits, scheme.group_size, scheme.scale_dtype

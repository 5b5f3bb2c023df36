"""The KV cache under qplug: the file's scales at full precision, and no cache that is garbage."""

from __future__ import annotations

import math
from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from .compat import is_cpu, load_is_dummy, logger

SOUND_ON_CPU = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV dtypes that vLLM's CPU engine computes with; it takes every other name and answers garbage."""

SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")


class QplugKVCacheMethod(BaseKVCacheMethod):
    """vLLM's own method, with scales in float32 and checked."""

    def create_weights(self, layer: Any) -> None:
        """Register the scales.

        vLLM makes them in the model's dtype, which rounds a scale of the file (bfloat16: up to
        0.4 %, float16: flushes below 6e-8).
        """
        super().create_weights(layer)
        for name in SCALES:
            scale = getattr(layer, name)
            scale.data = scale.data.float()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded (-1 is "absent"), then hand over to vLLM."""
        if load_is_dummy():
            for name in SCALES:
                getattr(layer, name).data.fill_(-1.0)
        found = {name: float(getattr(layer, name)) for name in SCALES if hasattr(layer, name)}
        for name, value in found.items():
            if value != -1.0 and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"qplug: {layer.layer_name}.{name}: found {value}, expected a positive number"
                )
        if found and found["k_scale"] < 0 < found["v_scale"]:
            raise ValueError(
                f"qplug: {layer.layer_name}: found a v_scale without a k_scale, expected both"
            )
        super().process_weights_after_loading(layer)


def kv_method(config: QuantizationConfig, layer: Any) -> BaseKVCacheMethod | None:
    """Return the method of an attention layer, or `None` where vLLM takes none.

    Raises
    ------
    ValueError
        If the CPU engine would accept the KV dtype and answer garbage.
    """
    dtype = layer.kv_cache_dtype
    if is_cpu() and dtype not in SOUND_ON_CPU:
        raise ValueError(
            f"qplug: --kv-cache-dtype {dtype}: vLLM's CPU engine accepts it and answers garbage; "
            f"use one of {', '.join(SOUND_ON_CPU)}"
        )
    if dtype == "fp8_e5m2":
        # vLLM refuses scales with this dtype; without a method it serves with scales of 1.0.
        logger.warning_once(
            "qplug: KV scales of the checkpoint, if any, are not used with fp8_e5m2 (they are 1.0)"
        )
        return None
    return QplugKVCacheMethod(config)

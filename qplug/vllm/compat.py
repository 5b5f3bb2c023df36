"""Every difference between the versions of vLLM, 0.28 to 0.33, and nothing else.

| since | difference | here |
|-------|------------|------|
| 0.30  | `QuantizationConfig.get_checkpoint_weight_mapper`, which drops every `.g_idx` | `mapped` |

vLLM is imported by vLLM before it asks for anything of this module.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

logger = init_logger("vllm.qplug")
"""vLLM configures its own loggers only, so the name starts with `vllm`."""

HAS_CHECKPOINT_MAPPER = hasattr(QuantizationConfig, "get_checkpoint_weight_mapper")
"""Whether a config is asked which tensors of a checkpoint to drop (0.30+)."""


def mapped(
    *, regex: Mapping[Any, str | None] | None = None, suffix: Mapping[str, str | None] | None = None
) -> Any:
    """Return a `WeightsMapper`; a tensor whose new name is `None` is dropped."""
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(orig_to_new_regex=dict(regex or {}), orig_to_new_suffix=dict(suffix or {}))


def load_is_dummy() -> bool:
    """Whether vLLM starts with invented weights (`--load-format dummy`)."""
    from vllm.config import get_current_vllm_config

    return bool(get_current_vllm_config().load_config.load_format == "dummy")


def is_cpu() -> bool:
    """Whether the engine computes on the CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def tensor_parallel_size() -> int:
    """Return over how many ranks linears are cut."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


@cache
def log_like_vllm() -> None:
    """Send what qplug's other rooms log through vLLM's handlers; done once vLLM uses qplug."""
    ours, theirs = logging.getLogger("qplug"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate

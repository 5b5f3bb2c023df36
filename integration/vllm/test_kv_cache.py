"""fp8 KV caches: the file's scales arrive as they are, and nothing garbage is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .tiny import Tiny

pytestmark = pytest.mark.engine

ATTENTION = "model.layers.{}.self_attn.{}"
NAMES = {
    "plain": ("k_scale", "v_scale"),
    "projection": ("k_proj.k_scale", "v_proj.v_scale"),
    "output": ("k_proj.output_scale", "v_proj.output_scale"),
}


def with_scales(
    names: dict[int, tuple[str, str]], values: tuple[float, float] = (0.11, 0.07)
) -> Any:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        for layer, pair in names.items():
            for name, value in zip(pair, values, strict=True):
                tensors[ATTENTION.format(layer, name)] = torch.tensor([value]) * (layer + 1)

    return edit


def scales(model: Any) -> list[tuple[float, float]]:
    found = [layer.self_attn.attn for layer in model.model.layers]
    return [(attn._k_scale_float, attn._v_scale_float) for attn in found]


@pytest.mark.parametrize(("first", "second"), [("plain", "projection"), ("output", "output")])
@pytest.mark.parametrize(("format", "method"), [("awq", "qplug-awq"), ("gptq_v2", "qplug-gptq")])
def test_scales_arrive_at_full_precision(
    first: str, second: str, format: str, method: str, engine: Callable[..., Any], tmp_path: Path
) -> None:
    tiny = Tiny(format, edit=with_scales({0: NAMES[first], 1: NAMES[second]}))
    folder = tiny.write(tmp_path / "m")
    with engine(folder, quantization=method, kv_cache_dtype="fp8", dtype="bfloat16") as ours:
        expected = [(torch.tensor(0.11), torch.tensor(0.07))]
        expected.append((torch.tensor(0.11) * 2, torch.tensor(0.07) * 2))
        assert ours.ask(scales) == [(k.item(), v.item()) for k, v in expected]
        assert len(ours.tokens(count=4)[0]) == 4


def test_fp8_is_close_to_no_quantization(engine: Callable[..., Any], tmp_path: Path) -> None:
    folder = Tiny("awq", edit=with_scales({0: NAMES["plain"], 1: NAMES["plain"]})).write(
        tmp_path / "m"
    )
    with engine(folder, quantization="qplug-awq") as plain:
        expected = plain.tokens(count=1)
        assert plain.ask(scales) == [(1.0, 1.0)] * 2  # not used
    with engine(folder, quantization="qplug-awq", kv_cache_dtype="fp8") as fp8:
        found = fp8.tokens(count=1)
        # Random weights have near ties; garbage (see below) agrees nowhere.
        assert sum(one == two for one, two in zip(found, expected, strict=True)) >= 2
    with engine(folder, quantization="qplug-awq", kv_cache_dtype="fp8_e5m2") as coarse:
        assert coarse.ask(scales) == [(1.0, 1.0)] * 2
        assert len(coarse.tokens(count=4)[0]) == 4


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "nvfp4"])
def test_garbage_is_refused(dtype: str, engine: Callable[..., Any], tmp_path: Path) -> None:
    """The other names are in tests/vllm."""
    folder = Tiny("awq").write(tmp_path / "m")
    with (
        pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}: vLLM's CPU engine accepts"),
        engine(folder, quantization="qplug-awq", kv_cache_dtype=dtype),
    ):
        pass


def test_a_scale_that_is_no_scale_is_refused(engine: Callable[..., Any], tmp_path: Path) -> None:
    folder = Tiny("awq", edit=with_scales({1: NAMES["plain"]}, (float("nan"), 0.1))).write(
        tmp_path / "m"
    )
    with (
        pytest.raises(ValueError, match=r"k_scale: found nan, expected a positive number"),
        engine(folder, quantization="qplug-awq", kv_cache_dtype="fp8"),
    ):
        pass

"""What cannot be served is refused before weights load, and the sentence reaches the user.

`tests/vllm` has every refusal without an engine; these are the ways they come through one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tiny import Tiny

pytestmark = pytest.mark.engine


def refused(
    engine: Callable[..., Any], folder: Path, sentence: str, method: str = "qplug-gptq"
) -> None:
    with pytest.raises(ValueError, match=sentence), engine(folder, quantization=method):
        pass


def test_in_the_config(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Raised while vLLM checks its config: a short `validation error`, nothing started."""
    folder = Tiny("gptq", quantizes=lambda m: "_proj" in m or m == "lm_head").write(tmp_path / "m")
    refused(engine, folder, "lm_head: a quantized head or embedding is not served yet")


def test_in_a_layer(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Raised while the model is built, where fused layers are known."""
    tiny = Tiny("awq", quantizes=lambda m: m.endswith("_proj") and "layers.1.self_attn.k" not in m)
    folder = tiny.write(tmp_path / "m")
    refused(engine, folder, r"k_proj not, expected all shards of a fused layer alike", "qplug-awq")


def test_a_layer_that_is_lost(engine: Callable[..., Any], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"model.layers.1.mlp.down_proj.{part}"]

    folder = Tiny("awq", edit=edit).write(tmp_path / "m")
    refused(
        engine, folder, r"layers\.1\.mlp\.down_proj: found no weight, quantized or", "qplug-awq"
    )


def test_a_config_that_is_another_model(engine: Callable[..., Any], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["intermediate_size"] = 768

    folder = Tiny("awq", edit=edit).write(tmp_path / "m")
    refused(engine, folder, r"found 1024 x 256 weights, expected 1536 x 256", "qplug-awq")


def test_scales_that_are_not_finite(engine: Callable[..., Any], tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.scales"][1, 2] = float("inf")

    folder = Tiny("awq", edit=edit).write(tmp_path / "m")
    refused(engine, folder, r"up_proj\.scales: found 1 scales that are NaN or inf", "qplug-awq")


def test_tensors_that_never_arrive(
    engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM does not check: that the tensors of a quantized model arrived."""
    from qplug.vllm import compat, config

    dropped = compat.mapped(suffix={".1.mlp.gate_proj.qzeros": None, ".g_idx": None})
    monkeypatch.setattr(config.QplugConfig, "get_checkpoint_weight_mapper", lambda self: dropped)
    monkeypatch.setattr(config, "_KV_NAMES", {r".*layers\.1\.mlp\.gate_proj\.qzeros$": None})
    folder = Tiny("gptq").write(tmp_path / "m")
    refused(engine, folder, r"layers\.1\.mlp\.gate_proj\.qzeros: not loaded")


def test_dummy_weights_still_start(engine: Callable[..., Any], tmp_path: Path) -> None:
    folder = Tiny("gptq").write(tmp_path / "m")
    with engine(folder, quantization="qplug-gptq", load_format="dummy") as ours:
        assert len(ours.tokens(count=2)[0]) == 2

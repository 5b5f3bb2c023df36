"""A guest: whatever is wrong with qplug, vLLM serves every other model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .tiny import Tiny

pytestmark = pytest.mark.engine


def test_a_broken_registration_is_logged_and_remembered(
    engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import quantization

    import qplug.vllm

    def broken(name: str) -> Any:
        raise RuntimeError("boom in register")

    lines: list[str] = []
    log = logging.getLogger("vllm.qplug")
    monkeypatch.setattr(log, "error", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(quantization, "register_quantization_config", broken)
    qplug.vllm.register()
    assert isinstance(qplug.vllm.failure, RuntimeError)
    assert len(lines) == 1
    assert "boom in register" in lines[0]
    with engine(Tiny("awq").write(tmp_path / "m")) as stock:
        assert len(stock.tokens(count=2)[0]) == 2
    monkeypatch.undo()
    qplug.vllm.register()
    assert qplug.vllm.failure is None


def test_stock_methods_are_left_alone(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Without the option the checkpoint is served by vLLM's own method."""

    def method(model: Any) -> str:
        return type(model.model.layers[0].mlp.down_proj.quant_method).__name__

    with engine(Tiny("gptq", sym=True).write(tmp_path / "m")) as stock:
        assert "Qplug" not in stock.ask(method)

"""vLLM's own reader of compressed-tensors serves what qplug writes, token for token.

AWQ and GPTQ are in `integration/vllm/test_tokens.py`. On a CPU vLLM has kernels for 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..vllm.tiny import Tiny

pytestmark = pytest.mark.engine

SOURCES = {
    "gptq-sym-g64": Tiny("gptq", sym=True),
    "gptq-asym-g64": Tiny("gptq"),
    "awq-channel": Tiny("awq", group_size=-1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_compressed_tensors(
    name: str, engine: Callable[..., Any], qplug: Callable[..., Path], tmp_path: Path
) -> None:
    source = SOURCES[name].write(tmp_path / name)
    with engine(SOURCES[name].twin().write(tmp_path / "twin")) as twin:
        expected = twin.tokens()
    with engine(qplug(source, "compressed-tensors")) as stock:
        assert stock.tokens() == expected
        assert "CompressedTensors" in stock.ask(
            lambda model: type(model.model.layers[0].mlp.down_proj.quant_method).__name__
        )

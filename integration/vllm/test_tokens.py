"""Greedy tokens: what qplug serves equals the dequantized model, and stock vLLM where it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qplug.vllm.served import METHODS as METHOD

from .tiny import Shape, Tiny

pytestmark = pytest.mark.engine

CASES = {
    "awq-g64": Tiny("awq"),
    "awq-sym-g32": Tiny("awq", group_size=32, sym=True),
    "awq-channel": Tiny("awq", group_size=-1),
    "gptq-sym-g64": Tiny("gptq", sym=True),
    "gptq-asym-g64": Tiny("gptq"),
    "gptq-asym-ragged-g96": Tiny("gptq", group_size=96),
    "gptq-sym-channel": Tiny("gptq", group_size=-1, sym=True),
    "gptq_v2-asym-g64": Tiny("gptq_v2"),
    "gptq_v2-asym-ragged-g96": Tiny("gptq_v2", group_size=96),
}
CASES["compressed-tensors-g64"] = Tiny("compressed-tensors")
STOCK = ("awq-g64", "gptq-sym-g64")
"""What stock vLLM serves on a CPU and these tests have time for."""
WRITTEN = {
    "awq quantized": (["quantize", "--to", "awq", "--asym"],),
    "awq converted": (["quantize", "--to", "gptq", "--asym"], ["convert", "--to", "awq"]),
    "gptq quantized": (["quantize", "--to", "gptq", "--sym"],),
    "gptq converted": (["quantize", "--to", "awq", "--sym"], ["convert", "--to", "gptq"]),
}
"""What the `qplug` command writes: format, and the commands that lead there."""


@pytest.fixture(scope="module")
def twin(
    engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Tiny], Any]:
    """Return the tokens of the same weights in full precision; equal weights run once."""
    known: dict[tuple[object, ...], Any] = {}

    def tokens(tiny: Tiny) -> Any:
        key = tiny.bits, tiny.group_size, tiny.sym, tiny.shape, tuple(tiny.group_size_of)
        if key not in known:
            with engine(tiny.twin().write(tmp_path_factory.mktemp("twin") / "m")) as dense:
                known[key] = dense.tokens()
            assert len({token for answer in known[key] for token in answer}) > 30
        return known[key]

    return tokens


@pytest.mark.parametrize("name", CASES)
def test_same_tokens_as_the_dequantized_model(
    name: str, engine: Callable[..., Any], twin: Callable[[Tiny], Any], tmp_path: Path
) -> None:
    tiny = CASES[name]
    expected = twin(tiny)
    folder = tiny.write(tmp_path / "m")
    with engine(folder, quantization=METHOD[tiny.format]) as ours:
        assert ours.tokens() == expected
        kept = ours.ask(lambda m: sorted(n for n, _ in m.model.layers[0].named_parameters()))
    # Parts are dropped but for one tensor, by which LoRA finds the device.
    assert {"self_attn.qkv_proj.qweight", "self_attn.qkv_proj.weight"} & set(kept)
    assert not [n for n in kept if n.endswith(("qzeros", "scales", "g_idx", "weight_scale"))]
    if name in STOCK:
        with engine(folder) as stock:
            assert stock.tokens() == expected


@pytest.mark.parametrize("to", ["bnb-nf4", "bnb-int8"])
def test_same_tokens_as_the_dense_form(to: str, engine: Callable[..., Any], tmp_path: Path) -> None:
    """Grids that no rounding to nearest makes: converted, and their dense form beside them."""
    folder = Tiny("awq").write(tmp_path / "0")
    folder = command("convert", folder, tmp_path / "1", "--to", to, "--allow", "requantized")
    dense = command("convert", folder, tmp_path / "d", "--to", "dense", "--dtype", "float16")
    with engine(dense) as twin:
        expected = twin.tokens()
    with engine(folder, quantization=METHOD[to]) as ours:
        assert ours.tokens() == expected


def test_act_order_of_its_own_in_each_linear(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Stock vLLM up to 0.29 gives q, k and v the order of v; since 0.30 it refuses.

    The linears of a fused layer are several packs then, which tracing must not freeze.
    """

    def shuffle(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        made = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("g_idx"):
                tensors[name] = tensor[torch.randperm(len(tensor), generator=made)]
        config["quantization_config"]["desc_act"] = True

    folder = Tiny("gptq_v2", edit=shuffle).write(tmp_path / "m")
    dense = command("convert", folder, tmp_path / "d", "--to", "dense", "--dtype", "float16")
    with engine(dense) as twin:
        expected = twin.tokens()
    with engine(folder, quantization="qplug-gptq") as ours:
        assert ours.tokens() == expected
    with engine(folder, quantization="qplug-gptq", dtype="bfloat16") as eager:
        expected = eager.tokens()
    options = {"dtype": "bfloat16", "enforce_eager": False}
    with engine(folder, quantization="qplug-gptq", **options) as compiled:
        assert compiled.tokens() == expected
        packs = compiled.ask(lambda m: len(m.model.layers[0].self_attn.qkv_proj.qplug or ()))
    assert packs in (0, 3)  # none where no kernel of this CPU keeps 4 bits packed


@pytest.mark.parametrize("name", WRITTEN)
def test_stock_vllm_serves_what_qplug_writes(
    name: str, engine: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Tiny("dense").write(tmp_path / "0")
    for at, (verb, *options) in enumerate(WRITTEN[name], 1):
        if verb == "quantize":
            options += ["--bits", "4", "--group-size", "64"]
        folder = command(verb, folder, tmp_path / str(at), *options)
    dense = command("convert", folder, tmp_path / "d", "--to", "dense", "--dtype", "float32")
    with engine(folder, quantization=METHOD[name.split()[0]]) as ours:
        expected = ours.tokens()
    with engine(folder) as stock:
        assert stock.tokens() == expected
        assert "Qplug" not in stock.ask(
            lambda m: type(m.model.layers[0].mlp.down_proj.quant_method).__name__
        )
    with engine(dense) as twin:
        assert twin.tokens() == expected


def command(verb: str, source: Path, target: Path, *options: str) -> Path:
    """Run the command line in this process; return the folder it wrote."""
    from qplug.cli import main

    with pytest.raises(SystemExit) as ended:
        main([verb, str(source), str(target), *options])
    assert ended.value.code == 0
    return target


def test_float32(engine: Callable[..., Any], tmp_path: Path) -> None:
    tiny = Tiny("gptq", group_size=96)
    with engine(tiny.twin().write(tmp_path / "twin"), dtype="float32") as dense:
        expected = dense.tokens()
    with engine(tiny.write(tmp_path / "m"), quantization="qplug-gptq", dtype="float32") as ours:
        assert ours.tokens() == expected


def test_unquantized_modules_are_those_without_codes(
    engine: Callable[..., Any], tmp_path: Path
) -> None:
    """`layers.1` is in the skip list and no substring of it un-quantizes `layers.10`."""
    shape = Shape(layers=11, hidden=128, inter=128, heads=2, kv_heads=1)

    def quantizes(module: str) -> bool:
        dense = module.startswith("model.layers.1.") or module.endswith("layers.3.mlp.down_proj")
        return not dense and module.endswith("_proj")

    def edit(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1", "lm_head"]

    tiny = Tiny("awq", shape=shape, quantizes=quantizes, edit=edit)
    with engine(tiny.twin().write(tmp_path / "twin")) as dense:
        expected = dense.tokens()
    with engine(tiny.write(tmp_path / "m"), quantization="qplug-awq") as ours:
        assert ours.tokens() == expected

        def methods(model: Any) -> list[tuple[str, str]]:
            layers = model.model.layers
            return [
                (
                    type(layers[at].self_attn.qkv_proj.quant_method).__name__,
                    type(layers[at].mlp.down_proj.quant_method).__name__,
                )
                for at in (0, 1, 3, 10)
            ]

        quantized, dense_method = "QplugLinearMethod", "UnquantizedLinearMethod"
        assert ours.ask(methods) == [
            (quantized, quantized),
            (dense_method, dense_method),
            (quantized, dense_method),
            (quantized, quantized),
        ]


@pytest.mark.parametrize("side_file", ["quantize_config.json", "quant_config.json"])
def test_old_folder_with_a_side_file_only(
    side_file: str, engine: Callable[..., Any], twin: Callable[[Tiny], Any], tmp_path: Path
) -> None:
    tiny = Tiny("gptq" if side_file == "quantize_config.json" else "awq", side_file=side_file)
    with engine(tiny.write(tmp_path / "m"), quantization=METHOD[tiny.format]) as ours:
        assert ours.tokens() == twin(tiny)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compiled_equals_eager(dtype: str, engine: Callable[..., Any], tmp_path: Path) -> None:
    """What depends on the number of tokens is inside an operation: tracing freezes nothing."""
    folder = replace(CASES["awq-g64"], edit=_bfloat16 if dtype == "bfloat16" else None)
    path = folder.write(tmp_path / "m")
    with engine(path, quantization="qplug-awq", dtype=dtype) as eager:
        expected = eager.tokens()
    with engine(path, quantization="qplug-awq", dtype=dtype, enforce_eager=False) as compiled:
        assert compiled.tokens() == expected


def _bfloat16(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["torch_dtype"] = "bfloat16"

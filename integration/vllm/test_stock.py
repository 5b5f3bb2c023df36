"""The table of engines against the engine: what stock vLLM does with goldens, right and wrong.

What `qplug.engines` says for the installed version on a CPU must be what happens: the same tokens
as the tool's own dequantized weights, other tokens, or an error before there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qplug.engines import VLLM_CPU, Outcome, judge_at, of_checkpoint
from qplug.engines import version as parsed
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.survey import survey

pytestmark = pytest.mark.engine

GOLDEN = Path(__file__).parents[2] / "tests/golden"
PROMPTS = [[(7 * row + 31 * at * at) % 128 for at in range(3 + row)] for row in range(8)]
SYM, ASYM, ORDERED = "gptq-4b-sym-g32", "gptq-4b-asym-g64", "gptq-4b-sym-g64-actorder"
AWQ = "awq-gemm-g128"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def as_it_is(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Change nothing."""


def block(**keys: Any) -> Change:
    """Return a change of the config block; `...` removes a key."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        found = config["quantization_config"]
        found.update({k: v for k, v in keys.items() if v is not ...})
        for key in [k for k, v in keys.items() if v is ...]:
            found.pop(key, None)

    return change


def no_block(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Leave the block to the side file."""
    del config["quantization_config"]


def no_actorder(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Leave act order to the tensors."""
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["actorder"] = None


def scales(keys: Change = as_it_is) -> Change:
    """Return a change that adds scales of a KV cache, after another one."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        keys(config, tensors)
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor([0.5])

    return change


def shards(names: str) -> dict[str, Any]:
    """Return rules of `dynamic` for linears by their own names."""
    return {rf"+:.*\.{name}_proj$": {"group_size": 32} for name in names.split()}


CASES: dict[str, tuple[str, Change]] = {
    "4-bit symmetric": (SYM, as_it_is),
    "4-bit asymmetric": (ASYM, as_it_is),
    "2-bit": ("gptq-2b-asym-g32", as_it_is),
    "8-bit": ("gptq-8b-sym-g128", as_it_is),
    "v2": ("gptq_v2-4b-asym-g64", as_it_is),
    "channelwise": ("gptq-4b-sym-channel", as_it_is),
    "groups of 96": ("autogptq-4b-sym-ragged-g96", as_it_is),
    "act order": (ORDERED, as_it_is),
    "act order denied": (ORDERED, block(desc_act=False)),
    "act order claimed": (SYM, block(desc_act=True)),
    "symmetry claimed": (ASYM, block(sym=True)),
    "symmetry denied": (SYM, block(sym=False)),
    "no desc_act": (SYM, block(desc_act=...)),
    "no sym": (SYM, block(sym=...)),
    "no quant_method": (SYM, block(quant_method=..., method=...)),
    "QUANT_METHOD": (SYM, block(quant_method="GPTQ")),
    "side file": (SYM, no_block),
    "dynamic: null": (SYM, block(dynamic=None)),
    "dynamic of linears": (
        SYM,
        block(group_size=64, dynamic=shards("q k v o gate up down")),
    ),
    "dynamic of layers": (SYM, block(group_size=64, dynamic={r"+:.*_proj$": {"group_size": 32}})),
    "half a fused layer": ("gptq-dynamic-mixed", as_it_is),
    "experts": ("gptq-moe-mixtral-4b-g64", as_it_is),
    "AWQ": (AWQ, as_it_is),
    "AWQ with biases": ("awq-gemm-g32-bias", as_it_is),
    "AWQ without zero_point": (AWQ, block(zero_point=...)),
    "AWQ of AutoRound": ("autoround-autoawq-sym-g64", as_it_is),
    "AWQ GEMV": ("awq-gemv-g64", as_it_is),
    "AWQ, aliases": (
        AWQ,
        block(w_bit=4, q_group_size=128, bits=..., group_size=...),
    ),
    "AWQ, a list that hits too much": (AWQ, block(modules_to_not_convert=["q_proj"])),
    "AWQ, null list, KV scales": (AWQ, scales()),
    "AWQ, a list, KV scales": (AWQ, scales(block(modules_to_not_convert=["lm_head"]))),
    "GPTQ, KV scales": (SYM, scales()),
    "bitsandbytes": ("bnb-nf4", as_it_is),
    "AutoRound, GPTQ": ("autoround-gptq-sym-g128", as_it_is),
    "AutoRound, AWQ": ("autoround-awq-asym-g128", as_it_is),
    "AutoRound, 2-bit": ("autoround-native-2b-asym-g32", as_it_is),
    "AutoRound, mixed": ("autoround-mixed-extra", as_it_is),
    "compressed-tensors": ("ct-int4-asym-g64", as_it_is),
    "compressed-tensors, channelwise": ("ct-int4-asym-channel", as_it_is),
    "compressed-tensors, 8-bit": ("ct-int8-sym-channel", as_it_is),
    "compressed-tensors, 3-bit": ("ct-int3-sym-g128", as_it_is),
    "compressed-tensors, act order": ("ct-int4-asym-g64-gidx", as_it_is),
    "compressed-tensors, act order denied": ("ct-int4-asym-g64-gidx", no_actorder),
}


@pytest.fixture(scope="module")
def expected(
    engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """Return the tokens of a golden's reference weights, at float16; each golden runs once."""
    known: dict[str, Any] = {}

    def tokens(name: str) -> Any:
        if name not in known:
            folder = tmp_path_factory.mktemp("twin")
            write_twin(GOLDEN / name, folder)
            with engine(folder) as dense:
                known[name] = dense.tokens(PROMPTS, 24)
            assert len({token for answer in known[name] for token in answer}) > 4
        return known[name]

    return tokens


def write_twin(golden: Path, folder: Path) -> None:
    """Write the dequantized model of a golden, by the tool that made it."""
    config = json.loads((golden / "config.json").read_text())
    config.pop("quantization_config")
    reference = load_file(golden / "reference.safetensors")
    quantized = {name.removesuffix(".weight") for name in reference}
    tensors = {
        name: tensor
        for name, tensor in load_file(golden / "model.safetensors").items()
        if name.rpartition(".")[0] not in quantized or name.endswith(".bias")
    }
    tensors |= {name: tensor.half() for name, tensor in reference.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write(folder: Path, golden: str, change: Change) -> Path:
    """Write a golden with a change to a new folder; a block that leaves goes to the side file."""
    folder.mkdir()
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    side = dict(config["quantization_config"])
    change(config, tensors)
    if change is no_block:
        (folder / "quantize_config.json").write_text(json.dumps(side))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_right(
    name: str, engine: Callable[..., Any], expected: Callable[[str], Any], tmp_path: Path
) -> None:
    golden, change = CASES[name]
    folder = write(tmp_path / "m", golden, change)
    checkpoint = open_checkpoint(folder)
    found, model = checkpoint.scheme()
    facts = of_checkpoint(checkpoint, survey(checkpoint, found, model))
    answer = judge_at(VLLM_CPU, facts, parsed(version("vllm")))
    assert answer is not None

    if answer.outcome is Outcome.REFUSED:
        # vLLM refuses with whatever it stumbles over: a ValueError, an assertion, a missing name.
        with pytest.raises(Exception), engine(folder):  # noqa: B017, PT011
            pass
        return
    with engine(folder) as stock:
        tokens = stock.tokens(PROMPTS, 24)
    assert (tokens == expected(golden)) is (answer.outcome is Outcome.RUNS)


RESCUED: dict[str, tuple[str, Change]] = {
    "2-bit": CASES["2-bit"],
    "3-bit, old zeros": ("gptq-3b-sym-g128-by-5.8.0", as_it_is),
    "4-bit asymmetric": CASES["4-bit asymmetric"],
    "groups of 96": CASES["groups of 96"],
    "act order claimed": CASES["act order claimed"],
    "AWQ, null list, KV scales": CASES["AWQ, null list, KV scales"],
}


@pytest.mark.parametrize("name", RESCUED)
def test_what_it_refuses_it_serves_after_conversion(
    name: str, engine: Callable[..., Any], expected: Callable[[str], Any], tmp_path: Path
) -> None:
    """`qplug convert --for vllm`: the source is refused, the result is the same model."""
    from qplug.cli import main

    golden, change = RESCUED[name]
    source, target = write(tmp_path / "source", golden, change), tmp_path / "m"
    with pytest.raises(Exception), engine(source):  # noqa: B017, PT011
        pass
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(target), "--for", f"vllm={version('vllm')}", "--verify"])
    assert ended.value.code == 0
    with engine(target) as stock:
        assert stock.tokens(PROMPTS, 24) == expected(golden)
        kind = stock.ask(lambda m: type(m.model.layers[0].mlp.down_proj.quant_method).__name__)
    assert "Qplug" not in kind
    assert "Unquantized" not in kind

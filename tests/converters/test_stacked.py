"""Experts that lie stacked in one tensor are read as one linear each."""

from __future__ import annotations

from pathlib import Path

import laws
import pytest
import torch
from safetensors.torch import load_file, save_file

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.formats import compressed_tensors, gptq_v2
from qplug_converters.plan import Verdict, make_plan
from qplug_converters.scheme import Scheme
from qplug_converters.verify import verify

CT = compressed_tensors.FORMAT
LAYER = "model.layers.0.mlp.experts"
HIDDEN, INNER, EXPERTS = 64, 32, 3


def checkpoints(folder: Path, sym: bool, model_type: str = "qwen3_moe") -> tuple[Path, Path]:
    """Write the same experts apart and stacked, as `pack_to_int32` stacks them."""
    linears = {}
    for number in range(EXPERTS):
        for seed, (name, out, inp) in enumerate(
            (("gate_proj", INNER, HIDDEN), ("up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER))
        ):
            scheme = Scheme(out, inp, 4, 16, sym=sym, scale_dtype="BF16")
            weight = laws.weight_of(scheme, CT, 10 * number + seed)
            linears[f"{LAYER}.{number}.{name}"] = (scheme, weight)
    config = {"model_type": model_type, "hidden_size": HIDDEN}
    laws.write(folder / "apart", CT, linears, {"model.norm.weight": torch.ones(8)}, config)
    apart = load_file(folder / "apart" / "model.safetensors")
    stacked = {"model.norm.weight": apart["model.norm.weight"]}
    for name, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for part in sorted({n.rpartition(".")[2] for n in apart} - {"weight"}):
            each = [
                torch.cat([apart[f"{LAYER}.{number}.{leaf}.{part}"] for leaf in leaves])
                for number in range(EXPERTS)
            ]
            stacked[f"{LAYER}.{name}.{part}"] = torch.stack(each)
        out, inp = (2 * INNER, HIDDEN) if len(leaves) == 2 else (HIDDEN, INNER)
        stacked[f"{LAYER}.{name}.weight_shape"] = torch.tensor([EXPERTS, out, inp])
    (folder / "stacked").mkdir()
    save_file(stacked, folder / "stacked" / "model.safetensors", {"format": "pt"})
    (folder / "stacked" / "config.json").write_text((folder / "apart" / "config.json").read_text())
    return folder / "apart", folder / "stacked"


@pytest.mark.parametrize("sym", [True, False])
def test_stacked_experts_are_those_that_lie_apart(sym: bool, tmp_path: Path) -> None:
    apart, stacked = checkpoints(tmp_path, sym)
    assert len(load_file(stacked / "model.safetensors")) == (7 if sym else 9)
    checkpoint, found, model = laws.surveyed(stacked)
    assert len(model.linears) == 3 * EXPERTS
    assert verify(open_checkpoint(apart), checkpoint).same
    for target in (gptq_v2.FORMAT, CT):
        plan = make_plan(found, model, target)
        assert plan.verdict is not Verdict.COPIED, "the names of the file are others"
        execute(plan, checkpoint, tmp_path / target.name)
        assert verify(open_checkpoint(apart), open_checkpoint(tmp_path / target.name)).same
    written = load_file(tmp_path / CT.name / "model.safetensors")
    assert written[f"{LAYER}.2.up_proj.weight_shape"].tolist() == [INNER, HIDDEN]


def test_transposed_experts_are_refused(tmp_path: Path) -> None:
    """Of Llama 4 and gpt-oss, the stored rows are inputs."""
    _, stacked = checkpoints(tmp_path, True, "llama4")
    with pytest.raises(QplugError) as caught:
        laws.surveyed(stacked)
    problems = [caught.value, *caught.value.others]
    assert {error.where for error in problems} == {
        f"{LAYER}.{name}.weight_packed" for name in ("gate_up_proj", "down_proj")
    }
    assert all("experts in one tensor" in error.found for error in problems)


def test_a_damaged_slice_is_found(tmp_path: Path) -> None:
    apart, stacked = checkpoints(tmp_path, False)
    tensors = load_file(stacked / "model.safetensors")
    tensors[f"{LAYER}.gate_up_proj.weight_zero_point"][1, 3] ^= 1 << 9
    save_file(tensors, stacked / "model.safetensors", {"format": "pt"})
    proof = verify(open_checkpoint(apart), open_checkpoint(stacked))
    assert [r.module for r in proof.linears if r.differing] == [f"{LAYER}.1.gate_proj"]

"""What linears of an MLP owe each other: act order absorbed, zeros added, codes shifted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import laws
import pytest
import torch
from torch import Tensor

from qplug_converters import formats
from qplug_converters.blocks import read_rows
from qplug_converters.checkpoint import Checkpoint, open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.execute import execute
from qplug_converters.look import looker
from qplug_converters.plan import Plan, Verdict, Wishes, make_plan
from qplug_converters.scheme import Scheme
from qplug_converters.survey import survey
from qplug_converters.verify import verify

MLP = "model.layers.0.mlp."
GATE, UP, DOWN = f"{MLP}gate_proj", f"{MLP}up_proj", f"{MLP}down_proj"


def mlp(
    folder: Path,
    *,
    hidden: int = 64,
    inner: int = 96,
    group: int = 32,
    ordered: bool = False,
    to: str = "gptq",
    rest: dict[str, Tensor] | None = None,
) -> Checkpoint:
    """Write a gated MLP; with `ordered`, the columns of the last linear are in act order."""
    target = formats.find(to)
    linears = {}
    for seed, (name, out, inp) in enumerate(
        ((GATE, inner, hidden), (UP, inner, hidden), (DOWN, hidden, inner))
    ):
        act = ordered and name == DOWN
        scheme = target.adopt(Scheme(out, inp, 4, group, act_order=act, desc_act=act))
        linears[name] = (scheme, laws.weight_of(scheme, target, seed))
    extra = {f"{GATE}.bias": torch.arange(inner).half()} if rest is None else rest
    config = {"intermediate_size": inner, "hidden_size": hidden}
    return laws.write(folder, target, linears, extra, config)


def planned(checkpoint: Checkpoint, to: str, wishes: Wishes | None = None) -> Plan:
    found, model = checkpoint.scheme()
    model = survey(checkpoint, found, model)
    return make_plan(
        found,
        model,
        formats.find(to),
        wishes,
        headers=checkpoint.headers,
        model_type=checkpoint.model_type,
        look=looker(checkpoint, found, model),
    )


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the dequantized linears."""
    found, model = checkpoint.scheme()
    return {
        name: read_rows(checkpoint, found.layout(s), s, name, 0, s.out_features).dequantize()
        for name, s in model.linears.items()
    }


def proven(one: Checkpoint, two: Checkpoint) -> None:
    """Prove from bytes that two checkpoints are the same, and that no bit can be changed."""
    proof = verify(one, two)
    assert proof.same, proof
    assert len(proof.notes) > len(one.scheme()[1].notes)


@pytest.mark.parametrize("name", [f"{GATE}.bias", f"{UP}.qweight", f"{DOWN}.qweight"])
@pytest.mark.parametrize("how", ["ordered", "padded"])
def test_one_bit_is_found_there_too(name: str, how: str, tmp_path: Path) -> None:
    checkpoint = mlp(tmp_path / "a", ordered=how == "ordered")
    wishes = None if how == "ordered" else Wishes(tp=5)
    execute(planned(checkpoint, "awq", wishes), checkpoint, tmp_path / "b")
    for seed in range(4):
        laws.mutate_tensor(tmp_path / "b", tmp_path / f"c{seed}", name, "bit", seed)
        assert laws.found(checkpoint, tmp_path / f"c{seed}") is not None


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_act_order_of_an_mlp_is_absorbed(to: str, tmp_path: Path) -> None:
    checkpoint = mlp(tmp_path / "a", ordered=True)
    plan = planned(checkpoint, to)
    assert plan.verdict is Verdict.EXACT
    steps = {step.module: step for step in plan.steps}
    assert [str(m) for m in steps[DOWN].moves] == ["sort_columns(g_idx)"]
    assert steps[GATE].rows_from == steps[UP].rows_from == DOWN
    execute(plan, checkpoint, tmp_path / "b")
    there = open_checkpoint(tmp_path / "b")
    before, after = weights(checkpoint), weights(there)
    order = torch.argsort(checkpoint.tensor(f"{DOWN}.g_idx").long(), stable=True)
    assert not torch.equal(order, torch.arange(96))
    assert torch.equal(after[DOWN], before[DOWN][:, order])
    assert torch.equal(after[GATE], before[GATE][order])
    assert torch.equal(after[UP], before[UP][order])
    assert torch.equal(there.tensor(f"{GATE}.bias"), order.half())
    proven(checkpoint, there)
    proven(there, checkpoint)


def test_nothing_is_absorbed_across_a_norm(tmp_path: Path) -> None:
    norm = {f"{MLP}ffn_layernorm.weight": torch.ones(96)}
    plan = planned(mlp(tmp_path / "a", ordered=True, rest=norm), "awq")
    assert plan.verdict is Verdict.REQUANTIZED
    assert not plan.reordered


def test_nothing_is_absorbed_where_the_target_has_g_idx(tmp_path: Path) -> None:
    plan = planned(mlp(tmp_path / "a", ordered=True), "gptq_v2")
    assert plan.verdict is Verdict.EXACT
    assert not any(step.moves or step.rows_from for step in plan.steps)


@pytest.mark.parametrize(("ranks", "group"), [(2, 64), (4, 32), (1, 128)])
def test_groups_are_split_between_ranks(ranks: int, group: int, tmp_path: Path) -> None:
    checkpoint = mlp(tmp_path / "a", hidden=128, inner=128, group=128)
    plan = planned(checkpoint, "gptq", Wishes(tp=ranks))
    assert plan.verdict is (Verdict.EXACT if ranks > 1 else Verdict.COPIED)
    verdicts = {step.module: step.verdict for step in plan.steps}
    assert verdicts[GATE] is verdicts[UP] is Verdict.COPIED
    down = next(step for step in plan.steps if step.module == DOWN)
    assert down.target.group_size == group
    assert plan.nbytes[1] >= plan.nbytes[0]
    execute(plan, checkpoint, tmp_path / "b")
    before, after = weights(checkpoint), weights(open_checkpoint(tmp_path / "b"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_zeros_are_added_where_groups_cannot_be_split(to: str, tmp_path: Path) -> None:
    checkpoint = mlp(tmp_path / "a", to=to)
    plan = planned(checkpoint, to, Wishes(tp=5))
    assert plan.verdict is Verdict.EXACT
    assert dict(plan.widened) == {96: 160}
    execute(plan, checkpoint, tmp_path / "b")
    there = open_checkpoint(tmp_path / "b")
    assert there.config["intermediate_size"] == 160
    before, after = weights(checkpoint), weights(there)
    for name in (GATE, UP):
        assert torch.equal(after[name][:96], before[name])
        assert not after[name][96:].any()
    assert torch.equal(after[DOWN][:, :96], before[DOWN])
    assert not after[DOWN][:, 96:].any()
    bias = there.tensor(f"{GATE}.bias")
    assert torch.equal(bias[:96], torch.arange(96).half())
    assert not bias[96:].any()
    proven(checkpoint, there)
    again = planned(there, to, Wishes(tp=5))
    assert again.verdict <= Verdict.EXACT
    assert not again.widened


def test_a_width_that_no_key_says(tmp_path: Path) -> None:
    checkpoint = mlp(tmp_path / "a")
    checkpoint.config["intermediate_size"] = 95
    with pytest.raises(QplugError) as caught:
        execute(planned(checkpoint, "gptq", Wishes(tp=5)), checkpoint, tmp_path / "b")
    assert caught.value.where == "config.json"
    assert not (tmp_path / "b").exists()


def test_attention_outputs_are_not_padded(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.o_proj"
    target = formats.find("gptq")
    scheme = target.adopt(Scheme(64, 96, 4, 32))
    linears = {module: (scheme, laws.weight_of(scheme, target, 1))}
    plan = planned(laws.write(tmp_path / "a", target, linears), "gptq", Wishes(tp=5))
    assert plan.verdict is Verdict.IMPOSSIBLE
    assert plan.steps[0].reason == "96 inputs do not split between 5 ranks"


@pytest.mark.parametrize(("low", "fits"), [(0, True), (1, False)])
def test_zeros_are_shifted_where_codes_leave_room(low: int, fits: bool, tmp_path: Path) -> None:
    """A zero of 0 goes to GPTQ v1 as 1 if no code of its group is 15 [X4]."""
    v2 = formats.find("gptq_v2")
    scheme = v2.adopt(Scheme(32, 64, 4, 32))
    weight = laws.weight_of(scheme, v2, 3)
    weight.affine.zeros[5, 1] = 0
    weight.codes[5, 32:] = weight.codes[5, 32:].clamp(max=14) + low
    if not fits:
        weight.codes[5, 40] = 15
    weight.affine.zeros[weight.affine.zeros == 0] = 1
    weight.affine.zeros[5, 1] = 0
    checkpoint = laws.write(tmp_path / "a", v2, {UP: (scheme, weight)})
    plan = planned(checkpoint, "gptq")
    assert plan.verdict is (Verdict.EXACT if fits else Verdict.REQUANTIZED)
    if not fits:
        return
    assert [str(move) for move in plan.steps[0].moves] == ["shift_zeros(1..15)"]
    execute(plan, checkpoint, tmp_path / "b")
    assert torch.equal(weights(checkpoint)[UP], weights(open_checkpoint(tmp_path / "b"))[UP])
    said = json.loads((tmp_path / "b" / "qplug-certificate.json").read_text())
    assert said["linears"][UP]["moves"] == ["shift_zeros(1..15)"]


def test_moves_that_do_not_fit_are_refused() -> None:
    from qplug_converters import moves

    v2 = formats.find("gptq_v2")
    weight = laws.weight_of(v2.adopt(Scheme(32, 64, 4, 32)), v2, 3)
    weight = replace(weight, codes=torch.full_like(weight.codes, 15))
    weight.affine.zeros.fill_(0)
    assert not moves.room_to_shift(weight, 1, 15)
    with pytest.raises(QplugError, match="do not fit"):
        moves.shift_zeros(weight, "1..15")

"""Names by role, and as readers want them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import laws
import pytest

from qplug_converters import names
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.formats import FORMATS
from qplug_converters.layout import TensorSpec

GOLDEN = Path(__file__).parents[1] / "golden"
L = "model.layers.0"

ORIGINAL = [f"{L}.block_sparse_moe.experts.7.{w}.qweight" for w in ("w1", "w3", "w2")]
LINEARIZED = [f"{L}.block_sparse_moe.experts.7.{w}_proj.qweight" for w in ("gate", "up", "down")]
DEFUSED = [f"{L}.mlp.experts.7.{w}_proj.qweight" for w in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("self_attn.k_scale", ("self_attn.k_scale",)),
        ("self_attn.v_scale", ("self_attn.v_scale",)),
        ("self_attn.q_scale", ("self_attn.q_scale",)),
        ("self_attn.k_proj.k_scale", ("self_attn.k_scale",)),
        ("self_attn.v_proj.v_scale", ("self_attn.v_scale",)),
        ("self_attn.k_proj.output_scale", ("self_attn.k_scale",)),
        ("self_attn.v_proj.output_scale", ("self_attn.v_scale",)),
        ("self_attn.q_proj.output_scale", ("self_attn.q_scale",)),
        ("self_attn.kv_scale", ("self_attn.k_scale", "self_attn.v_scale")),
        ("self_attn.qkv_proj.k_scale", ("self_attn.k_scale",)),
        ("self_attn.qkqkv_proj.v_scale", ("self_attn.v_scale",)),
        ("mixer.k_proj.k_scale", ("mixer.k_scale",)),
        ("self_attn.k_cache.scale", ("self_attn.k_scale",)),
        ("self_attn.v_cache.scale", ("self_attn.v_scale",)),
        ("self_attn.q.scale", ("self_attn.q_scale",)),
        ("self_attn.attn.k_scale", ("self_attn.k_scale",)),
        ("mixer.attn.v_scale", ("mixer.v_scale",)),
        ("self_attn.k_proj.weight_scale", ()),
        ("self_attn.k_proj.v_scale", ()),
        ("self_attn.o_proj.output_scale", ()),
        ("self_attn.prob_output_scale", ()),
        ("self_attn.k_proj.scales", ()),
        ("mlp.gate_proj.output_scale", ()),
        ("mlp.k_scale", ()),
    ],
)
def test_kv_scales(name: str, wanted: tuple[str, ...]) -> None:
    assert names.kv_scales(f"{L}.{name}") == tuple(f"{L}.{w}" for w in wanted)
    assert names.kv_scales(f"language_model.{L}.{name}") == tuple(
        f"language_model.{L}.{w}" for w in wanted
    )


@pytest.mark.parametrize("target", [f.name for f in FORMATS])
def test_kv_scales_are_renamed_for_every_format(target: str) -> None:
    found = names.renames(
        [f"{L}.self_attn.kv_scale", f"{L}.self_attn.k_proj.qweight", "m.mixer.k_cache.scale"],
        "llama",
        target,
    )
    assert found == {
        f"{L}.self_attn.kv_scale": (f"{L}.self_attn.k_scale", f"{L}.self_attn.v_scale"),
        "m.mixer.k_cache.scale": ("m.mixer.k_scale",),
    }


def test_two_scales_for_one_are_refused() -> None:
    with pytest.raises(QplugError) as caught:
        names.renames([f"{L}.self_attn.kv_scale", f"{L}.self_attn.v_scale"], "llama", "awq")
    assert caught.value.where == f"{L}.self_attn.v_scale"
    assert "kv_scale" in caught.value.found


@pytest.mark.parametrize(
    ("target", "reads"),
    [
        ("gptq", [DEFUSED]),
        ("gptq_v2", [DEFUSED]),
        ("awq", [ORIGINAL]),
        ("dense", [ORIGINAL]),
        ("compressed-tensors", [ORIGINAL, LINEARIZED]),
        ("vllm", [ORIGINAL, LINEARIZED]),
        ("canonical", [ORIGINAL, LINEARIZED, DEFUSED]),
    ],
)
@pytest.mark.parametrize("present", [ORIGINAL, LINEARIZED, DEFUSED])
def test_experts_of_mixtral(target: str, reads: list[list[str]], present: list[str]) -> None:
    """What the reader takes stays; anything else becomes what its tool writes."""
    found = names.renames(present, "mixtral", target)
    if present in reads:
        assert found == {}
    else:
        assert found == {old: (new,) for old, new in zip(present, reads[0], strict=True)}


def test_routers_go_with_their_experts() -> None:
    assert names.renames([f"{L}.mlp.gate.weight", f"{L}.mlp.gate"], "mixtral", "awq") == {
        f"{L}.mlp.gate.weight": (f"{L}.block_sparse_moe.gate.weight",),
        f"{L}.mlp.gate": (f"{L}.block_sparse_moe.gate",),
    }


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "deepseek_v3", "llama", None])
@pytest.mark.parametrize("target", [f.name for f in FORMATS])
def test_families_on_which_all_agree_keep_their_names(model_type: str, target: str) -> None:
    present = [*DEFUSED, f"{L}.mlp.gate.weight", f"{L}.mlp.shared_expert.gate_proj.qweight"]
    assert names.renames(present, model_type, target) == {}


def test_what_is_no_expert_keeps_its_name() -> None:
    kept = [
        f"{L}.mlp.gate_proj.qweight",
        f"{L}.input_layernorm.weight",
        "model.embed_tokens.weight",
    ]
    assert names.renames(kept, "mixtral", "awq") == {}


def test_roles_are_the_same_whoever_named_them() -> None:
    for spelled in (ORIGINAL, LINEARIZED, DEFUSED):
        assert [names.normal(name) for name in spelled] == [(name,) for name in DEFUSED]
    assert names.normal(f"{L}.block_sparse_moe.experts.7.w2") == (f"{L}.mlp.experts.7.down_proj",)
    assert names.normal(f"{L}.block_sparse_moe.gate") == (f"{L}.mlp.gate",)
    assert names.normal(f"{L}.mlp.gate_proj") == (f"{L}.mlp.gate_proj",)
    assert len(names.normal(f"{L}.self_attn.kv_scale")) == 2


def test_renaming_keeps_roles() -> None:
    checkpoint = open_checkpoint(GOLDEN / "gptq-moe-mixtral-4b-g64")
    changed = names.renames(checkpoint.headers, "mixtral", "awq")
    assert len(changed) == 3 * 3 * 4 + 1
    for old, (new,) in changed.items():
        assert names.normal(old) == names.normal(new)
        assert "block_sparse_moe" in new
    assert names.renames(checkpoint.headers, "mixtral", "gptq_v2") == {}


@pytest.mark.parametrize(
    ("shape", "strategy"),
    [((), "tensor"), ((1,), "tensor"), ((2,), "attn_head"), ((8, 1, 1), "attn_head")],
)
def test_the_kv_scheme_of_a_file(shape: tuple[int, ...], strategy: str) -> None:
    headers = {f"{L}.self_attn.{n}_proj.output_scale": TensorSpec("F32", shape) for n in "kv"}
    assert names.kv_scheme(headers)["strategy"] == strategy
    assert names.kv_scheme({f"{L}.self_attn.q_scale": TensorSpec("F32", ())}) == {}


def test_the_kv_scheme_is_that_of_the_tool(tmp_path: Path) -> None:
    """From the scales alone, where a config has lost it."""
    folder = tmp_path / "a"
    shutil.copytree(GOLDEN / "ct-int4-sym-g128-kv-fp8", folder)
    config = json.loads((folder / "config.json").read_text())
    wanted = config["quantization_config"].pop("kv_cache_scheme")
    (folder / "config.json").write_text(json.dumps(config))
    _, _, model = laws.surveyed(folder)
    assert json.dumps(model.kv_scheme) == json.dumps(wanted)

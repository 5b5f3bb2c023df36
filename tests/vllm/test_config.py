"""What the plugin accepts and refuses, without an engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cards
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed")

from qplug.vllm import compat, kv
from qplug.vllm.config import CONFIGS, AWQConfig, GPTQConfig, QplugConfig
from qplug.vllm.served import METHODS

LAYER = "model.layers.{}.{}"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
QKV = [LAYER.format(i, f"self_attn.{p}_proj") for i in (0, 1) for p in "qkv"]


def linear(method: str, out: int = 32, inp: int = 64, bits: int = 4, group: int = 32) -> Any:
    """Return the tensors of one linear."""
    groups = -(-inp // group)
    words = out * bits // 32
    packed = (inp, words) if method == "awq" else (inp * bits // 32, out)
    parts = {
        "qweight": torch.zeros(packed, dtype=torch.int32),
        "qzeros": torch.zeros((groups, words), dtype=torch.int32),
        "scales": torch.ones(groups, out, dtype=torch.float16),
    }
    if method == "gptq":
        parts["g_idx"] = (torch.arange(inp) // group).to(torch.int32)
    return parts


def checkpoint(
    folder: Path,
    block: Mapping[str, Any] = GPTQ,
    modules: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, Any]], None] = lambda tensors: None,
) -> QplugConfig:
    """Write a checkpoint and return its config before the headers are read."""
    method = block["quant_method"]
    modules = {name: linear(method) for name in QKV} if modules is None else modules
    tensors = {f"{m}.{part}": t for m, parts in modules.items() for part, t in parts.items()}
    tensors["lm_head.weight"] = torch.zeros(4, 4, dtype=torch.float16)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(block)}))
    return (AWQConfig if method == "awq" else GPTQConfig).from_config(dict(block))


def read(folder: Path, *args: Any, **kwargs: Any) -> QplugConfig:
    config = checkpoint(folder, *args, **kwargs)
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = FUSED
    return config


@pytest.mark.parametrize(
    ("block", "user", "answer"),
    [
        (AWQ, "qplug-awq", "qplug-awq"),
        ({"quant_method": "AWQ"}, "qplug-awq", "qplug-awq"),
        (AWQ, None, None),
        (AWQ, "awq", None),
        (AWQ, "qplug-gptq", None),
        (GPTQ, "qplug-awq", None),
        ({}, "qplug-awq", None),
        ({"quant_method": None}, "qplug-awq", None),
        (None, "qplug-awq", None),
        ("nonsense", "qplug-awq", None),
    ],
)
def test_override_answers_for_its_own_name_only(block: Any, user: Any, answer: Any) -> None:
    assert AWQConfig.override_quantization_method(block, user) == answer


def test_reads_the_headers_and_survives_a_process_boundary(tmp_path: Path) -> None:
    config = pickle.loads(pickle.dumps(read(tmp_path)))
    shards = config.shards(LAYER.format(1, "self_attn.qkv_proj"))
    assert [module for module, _ in shards] == QKV[3:]
    assert config.shards("lm_head") == []
    names = [part.name for part in config.layout(shards[0][1])]
    assert names == ["qweight", "qzeros", "scales"]  # a g_idx in order is not loaded


def dropped(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensor})


def with_zeros(method: str, word: int) -> Any:
    """Return a linear whose words of zeros are all `word`."""
    parts = linear(method)
    return parts | {"qzeros": torch.full_like(parts["qzeros"], word)}


Q = QKV[0]
SHUFFLED = (torch.arange(64).flip(0) // 32).to(torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing qzeros": (
        {"edit": dropped(f"{Q}.qzeros")},
        rf"{Q}\.qzeros: found no such tensor",
    ),
    "missing qweight": ({"edit": dropped(f"{Q}.qweight")}, rf"{Q}\.\w+: found .*, expected a"),
    "short scales": (
        {"edit": replaced(f"{Q}.scales", torch.ones(2, 24).half())},
        rf"{Q}\.scales: found F16\[2, 24\], expected F16\[2, 32\]",
    ),
    "wrong type": (
        {"edit": replaced(f"{Q}.qweight", torch.zeros(8, 32, dtype=torch.int64))},
        rf"{Q}\.qweight: found I64\[8, 32\], expected I32\[8, 32\]",
    ),
    "group size of the config": (
        {"block": GPTQ | {"group_size": 64}},
        r"the config says 4 bits, group_size 64; the tensors must agree",
    ),
    "experts": (
        {"modules": {LAYER.format(0, "mlp.experts.3.w1"): linear("gptq")}},
        r"quantized experts \(MoE\) are not served yet",
    ),
    "head": ({"modules": {"lm_head": linear("gptq")}}, r"lm_head: a quantized head"),
    "unknown tensor": (
        {"edit": replaced(f"{Q}.foo", torch.ones(1))},
        rf"{Q}\.foo: found F32\[1\], expected no such tensor",
    ),
    "bias of some layers": (
        {"edit": replaced(f"{Q}.bias", torch.ones(32).half())},
        rf"{QKV[3]}\.bias: found no such tensor",
    ),
    "symmetric v1 zeros under gptq_v2": (
        {
            "block": GPTQ | {"sym": True, "checkpoint_format": "gptq_v2"},
            "modules": {name: with_zeros("gptq", 0x77777777) for name in QKV},
        },
        r"_proj\.qzeros: found the zeros of a symmetric v1 file, expected those of .*'gptq_v2'",
    ),
    "tiles": (
        {"block": GPTQ | {"checkpoint_format": "marlin"}},
        "checkpoint_format: found 'marlin'",
    ),
    "numbers as strings": ({"block": GPTQ | {"bits": "4"}}, "bits: found '4'"),
    "gemv": ({"block": AWQ | {"version": "gemv"}}, "version: found 'gemv'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_one_sentence(name: str, tmp_path: Path) -> None:
    made, sentence = REFUSED[name]
    config = checkpoint(tmp_path, **made)
    with pytest.raises(ValueError, match=sentence) as caught:
        config.maybe_update_config(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("qplug: ")


def test_a_flag_without_act_order_is_served(tmp_path: Path) -> None:
    config = read(tmp_path, GPTQ | {"desc_act": True})
    assert len(config.linears) == len(QKV)


def test_hf_overrides_replace_the_block(tmp_path: Path) -> None:
    """vLLM hands over the block it decided on; the one in the folder is not asked again."""
    checkpoint(tmp_path)
    config = GPTQConfig.from_config(GPTQ | {"checkpoint_format": "gptq_v2"})
    config.maybe_update_config(str(tmp_path))
    assert config.format.name == "gptq_v2"


def test_symmetric_zeros_under_their_own_label(tmp_path: Path) -> None:
    """The counterpart of the refusal: the same words labelled v1, and v2's words labelled v2."""
    for label, word in (("gptq", 0x77777777), ("gptq_v2", -0x77777778)):
        folder = tmp_path / label
        folder.mkdir()
        block = GPTQ | {"sym": True, "checkpoint_format": label}
        config = read(folder, block, {name: with_zeros("gptq", word) for name in QKV})
        assert config.format.name == label
        assert all(scheme.symmetric for _, scheme in config.linears.values())


def test_a_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="hf download nobody/nothing"):
        GPTQConfig.from_config(GPTQ).maybe_update_config("nobody/nothing")


def test_a_model_in_the_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    config = checkpoint(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config.maybe_update_config("somebody/something")
    assert len(config.linears) == len(QKV)


def test_shards_that_disagree(tmp_path: Path) -> None:
    def dense(tensors: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{Q}.{part}"]
        tensors[f"{Q}.weight"] = torch.zeros(32, 64).half()

    config = read(tmp_path, edit=dense)
    prefix = LAYER.format(0, "self_attn.qkv_proj")
    with pytest.raises(ValueError, match=f"{QKV[1]} quantized and {Q} not"):
        config.shards(prefix)


def test_shards_may_differ_but_for_their_inputs(tmp_path: Path) -> None:
    block = GPTQ | {"dynamic": {r"+:.*k_proj": {"group_size": 64, "bits": 8}}}
    modules = {
        m: linear("gptq", group=64, bits=8) if "k_proj" in m else linear("gptq") for m in QKV
    }
    config = read(tmp_path, block, modules)
    shards = config.shards(LAYER.format(0, "self_attn.qkv_proj"))
    assert [(scheme.bits, scheme.group_size) for _, scheme in shards] == [(4, 32), (8, 64), (4, 32)]
    wide = {m: linear("gptq", inp=128 if "k_proj" in m else 64) for m in QKV}
    config = read(tmp_path, GPTQ, wide)
    with pytest.raises(ValueError, match=r"q_proj with 64 inputs and .*k_proj with 128"):
        config.shards(LAYER.format(0, "self_attn.qkv_proj"))


def test_act_order_is_loaded_where_there_is_any(tmp_path: Path) -> None:
    config = read(tmp_path, edit=replaced(f"{Q}.g_idx", SHUFFLED))
    for _, scheme in config.shards(LAYER.format(0, "self_attn.qkv_proj")):
        assert "g_idx" in [part.name for part in config.layout(scheme)]
    name = f"{Q}.g_idx"
    assert config.get_checkpoint_weight_mapper().apply_list([name]) == [name]


def test_names_match_as_whole_components(tmp_path: Path) -> None:
    names = [LAYER.format(i, "mlp.down_proj") for i in (0, 10)]
    dense = LAYER.format(1, "mlp.down_proj")
    weight = {dense: {"weight": torch.zeros(32, 64).half()}}
    config = read(tmp_path, modules={n: linear("gptq") for n in names} | weight)
    assert config.shards(dense) == []
    assert [m for m, _ in config.shards(names[1])] == [names[1]]
    with pytest.raises(ValueError, match="found no weight, quantized or not"):
        config.shards(LAYER.format(2, "mlp.down_proj"))
    assert config.shards("visual.blocks.0.proj") == []


def test_modules_are_renamed_with_the_model(tmp_path: Path) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = read(tmp_path)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    prefix = "language_model." + LAYER.format(0, "self_attn.qkv_proj")
    assert [m for m, _ in config.shards(prefix)] == QKV[:3]


def test_tensor_names(tmp_path: Path) -> None:
    config = read(tmp_path)
    scales, tensors = config.get_cache_scale_mapper(), config.get_checkpoint_weight_mapper()
    attention = "model.layers.0.self_attn"
    for name in ("k_proj.output_scale", "k_proj.k_scale", "k_scale", "attn.k_scale", "kv_scale"):
        assert scales.apply_list([f"{attention}.{name}"]) == [f"{attention}.attn.k_scale"]
    assert tensors.apply_list([f"{attention}.q_proj.g_idx"]) == []
    kept = f"{attention}.q_proj.qweight"
    assert tensors.apply_list([kept]) == [kept]


@pytest.mark.parametrize(
    "dtype",
    [
        "fp8_inc", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "nvfp4",
        "turboquant_k8v4", "fp8_ds_mla", "nvfp4_ds_mla", "ultraquant_4bit", "nvfp4_4over6",
    ],
)  # fmt: skip
def test_kv_dtypes_that_a_cpu_turns_into_garbage(dtype: str, monkeypatch: Any) -> None:
    layer = SimpleNamespace(kv_cache_dtype=dtype)
    config = AWQConfig.from_config(AWQ)
    monkeypatch.setattr(kv, "is_cpu", lambda: True)
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}: vLLM's CPU engine"):
        kv.kv_method(config, layer)
    monkeypatch.setattr(kv, "is_cpu", lambda: False)
    assert isinstance(kv.kv_method(config, layer), kv.QplugKVCacheMethod)


@pytest.mark.parametrize("dtype", kv.SOUND_ON_CPU)
def test_kv_dtypes_that_are_served(dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(kv, "is_cpu", lambda: True)
    found = kv.kv_method(AWQConfig.from_config(AWQ), SimpleNamespace(kv_cache_dtype=dtype))
    assert (found is None) == (dtype == "fp8_e5m2")


def test_tensor_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    config = read(tmp_path)
    monkeypatch.setattr(compat, "tensor_parallel_size", lambda: 2)
    layer = LinearBase.__new__(LinearBase)
    with pytest.raises(ValueError, match="tensor parallel 2 is not served yet"):
        config.get_quant_method(layer, LAYER.format(0, "self_attn.qkv_proj"))


GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = (
    *cards.GPU_KERNELS,
    "autoround-gptq-sym-g128",
    "ct-int4-asym-g64-gidx",
    "gptq-8b-sym-g128",
)


def load_layer(name: str) -> tuple[Any, Any, list[str]]:
    """Load the q, k and v of a golden checkpoint as vLLM does; return layer, method and names."""
    from qplug.vllm import linear as door

    block = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    [made] = [c for c in CONFIGS if c.override_quantization_method(block, c.name)]
    config = made.from_config(block)
    config.maybe_update_config(str(GOLDEN / name))
    config.packed_modules_mapping = FUSED
    assert METHODS[config.format.name] == made.name
    found = config.shards("model.layers.0.self_attn.qkv_proj")
    shards = [door.Shard(m, s, config.layout(s)) for m, s in found]
    layer = torch.nn.Module()
    method = door.QplugLinearMethod(shards)
    sizes, inp = [s.scheme.out_features for s in shards], shards[0].scheme.in_features
    method.create_weights(layer, inp, sizes, inp, sum(sizes), torch.float32)
    mapper = config.get_checkpoint_weight_mapper()
    for tensor, value in load_file(GOLDEN / name / "model.safetensors").items():
        for place, shard in zip("qkv", shards, strict=True):
            if tensor.startswith(f"{shard.module}.") and not tensor.endswith(".bias"):
                for renamed in mapper.apply_list([tensor]):
                    parameter = getattr(layer, renamed.removeprefix(f"{shard.module}."))
                    parameter.weight_loader(parameter, value, place)
    method.unquantized = SimpleNamespace(
        process_weights_after_loading=lambda layer: None,
        apply=lambda layer, x, bias: torch.nn.functional.linear(x, layer.weight, bias),
    )
    return layer, method, [shard.module for shard in shards]


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_from_a_file_of_the_tool(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor under the name vLLM gives it, into the fused layer; the product at the end."""
    monkeypatch.setattr(compat, "load_is_dummy", lambda: False)
    layer, method, modules = load_layer(name)
    method.process_weights_after_loading(layer)
    reference = load_file(GOLDEN / name / "reference.safetensors")
    weight = torch.cat([reference[f"{module}.weight"] for module in modules])
    assert torch.equal(layer.weight, weight)
    x = torch.randn(3, weight.shape[1])
    assert torch.equal(method.apply(layer, x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("name", cards.GPU_KERNELS)
@pytest.mark.parametrize("arch", cards.ARCHS)
def test_the_kernel_of_a_card(arch: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for q, k and v together, but where their orders of columns differ."""
    monkeypatch.setattr(compat, "load_is_dummy", lambda: False)
    chosen = cards.put_in(monkeypatch, arch)
    layer, method, _ = load_layer(name)
    method.process_weights_after_loading(layer)
    assert set(chosen) == {cards.expected(name, arch)}
    assert len(chosen) == 1


def test_a_tensor_of_another_shape_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qplug.vllm import linear as door

    monkeypatch.setattr(compat, "load_is_dummy", lambda: False)
    config = read(tmp_path)
    shards = [door.Shard(m, s, config.layout(s)) for m, s in config.shards(QKV[0])]
    layer, found = torch.nn.Module(), door.QplugLinearMethod(shards)
    found.create_weights(layer, 64, [32], 64, 32, torch.float32)
    load = layer.qweight.weight_loader
    for wrong in (torch.zeros(8, 31, dtype=torch.int32), torch.zeros(8, 32, dtype=torch.int64)):
        with pytest.raises(ValueError, match=rf"{Q}\.qweight: found .*, expected I32\[8, 32\]"):
            load(layer.qweight, wrong)
    for place in ("k", 1, (0, 1)):
        with pytest.raises(ValueError, match="of a layer, which is 1 of the checkpoint's linears"):
            load(layer.qweight, torch.zeros(8, 32, dtype=torch.int32), place)
    load(layer.qweight, torch.zeros(8, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"{Q}\.qzeros: not loaded, although"):
        found.process_weights_after_loading(layer)

"""Checkpoints of the real tools: loaded, run, saved, and turned back into ordinary models."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.engine

NAMES = [
    "autogptq-3b-sym-g64",
    "autogptq-4b-asym-g128",
    "autogptq-4b-sym-ragged-g96",
    "autoround-autoawq-sym-g64",
    "awq-gemm-g128",
    "awq-gemm-g32-bias",
    "autoround-awq-asym-g128",
    "autoround-gptq-sym-g128",
    "autoround-mixed-extra",
    "autoround-native-2b-asym-g32",
    "awq-gemv-g64",
    "awq-gemv_fast-g64",
    "bnb-fp4",
    "bnb-int8",
    "bnb-nf4",
    "bnb-nf4-after-forward",
    "bnb-nf4-dq",
    "bnb-nf4-dq-after-forward",
    "bnb-nf4-dq-storage-bf16",
    "ct-int3-asym-g128-fields",
    "ct-int3-sym-g128",
    "ct-int4-asym-channel",
    "ct-int4-asym-g64",
    "ct-int4-asym-g64-gidx",
    "ct-int4-sym-g128-kv-fp8",
    "ct-int8-sym-channel",
    "gptq-2b-asym-g32",
    "gptq-3b-asym-g128",
    "gptq-3b-sym-g128-by-5.8.0",
    "gptq-4b-asym-g64",
    "gptq-4b-sym-channel",
    "gptq-4b-sym-g128",
    "gptq-4b-sym-g32",
    "gptq-4b-sym-g64-actorder",
    "gptq-8b-sym-g128",
    "gptq-dynamic-mixed",
    "gptq-moe-mixtral-4b-g64",
    "gptq_p-3b-sym-g128",
    "gptq_v2-4b-asym-g64",
]
FEW = ["awq-gemm-g128", "bnb-int8", "bnb-nf4-dq", "ct-int4-asym-g64", "gptq-4b-sym-g64-actorder"]
"""One of each set of tensors."""
PROMPT = torch.tensor([[1, 5, 9, 17]])
KV_SCALES = ("k_scale", "v_scale")
"""Transformers has no place for them, and says so when it loads."""


def bytes_of(tensor):
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_references(name, golden, load, quantized):
    linears = quantized(load(golden / name))
    reference = load_file(golden / name / "reference.safetensors")
    assert {f"{path}.weight" for path in linears} == set(reference)
    for path, linear in linears.items():
        assert torch.equal(linear.dequantize(), reference[f"{path}.weight"]), path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in NAMES]
    + [(name, dtype) for name in FEW for dtype in (torch.float32, torch.float16)],
)
def test_saved_bytes_are_the_files(name, dtype, golden, load, quantized, tmp_path):
    model = load(golden / name, dtype)
    model.generate(PROMPT, max_new_tokens=2)  # a forward must not change what is saved
    model.save_pretrained(tmp_path)
    before = load_file(golden / name / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    before = {key: tensor for key, tensor in before.items() if not key.endswith(KV_SCALES)}
    assert set(after) == set(before)
    stored = {f"{path}.{part}" for path, found in quantized(model).items() for part in found.names}
    assert stored <= set(before)
    for key, tensor in before.items():
        if key in stored:
            assert after[key].dtype is tensor.dtype
            assert after[key].shape == tensor.shape
            assert bytes_of(after[key]) == bytes_of(tensor), key
        else:
            assert torch.equal(after[key], tensor.to(dtype)), key
    blocks = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (golden / name, tmp_path)
    ]
    assert blocks[0] == blocks[1]
    again = load(tmp_path, dtype)
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dequantized_twin(name, golden, load, quantized):
    model = load(golden / name)
    assert model.quantization_method == "gptq"
    prompt = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(prompt).logits
        twin = copy.deepcopy(model).dequantize()
        assert not quantized(twin)
        assert not hasattr(twin.config, "quantization_config")
        expected = twin(prompt).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    tokens = [m.generate(PROMPT, max_new_tokens=12, do_sample=False) for m in (model, twin)]
    assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "awq-gemm-g128",
        "awq-gemv_fast-g64",
        "bnb-int8",
        "bnb-nf4-dq",
        "ct-int4-asym-g64",
        "gptq-4b-asym-g64",
        "gptq-4b-sym-g64-actorder",
    ],
)
def test_16_bit_models_run(name, dtype, golden, load):
    model = load(golden / name, dtype)
    assert model.dtype is dtype
    with torch.no_grad():
        logits = model(PROMPT).logits.float()
        expected = load(golden / name)(PROMPT).logits
    assert logits.isfinite().all()
    assert (logits - expected).norm() <= 0.1 * expected.norm()


def test_dequantized_model_saves_and_loads(golden, load, tmp_path):
    model = load(golden / "gptq-moe-mixtral-4b-g64").dequantize(torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model.save_pretrained(tmp_path)
    dense = load(tmp_path, torch.float16)
    assert torch.equal(dense(PROMPT).logits, model(PROMPT).logits)


def test_stored_tensors_stay_memory_mapped(golden, load, quantized):
    """The loader's views of the file are what is kept: no second copy of the packed tensors."""
    model = load(golden / "gptq-4b-asym-g64", torch.bfloat16)
    linear = next(iter(quantized(model).values()))
    spans = [
        tuple(int(n, 16) for n in line.split()[0].split("-"))
        for line in open("/proc/self/maps")  # noqa: PTH123, SIM115
        if line.rstrip().endswith("gptq-4b-asym-g64/model.safetensors")
    ]
    for tensor in linear.stored.values():
        assert any(start <= tensor.data_ptr() < end for start, end in spans)


def test_saving_into_the_folder_it_was_loaded_from(broken, load):
    folder = broken("gptq-4b-asym-g64")
    before = load_file(folder / "model.safetensors")
    model = load(folder, torch.bfloat16)
    model.save_pretrained(folder)
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(load(folder, torch.bfloat16)(PROMPT).logits, model(PROMPT).logits)


def test_casting_the_model_is_refused(golden, load, quantized):
    model = load(golden / "awq-gemm-g128", torch.float16)
    before = {p: m.scales.clone() for p, m in quantized(model).items()}
    for cast in (model.half, model.float, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"cast|not supported"):
            cast()
    model.model.to(torch.bfloat16)  # a submodule's cast cannot be refused: it must do no harm
    for path, linear in quantized(model).items():
        assert torch.equal(linear.scales, before[path])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("autoround-gptq-sym-g128", {"quant_method": "intel/auto-round"}),
        ("autoround-gptq-sym-g128", {"quant_method": "inc"}),
        ("bnb-int8", {"load_in_8bit": None, "_load_in_8bit": None}),
        ("bnb-nf4", {"load_in_4bit": None, "_load_in_4bit": None}),
    ],
)
def test_methods_that_transformers_does_not_know(name, said, broken, load, quantized):
    def change(settings):
        block = settings["quantization_config"]
        settings["quantization_config"] = {k: v for k, v in (block | said).items() if v is not None}

    assert len(quantized(load(broken(name, config=change)))) == 7


def test_llm_awq(broken, golden, load, quantized):
    """The tensors of GEMV_FAST, one of which has another name."""

    def rename(tensors):
        for key in [key for key in tensors if key.endswith("qzeros")]:
            tensors[key.replace("qzeros", "scaled_zeros")] = tensors.pop(key)

    folder = broken(
        "awq-gemv_fast-g64", rename, lambda c: c["quantization_config"].update(version="llm-awq")
    )
    model = load(folder)
    reference = load_file(golden / "awq-gemv_fast-g64/reference.safetensors")
    assert len(quantized(model)) == 7
    for path, linear in quantized(model).items():
        assert torch.equal(linear.dequantize(), reference[f"{path}.weight"])


@pytest.mark.parametrize("made_by", ["user", "harness"])
def test_users_config_is_accepted(made_by, golden, load, quantized):
    from transformers import AutoConfig, GPTQConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    folder = golden / "gptq-dynamic-mixed"
    block = AutoConfig.from_pretrained(folder).quantization_config
    # lm-eval makes one of the file's own block and passes it along.
    config = GPTQConfig(bits=4) if made_by == "user" else AutoQuantizationConfig.from_dict(block)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(folder, quantization_config=config)
    assert len(quantized(model)) == 6
    assert model.config.quantization_config.to_dict() == block
    assert dict(model.config.quantization_config) == block
    assert model.config.quantization_config.bits == 4


@pytest.mark.parametrize("name", ["awq-gemm-g128", "bnb-nf4", "bnb-int8", "ct-int4-asym-g64"])
def test_pickles(name, golden, load, tmp_path):
    model = load(golden / name)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    block = model.config.quantization_config.to_dict()
    assert again.config.quantization_config.to_dict() == block
    again.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(golden / name / "model.safetensors")
    )


def test_device_map(golden, load):
    pytest.importorskip("accelerate")
    expected = load(golden / "gptq-4b-asym-g64")(PROMPT).logits
    for device_map in ("auto", "cpu", {"": "cpu"}):
        model = load(golden / "gptq-4b-asym-g64", device_map=device_map)
        assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("name", ["gptq-4b-asym-g64", "bnb-nf4-dq"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloading_to_disk(name, golden, load, tmp_path, offload_buffers):
    pytest.importorskip("accelerate")
    expected = load(golden / name)(PROMPT).logits
    where = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    model = load(
        golden / name,
        device_map=where | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=offload_buffers,
    )
    assert torch.equal(model(PROMPT).logits, expected)
    assert torch.equal(model(PROMPT).logits, expected)
    model.save_pretrained(tmp_path / "saved")
    before = load_file(golden / name / "model.safetensors")
    after = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(after[k], v) for k, v in before.items() if not v.is_floating_point())

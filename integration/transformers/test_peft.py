"""Adapters: they attach, train and save; merging into packed weights is refused, never lost."""

import copy

import pytest
import torch

pytestmark = pytest.mark.engine
peft = pytest.importorskip("peft")

PROMPT = torch.tensor([[1, 5, 9, 17, 30, 2]])
NAMES = [
    "awq-gemm-g128",
    "bnb-int8",
    "bnb-nf4-dq",
    "ct-int4-asym-g64",
    "gptq-4b-asym-g64",
    "gptq-4b-sym-g64-actorder",
]


def adapted(model, **kwargs):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
)
def test_attaches_and_trains_like_the_dense_twin(name, kwargs, golden, load):
    model = load(golden / name)
    twin = copy.deepcopy(model).dequantize()
    losses = []
    for base in (model, twin):
        wrapped = adapted(base, **kwargs)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
        steps = []
        for _ in range(4):
            loss = wrapped(PROMPT, labels=PROMPT).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_saves_and_loads(golden, load, tmp_path):
    wrapped = adapted(load(golden / NAMES[0]), target_modules="all-linear")
    logits = wrapped(PROMPT).logits
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(golden / NAMES[0]), tmp_path)
    assert torch.equal(again(PROMPT).logits, logits)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("guarded_by", ["method", "weight"])
def test_merging_is_refused(name, safe, guarded_by, golden, load):
    """Twice: by PEFT, which goes by the method's name, and by the weight itself."""
    model = load(golden / name)
    wrapped = adapted(model, target_modules=["q_proj", "up_proj"])
    logits = wrapped(PROMPT).logits
    if guarded_by == "weight":
        model.quantization_method = "something else"
    merge = [
        lambda: wrapped.merge_adapter(safe_merge=safe),
        lambda: wrapped.merge_and_unload(safe_merge=safe),
    ]
    for call in merge:
        with pytest.raises((ValueError, RuntimeError), match=r"Cannot merge|cannot be written"):
            call()
    assert torch.equal(wrapped(PROMPT).logits, logits)


def test_merging_into_the_dequantized_model(golden, load):
    model = load(golden / NAMES[0])
    wrapped = adapted(model.dequantize(), target_modules="all-linear")
    logits = wrapped(PROMPT).logits
    merged = wrapped.merge_and_unload()
    assert (merged(PROMPT).logits - logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["awq-gemm-g128", "bnb-nf4-dq"])
def test_kbit_training_keeps_the_dtype(name, golden, load):
    model = load(golden / name, torch.bfloat16)
    prepared = peft.prepare_model_for_kbit_training(model)
    assert prepared.get_input_embeddings().weight.dtype is torch.bfloat16
    assert prepared.is_gradient_checkpointing
    wrapped = adapted(prepared, target_modules="all-linear")
    wrapped(PROMPT, labels=PROMPT).loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)

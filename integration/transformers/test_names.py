"""Models whose modules are not called what their files call them, or are no `nn.Linear`."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

pytestmark = pytest.mark.engine

PROMPT = torch.tensor([[1, 5, 9, 17]])
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def projections(stem):
    return "proj" in stem or ".w" in stem


def check(model, folder, reference, tensors, quantized, tmp_path):
    """Compare weights, logits with the dense twin, and the names and bytes that are saved."""
    linears = quantized(model)
    assert len(linears) == len(reference)
    found = sorted(tensor.sum().item() for tensor in reference.values())
    mine = sorted(linear.dequantize().sum().item() for linear in linears.values())
    assert found == mine
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    after = load_file(saved / "model.safetensors")
    assert set(after) == set(tensors)
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)
    with torch.no_grad():
        logits = model(PROMPT).logits
        expected = model.dequantize()(PROMPT).logits
    assert not quantized(model)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    model.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(dense(PROMPT).logits, expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_llama(shards, gptq_of, quantized, tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    folder, reference, tensors = gptq_of(model, projections, shards=shards)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check(loaded, folder, reference, tensors, quantized, tmp_path)


def test_gpt2(gptq_of, quantized, tmp_path):
    """Linears that lie transposed, in a base model without a prefix of its own in the file."""
    config = hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    folder, reference, tensors = gptq_of(
        hf.GPT2LMHeadModel(config), lambda stem: ".c_" in stem, transposed=True
    )
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(linear.bias is not None for linear in quantized(loaded).values())
    check(loaded, folder, reference, tensors, quantized, tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_mixtral(old, gptq_of, quantized, tmp_path):
    """Experts under the names of Transformers 4 (`block_sparse_moe`, w1) and of today."""
    config = hf.MixtralConfig(**SMALL, num_local_experts=3, tie_word_embeddings=False)

    def rename(name):
        if old:
            return name
        name = name.replace("block_sparse_moe", "mlp")
        for before, after in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(f".{before}.", f".{after}.")
        return name

    folder, reference, tensors = gptq_of(
        hf.MixtralForCausalLM(config), lambda stem: projections(stem), rename
    )
    assert any("block_sparse_moe" in name for name in tensors) is old
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(reference) == 2 * (4 + 9)
    check(loaded, folder, reference, tensors, quantized, tmp_path)


def test_mixtral_of_compressed_tensors(gptq_of, converted, quantized, load, tmp_path):
    """Parts that begin with `weight`, which rules for dense experts may take for theirs."""
    config = hf.MixtralConfig(**SMALL, num_local_experts=3, tie_word_embeddings=False)
    folder, _, _ = gptq_of(hf.MixtralForCausalLM(config), projections)
    folder, reference, tensors = converted(folder, "compressed-tensors")
    assert len(reference) == 2 * (4 + 9)
    check(load(folder), folder, reference, tensors, quantized, tmp_path)


@pytest.mark.parametrize("to", ["bnb-nf4", "bnb-int8"])
def test_gpt2_of_bitsandbytes(to, gptq_of, converted, quantized, load, tmp_path):
    """Names without the prefix of the base model, which `weight.absmax` must follow."""
    config = hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    folder, _, _ = gptq_of(hf.GPT2LMHeadModel(config), lambda s: ".c_" in s, transposed=True)
    folder, reference, tensors = converted(folder, to)
    check(load(folder), folder, reference, tensors, quantized, tmp_path)


def test_qwen_moe(gptq_of, quantized, tmp_path):
    config = hf.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    )  # fmt: skip
    folder, reference, tensors = gptq_of(hf.Qwen2MoeForCausalLM(config), projections)
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check(loaded, folder, reference, tensors, quantized, tmp_path)


@pytest.mark.parametrize("place", [None, "text_config", "bnb-nf4"])
def test_llava(place, gptq_of, converted, quantized, tmp_path):
    """A vision model: other prefixes in the file, and the block perhaps at the text level."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=16, projection_dim=32,
        ),
        text_config=hf.LlamaConfig(**SMALL),
    )  # fmt: skip
    folder, reference, tensors = gptq_of(
        hf.LlavaForConditionalGeneration(config),
        lambda stem: "language_model" in stem and projections(stem),
        place=place if place == "text_config" else None,
    )
    if place == "bnb-nf4":
        folder, reference, tensors = converted(folder, place)
    loaded = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert any(name.startswith("language_model.model.") for name in tensors)
    check(loaded, folder, reference, tensors, quantized, tmp_path)


def test_other_heads(gptq_of, quantized):
    """Without a head, and with a new one that the file cannot know."""
    folder, reference, _ = gptq_of(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)), projections)
    base = hf.AutoModel.from_pretrained(folder, dtype=torch.float32)
    linears = quantized(base)
    for stem, expected in reference.items():
        assert torch.equal(linears[stem.removeprefix("model.")].dequantize(), expected)
    assert base.num_parameters() < 20_000  # embeddings and norms
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=3, pad_token_id=0
    )
    assert len(quantized(classifier)) == len(reference)
    assert classifier(PROMPT).logits.isfinite().all()
    scores = classifier.score.weight
    assert scores.shape == (3, 64)
    assert scores.abs().max() < 1


def test_bert_without_its_pooler(gptq_of, quantized):
    """A part of the base model that only some tasks train."""
    config = hf.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    folder, reference, _ = gptq_of(
        hf.BertForMaskedLM(config), lambda stem: ".layer." in stem and "LayerNorm" not in stem
    )
    model = hf.AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert len(quantized(model)) == len(reference) == 6
    assert type(model.pooler.dense) is torch.nn.Linear

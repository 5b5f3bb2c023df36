"""Broken checkpoints: one error that names the tensor, before any module is replaced."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from qplug_converters.errors import QplugError

pytestmark = pytest.mark.engine

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
NF4, INT8, CT = "bnb-nf4-dq", "bnb-int8", "ct-int4-asym-g64"
GPTQ, AWQ, MOE = "gptq-4b-asym-g64", "awq-gemm-g128", "gptq-moe-mixtral-4b-g64"


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def replace(name, function):
    def change(tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return change


def setting(**values):
    def config(settings):
        settings["quantization_config"].update(values)

    return config


CASES = [
    (GPTQ, drop(f"{Q}.scales"), None, f"{Q}.scales"),
    (GPTQ, drop(f"{Q}.qzeros"), None, f"{Q}.qzeros"),
    (GPTQ, drop(f"{Q}.qweight"), None, f"{Q}.qweight"),
    (AWQ, drop(f"{Q}.qweight"), None, f"{Q}.qweight"),
    (AWQ, drop(f"{Q}.qweight", f"{Q}.qzeros", f"{Q}.scales"), None, f"{Q}.weight"),
    (GPTQ, replace(f"{Q}.scales", lambda t: t[:1]), None, f"{Q}.qzeros|{Q}.scales"),
    (GPTQ, replace(f"{Q}.qweight", lambda t: t[:-1]), None, f"{Q}.qweight"),
    (GPTQ, replace(f"{Q}.qweight", lambda t: t.float()), None, f"{Q}.qweight"),
    (GPTQ, replace(f"{Q}.g_idx", lambda t: t.long()), None, f"{Q}.g_idx"),
    (GPTQ, replace(f"{Q}.g_idx", lambda t: t + 7), None, f"{Q}.g_idx"),
    (AWQ, replace(f"{DOWN}.scales", lambda t: t.double()), None, f"{DOWN}.scales"),
    (AWQ, replace(f"{DOWN}.qzeros", lambda t: t.to(torch.int16)), None, f"{DOWN}.qzeros"),
    (GPTQ, None, setting(group_size=32), "qzeros|scales"),
    (GPTQ, None, setting(group_size=0), "group_size"),
    (GPTQ, None, setting(bits="4"), "bits"),
    (GPTQ, None, setting(bits=8), Q.replace(".", r"\.")),
    (GPTQ, None, setting(checkpoint_format="marlin"), "checkpoint_format"),
    (AWQ, None, setting(group_size=64), "scales|qzeros"),
    (AWQ, None, setting(version="gemv"), "version"),
    (GPTQ, None, lambda c: c.update(intermediate_size=256), "256"),
    (GPTQ, None, lambda c: c.update(num_hidden_layers=2), r"model\.layers\.1\."),
    ("awq-gemm-g32-bias", drop(f"{Q}.bias"), None, f"{Q}.bias"),
    ("awq-gemm-g32-bias", replace(f"{Q}.bias", lambda t: t[1:]), None, f"{Q}.bias"),
    (NF4, drop(f"{Q}.weight"), None, f"{Q}.weight"),
    (NF4, drop(f"{Q}.weight.absmax"), None, f"{Q}.weight.absmax"),
    (NF4, drop(f"{Q}.weight.quant_state.bitsandbytes__nf4"), None, f"{Q}.weight"),
    (NF4, replace(f"{Q}.weight", lambda t: t[1:]), None, f"{Q}.weight"),
    (NF4, replace(f"{Q}.weight.nested_absmax", lambda t: t.half()), None, "nested_absmax"),
    (NF4, None, lambda c: c.update(intermediate_size=256), "256"),
    (INT8, drop(f"{Q}.SCB"), None, f"{Q}.SCB"),
    (INT8, drop(f"{Q}.weight"), None, f"{Q}.weight"),
    (INT8, replace(f"{Q}.SCB", lambda t: t[1:]), None, f"{Q}.SCB"),
    (CT, drop(f"{Q}.weight_packed"), None, f"{Q}.weight_packed"),
    (CT, drop(f"{Q}.weight_scale"), None, f"{Q}.weight_scale"),
    (CT, replace(f"{Q}.weight_shape", lambda t: t * 2), None, Q),
    # Tensors that are not quantized: the loader would invent them, or install them as they are.
    (GPTQ, drop("model.norm.weight"), None, r"model\.norm\.weight"),
    (GPTQ, drop("model.embed_tokens.weight"), None, r"model\.embed_tokens\.weight"),
    (GPTQ, drop("model.layers.0.input_layernorm.weight"), None, "input_layernorm"),
    (GPTQ, replace("model.norm.weight", lambda t: t[:-1]), None, r"model\.norm\.weight"),
    (GPTQ, replace("model.norm.weight", lambda t: t.int()), None, r"model\.norm\.weight"),
    (GPTQ, lambda t: None, lambda c: c.update(vocab_size=130), "embed_tokens"),
    (MOE, drop("model.layers.0.mlp.gate.weight"), None, r"mlp\.gate\.weight"),
    (MOE, drop("model.layers.0.mlp.experts.1.up_proj.scales"), None, r"experts\.1\.up_proj"),
    (MOE, None, lambda c: c.update(num_local_experts=4), r"expert 3|experts"),
    (MOE, None, lambda c: c.update(intermediate_size=32), r"expert"),
]


@pytest.mark.parametrize(("name", "change", "config", "told"), CASES)
def test_one_error_before_anything_is_replaced(
    name, change, config, told, broken, load, monkeypatch
):
    import qplug.transformers.quantizer as quantizer

    swapped = []
    put = quantizer._put
    monkeypatch.setattr(quantizer, "_put", lambda *args: swapped.append(args) or put(*args))
    folder = broken(name, change, config)
    with pytest.raises(QplugError, match=told):
        load(folder)
    assert not swapped


def test_scales_that_are_no_numbers(broken, load):
    """No header tells: found when the linear is decoded."""
    folder = broken(GPTQ, replace(f"{Q}.scales", lambda t: t * float("nan")))
    with pytest.raises(QplugError, match=rf"{Q}.*NaN"):
        load(folder)


def test_all_problems_are_told_at_once(broken, load):
    folder = broken(GPTQ, drop(f"{Q}.scales", f"{DOWN}.qzeros"))
    with pytest.raises(QplugError) as caught:
        load(folder)
    told = " ".join([str(caught.value), *caught.value.__notes__])
    assert f"{Q}.scales" in told
    assert f"{DOWN}.qzeros" in told


def test_truncated_file(broken, load):
    file = broken(GPTQ) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(QplugError, match=r"model\.safetensors"):
        load(file.parent)


def test_quantized_head_of_a_tied_model(broken, load):
    def head(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"{Q}.{part}"].clone()

    with pytest.raises(QplugError, match="lm_head"):
        load(broken(GPTQ, head))


def test_quantized_head(broken, load, quantized):
    def head(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"{Q}.{part}"].clone()

    model = load(broken(GPTQ, head, lambda c: c.update(tie_word_embeddings=False)))
    linears = quantized(model)
    assert len(linears) == 8
    assert torch.equal(linears["lm_head"].dequantize(), linears[Q].dequantize())


def test_a_bias_the_model_does_not_have_is_kept(broken, load, quantized):
    def bias(tensors):
        tensors[f"{Q}.bias"] = torch.ones(128, dtype=torch.float16)

    model = load(broken(GPTQ, bias))
    assert torch.equal(quantized(model)[Q].bias, torch.ones(128))


def test_desc_act_that_contradicts_g_idx_is_told(broken, load, caplog):
    load(broken("gptq-4b-sym-g64-actorder", None, setting(desc_act=False)))
    assert any("desc_act is false" in record.message for record in caplog.records)


def test_a_state_dict_is_refused(golden, load):
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(golden / GPTQ)
    state = load_file(golden / GPTQ / "model.safetensors")
    with pytest.raises(QplugError, match="safetensors"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


# Canonical checkpoints: an engine that does not know them must stop, not invent weights.


@pytest.fixture
def canonical(golden, tmp_path):
    """Return a golden checkpoint in qplug's own form, as a conversion writes it."""
    from qplug_converters import formats
    from qplug_converters.checkpoint import open_checkpoint
    from qplug_converters.execute import execute
    from qplug_converters.plan import make_plan
    from qplug_converters.survey import survey

    checkpoint = open_checkpoint(golden / GPTQ)
    found, model = checkpoint.scheme()
    plan = make_plan(found, survey(checkpoint, found, model), formats.find("canonical"))
    return execute(plan, checkpoint, tmp_path / "canonical")


def test_canonical_is_refused_with_the_way_out(canonical, load):
    with pytest.raises(QplugError, match="canonical") as caught:
        load(canonical)
    assert any("qplug convert" in note for note in caught.value.__notes__)


def test_canonical_stops_transformers_without_qplug(canonical):
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "assert 'qplug.transformers.quantizer' not in sys.modules\n"
        f"AutoModelForCausalLM.from_pretrained({str(canonical)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"QPLUG_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no file named model.safetensors" in done.stderr


def test_renamed_canonical_shards_are_refused_too(canonical, load):
    """With the names Transformers looks for, only the registered `quant_method` is in the way."""
    (shard,) = canonical.glob("*.safetensors")
    shutil.move(shard, canonical / "model.safetensors")
    with pytest.raises(QplugError, match="canonical"):
        load(canonical)

"""Checkpoints to load: the golden ones, and broken copies of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qplug.transformers.linear import QuantLinear

GOLDEN = Path(__file__).parents[2] / "tests/golden"


@pytest.fixture
def golden():
    """Return the folder of the golden checkpoints."""
    return GOLDEN


@pytest.fixture
def broken(tmp_path):
    """Return a function that copies a golden checkpoint with its tensors and config changed."""

    def make(name, change=None, config=None):
        folder = tmp_path / f"{name}-broken"
        folder.mkdir()
        tensors = load_file(GOLDEN / name / "model.safetensors")
        settings = json.loads((GOLDEN / name / "config.json").read_text())
        if change is not None:
            change(tensors)
        if config is not None:
            config(settings)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def load():
    """Return a function that loads a causal language model, through qplug whatever is installed."""
    from transformers import AutoModelForCausalLM

    import qplug

    def load(folder, dtype=torch.float32, **kwargs):
        with qplug.use():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)

    return load


@pytest.fixture
def quantized():
    """Return a function that lists the quantized linears of a model by path."""

    def quantized(model):
        return {p: m for p, m in model.named_modules() if isinstance(m, QuantLinear)}

    return quantized


@pytest.fixture
def gptq_of(tmp_path):
    """Return a function that saves a dense model with some of its linears as 4-bit GPTQ, g32.

    `chosen` matches names of modules in the file, `rename` changes names of the file first, and
    `transposed` is for GPT-2's linears, which lie the other way round.
    """
    from qplug_converters import codec, formats
    from qplug_converters.scheme import Scheme
    from qplug_converters.weight import AffineGrid, QuantizedWeight

    known = formats.find("gptq_v2")

    def round_to_nearest(dense):
        groups = dense.float().reshape(dense.shape[0], -1, 32)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
        grid = AffineGrid(scales, zeros.to(torch.int16), 32)
        return QuantizedWeight(codes.to(torch.uint8).reshape(dense.shape), 4, grid)

    def make(model, chosen, rename=lambda name: name, transposed=False, shards=1, place=None):
        folder = tmp_path / f"gptq-{model.config.model_type}"
        model.save_pretrained(folder)
        tensors, reference = {}, {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            name = rename(name)
            stem = name.removesuffix(".weight")
            if not (name.endswith(".weight") and chosen(stem)):
                tensors[name] = tensor
                continue
            weight = round_to_nearest(tensor.T if transposed else tensor)
            scheme = Scheme(*weight.codes.shape, 4, 32, has_g_idx=True, scale_dtype="F16")
            reference[stem] = weight.dequantize()
            for part, packed in codec.encode(known.layout(scheme), weight).items():
                tensors[f"{stem}.{part}"] = packed
        assert reference
        (folder / "model.safetensors").unlink()
        keys = list(tensors)
        files = {}
        for n in range(shards):
            file = f"model-{n + 1:05}-of-{shards:05}.safetensors" if shards > 1 else None
            mine = {key: tensors[key].contiguous() for key in keys[n::shards]}
            save_file(mine, folder / (file or "model.safetensors"), {"format": "pt"})
            files.update(dict.fromkeys(mine, file))
        if shards > 1:
            index = {"metadata": {}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = json.loads((folder / "config.json").read_text())
        block = {
            "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
            "quant_method": "gptq", "checkpoint_format": "gptq_v2",
        }  # fmt: skip
        (config if place is None else config[place])["quantization_config"] = block
        (folder / "config.json").write_text(json.dumps(config))
        return folder, reference, tensors

    return make


@pytest.fixture
def converted(tmp_path):
    """Return a function that converts a folder, and reads weights and tensors of the result."""
    from qplug.cli import main
    from qplug_converters import codec
    from qplug_converters.checkpoint import open_checkpoint

    def convert(folder, to):
        made = tmp_path / to
        with pytest.raises(SystemExit) as done:
            main(["convert", str(folder), str(made), "--to", to, "--allow", "requantized"])
        assert done.value.code == 0
        checkpoint = open_checkpoint(made)
        known, model = checkpoint.scheme()
        reference = {}
        for stem, scheme in model.linears.items():
            layout = known.layout(scheme)
            stored = {part.name: checkpoint.tensor(f"{stem}.{part.name}") for part in layout}
            reference[stem] = codec.decode(layout, scheme, stored).dequantize()
        return made, reference, load_file(made / "model.safetensors")

    return convert

"""compressed-tensors 0.20.0: its dequantizer of files, its loader, its AWQ converter."""

import time
from pathlib import Path

import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
    CompressedTensorsDequantizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def _tensors(folder: str) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(Path(folder).glob("model*.safetensors")):
        found |= load_file(shard)
    return found


def read(folder: str, out: str) -> None:
    """Dequantize a folder as `CompressedTensorsDequantizer` does, from its config, in float32.

    The tool computes in the dtype of the scales: they are widened first.
    """
    dequantizer = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    tensors = _tensors(folder)
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name] = tensors[name].float()
    packed = {name for name in tensors if name.endswith(".weight_packed")}
    found = dequantizer.process(tensors)
    modules = [name.removesuffix("_packed") for name in packed]
    save_file({name: found[name].contiguous() for name in modules}, out)


def _save_loaded(folder: str, out: str, **options: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model(torch.tensor([[1]]))
    packed = [name for name in _tensors(folder) if name.endswith(".weight_packed")]
    weights = {name: model.get_parameter(name.removesuffix("_packed")).data for name in packed}
    save_file({n.removesuffix("_packed"): w.contiguous() for n, w in weights.items()}, out)


def load(folder: str, out: str) -> None:
    """Load a folder with Transformers in float32, decompressed as it loads."""
    _save_loaded(folder, out, quantization_config=CompressedTensorsConfig(dequantize=True))


def load_packed(folder: str, out: str) -> None:
    """Load a folder with Transformers in float32, as it does unasked: decompressed when used."""
    _save_loaded(folder, out)


def from_awq(folder: str, out: str) -> float:
    """Convert an AWQ folder as `AutoAWQConverter` does; return the seconds it took."""
    start = time.perf_counter()
    convert_checkpoint(folder, out, AutoAWQConverter.from_pretrained(folder), device="cpu")
    return time.perf_counter() - start

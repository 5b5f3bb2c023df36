"""compressed-tensors 0.20.0: its dequantizer of files, its loader, its AWQ converter."""

import time
from pathlib import Path

import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
    CompressedTensorsDequantizer,
)
from safetensors.torch import load_file, save_file


def read(folder: str, out: str) -> None:
    """Dequantize a folder as `CompressedTensorsDequantizer` does, from its config, in float32.

    The tool computes in the dtype of the scales: they are widened first.
    """
    dequantizer = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    tensors = {}
    for shard in sorted(Path(folder).glob("model*.safetensors")):
        tensors |= load_file(shard)
    for name in tensors:
        if name.endswith(".weight_scale"):
            tensors[name] = tensors[name].float()
    packed = {name for name in tensors if name.endswith(".weight_packed")}
    found = dequantizer.process(tensors)
    modules = [name.removesuffix("_packed") for name in packed]
    save_file({name: found[name].contiguous() for name in modules}, out)


def load(folder: str, out: str) -> None:
    """Load a folder with Transformers, decompressed, and save the linears' weights as they are."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    save_file(
        {
            f"{name}.weight": module.weight.data.contiguous()
            for name, module in model.named_modules()
            if hasattr(module, "quantization_scheme") and hasattr(module, "weight")
        },
        out,
    )


def from_awq(folder: str, out: str) -> float:
    """Convert an AWQ folder as `AutoAWQConverter` does; return the seconds it took."""
    start = time.perf_counter()
    convert_checkpoint(folder, out, AutoAWQConverter.from_pretrained(folder), device="cpu")
    return time.perf_counter() - start

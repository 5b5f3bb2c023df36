"""AutoAWQ 0.2.9: what its layers hold after its own loading, dequantized by its own functions."""

import math

import awq.models.base
import numpy as np
import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast, pack_intweight
from awq.utils.packing_utils import dequantize_gemm, unpack_awq
from safetensors.torch import save_file


def gemm(layer: WQLinear_GEMM) -> torch.Tensor:
    """Return the weight [out, in] by `dequantize_gemm`, scales in float32."""
    scales = layer.scales.float()
    return dequantize_gemm(layer.qweight, layer.qzeros, scales, 4, layer.group_size).T


def gemv(layer: WQLinear_GEMV) -> torch.Tensor:
    """Return the weight [out, in] by `unpack_awq`; GEMV keeps the order that it gives."""
    codes, zeros = (part & 15 for part in unpack_awq(layer.qweight, layer.qzeros, 4))
    groups = layer.in_features // layer.group_size
    spread = [
        part[:, :groups].repeat_interleave(layer.group_size, 1).float()
        for part in (zeros, layer.scales)
    ]
    return (codes.float() - spread[0]) * spread[1]


def gemv_fast(layer: WQLinear_GEMVFast) -> torch.Tensor:
    """Return the weight [out, in], codes by the inverse of `pack_intweight`.

    AutoAWQ unpacks this layout in its CUDA kernel only. Its packer moves codes about: what it makes
    of the digits of each code's own index says where each went.
    """
    shape = layer.out_features, layer.in_features
    count = math.prod(shape)
    index = torch.arange(count, dtype=torch.int32).reshape(shape)

    def fields(words: torch.Tensor) -> np.ndarray:
        halves = words.numpy().view(np.uint16)[..., None]
        return ((halves >> np.arange(0, 16, 4, dtype=np.uint16)) & 15).reshape(-1)

    place = np.zeros(count, np.int64)
    for digit in range(0, count.bit_length(), 4):
        packed = pack_intweight((index >> digit) & 15, interleave=4, kstride=64)
        place += fields(packed).astype(np.int64) << digit
    codes = np.empty(count, np.float32)
    codes[place] = fields(layer.qweight)
    groups = layer.in_features // layer.group_size
    scales, zeros = (
        part[:groups].float().repeat_interleave(layer.group_size, 0).T
        for part in (layer.scales, layer.qzeros)
    )
    return torch.from_numpy(codes).reshape(shape) * scales + zeros


WEIGHT = {WQLinear_GEMM: gemm, WQLinear_GEMV: gemv, WQLinear_GEMVFast: gemv_fast}


def read(folder: str, out: str) -> None:
    """Load a folder as users do and dequantize each layer."""
    # On a CPU its loader wants Intel's extension, for kernels that nothing runs here.
    awq.models.base.get_best_device = lambda: "any but cpu"
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, device_map={"": "cpu"})
    found = {
        f"{name}.weight": WEIGHT[type(module)](module).contiguous()
        for name, module in model.model.named_modules()
        if type(module) in WEIGHT
    }
    save_file(found, out)

"""AutoRound 0.16.1, through Transformers: what its torch layers hold, dequantized in float32."""

import torch
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear, dequantize_gemm
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LAYERS = (qlinear_torch.QuantLinear, qlinear_torch_zp.QuantLinear)


def read(folder: str, out: str) -> None:
    """Load a folder with Transformers and dequantize each layer.

    GPTQ layers, its own, give their weight as what they make of the identity; AWQ layers are
    GPTQModel's.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            module.scales, module.bias = module.scales.float(), None
            weight = module(torch.eye(module.infeatures)).T
            found[f"{name}.weight"] = weight.contiguous()
        elif isinstance(module, AwqTorchLinear):
            weight = dequantize_gemm(
                qweight=module.qweight, qzeros=module.qzeros, scales=module.scales.float(),
                bits=module.bits, group_size=module.group_size,
            )  # fmt: skip
            found[f"{name}.weight"] = weight.T.contiguous()
        elif hasattr(module, "qweight"):
            raise TypeError(f"{name} is a {type(module)}")
    save_file(found, out)

"""bitsandbytes 0.50.2, through Transformers: what its layers hold, dequantized by it in float32."""

import copy

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def read(folder: str, out: str) -> None:
    """Load a folder with Transformers and dequantize each layer with bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            weight = functional.dequantize_4bit(module.weight.data, state)
            found[name] = weight.float().reshape(state.shape)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scb = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            dequantize = torch.ops.bitsandbytes.int8_vectorwise_dequant
            found[name] = dequantize(module.weight.data, scb.float())
    save_file({f"{name}.weight": weight.contiguous() for name, weight in found.items()}, out)


def quantize(folder: str, out: str) -> None:
    """Quantize a dense folder to NF4 as users do."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", quantization_config=config
    )
    model.save_pretrained(out)

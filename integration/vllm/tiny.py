"""Tiny language models written on the fly, quantized by rounding to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qplug_converters import formats
from qplug_converters.codec import encode
from qplug_converters.scheme import ModelScheme, Scheme, ZeroFacts
from qplug_converters.weight import AffineGrid, QuantizedWeight

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the odd vocabulary catches padding errors."""

    layers: int = 2
    hidden: int = 256
    inter: int = 512
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 1003

    def config(self, dtype: str) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "hidden_size": self.hidden, "intermediate_size": self.inter,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "rope_theta": 10000.0, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": dtype,
        }  # fmt: skip

    def linear(self, name: str) -> tuple[int, int]:
        """Return out and in features of a linear by the last part of its name."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": (self.hidden, self.hidden), "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden), "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.inter, self.hidden), "up_proj": (self.inter, self.hidden),
            "down_proj": (self.hidden, self.inter),
        }[name]  # fmt: skip

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Return random weights that make varied, deterministic tokens."""
        made = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=made) * 0.06

        found = {
            "model.embed_tokens.weight": random(self.vocab, self.hidden) * 10,
            "model.norm.weight": torch.ones(self.hidden),
            "lm_head.weight": random(self.vocab, self.hidden),
        }
        for at in range(self.layers):
            for name in LINEARS:
                block = "self_attn" if name in LINEARS[:4] else "mlp"
                found[f"model.layers.{at}.{block}.{name}.weight"] = random(*self.linear(name))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{at}.{norm}.weight"] = torch.ones(self.hidden)
        return {name: tensor.half() for name, tensor in found.items()}


def rounded(weight: Tensor, bits: int, group_size: int, sym: bool) -> QuantizedWeight:
    """Quantize `[out, in]` to nearest."""
    out, inp = weight.shape
    groups, top = -(-inp // group_size), (1 << bits) - 1
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - inp))
    blocks = padded.reshape(out, groups, group_size)
    if sym:
        scales = (blocks.abs().amax(-1) / (top // 2)).half()
        zeros = torch.full((out, groups), (top + 1) // 2)
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scales = ((high - low) / top).half()
        # 1 at least: GPTQ v1 cannot say 0 in a way that all its readers agree on.
        zeros = (-low / scales.float()).round().clamp(1, top)
    codes = (blocks / scales.float()[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, top).reshape(out, -1)[:, :inp].to(torch.uint8).contiguous()
    return QuantizedWeight(codes, bits, AffineGrid(scales, zeros.to(torch.int16), group_size))


@dataclass
class Tiny:
    """A checkpoint in the making: change what is to be wrong, then `write` it.

    Attributes
    ----------
    format
        Name of a format, or `dense` for the twin: the dequantized weights in float16.
    quantizes
        Whether a module is quantized.
    edit
        Last word on the tensors and the config before they are written.
    """

    format: str = "awq"
    bits: int = 4
    group_size: int = 64
    sym: bool = False
    shape: Shape = field(default_factory=Shape)
    quantizes: Callable[[str], bool] = lambda module: module.rpartition(".")[2] in LINEARS
    group_size_of: Mapping[str, int] = field(default_factory=dict)
    edit: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None
    side_file: str | None = None
    seed: int = 0

    def weights(self) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return the quantized linears and the other tensors."""
        quantized, dense = {}, {}
        for name, tensor in self.shape.tensors(self.seed).items():
            module = name.removesuffix(".weight")
            if not self.quantizes(module):
                dense[name] = tensor
                continue
            size = self.group_size_of.get(module, self.group_size)
            size = tensor.shape[1] if size == -1 else size
            quantized[module] = rounded(tensor, self.bits, size, self.sym)
        return quantized, dense

    def write(self, folder: Path) -> Path:
        """Write the checkpoint into a new folder."""
        folder.mkdir(parents=True)
        quantized, tensors = self.weights()
        config = self.shape.config("float16")
        if self.format == "dense":
            for module, weight in quantized.items():
                tensors[f"{module}.weight"] = weight.dequantize().half()
        else:
            known = formats.find(self.format)
            schemes = {}
            for module, weight in quantized.items():
                schemes[module] = known.adopt(_scheme(weight, self.sym))
                stored = encode(known.layout(schemes[module]), weight)
                tensors.update({f"{module}.{part}": value for part, value in stored.items()})
            dense = tuple(n.removesuffix(".weight") for n, t in tensors.items() if t.ndim == 2)
            dense = tuple(n for n in dense if f"{n}.weight" in tensors)
            written = known.write(ModelScheme(known.name, schemes, dense))
            config["quantization_config"] = dict(written.block or {})
        if self.edit is not None:
            self.edit(tensors, config)
        if self.side_file is not None:
            block = config.pop("quantization_config")
            (folder / self.side_file).write_text(json.dumps(block))
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def twin(self) -> Tiny:
        """Return the same weights, dequantized."""
        return replace(self, format="dense", edit=None, side_file=None)


def _scheme(weight: QuantizedWeight, sym: bool) -> Scheme:
    zeros = weight.grid.zeros
    facts = ZeroFacts(
        int(zeros.min()), int(zeros.max()),
        int((zeros == 1 << (weight.bits - 1)).sum()), zeros.numel(),
    )  # fmt: skip
    return Scheme(
        weight.out_features, weight.in_features, weight.bits,
        min(weight.grid.group_size, weight.in_features), sym=sym, zeros=facts,
    )  # fmt: skip

"""GPTQModel 7.7.0: what its layers hold after its own loading, dequantized by it in float32."""

import json
import tempfile
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear, dequantize_gemm
from gptqmodel.utils.model_dequant import dequantize_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def with_tokenizer(folder: Path, beside: Path) -> Path:
    """Link a folder's files beside a tokenizer, which GPTQModel does not load a model without."""
    for file in folder.iterdir():
        if file.name != "reference.safetensors":
            (beside / file.name).symlink_to(file.resolve())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<unk>",
    ).save_pretrained(beside)  # fmt: skip
    return beside


def dequantize(module: BaseQuantLinear) -> torch.Tensor:
    """Return a layer's weight [out, in] by its own method, its scales in float32."""
    module.scales = module.scales.float()
    if hasattr(module, "clear_weight_cache"):
        module.clear_weight_cache()
    if isinstance(module, AwqTorchLinear):
        return dequantize_gemm(
            qweight=module.qweight, qzeros=module.qzeros, scales=module.scales,
            bits=module.bits, group_size=module.group_size,
        ).T.contiguous()  # fmt: skip
    kind = type(module)
    # The subclass casts to float16 what the method below it computes.
    method = kind if getattr(module, "planar", False) else super(kind, module)
    weight = method.dequantize_weight(module) if method is kind else method.dequantize_weight()
    return weight.T.float().contiguous()


def read(folder: str, out: str) -> None:
    """Load a folder as users do, on its torch kernel, and dequantize each layer."""
    with tempfile.TemporaryDirectory() as beside:
        model = GPTQModel.load(
            str(with_tokenizer(Path(folder), Path(beside))),
            backend=BACKEND.TORCH, device="cpu", dtype=torch.float16,
        )  # fmt: skip
        found = {
            f"{name}.weight": dequantize(module)
            for name, module in model.model.named_modules()
            if isinstance(module, BaseQuantLinear)
        }
    save_file(found, out)


def dequantize_file(folder: str, out: str) -> None:
    """Dequantize a folder's files with `dequantize_model`, in float32; save the linears."""
    quantized = load_file(Path(folder) / "model.safetensors")
    with tempfile.TemporaryDirectory() as beside:
        dequantize_model(folder, f"{beside}/m", target_dtype=torch.float32)
        found = load_file(f"{beside}/m/model.safetensors")
    names = {n.removesuffix(".qweight") + ".weight" for n in quantized if n.endswith(".qweight")}
    save_file({name: found[name] for name in names}, out)

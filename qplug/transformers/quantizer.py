"""The `HfQuantizer` of all layouts: headers checked, modules swapped, tensors loaded, packs made.

Only hooks that every supported Transformers has, with the same meaning, are overridden.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from qplug_converters.block import parts_of
from qplug_converters.codec import TORCH_DTYPES, round_to
from qplug_converters.errors import MOST_SHOWN, QplugError, Unsupported
from qplug_converters.format import Format
from qplug_converters.layout import Holds, TensorSpec
from qplug_converters.shards import Shards
from qplug_kernels.warm import warm_up

from . import compat
from .experts import QuantExperts
from .linear import QuantLinear
from .modules import Swap, plan_swaps, read_model
from .renaming import TableRenaming

LOG = logging.getLogger("qplug")


class QplugQuantizer(HfQuantizer):
    """Loads a quantized checkpoint through qplug's formats and kernels.

    Parameters
    ----------
    quantization_config
        One of `configs`, which holds the file's block.
    """

    requires_calibration = True  # loading only: quantizing is `qplug quantize`

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse qplug's own file form, which Transformers would take for something else."""
        if self.quantization_config.block.get("quant_method") == "qplug":
            with _told():
                raise Unsupported(
                    "a checkpoint in qplug's canonical form",
                    "quantization_config.quant_method",
                    "a layout that engines load",
                    "convert it first: qplug convert DIR NEW --to gptq_v2-layout",
                )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved: yes, byte for byte."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check everything against the headers, then put the quantized modules in place."""
        # For every layout: PEFT and Transformers go by this name when they refuse to merge into
        # packed weights and to cast them.
        model.quantization_method = "gptq"
        with _told():
            if not checkpoint_files or not all(
                f.endswith(".safetensors") for f in checkpoint_files
            ):
                raise QplugError(
                    "no safetensors file", "from_pretrained", "a folder or a repository of them",
                    "qplug reads headers of files, not a state_dict",
                )  # fmt: skip
            shards = Shards(map(Path, checkpoint_files))
            known, scheme = read_model(self.quantization_config.block, shards)
            swaps, table = plan_swaps(model, known, scheme.linears, shards.headers)
        for note in scheme.notes:
            LOG.warning("%s", note)
        for swap in swaps:
            _put(model, swap, known, shards.headers)
        self._renaming = TableRenaming(table) if table else None

    def get_weight_conversions(self) -> list[Any]:
        """Return what the loader does to names besides the model's own renamings."""
        renaming = getattr(self, "_renaming", None)
        return [renaming] if renaming is not None else []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Refuse what the loader did wrong; make the run-time packs."""
        model.quantization_method = "gptq"
        with _told():
            if (getattr(model, "_tp_size", None) or 1) > 1:
                raise Unsupported("tensor parallelism", "from_pretrained", "one device per linear")
            linears = {p: m for p, m in model.named_modules() if isinstance(m, QuantLinear)}
            for path, module in linears.items():
                _finish(path, module, dispatched=hasattr(model, "hf_device_map"))
        packs = [module.pack for module in linears.values() if module.pack is not None]
        warm_up(packs, bias=any(module.bias is not None for module in linears.values()))
        _return_freed_memory()

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Turn the quantized linears into ordinary ones, and all parameters into `dtype`."""
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        with _told():
            for path, module in list(model.named_modules()):
                if isinstance(module, QuantExperts):
                    model.set_submodule(path, module.dequantized(wanted))
            for path, module in list(model.named_modules()):
                if isinstance(module, QuantLinear):
                    model.set_submodule(path, _dense(module, wanted))
        if model.dtype != wanted:
            # Not `model.to`: that is refused for a quantized model, and would round the rotary
            # frequencies, buffers that a loaded model has in float32.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(wanted)
        text = model.config.get_text_config()
        if text is not model.config and hasattr(text, "quantization_config"):
            del text.quantization_config  # a second place for the block, in vision models
        return model


def _put(model: Any, swap: Swap, known: Format, headers: Mapping[str, TensorSpec]) -> None:
    """Replace one module; the loader fills the new one like any other."""
    owner = model.get_submodule(swap.owner) if swap.owner else None
    old = owner if owner is not None else model.get_submodule(swap.path)
    if isinstance(old, QuantExperts):
        old = old._fused[0]
    dense = old.gate_up_proj if owner is not None else old.weight
    bias = swap.bias or (owner is None and old.bias is not None)
    layout = known.layout(swap.scheme)
    specs = parts_of(headers, swap.stem, [part.name for part in layout])
    linear = QuantLinear(layout, swap.scheme, dense.dtype, bias=bias, specs=specs)
    linear.transposed = owner is None and compat.is_conv1d(old)
    linear.train(old.training)
    if owner is None:
        model.set_submodule(swap.path, linear)
        return
    if not isinstance(owner, QuantExperts):
        experts = QuantExperts(owner)
        model.set_submodule(swap.owner, experts)
        owner = experts
    owner.add(swap.number, swap.role, swap.path.rpartition(".")[2], linear)


def _finish(path: str, module: QuantLinear, *, dispatched: bool) -> None:
    """Check that the loader filled a linear with the file's own bytes, and make its pack."""
    for part in module.layout:
        name, tensor = part.name, module.stored[part.name]
        wanted = TORCH_DTYPES[module.specs[name].dtype]
        if tensor.dtype is not wanted:
            # `_keep_in_fp32_modules` widens the scales of some models: exact, and undone here.
            # Codes under a floating dtype are no numbers, and may not have survived it.
            if tensor.dtype is not torch.float32 or part.holds is Holds.CODES:
                raise QplugError(str(tensor.dtype), f"{path}.{name}", f"{wanted}, as in the file")
            module.register_buffer(module.names[name], tensor.to(wanted))
        if tensor.is_meta:
            if not dispatched:
                raise QplugError("a tensor that was not loaded", f"{path}.{name}", "its values")
            module.keeps_pack = False
    if module.keeps_pack:
        try:
            device = next(iter(module.stored.values())).device
            module.prepare_for(module.compute_dtype, device)
        except QplugError as error:
            error.where = f"{path}.{error.where}" if error.where else path
            raise


def _return_freed_memory() -> None:
    """Give the holes that decoding left in the heap back to the system.

    glibc keeps what lies below a live block: 165 of 378 MB after loading a 135M model at bfloat16.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """Return the ordinary linear of a quantized one."""
    module.drop_pack()
    weight = round_to(module.dequantize(), dtype)
    out, inp = weight.shape
    dense: nn.Module
    if module.transposed:
        dense = compat.conv1d(out, inp)
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(inp, out, bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)


@contextmanager
def _told() -> Iterator[None]:
    """Give an error's hint and the further problems to the traceback, where a user reads them."""
    try:
        yield
    except QplugError as error:
        for other in error.others[: MOST_SHOWN - 1]:
            error.add_note(f"also: {other}")
        if error.fix:
            error.add_note(f"hint: {error.fix}")
        raise

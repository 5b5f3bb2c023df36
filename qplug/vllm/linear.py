"""A quantized linear in vLLM: the checkpoint's parts in, a prepared weight out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from qplug_converters.codec import TORCH_DTYPES, decode
from qplug_converters.errors import QplugError
from qplug_converters.layout import Layout, Part
from qplug_converters.scheme import Scheme
from qplug_converters.weight import AffineGrid, QuantizedWeight
from qplug_kernels.linear import apply_linear, prepare

from . import compat
from .config import sentence

SENTINEL = 0x5EA1ED42
"""Fills integer parameters until they are loaded; a whole shard of it is no trained weight."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One linear of the checkpoint: its name there, its numbers, the tensors to load."""

    module: str
    scheme: Scheme
    layout: Layout


# Only methods in vLLM's list of names get the loader that slices by the parameters' axes.
@register_weight_loader_v2_supported_method
class QplugLinearMethod(LinearMethodBase):
    """One layer: its storage in the checkpoint, and the linears that it fuses.

    Parameters
    ----------
    shards
        The linears of the checkpoint, in the order of the layer's rows.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.layout = self.shards[0].layout
        """Names and shapes of the parts, which all shards share (`QplugConfig.shards`)."""
        self.unquantized = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register one parameter for each part; the layout says its shape, dtype and axes."""
        first = self.shards[0].scheme
        rows = sum(shard.scheme.out_features for shard in self.shards)
        if (rows, first.in_features) != (sum(output_partition_sizes), input_size_per_partition):
            raise ValueError(
                f"qplug: {self.shards[0].module}: found {rows} x {first.in_features} weights, "
                f"expected {sum(output_partition_sizes)} x {input_size_per_partition}, as "
                "config.json says"
            )
        loader = extra_weight_attrs.pop("weight_loader")
        sizes = {**first.sizes, "out": rows}
        for part in self.layout:
            parameter = _parameter(part, sizes, loader)
            set_weight_attrs(parameter, extra_weight_attrs)
            layer.register_parameter(part.name, parameter)
        layer.qplug_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode what was loaded and hand it to a kernel, or to vLLM if it ends up dense.

        The parts are dropped.
        """
        parts = {part.name: getattr(layer, part.name).data for part in self.layout}
        check = not compat.load_is_dummy()
        weights, start = [], 0
        for shard in self.shards:
            stop = start + shard.scheme.out_features
            stored = {p.name: _rows(p, parts[p.name], start, stop) for p in shard.layout}
            if check:
                _refuse_missing(shard.module, stored)
            try:
                weights.append(decode(shard.layout, shard.scheme, stored))
            except QplugError as error:
                error.where = f"{shard.module}.{error.where}"
                raise ValueError(sentence(error)) from None
            start = stop
        device = parts[self.layout.parts[0].name].device
        for name in parts:
            delattr(layer, name)
        del parts
        compat.log_like_vllm()
        prepared = prepare(_stacked(weights), layer.qplug_dtype, device)
        dense = prepared.dense_weight
        layer.qplug = prepared if dense is None else None
        # LoRA finds the device of a layer by a tensor of either name.
        if dense is not None:
            layer.weight = torch.nn.Parameter(dense, requires_grad=False)  # docs/adr/0005
            self.unquantized.process_weights_after_loading(layer)
        else:
            operand = next(iter(prepared.tensors.values()))
            layer.qweight = torch.nn.Parameter(operand, requires_grad=False)  # shares its memory

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: a dense weight as vLLM does, any other inside one custom op.

        What depends on the number of tokens is decided inside that op.
        """
        if layer.qplug is None:
            result: Tensor = self.unquantized.apply(layer, x, bias)
            return result
        return apply_linear(x, layer.qplug, bias)


def _parameter(part: Part, sizes: dict[str, int], loader: Callable[..., Any]) -> BasevLLMParameter:
    """Return the vLLM parameter of a part, filled with a sentinel."""
    spec = part.spec(sizes)
    dtype = TORCH_DTYPES[spec.dtype]
    empty = float("nan") if dtype.is_floating_point else SENTINEL
    along = part.axis("inp") if part.axis("inp") is not None else part.axis("group")
    axes = {"input_dim": along, "output_dim": part.axis("out"), "weight_loader": loader}
    data = torch.full(spec.shape, empty, dtype=dtype)
    if part.packing is None:
        return GroupQuantScaleParameter(data=data, **axes)
    factor = part.packing.factor
    return PackedvLLMParameter(
        data=data,
        packed_dim=part.packed_axis,
        packed_factor=int(factor) if factor.denominator == 1 else factor,
        **axes,
    )


def _rows(part: Part, stored: Tensor, start: int, stop: int) -> Tensor:
    """Return the stored tensor of output rows `start` to `stop`, whole words of them."""
    axis = part.axis("out")
    assert axis is not None
    if part.packing is not None and part.packed_axis == axis:
        start, stop = part.packing.words(start), part.packing.words(stop)
    return stored.narrow(axis, start, stop - start)


def _refuse_missing(module: str, stored: dict[str, Tensor]) -> None:
    """Refuse a shard that is still the sentinel: vLLM does not check that tensors arrived."""
    for name, tensor in stored.items():
        lost = tensor.isnan() if tensor.is_floating_point() else tensor == SENTINEL
        if bool(lost.all()):
            raise ValueError(
                f"qplug: {module}.{name}: not loaded, although the checkpoint's headers have it"
            )


def _stacked(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Return the linears of a fused layer as one, row upon row."""
    if len(weights) == 1:
        return weights[0]
    grid = AffineGrid(
        torch.cat([weight.affine.scales for weight in weights]),
        torch.cat([weight.affine.zeros for weight in weights]),
        weights[0].affine.group_size,
    )
    return QuantizedWeight(torch.cat([w.codes for w in weights]), weights[0].bits, grid)

"""A quantized linear in vLLM: the checkpoint's parts in, a prepared weight out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs

from qplug_converters.codec import TORCH_DTYPES, decode
from qplug_converters.errors import QplugError
from qplug_converters.layout import Layout
from qplug_converters.scheme import Scheme
from qplug_converters.weight import QuantizedWeight
from qplug_kernels.linear import apply_linear, prepare
from qplug_kernels.warm import warm_up

from . import compat
from .config import sentence
from .served import parameter_name
from .stacking import stacked

_PLACES = {"q": 0, "k": 1, "v": 2, None: 0}
"""Where in a fused layer vLLM says that a tensor belongs; other layers count."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One linear of the checkpoint: its name there, its numbers, the tensors to load."""

    module: str
    scheme: Scheme
    layout: Layout


class QplugLinearMethod(LinearMethodBase):
    """One layer: its storage in the checkpoint, and the linears that it fuses.

    vLLM's own parameters cut and join tensors along their axes, which bitsandbytes' do not have.
    Those here are names to load under: each part of each linear is kept as the file has it, until
    all are there and are decoded.

    Parameters
    ----------
    shards
        The linears of the checkpoint, in the order of the layer's rows.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.stored: list[dict[str, Tensor]] = [{} for _ in shards]
        """What has been loaded of each linear, by part."""
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
        """Register an empty parameter for each part, which takes what is loaded under its name."""
        first = self.shards[0].scheme
        rows = sum(shard.scheme.out_features for shard in self.shards)
        if (rows, first.in_features) != (sum(output_partition_sizes), input_size_per_partition):
            raise ValueError(
                f"qplug: {self.shards[0].module}: found {rows} x {first.in_features} weights, "
                f"expected {sum(output_partition_sizes)} x {input_size_per_partition}, as "
                "config.json says"
            )
        parts = {part.name: part for shard in self.shards for part in shard.layout}
        for name, part in parts.items():
            empty = torch.empty(0, dtype=TORCH_DTYPES[part.dtype])
            parameter = torch.nn.Parameter(empty, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(name)})
            layer.register_parameter(parameter_name(name), parameter)
        layer.qplug_dtype = params_dtype

    def _loader(self, part: str) -> Any:
        """Return what vLLM calls with each tensor for a part."""

        def load(parameter: Tensor, loaded_weight: Tensor, shard_id: Any = None) -> None:
            place = _PLACES.get(shard_id, shard_id)
            if not isinstance(place, int) or place >= len(self.shards):
                raise ValueError(
                    f"qplug: {self.shards[0].module}.{part}: vLLM loads it as part {shard_id!r} of "
                    f"a layer, which is {len(self.shards)} of the checkpoint's linears"
                )
            shard = self.shards[place]
            spec = shard.layout.specs(shard.scheme.sizes)[part]
            dtype = TORCH_DTYPES[spec.dtype]
            if loaded_weight.dtype is not dtype or tuple(loaded_weight.shape) != spec.shape:
                raise ValueError(
                    f"qplug: {shard.module}.{part}: found {loaded_weight.dtype} "
                    f"{list(loaded_weight.shape)}, expected {spec}"
                )
            # A copy: some loaders of vLLM reuse the memory of what they hand out.
            kept = torch.empty_like(loaded_weight, device=parameter.device)
            self.stored[place][part] = kept.copy_(loaded_weight)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode what was loaded and hand it to a kernel, or to vLLM if it ends up dense.

        The parts are dropped.
        """
        names = {parameter_name(part.name) for shard in self.shards for part in shard.layout}
        device = getattr(layer, next(iter(names))).device
        weights = [self._decoded(place, device) for place in range(len(self.shards))]
        self.stored = [{} for _ in self.shards]
        for name in names:
            delattr(layer, name)
        compat.log_like_vllm()
        prepared = [prepare(weight, layer.qplug_dtype, device) for weight in stacked(weights)]
        dense = [one.dense_weight for one in prepared]
        whole = [weight for weight in dense if weight is not None]
        # LoRA finds the device of a layer by a tensor of either name.
        if len(whole) == len(dense):
            layer.qplug = None
            weight = whole[0] if len(whole) == 1 else torch.cat(whole)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)  # docs/adr/0005
            self.unquantized.process_weights_after_loading(layer)
        else:
            layer.qplug = tuple(prepared)
            # vLLM's sleep keeps what a layer names, and nothing else of a discarded card.
            for place, one in enumerate(prepared):
                for name, tensor in one.tensors.items():
                    layer.register_buffer(f"qplug_{place}_{name}", tensor, persistent=False)
            # The first of a shape compiles, the others find it done.
            warm_up(prepared, bias=len(prepared) == 1 and getattr(layer, "bias", None) is not None)
            operand = next(iter(prepared[0].tensors.values()))
            layer.qweight = torch.nn.Parameter(operand, requires_grad=False)  # shares its memory

    def _decoded(self, place: int, device: torch.device) -> QuantizedWeight:
        """Return one linear; refuse one that lacks a part: vLLM does not check that they arrive."""
        shard, stored = self.shards[place], self.stored[place]
        specs = shard.layout.specs(shard.scheme.sizes)
        if compat.load_is_dummy():
            stored = {
                name: torch.zeros(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device)
                for name, spec in specs.items()
            }
        lost = [name for name in specs if name not in stored]
        if lost:
            raise ValueError(
                f"qplug: {shard.module}.{lost[0]}: not loaded, although the checkpoint's headers "
                "have it"
            )
        try:
            return decode(shard.layout, shard.scheme, stored)
        except QplugError as error:
            error.where = f"{shard.module}.{error.where}"
            raise ValueError(sentence(error)) from None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: a dense weight as vLLM does, any other inside one custom op.

        What depends on the number of tokens is decided inside that op.
        """
        if layer.qplug is None:
            result: Tensor = self.unquantized.apply(layer, x, bias)
            return result
        if len(layer.qplug) == 1:
            return apply_linear(x, layer.qplug[0], bias)
        found = torch.cat([apply_linear(x, one) for one in layer.qplug], -1)
        return found if bias is None else found + bias

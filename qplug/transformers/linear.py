"""The linear that Transformers and PEFT see: a file's tensors as buffers, and a run-time pack.

The buffers keep the dtypes and bytes of the checkpoint, and its names but for those that no buffer
can have (`buffer_name`), so saving writes them back; nothing may cast them. What multiplies is
`qplug_kernels`: its pack is made for the dtype and device of the activations and made again when
those change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qplug_converters.codec import TORCH_DTYPES, decode
from qplug_converters.layout import Layout, TensorSpec
from qplug_converters.scheme import Scheme
from qplug_converters.weight import QuantizedWeight
from qplug_kernels.linear import Prepared, apply_linear, prepare


def buffer_name(part: str) -> str:
    """Return the name of the buffer for a part; `renaming` says why some differ."""
    return f"stored_{part.replace('.', '_')}" if part.startswith("weight") else part


class QuantLinear(nn.Linear):
    """A quantized linear.

    A subclass of `nn.Linear`, because PEFT picks its wrapper by class. `weight` is computed at
    each reading and cannot be written.

    Parameters
    ----------
    layout
        The layout of the stored tensors; each part becomes a buffer.
    scheme
        The numbers of the linear.
    dtype
        What the model computes in: dtype of `bias` and of `weight`.
    bias
        Whether there is a bias.
    specs
        The parts as a file has them, where those may differ from the layout's (constants).
    """

    def __init__(
        self,
        layout: Layout,
        scheme: Scheme,
        dtype: torch.dtype,
        *,
        bias: bool,
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate a dense weight.
        nn.Module.__init__(self)
        self.in_features = scheme.in_features
        self.out_features = scheme.out_features
        self.layout = layout
        self.scheme = scheme
        self.compute_dtype = dtype
        self.specs = layout.specs(scheme.sizes) | dict(specs or {})
        """Dtype and shape of every stored tensor, by part name."""
        self.names = {part.name: buffer_name(part.name) for part in layout}
        """The buffer of each part."""
        for name, spec in self.specs.items():
            empty = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            self.register_buffer(self.names[name], empty)
        value = torch.empty(scheme.out_features, dtype=dtype, device="meta") if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value))
        # Transformers initializes every nn.Linear that does not say this, through `weight`.
        self._is_hf_initialized = True
        self._prepared: Prepared | None = None
        self._prepared_for: tuple[torch.dtype, torch.device] | None = None
        self.transposed = False
        """Whether the model had GPT-2's `Conv1D` here, for `dequantize`."""
        self.keeps_pack = True
        """False where the buffers are off-loaded: a pack that stays would undo that."""

    @property
    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors of this linear, by part name."""
        return {part: self.get_buffer(name) for part, name in self.names.items()}

    def quantized_weight(self) -> QuantizedWeight:
        """Decode the stored tensors."""
        return decode(self.layout, self.scheme, self.stored)

    def dequantize(self) -> Tensor:
        """Return the weight as float32 `[out, in]`."""
        return self.quantized_weight().dequantize()

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]` in `compute_dtype`; computed anew, never written."""
        if any(tensor.is_meta for tensor in self.stored.values()):
            shape = (self.out_features, self.in_features)
            found = torch.empty(shape, dtype=self.compute_dtype, device="meta")
        else:
            found = self.dequantize().to(self.compute_dtype)
        weight = found.as_subclass(ReadOnly)
        # Some models initialize the linears of a block from the block (GPT-2), and pass over this.
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise RuntimeError(_READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse a `weight`; else as nn.Module does."""
        if name == "weight":
            raise RuntimeError(_READ_ONLY)
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, `[..., in]` to `[..., out]`."""
        if torch.is_autocast_enabled(input.device.type):  # as nn.Linear under autocast
            input = input.to(torch.get_autocast_dtype(input.device.type))
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype is not input.dtype:
            bias = bias.to(input.dtype)
        prepared = self.prepare_for(input.dtype, input.device)
        return apply_linear(input, prepared, bias)

    def prepare_for(self, dtype: torch.dtype, device: torch.device) -> Prepared:
        """Return the run-time pack for activations of this kind, made if need be."""
        if self._prepared is not None and self._prepared_for == (dtype, device):
            return self._prepared
        made: Prepared = self._prepare_for(dtype, device)
        return made

    # Decoding is no part of a graph: a model whose first call is compiled would trace it.
    @torch.compiler.disable
    def _prepare_for(self, dtype: torch.dtype, device: torch.device) -> Prepared:
        self.drop_pack()  # two packs at once are twice the memory
        prepared = prepare(self.quantized_weight(), dtype, device)
        if self.keeps_pack:
            self._prepared, self._prepared_for = prepared, (dtype, device)
        return prepared

    @property
    def pack(self) -> Prepared | None:
        """The run-time pack, if there is one at the moment."""
        return self._prepared

    def drop_pack(self) -> None:
        """Forget the run-time pack; the next call makes it again."""
        self._prepared = self._prepared_for = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move with the model, never cast: `fn` does not see the stored tensors.

        Casting back afterwards would come too late: float16 scales would be rounded by then.
        """
        buffers = dict(self._buffers)
        names = set(self.names.values())
        self._buffers = {name: t for name, t in buffers.items() if name not in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            others = self._buffers
            self._buffers = {name: others.get(name, t) for name, t in buffers.items()}
        for name in names:
            tensor = self.get_buffer(name)
            # What `fn` does to an empty tensor of this kind tells the device it moves to.
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            if tensor.is_meta and device.type != "meta":
                self._buffers[name] = torch.empty_like(tensor, device=device)
            else:
                self._buffers[name] = tensor.to(device)
        if self._prepared_for is not None:
            dtype, at = self._prepared_for
            device = next(iter(self.stored.values())).device
            if device != at:
                self.drop_pack()
                if device.type not in ("cpu", "meta"):  # where models are compiled as a whole
                    self.prepare_for(dtype, device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pack out of copies and pickles: it belongs to this machine."""
        return {**self.__dict__, "_prepared": None, "_prepared_for": None}

    def extra_repr(self) -> str:
        """Return sizes and scheme."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.scheme.describe()}"
        )


_READ_ONLY = (
    "the weight of a quantized linear is computed from the checkpoint's codes and cannot be "
    "written; `model.dequantize()` makes ordinary linears (to merge an adapter, for one)"
)
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "__set__"}


class ReadOnly(Tensor):
    """A tensor that reads as a plain one and refuses to be changed in place.

    PEFT merges an adapter by `weight.data += delta`: on a weight that is computed at each reading
    that would be lost without a word, and the adapter with it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on plain tensors unless it writes to one of these."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        written = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(kwargs.get("out"), ReadOnly) or (in_place and isinstance(written, ReadOnly)):
            raise RuntimeError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if name == "__get__" and func.__self__ is torch.Tensor.data:
            return found.as_subclass(ReadOnly)
        return found.as_subclass(Tensor) if isinstance(found, ReadOnly) else found

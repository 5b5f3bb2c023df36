"""Dense: the dequantized weights, for any tool that knows nothing of quantization.

One tensor `weight` [out, in] per linear, in float32 (exact), float16 or bfloat16 (rounded once,
half an ulp). A target only; `scale_dtype` of the scheme names the dtype of the weight.
"""

from __future__ import annotations

from dataclasses import replace

from ..format import Block, Format, Headers, Written
from ..layout import Holds, Layout, Part
from ..scheme import ModelScheme, Scheme

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def layout(scheme: Scheme) -> Layout:
    """Return the one stored tensor."""
    return Layout(
        (
            Part(
                name="weight",
                holds=Holds.WEIGHT,
                dtype=scheme.scale_dtype,
                stream="out inp -> out inp",
            ),
        )
    )


def claims(block: Block | None, headers: Headers) -> bool:
    """Whether there is no quantization config and no packed tensor."""
    return not block and not any(name.endswith((".qweight", ".codes")) for name in headers)


def adopt(scheme: Scheme) -> Scheme:
    """Restate a scheme as dense float32."""
    return replace(scheme, has_g_idx=False, zero_rule="as_is", desc_act=False, scale_dtype="F32")


def write(model: ModelScheme) -> Written:
    """Return no config block: the model is no longer quantized."""
    return Written(None)


FORMAT = Format(
    name="dense",
    aliases=("float",),
    title="dequantized weights, float32, float16 or bfloat16",
    capacity=None,
    claims=claims,
    layout=layout,
    read=None,
    adopt=adopt,
    write=write,
)

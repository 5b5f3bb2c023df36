"""Every format, one line each; the order is the order of detection."""

from ..errors import QplugError
from ..format import Format
from . import (
    autoround,
    awq,
    awq_gemv,
    awq_gemv_fast,
    bnb_4bit,
    bnb_int8,
    canonical,
    compressed_tensors,
    dense,
    gptq,
    gptq_p,
    gptq_v2,
)

FORMATS: tuple[Format, ...] = (
    canonical.FORMAT,
    gptq_v2.FORMAT,
    gptq_p.FORMAT,
    gptq.FORMAT,
    awq.FORMAT,
    autoround.FORMAT,
    autoround.GPTQ,
    autoround.AWQ,
    awq_gemv.FORMAT,
    awq_gemv_fast.FORMAT,
    awq_gemv_fast.LLM_AWQ,
    compressed_tensors.FORMAT,
    bnb_4bit.NF4,
    bnb_4bit.FP4,
    bnb_int8.FORMAT,
    dense.FORMAT,
)


def find(name: str) -> Format:
    """Return the format called `name`, an alias, or either with `-layout` behind it.

    Raises
    ------
    QplugError
        If there is none.
    """
    wanted = name.lower().removesuffix("-layout")
    for known in FORMATS:
        if wanted in (known.name, *known.aliases):
            return known
    offered = ", ".join(known.name for known in FORMATS)
    raise QplugError(f"no format {name!r}", "the name", f"one of {offered}", "see `qplug formats`")

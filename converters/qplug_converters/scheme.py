"""The numbers of one quantized linear, and of a whole model: no layout, no file, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ZeroFacts:
    """What the stored zeros of a linear really are, as values subtracted.

    `midpoint` counts those equal to 2^(bits-1); `at_maxq` counts stored fields equal to
    2^bits - 1, the only ones on which readers of GPTQ v1 files disagree.
    """

    lowest: int
    highest: int
    midpoint: int
    count: int
    at_maxq: int = 0

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the midpoint."""
        return self.midpoint == self.count


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """Whether float16 holds the scales of a linear.

    `exact`: every one as it is. `kept`: none overflows or becomes 0.
    """

    exact: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear is quantized.

    `group_size` is always positive (channelwise is `in_features`). `sym` and `desc_act` are what
    the config claims (`None`: nothing); `act_order` is the fact read from `g_idx`, and `zeros` and
    `scales`, once surveyed, the facts about those. `has_g_idx` says that the file stores a
    `g_idx`, needed or not.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool | None = None
    desc_act: bool = False
    act_order: bool = False
    has_g_idx: bool = False
    scale_dtype: str = "F16"
    zero_rule: str = "as_is"
    zeros: ZeroFacts | None = None
    scales: ScaleFacts | None = None

    @property
    def groups(self) -> int:
        """Number of groups; the last one may be short."""
        return -(-self.in_features // self.group_size)

    @property
    def midpoint(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def symmetric(self) -> bool:
        """The fact where the zeros were surveyed, else what the config claims, if it does."""
        return self.zeros.symmetric if self.zeros is not None else bool(self.sym)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes `out`, `inp`, `group` of a `Layout`."""
        return {"out": self.out_features, "inp": self.in_features, "group": self.groups}

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def describe(self) -> str:
        """Return e.g. `4-bit asym g128`; nothing is said of zeros that nobody looked at."""
        group = "channel" if self.group_size == self.in_features else f"g{self.group_size}"
        order = " act-order" if self.act_order else ""
        known = self.zeros is not None or self.sym is not None
        zeros = f" {'sym' if self.symmetric else 'asym'}" if known else ""
        return f"{self.bits}-bit{zeros} {group}{order}"


@dataclass(frozen=True, slots=True)
class ModelScheme:
    """Which module of a model has which scheme, as read from one checkpoint.

    `dense` are modules with a 2-D `weight` that are not quantized (embeddings included).
    `producer` is the tool that wrote the file, as the file names it. `notes` are contradictions
    that do not stop a conversion, one sentence each. `block` is the raw quantization config.
    `forced` says that a zero rule other than the producer's was asked for.
    """

    format: str
    linears: Mapping[str, Scheme]
    dense: tuple[str, ...] = ()
    producer: str = ""
    notes: tuple[str, ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False

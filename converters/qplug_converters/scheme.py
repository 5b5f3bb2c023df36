"""The numbers of one quantized linear, and of a whole model: no layout, no file, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """Which grid the codes of a linear lie on (`weight`)."""

    AFFINE = "affine"
    OFFSET = "offset"
    ROWS = "rows"
    CODEBOOK = "codebook"


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

    `exact`: every one as it is. `kept`: none overflows or becomes 0. `products`: on a grid of
    offsets, whether each offset is -(scale * zero) exactly.
    """

    exact: bool
    kept: bool
    products: bool = True


@dataclass(frozen=True, slots=True)
class Nesting:
    """How absmax values are quantized themselves (bitsandbytes' double quantization).

    `dtype` is what the dequantized ones are rounded to on their way, `offset` what is added to
    them; `table` holds 256 little-endian float32.
    """

    blocksize: int
    offset: float
    table: bytes
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Codebook:
    """The table of a codebook grid, and what its files say besides.

    `table` holds 2^bits little-endian float32; `name` is `nf4` or `fp4`. `dtype` is that of the
    original weight (nothing depends on it), `storage` that under which the codes' bytes are stored.
    `transposed` says that absmax was saved as bfloat16 [blocks of a row, out_features] by a tool
    that undid half of its own repacking. `flat` says that the words are a 1-D tensor, not a column.
    `state` holds the JSON of the file where it is not spelled as the tool does.
    """

    name: str
    table: bytes
    dtype: str = "float16"
    storage: str = "U8"
    nesting: Nesting | None = None
    transposed: bool = False
    flat: bool = False
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear is quantized.

    `kind` is the grid. `group_size` is always positive (channelwise is `in_features`; for a
    codebook, the weights that share an absmax). `sym` and `desc_act` are what
    the config claims (`None`: nothing); `act_order` is the fact read from `g_idx` (`sortable`: its
    groups are of one size, so that sorted columns lie in order), and `zeros` and `scales`, once
    surveyed, the facts about those. `has_g_idx` says that the file stores a `g_idx`, needed or not.
    `per_word` is the number of codes in a stored word where they do not fill it
    (`Packing.per_word`; 0: they do), and `shared` says that the one scale and zero of the whole
    linear are stored once. `lacks` names parts that the file does without.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool | None = None
    desc_act: bool = False
    act_order: bool = False
    sortable: bool = True
    has_g_idx: bool = False
    scale_dtype: str = "F16"
    zero_rule: str = "as_is"
    zeros: ZeroFacts | None = None
    scales: ScaleFacts | None = None
    kind: Kind = Kind.AFFINE
    codebook: Codebook | None = None
    per_word: int = 0
    shared: bool = False
    lacks: tuple[str, ...] = ()

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
        """Sizes of the canonical axes of a `Layout`."""
        sizes = {"out": self.out_features, "inp": self.in_features, "group": self.groups}
        if self.codebook is not None:
            blocks = -(-self.numel // self.group_size)
            sizes["block"] = blocks
            if self.codebook.nesting is not None:
                sizes["nested"] = -(-blocks // self.codebook.nesting.blocksize)
        return sizes

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def describe(self) -> str:
        """Return e.g. `4-bit asym g128`; nothing is said of zeros that nobody looked at."""
        if self.codebook is not None:
            nested = " double-quantized" if self.codebook.nesting is not None else ""
            return f"{self.codebook.name} b{self.group_size}{nested}"
        if self.kind is Kind.ROWS:
            return f"{self.bits}-bit rows"
        group = "channel" if self.group_size == self.in_features else f"g{self.group_size}"
        order = " act-order" if self.act_order else ""
        known = self.zeros is not None or self.sym is not None
        zeros = f" {'sym' if self.symmetric else 'asym'}" if known else ""
        offsets = " offsets" if self.kind is Kind.OFFSET else ""
        return f"{self.bits}-bit{zeros} {group}{offsets}{order}"


@dataclass(frozen=True, slots=True)
class ModelScheme:
    """Which module of a model has which scheme, as read from one checkpoint.

    `dense` are modules with a 2-D `weight` that are not quantized (embeddings included).
    `producer` is the tool that wrote the file, as the file names it. `notes` are contradictions
    that do not stop a conversion, one sentence each. `block` is the raw quantization config.
    `forced` says that a zero rule other than the producer's was asked for. `kv_scheme` is how the
    KV cache is quantized where the checkpoint holds scales for it, in the words of
    compressed-tensors' `kv_cache_scheme`. `unstacked` says that linears are slices of the file's
    tensors, which therefore cannot be copied as they are.
    """

    format: str
    linears: Mapping[str, Scheme]
    dense: tuple[str, ...] = ()
    producer: str = ""
    notes: tuple[str, ...] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False
    kv_scheme: Mapping[str, Any] = field(default_factory=dict)
    unstacked: bool = False

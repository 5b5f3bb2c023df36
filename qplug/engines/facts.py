"""What an engine goes by: the config block as it finds it, and what the headers say.

Engines read flags where qplug reads tensors, and config.json where qplug also reads side files.
`Facts` keeps both sides apart, so that a rule can compare them. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qplug_converters.checkpoint import SIDE_CONFIGS
from qplug_converters.claim import Claim
from qplug_converters.format import Block, Headers
from qplug_converters.scheme import ModelScheme, Scheme

from ..vllm.served import KV_SCALE

CONFIG, TEXT, SIDE = "config.json", "config.json text_config", "a side file"
OLD = "config.json compression_config"
"""Places where a config block is found."""


class Opened(Protocol):
    """What is asked of an opened checkpoint."""

    config: dict[str, Any]
    block: dict[str, Any] | None

    @property
    def headers(self) -> Headers:
        """Every tensor by name."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the engines are judged by.

    Attributes
    ----------
    format
        Name of the format (`formats.FORMATS`).
    block
        The config block, of that place alone: engines do not merge config.json and side files.
    place
        `CONFIG`, `TEXT`, `OLD` or `SIDE`.
    whole
        The block with what the other places add to it, as qplug reads it.
    linears, dense
        Those of a `ModelScheme`: the facts. Empty where a config is judged alone.
    architecture
        The first of `architectures` in config.json.
    kv_scales
        Whether the file holds scales of a KV cache.
    claim
        What the config says, where it is judged alone.
    ranks
        Between which tensor parallelism splits it.
    """

    format: str
    block: Block
    place: str = CONFIG
    whole: Block = field(default_factory=dict)
    linears: Mapping[str, Scheme] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    architecture: str = ""
    kv_scales: bool = False
    claim: Claim | None = None
    ranks: int = 1

    def stating(self, changes: Mapping[str, Any]) -> Facts:
        """Return the facts with keys of the block changed (`None`: left out), in config.json."""
        stated = {**self.block, **changes}
        block = {k: v for k, v in stated.items() if k not in changes or v is not None}
        return replace(self, block=block, place=CONFIG)

    def schemes(self) -> Iterator[tuple[str, Scheme]]:
        """Iterate over one linear of each scheme, with its name: rules need not look at more."""
        seen: set[Scheme] = set()
        for module, scheme in self.linears.items():
            if scheme not in seen:
                seen.add(scheme)
                yield module, scheme


def of_checkpoint(checkpoint: Opened, model: ModelScheme) -> Facts:
    """Return what engines find in a checkpoint."""
    config = checkpoint.config
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    own = config.get("quantization_config")
    if isinstance(own, dict):
        block, place = own, CONFIG
    elif isinstance(config.get("compression_config"), dict):
        block, place = config["compression_config"], OLD
    elif isinstance(nested, dict):
        block, place = nested, TEXT
    else:
        block, place = checkpoint.block or {}, SIDE
    return Facts(
        model.format,
        block,
        place,
        checkpoint.block or {},
        model.linears,
        model.dense,
        _architecture(config),
        any(KV_SCALE.match(name.rpartition(".")[2]) for name in checkpoint.headers),
    )


def of_config(claim: Claim, block: Block, where: str) -> Facts:
    """Return what engines find in a config, judged alone; `where` names its place."""
    if where in SIDE_CONFIGS:
        place = SIDE
    else:
        place = {"compression_config": OLD, "text_config": TEXT}.get(where.split()[-1], CONFIG)
    return Facts(claim.format, block, place, block, claim=claim)


def of_converted(checkpoint: Opened, model: ModelScheme, block: Block) -> Facts:
    """Return what engines would find after a conversion to `model` with config `block`."""
    return replace(of_checkpoint(checkpoint, model), block=block, place=CONFIG, whole=block)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


# Fused layers ------------------------------------------------------------------------------------

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM makes one layer of, by the names of most models (`packed_modules_mapping`)."""

_FUSED_AS = {part: whole for whole, parts in FUSED.items() for part in parts}


def layer_of(facts: Facts, module: str) -> str:
    """Return vLLM's name for the layer that a linear becomes part of."""
    before, experts, _ = module.rpartition(".experts.")
    if experts:
        return f"{before}.experts"
    parent, dot, last = module.rpartition(".")
    whole = _FUSED_AS.get(last)
    if whole is None:
        return module
    names = {f"{parent}{dot}{part}" for part in FUSED[whole]}
    there = names <= facts.linears.keys() | set(facts.dense)
    return f"{parent}{dot}{whole}" if there else module


def half_fused(facts: Facts) -> tuple[str, str] | None:
    """Return a dense and a quantized linear that vLLM makes one layer of, if there are such."""
    for module in facts.dense:
        layer = layer_of(facts, module)
        if layer != module and not layer.endswith(".experts"):
            parent, _, whole = layer.rpartition(".")
            for part in FUSED[whole]:
                if f"{parent}.{part}" in facts.linears:
                    return module, f"{parent}.{part}"
    return None

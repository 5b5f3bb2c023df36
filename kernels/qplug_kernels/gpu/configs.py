"""How a kernel is launched, and on which machines it can be: facts of cards, rules.

The rule counts what the kernel's source costs: shared memory of the stages in flight, programs for
every multiprocessor. Nothing is measured while serving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..problem import Problem
from . import tables, workspace
from .compat import OLDEST, joins
from .form import Tiled

SHARED = {"sm_80": 163, "sm_87": 163, "sm_86": 99, "sm_89": 99, "sm_120": 99, "sm_121": 99}
"""KB of shared memory that one program may have; 227 on other cards of NVIDIA, 64 of AMD's."""


@dataclass(frozen=True, slots=True)
class Config:
    """One way to launch.

    Attributes
    ----------
    tokens
        BM, the tokens of a program.
    splits
        Programs that share the inputs of a tile of outputs.
    warps, stages
        Of a program.
    joined
        Whether planes are joined before the product.
    ptx
        Whether codes are decoded by inline assembly of PTX.
    gathers
        Whether activations of a linear in act order are gathered in the loop, not before.
    """

    tokens: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    joined: bool = False
    ptx: bool = False
    gathers: bool = False

    def splits_within(self, form: Tiled, blocks: int, floats: int, counters: int) -> int:
        """Return the splits for `blocks` of tokens that a workspace holds; none without tiles."""
        tiles = form.tiles[0] * blocks
        if tiles > counters:
            return 1
        most = floats // (tiles * form.columns * self.tokens)
        return max(1, min(self.splits, most, form.tiles[1]))


@dataclass(frozen=True, slots=True)
class Card:
    """What the rules ask of a device."""

    arch: str
    multiprocessors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        return 1024 * (SHARED.get(self.arch, 227) if self.arch.startswith("sm_") else 64)


@cache
def card(device: torch.device) -> Card:
    """Describe a device; the interpreter is a card of four multiprocessors."""
    if device.type != "cuda":
        return Card("cpu", 4)
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Card(facts.gcnArchName.split(":")[0], facts.multi_processor_count)
    return Card(f"sm_{facts.major}{facts.minor}", facts.multi_processor_count)


def shared_bytes(form: Tiled, tokens: int, stages: int) -> int:
    """Return the shared memory of a program: tiles in flight but one, and activations of that.

    wgmma reads the activations of the tile it is at from there as well.
    """
    activations = 2 * tokens * form.tile
    scales = 4 * max(1, form.tile // form.group)
    tile = form.columns * (2 * form.rows * form.words + scales) + activations
    return (stages - 1) * tile + activations


def rule(form: Tiled, tokens: int, card: Card) -> Config:
    """Return the configuration of a layout for a number of tokens.

    Products of 8 columns are worth it where activations are loaded 8 bytes at a time at least, and
    do not exist on AMD's cards.
    """
    ptx = card.arch.startswith("sm_")
    fewest = 8 if ptx and form.rows > 16 else 16
    few = next((few for few in (8, 16, 32) if max(tokens, fewest) <= few), 64)
    while few > fewest and shared_bytes(form, few, 2) > card.shared:
        few //= 2
    stages = 4 if form.rows * form.words <= 32 else 3
    if form.tile == 8 * form.rows and few == 8 and card.arch.startswith("sm_12"):
        stages = 3  # with 4, eight planes spill three registers there
    while stages > 2 and shared_bytes(form, few, stages) > card.shared:
        stages -= 1
    many_n, many_k = form.tiles
    programs = many_n * -(-tokens // few)
    waves = 1 if programs >= card.multiprocessors else 2
    splits = -(-waves * card.multiprocessors // programs)
    return Config(
        tokens=few,
        splits=max(1, min(splits, many_k // 2)),
        warps=8 if few == 64 else 4,
        stages=stages,
        joined=joins(card.arch, few),
        ptx=ptx,
        gathers=few == 8,
    )


@cache
def choose(form: Tiled, tokens: int, device: torch.device) -> Config:
    """Return the configuration for a number of tokens on a device: measured, or by the rule."""
    here = card(device)
    config = rule(form, tokens, here)
    if tokens > tables.BUCKETS[-1]:
        return config
    row = tables.find(form, tokens, here.arch, here.multiprocessors)
    return config if row is None else replace(config, **row.values())


def ready(form: Tiled, device: torch.device) -> None:
    """Do at load what is not to be done while serving: read tables, provide a workspace.

    Raises
    ------
    QplugError
        If a table of configurations cannot be read.
    """
    choose(form, 1, device)
    if device.type == "cuda":
        workspace.reserve(device)


def cannot_triton(problem: Problem) -> str | None:
    """Say why no Triton kernel runs on a machine."""
    if problem.device != "cuda":
        return "it runs on a GPU"
    if problem.triton_version == (0, 0):
        return "Triton is not installed"
    if problem.triton_version < OLDEST:
        found, oldest = (".".join(map(str, v)) for v in (problem.triton_version, OLDEST))
        return f"Triton is {found}, and its products of 8 columns came with {oldest}"
    return None


def cannot(problem: Problem) -> str | None:
    """Say why no Triton kernel of tensor cores runs on a machine."""
    reason = cannot_triton(problem)
    if reason is not None:
        return reason
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {problem.dtype_name}, and tensor cores take float16 and bfloat16"
    if problem.arch.startswith("sm_") and int(problem.arch[3:]) < 80:
        return f"Triton has no tensor cores on {problem.arch}, only from sm_80 on"
    return None

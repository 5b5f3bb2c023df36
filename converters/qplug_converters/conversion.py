"""One linear converted, in blocks of rows or each tensor by itself, and hashed on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from . import moves, tiles
from .blocks import blocks_of, decode_rows, has_codes, place, rows_of
from .codec import (
    TORCH_DTYPES,
    as_words,
    check_scales,
    constant,
    encode,
    form,
    implied,
    pack_part,
    unpack_part,
)
from .digest import LinearHash
from .errors import QplugError
from .layout import Holds, Layout, Part, TensorSpec
from .plan import Step, Verdict
from .refit import Cost, refit
from .scheme import Kind
from .shards import Location, Maps
from .weight import QuantizedWeight
from .writer import ShardFile

MOST_SCRATCH = 1 << 28
"""Bytes of converted tensors that all threads together hold before each is written in one piece;
what is larger is written through a memory map."""

Rows = Callable[[Step, int, int], QuantizedWeight]
"""`(step, start, stop)`: output rows of a linear as they are before the step's moves."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear to convert: what happens to it, its layouts, and where its source lies.

    `reads` is by part, in the order of the source's files. `order` is the `g_idx` by which the
    output rows are sorted, where the act order of the next linear is absorbed.
    """

    step: Step
    source: Layout
    target: Layout
    reads: Mapping[str, Location]
    zeros: tuple[int, int] = (0, 0)
    order: Location | None = None


class Scratch:
    """Memory that one of `threads` uses again and again: fresh pages cost as much as a copy."""

    def __init__(self, threads: int = 1) -> None:
        self.turners = tiles.Turners()
        self._most = MOST_SCRATCH // threads
        self._bytes = np.empty(0, np.uint8)

    def tensor(self, spec: TensorSpec) -> Tensor | None:
        """Return a tensor with anything in it, valid until the next call; `None` if too large."""
        if spec.nbytes > self._most:
            return None
        if self._bytes.nbytes < spec.nbytes:
            self._bytes = np.empty(spec.nbytes, np.uint8)  # NumPy asks for huge pages
        flat = torch.from_numpy(self._bytes[: spec.nbytes])
        return flat.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)


class Nowhere(ShardFile):
    """Takes what is written and keeps nothing: for the hashes alone."""

    def __init__(self) -> None:
        super().__init__(Path(), {})

    def put(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Do nothing."""

    def copy(self, name: str, source: Location) -> None:
        """Do nothing."""


class Conversion:
    """One linear at work."""

    def __init__(
        self, linear: Linear, maps: Maps, shard: ShardFile, scratch: Scratch, rows: Rows | None
    ) -> None:
        self.linear, self.maps, self.shard, self.scratch = linear, maps, shard, scratch
        self.step, self.source, self.target = linear.step, linear.source, linear.target
        self.rows = rows
        self.stored = {name: maps.tensor(place) for name, place in linear.reads.items()}
        self.blocks = blocks_of(self.step.source, self.source, self.target)
        self.order: Tensor | None = None
        if linear.order is not None:
            self.order = moves.column_order(maps.tensor(linear.order))
        self.changes = (
            bool(self.step.moves)
            or self.step.refits
            or bool(self.step.padding)
            or self.order is not None
            or rows is not None
            or not has_codes(self.target)
        )
        """Whether codes or grid become others."""
        self.copied = self.step.verdict is Verdict.COPIED
        self.before = LinearHash(self.step.source.bits if has_codes(self.source) else 0)
        self.after = LinearHash(self.step.target.bits if has_codes(self.target) else 0)

    def run(self) -> dict[str, Any]:
        """Convert it; return what the certificate says of it.

        `blake3` is the hash of what is written (`digest`), `source_blake3` that of the source where
        it is another one and can be told. A linear that is copied has `stored_blake3`, that of its
        stored parts one after the other.
        """
        record: dict[str, Any] = {}
        try:
            if not self.changes and self._by_parts():
                self._convert_parts()
            else:
                cost = self._convert_blocks()
                if cost.weights:
                    error, minmax = cost.relative
                    record = {"relative_error": error, "minmax_relative_error": minmax}
        except QplugError as error:
            place(error, self.step.module)
            raise
        record["blake3"] = (self.after if self.changes else self.before).hexdigest()
        if self.changes and self.rows is None and self.order is None:
            record["source_blake3"] = self.before.hexdigest()
        if self.copied:
            stored = blake3()
            for part in self.source:
                stored.update(self.maps.raw(self.linear.reads[part.name]))
            record["stored_blake3"] = stored.hexdigest()
        return record

    def _by_parts(self) -> bool:
        """Whether each stored tensor can be converted on its own."""
        return {self.step.source.kind, self.step.target.kind} == {Kind.AFFINE}

    def _name(self, part: Part) -> str:
        return f"{self.step.written}.{part.name}"

    # By blocks --------------------------------------------------------------------------------

    def _convert_blocks(self) -> Cost:
        """Decode blocks of rows, apply the moves or fit new codes, and encode them."""
        step, target = self.step, self.target
        whole = len(self.blocks) == 1
        views: dict[str, Tensor] = {}
        if not whole and not self.copied and not isinstance(self.shard, Nowhere):
            views = {part.name: self.shard.view(self._name(part)) for part in target}
        cost = Cost()
        for start, stop in self.blocks:
            weight = self._rows(start, stop)
            if self.rows is None and self.order is None:
                self.before.feed(weight)
            if step.refits and self.rows is None:
                weight, more = refit(step.target, step.moves, self.linear.zeros, weight)
                cost += more
            else:
                weight = moves.apply(step.moves, weight)
            if step.padding and stop == step.source.out_features:
                weight = moves.pad_rows(weight, step.padding)
                stop = step.target.out_features
            if self.changes and has_codes(target):
                self.after.feed(weight)
            if self.copied:
                continue
            sizes = step.target.sizes
            out = {p.name: rows_of(p, views[p.name], sizes, start, stop) for p in target if views}
            made = encode(target, weight, out or None)
            for part in target:
                if part.holds is Holds.WEIGHT:
                    self.after.dense(made[part.name], part.dtype)
                if whole:
                    self.shard.put(self._name(part), made[part.name])
        for part in target if self.copied else ():
            self.shard.copy(self._name(part), self.linear.reads[part.name])
        return cost

    def _rows(self, start: int, stop: int) -> QuantizedWeight:
        if self.rows is not None:
            return self.rows(self.step, start, stop)
        return decode_rows(
            self.stored, self.source, self.step.source, self.step.module, start, stop, self.order
        )

    # By parts ---------------------------------------------------------------------------------

    def _convert_parts(self) -> None:
        """Convert each stored tensor on its own: the numbers stay as they are.

        A part that is the same in both layouts is copied as bytes.
        """
        scheme = self.step.source
        for holds in (Holds.SCALES, Holds.ZEROS, Holds.CODES, Holds.G_IDX):
            before, part = self.source.part(holds), self.target.part(holds)
            if before is None:
                if holds in (Holds.ZEROS, Holds.G_IDX):
                    numbers = implied(holds, scheme)
                    self.before.part(holds.value, numbers)
                    if part is not None:
                        self.shard.put(self._name(part), pack_part(part, numbers))
            elif holds is Holds.CODES:
                assert part is not None
                self._convert_codes(before, part)
            elif holds is Holds.G_IDX:
                self._convert_order(before, part)
            else:
                self._convert_numbers(before, part)
        for part in self.target:
            if part.holds is Holds.CONSTANT:
                self.shard.put(self._name(part), constant(part))

    def _convert_order(self, before: Part, part: Part | None) -> None:
        """Copy a g_idx if the target has one, and hash what it means."""
        scheme = self.step.source
        if scheme.act_order:
            self.before.part("g_idx", unpack_part(before, self.stored[before.name], scheme.sizes))
        else:
            self.before.part("g_idx", implied(Holds.G_IDX, scheme))
        if part is not None:
            self.shard.copy(self._name(part), self.linear.reads[before.name])

    def _convert_numbers(self, before: Part, part: Part | None) -> None:
        """Convert scales or zeros, if the target has them, and hash what they are."""
        scheme = self.step.source
        stored = self.stored[before.name]
        todo = part if part != before else None
        whole = len(self.blocks) == 1
        view = self.shard.view(self._name(todo)) if todo is not None and not whole else None
        for start, stop in self.blocks:
            some = rows_of(before, stored, scheme.sizes, start, stop)
            numbers = unpack_part(before, some, {**scheme.sizes, "out": stop - start})
            if part is not None and part.holds is Holds.SCALES:
                check_scales(numbers, before.name)
            wide = numbers.float() if before.holds is Holds.SCALES else numbers
            self.before.part(before.holds.value, wide)
            if todo is None:
                continue
            if view is None:
                self.shard.put(self._name(todo), pack_part(todo, numbers))
            elif start == 0 or todo.span(scheme.sizes, 0, 1) is not None:
                into = rows_of(todo, view, self.step.target.sizes, start, stop)
                pack_part(todo, numbers, into)
        if part == before:
            self.shard.copy(self._name(part), self.linear.reads[before.name])

    def _convert_codes(self, before: Part, part: Part) -> None:
        """Convert codes, as row words where both parts store those, and hash them."""
        step, name = self.step, self._name(part)
        one, two = (form(p, step.source.in_features) for p in (before, part))
        stored = self.stored[before.name]
        if one is None or two is None:
            self._convert_loose_codes(before, part)
            return
        rows = step.source.out_features
        same = before == part
        words_of = as_words(stored, one.kind, rows)
        made = same
        if (one.kind, two.kind) == (tiles.Kind.COLUMNS, tiles.Kind.TILES):
            for first, tiled in self.scratch.turners.tiles_of_columns(words_of, two.order):
                self.shard.put(name, tiled, first * tiled.shape[1] * 4)
            made = True
        turned = not made and two.kind is not tiles.Kind.ROWS
        into = self.scratch.tensor(self.shard.specs[name]) if turned else None
        filled = self.shard.view(name) if turned and into is None else into
        for start, turner, words in self.scratch.turners.blocks(one, words_of, rows):
            self.before.row_words(words)
            if filled is not None:
                turner.write(two, words, filled, start)
            elif not made:
                self.shard.put(name, words, start * words.shape[1] * 4)
        if same:
            self.shard.copy(name, self.linear.reads[before.name])
        elif into is not None:
            self.shard.put(name, into)

    def _convert_loose_codes(self, before: Part, part: Part) -> None:
        """Convert codes that fill no whole words, a block of rows at a time."""
        step, name = self.step, self._name(part)
        stored = self.stored[before.name]
        same = self.copied
        whole = len(self.blocks) == 1
        view = None if same or whole else self.shard.view(name)
        for start, stop in self.blocks:
            sizes = {**step.source.sizes, "out": stop - start}
            some = rows_of(before, stored, step.source.sizes, start, stop)
            codes = unpack_part(before, some, sizes)
            self.before.codes(codes)
            if same:
                continue
            if view is None:
                self.shard.put(name, pack_part(part, codes))
            else:
                pack_part(part, codes, rows_of(part, view, step.target.sizes, start, stop))
        if same:
            self.shard.copy(name, self.linear.reads[before.name])

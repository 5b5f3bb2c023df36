"""Uploading a checkpoint: what belongs to the model, its card, and what is stale there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qplug_converters.checkpoint import CERTIFICATE, SIDE_CONFIGS, Checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.format import Format, Headers
from qplug_converters.scheme import ModelScheme
from qplug_converters.shards import read_json
from qplug_converters.survey import survey

from . import card
from .engines import ENGINES, Outcome, judge_at, of_checkpoint
from .hub import Pushed, Say, Target, Uploaded

CARD = "README.md"


@dataclass(slots=True)
class Product:
    """A finished checkpoint, whose large files may be on the hub already.

    Attributes
    ----------
    format, model
        What is quantized, and how.
    config, block, headers
        config.json, the quantization config, and dtype and shape of every tensor.
    sizes
        Bytes of each shard.
    files
        The files that are here, by name.
    uploaded
        The shards that are on the hub already, by name.
    """

    format: Format
    model: ModelScheme
    config: dict[str, Any]
    block: dict[str, Any] | None
    headers: Headers
    sizes: Sequence[int]
    files: Mapping[str, Path]
    uploaded: Mapping[str, Uploaded]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Product:
        """Take a whole folder.

        Raises
        ------
        QplugError
            If it is not quantized, or contradicts itself.
        """
        found = checkpoint.detect()
        if found.read is None:
            raise QplugError(
                "a checkpoint that is not quantized",
                checkpoint.title,
                "quantized weights",
                "`hf upload` takes any folder",
            )
        found, model = checkpoint.scheme(found)
        return cls(
            found,
            survey(checkpoint, found, model),
            checkpoint.config,
            checkpoint.block,
            checkpoint.headers,
            [checkpoint.source.size(shard.name) for shard in checkpoint.shards],
            {name: checkpoint.source.path(name) for name in checkpoint.model_names},
            {},
        )


def publish(
    product: Product,
    target: Target,
    *,
    message: str | None = None,
    base_model: str | None = None,
    say: Say | None = None,
) -> Pushed:
    """Upload a checkpoint in one commit, with a card made from its files.

    Shards, indexes and configs in the repository that this checkpoint does not have are deleted in
    the same commit, so that a reader meets one checkpoint and never two. Other files there stay.

    Raises
    ------
    QplugError
        If a card cannot be read, or the hub refuses.
    """
    files: dict[str, Path | bytes | Uploaded] = {**product.files, **product.uploaded}
    files[CARD] = card_text(product, target, base_model, say).encode()
    if say is not None:
        size = sum(path.stat().st_size for path in product.files.values())
        say(f"uploading {len(product.files)} files, {size / 1e6:,.1f} MB, to {target.repository}")
    message = message or f"Upload {product.format.name} checkpoint"
    return target.push(files, stale(target.files, files), message)


def stale(there: Mapping[str, object], files: Mapping[str, object]) -> list[str]:
    """Return what another cutting or format left in a repository, and would be read with ours."""
    return sorted(
        name
        for name in there
        if name not in files
        and (
            name.endswith((".safetensors", ".safetensors.index.json"))
            or name in (CERTIFICATE, *SIDE_CONFIGS)
        )
    )


def card_text(product: Product, target: Target, base_model: str | None, say: Say | None) -> str:
    """Return the card: that of the repository, or else of the folder, brought up to date."""
    cards = []
    if target.card:
        cards.append(card.Card.parse(target.card, f"{target.repository}: {CARD}"))
    if CARD in product.files:
        cards.append(card.Card.parse(product.files[CARD].read_bytes(), CARD))
    certificate: Mapping[str, Any] = {}
    if CERTIFICATE in product.files:
        certificate = read_json(product.files[CERTIFICATE])
    base = card.base_of(certificate, cards, base_model)
    if base is None and say is not None:
        say("nothing says which model was quantized: --base-model owner/name puts it in the card")
    figures = card.Figures.of(product.format, product.model, product.headers, product.sizes)
    fresh = card.metadata(cards, base, figures, list(product.files))
    written = card.section(
        target.repository, figures, certificate, commands(product, target.repository.name)
    )
    title = target.repository.name.partition("/")[2]
    return card.update(cards[0] if cards else None, fresh, written, title)


def commands(product: Product, name: str) -> list[tuple[str, str]]:
    """Return what serves and loads the model as it is, and the command or code for it."""
    facts = of_checkpoint(product, product.model)
    answers = [(engine, judge_at(engine, facts, folder=name)) for engine in ENGINES]
    return [
        (f"{engine.title} ({answer.versions})", answer.command)
        for engine, answer in answers
        if answer is not None and answer.outcome is Outcome.RUNS
    ]

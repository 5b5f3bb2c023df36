"""The model card of a quantized checkpoint: metadata and one section, from the files themselves.

A card is README.md: metadata in YAML between two lines `---`, then Markdown. What people wrote in
it stays: metadata that says nothing about the quantization, and every word outside the section
between the two marks. No date and no path is in it, so that the same files make the same card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import yaml

from qplug_converters.errors import QplugError
from qplug_converters.format import Format, Headers
from qplug_converters.scheme import ModelScheme

from .repository import Repository

BEGIN = "<!-- qplug: begin (written from the files; what you change here is lost) -->"
END = "<!-- qplug: end -->"
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
_METADATA = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
LARGEST = 1 << 20
"""Bytes of a card that is read."""
LICENCE_KEYS = ("license", "license_name", "license_link")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True, slots=True)
class Figures:
    """What is counted in the files of a checkpoint.

    Attributes
    ----------
    format, title
        Name of the format, and what it is.
    schemes
        How many linears have which scheme.
    quantized, parameters
        Weights of quantized linears, and with them all other floating-point numbers: what the
        shapes of a packed file do not say.
    packed, size
        Bytes of the quantized linears with scales and zeros, and of all shards.
    shards
        Files.
    """

    format: str
    title: str
    schemes: Mapping[str, int]
    quantized: int
    parameters: int
    packed: int
    size: int
    shards: int

    @classmethod
    def of(
        cls, found: Format, model: ModelScheme, headers: Headers, sizes: Sequence[int]
    ) -> Figures:
        """Count, from the headers of all shards and the sizes of their files."""
        mine = {
            f"{module}.{part.name}"
            for module, scheme in model.linears.items()
            for part in found.layout(scheme)
        }
        others = [spec for name, spec in headers.items() if name not in mine]
        quantized = sum(scheme.numel for scheme in model.linears.values())
        return cls(
            found.name,
            found.title,
            dict(Counter(scheme.describe() for scheme in model.linears.values())),
            quantized,
            quantized + sum(prod(s.shape) for s in others if s.dtype.startswith(("F", "BF"))),
            sum(headers[name].nbytes for name in mine if name in headers),
            sum(sizes),
            len(sizes),
        )


@dataclass(frozen=True, slots=True)
class Card:
    """A model card in two parts."""

    metadata: dict[str, Any]
    body: str

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Card:
        """Read README.md; one without metadata is all body.

        Raises
        ------
        QplugError
            If its metadata is no YAML mapping.
        """
        if len(raw) > LARGEST:
            raise QplugError(f"{len(raw)} bytes", where, f"at most {LARGEST}", "shorten it")
        text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
        found = _METADATA.match(text)
        if found is None:
            return cls({}, text)
        try:
            metadata = yaml.safe_load(found[1])
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise QplugError(f"no YAML ({reason})", where, "metadata", "correct it") from None
        if metadata is not None and not isinstance(metadata, dict):
            raise QplugError("metadata that is no mapping", where, "keys", "correct it")
        return cls(metadata or {}, text[found.end() :])

    def text(self) -> str:
        """Return the card as a file holds it."""
        dumped = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True)
        return f"---\n{dumped}---\n{self.body}"


def base_of(
    certificate: Mapping[str, Any], cards: Sequence[Card], given: str | None = None
) -> str | list[str] | None:
    """Return the model that was quantized, or `None` if nothing says which.

    What the user says; else what a card says that calls itself quantized; else the repository that
    the certificate names as the source.
    """
    if given is not None:
        return given
    for card in cards:
        base = card.metadata.get("base_model")
        if base and card.metadata.get("base_model_relation") == "quantized":
            return base if isinstance(base, list) else str(base)
    source = certificate.get("source")
    named = source.get("repository") if isinstance(source, Mapping) else None
    return str(named) if named else None


def metadata(
    cards: Sequence[Card], base: str | list[str] | None, figures: Figures, files: Sequence[str]
) -> dict[str, Any]:
    """Return the metadata of the card: that of the first of `cards`, with what qplug knows.

    The licence is that of the first card that has one, or else the file of that name.
    """
    kept = dict(cards[0].metadata) if cards else {}
    if base is not None:
        kept |= {"base_model": base, "base_model_relation": "quantized"}
    else:
        kept.pop("base_model_relation", None)
    kept.setdefault("library_name", "transformers")
    for card in cards:
        if "license" in card.metadata:
            kept |= {k: card.metadata[k] for k in LICENCE_KEYS if k in card.metadata}
            break
    else:
        for name in LICENCES:
            if name in files:
                kept |= {"license": "other", "license_name": "see-file", "license_link": name}
                break
    own = ["qplug", figures.format, *dict.fromkeys(text.split()[0] for text in figures.schemes)]
    tags = kept.get("tags")
    old = [str(tag) for tag in tags] if isinstance(tags, list) else []
    kept["tags"] = list(dict.fromkeys([*old, *own]))
    return kept


def section(
    repository: Repository,
    figures: Figures,
    certificate: Mapping[str, Any],
    commands: Sequence[tuple[str, str]],
) -> str:
    """Return the section about the quantization, marks included."""
    schemes = ", ".join(f"{n} linears {text}" for text, n in figures.schemes.items())
    per_weight = 8 * figures.packed / figures.quantized if figures.quantized else 0.0
    rows = {
        "format": f"`{figures.format}`: {figures.title}",
        "quantized": f"{schemes}; {per_weight:.3f} bits a weight with all that belongs to it",
        "parameters": f"{figures.parameters:,}, of which {figures.quantized:,} are quantized",
        "size": f"{figures.size:,} bytes in {figures.shards} file"
        + ("s" if figures.shards > 1 else ""),
        **_proof(certificate),
    }
    lines = [
        BEGIN,
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {_cell(v)} |" for k, v in rows.items()),
        "",
    ]
    for title, command in commands:
        lines += [f"{title}:", "", "```", *command.splitlines(), "```", ""]
    if certificate:
        lines += [
            "`qplug-certificate.json` says of each linear what was done to it. Anybody can "
            "recompute it from the bytes:",
            "",
            "```",
            f"qplug verify SOURCE {repository.name}",
            "```",
            "",
        ]
    return "\n".join([*lines, END, ""])


def _proof(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows that the certificate gives."""
    rows: dict[str, str] = {}
    source, linears = certificate.get("source"), certificate.get("linears")
    if isinstance(source, Mapping):
        where = source.get("repository")
        at = f"{where} at `{source.get('revision')}`" if where else "a folder"
        rows["made from"] = f"{at}, format `{source.get('format')}`, by {certificate.get('tool')}"
    if isinstance(linears, Mapping):
        verdicts = Counter(
            str(one.get("verdict")) for one in linears.values() if isinstance(one, Mapping)
        )
        rows["what happened"] = ", ".join(f"{n} linears {v}" for v, n in verdicts.items())
        errors = {
            str(module): float(one["relative_error"])
            for module, one in linears.items()
            if isinstance(one, Mapping) and isinstance(one.get("relative_error"), float)
        }
        if errors:
            worst = max(errors, key=errors.__getitem__)
            rows["relative error"] = (
                f"{sum(errors.values()) / len(errors):.4f} on average over the linears that were "
                f"requantized, {errors[worst]:.4f} in `{worst}`"
            )
    return rows


def _cell(text: str) -> str:
    """Keep a text of other people inside its table cell."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")


def update(card: Card | None, fresh: Mapping[str, Any], written: str, title: str) -> str:
    """Return a card with new metadata and section; the rest of its body stays as it is."""
    body = card.body if card is not None else ""
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: written + "\n", body, count=1)
    elif body.strip():
        body = f"\n{written}\n{body.lstrip()}"
    else:
        body = f"\n# {title}\n\n{written}"
    return Card(dict(fresh), body).text()

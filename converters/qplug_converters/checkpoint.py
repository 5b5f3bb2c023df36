"""Opened checkpoints: files, config, and what they say is quantized; never a pickle.

A checkpoint is untrusted: names in an index are plain file names, and links must not leave the
folder. Where the files lie is its `Source`: a folder, or a place they are fetched from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from . import formats, names, zeros
from .errors import QplugError, Unsupported, raise_all
from .format import Format
from .places import merged, of_model_config
from .scheme import ModelScheme
from .shards import MAX_HEADER, Shards, parse_json
from .source import PICKLES, REPAIR, Folder, Source, Span, plain
from .stacked import unstack

INDEX = "model.safetensors.index.json"
CERTIFICATE = "qplug-certificate.json"
SIDE_CONFIGS = ("quantize_config.json", "quant_config.json")
OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLES)


class Checkpoint:
    """An opened checkpoint: config, headers, and tensors when asked for.

    Attributes
    ----------
    source : Source
        Where its files lie.
    folder : Path
        The folder in which they lie, or will lie once they are fetched.
    config : dict
        config.json.
    block : dict or None
        The quantization config, wherever it was found; `block_where` names the place.
    shards : tuple of Path
        The safetensors files.
    locations, headers, peek, tensor, raw, unchanged
        Those of `Shards`; stacked experts are presented apart (`unstacked`: there are some).
    zero_rule : str or None
        The zero rule that replaces the one chosen from the producer.
    """

    def __init__(self, source: Source, zero_rule: str | None = None) -> None:
        self.source = source
        self.folder = source.folder
        self.zero_rule = zero_rule
        self._names = source.names()
        self.config = self.read_json("config.json")
        shards = Shards(self._find_shards(), source)
        self.shards, self.locations, self.headers = shards.files, shards.locations, shards.headers
        self.forget, self.unchanged = shards.forget, shards.unchanged
        self.peek, self.tensor, self.raw = shards.peek, shards.tensor, shards.raw
        raise_all(shards.problems + self._check_index())
        apart = unstack(self.locations, self.config)
        self.unstacked = apart is not None
        if apart is not None:
            shards.present(apart)
        sides = [(self.read_json(name), name) for name in self.side_configs]
        self.block, self.block_where, self._block_notes = merged(
            [*of_model_config(self.config), *sides]
        )

    # Files ------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What errors call the checkpoint."""
        return self.source.title

    def read_bytes(self, name: str) -> bytes:
        """Return a small file of the checkpoint."""
        plain(name)
        self.source.path(name)
        size = self.source.size(name)
        if size > MAX_HEADER:
            raise QplugError(f"{size} bytes", name, f"at most {MAX_HEADER}", REPAIR)
        return self.source.read([Span(name, 0, size)])[0] if size else b""

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object from a file of the checkpoint."""
        return parse_json(self.read_bytes(name), name)

    def _find_shards(self) -> tuple[Path, ...]:
        """Return the shards: those of an index, else the only safetensors file there is."""
        indexes = [n for n in self._names if n.endswith(".safetensors.index.json")]
        if len(indexes) > 1:
            raise QplugError(
                f"{indexes[0]} and {indexes[1]}",
                self.title,
                "one index",
                "remove the one that is not of this model",
            )
        self._weight_map: dict[str, str] = {}
        if indexes:
            index = self.read_json(indexes[0])
            weights = index.get("weight_map")
            if (
                not isinstance(weights, dict)
                or not weights
                or not all(isinstance(v, str) for v in weights.values())
            ):
                raise QplugError(
                    "no weight_map of names", indexes[0], "file names by tensor", REPAIR
                )
            self._weight_map = weights
            return tuple(self.source.path(plain(n)) for n in dict.fromkeys(weights.values()))
        files = [n for n in self._names if n.endswith(".safetensors")]
        if len(files) > 1:
            files = [n for n in files if n == "model.safetensors"]
            if not files:
                raise QplugError(
                    f"{len([n for n in self._names if n.endswith('.safetensors')])} safetensors "
                    "files and no index",
                    self.title,
                    f"an {INDEX}",
                    "download the index too",
                )
        return (self.source.path(files[0] if files else "model.safetensors"),)

    def _check_index(self) -> list[QplugError]:
        """Compare the index with the headers."""
        problems = []
        fix = "index and shards are of two downloads: download them again"
        for name, file in self._weight_map.items():
            if name not in self.locations:
                problems.append(
                    QplugError("no such tensor", f"{file}: {name}", "what the index says", fix)
                )
            elif self.locations[name].file.name != file:
                problems.append(
                    QplugError(
                        f"in {self.locations[name].file.name}", name, f"in {file} (index)", fix
                    )
                )
        if self._weight_map:
            for name, location in self.locations.items():
                if name not in self._weight_map:
                    problems.append(
                        QplugError(
                            "not in the index", f"{location.file.name}: {name}", "an entry", fix
                        )
                    )
        return problems

    @property
    def other_names(self) -> list[str]:
        """Names of the files of the model that hold no weights (tokenizer, templates, licence)."""
        return [
            name
            for name in self._names
            if not name.endswith(("/", *OTHER_WEIGHTS, ".index.json"))
            and not name.startswith(".")
            and name not in ("config.json", CERTIFICATE, *SIDE_CONFIGS)
        ]

    @property
    def model_names(self) -> list[str]:
        """Names of all files that make up the model: weights, configs, certificate, and others."""
        mine = {"config.json", CERTIFICATE, *SIDE_CONFIGS, *(s.name for s in self.shards)}
        index = {n for n in self._names if n.endswith(".safetensors.index.json")}
        return [n for n in self._names if n in mine | index | set(self.other_names)]

    @property
    def other_files(self) -> list[Path]:
        """The files of `other_names`; those elsewhere are fetched."""
        paths = [self.source.path(plain(name)) for name in self.other_names]
        self.source.need(self.other_names)
        return paths

    # Config -----------------------------------------------------------------------------------

    @property
    def model_type(self) -> str | None:
        """What config.json, or its text_config, calls the architecture."""
        text = self.config.get("text_config")
        for place in (text, self.config):
            if isinstance(place, dict) and isinstance(place.get("model_type"), str):
                return str(place["model_type"])
        return None

    @property
    def side_configs(self) -> list[str]:
        """Names of the config files that old tools wrote beside config.json."""
        return [name for name in SIDE_CONFIGS if name in self._names]

    # Meaning ----------------------------------------------------------------------------------

    def detect(self, wanted: Format | None = None) -> Format:
        """Return the format of the checkpoint.

        Raises
        ------
        QplugError
            If no format claims it, or another one than `wanted` does.
        """
        found = next((f for f in formats.FORMATS if f.claims(self.block, self.headers)), None)
        if found is None:
            method = (self.block or {}).get("quant_method")
            raise Unsupported(
                f"quant_method {method!r}" if method else "no known quantization",
                self.title,
                f"one of {', '.join(f.name for f in formats.FORMATS if f.read)}",
                "see `qplug formats`",
            )
        if wanted is not None and found is not wanted:
            raise QplugError(
                f"format {found.name}",
                self.title,
                f"{wanted.name}, as --from says",
                "leave out --from, or correct it",
            )
        return found

    def scheme(
        self, wanted: Format | None = None, zero_rule: str | None = None
    ) -> tuple[Format, ModelScheme]:
        """Read what is quantized and how, from headers, config and each `g_idx`.

        `zero_rule` is taken instead of the checkpoint's own.
        """
        found = self.detect(wanted)
        if found.read is None:
            raise QplugError(
                "a checkpoint that is not quantized",
                self.title,
                "quantized weights",
                "`qplug quantize` starts from full precision",
            )
        try:
            model = found.read(self.block, self.headers, self.peek)
        except QplugError as error:
            if not error.where:
                error.where = self.title
            raise
        forced = zero_rule if zero_rule is not None else self.zero_rule
        if forced is not None:
            model = _force_rule(model, found, forced)
        notes = (*model.notes, *self._oddities(model))
        kv_scheme = model.kv_scheme or names.kv_scheme(self.headers)
        model = replace(model, notes=notes, kv_scheme=kv_scheme, unstacked=self.unstacked)
        return found, model

    def _oddities(self, model: ModelScheme) -> list[str]:
        """Return what is odd about the folder, one sentence each."""
        notes = [*self._block_notes]
        if left := self.left_behind:
            notes.append(f"not part of the model, and not carried along: {', '.join(left)}")
        if self.block and not (self.block.get("quant_method") or self.block.get("method")):
            notes.append("the config names no quant_method: engines take the model for unquantized")
        head = next((m for m in model.linears if m.rpartition(".")[2] == "lm_head"), None)
        if head and self.config.get("tie_word_embeddings") is True:
            notes.append(
                f"{head} is quantized, and tie_word_embeddings says that engines use the embedding"
            )
        return notes

    @property
    def left_behind(self) -> list[str]:
        """Folders, and files of weights that no index names: what a conversion does not carry."""
        mine = {shard.name for shard in self.shards}
        return [
            name
            for name in self._names
            if not name.startswith(".")
            and (name.endswith("/") or (name.endswith(OTHER_WEIGHTS) and name not in mine))
        ]


def _force_rule(model: ModelScheme, found: Format, rule: str) -> ModelScheme:
    """Replace the zero rule of every linear, if the rule is defined for it."""
    if not found.zero_rules:
        raise QplugError(
            f"format {found.name}",
            "--zero-rule",
            "gptq, the format that has several rules",
            fix="leave out --zero-rule",
        )
    linears = {}
    for module, scheme in model.linears.items():
        if reason := zeros.applies(rule, scheme.bits):
            raise QplugError(reason, module, fix="pick a rule for these bits")
        linears[module] = replace(scheme, zero_rule=rule)
    changed = any(scheme.zero_rule != rule for scheme in model.linears.values())
    return replace(model, linears=linears, forced=changed)


def open_checkpoint(source: str | Path | Source, zero_rule: str | None = None) -> Checkpoint:
    """Open a checkpoint: its config and headers are read and checked, no tensor is.

    `source` is a folder, or a `Source` whose files lie elsewhere. `zero_rule` replaces the GPTQ v1
    zero rule that would be chosen from the producer.

    Raises
    ------
    QplugError
        If it is no folder, holds pickles only, or a file is damaged; all damage at once.
    """
    if not isinstance(source, str | Path):
        return Checkpoint(source, zero_rule)
    folder = Path(source)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise QplugError(found, str(folder), "a checkpoint folder", "check the path")
    return Checkpoint(Folder(folder), zero_rule)

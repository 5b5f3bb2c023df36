"""Opened checkpoints: a folder, its config, and what they say is quantized; never a pickle.

A checkpoint is untrusted: names in an index are plain file names, and links must not leave the
folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from . import formats, zeros
from .errors import QplugError, Unsupported, raise_all
from .format import Format
from .scheme import ModelScheme
from .shards import REPAIR, Shards, read_json, unreadable

INDEX = "model.safetensors.index.json"
SIDE_CONFIGS = ("quantize_config.json", "quant_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLES)


class Checkpoint:
    """An opened folder: config, headers, and tensors when asked for.

    Attributes
    ----------
    folder : Path
        The folder.
    config : dict
        config.json.
    block : dict or None
        The quantization config, wherever it was found; `block_where` names the place.
    shards : tuple of Path
        The safetensors files.
    locations, headers, peek, tensor, raw
        Those of `Shards`.
    zero_rule : str or None
        The zero rule that replaces the one chosen from the producer.
    """

    def __init__(self, folder: Path, zero_rule: str | None = None) -> None:
        self.folder = folder
        self.zero_rule = zero_rule
        self.config = read_json(self._inside("config.json"))
        shards = Shards(self._find_shards())
        self.shards, self.locations, self.headers = shards.files, shards.locations, shards.headers
        self.peek, self.tensor, self.raw = shards.peek, shards.tensor, shards.raw
        raise_all(shards.problems + self._check_index())
        self.block, self.block_where = self._find_block()

    # Files ------------------------------------------------------------------------------------

    def _inside(self, name: str) -> Path:
        """Return the path of a file of the checkpoint; refuse one that leads out of the folder.

        The layout of huggingface_hub's cache (snapshots/<revision>/x -> ../../blobs/<hash>) is
        the one link that may leave it.
        """
        path = self.folder / name
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise QplugError(f"{name!r}", "an entry of the index", "a plain file name", REPAIR)
        try:
            real, root = path.resolve(), self.folder.resolve()
            exists, regular = path.exists(), path.is_file()
        except OSError as error:
            raise unreadable(path, error) from None
        except RuntimeError:  # what pathlib raises for a loop
            raise QplugError("a link to itself", str(path), "a file", REPAIR) from None
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
            raise QplugError(
                f"a link to {real}", name, "a file inside the folder", "copy the file into it"
            )
        if not exists:
            pickled = [p.name for p in self.folder.glob("*") if p.suffix in PICKLES]
            if name.endswith(".safetensors") and pickled:
                raise QplugError(
                    f"only {pickled[0]}, a pickle, which can run any code",
                    str(self.folder),
                    "safetensors files",
                    "let the tool that wrote it save safetensors",
                )
            linked = path.is_symlink()
            raise QplugError(
                "a link to nothing" if linked else "no such file",
                str(path),
                "a file" if linked else "config.json and safetensors files",
                "check the path, or download what is missing",
            )
        if not regular:
            raise QplugError("no regular file", str(path), "a file", REPAIR)
        return path

    def _find_shards(self) -> tuple[Path, ...]:
        """Return the shards: those of an index, else the only safetensors file there is."""
        indexes = sorted(self.folder.glob("*.safetensors.index.json"))
        if len(indexes) > 1:
            raise QplugError(
                f"{indexes[0].name} and {indexes[1].name}",
                str(self.folder),
                "one index",
                "remove the one that is not of this model",
            )
        self._weight_map: dict[str, str] = {}
        if indexes:
            index = read_json(self._inside(indexes[0].name))
            weights = index.get("weight_map")
            if (
                not isinstance(weights, dict)
                or not weights
                or not all(isinstance(v, str) for v in weights.values())
            ):
                raise QplugError(
                    "no weight_map of names", indexes[0].name, "file names by tensor", REPAIR
                )
            self._weight_map = weights
            return tuple(self._inside(name) for name in dict.fromkeys(weights.values()))
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) > 1:
            named = [f for f in files if f.name == "model.safetensors"]
            if not named:
                raise QplugError(
                    f"{len(files)} safetensors files and no index",
                    str(self.folder),
                    f"an {INDEX}",
                    "download the index too",
                )
            files = named
        return (self._inside(files[0].name if files else "model.safetensors"),)

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
    def other_files(self) -> list[Path]:
        """Files that belong to the model and hold no weights (tokenizer, templates, licence)."""
        return [
            self._inside(path.name)
            for path in sorted(self.folder.iterdir())
            if not path.is_dir()
            and not path.name.startswith(".")
            and path.name not in ("config.json", "qplug-certificate.json", *SIDE_CONFIGS)
            and not path.name.endswith((*OTHER_WEIGHTS, ".index.json"))
        ]

    # Config -----------------------------------------------------------------------------------

    def _find_block(self) -> tuple[dict[str, Any] | None, str]:
        """Find the quantization config: config.json, its text_config, and old side files.

        Where several say something, the first place counts, and the others fill what it leaves
        out: Transformers drops keys (`dynamic`, `meta`) that a side file still has.
        """
        places: list[tuple[Any, str]] = [
            (self.config.get("quantization_config"), "config.json quantization_config")
        ]
        text = self.config.get("text_config")
        if isinstance(text, dict):
            places.append((text.get("quantization_config"), "config.json text_config"))
        places += [(read_json(self._inside(name)), name) for name in self.side_configs]
        present = [(block, where) for block, where in places if block is not None]
        for block, where in present:
            if not isinstance(block, dict):
                raise QplugError(f"{block!r}", where, "a JSON object", "correct the config")
        for block, where in present[1:]:
            self._compare(present[0][0], present[0][1], block, where)
        if not present:
            return None, "nowhere"
        whole: dict[str, Any] = {}
        for block, _ in present:
            for key, value in block.items():
                if whole.get(key) is None:
                    whole[key] = value
        return whole, present[0][1]

    @property
    def side_configs(self) -> list[str]:
        """Names of the config files that old tools wrote beside config.json."""
        return [name for name in SIDE_CONFIGS if (self.folder / name).exists()]

    @staticmethod
    def _compare(first: dict[str, Any], at: str, second: dict[str, Any], where: str) -> None:
        """Refuse two config blocks that disagree on what decides the weights."""
        aliases = (
            ("quant_method", "method"),
            ("bits", "w_bit"),
            ("group_size", "q_group_size"),
            ("sym",),
            ("zero_point",),
            ("checkpoint_format",),
            ("version",),
        )

        def plain(value: Any) -> Any:
            return value.lower() if isinstance(value, str) else value

        for names in aliases:
            one, two = (
                next((b[n] for n in names if b.get(n) is not None), None) for b in (first, second)
            )
            if one is not None and two is not None and plain(one) != plain(two):
                raise QplugError(
                    f"{names[0]} {one!r} in {at} and {two!r} in {where}",
                    "the configs",
                    "the same in both",
                    "remove the wrong one",
                )

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
                str(self.folder),
                f"one of {', '.join(f.name for f in formats.FORMATS if f.read)}",
                "see `qplug formats`",
            )
        if wanted is not None and found is not wanted:
            raise QplugError(
                f"format {found.name}",
                str(self.folder),
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
                str(self.folder),
                "quantized weights",
                "`qplug quantize` starts from full precision",
            )
        try:
            model = found.read(self.block, self.headers, self.peek)
        except QplugError as error:
            if not error.where:
                error.where = str(self.folder)
            raise
        forced = zero_rule if zero_rule is not None else self.zero_rule
        if forced is not None:
            model = _force_rule(model, found, forced)
        return found, replace(model, notes=(*model.notes, *self._oddities(model)))

    def _oddities(self, model: ModelScheme) -> list[str]:
        """Return what is odd about the folder, one sentence each."""
        notes = []
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
            f"{path.name}/" if path.is_dir() else path.name
            for path in sorted(self.folder.iterdir())
            if not path.name.startswith(".")
            and (path.is_dir() or (path.name.endswith(OTHER_WEIGHTS) and path.name not in mine))
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


def open_checkpoint(source: str | Path, zero_rule: str | None = None) -> Checkpoint:
    """Open a checkpoint folder: its config and headers are read and checked, no tensor is.

    `zero_rule` replaces the GPTQ v1 zero rule that would be chosen from the producer.

    Raises
    ------
    QplugError
        If it is no folder, holds pickles only, or a file is damaged; all damage at once.
    """
    folder = Path(source)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise QplugError(found, str(folder), "a checkpoint folder", "check the path")
    return Checkpoint(folder, zero_rule)

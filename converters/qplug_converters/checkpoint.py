"""Opened checkpoints: headers until asked, tensors as views of memory maps, never a pickle.

Nothing here imports torch until a tensor is asked for. A checkpoint is untrusted: names in an
index are plain file names, links must not leave the folder, and headers are checked against the
files they describe before anything is read.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import formats, zeros
from .errors import QplugError, Unsupported, raise_all
from .format import Format
from .layout import ITEMSIZE, TensorSpec
from .scheme import ModelScheme

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SIDE_CONFIGS = ("quantize_config.json", "quant_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLES)
REPAIR = "download the file again, or correct it"
MAX_HEADER = 100_000_000
"""Bytes: the limit of the safetensors library itself."""

_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16,
    "BF16": np.uint16, "F32": np.float32, "F64": np.float64, "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
}  # fmt: skip
"""NumPy has no bfloat16 or float8: those come as unsigned integers of the same width."""

_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Copy-on-write, for torch wants writable memory and nothing is ever written; without a reserve,
or Linux refuses a file larger than the memory (Python names the flag since 3.13)."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a tensor lie."""

    file: Path
    offset: int
    spec: TensorSpec


def _unique(where: str) -> Any:
    """Return a JSON hook that refuses an object with two entries of one name."""

    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise QplugError(f"two entries named {twice!r}", where, "one", REPAIR)
        return found

    return hook


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, other values and undecodable text are errors."""
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_unique(path.name))
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON ({error})", path.name, "a JSON object", REPAIR) from None
    if not isinstance(found, dict):
        kind = "null" if found is None else type(found).__name__
        raise QplugError(f"a JSON {kind}", path.name, "a JSON object", REPAIR)
    return found


def _unreadable(path: Path, error: OSError) -> QplugError:
    return QplugError(
        f"cannot be read ({error.strerror})", str(path), fix="check the path and its permissions"
    )


def read_header(path: Path) -> tuple[dict[str, Location], dict[str, str]]:
    """Read the header of a safetensors file: tensors and metadata.

    The checks are those of the safetensors library (no hole, no overlap, sizes that match shapes)
    and one it lacks (no name twice), each naming the tensor.

    Raises
    ------
    QplugError
        If the file is truncated or its header lies.
    """
    name = path.name
    damaged = "download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise QplugError(
                    f"a header of {length} bytes in a file of {size}",
                    name,
                    "a whole safetensors file",
                    damaged,
                )
            raw = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        # Decoded here: json itself would guess UTF-16 and UTF-32 too, which no other reader does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique(name))
    except (ValueError, RecursionError) as error:
        raise QplugError(f"no JSON header ({error})", name, "a safetensors file", damaged) from None
    if not isinstance(header, dict):
        raise QplugError("a header that is no object", name, "a safetensors file", damaged)
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    found: dict[str, Location] = {}
    spans = []
    for tensor, entry in header.items():
        where = f"{name}: {tensor}"
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            whole = whole and isinstance(dtype, str) and bool(tensor.encode())
        except (KeyError, TypeError, ValueError):  # UnicodeError is a ValueError
            whole = False
        if not whole:
            raise QplugError("a damaged entry", where, "dtype, shape and data_offsets", damaged)
        if dtype not in ITEMSIZE:
            raise Unsupported(
                f"dtype {dtype!r}",
                where,
                f"one of {', '.join(ITEMSIZE)}",
                "save it again in one of these dtypes",
            )
        if end - begin != ITEMSIZE[dtype] * prod(shape):
            raise QplugError(
                f"{end - begin} bytes",
                where,
                f"{ITEMSIZE[dtype] * prod(shape)} for {TensorSpec(dtype, shape)}",
                damaged,
            )
        spans.append((begin, end, where))
        found[tensor] = Location(path, start + begin, TensorSpec(dtype, shape))
    at = 0
    for begin, end, where in sorted(spans):
        if begin != at:
            raise QplugError(f"data from byte {begin}", where, f"from byte {at}", damaged)
        at = end
    if start + at != size:
        raise QplugError(
            f"{size - start} bytes of data",
            name,
            f"{at} (the shard is truncated or padded)",
            damaged,
        )
    return found, metadata if isinstance(metadata, dict) else {}


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
    locations : dict
        Every tensor by name, in file order.
    shards : tuple of Path
        The safetensors files.
    zero_rule : str or None
        The zero rule that replaces the one chosen from the producer.
    """

    def __init__(self, folder: Path, zero_rule: str | None = None) -> None:
        self.folder = folder
        self.zero_rule = zero_rule
        self.config = read_json(self._inside("config.json"))
        self.shards = self._find_shards()
        self.locations: dict[str, Location] = {}
        self.metadata: dict[str, str] = {}
        problems: list[QplugError] = []
        for shard in self.shards:
            found, metadata = read_header(shard)
            self.metadata.update(metadata)
            for name, location in found.items():
                if name in self.locations:
                    first = self.locations[name].file.name
                    problems.append(
                        QplugError(
                            f"in {first} and {shard.name}", name, "one tensor of this name", REPAIR
                        )
                    )
                self.locations[name] = location
        problems += self._check_index()
        raise_all(problems)
        self.block, self.block_where = self._find_block()
        self._maps: dict[Path, mmap.mmap] = {}

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
            raise _unreadable(path, error) from None
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
            raise QplugError(
                "no such file",
                str(path),
                "config.json and safetensors files",
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
        """Find the quantization config: config.json, its text_config, or an old side file."""
        places: list[tuple[Any, str]] = [
            (self.config.get("quantization_config"), "config.json quantization_config")
        ]
        text = self.config.get("text_config")
        if isinstance(text, dict):
            places.append((text.get("quantization_config"), "config.json text_config"))
        for name in SIDE_CONFIGS:
            if (self.folder / name).exists():
                places.append((read_json(self._inside(name)), name))
        present = [(block, where) for block, where in places if block is not None]
        for block, where in present:
            if not isinstance(block, dict):
                raise QplugError(f"{block!r}", where, "a JSON object", "correct the config")
        for block, where in present[1:]:
            self._compare(present[0][0], present[0][1], block, where)
        return present[0] if present else (None, "nowhere")

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

    # Tensors ----------------------------------------------------------------------------------

    @cached_property
    def headers(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, in file order."""
        return {name: location.spec for name, location in self.locations.items()}

    def _bytes(self, name: str) -> tuple[mmap.mmap, Location]:
        location = self.locations[name]
        if location.file not in self._maps:
            try:
                with location.file.open("rb") as file:
                    self._maps[location.file] = mmap.mmap(
                        file.fileno(), 0, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE
                    )
            except OSError as error:
                raise _unreadable(location.file, error) from None
        return self._maps[location.file], location

    def peek(self, name: str) -> NDArray[np.generic]:
        """Return a tensor as a NumPy view, without torch; bfloat16 comes as uint16."""
        data, location = self._bytes(name)
        dtype = np.dtype(_NUMPY[location.spec.dtype])
        count = prod(location.spec.shape)
        if location.offset % dtype.itemsize:  # legal in the format, not for a typed view
            raw = bytearray(data[location.offset : location.offset + location.spec.nbytes])
            return np.frombuffer(raw, dtype, count).reshape(location.spec.shape)
        return np.frombuffer(data, dtype, count, location.offset).reshape(location.spec.shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the memory map."""
        import torch

        from .codec import TORCH_DTYPES

        spec = self.locations[name].spec
        if 0 in spec.shape:
            return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        view = torch.from_numpy(self.peek(name).view(np.uint8).reshape(-1))
        return view.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        data, location = self._bytes(name)
        return memoryview(data)[location.offset : location.offset + location.spec.nbytes]

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
        return found, model


def _force_rule(model: ModelScheme, found: Format, rule: str) -> ModelScheme:
    """Replace the zero rule of every linear, if the rule is defined for it."""
    if found.name != "gptq":
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
    return replace(model, linears=linears)


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

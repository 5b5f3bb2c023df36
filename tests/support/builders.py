"""Checkpoints in memory, to be changed and written to a folder: copies of goldens, tiny models.

`Draft` is deliberately simple-minded: it writes what it is told, right or wrong, with its own
safetensors writer, so that a test can lie about any byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qplug_converters import formats
from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.plan import make_plan
from qplug_converters.survey import survey

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
Q = "model.layers.0.self_attn.q_proj"
"""The linear that most tests change."""

_DTYPES = {"float16": "F16", "float32": "F32", "int32": "I32", "int16": "I16", "uint8": "U8",
           "int64": "I64", "float64": "F64"}  # fmt: skip
_NUMPY = {name: np.dtype(kind) for kind, name in _DTYPES.items()}


@dataclass
class Stored:
    """One tensor as a file holds it."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray, dtype: str = "") -> Stored:
        return cls(dtype or _DTYPES[array.dtype.name], list(array.shape), array.tobytes())

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape).copy()


def shard_bytes(header: Any, data: bytes) -> bytes:
    """Return a safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def header_of(tensors: Mapping[str, Stored]) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a shard."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in tensors.items():
        end = at + len(stored.data)
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, end]}
        at = end
    return header, b"".join(stored.data for stored in tensors.values())


@dataclass
class Draft:
    """A checkpoint: config.json, the side config where there is one, tensors in file order."""

    config: dict[str, Any]
    tensors: dict[str, Stored]
    side: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | str) -> Draft:
        """Copy a golden (by name) or any checkpoint of one shard."""
        folder = GOLDEN / folder
        shards = [p for p in folder.glob("*.safetensors") if p.name != "reference.safetensors"]
        (shard,) = shards
        raw = shard.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        data = raw[8 + length :]
        tensors = {
            name: Stored(e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        side = folder / "quantize_config.json"
        return cls(
            json.loads((folder / "config.json").read_text()),
            tensors,
            json.loads(side.read_text()) if side.exists() else None,
        )

    @property
    def block(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def set(self, **keys: Any) -> Draft:
        """Set keys of the quantization config, everywhere it is written."""
        for block in (self.block, self.side):
            if block is not None:
                block.update(keys)
        return self

    def drop(self, *keys: str) -> Draft:
        """Remove keys of the quantization config."""
        for block in (self.block, self.side):
            for key in keys:
                if block is not None:
                    block.pop(key, None)
        return self

    def shard(self, names: list[str] | None = None) -> bytes:
        """Return the bytes of a shard with these tensors, or all."""
        chosen = self.tensors if names is None else {n: self.tensors[n] for n in names}
        return shard_bytes(*header_of(chosen))

    def save(self, folder: Path) -> Path:
        """Write everything in one shard."""
        self.save_small(folder)
        (folder / "model.safetensors").write_bytes(self.shard())
        return folder

    def save_small(self, folder: Path) -> None:
        """Write everything but tensors."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.side is not None:
            (folder / "quantize_config.json").write_text(json.dumps(self.side))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def save_sharded(self, folder: Path, count: int = 2) -> dict[str, str]:
        """Write `count` shards and an index; return the index's map."""
        self.save_small(folder)
        names = list(self.tensors)
        step = -(-len(names) // count)
        weight_map: dict[str, str] = {}
        for number in range(count):
            mine = names[number * step : (number + 1) * step]
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (folder / file).write_bytes(self.shard(mine))
            weight_map |= dict.fromkeys(mine, file)
        write_index(folder, weight_map)
        return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    """Write model.safetensors.index.json."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def dense(seed: int = 0, *, hidden: int = 64, inter: int = 96, dtype: str = "float32") -> Draft:
    """Make a full-precision model of one layer with linears of every awkward kind.

    Rows 0 and 1 of each linear hold only positive and only negative weights, row 2 zeros, row 3
    tiny numbers.
    """
    rng = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }
    tensors = {"model.embed_tokens.weight": Stored.of(rng.normal(size=(32, hidden)).astype(dtype))}
    for name, shape in shapes.items():
        weight = rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))
        weight[0], weight[1] = abs(weight[0]), -abs(weight[1])
        weight[2], weight[3] = 0, weight[3] * 1e-7
        tensors[f"model.layers.0.{name}.weight"] = Stored.of(weight.astype(dtype))
    tensors["model.norm.weight"] = Stored.of(np.ones(hidden, dtype))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden}
    return Draft(config, tensors, files={"tokenizer.json": b"{}"})


def digest(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The error that `--json` printed."""
        return self.json["error"]

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that state an error."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Command = Callable[..., Ran]


def convert(
    source: Path,
    target: Path,
    to: str = "canonical",
    progress: Callable[[int, int, str], None] | None = None,
    **more: Any,
) -> None:
    """Convert as the command line does."""
    from qplug_converters.execute import execute

    checkpoint = open_checkpoint(source)
    found, model = checkpoint.scheme()
    plan = make_plan(found, survey(checkpoint, found, model), formats.find(to))
    execute(plan, checkpoint, target, progress=progress, **more)

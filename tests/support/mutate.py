"""Changes by which a fuzzer makes a hostile checkpoint of a golden, drawn from a `random.Random`.

They know what a checkpoint is made of: keys and values of configs (rather those that other goldens
have), names, dtypes and shapes of tensors, the numbers that decide, headers, indexes, bytes.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from builders import GOLDEN, Draft, Stored, header_of, shard_bytes, write_index
from spoil import SHARD

from qplug_converters.layout import ITEMSIZE

NUMBERS = (0, 1, -1, -2, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 64, 96, 127, 128, 256, 4096, 1 << 31,
           1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400, 4.0, 0.5, -0.0,
           1e308, float("inf"), float("nan"))  # fmt: skip
TEXTS = ("", "4", "int4", "int32", "int8", "float", "gptq", "gptq_v2", "gptq_p", "awq", "gemm",
         "gemv", "gemv_fast", "llm-awq", "marlin", "compressed-tensors", "pack-quantized",
         "bitsandbytes", "auto-round", "auto_round:auto_gptq", "auto_round:auto_awq", "qplug",
         "hqq", "nf4", "fp4", "group", "channel", "tensor", "block", "static", "dynamic", "re:.*",
         "re:(", "-:.*", "+:.*q_proj", "(a+)+$",
         "(.*.*)*x", "x{1,99999}{1,99999}", "[[:alpha:]", "(?R)",
         "Linear", "lm_head", "model.layers.0", "mlp.gate", "true", "\ud800", "\0", "a\nb\x1b[31m",
         "../x", "/etc/passwd", "..", "x" * 5000, "bfloat16", "torch.float16", "F16", "uint8",
         SHARD, "config.json", "0.17.1", "9" * 30)  # fmt: skip
KEYS = ("bits", "w_bit", "wbits", "group_size", "q_group_size", "sym", "desc_act", "zero_point",
        "checkpoint_format", "format", "version", "quant_method", "method", "lm_head", "pack_dtype",
        "dynamic", "meta", "provider", "modules_to_not_convert", "ignore", "config_groups",
        "kv_cache_scheme", "transform_config", "sparsity_config", "moe_sparsity_config", "targets",
        "weights", "input_activations", "num_bits", "symmetric", "strategy", "actorder", "type",
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype", "llm_int8_skip_modules",
        "llm_int8_threshold", "extra_config", "packing_format", "data_type", "backend",
        "is_marlin_format", "quantization_config", "compression_config", "text_config",
        "tie_word_embeddings", "architectures", "model_type", "modules", "dtype")  # fmt: skip
PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight", "bias", "codes", "zeros",
         "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
         "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
         "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_format")  # fmt: skip
DTYPES = (*ITEMSIZE, "F4", "F8_E8M0", "C64", "", "i32")


@cache
def goldens() -> tuple[str, ...]:
    """Return the names of the goldens that have one shard."""
    found = []
    for folder in sorted(GOLDEN.iterdir()):
        shards = [p for p in folder.glob("*.safetensors") if p.name != "reference.safetensors"]
        if len(shards) == 1 and (folder / "config.json").exists():
            found.append(folder.name)
    return tuple(found)


@cache
def draft_of(name: str) -> Draft:
    """Return a golden, not to be changed."""
    return Draft.of(name)


@cache
def _said() -> dict[str, list[Any]]:
    """Return what the goldens' configs say, by key."""
    found: dict[str, list[Any]] = {}
    for name in goldens():
        for box, key in _places(draft_of(name).config):
            if isinstance(key, str):
                found.setdefault(key, []).append(box[key])
    return found


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over every place of a JSON tree: a container, and a key or index."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


# Changes ------------------------------------------------------------------------------------------


def _value(rng: random.Random, key: object = None) -> Any:
    """Draw a JSON value, often one that another golden has at this key."""
    if key in _said() and rng.random() < 0.4:
        return deepcopy(rng.choice(_said()[str(key)]))
    match rng.randrange(8):
        case 0 | 1:
            return rng.choice(NUMBERS)
        case 2 | 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice((None, True, False))
        case 5:
            return [_value(rng) for _ in range(rng.randrange(3))]
        case 6:
            return {rng.choice((*KEYS, *TEXTS)): _value(rng) for _ in range(rng.randrange(3))}
    deep: Any = rng.choice(NUMBERS)
    for _ in range(rng.choice((3, 90, 150, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """Change some bytes."""
    raw = bytearray(data)
    at = rng.randrange(len(raw)) if raw else 0
    match rng.randrange(6):
        case 0:
            del raw[at:]
        case 1:
            raw[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        case 2:
            raw[at : at + rng.choice((1, 8, 100))] = b""
        case 3:
            raw[at:at] = raw[at : at + 40]
        case _:
            for _ in range(rng.choice((1, 3, 20))):
                if raw:
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


Change = Callable[[random.Random, Draft], None]
"""Changes a draft; what it does to bytes on the disk is done by `Late`."""
Late = Callable[[random.Random, Path], None]


def _config(rng: random.Random, draft: Draft) -> None:
    """Change a value, a key, or the place of a key in the configs."""
    block = draft.config.get("quantization_config")
    tree = rng.choice([draft.config, draft.side or block, block, block]) or draft.config
    places = list(_places(tree)) if isinstance(tree, dict | list) else []
    if not places:
        return
    box, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del box[key]
        case 1 if isinstance(box, dict):
            box[rng.choice(KEYS)] = box.pop(key)
        case 2 if isinstance(box, dict):
            new = rng.choice(KEYS)
            box[new] = _value(rng, new)
        case _:
            box[key] = _value(rng, key)


def _swap_block(rng: random.Random, draft: Draft) -> None:
    """Take the quantization config of another golden, whole or in part."""
    other = draft_of(rng.choice(goldens())).config.get("quantization_config")
    if other is None:
        return
    mine = draft.config.get("quantization_config")
    if rng.random() < 0.5 and isinstance(mine, dict):
        mine.update(deepcopy(other))
    else:
        draft.config["quantization_config"] = deepcopy(other)
    if rng.random() < 0.5:
        draft.side = None


def _names(rng: random.Random, draft: Draft) -> None:
    """Drop, rename or repeat tensors."""
    name = rng.choice(list(draft.tensors))
    stem, _, part = name.rpartition(".")
    match rng.randrange(5):
        case 0:
            del draft.tensors[name]
        case 1:
            draft.tensors[f"{stem}.{rng.choice(PARTS)}"] = draft.tensors.pop(name)
        case 2:
            draft.tensors[f"{stem}.{rng.choice(PARTS)}"] = draft.tensors[name]
        case 3:
            for other in [n for n in draft.tensors if n.endswith(f".{part}")]:
                del draft.tensors[other]
        case _:
            text = rng.choice(TEXTS).encode(errors="ignore").decode()
            draft.tensors[f"{text}.{part}"] = draft.tensors.pop(name)


def _shapes(rng: random.Random, draft: Draft) -> None:
    """Give a tensor another shape or dtype, with data that fits."""
    name = rng.choice(list(draft.tensors))
    stored = draft.tensors[name]
    dtype, shape = stored.dtype, list(stored.shape)
    match rng.randrange(5):
        case 0:
            shape = shape[::-1]
        case 1:
            shape = rng.choice(([], [0], [1], [*shape, 1], [1, *shape], [0, 1 << 40], [0, 1 << 62]))
        case 2 if shape:
            at = rng.randrange(len(shape))
            shape[at] = max(0, rng.choice((shape[at] - 1, shape[at] + 1, shape[at] * 2, 1, 0)))
        case 3 if shape:
            at = rng.randrange(len(shape))
            shape[at] = rng.choice((shape[at] // 2, shape[at] // 8, shape[at] * 8))
        case _:
            dtype = rng.choice(list(ITEMSIZE))
    size = ITEMSIZE[dtype]
    for length in shape:
        size *= length
    if size > 1 << 24:
        return
    data = (stored.data * (size // max(1, len(stored.data)) + 1))[:size].ljust(size, b"\0")
    draft.tensors[name] = Stored(dtype, shape, data)


def _numbers(rng: random.Random, draft: Draft) -> None:
    """Change the content of a tensor, rather one that decides than codes."""
    dull = ("qweight", "weight", "weight_packed", "codes")
    names = [n for n in draft.tensors if n.rpartition(".")[2] not in dull] or list(draft.tensors)
    name = rng.choice(names)
    stored = draft.tensors[name]
    raw = bytearray(stored.data)
    if not raw:
        return
    width = min(ITEMSIZE.get(stored.dtype, 1), len(raw))
    one = {
        0: b"\0" * width,
        1: b"\xff" * width,
        2: b"\0" * (width - 1) + b"\x7f",
        3: struct.pack("<d", float("nan"))[-width:] if width == 8 else b"\xff\x7f"[-width:] * 9,
        4: rng.randbytes(width),
        5: struct.pack("<f", float("-inf"))[-width:] if width <= 4 else b"\x80" * width,
    }[rng.randrange(6)][:width].rjust(width, b"\0")
    if rng.random() < 0.3:
        raw = bytearray(one * (len(raw) // width + 1))[: len(raw)]
    else:
        for _ in range(rng.choice((1, 1, 4, 40))):
            at = rng.randrange(len(raw) // width) * width
            raw[at : at + width] = one
    draft.tensors[name] = Stored(stored.dtype, stored.shape, bytes(raw))


def _lie(rng: random.Random, draft: Draft, folder: Path) -> None:
    """Lie in the header, over data that stays."""
    lies, data = header_of(draft.tensors)
    name = rng.choice(list(lies))
    entry = lies[name]
    match rng.randrange(8):
        case 0:
            lies[name] = _value(rng)
        case 1:
            del lies[name]
        case 2 | 3:
            key = rng.choice(("dtype", "shape", "data_offsets", "more"))
            entry[key] = rng.choice(DTYPES) if key == "dtype" else _value(rng)
        case 4 if name != "__metadata__":
            key = rng.choice(("shape", "data_offsets"))
            values = list(entry[key]) or [0]
            values[rng.randrange(len(values))] = rng.choice(NUMBERS)
            entry[key] = values
        case 5:
            other = rng.choice(list(lies))
            lies[name], lies[other] = lies[other], lies[name]
        case 6:
            lies[rng.choice(TEXTS)] = deepcopy(entry)
        case _:
            lies["__metadata__"] = _value(rng)
    raw = json.dumps(lies).encode()
    if rng.random() < 0.3:
        raw = _bytes(rng, raw)
    (folder / SHARD).write_bytes(shard_bytes(raw, data))


def _bend(rng: random.Random, draft: Draft, folder: Path) -> None:
    """Change bytes of a file that was written."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    raw = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        head = raw[: 8 + struct.unpack("<Q", raw[:8])[0]]
        path.write_bytes(_bytes(rng, head) + raw[len(head) :])
    else:
        path.write_bytes(_bytes(rng, raw))


def _index(rng: random.Random, draft: Draft, folder: Path) -> None:
    """Cut the checkpoint into shards, and lie in the index."""
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    weights: dict[str, Any] = dict(draft.save_sharded(folder, min(3, len(draft.tensors))))
    name = rng.choice(list(weights))
    match rng.randrange(6):
        case 0:
            weights[name] = _value(rng)
        case 1:
            weights[name] = rng.choice(TEXTS)
        case 2:
            del weights[name]
        case 3:
            weights[rng.choice(TEXTS)] = weights[name]
        case 4:
            weights[name] = rng.choice(list(weights.values()))
    write_index(folder, _value(rng) if rng.random() < 0.1 else weights)
    if rng.random() < 0.2:
        _bend(rng, draft, folder)


CHANGES: tuple[Change, ...] = (
    _config, _config, _config, _swap_block, _names, _shapes, _numbers, _numbers
)  # fmt: skip
LATE = (None, None, None, None, _lie, _bend, _index)

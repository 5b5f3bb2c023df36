"""Judging quantization configs alone: no tensor is at hand, so nothing may be left open.

With tensors, headers decide and a config is compared with them. Alone, a config must name its
layout, bits and group size, and hold no key that nobody knows: it could change what the weights
mean. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from . import formats
from .claim import Claim
from .errors import QplugError, Unsupported
from .format import Block, Format
from .places import Place, merged, of_model_config
from .scheme import Kind

SIDE_METHODS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""What an old side file that names no method is, by its name."""

METHODS = ("gptq", "awq", "auto-round", "compressed-tensors", "bitsandbytes")
"""Values of `quant_method` that one may have meant."""

LAYOUT_KEYS = frozenset(
    {
        "quant_method", "method", "bits", "w_bit", "wbits", "weight_bits", "group_size",
        "q_group_size", "groupsize", "sym", "zero_point", "desc_act", "actorder",
        "checkpoint_format", "format", "version", "is_marlin_format", "pack_dtype",
        "packing_format", "data_type", "act_bits", "rotation_config", "super_bits",
        "super_group_size", "backend", "load_in_4bit", "load_in_8bit", "_load_in_4bit",
        "_load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage", "llm_int8_has_fp16_weight", "config_groups", "kv_cache_scheme",
        "sparsity_config", "moe_sparsity_config", "transform_config", "modules",
    }
)  # fmt: skip
"""Keys that say how numbers are stored."""
MODULE_KEYS = frozenset(
    {
        "dynamic", "modules_to_not_convert", "modules_in_block_to_quantize",
        "llm_int8_skip_modules", "ignore", "extra_config", "block_name_to_quantize",
        "to_quant_block_names", "quant_block_list", "lm_head",
    }
)  # fmt: skip
"""Keys that say which modules are quantized."""
RUN_TIME_KEYS = frozenset(
    {
        "bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload",
        "exllama_config", "use_exllama", "disable_exllama", "do_fuse", "modules_to_fuse",
        "fuse_max_seq_len", "max_input_length", "use_cuda_fp16",
    }
)  # fmt: skip
"""Keys that tell a loader what to do."""
ORIGIN_KEYS = frozenset(
    {
        "meta", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups",
        "act_group_aware", "hyb_act", "mse", "pack_impl", "model_name_or_path",
        "model_file_base_name", "batch_size", "dataset", "tokenizer", "nsamples", "seqlen",
        "iters", "lr", "minmax_lr", "amp", "low_gpu_mem_usage", "gradient_accumulate_steps",
        "scale_dtype", "autoround_version", "model_free", "observer", "observer_kwargs",
        "global_compression_ratio", "quantization_status", "provider", "producer", "model_seqlen",
        "cache_block_outputs", "module_name_preceding_first_block", "quant_type", "pad_token_id",
    }
)  # fmt: skip
"""Keys that say where a file comes from, and how it was made."""
ORIGIN_PREFIXES = ("enable_",)
KNOWN_KEYS = LAYOUT_KEYS | MODULE_KEYS | RUN_TIME_KEYS | ORIGIN_KEYS

_FOREIGN = {
    "per_model_config": "an ONNX export",
    "ignored_scope": "OpenVINO",
    "quant_algo": "ModelOpt",
    "quantization": "ModelOpt",
}
"""Keys of other projects' files that lie under the same names."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What configs say: the format, its claim, the block and where it was, and what is odd."""

    format: Format
    claim: Claim
    block: Block
    where: str
    notes: tuple[str, ...]


def judge(files: Mapping[str, Any]) -> Judgement:
    """Judge one config, or several of one checkpoint, by file name; values as JSON gave them.

    Raises
    ------
    QplugError
        If something is missing, unknown, of a wrong type or contradictory: the reason to look at
        the tensors, or to leave the file to another tool.
    """
    places = [place for name, value in files.items() for place in _places(name, value)]
    block, where, notes = merged(places)
    if block is None:
        raise QplugError(
            "no quantization_config", next(iter(files)), "one", "the model is not quantized"
        )
    named = _named(block, where)
    found = _format(named, where)
    known = KNOWN_KEYS | found.keys
    unknown = [k for k in block if k not in known and not k.startswith(ORIGIN_PREFIXES)]
    if unknown:
        raise QplugError(
            f"unknown keys {', '.join(map(repr, unknown))}",
            where,
            "keys whose meaning is known",
            "they may change what the weights mean: inspect the tensors",
        )
    assert found.parse is not None
    claim = found.parse(named)
    if claim.base.group_size is None and _needs_group_size(found, block):
        raise QplugError(
            "no such key", "quantization_config.group_size", "a number", "inspect the tensors too"
        )
    return Judgement(found, claim, block, where, (*notes, *_notes(claim)))


def _places(name: str, value: Any) -> list[Place]:
    """Return the blocks of one file, which may be a whole config.json or a block alone."""
    if not isinstance(value, dict):
        raise QplugError(f"{value!r}", name, "a JSON object", "correct the config")
    whole = ("quantization_config", "compression_config", "text_config", "model_type")
    if any(key in value for key in whole):
        return of_model_config(value, name)
    return [(value, name)]


def _named(block: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a block that names its method, which old side files leave to their name."""
    if block.get("quant_method") or block.get("method"):
        return block
    kind = block.get("checkpoint_format") or block.get("format")
    by_kind = "gptq" if isinstance(kind, str) and kind.lower().startswith("gptq") else None
    method = SIDE_METHODS.get(where) or by_kind
    return block if method is None else {**block, "quant_method": method}


def _format(block: Block, where: str) -> Format:
    """Find the format that claims a block.

    Raises
    ------
    Unsupported
        If none does; another project's file is called by its name.
    """
    for key, project in _FOREIGN.items():
        if key in block:
            raise Unsupported(
                f"{key!r}, as in files of {project}", where, "a layout that is read here"
            )
    for found in formats.FORMATS:
        if found.parse is not None and found.claims(block, {}):
            return found
    method = block.get("quant_method")
    near = get_close_matches(str(method), METHODS, 1) if method else []
    raise Unsupported(
        f"quant_method {method!r}" if method else "nothing that names the layout",
        where,
        f"one of {', '.join(one.name for one in formats.FORMATS if one.parse)}",
        f"did you mean {near[0]!r}?" if near else "another tool's format: leave it to that",
    )


def _needs_group_size(found: Format, block: Block) -> bool:
    """Whether linears have groups of which only a `group_size` at the top could tell."""
    affine = found.capacity is not None and found.capacity.kind in (Kind.AFFINE, Kind.OFFSET)
    return affine and "config_groups" not in block and "modules" not in block


def _notes(claim: Claim) -> list[str]:
    """Return what only tensors can decide."""
    base, block = claim.base, claim.block
    notes = []
    if base.sym is None and "sym" not in block and "zero_point" not in block:
        notes.append("sym is not said: zeros decide")
    if base.desc_act and base.group_size == -1:
        notes.append("desc_act is true, and means nothing with one group per row")
    elif base.desc_act and block.get("static_groups") is True:
        notes.append("desc_act is true beside static_groups: g_idx decides")
    elif base.desc_act:
        notes.append("desc_act is true: g_idx decides whether columns are in act order")
    return notes

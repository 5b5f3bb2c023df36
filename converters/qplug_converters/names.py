"""What tensors are called: by role, whoever named them, and as the readers of a format want them.

Two kinds of names differ between tools that mean the same tensor.

Scales of the KV cache (k_fp8 = k / k_scale; their values never change). All of these are
`<attention>.k_scale`, the name that llmcompressor writes and vLLM reads under every method:

| in the file                       | written by                              |
|-----------------------------------|-----------------------------------------|
| `self_attn.k_scale`               | llmcompressor                           |
| `self_attn.k_proj.k_scale`        | ModelOpt                                |
| `self_attn.k_proj.output_scale`   | AutoFP8, Quark, llmcompressor once      |
| `self_attn.kv_scale`, of both     | AutoFP8                                 |
| `self_attn.attn.k_scale`          | vLLM itself                             |
| `self_attn.qkv_proj.k_scale`, `self_attn.k_cache.scale`, `mixer.k_proj.k_scale` | others |

Experts of Mixtral, of which three namings are in use:

| name                                    | written by                | read by                 |
|-----------------------------------------|---------------------------|-------------------------|
| `block_sparse_moe.experts.<n>.w1`       | AutoAWQ, all dense files  | vLLM; dense: Transformers |
| `block_sparse_moe.experts.<n>.gate_proj`| llmcompressor             | vLLM                    |
| `mlp.experts.<n>.gate_proj`             | GPTQModel                 | GPTQModel, and no other |

Of every other family all tools agree on `mlp.experts.<n>.gate_proj`, and nothing is renamed. Names
above the layers (`model.language_model.`, `language_model.model.`) are carried as they are.
Read in vLLM 0.32.0 `models/mixtral.py`, `base_config.get_cache_scale_mapper`, run with GPTQModel
7.7.0. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from .errors import QplugError
from .format import Headers

ATTENTION = r"(?P<at>(?:.*\.)?(?:self_attn|attn|attention|mixer))"
_KV = tuple(
    re.compile(ATTENTION + ending)
    for ending in (
        r"\.(?P<what>[qkv])_scale$",
        r"\.(?P<proj>[qkv])_proj\.(?P<what>(?P=proj))_scale$",
        r"\.(?P<what>[qkv])_proj\.output_scale$",
        r"\.(?P<what>kv)_scale$",
        r"\.qk(?:qk)?v_proj\.(?P<what>[kv])_scale$",
        r"\.(?P<what>[kv])_cache\.scale$",
        r"\.(?P<what>q)\.scale$",
    )
)
_INSIDE = re.compile(r"(.*\.(?:self_attn|mixer))\.attn$")
_BLOCK = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+)\.(?:block_sparse_moe|mlp)\.(?P<rest>.+)")
_EXPERT = re.compile(r"experts\.(?P<number>\d+)\.(?P<leaf>\w+)(?P<part>\..+)?$")
_ROUTER = re.compile(r"gate(?P<part>\..+)?$")

ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What Mixtral's own names of an expert's linears mean."""
_OWN = {role: leaf for leaf, role in ROLES.items()}

ORIGINAL = ("block_sparse_moe", "w")
LINEARIZED = ("block_sparse_moe", "proj")
DEFUSED = ("mlp", "proj")

READS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "awq": (ORIGINAL,),
    "awq_gemv": (ORIGINAL,),
    "awq_gemv_fast": (ORIGINAL,),
    "llm_awq": (ORIGINAL,),
    "compressed-tensors": (ORIGINAL, LINEARIZED),
    "dense": (ORIGINAL,),
    "gptq": (DEFUSED,),
    "gptq_v2": (DEFUSED,),
    "gptq_p": (DEFUSED,),
    "vllm": (ORIGINAL, LINEARIZED),
}
"""Namings of Mixtral's experts that the main tool of a format reads, or vLLM whatever the format;
the first is what is written. Formats that are not listed take any."""


def kv_scales(name: str) -> tuple[str, ...]:
    """Return the names that readers take for a KV-cache scale, or nothing for another tensor.

    `self_attn.kv_scale` is the scale of both: `k_scale` and `v_scale`.
    """
    for pattern in _KV:
        if found := pattern.match(name):
            inside = _INSIDE.match(found["at"])
            at = inside[1] if inside else found["at"]
            return tuple(f"{at}.{which}_scale" for which in found["what"])
    return ()


def kv_scheme(headers: Headers) -> dict[str, Any]:
    """Return how the KV cache is quantized, as scales in the file say: float8, or not at all.

    The keys are those of compressed-tensors' `kv_cache_scheme`; empty where there are no scales.
    """
    sizes = [
        prod(spec.shape)
        for name, spec in headers.items()
        if any(scale.endswith((".k_scale", ".v_scale")) for scale in kv_scales(name))
    ]
    if not sizes:
        return {}
    return {
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "strategy": "attn_head" if max(sizes) > 1 else "tensor",
        "symmetric": True,
        "type": "float",
    }


def normal(name: str) -> tuple[str, ...]:
    """Return what a module or tensor is called by its role, the same for every tool.

    One name, but two for a scale of keys and values together. Two checkpoints hold the same linear
    where these are equal.
    """
    if scales := kv_scales(name):
        return scales
    return (_spell(name, DEFUSED),)


def renames(
    names: Iterable[str], model_type: str | None, target: str
) -> dict[str, tuple[str, ...]]:
    """Return the new names of those modules and tensors that readers of the target call otherwise.

    Parameters
    ----------
    names
        Modules or tensors of the source, all that will stand beside one another.
    model_type
        That of config.json, or of its `text_config`.
    target
        Name of the format that is written; `vllm` for what that engine reads under any method.

    Raises
    ------
    QplugError
        If two of them would bear one name.
    """
    names = list(names)
    taken_as = READS.get(target, ()) if model_type == "mixtral" else ()
    changed: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for name in names:
        new = kv_scales(name) or (name,)
        if taken_as and name not in (_spell(name, naming) for naming in taken_as):
            new = (_spell(name, taken_as[0]),)
        if new != (name,):
            changed[name] = new
        for one in new:
            if one in owner:
                raise QplugError(
                    f"{owner[one]} and {name}",
                    one,
                    "one tensor that readers take under this name",
                    "remove the one that is not meant",
                )
            owner[one] = name
    return changed


def _spell(name: str, naming: tuple[str, str]) -> str:
    """Spell the name of an expert, or of a router, in one of Mixtral's namings."""
    block, leaves = naming
    found = _BLOCK.match(name)
    if found is None:
        return name
    if router := _ROUTER.match(found["rest"]):
        return f"{found['layer']}.{block}.gate{router['part'] or ''}"
    expert = _EXPERT.match(found["rest"])
    if expert is None:
        return name
    role = ROLES.get(expert["leaf"], expert["leaf"])
    leaf = _OWN.get(role, role) if leaves == "w" else role
    return f"{found['layer']}.{block}.experts.{expert['number']}.{leaf}{expert['part'] or ''}"

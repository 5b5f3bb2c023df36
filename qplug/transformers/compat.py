"""All that differs between versions of Transformers, and what its stock backends need."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

NEEDS: dict[str, dict[str, str]] = {
    "gptq": {"optimum": "1.24.0", "gptqmodel": "1.4.3"},
    "awq": {"gptqmodel": "1.4.3", "accelerate": "1.1.0"},
    "bitsandbytes": {"bitsandbytes": "0.46.1", "accelerate": "1.1.0"},
    "compressed-tensors": {"compressed_tensors": "0.15.0"},
    "auto-round": {"auto_round": "0.5.0"},
}
"""Package and oldest version that the stock quantizer of a method takes.

transformers/quantizers/quantizer_gptq.py, quantizer_awq.py; utils/import_utils.py for the others.
"""


def stock_lacks(method: str) -> str | None:
    """Return why the stock backend of `method` is unusable, or `None`.

    Looks at metadata only: importing a backend takes seconds and may fail in its own way.
    """
    from packaging.version import InvalidVersion, Version

    for package, oldest in NEEDS.get(method, {}).items():
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        try:
            found = metadata.version(package)
            if Version(found) < Version(oldest):
                return f"{package} {found} is older than {oldest}"
        except (metadata.PackageNotFoundError, InvalidVersion):
            return f"{package} has no usable metadata"
    return None


def renamings_of(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the converters that the loader applies to a checkpoint's names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    found = get_model_conversion_mapping(model)
    return (
        [entry for entry in found if isinstance(entry, WeightRenaming)],
        [entry for entry in found if isinstance(entry, WeightConverter)],
    )


def loader_name(
    key: str, renamings: list[Any], converters: list[Any], prefix: str | None, known: Any
) -> tuple[str, str | None]:
    """Return what the loader calls the checkpoint's `key`, and the converter pattern it matched.

    `known` maps every name of the model to something that is not `None`.
    """
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(key, renamings, converters, prefix, known)
    if name not in known and key in known:
        return rename_source_key(key, [], [], prefix, known)  # type: ignore[no-any-return]
    return name, pattern


def tied_names(model: Any) -> set[str]:
    """Return the names of the parameters that share another one's storage."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def is_conv1d(module: Any) -> bool:
    """Whether this is GPT-2's linear, whose weight lies transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def conv1d(out_features: int, in_features: int) -> Any:
    """Return GPT-2's linear with a bias, without weights."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(out_features, in_features)

"""Config objects that keep a file's block as it is.

Stock classes drop keys that they do not know (`dynamic` among them: the layout's own description)
and add sixteen of their own. Nothing here imports torch or the formats.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Self

from transformers.utils.quantization_config import QuantizationConfigMixin


class Verbatim:
    """A config block kept as read; `to_dict` gives it back key by key."""

    block: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the block as the file has it."""
        return copy.deepcopy(self.block)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: nothing is left out as a default."""
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def verbatim_class(stock: Any, wanted: Callable[[], bool]) -> Any:
    """Return a subclass of a stock config class whose instances are `Verbatim`.

    It bears the stock class's name, which Transformers compares with that of a user's argument.
    Where `wanted` says no, `from_dict` makes a plain stock config: the stock quantizer sees what
    it always saw.
    """

    def from_dict(
        cls: Any, /, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        if not wanted():
            return stock.from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = _blank(cls)
        config.block = copy.deepcopy(dict(config_dict))
        for key, value in config.block.items():
            if key != "quant_method" and hasattr(config, key):
                setattr(config, key, copy.deepcopy(value))
        for key in [key for key in kwargs if hasattr(config, key)]:
            setattr(config, key, kwargs.pop(key))
        return (config, kwargs) if return_unused_kwargs else config

    # Whoever constructs the class that the mapping holds gets a stock config in all but name.
    def to_dict(self: Any) -> dict[str, Any]:
        if "block" in self.__dict__:
            return Verbatim.to_dict(self)
        found: dict[str, Any] = stock.to_dict(self)
        return found

    if stock.__name__ in _MADE and _MADE[stock.__name__].__bases__[1] is stock:
        return _MADE[stock.__name__]  # one class stands for both methods of bitsandbytes
    made = type(
        stock.__name__,
        (Verbatim, stock),
        {
            "__doc__": stock.__doc__,
            "__module__": __name__,
            "from_dict": classmethod(from_dict),
            "to_dict": to_dict,
        },
    )
    _MADE[stock.__name__] = made
    return made


def _blank(cls: Any) -> Any:
    """Return a config with the stock defaults.

    The constructor judges values, and may look for packages, while here that is the format's task,
    which names the tensor and what to do.
    """
    if cls.__name__ == "CompressedTensorsConfig":  # whose constructor imports the package
        config = cls.__new__(cls)
        config.quant_method, config.quantization_config = "compressed-tensors", None
        return config
    return cls() if cls.__name__ == "BitsAndBytesConfig" else cls(bits=4)


_MADE: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    """Give pickle the classes by name; in a new process Transformers' import makes them first."""
    if name.endswith("Config"):
        importlib.import_module("transformers.quantizers.auto")
        if name in _MADE:
            return _MADE[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CanonicalConfig(Verbatim, QuantizationConfigMixin):
    """The config of a checkpoint in qplug's own form, which Transformers does not load."""

    def __init__(self, **block: Any) -> None:
        self.quant_method = block.get("quant_method", "qplug")
        self.block = copy.deepcopy(block)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Keep the block."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

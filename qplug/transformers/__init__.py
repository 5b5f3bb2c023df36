"""The door to Transformers: `from_pretrained` of quantized checkpoints with nothing else installed.

`register` is called by the import hook of `qplug._autoload`. Stock backends that are installed and
recent enough are left alone; `use` prefers qplug over them. Importing this package is cheap:
whatever needs torch waits for the first quantized model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from .. import _autoload
from . import compat

__all__ = ["register", "restore", "use"]

METHODS = {
    "gptq": ("gptq",),
    "awq": ("awq",),
    "bitsandbytes": ("bitsandbytes_4bit", "bitsandbytes_8bit"),
    "compressed-tensors": ("compressed-tensors",),
    "auto-round": ("auto-round",),
}
"""The methods whose stock quantizer is replaced where it would refuse, by Transformers' names."""

SPELLINGS = {
    "bitsandbytes": "bitsandbytes_4bit",
    "inc": "auto-round",
    "intel/auto-round": "auto-round",
}
"""What some files call a method, and what Transformers has of it. It takes a model whose
`quant_method` it does not know for unquantized, and invents its weights."""

_preferred: set[str] = set()
_stock: dict[str, tuple[Any, Any]] = {}
_added: dict[str, tuple[Any, Any]] = {}
_module: ModuleType | None = None


def register(module: ModuleType) -> None:
    """Put qplug into the two mappings of `transformers.quantizers.auto`.

    Parameters
    ----------
    module
        That module, executed.
    """
    from .configs import CanonicalConfig, verbatim_class

    global _module
    if _module is module:
        return
    quantizers = module.AUTO_QUANTIZER_MAPPING
    configs = module.AUTO_QUANTIZATION_CONFIG_MAPPING
    found = {
        name: (quantizers[name], configs[name]) for names in METHODS.values() for name in names
    }
    made = {
        name: (_factory(found[name][0]), verbatim_class(found[name][1], lambda m=method: takes(m)))  # type: ignore[misc]
        for method, names in METHODS.items()
        for name in names
    }
    _added.update(
        {name: made[known] for name, known in SPELLINGS.items() if name not in quantizers}
    )
    # `qplug` is no method of Transformers either.
    _added["qplug"] = (_factory(None), CanonicalConfig)
    made.update(_added)
    _module = module
    _stock.update(found)
    for method, (factory, config) in made.items():
        quantizers[method], configs[method] = factory, config


def restore() -> None:
    """Take the registration back: Transformers is as it was, with the same objects."""
    global _module
    _autoload.uninstall()
    if _module is None:
        return
    quantizers = _module.AUTO_QUANTIZER_MAPPING
    configs = _module.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method, (quantizer, config) in _stock.items():
        quantizers[method], configs[method] = quantizer, config
    for method in _added:
        quantizers.pop(method, None)
        configs.pop(method, None)
    _stock.clear()
    _added.clear()
    _module = None


def takes(method: str) -> bool:
    """Whether qplug loads checkpoints of `method`: asked to, or the stock backend is unusable."""
    return method in _preferred or compat.stock_lacks(method) is not None


class use:
    """Load checkpoints of these methods through qplug even where the stock backend is installed.

    In effect at once; as a context manager, until its end.

    Parameters
    ----------
    methods
        Of `METHODS`; none means all.

    Raises
    ------
    QplugError
        If a method is not one of them.
    """

    def __init__(self, *methods: str) -> None:
        for method in methods:
            if method not in METHODS:
                from qplug_converters.errors import QplugError

                raise QplugError(
                    f"no method {method!r}", "qplug.use", f"one of {', '.join(METHODS)}"
                )
        self._before = set(_preferred)
        _preferred.update(methods or METHODS)
        _autoload.install(force=True)

    def __enter__(self) -> use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _preferred.clear()
        _preferred.update(self._before)


def _factory(stock: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return what the quantizer mapping holds: the config's class says who loads it."""

    def quantizer(config: Any, **kwargs: Any) -> Any:
        if stock is not None and "block" not in vars(config):  # not one of `configs`
            return stock(config, **kwargs)
        from .quantizer import QplugQuantizer

        return QplugQuantizer(config, **kwargs)

    return quantizer

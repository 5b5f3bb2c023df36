"""qplug: quantized checkpoints from one layout to another, proven, and served.

Importing this package imports neither torch, Transformers nor NumPy: torch's own import loads it
in every process of the environment (`_autoload`).
"""

from __future__ import annotations

from . import _autoload

TYPE_CHECKING = False  # importing `typing` would take six times as long as all of this
if TYPE_CHECKING:
    from typing import Any

    from qplug_converters.version import __version__

    from .transformers import restore, use

__all__ = ["__version__", "restore", "use"]

_autoload.install()


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name == "__version__":
        from qplug_converters.version import __version__

        return __version__
    if name in ("use", "restore"):
        from . import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

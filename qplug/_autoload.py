"""Make Transformers find qplug by installation alone: the entry point `torch.backends`.

torch calls `install` at the end of its own import, in every process of the environment, and dies
if it raises (docs/adr/0001). So nothing here raises, and nothing is imported: what is installed is
an import hook that waits for `transformers.quantizers.auto`. Registering at once is not possible,
for that module may be half imported at that moment: it may be what imports torch.

`QPLUG_AUTOLOAD=0` switches it off; torch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0` as well, until
`import qplug`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing `typing` would take six times as long as all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

TARGET = "transformers.quantizers.auto"

state = "not installed"
"""`not installed`, `off`, `waiting`, `registered` or `failed`; `qplug doctor` prints it."""
error: Exception | None = None
"""Why the state is `failed`."""


def install(*, force: bool = False) -> None:
    """Register with Transformers as soon as it is there; never raises.

    Parameters
    ----------
    force
        Register even under `QPLUG_AUTOLOAD=0`: someone asked.
    """
    global state
    try:
        if state == "registered" or (state == "failed" and not force):
            return
        if state == "waiting" and not _complete():
            return
        if not force and os.environ.get("QPLUG_AUTOLOAD", "").lower() in ("0", "false", "off"):
            state = "off"
        elif _complete():
            _register(sys.modules[TARGET])
        else:
            sys.meta_path.insert(0, _HOOK)
            state = "waiting"
    except Exception as problem:
        _failed(problem)


def uninstall() -> None:
    """Stop waiting; what was registered is taken back by `qplug.restore`."""
    global state
    _HOOK.remove()
    state = "not installed"


def _complete() -> bool:
    module = sys.modules.get(TARGET)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _Hook:
    """A finder that finds nothing of its own: it sees the import of `TARGET` go by."""

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            if name == TARGET:
                self.remove()
                return self._watched(name, path, target)
            if _complete():
                _register(sys.modules[TARGET])
        except Exception as problem:
            _failed(problem)
        return None

    @staticmethod
    def _watched(
        name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """Return the real spec with a loader that registers after executing the module."""
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            try:
                _register(module)
            except Exception as problem:
                _failed(problem)

        loader.exec_module = then_register
        return spec


_HOOK = _Hook()


def _register(module: ModuleType) -> None:
    global state, error
    _HOOK.remove()
    from . import transformers

    try:
        transformers.register(module)
    except Exception as problem:
        _failed(problem)
        _say_at_first_load(module)
        return
    state, error = "registered", None


def _failed(problem: Exception) -> None:
    global state, error
    _HOOK.remove()
    state, error = "failed", problem


def _say_at_first_load(module: ModuleType) -> None:
    """Log the failure when a quantized model is loaded for the first time, not before.

    Transformers runs in many processes that have nothing to do with quantization.
    """
    stock = getattr(module, "get_hf_quantizer", None)
    if not callable(stock):
        return
    said = False

    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal said
        if not said and getattr(config, "quantization_config", None) is not None:
            said = True
            import logging

            logging.getLogger("qplug").warning(
                "qplug could not register with Transformers and does nothing: %r", error
            )
        return stock(config, *args, **kwargs)

    module.get_hf_quantizer = get_hf_quantizer  # type: ignore[attr-defined]

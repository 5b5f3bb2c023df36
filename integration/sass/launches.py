"""What launchers ask Triton for, recorded where there is no GPU.

A launcher is called with tensors of the meta device under a driver that knows the name of a card;
Triton derives types, constants and hints from the arguments as it does on a GPU, and tells its hook
what it would compile. So what is checked is what is launched: nothing is written down twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation of a kernel.

    Attributes
    ----------
    name
        Of a row of the table, e.g. `int4 g128 fp16 m16`.
    kernel
        What `triton.jit` made.
    types
        Of the arguments by name, `constexpr` among them.
    constants, hints
        Values, and attributes such as divisibility by 16, by place among the arguments.
    options
        `num_warps`, `num_stages` and all others.
    facts
        What of it goes into the table: as JSON has it.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    hints: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    facts: dict[str, object]

    @property
    def source(self) -> ASTSource:
        """What `triton.compile` takes."""
        return ASTSource(self.kernel, self.types, self.constants, self.hints)

    def constant(self, name: str) -> Any:
        """Return the value of a compile-time argument."""
        return self.constants[(self.kernel.arg_names.index(name),)]

    def changed(self, **options: object) -> Build:
        """Return it with other options."""
        return replace(self, options={**self.options, **options})


def target_of(arch: str) -> GPUTarget:
    """Return what Triton calls `sm_90` or `gfx942`."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


class _Driver:
    """As much of a driver as a launch asks before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return target_of(self.arch)

    def get_current_device(self) -> str:
        return self.arch  # each function keeps what it knows of a device under this

    def get_current_stream(self, _device: str) -> int:
        return 0


def record(arch: str, launch: Callable[[], object]) -> list[Build]:
    """Return what `launch()` would compile for a card, without names and facts."""
    found: list[Build] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        (hints,) = compile["configs"]
        found.append(
            Build(
                "", fn.jit_function, compile["signature"], compile["constants"], hints, options, {}
            )
        )
        return True  # so nothing is compiled or launched

    driver.set_active(_Driver(arch))
    knobs.runtime.jit_cache_hook = hook
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = None
    return found

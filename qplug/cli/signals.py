"""Ctrl-C and SIGTERM: one clean way out, which a second one cannot cut short."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """What an interrupted command left behind, in words."""


class Signals:
    """Turns the first SIGINT or SIGTERM into a `KeyboardInterrupt`, and ignores what follows.

    A second one would end the clean-up: partial folders would stay, and torch's threads would
    meet a process that is half gone. A signal that is ignored already stays so (`nohup`).

    Attributes
    ----------
    met : int
        The number of the signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.met = 0
        self._before: dict[signal.Signals, object] = {}

    def watch(self) -> None:
        """Begin to listen; does nothing outside the main thread, where Python forbids it."""
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                with contextlib.suppress(ValueError):
                    self._before[number] = signal.signal(number, self._stop)

    def forget(self) -> None:
        """Put back the handlers from before, unless a signal ended the command."""
        if not self.met:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def ignore(self) -> None:
        """Let no signal cut short what follows, for the rest of the process."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.ignore()
        self.met = number
        raise KeyboardInterrupt


@contextlib.contextmanager
def leaving(target: Path | None, remark: str = "", work: Path | None = None) -> Iterator[None]:
    """Say of an interrupt in the body what it left: `target`, complete, or `work`, or nothing.

    `target` did not exist before the body, and appears only when complete.
    """
    try:
        yield
    except KeyboardInterrupt:
        if target is not None and os.path.lexists(target):
            raise Interrupted(f"{target} is complete{remark}") from None
        if work is not None and work.exists():
            kept = f"what is finished stays in {work}, and the same command goes on"
            raise Interrupted(kept) from None
        raise Interrupted("nothing was left behind") from None

"""Run one long command of the set-up: its last line as progress, its time, its output if it fails.

Standard library only: it runs before anything is installed.

Usage: python3 step.py LOG TITLE COMMAND...
"""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path


def last_line(log: Path) -> str:
    """Return the last line that the command has written so far."""
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 2000))
        lines = f.read().decode(errors="replace").splitlines()
    telling = (line.strip() for line in reversed(lines) if not line.startswith("WARNING"))
    return next(filter(None, telling), "")


def watch(log: Path, done: threading.Event) -> None:
    """Show how it goes: one line that changes on a terminal, else a new line every 20 s."""
    start = time.monotonic()
    terminal = sys.stderr.isatty()
    while not done.wait(1 if terminal else 20):
        text = f"   {time.monotonic() - start:4.0f} s  {last_line(log)}"
        text = text[: shutil.get_terminal_size().columns - 1]
        print(
            f"\x1b[2K{text}" if terminal else text, end="\r" if terminal else "\n", file=sys.stderr
        )
        sys.stderr.flush()
    if terminal:
        print("\x1b[2K", end="\r", file=sys.stderr, flush=True)


def main() -> int:
    log, title, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    print(f"== {title}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    done = threading.Event()
    with log.open("wb") as out:
        thread = threading.Thread(target=watch, args=(log, done), daemon=True)
        thread.start()
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
            ).returncode
        finally:
            done.set()
            thread.join()
    if code != 0:
        tail = log.read_text(errors="replace").splitlines()[-40:]
        print("\n".join(tail), file=sys.stderr)
        print(f"error: {command[0]} ended with code {code}; all of it: {log}", file=sys.stderr)
        return 1
    print(f"   {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

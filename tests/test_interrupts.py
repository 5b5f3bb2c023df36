"""Ctrl-C and SIGTERM at any moment: a clean way out that says what it left."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import GOLDEN, Command, dense

SYM = GOLDEN / "gptq-4b-sym-g128"

SLOW = """
import signal, sys, time
from pathlib import Path
import qplug_converters.execute as execute, qplug_converters.job as job
import qplug_converters.verify as verify
import qplug_converters.writer as writer
from qplug.cli import main

def wait(*arguments, **more):
    print("ready", flush=True)
    time.sleep(30)

where = sys.argv.pop(1)
if where == "convert":
    job.Conversion = wait
elif where == "verify":
    verify.verify = wait
discard = writer.Writer._discard
def slow(self):
    print("cleaning", flush=True)
    time.sleep(0.5)
    discard(self)
if where == "convert":
    writer.Writer._discard = slow
    execute.workers = __import__("contextlib").contextmanager(lambda: (yield Inline()))
class Inline:
    def map(self, function, items):
        return (function(item) for item in items)
signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["convert", "quantize", "verify"])
def test_interrupts(command: str, number: int, code: int, tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    arguments = ["convert", SYM, target, "--to", "gptq_v2", "--verify"]
    if command == "quantize":
        source = dense().save(tmp_path / "dense")
        arguments = ["quantize", source, target, "--to", "gptq", "--group-size", "32"]
    where = "verify" if command == "verify" else "convert"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, where, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert any(line == "ready\n" for line in child.stdout)
        child.send_signal(number)
        if where == "convert":
            assert "cleaning\n" in child.stdout
            for again in (signal.SIGINT, signal.SIGTERM):
                child.send_signal(again)
        _, said = child.communicate(timeout=60)
    assert child.returncode == code
    last = said.splitlines()[-1]
    if where == "verify":
        assert f"wrote {target} in" in said
        assert last == f"warning: interrupted; {target} is complete but not verified"
        assert (target / "config.json").exists()
    else:
        assert last == "warning: interrupted; nothing was left behind"
        assert not target.parent.exists()
    assert "Traceback" not in said


def test_handlers_are_put_back(qplug: Command) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    qplug("formats")
    qplug("inspect", "/nowhere")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

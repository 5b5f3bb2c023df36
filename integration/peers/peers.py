"""Other quantization tools, an environment each: what they need and how they are asked.

    python integration/peers/peers.py [NAME...]     make the environments, all unless named

An environment is a folder below build/peers with the tool and what it needs besides, in front of
the packages of the environment that makes it: torch is there once. qplug is not in it (nothing
there reads this environment's `.pth` files, which is how qplug is installed), and torch loads no
backends by itself.

The tools exclude one another and vLLM: GPTQModel 7.7 asks for torch 2.14.1, AutoAWQ was last tested
with Transformers 4.51.3, vLLM 0.32 is bound to compressed-tensors 0.17. What a tool asks for and
does not need to read a checkpoint on a CPU is left out where `dependencies` is False.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / "build" / "peers"
SHARED = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes
    ----------
    requirements
        What pip installs with what it asks for.
    alone
        What pip installs without what it asks for: on a CPU, reading needs little of it.
    small
        Made in seconds, read in seconds: `make test` asks it too.
    """

    requirements: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    small: bool = False


GPTQMODEL = (
    "gptqmodel==7.7.0",
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "logbar==0.4.15",
    "pypcre==0.6.4",
    "threadpoolctl>=3.7",
    "tokenicer==0.0.14",
)
PEERS = {
    "compressed-tensors": Peer(("compressed-tensors==0.20.0", "transformers==5.23.0"), small=True),
    "bitsandbytes": Peer(("bitsandbytes==0.50.2",), small=True),
    "gptqmodel": Peer(alone=GPTQMODEL),
    "autoawq": Peer(("autoawq==0.2.9", "transformers==4.51.3")),
    # Its AWQ layers are GPTQModel's; without them it loads random weights and only logs it.
    "auto-round": Peer(("auto-round==0.16.1",), alone=GPTQMODEL),
}


class Unusable(Exception):
    """A tool that is not there, or that refused what it was asked; the reason in words."""


def python_of(name: str) -> Path:
    """Return the interpreter of an environment."""
    return ENVIRONMENTS / name / "bin" / "python"


def _recipe(name: str) -> str:
    """Return what an environment is made of: another one is made again."""
    return json.dumps([SHARED, sys.version, asdict(PEERS[name])])


def _stamp(name: str) -> Path:
    """Return the file that says that an environment is whole, and of what it is made."""
    return ENVIRONMENTS / name / "made.json"


def absent(name: str) -> str | None:
    """Return why a tool cannot be asked, or None."""
    stamp = _stamp(name)
    if not stamp.exists():
        return f"{name} is not installed: run `make peers`"
    if stamp.read_text() != _recipe(name):
        return f"{name} is installed otherwise than integration/peers says: run `make peers`"
    return None


def make(name: str) -> None:
    """Make one environment unless it is there.

    Raises
    ------
    Unusable
        If pip fails; the end of what it said is in the reason.
    """
    if absent(name) is None:
        print(f"   {name}: there")
        return
    start = time.monotonic()
    folder, peer = ENVIRONMENTS / name, PEERS[name]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    ask = [python_of(name), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    own = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    Path(own, "shared.pth").write_text("\n".join(SHARED) + "\n")
    install = [
        *(sys.executable, "-m", "pip", "--python", python_of(name), "install"),
        # Packages that are built as they are installed import torch.
        *("--progress-bar", "off", "--no-build-isolation", f"torch=={version('torch')}"),
    ]
    with (folder / "pip.log").open("w") as log:
        for more in (peer.requirements, ("--no-deps", *peer.alone)):
            code = subprocess.run(
                [*install, *more], stdout=log, stderr=log, check=False, env=environment()
            ).returncode
            if code != 0:
                tail = "\n".join(Path(log.name).read_text().splitlines()[-20:])
                raise Unusable(f"{tail}\n{name}: pip ended with code {code}")
    _stamp(name).write_text(_recipe(name))
    print(f"   {name}: {time.monotonic() - start:.1f} s")


def environment() -> dict[str, str]:
    """Return the variables a tool runs with."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GPTQMODEL_CPU_WORKERS": "2",  # GPTQModel 7.7 does not start on two cores without it
        "GPTQ_TORCH_TRITON_DEQUANT": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


class Asked:
    """A tool that waits in a process of its own: `with Asked(name) as tool: tool("read", folder)`.

    Its functions are those of `drivers/NAME.py`.
    """

    def __init__(self, name: str) -> None:
        reason = absent(name)
        if reason:
            raise Unusable(reason)
        self.name = name
        self._log = (ENVIRONMENTS / name / "driver.log").open("w")
        driver = HERE / "drivers" / f"{name.replace('-', '_')}.py"
        self._process = subprocess.Popen(
            [python_of(name), HERE / "drivers" / "loop.py", driver],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=environment(),
        )  # fmt: skip

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, function: str, *arguments: object) -> Any:
        """Return what a function of the driver returns, as JSON has it.

        Raises
        ------
        Unusable
            If the tool raises, or ends; the reason is what it said.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = json.dumps([function, *map(str, arguments)])
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Unusable(f"{self.name} ended: {Path(self._log.name).read_text()[-2000:]}")
        found = json.loads(answer)
        if "error" in found:
            raise Unusable(f"{self.name}: {found['error']}")
        return found["value"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


def compressed_tensors_from_awq(source: Path, target: Path) -> float | None:
    """Return the seconds in which compressed-tensors itself makes `target` of an AWQ folder.

    None where its environment is absent. For benchmarks: starting Python is not counted.
    """
    if absent("compressed-tensors"):
        return None
    with Asked("compressed-tensors") as tool:
        return float(tool("from_awq", source, target))


def main() -> int:
    """Make environments; say which and how long it took."""
    parser = argparse.ArgumentParser(description="Make the environments of other tools.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--small", action="store_true", help="those that `make test` asks")
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"no tool {', '.join(sorted(unknown))}: {', '.join(PEERS)}")
    names = options.names or [n for n, peer in PEERS.items() if peer.small or not options.small]
    for name in names:
        try:
            make(name)
        except Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

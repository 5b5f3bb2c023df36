"""The main job of qplug on a real model, in one run; `make demo` calls it.

SmolLM2-135M-Instruct is quantized to a GPTQ checkpoint, converted to AWQ layout with a proof that
nothing changed, served by vLLM through qplug and asked one question over the OpenAI chat API.
Everything runs through the commands that a user would type, and every command is printed.

Usage: VENV/bin/python demo.py
"""

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DENSE = ROOT / "build" / "models" / "smollm2-dense"
WORK = ROOT / "build" / "demo"
QUESTION = "What is the capital of France?"
START_LIMIT = 400  # seconds until the server must answer; 30 alone, 100 on a busy machine
STEPS = 5


class Failed(Exception):
    """A step did not do what it should; the text says which and why."""


class Report:
    """The steps so far, with their times; prints as it goes."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print `title`, run the body, print and keep the time it took."""
        print(f"\n[{len(self.times) + 1}/{STEPS}] {title}", flush=True)
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.times.append((title, seconds))
        print(f"      {seconds:.1f} s", flush=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something long goes on: a ticking line on a terminal, else a line every 15 s."""
    terminal = sys.stderr.isatty()
    done = threading.Event()

    def tick() -> None:
        start = time.monotonic()
        while not done.wait(1 if terminal else 15):
            end = "\r" if terminal else "\n"
            print(f"      {what} … {time.monotonic() - start:.0f} s", end=end, file=sys.stderr)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if terminal:
            print("\x1b[2K\r", end="", file=sys.stderr, flush=True)


def show(command: list[str]) -> None:
    """Print `command` as a user would type it, paths relative to the root."""
    text = shlex.join(command).replace(f"{BIN}/", "").replace(f"{ROOT}/", "")
    print(f"      $ {text}", flush=True)


def run(command: list[str]) -> str:
    """Run `command`, print and return what it wrote; a terminal also sees its progress bars."""
    show(command)
    stderr = None if sys.stderr.isatty() else subprocess.STDOUT
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                print(f"      {line}", end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        name = " ".join(Path(part).name for part in command[:2])
        raise Failed(f"`{name}` ended with code {process.returncode}")
    return "".join(lines)


def cpu_flags() -> set[str]:
    """Return the feature flags of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def free_port() -> int:
    """Return a TCP port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def size(folder: Path) -> int:
    """Return the bytes of all files in `folder`."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def members(session: int) -> list[int]:
    """Return the processes of session `session`, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process that it started, kindly first; return when all are gone."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        for pid in members(server.pid):  # those that left the group, if any
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if server.poll() is not None and not members(server.pid):
                return
            time.sleep(0.1)
    raise Failed(f"processes of the server are still there: {members(server.pid)}")


def end_with_parent() -> None:
    """Ask Linux to end this process should the demo be killed without a chance to stop it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def serving(command: list[str], log: Path) -> Iterator[None]:
    """Run the server `command`, with its output in `log`, while the body runs; always stop it."""
    show(command)
    print(f"      log: {log.relative_to(ROOT)}", flush=True)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise a large share of the memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinning fails in some containers
    }
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # its own process group, which `stop` ends
            preexec_fn=end_with_parent,
        )
    try:
        wait_until_healthy(server, int(command[command.index("--port") + 1]))
        yield
    except Failed:
        print(f"\nThe end of {log.relative_to(ROOT)}:", file=sys.stderr)
        for line in log.read_text(errors="replace").splitlines()[-25:]:
            print(f"  {line}", file=sys.stderr)
        raise
    finally:
        stop(server)


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers; raise Failed when it ends or takes too long."""
    deadline = time.monotonic() + START_LIMIT
    with progress("waiting for the server"):
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise Failed(f"the server ended with code {server.returncode} before it answered")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return
            except OSError:  # not listening yet, or not ready
                time.sleep(0.5)
    raise Failed(f"the server did not answer within {START_LIMIT} s")


def ask(port: int) -> str:
    """Ask the question over the OpenAI chat API and return the answer."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        reply = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=64,
            timeout=120,
        )
    except openai.OpenAIError as error:
        raise Failed(f"the question failed: {error}") from error
    answer = (reply.choices[0].message.content or "").strip()
    if not answer:
        raise Failed("the answer is empty")
    return answer


def proof_line(output: str) -> str:
    """Return the line in which `qplug convert --verify` says what it proved."""
    lines = [line.strip() for line in output.splitlines()]
    telling = [line for line in lines if re.search(r"equal|identical|proven|verified", line, re.I)]
    if not telling:
        raise Failed("`qplug convert --verify` printed no proof")
    return telling[-1]


def demo(report: Report) -> None:
    """Run the five steps and print what they showed."""
    gptq, awq = WORK / "smollm2-gptq", WORK / "smollm2-awq"
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    flags = cpu_flags()
    fp8 = "avx512f" in flags
    dtype = "bfloat16" if flags & {"amx_tile", "avx512_bf16"} else "float16"

    with report.step("SmolLM2-135M-Instruct as a dense fp16 checkpoint"):
        run([sys.executable, str(ROOT / "integration/demo/make_dense.py")])

    with report.step("Quantize it: GPTQ, 4 bits, groups of 32, asymmetric"):
        settings = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--asym"]
        run([str(BIN / "qplug"), "quantize", str(DENSE), str(gptq), *settings, "--to", "gptq"])

    with report.step("Convert GPTQ to AWQ layout, and prove that no weight changed"):
        convert = [str(BIN / "qplug"), "convert", str(gptq), str(awq), "--to", "awq-layout"]
        proof = proof_line(run([*convert, "--verify"]))

    port = free_port()
    command = [str(BIN / "vllm"), "serve", str(awq), "--quantization", "qplug-awq"]
    if fp8:
        command += ["--kv-cache-dtype", "fp8"]
    command += ["--dtype", dtype, "--max-model-len", "1024", "--served-model-name", "smollm2"]
    # Eager: compiling takes a C++ compiler and a minute, and one question does not repay it.
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    started = contextlib.ExitStack()
    with started:
        with report.step("Serve it with vLLM through qplug-awq"):
            if not fp8:
                print(
                    "      no AVX-512 here, which vLLM needs for an fp8 KV cache: left unquantized"
                )
            started.enter_context(serving(command, WORK / "vllm.log"))
        with report.step("Ask a question over the OpenAI chat API"):
            answer = ask(port)
            print(f"      > {QUESTION}")
            for line in answer.splitlines():
                print(f"      < {line}")
        start = time.monotonic()
    print(f"      server stopped in {time.monotonic() - start:.1f} s")

    print("\nAnswer   " + answer.splitlines()[0])
    print(f"Proof    {proof}")
    print(f"KV cache {'fp8' if fp8 else 'not quantized (no AVX-512)'}, model dtype {dtype}")
    for name, folder in (("dense", DENSE), ("GPTQ", gptq), ("AWQ", awq)):
        print(f"Size     {name:<6} {size(folder) / 1e6:6.1f} MB  {folder.relative_to(ROOT)}")
    for title, seconds in report.times:
        print(f"Time     {seconds:6.1f} s  {title}")
    print(f"Time     {sum(s for _, s in report.times):6.1f} s  in all")


def interrupted(number: int, _frame: object) -> None:
    """Turn a signal into an exception, so that the server is stopped on the way out."""
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
    print("\nstopping …", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # the server is on this machine
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        demo(Report())
    except Failed as failure:
        print(f"\nerror: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

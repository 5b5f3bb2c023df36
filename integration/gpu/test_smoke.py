"""What the vLLM smoke test makes of answers and of machines, without a server."""

import os
import subprocess
import sys

import pytest

from ..vllm import gpu_smoke
from ..vllm.gpu_smoke import Answer, disagreement, first_difference, parsed
from .machine import ROOT

SCRIPT = ROOT / "integration/vllm/gpu_smoke.sh"
TWIN = Answer([3, 4, 5], [{3: -0.1, 9: -3.0}, {4: -0.70, 7: -0.73}, {5: -0.2, 6: -2.0}])


def test_equal_answers_agree():
    assert disagreement(Answer([3, 4, 5], []), TWIN) == ""


def test_a_tie_of_the_twin_explains_whatever_follows():
    assert disagreement(Answer([3, 7, 1000], []), TWIN) == ""


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([9, 4, 5], "token 0 is 9, not 3, which is 2.90 likelier"),
        ([3, 8, 5], "token 1 is 8, which the twin does not consider, not 4"),
        ([3, 4], "2 tokens instead of 3"),
        ([], "0 tokens instead of 3"),
    ],
)
def test_anything_else_disagrees(tokens, told):
    assert disagreement(Answer(tokens, []), TWIN) == told


def test_differences_are_counted_from_the_start():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2]) == 2


def test_completions_are_read_by_token_numbers():
    said = {
        "tokens": ["token_id:5", "token_id:17"],
        "top_logprobs": [{"token_id:5": -0.5}, {"token_id:17": -1, "token_id:2": -2.5}],
    }
    found = parsed({"logprobs": said})
    assert found == Answer([5, 17], [{5: -0.5}, {17: -1.0, 2: -2.5}])


def test_the_line_that_is_served_is_the_missions_own(monkeypatch):
    monkeypatch.setattr(gpu_smoke.torch.cuda, "is_available", lambda: True)
    words = gpu_smoke.command(ROOT / "m", 80, "qplug-awq", eager=False)
    assert words[3:7] == ["serve", str(ROOT / "m"), "--quantization", "qplug-awq"]
    assert "--enforce-eager" not in words
    twin = gpu_smoke.command(ROOT / "m", 80, None, eager=True)
    assert "--quantization" not in twin
    assert "--enforce-eager" in twin


def smoke(**changes):
    environment = {**os.environ, "PYTHON": sys.executable, **changes}
    return subprocess.run(
        [SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"PYTHON": "/nowhere/python3"}, "no /nowhere/python3: set PYTHON"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "torch sees no CUDA device"),
    ],
)
def test_what_is_missing_is_one_line(changes, told):
    done = smoke(**changes)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gpu_smoke: {told}\n")


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('gone')")
    done = smoke(QPLUG_SMOKE_CPU="1", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"gpu_smoke: no triton in {sys.executable}\n")

"""The benchmark itself, without a GPU: a clock of its own, tiny linears, a time that runs out."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from qplug_kernels.gpu.timing import CALLS, Measured, measure, rotate

from . import bench
from .adapters import Adapter, Ready, Side, prepare_dense, prepare_qplug
from .cases import TINY, named, plan
from .gate import Checked
from .machine import ROOT
from .report import Result, load

[INT4] = named(["int4"])
GROUPS = plan([INT4], TINY, 16)


def adapter(name, prepare, side=Side.CUDA):
    return Adapter(name, side, lambda form: None, prepare)


def clock(calls):
    """Run each call, and say that they took 1, 2 and 3 us."""
    for call in calls:
        call()
    return [1e-6, 2e-6, 3e-6]


def all_right(adapters, groups=GROUPS):
    return [
        Checked(one.name, group.form.name, group.linear.name, count)
        for one in adapters
        for group in groups
        for count in group.tokens
    ]


def time_all(adapters, result, late=lambda: False):
    saved = []
    bench.time_all(
        GROUPS, adapters, result, "cpu", clock, late, lambda: saved.append(len(result.rows))
    )
    return saved


def test_every_right_case_is_timed_and_kept_after_each_weight():
    both = [
        adapter("qplug", prepare_qplug, Side.QPLUG),
        adapter("cublas", prepare_dense, Side.DENSE),
    ]
    result = Result({}, checked=all_right(both))
    saved = time_all(both, result)
    assert len(result.rows) == 2 * sum(len(group.tokens) for group in GROUPS)
    assert saved == sorted(saved)
    assert len(saved) == len(GROUPS)
    first = result.rows[0]
    assert (first.seconds, first.spread) == pytest.approx((2e-6, 1.0))
    dense = next(row for row in result.rows if row.adapter == "cublas" and row.tokens == 16)
    assert dense.nbytes == 2 * (256 * 128 + 16 * 256 + 16 * 128)


def test_what_was_wrong_or_absent_is_never_called():
    def explode(weight, form):
        pytest.fail("it was not checked")

    result = Result({}, checked=[Checked("bad", "int4", "tiny", 1, "wrong")])
    time_all([adapter("bad", explode)], result)
    assert not result.rows


def test_time_that_runs_out_drops_the_rest_by_name():
    one = [adapter("cublas", prepare_dense)]
    result = Result({}, checked=all_right(one))
    answers = iter([False, True, True, True, True, True, True, True])
    time_all(one, result, lambda: next(answers))
    assert len(result.rows) == 2
    assert "cublas int4 wide 1" in result.dropped
    assert len(result.rows) + len(result.dropped) == len(all_right(one))


def test_a_failure_while_timing_costs_one_row_and_is_told():
    def fails_at_16(weight, form):
        ready = prepare_dense(weight, form)

        def call(x, tensors):
            if len(x) == 16:
                raise RuntimeError("an illegal memory access")
            return ready.call(x, tensors)

        return Ready(ready.tensors, call)

    one = [adapter("bad", fails_at_16)]
    result = Result({}, checked=all_right(one))
    time_all(one, result)
    assert 16 not in {row.tokens for row in result.rows}
    assert "while timed: RuntimeError: an illegal memory access" in {
        c.reason for c in result.checked
    }


def test_nothing_is_asked_of_a_device_that_is_broken(monkeypatch):
    def breaks(weight, form):
        raise RuntimeError("an illegal memory access was encountered")

    both = [adapter("bad", breaks), adapter("cublas", prepare_dense)]
    result = Result({}, checked=all_right(both))
    monkeypatch.setattr(bench, "alive", lambda device: False)
    time_all(both, result)
    assert not result.rows
    assert "bad broke the device: nothing ran after it" in result.dropped
    assert "cublas int4 tiny 1" in result.dropped


def test_a_device_that_computes_is_alive():
    assert bench.alive("cpu")


def test_calls_take_turns_over_copies():
    seen = []
    tensor = torch.ones(4)
    calls = rotate(lambda tensors: seen.append(tensors[0].data_ptr()), [tensor])
    assert len(calls) == CALLS
    for call in calls:
        call()
    assert seen[0] == tensor.data_ptr()
    assert len(set(seen)) == 2
    assert all(one != other for one, other in pairwise(seen))


def test_noise_is_measured_again_and_the_steadier_is_taken():
    times = iter([[1.0, 2.0, 3.0], [1.0, 1.1, 1.2], [5.0, 5.0, 5.0]])
    assert measure([], lambda calls: next(times)).seconds == 1.1
    assert measure([], lambda calls: next(times)) == Measured(5.0, 0.0)


def test_a_machine_without_a_gpu_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_command_runs_from_end_to_end(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "integration.gpu", "--tiny", "--device", "cpu"]
    command += ["--most", "1", "--forms", "int4", "--adapters", "qplug", "conch", "--out", str(out)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "kernels")))
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = load(out)
    assert [row.adapter for row in result.rows] == ["qplug", "qplug"]
    assert result.limits.copy > 0
    assert {"torch", "triton", "revision", "device"} <= set(result.machine)
    assert "conch: ModuleNotFoundError" in done.stdout
    assert json.loads(out.read_text())["schema"] == 1

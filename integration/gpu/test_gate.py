"""Wrong, missing and dying adapters cost their own rows and nothing else."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qplug_kernels import Problem
from qplug_kernels.gpu import compat

from . import adapters, gate
from .adapters import Adapter, Ready, Side
from .cases import FORMS, TINY, draw, named, plan
from .gate import Checked, Task, check, fill, judge, read, run, split
from .peers import ADAPTERS, bits_along_inputs, marlin_columns, marlin_zeros

INT4, NF4 = named(["int4", "nf4"])


def adapter(prepare, side=Side.CUDA, cannot=adapters.any_form):
    return Adapter("test", side, cannot, prepare)


def right(weight, form):
    return adapters.prepare_dense(weight, form)


def test_a_right_adapter_passes_with_its_error():
    found = list(check(adapter(right), INT4, TINY[0], (1, 16), "cpu"))
    assert [one.tokens for one in found] == [1, 16]
    assert all(not one.reason and one.error < 1e-3 for one in found)


def test_one_that_forgets_the_zero_is_wrong():
    def forgets(weight, form):
        ready = right(weight, form)
        return Ready((ready.tensors[0] + 0.01,), ready.call)

    [found] = check(adapter(forgets), INT4, TINY[0], (4,), "cpu")
    assert found.wrong
    assert "error against float64" in found.reason


@pytest.mark.parametrize("side", [Side.QPLUG, Side.CUDA])
def test_qplug_is_held_to_more(side):
    one = adapter(right, side)
    assert one.bound(INT4) == (1e-3 if side is Side.QPLUG else 1e-2)
    assert one.bound(NF4) == (1e-2 if side is Side.QPLUG else 5e-2)


def test_another_shape_and_nan_are_wrong():
    assert "its product is [1, 2]" in judge(torch.ones(1, 2), torch.ones(2, 1), 1.0)[1]
    assert judge(torch.full((2,), torch.nan), torch.ones(2).double(), 1.0)[1]


def test_what_cannot_is_missing_or_raises_has_its_reason():
    def missing(weight, form):
        raise ModuleNotFoundError("No module named 'marlin'\nand a second line")

    def fails(weight, form):
        return Ready((), lambda x, tensors: 1 // 0)

    [found] = check(adapter(missing), INT4, TINY[0], (1,), "cpu")
    assert found.reason == "ModuleNotFoundError: No module named 'marlin'"
    [found] = check(adapter(fails), INT4, TINY[0], (1,), "cpu")
    assert found.reason.startswith("ZeroDivisionError")
    [found] = check(adapter(fails, cannot=lambda form: "it will not"), INT4, TINY[0], (1,), "cpu")
    assert (found.reason, found.wrong) == ("it will not", False)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_qplug_and_the_dense_product_are_right_at_every_form(form):
    for one in ADAPTERS[:2]:
        for found in check(one, form, TINY[0], (1, 16), "cpu"):
            assert not found.reason, found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_kernel_chosen_on_a_gpu_is_right_in_the_interpreter(form, monkeypatch):
    if not compat.interpreted():
        pytest.skip("Triton runs without its interpreter: TRITON_INTERPRET is not 1")
    here = Problem.here

    def on_a_gpu(weight, dtype, device="cpu"):
        return replace(here(weight, dtype, device), device="cuda", arch="sm_90")

    monkeypatch.setattr(Problem, "here", on_a_gpu)
    ready = ADAPTERS[0].prepare(draw(form, TINY[0], "cpu"), form)
    assert ready.detail.startswith("triton_")
    for found in check(ADAPTERS[0], form, TINY[0], (1, 17), "cpu"):
        assert not found.reason, found


def test_tasks_share_what_compiles_and_leave_out_what_cannot():
    tasks = split(ADAPTERS, FORMS)
    by_name = {}
    for task in tasks:
        by_name.setdefault(task.adapter.name, []).append([form.name for form in task.forms])
    assert len(by_name["qplug"]) == len(FORMS)
    assert by_name["bitsandbytes"] == [["nf4"]]
    assert by_name["tinygemm"] == [["int4-bf16", "int4-asym-bf16"]]
    assert ["int3"] not in by_name["gemlite"]
    assert "int4-act-order" in by_name["marlin"][0]


def test_missing_results_take_the_reason_why_the_process_ended():
    keys = [("a", "int4", "o", 1), ("a", "int4", "o", 2)]
    first = Checked(*keys[0], error=0.0)
    assert fill([first], keys, "its process ended by signal 11") == [
        first,
        Checked(*keys[1], "its process ended by signal 11"),
    ]


def test_a_line_that_was_cut_is_not_read(tmp_path):
    path = tmp_path / "0.jsonl"
    whole = {"adapter": "a", "form": "f", "linear": "l", "tokens": 1}
    path.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:-5])
    assert read(path) == [Checked("a", "f", "l", 1)]
    assert read(tmp_path / "absent.jsonl") == []


@pytest.fixture
def program(monkeypatch):
    """Run a line of Python in place of each check."""

    def replaced(source):
        def start(task, options, out):
            return subprocess.Popen([sys.executable, "-c", source, str(out)])

        monkeypatch.setattr(gate, "_start", start)

    return replaced


GROUPS = plan([INT4], TINY[:1], 2)
TASKS = [Task(ADAPTERS[0], (INT4,))]


def test_a_process_that_dies_is_named_with_its_signal(program, tmp_path):
    program("import os; os.kill(os.getpid(), 11)")
    found = run(TASKS, GROUPS, [], tmp_path, 1e9, lambda: 0.0)
    assert [one.reason for one in found] == ["its process ended by signal 11"] * 2


def test_a_process_that_never_comes_back_is_ended_at_the_deadline(program, tmp_path):
    program("import time; time.sleep(600)")
    ticks = iter(range(100))
    found = run(TASKS, GROUPS, [], tmp_path, 5, lambda: next(ticks))
    assert {one.reason for one in found} == {"its check was not finished in time"}


def test_what_a_process_wrote_before_it_died_counts(program, tmp_path):
    line = json.dumps({"adapter": "qplug", "form": "int4", "linear": "tiny", "tokens": 1})
    program(f"import sys; open(sys.argv[1], 'w').write({line!r} + chr(10)); sys.exit(3)")
    first, second = run(TASKS, GROUPS, [], tmp_path, 1e9, lambda: 0.0)
    assert (first.reason, second.reason) == ("", "its process ended with 3")


def test_no_process_is_left_running(program, tmp_path):
    program("import time; time.sleep(600)")
    ticks = iter(range(100))
    started = []
    start = gate._start
    gate._start = lambda *arguments: started.append(start(*arguments)) or started[-1]
    run(TASKS, GROUPS, [], tmp_path, 3, lambda: next(ticks))
    assert started
    assert all(process.returncode == -9 for process in started)
    assert not Path(f"/proc/{started[0].pid}").exists()


def test_words_along_inputs_hold_the_first_input_lowest():
    weight = draw(INT4, TINY[0], "cpu")
    words = bits_along_inputs(weight.codes, 4)
    assert words.shape == (32, 128)
    assert words.dtype == torch.int32
    for at in range(8):
        field = words[3] >> 4 * at & 15
        assert torch.equal(field, weight.codes[:, 24 + at].int())


def test_marlins_columns_are_a_transposed_square():
    columns = torch.arange(128).repeat(2, 1)
    found = marlin_columns(columns)
    assert found[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert sorted(found[1].tolist()) == list(range(128))


def test_marlins_zeros_hold_evens_before_odds():
    zeros = (torch.arange(64) % 16).view(1, 64)
    word = int(marlin_zeros(zeros)[0, 1])  # columns 1, 9, ..., 57: zeros 1, 9, 1, 9, ...
    assert [word >> 4 * at & 15 for at in range(8)] == [1, 1, 1, 1, 9, 9, 9, 9]

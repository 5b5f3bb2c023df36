"""Tables and ratios of numbers that are made up, and what is saved of them."""

import json

import pytest

from . import gate, report
from .gate import Checked
from .machine import Limits
from .report import Result, Row, lines, narrow_targets, targets

LIMITS = Limits(copy=4e12, read=4.2e12, node=2e-6, spread=0.0)


def row(adapter, side, microseconds, form="int4", linear="o", tokens=1, nbytes=8_000_000):
    return Row(adapter, side, "", form, linear, tokens, microseconds * 1e-6, 0.01, nbytes)


ROWS = [
    row("qplug", "qplug", 4.0),
    row("gemlite", "triton", 10.0),
    row("conch", "triton", 8.0),
    row("marlin", "cuda", 5.0),
    row("machete", "cuda", 3.0),
    row("cublas", "dense", 9.0),
    row("marlin", "cuda", 1.0, tokens=2),
    row("qplug", "qplug", 4.2, form="int4-act-order"),
    row("qplug", "qplug", 2.5, form="int3"),
]


def test_a_share_is_the_time_of_the_bytes_and_ratios_are_to_the_best_of_each_side():
    [line, *_] = lines(ROWS, LIMITS)
    assert line.floor == pytest.approx(2e-6)
    assert line.share == pytest.approx(0.5)
    assert line.triton == (pytest.approx(2.0), "conch")
    assert line.cuda == (pytest.approx(0.75), "machete")
    assert line.dense == (pytest.approx(2.25), "cublas")


def test_what_nobody_else_ran_has_no_ratio():
    line = next(line for line in lines(ROWS, LIMITS) if line.row.form == "int3")
    assert (line.triton, line.cuda, line.dense) == (None, None, None)


def test_targets_are_those_of_the_worst_case_and_unmeasured_ones_say_so():
    found = {target.what: target for target in targets(lines(ROWS, LIMITS))}
    share = found["int4, up to 16 tokens, o: share of copy bandwidth"]
    assert (share.found, share.met) == (pytest.approx(0.5), True)
    assert found["int4, up to 16 tokens, down: share of copy bandwidth"].met is None
    assert found["int4, up to 16 tokens: the best CUDA peer's time"].met is False
    assert found["int4, 4096 tokens: cuBLAS's time"].found is None
    order = found["act order, up to 16 tokens: the time without it"]
    assert (order.found, order.met) == (pytest.approx(4.0 / 4.2), True)


def test_worse_of_two_linears_decides():
    rows = [
        *ROWS,
        row("qplug", "qplug", 40.0, linear="qkv"),
        row("marlin", "cuda", 4.0, linear="qkv"),
    ]
    found = {target.what: target for target in targets(lines(rows, LIMITS))}
    assert found["int4, up to 16 tokens: the best CUDA peer's time"].found == pytest.approx(0.1)


def test_three_bits_are_compared_with_the_best_int4_of_any_peer_at_one_token():
    three, two = narrow_targets(ROWS)
    assert three.found == pytest.approx(3.0 / 2.5)
    assert two.found is None


def test_the_table_marks_noise_and_names_who_is_compared():
    noisy = Row("qplug", "qplug", "triton_affine", "int4", "o", 1, 4e-6, 0.2, 8_000_000)
    text = report.table(lines([noisy, *ROWS[1:6]], LIMITS))
    assert "(spread 20%)" in text
    assert "50%" in text
    assert "0.75 machete" in text
    assert "triton_affine" in text


def test_reasons_are_told_once_with_their_forms():
    text = report.reasons(
        [
            Checked("marlin", "int4", "o", 1, "ImportError: no vllm"),
            Checked("marlin", "int4", "o", 16, "ImportError: no vllm"),
            Checked("marlin", "int8", "o", 1, "ImportError: no vllm"),
            Checked("qplug", "int4", "o", 1),
        ]
    )
    assert text == "marlin: ImportError: no vllm (int4, int8)"


def test_only_qplugs_faults_make_a_run_fail():
    result = Result({}, checked=[Checked("marlin", "int4", "o", 1, "wrong", 1.0, True)])
    result.checked.append(Checked("qplug", "int4", "o", 4, gate.UNFINISHED))
    assert not result.wrong
    result.checked.append(Checked("qplug", "int4", "o", 1, "its process ended by signal 11"))
    assert len(result.wrong) == 1


def test_a_result_is_read_as_it_was_saved(tmp_path):
    result = Result(
        {"device": "none"}, LIMITS, ROWS, [Checked("qplug", "int4", "o", 1)], ["x"], 3.0
    )
    report.save(result, tmp_path / "r.json")
    assert report.load(tmp_path / "r.json") == result
    assert not list(tmp_path.glob("*.part"))
    data = json.loads((tmp_path / "r.json").read_text())
    assert {target["what"] for target in data["targets"]} >= {
        "int3, 1 token: the best peer's int4's time"
    }
    data["schema"] = 0
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="schema 1"):
        report.load(tmp_path / "r.json")


def test_a_run_without_a_gpu_still_shows():
    assert "0 times in" in report.show(Result({"device": "none"}))
    assert "int4" in report.show(Result({"device": "none"}, LIMITS, list(ROWS)))

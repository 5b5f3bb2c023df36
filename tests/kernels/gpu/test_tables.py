"""Tables of measured configurations: read, refused, chosen from; and how they are measured."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from qplug_converters.errors import QplugError
from qplug_kernels import tune
from qplug_kernels.gpu import affine, compat, configs, tables, timing
from qplug_kernels.gpu.configs import Card, Config
from qplug_kernels.gpu.planes import Form
from qplug_kernels.gpu.tables import Row, Table
from qplug_kernels.tune import AFFINE, Linear, Session, best, candidates, merged

FORM = Form(4096, 4096, 4096, 4, 64, 128, 128, False, False)
CARD = Card("sm_90", 132)
ROW = Row(
    layout="planes", bits=4, dtype="float16", group=128, rows=64, columns=128, out_features=4096,
    in_features=4096, upto=16, tokens=16, splits=5, warps=2, stages=4, joined=False,
    microseconds=4.0, rule=5.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """Give the test a table of its own, and none of the package."""
    path = tmp_path / "own.json"
    monkeypatch.setenv("QPLUG_CONFIGS", str(path))
    monkeypatch.setattr(tables, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(timing, "COLD", 1)  # no clock of these tests minds a cache
    forget()
    yield path
    forget()


def forget():
    tables.rows_for.cache_clear()
    configs.choose.cache_clear()


def table(*rows, arch="sm_90", multiprocessors=132, triton=None):
    return Table(arch, multiprocessors, triton or tables.version(), rows)


def chosen(monkeypatch, tokens=16, form=FORM):
    monkeypatch.setattr(configs, "card", lambda device: CARD)
    forget()
    return configs.choose(form, tokens, torch.device("cpu"))


def test_without_a_table_the_rule_decides(monkeypatch):
    assert chosen(monkeypatch) == configs.rule(FORM, 16, CARD)


def test_above_the_last_range_the_rule_decides(own, monkeypatch):
    tables.write(own, table(replace(ROW, upto=64, tokens=64)))
    assert chosen(monkeypatch, 64).splits == ROW.splits
    for tokens in (65, 256):
        assert chosen(monkeypatch, tokens) == configs.rule(FORM, tokens, CARD)


def test_a_measured_row_is_taken_for_its_tokens_alone(own, monkeypatch):
    tables.write(own, table(ROW))
    found = chosen(monkeypatch)
    assert (found.splits, found.warps, found.stages, found.joined) == (5, 2, 4, False)
    assert found.ptx
    for tokens in (9, 16):
        assert chosen(monkeypatch, tokens).splits == 5
    for tokens in (8, 17, 65):
        assert chosen(monkeypatch, tokens) == configs.rule(FORM, tokens, CARD)


@pytest.mark.parametrize(
    "other",
    [{"arch": "sm_80"}, {"multiprocessors": 114}, {"triton": "3.1"}],
    ids=["card", "processors", "triton"],
)
def test_a_table_of_another_card_or_triton_is_passed_over(other, own, monkeypatch):
    tables.write(own, table(ROW, **other))
    assert chosen(monkeypatch) == configs.rule(FORM, 16, CARD)


@pytest.mark.parametrize(
    "change",
    [{"group": 64}, {"rows": 32}, {"bf16": True}, {"columns": 64}, {"bits": 2, "group": 128}],
    ids=["group", "rows", "dtype", "columns", "bits"],
)
def test_a_row_is_for_its_layout_alone(change, own, monkeypatch):
    tables.write(own, table(ROW))
    form = replace(FORM, **change)
    assert chosen(monkeypatch, form=form) == configs.rule(form, 16, CARD)


def test_the_nearest_linear_counts_if_it_is_near(own, monkeypatch):
    far = replace(ROW, out_features=5000, splits=9)
    tables.write(own, table(far, ROW))
    assert chosen(monkeypatch).splits == 5
    assert chosen(monkeypatch, form=replace(FORM, out_features=4800)).splits == 9
    alone = replace(FORM, out_features=28672)
    assert chosen(monkeypatch, form=alone) == configs.rule(alone, 16, CARD)


def test_the_users_rows_come_before_the_packages(own, monkeypatch):
    package = tables.PACKAGE / "sm_90.json"
    tables.write(package, table(replace(ROW, splits=7)))
    assert chosen(monkeypatch).splits == 7
    tables.write(own, table(ROW))
    assert chosen(monkeypatch).splits == 5
    monkeypatch.setenv("QPLUG_CONFIGS", "off")
    assert chosen(monkeypatch).splits == 7


def test_a_table_is_read_as_it_was_written(own):
    tables.write(own, table(ROW))
    assert tables.read(own) == table(ROW)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data.update(schema=2), "schema 1"),
        (lambda data: data.pop("arch"), "arch"),
        (lambda data: data["rows"][0].pop("warps"), "warps"),
        (lambda data: data["rows"][0].update(wraps=4), "wraps"),
        (lambda data: data["rows"][0].update(warps=3), "warps = 3"),
        (lambda data: data["rows"][0].update(warps="4"), "of type int"),
        (lambda data: data["rows"][0].update(splits=True), "splits = True"),
        (lambda data: data["rows"][0].update(stages=0), "stages = 0"),
        (lambda data: data["rows"][0].update(tokens=12), "tokens = 12"),
        (lambda data: data.update(rows=[3]), "a row that differs"),
    ],
)
def test_what_no_kernel_could_be_launched_with_is_named(change, told, own):
    data = {"schema": 1, **asdict(table(ROW))}
    data["rows"] = [dict(row) for row in data["rows"]]
    change(data)
    own.write_text(json.dumps(data))
    with pytest.raises(QplugError, match=told):
        tables.read(own)


def test_a_file_that_is_no_json_is_named(own):
    own.write_text("{")
    with pytest.raises(QplugError, match="no table"):
        tables.read(own)


def test_candidates_begin_with_the_rule_and_fit_the_card():
    base = configs.rule(FORM, 16, CARD)
    found = candidates(FORM, base, CARD)
    assert found[0] == base
    assert len(found) == len(set(found))
    small = candidates(FORM, base, Card("sm_86", 84))
    assert max(config.stages for config in small) < max(config.stages for config in found)
    assert all(config.splits <= FORM.tiles[1] for config in found)


HERE = "cpu" if compat.interpreted() else "cuda"
LINEAR = Linear("int4", 512, 256, torch.float16)


def session(clock, late=lambda: False):
    told = []
    return Session(64, HERE, clock, late, told.append), told


def test_the_fastest_right_configuration_is_found_step_by_step(monkeypatch):
    times = iter(range(1000, 0, -1))
    made, _ = session(lambda calls: [float(next(times))])
    job = made.job(LINEAR, 8)
    base = AFFINE.choose(job.form, 8, made.card)
    found = candidates(job.form, base, made.card)
    config, seconds, before = best(job, found, lambda calls: [float(next(times))], print)
    assert config != base
    assert seconds < before


def test_wrong_unsteady_and_failing_configurations_are_refused(monkeypatch):
    made, told = session(lambda calls: [1.0])
    job = made.job(LINEAR, 8)
    base = AFFINE.choose(job.form, 8, made.card)
    two, three, four = (replace(base, splits=base.splits + extra) for extra in (1, 2, 3))
    results = iter(range(100))

    def launch(x, operands, bias, config):
        y = affine.launch(x, operands, bias, base)
        if config == two:
            return y + 1
        if config == three:
            return y + y * next(results) * 2**-11
        if config == four:
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        return y

    faulty = replace(job, tuned=replace(AFFINE, launch=launch))
    assert job.refusal(base) is None
    assert "error against float64" in faulty.refusal(two)
    assert faulty.refusal(three) == "two results differ"
    assert faulty.refusal(four) == "RuntimeError: out of resource: shared memory"
    found = best(faulty, [base, two, three, four], lambda calls: [1.0], told.append)
    assert found is not None
    assert found[0] == base
    assert len(told) == 3


def test_rows_are_written_where_they_save_something(own, monkeypatch):
    monkeypatch.setattr(tables, "BUCKETS", (8,))
    rule = AFFINE.choose

    def by_splits(calls):
        return [1.0]

    made, told = session(by_splits)
    found = tune.tune([LINEAR], made, own)
    assert found.rows == ()
    assert tables.read(own) == found
    times = iter([1.0] + [0.5] * 1000)
    made, told = session(lambda calls: [next(times)])
    found = tune.tune([LINEAR], made, own)
    [row] = found.rows
    assert (row.rule, row.microseconds) == (1e6, 0.5e6)
    assert (row.in_features, row.out_features, row.upto) == (512, 256, 8)
    assert "50% saved" in told[-1]
    form = made.job(LINEAR, 8).form
    monkeypatch.setattr(configs, "card", lambda device: Card(found.arch, found.multiprocessors))
    forget()
    assert configs.choose(form, 5, torch.device("cpu")) == replace(
        rule(form, 8, made.card), **row.values()
    )


def test_new_rows_replace_those_for_the_same_and_keep_others():
    other = replace(ROW, upto=8)
    asked = [{"upto": 16, "bits": 4}]
    assert merged([ROW, other], [], asked) == [other]
    assert merged([ROW, other], [replace(ROW, splits=2)], asked)[0].splits == 2


def test_no_time_means_no_launches(own):
    made, told = session(lambda calls: pytest.fail("measured"), lambda: True)
    assert tune.tune([LINEAR], made, own).rows == ()
    assert "no time is left" in told[0]


@pytest.mark.parametrize("kind", tune.KINDS)
def test_every_kind_is_prepared_and_launched(kind):
    made, _ = session(lambda calls: [1.0])
    job = made.job(Linear(kind, 256, 128, torch.float16), 8)
    assert job.refusal(job.tuned.choose(job.form, 8, made.card)) is None


def test_the_command_says_what_it_would_do_and_what_it_needs(capsys, monkeypatch):
    assert tune.main(["--dry-run", "--linears", "64x32"]) == 0
    assert "int4 64x32 float16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--linears", "4096"])


def test_a_configuration_of_a_table_is_complete():
    assert set(tables.SETS) <= set(Config.__dataclass_fields__)

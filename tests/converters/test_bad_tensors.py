"""Tensors that are missing, of a wrong shape or dtype, or hold what no weight can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders import GOLDEN, Command, Draft, Q, convert
from spoil import (
    AWQ,
    GPTQ,
    SYM,
    Bad,
    Write,
    check,
    keys,
    poke,
    refused_by_command,
    refused_by_library,
    tensor,
    without,
)

from qplug_converters.checkpoint import open_checkpoint
from qplug_converters.errors import QplugError
from qplug_converters.verify import verify

TENSORS = [
    *(
        Bad(f"{golden}: no {part}", golden, without(f"{Q}.{part}"), f"{Q}.{part}", "no such tensor")
        for golden, parts in (
            (GPTQ, ("qweight", "qzeros", "scales", "g_idx")),
            (AWQ, ("qweight", "qzeros", "scales")),
        )
        for part in parts
    ),
    Bad("no qweight at all", GPTQ, lambda d, f: ([d.tensors.pop(n) for n in list(d.tensors)
        if n.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))], d.save(f)),
        "headers", "no `*.qweight` tensor"),
    Bad("short qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:-1]), Q, "I32[15, 128]"),
    Bad("narrow qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:, :-8]), Q, "I32[2, 16]"),
    Bad("flat qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a.ravel()), Q, "I32[2048]"),
    Bad("empty qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a[:0]), Q, "I32[0, 128]"),
    Bad("short qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a[:-1]), f"{Q}.qzeros", "I32[1, 16]"),
    Bad("flat qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a.ravel()), f"{Q}.qzeros", "I32[32]"),
    Bad("short scales", GPTQ, tensor(f"{Q}.scales", lambda a: a[:-1]), Q, "F16[1, 128]"),
    Bad("short g_idx", GPTQ, tensor(f"{Q}.g_idx", lambda a: a[:-8]), Q, "I32[16, 128]"),
    Bad("wide qweight", GPTQ, tensor(f"{Q}.qweight", lambda a: a.astype(np.int64)), Q, "I64[16"),
    Bad("float qzeros", GPTQ, tensor(f"{Q}.qzeros", lambda a: a.astype(np.float32)), Q, "F32[2"),
    Bad("double scales", GPTQ, tensor(f"{Q}.scales", lambda a: a.astype(np.float64)), Q, "F64[2"),
    Bad("int scales", GPTQ, tensor(f"{Q}.scales", lambda a: a.view(np.int16)), Q, "I16[2, 128]"),
    Bad("wide g_idx", GPTQ, tensor(f"{Q}.g_idx", lambda a: a.astype(np.int64)), Q, "I64[128]"),
    Bad("g_idx too large", GPTQ, poke(f"{Q}.g_idx", (5,), 2), f"{Q}.g_idx", "from 0 to 2"),
    Bad("g_idx negative", GPTQ, poke(f"{Q}.g_idx", (5,), -1), f"{Q}.g_idx", "from -1 to 1"),
    Bad("awq short", AWQ, tensor(f"{Q}.qweight", lambda a: a[:-1]), f"{Q}.qweight", "127 inputs"),
    Bad("awq narrow", AWQ, tensor(f"{Q}.scales", lambda a: a[:, :-8]), Q, "F16[1, 120]"),
    Bad("awq flat", AWQ, tensor(f"{Q}.qzeros", lambda a: a.ravel()), f"{Q}.qzeros", "I32[16]"),
    Bad("awq int scales", AWQ, tensor(f"{Q}.scales", lambda a: a.view(np.int16)), Q, "I16[1, 128]"),
    *(
        Bad(f"{golden}: scale {value}", golden, poke(f"{Q}.scales", (0, 5), value),
            f"{Q}.scales", "1 scales that are NaN or infinite", data=True)
        for golden in (GPTQ, AWQ)
        for value in (float("nan"), float("inf"), float("-inf"))
    ),
]  # fmt: skip

ALL = [*TENSORS]


@pytest.mark.parametrize("bad", [b for b in ALL if not b.data], ids=lambda b: b.name)
def test_library(bad: Bad, tmp_path: Path) -> None:
    refused_by_library(bad, tmp_path)


@pytest.mark.parametrize("bad", ALL, ids=lambda b: b.name)
def test_command_line(bad: Bad, tmp_path: Path, qplug: Command) -> None:
    refused_by_command(bad, tmp_path, qplug)


def test_the_copy_that_changes_nothing_is_good(tmp_path: Path) -> None:
    """The cases above fail for what they change, not for how they are written."""
    for golden in (GPTQ, SYM, AWQ):
        Draft.of(golden).save(tmp_path / golden)
        convert(tmp_path / golden, tmp_path / f"{golden}-out")
        assert verify(open_checkpoint(GOLDEN / golden), open_checkpoint(tmp_path / golden)).same
    Draft.of(GPTQ).save_sharded(tmp_path / "sharded", 3)
    assert verify(open_checkpoint(GOLDEN / GPTQ), open_checkpoint(tmp_path / "sharded")).same


def test_a_copied_linear_is_read_before_it_is_believed(tmp_path: Path, qplug: Command) -> None:
    source = tmp_path / "source"
    poke(f"{Q}.scales", (0, 5), float("nan"))(Draft.of(GPTQ), source)
    ran = qplug("convert", source, tmp_path / "target", "--to", "gptq")
    assert ran.code == 1
    assert not (tmp_path / "target").exists()


# The canonical form ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canonical") / "out"
    convert(GOLDEN / "gptq-4b-sym-g64-actorder", folder)
    return folder


def entry_of(draft: Draft) -> dict[str, object]:
    found: dict[str, object] = draft.block["modules"][Q]
    return found


def change(how: Callable[[Draft], object]) -> Write:
    return lambda draft, folder: (how(draft), draft.save(folder))


CANONICAL = [
    Bad("version 2", "", keys(version=2), "quantization_config.version", "2"),
    Bad("version as text", "", keys(version="1"), "quantization_config.version", "'1'"),
    Bad("no modules", "", keys(modules={}), "modules", "no entry"),
    Bad("modules a list", "", keys(modules=[1]), "quantization_config.modules", "[1]"),
    Bad("no entry", "", change(lambda d: d.block["modules"].pop(Q)), f"modules.{Q}", "no entry"),
    Bad("no tensors", "", change(lambda d: d.block["modules"].update(x=entry_of(d))),
        "x", "no tensors"),
    Bad("entry a list", "", change(lambda d: d.block["modules"].update({Q: [4]})), Q, "[4]"),
    Bad("bits 9", "", change(lambda d: entry_of(d).update(bits=9)), Q, "9"),
    Bad("bits as text", "", change(lambda d: entry_of(d).update(bits="4")), Q, "'4'"),
    Bad("other bits", "", change(lambda d: entry_of(d).update(bits=3)), Q, "U8[128, 64]"),
    Bad("group 0", "", change(lambda d: entry_of(d).update(group_size=0)), Q, "0"),
    Bad("other group", "", change(lambda d: entry_of(d).update(group_size=32)), Q, "F16[128, 2]"),
    Bad("other inputs", "", change(lambda d: entry_of(d).update(in_features=120)), Q, "U8[128"),
    Bad("empty", "", tensor(f"{Q}.codes", lambda a: a[:0]), f"{Q}.codes", "U8[0, 64]"),
    Bad("flat", "", tensor(f"{Q}.codes", lambda a: a.ravel()), f"{Q}.codes", "U8[8192]"),
    Bad("no scales", "", without(f"{Q}.scales"), f"{Q}.scales", "no such tensor"),
    Bad("no zeros", "", without(f"{Q}.zeros"), f"{Q}.zeros", "no such tensor"),
    Bad("no codes", "", without(f"{Q}.codes"), f"{Q}.codes", "no tensors"),
    Bad("wide zeros", "", tensor(f"{Q}.zeros", lambda a: a.astype(np.int32)), Q, "I32[128, 2]"),
    Bad("g_idx", "", poke(f"{Q}.g_idx", (0,), 2), f"{Q}.g_idx", "to 2"),
]  # fmt: skip


@pytest.mark.parametrize("bad", CANONICAL, ids=lambda b: b.name)
def test_canonical(bad: Bad, canonical: Path, tmp_path: Path) -> None:
    bad.write(Draft.of(canonical), tmp_path / "source")
    with pytest.raises(QplugError) as caught:
        open_checkpoint(tmp_path / "source").scheme()
    check(caught.value, bad)

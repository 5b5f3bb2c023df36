"""The whole-word routes equal a bit-by-bit reading of the layouts, in any shape and stride."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qplug_converters import spread, threads, tiles, words
from qplug_converters.tiles import Form, Kind, translate
from qplug_converters.words import pack, unpack

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)

bits_and_order = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.just(())
        if 32 % bits
        else st.one_of(st.just(()), st.permutations(range(32 // bits)).map(tuple)),
    )
)


def literal_pack(codes: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """Pack uint8 `[rows, n]` into int32 `[rows, w]`, one bit at a time."""
    rows, n = codes.shape
    w = -(-n * bits // 32)
    stream = np.zeros((rows, 32 * w), dtype=np.uint8)
    per = 32 // bits
    for code in range(n):
        field = code if not order else code // per * per + order.index(code % per)
        for bit in range(bits):
            stream[:, field * bits + bit] = codes[:, code] >> bit & 1
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").reshape(rows, w)


def strided(tensor: Tensor, how: int) -> Tensor:
    """Return `tensor` as a view: 0 whole, 1 columns of a wider one, 2 of every other column, 3 of a
    transposed one, 4 rows of one that starts at an odd byte.
    """
    rows, columns = tensor.shape
    if how == 0:
        view = tensor.clone()
    elif how == 1:
        view = torch.full((rows, columns + 8), 7, dtype=tensor.dtype)[:, 4 : 4 + columns]
    elif how == 2:
        view = torch.full((rows, 2 * columns), 7, dtype=tensor.dtype)[:, ::2]
    elif how == 3:
        view = torch.full((columns, rows + 1), 7, dtype=tensor.dtype).t()[:rows]
    else:
        view = torch.full((rows, columns + 1), 7, dtype=tensor.dtype)[:, 1:]
    return view.copy_(tensor)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    bits_and_order,
    st.integers(0, 40),
    st.integers(0, 150),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_spreading_on_a_device_is_the_same(
    packing: tuple[int, tuple[int, ...]],
    rows: int,
    n: int,
    transposed: bool,
    codes_transposed: bool,
    seed: int,
) -> None:
    """What runs on a GPU, run on the CPU; bits past the last code are not looked at."""
    bits, order = packing
    random = torch.Generator().manual_seed(seed)
    w = -(-n * bits // 32)
    shape = (w, rows) if transposed else (rows, w)
    stored = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=random)
    how = {"transposed": transposed, "codes_transposed": codes_transposed, "order": order}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(spread, "SLAB", 256)
        found = spread.unpack(stored, bits, n, **how)
    assert found.is_contiguous()
    assert torch.equal(found, unpack(stored, bits, n, **how))


def test_parts_on_a_device_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device other than the CPU takes that way: `meta` computes nothing, and shapes suffice."""
    from qplug_converters.codec import unpack_part
    from qplug_converters.formats import find
    from qplug_converters.layout import Holds
    from qplug_converters.scheme import Scheme

    for name in ("gptq", "awq", "compressed-tensors"):
        known = find(name)
        scheme = known.adopt(Scheme(32, 64, 4, 32))
        part = known.layout(scheme).part(Holds.CODES)
        assert part is not None
        stored = torch.empty(part.spec(scheme.sizes).shape, dtype=torch.int32, device="meta")
        monkeypatch.setattr(words, "unpack", None)
        found = unpack_part(part, stored, scheme.sizes)
        assert (found.device.type, found.shape) == ("meta", (32, 64))


@pytest.fixture(scope="class", params=[False, True], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with blocks so small that every case has edges in both directions, or as they are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param:
            for name, value in (("_BLOCK", 256), ("_LEAST", 64), ("_RUN", 64)):
                monkeypatch.setattr(words, name, value)
            monkeypatch.setattr(tiles, "_BLOCK", 64)
        yield


@pytest.mark.usefixtures("blocks")
class TestEqualsLiteral:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        bits_and_order,
        st.integers(0, 40),
        st.integers(0, 150),
        st.booleans(),
        st.booleans(),
        st.tuples(st.integers(0, 4), st.integers(0, 4)),
        st.integers(0, 2**32 - 1),
    )
    def test_pack_and_unpack(self, kind, rows, n, transposed, codes_transposed, how, seed):
        bits, order = kind
        plain = np.random.default_rng(seed).integers(0, 2**bits, (rows, n), dtype=np.uint8)
        packed = literal_pack(plain, bits, order)
        codes = torch.from_numpy(plain.T.copy() if codes_transposed else plain)
        stored = torch.from_numpy(packed.T.copy() if transposed else packed)
        flags = {
            "transposed": transposed,
            "codes_transposed": codes_transposed,
            "order": order,
        }
        given_codes, given_words = strided(codes, how[0]), strided(stored, how[1])

        assert torch.equal(pack(given_codes, bits, **flags), stored)
        assert torch.equal(unpack(given_words, bits, n, **flags), codes)
        assert torch.equal(given_codes, codes)
        assert torch.equal(given_words, stored)

        to_words = strided(torch.full_like(stored, -1), how[1])
        to_codes = strided(torch.full_like(codes, 255), how[0])
        assert pack(given_codes, bits, **flags, out=to_words) is to_words
        assert unpack(given_words, bits, n, **flags, out=to_codes) is to_codes
        assert torch.equal(to_words, stored)
        assert torch.equal(to_codes, codes)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        st.one_of(st.just(tuple(range(8))), st.just(AWQ), st.permutations(range(8)).map(tuple)),
        st.integers(1, 12),
        st.integers(1, 12),
        st.tuples(st.integers(0, 4), st.integers(0, 4)),
        st.integers(0, 2**32 - 1),
    )
    def test_row_words_in_every_form(self, order, down, across, how, seed):
        plain = np.random.default_rng(seed).integers(0, 16, (8 * across, 8 * down), dtype=np.uint8)
        rows = torch.from_numpy(literal_pack(plain, 4, ()))
        forms = {
            Form(Kind.ROWS): rows,
            Form(Kind.COLUMNS): rows.t().contiguous(),
            Form(Kind.TILES, order): torch.from_numpy(literal_pack(plain.T, 4, order)),
        }
        for one, source in forms.items():
            for two, target in forms.items():
                given_words = strided(source, how[0])
                out = strided(torch.zeros_like(target), how[1])
                translate(one, two, given_words, out, len(plain))
                assert torch.equal(out, target), (one, two)
                assert torch.equal(given_words, source)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_columns_of_other_bits(bits: int) -> None:
    plain = np.random.default_rng(bits).integers(0, 2**bits, (40, 1056), dtype=np.uint8)
    rows = torch.from_numpy(literal_pack(plain, bits, ()))
    found = torch.zeros_like(rows)
    translate(Form(Kind.COLUMNS), Form(Kind.ROWS), rows.t().contiguous(), found, 40)
    assert torch.equal(found, rows)


@pytest.mark.parametrize("shape", [(416, 1056), (1056, 416), (130, 8224)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shares_large_matrices_among_threads(shape: tuple[int, int], bits: int) -> None:
    before = torch.get_num_threads()
    plain = np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = torch.from_numpy(literal_pack(plain, bits, ()))
    codes = torch.from_numpy(plain)
    for transposed in (False, True):
        stored = packed.t().contiguous() if transposed else packed
        assert torch.equal(pack(codes, bits, transposed=transposed), stored)
        assert torch.equal(unpack(stored, bits, shape[1], transposed=transposed), codes)
    flags = {"transposed": False, "codes_transposed": True}
    turned = codes.t().contiguous()
    assert torch.equal(pack(turned, bits, **flags), packed)
    assert torch.equal(unpack(packed, bits, shape[1], **flags), turned)
    assert torch.get_num_threads() == before


def test_large_words_equal_unpack_and_pack() -> None:
    words_down = torch.randint(-(2**31), 2**31, (160, 2080), dtype=torch.int32)
    codes = unpack(words_down, 4, 1280, transposed=True)
    along = pack(codes, 4, transposed=False, codes_transposed=True, order=AWQ)
    columns, tiled = Form(Kind.COLUMNS), Form(Kind.TILES, AWQ)
    there, back = torch.zeros_like(along), torch.zeros_like(words_down)
    translate(columns, tiled, words_down, there, 2080)
    translate(tiled, columns, along, back, 2080)
    assert torch.equal(there, along)
    assert torch.equal(back, words_down)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("codes_transposed", [False, True])
def test_a_code_that_does_not_fit_is_refused(bits: int, codes_transposed: bool) -> None:
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes[13, 57] = 2**bits
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=f"found code {2**bits}"):
        pack(codes, bits, transposed=True, codes_transposed=codes_transposed)
    assert torch.get_num_threads() == before


def test_a_failure_in_any_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_LEAST", 64)
    monkeypatch.setattr(words, "_BLOCK", 64)
    codes = torch.zeros(4096, 32, dtype=torch.uint8)
    codes[4000:] = 16
    running = threading.active_count()
    with pytest.raises(ValueError, match="found code 16"):
        pack(codes, 4, transposed=True)
    assert threading.active_count() == running


@pytest.fixture
def eight_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def in_threads(count: int, call: Callable[[], object]) -> None:
    """Call it in new threads at once."""
    started = [threading.Thread(target=call) for _ in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


@pytest.mark.usefixtures("eight_threads")
def test_decoding_in_several_threads_keeps_their_number_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "_BLOCK", 1 << 13)
    monkeypatch.setattr(words, "_LEAST", 1 << 13)
    stored = torch.randint(-(2**31), 2**31, (256, 128), dtype=torch.int32)
    expected = unpack(stored, 4, 1024, transposed=False)
    seen: list[int] = []

    def decode() -> None:
        for _ in range(10):
            same = torch.equal(unpack(stored, 4, 1024, transposed=False), expected)
            seen.append(torch.get_num_threads() if same else -1)

    in_threads(4, decode)
    assert seen == [8] * 40
    in_threads(1, lambda: seen.append(torch.get_num_threads()))
    assert seen[-1] == torch.get_num_threads() == 8


@pytest.mark.usefixtures("eight_threads")
def test_a_block_is_computed_with_torchs_threads_off_and_nothing_else_is() -> None:
    inside: list[int] = []
    outside: list[int] = []

    def kernel(first: Tensor, second: Tensor) -> None:
        torch.ones(1 << 20).add_(1)  # a thread takes the process's number at its first such call
        inside.append(torch.get_num_threads())
        in_threads(1, lambda: outside.append(torch.get_num_threads()))

    matrix = torch.zeros(64, 1)
    rows = [(slice(i, i + 1), slice(0, 1)) for i in range(64)]
    threads.share(lambda *_: kernel, matrix, matrix, [(row, row) for row in rows])
    assert inside == [1] * 64
    assert outside == [8] * 64


def test_wrong_arguments_are_refused() -> None:
    stored = torch.zeros(4, 4, dtype=torch.int32)
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows of 4 words, expected 3"):
        unpack(stored, 4, 24, transposed=False)
    with pytest.raises(ValueError, match="bits = 9"):
        pack(codes, 9, transposed=False)
    with pytest.raises(ValueError, match="does not permute the 3-bit"):
        pack(codes, 3, transposed=False, order=AWQ)
    with pytest.raises(ValueError, match="does not permute the 4-bit"):
        unpack(stored, 4, 32, transposed=False, order=(0, 0, 1, 2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match="expected a matrix of"):
        unpack(stored.to(torch.int64), 4, 32, transposed=False)
    with pytest.raises(ValueError, match="out is"):
        unpack(stored, 4, 32, transposed=False, out=codes.t())

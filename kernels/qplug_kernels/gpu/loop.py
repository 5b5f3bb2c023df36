"""What the loops of all small-M kernels share: planes of codes, their products, the ordered sum.

A program multiplies a tile of BN outputs by BM tokens over its share of the tiles of K, with the
weights as left operand: `acc [BN, BM]`. Another kernel reuses it so:

    value = decode(w0, w1, w2, z, ...)        # a tuple of planes [BN, KP], or its own
    acc += products(value, x_pointers, ...) * scale[:, None]
    finish(acc, ...)                          # split-K: partial sums, last arriver adds in order

`WIDE` is true in the interpreter, which knows no bfloat16: values are float32 there and so is the
result, which the launcher rounds.
"""

from __future__ import annotations

from .asm import as_float, twin
from .compat import jit, tl


@jit
def decode(
    w0, w1, w2, z, BITS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, TEXTS: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return COUNT planes `[BN, KP]` from FIRST on: by a text of `asm`, or its twin if none.

    TEXTS has one for every COUNT planes.
    """
    if CONSTRAINTS == "":
        return twin(w0, w1, w2, z, BITS, FIRST, COUNT, DTYPE, WIDE)
    else:
        return assemble(w0, w1, w2, z, COUNT, DTYPE, TEXTS, FIRST // COUNT, CONSTRAINTS)


@jit
def assemble(
    a, b, c, d, COUNT: tl.constexpr, DTYPE: tl.constexpr, TEXTS: tl.constexpr, N: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return COUNT outputs of text N with four inputs, all of 16 bits, two to a register.

    The texts come as a tuple: before 3.9, one taken out of it could not be passed on. Tuples of
    dtypes are written out, and as plain integers: Triton takes no computed ones.
    """
    if COUNT == 1:
        v = (
            tl.inline_asm_elementwise(
                TEXTS[N], CONSTRAINTS, [a, b, c, d], dtype=tl.int16, is_pure=True, pack=2
            ),
        )
    elif COUNT == 2:
        v = tl.inline_asm_elementwise(
            TEXTS[N], CONSTRAINTS, [a, b, c, d], dtype=(tl.int16, tl.int16), is_pure=True, pack=2
        )
    elif COUNT == 4:
        v = tl.inline_asm_elementwise(
            TEXTS[N], CONSTRAINTS, [a, b, c, d], dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif COUNT == 8:
        v = tl.inline_asm_elementwise(
            TEXTS[N], CONSTRAINTS, [a, b, c, d],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        v = tl.inline_asm_elementwise(
            TEXTS[N], CONSTRAINTS, [a, b, c, d],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                   tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    planes = ()
    for n in tl.static_range(COUNT):
        planes = planes + (v[n].to(DTYPE, bitcast=True),)  # type: ignore[assignment]
    return planes


@jit
def zero_of(
    word, w0, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Return magic + zero `[BN, KP]` out of scale words; texts of symmetric grids take anything."""
    if not SYMMETRIC:
        high = as_float((word >> 16).to(tl.int16), DTYPE, WIDE)
        return high[:, None].broadcast_to(BN, KP)
    elif CONSTRAINTS == "":
        magic: tl.constexpr = 1024 if DTYPE == tl.float16 else (0 if BITS == 8 else 128)
        return tl.full((BN, KP), magic + (1 << (BITS - 1)), tl.float32 if WIDE else DTYPE)
    else:
        return w0


@jit
def apart(word, COUNT: tl.constexpr, BN: tl.constexpr):
    """Return `[BN, COUNT]` as a tuple of columns."""
    if COUNT == 1:
        return (word.reshape(BN),)
    else:
        even, odd = tl.split(word.reshape(BN, COUNT // 2, 2))
        a, b = apart(even, COUNT // 2, BN), apart(odd, COUNT // 2, BN)
        columns = ()
        for n in tl.static_range(COUNT // 2):
            columns = columns + (a[n], b[n])  # type: ignore[assignment]
        return columns


@jit
def joined(v, COUNT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr):
    """Return planes side by side, `[BN, COUNT * KP]`; compiles to a renaming of registers.

    Of each pair of halves, the plane's lowest bit is the axis joined last.
    """
    if COUNT == 1:
        return v[0]
    elif COUNT == 2:
        return tl.join(v[0], v[1]).permute(0, 2, 1).reshape(BN, 2 * KP)
    elif COUNT == 4:
        even, odd = tl.join(v[0], v[2]), tl.join(v[1], v[3])
        return tl.join(even, odd).permute(0, 2, 3, 1).reshape(BN, 4 * KP)
    elif COUNT == 8:
        a, b = tl.join(v[0], v[4]), tl.join(v[2], v[6])
        c, d = tl.join(v[1], v[5]), tl.join(v[3], v[7])
        both = tl.join(tl.join(a, b), tl.join(c, d))
        return both.permute(0, 2, 3, 4, 1).reshape(BN, 8 * KP)
    else:
        a, b = tl.join(v[0], v[8]), tl.join(v[4], v[12])
        c, d = tl.join(v[2], v[10]), tl.join(v[6], v[14])
        e, f = tl.join(v[1], v[9]), tl.join(v[5], v[13])
        g, h = tl.join(v[3], v[11]), tl.join(v[7], v[15])
        even = tl.join(tl.join(a, b), tl.join(c, d))
        odd = tl.join(tl.join(e, f), tl.join(g, h))
        return tl.join(even, odd).permute(0, 2, 3, 4, 5, 1).reshape(BN, 16 * KP)


@jit
def load_x(pointers, order, rows, k, K, EVEN_K: tl.constexpr, GATHER: tl.constexpr):
    """Return `[BM, n]` of the activations at inputs `k [n]`; 0 beyond the last token and input.

    `pointers` are those of inputs `k`, or with GATHER of input 0, and `order[k]` is the input at
    place k, -1 where there is none.
    """
    if GATHER:
        at = tl.load(order + k)
        return tl.load(pointers + at[None, :], mask=rows[:, None] & (at >= 0)[None, :], other=0.0)
    elif EVEN_K:
        return tl.load(pointers, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=rows[:, None] & (k < K)[None, :], other=0.0)


@jit
def wide(values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return activations as they are multiplied."""
    if WIDE:
        return values.to(tl.float32)
    else:
        return values


@jit
def products(
    v, x, order, rows, k, K, COUNT: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr, GATHER: tl.constexpr,
    JOINED: tl.constexpr, acc=None,
):  # fmt: skip
    """Return `[BN, BM]` in float32: COUNT planes times the activations from input `k` on.

    `x` are pointers `[BM, reach]` of the inputs from `k` on (with GATHER `[BM, 1]` of input 0):
    whole pointers carried through the loop, so that what is added to them is folded into the loads.
    They are added to `acc`; none costs nothing: the first product then adds to the zero register.
    """
    at = reach(COUNT, KP, JOINED)
    value = wide(load_x(x, order, rows, k + at, K, EVEN_K, GATHER), DTYPE, WIDE)
    if JOINED:
        return tl.dot(joined(v, COUNT, BN, KP), value.T, acc)
    else:
        p = tl.dot(v[0], value.T, acc)
        for n in tl.static_range(1, COUNT):
            here = x if GATHER else x + n * KP
            value = load_x(here, order, rows, k + n * KP + at, K, EVEN_K, GATHER)
            p = tl.dot(v[n], wide(value, DTYPE, WIDE).T, p)
        return p


@jit
def reach(COUNT: tl.constexpr, KP: tl.constexpr, JOINED: tl.constexpr):
    """Return the inputs of one load of activations, from the first of COUNT planes on."""
    return tl.arange(0, COUNT * KP if JOINED else KP)


@jit
def share(tiles, splits, split):
    """Return the first tile of a split and the one after its last: none if that is before."""
    each = (tiles + splits - 1) // splits
    return split * each, tl.minimum(split * each + each, tiles)


@jit
def store_result(
    acc, y, bias, tokens, outputs, M, N, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add the bias, round, and store `acc [BN, BM]` as `y[tokens, outputs]`."""
    inside = outputs < N
    if BIAS:
        added = tl.load(bias + outputs, mask=inside, other=0.0)
        acc += added.to(tl.float32)[:, None]
    at = tokens.to(tl.int64)[None, :] * N + outputs[:, None]
    mask = (tokens < M)[None, :] & inside[:, None]
    tl.store(y + at, acc if WIDE else acc.to(DTYPE), mask=mask)


@jit
def finish(
    acc, y, bias, partial, count, tile, split, splits, tokens, outputs, M, N,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    DTYPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store the result; with SPLIT, the last of a tile's programs to arrive adds all in order.

    Sums are the same whatever the order of arrival. `partial` holds `splits` times `[BN, BM]`
    float32 for each `tile`, `count` one int32, zero before and after.
    """
    if not SPLIT:
        store_result(acc, y, bias, tokens, outputs, M, N, BIAS, DTYPE, WIDE)
    else:
        at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        mask = ((tokens < M)[None, :] & (outputs < N)[:, None]) & (at >= 0)
        mine = partial + (tile.to(tl.int64) * splits + split) * (BN * BM)
        tl.store(mine + at, acc, mask=mask)
        # One thread counts, all threads have stored: Triton 3.6 adds this barrier, others may not.
        tl.debug_barrier()
        if tl.atomic_add(count + tile, 1, sem="acq_rel", scope="gpu") == splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for other in range(0, splits):
                theirs = partial + (tile.to(tl.int64) * splits + other) * (BN * BM)
                # .cg: another multiprocessor wrote it, the first-level cache may know an older one.
                total += tl.load(theirs + at, mask=mask, other=0.0, cache_modifier=".cg")
            store_result(total, y, bias, tokens, outputs, M, N, BIAS, DTYPE, WIDE)
            tl.store(count + tile, 0)

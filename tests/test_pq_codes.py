# SPDX-License-Identifier: Apache-2.0
"""Packed codes, hashes and digits: against their definitions, and what each refuses."""

import numpy as np
import pytest
from cases import LAYOUTS, assert_same, laid_out

from pentad import _C, pq
from pentad.pq import lookup_reference

torch = pytest.importorskip("torch")

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")

# --- Bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", range(1, 17))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 17, 128])
@pytest.mark.parametrize("n", [0, 1, 33, 9000])
def test_packing_and_back(rng, nbits, count, n):
    if n * count > 200_000:
        n = 5000  # two pieces
    codes = rng.integers(0, 1 << nbits, (n, count))
    packed = pq.pack_codes(codes, nbits)
    assert_same(packed, lookup_reference.pack_codes(codes, nbits))
    back = pq.unpack_codes(packed, nbits, count)
    assert_same(back, codes.astype(np.uint8 if nbits <= 8 else np.int32))


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_dtypes_and_kinds(rng, layout, dtype):
    codes = rng.integers(0, 32, (3, 4, 7)).astype(dtype)
    want = pq.pack_codes(codes, 5)
    assert want.shape == (3, 4, 5)
    other = laid_out(codes, layout)
    assert_same(pq.pack_codes(other, 5), want)
    assert_same(pq.unpack_codes(laid_out(want, layout), 5, 7), codes.astype(np.uint8))
    packed = pq.pack_codes(torch.from_numpy(codes), 5)
    assert_same(packed.numpy(), want)
    assert_same(pq.unpack_codes(packed, 5, 7).numpy(), codes.astype(np.uint8))


@pytest.mark.parametrize("bad", [16, -1])
def test_a_code_that_does_not_fit_is_named(bad):
    codes = np.zeros((9000, 3), np.int16)
    codes[8998, 2] = bad
    with pytest.raises(ValueError, match=rf"\[pq.pack_codes\] codes hold {bad} in row 8998"):
        pq.pack_codes(codes, 4)


@pytest.mark.parametrize("nbits", [0, 17, -1])
def test_other_numbers_of_bits(nbits):
    with pytest.raises(ValueError, match=f"nbits is {nbits}"):
        pq.pack_codes(np.zeros((1, 1), int), nbits)
    with pytest.raises(ValueError, match=f"nbits is {nbits}"):
        pq.unpack_codes(np.zeros((1, 1), np.uint8), nbits, 1)
    with pytest.raises(ValueError, match=f"nbits is {nbits}, expected 1 to 16"):
        _C.pq_pack_codes(np.zeros((1, 1), int), nbits, np.zeros((1, 1), np.uint8))


def test_refusals_of_packing():
    with pytest.raises(TypeError, match="codes has dtype float64"):
        pq.pack_codes(np.zeros((1, 1)), 4)
    with pytest.raises(TypeError, match="packed has dtype int64"):
        pq.unpack_codes(np.zeros((1, 1), int), 4, 1)
    with pytest.raises(TypeError, match=r"nbits is 4\.5"):
        pq.pack_codes(np.zeros((1, 1), int), 4.5)
    with pytest.raises(ValueError, match="expected 2 columns, as 3 codes of 4 bits take"):
        pq.unpack_codes(np.zeros((5, 3), np.uint8), 4, 3)
    with pytest.raises(ValueError, match="packed has the wrong shape"):
        _C.pq_pack_codes(np.zeros((2, 3), int), 4, np.zeros((2, 1), np.uint8))
    with pytest.raises(ValueError, match="packed has shape"):
        _C.pq_unpack_codes(np.zeros((2, 1), np.uint8), 4, np.zeros((2, 3), np.uint8))


# --- Hashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_hashes_have_the_definition(rng, dtype):
    ids = rng.integers(0, 127, (5, 7)).astype(dtype)
    if np.iinfo(dtype).min < 0:
        ids[0] = -ids[0]
    seeds, sizes = [0, 1, -5, 2**64 - 1], [1, 7, 1000, 2**31 - 1]
    want = lookup_reference.hash_codes(ids.astype(np.int64), seeds, sizes)
    assert want.shape == (5, 7, 4)
    assert_same(pq.hash_codes(ids, seeds, sizes), want)
    assert_same(pq.hash_codes(np.asfortranarray(ids), seeds, sizes), want)
    assert_same(pq.hash_codes(torch.from_numpy(ids), seeds, sizes).numpy(), want)
    assert (want >= 0).all()
    assert (want < sizes).all()


def test_hashes_are_even_and_differ_between_seeds():
    """Multiples of a power of two are the classic failure of a bare product."""
    for ids in (np.arange(100_000), np.arange(100_000) << 20):
        rows = pq.hash_codes(ids, [3, 4], 100)
        counts = np.stack([np.bincount(rows[:, m], minlength=100) for m in range(2)])
        # 1000 in each on average; six standard deviations of a binomial
        assert np.abs(counts - 1000).max() < 6 * np.sqrt(1000)
        assert np.abs((rows[:, 0] == rows[:, 1]).sum() - 1000) < 6 * np.sqrt(1000)


def test_refusals_of_hashes():
    ids = np.arange(3)
    with pytest.raises(TypeError, match="ids has dtype float64"):
        pq.hash_codes(ids * 1.0, [0], [5])
    with pytest.raises(ValueError, match="2 seeds but 1 sizes"):
        pq.hash_codes(ids, [0, 1], [5])
    with pytest.raises(ValueError, match="sizes is 0, expected at least 1"):
        pq.hash_codes(ids, [0], [0])
    with pytest.raises(ValueError, match="expected at most 2147483647"):
        pq.hash_codes(ids, [0], 2**31)
    with pytest.raises(ValueError, match="seeds hold 18446744073709551616"):
        pq.hash_codes(ids, [2**64], 5)
    with pytest.raises(TypeError, match=r"seeds hold 0\.5"):
        pq.hash_codes(ids, [0.5], 5)
    with pytest.raises(TypeError, match=r"\[pq.hash_codes\] seeds is 0, expected a sequence"):
        pq.hash_codes(ids, 0, 5)
    with pytest.raises(ValueError, match="sizes hold 0"):
        _C.pq_hash_codes(ids, [0], [0], np.zeros((3, 1), np.int64))
    with pytest.raises(ValueError, match="out has the wrong shape"):
        _C.pq_hash_codes(ids, [0], [5], np.zeros((2, 1), np.int64))


# --- Digits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("sizes", [[100], [7, 15], [3, 1, 5, 7]])
def test_digits_are_those_of_a_mixed_radix(dtype, sizes):
    ids = np.arange(min(np.prod(sizes), 128)).astype(dtype)
    want = np.stack(np.unravel_index(ids.astype(int), sizes, order="F"), -1)
    assert_same(pq.quotient_remainder(ids, sizes), want)
    assert_same(pq.quotient_remainder(torch.from_numpy(ids), sizes).numpy(), want)
    assert len({tuple(row) for row in want.tolist()}) == len(ids)
    assert pq.quotient_remainder(ids[:0].reshape(2, 0), sizes).shape == (2, 0, len(sizes))


@pytest.mark.parametrize("bad", [12, -1, 2**63 - 1, -(2**63)])
def test_an_id_that_the_sizes_do_not_hold_is_named(bad):
    ids = np.zeros(9000, np.int64)
    ids[8500] = ids[8999] = bad
    message = rf"\[pq.quotient_remainder\] ids hold {bad} in place 8500, expected 0 to 11"
    with pytest.raises(ValueError, match=message):
        pq.quotient_remainder(ids, [4, 3])
    if bad > 12:  # more than int64 holds in all
        assert (pq.quotient_remainder(ids[8500:8501], [2**31 - 1] * 3)[0] >= 0).all()


def test_refusals_of_digits():
    with pytest.raises(ValueError, match="sizes are empty"):
        pq.quotient_remainder(np.arange(3), [])
    with pytest.raises(ValueError, match="sizes is -1"):
        pq.quotient_remainder(np.arange(3), [4, -1])
    with pytest.raises(TypeError, match=r"\[pq.quotient_remainder\] sizes is 4, expected a seq"):
        pq.quotient_remainder(np.arange(3), 4)
    with pytest.raises(TypeError, match="ids has dtype bool"):
        pq.quotient_remainder(np.ones(3, bool), [4])


# --- As torch sees them ---------------------------------------------------------------------------


def test_operators():
    from pentad.pq import codes_ops

    codes = torch.randint(0, 8, (5, 3))
    torch.library.opcheck(codes_ops.pack, (codes, 3))
    torch.library.opcheck(codes_ops.unpack, (codes_ops.pack(codes, 3), 3, 3))
    torch.library.opcheck(codes_ops.unpack, (torch.zeros(5, 4, dtype=torch.uint8), 10, 3))
    torch.library.opcheck(codes_ops.hash_ids, (codes.view(-1), [1, -1], [5, 6]))
    torch.library.opcheck(codes_ops.digits, (codes.view(-1), [4, 2]))
    assert pq.hash_codes(codes.to("meta"), [1], 5).shape == (5, 3, 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()

    def call(ids):
        codes = pq.quotient_remainder(ids, [4, 4])
        packed = pq.pack_codes(codes, 2)
        return pq.unpack_codes(packed, 2, 2), pq.hash_codes(ids, [0, 2**63], [9, 8])

    ids = torch.arange(16).view(4, 4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for got, want in zip(compiled(ids), call(ids), strict=True):
        assert torch.equal(got, want)

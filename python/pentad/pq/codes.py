# SPDX-License-Identifier: Apache-2.0
"""Codes as integers: packed into bits, hashed, and ids taken apart. Nothing has a gradient."""

import math
import operator

import numpy as np

from pentad import _C
from pentad._arrays import is_numpy, on_device
from pentad._checks import check_count, check_counts, check_dtype, check_sequence
from pentad.pq.lookup import INTEGERS

_MOST_BITS = 16
_MOST_SIZE = 2**31 - 1


# --- Bits -----------------------------------------------------------------------------------------


def pack_codes(codes, nbits):
    """Pack codes of `nbits` bits next to each other.

    Code m of a row takes the bits ``[m * nbits, (m + 1) * nbits)``, lowest first, where bit b of a
    row is bit ``b % 8`` of its byte ``b // 8``; what remains of the last byte is zero. Two codes
    of 4 bits share a byte, the first in its lower half, as in faiss.

    Parameters
    ----------
    codes : (..., M) of any integer dtype
        0 to ``2**nbits - 1``.
    nbits : int
        1 to 16.

    Returns
    -------
    (..., ceil(M * nbits / 8)) uint8

    Raises
    ------
    ValueError
        For a code that `nbits` bits do not hold. (On a CUDA device, where codes are not looked
        at, its low bits are packed.)

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.pack_codes(np.array([[1, 2, 15]]), 4)
    array([[33, 15]], dtype=uint8)
    """
    op = "pq.pack_codes"
    numpy = is_numpy(op, cuda=True, codes=codes)
    check_dtype(op, "codes", codes, INTEGERS)
    nbits = _check_bits(op, nbits)
    if codes.ndim < 1:
        raise ValueError(f"[{op}] codes have no dimension")
    lead = tuple(codes.shape[:-1])
    rows = codes.reshape(math.prod(lead), codes.shape[-1])
    if numpy:
        packed = np.empty((len(rows), -(-rows.shape[1] * nbits // 8)), np.uint8)
        _C.pq_pack_codes(rows, nbits, packed, *on_device(rows))
    else:
        from pentad.pq import codes_ops

        packed = codes_ops.pack(rows, nbits)
    return packed.reshape(*lead, packed.shape[-1])


def unpack_codes(packed, nbits, M):
    """Unpack what `pack_codes` packed.

    Parameters
    ----------
    packed : (..., ceil(M * nbits / 8)) uint8
    nbits : int
        1 to 16.
    M : int
        Codes of a row.

    Returns
    -------
    (..., M) uint8, or int32 for more than 8 bits

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.unpack_codes(np.array([[33, 15]], np.uint8), 4, 3)
    array([[ 1,  2, 15]], dtype=uint8)
    """
    op = "pq.unpack_codes"
    numpy = is_numpy(op, cuda=True, packed=packed)
    check_dtype(op, "packed", packed, ("uint8",))
    nbits, columns = _check_bits(op, nbits), check_count(op, "M", M)
    if packed.ndim < 1 or packed.shape[-1] != -(-columns * nbits // 8):
        raise ValueError(
            f"[{op}] packed has shape {tuple(packed.shape)}, expected "
            f"{-(-columns * nbits // 8)} columns, as {columns} codes of {nbits} bits take"
        )
    lead = tuple(packed.shape[:-1])
    rows = packed.reshape(math.prod(lead), packed.shape[-1])
    if numpy:
        codes = np.empty((len(rows), columns), np.uint8 if nbits <= 8 else np.int32)
        _C.pq_unpack_codes(rows, nbits, codes, *on_device(rows))
    else:
        from pentad.pq import codes_ops

        codes = codes_ops.unpack(rows, nbits, columns)
    return codes.reshape(*lead, columns)


def _check_bits(op, nbits):
    nbits = check_count(op, "nbits", nbits, 1)
    if nbits > _MOST_BITS:
        raise ValueError(f"[{op}] nbits is {nbits}, expected 1 to {_MOST_BITS}")
    return nbits


# --- Ids ------------------------------------------------------------------------------------------


def hash_codes(ids, seeds, sizes):
    """Hash ids into table rows, once for each seed.

    ``((h >> 32) * size) >> 32`` for ``h = mix(id + mix(seed + 0x9e3779b97f4a7c15))`` modulo 2**64,
    mix being the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
    number generators"). With `lookup` this is the hashing trick, and with several seeds into one
    table the multi-hash embedding (Miranda et al. 2022, "Multi hash embeddings in spaCy").

    Parameters
    ----------
    ids : (...) of any integer dtype
        Negative ones too; an id hashes the same in every dtype that holds it.
    seeds : sequence of int
        Each from -2**63 to 2**64 - 1.
    sizes : int or sequence of int
        Rows of the table of each seed, or of every table: 1 to 2**31 - 1.

    Returns
    -------
    (..., len(seeds)) int64
        In column m, 0 to ``sizes[m] - 1``.

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.hash_codes(np.array([3, 4, 3]), seeds=[0, 1], sizes=1000)
    array([[484,   8],
           [290,  15],
           [484,   8]])
    """
    op = "pq.hash_codes"
    numpy = is_numpy(op, cuda=True, ids=ids)
    check_dtype(op, "ids", ids, INTEGERS)
    seeds = [_check_seed(op, seed) for seed in check_sequence(op, "seeds", seeds)]
    sizes = [sizes] * len(seeds) if hasattr(sizes, "__index__") else sizes
    sizes = _check_sizes(op, sizes)
    if len(seeds) != len(sizes):
        raise ValueError(f"[{op}] there are {len(seeds)} seeds but {len(sizes)} sizes")
    flat = ids.reshape(-1)
    if numpy:
        out = np.empty((len(flat), len(sizes)), np.int64)
        _C.pq_hash_codes(flat, seeds, sizes, out, *on_device(flat))
    else:
        from pentad.pq import codes_ops

        out = codes_ops.hash_ids(flat, [_signed(seed) for seed in seeds], sizes)
    return out.reshape(*ids.shape, len(sizes))


def quotient_remainder(ids, sizes):
    """Digits of ids in a mixed radix, lowest first: complementary partitions.

    ``digits[..., m] = ids // (sizes[0] * ... * sizes[m - 1]) % sizes[m]``. No two ids share all
    digits, so `lookup` with the digits as codes gives each its own row out of small tables (Shi et
    al. 2020, "Compositional Embeddings Using Complementary Partitions for Memory-Efficient
    Recommendation Systems", section 3.1; two sizes are its quotient-remainder trick).

    Parameters
    ----------
    ids : (...) of any integer dtype
        0 to the product of the sizes less one.
    sizes : sequence of int
        Rows of each table, 1 to 2**31 - 1.

    Returns
    -------
    (..., len(sizes)) int64

    Raises
    ------
    ValueError
        For an id that the sizes do not hold. (On a CUDA device, where ids are not looked at, it
        has some digits.)

    Examples
    --------
    >>> import numpy as np
    >>> pentad.pq.quotient_remainder(np.array([0, 7, 11]), [4, 3])
    array([[0, 0],
           [3, 1],
           [3, 2]])
    """
    op = "pq.quotient_remainder"
    numpy = is_numpy(op, cuda=True, ids=ids)
    check_dtype(op, "ids", ids, INTEGERS)
    sizes = _check_sizes(op, sizes)
    flat = ids.reshape(-1)
    if numpy:
        out = np.empty((len(flat), len(sizes)), np.int64)
        _C.pq_digits(flat, sizes, out, *on_device(flat))
    else:
        from pentad.pq import codes_ops

        out = codes_ops.digits(flat, sizes)
    return out.reshape(*ids.shape, len(sizes))


def _check_seed(op, seed):
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"[{op}] seeds hold {seed!r}, expected integers") from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"[{op}] seeds hold {seed}, expected -2**63 to 2**64 - 1")
    return seed % 2**64


def _signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def _check_sizes(op, sizes):
    sizes = check_counts(op, "sizes", sizes, 1)
    if not sizes:
        raise ValueError(f"[{op}] sizes are empty, expected at least one")
    if max(sizes) > _MOST_SIZE:
        raise ValueError(f"[{op}] sizes hold {max(sizes)}, expected at most {_MOST_SIZE}")
    return sizes

# SPDX-License-Identifier: Apache-2.0
"""The operators on codes and ids, and their shape functions."""

import torch

from pentad import _C
from pentad._arrays import on_device
from pentad._ops import define


def _empty_packed(codes, nbits):
    columns = (codes.shape[1] * nbits + 7) // 8
    return codes.new_empty((codes.shape[0], columns), dtype=torch.uint8)


def _empty_codes(packed, nbits, columns):
    dtype = torch.uint8 if nbits <= 8 else torch.int32
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


def _empty_rows(ids, sizes):
    return ids.new_empty((ids.shape[0], len(sizes)), dtype=torch.int64)


def _pack(codes, nbits):
    packed = _empty_packed(codes, nbits)
    _C.pq_pack_codes(codes, nbits, packed, *on_device(codes))
    return packed


def _unpack(packed, nbits, columns):
    codes = _empty_codes(packed, nbits, columns)
    _C.pq_unpack_codes(packed, nbits, codes, *on_device(packed))
    return codes


def _hash_ids(ids, seeds, sizes):
    out = _empty_rows(ids, sizes)
    seeds = [seed % 2**64 for seed in seeds]
    _C.pq_hash_codes(ids, seeds, sizes, out, *on_device(ids))
    return out


def _digits(ids, sizes):
    out = _empty_rows(ids, sizes)
    _C.pq_digits(ids, sizes, out, *on_device(ids))
    return out


pack = define("pq_pack_codes(Tensor codes, int nbits) -> Tensor", _pack, _empty_packed, cuda=True)
unpack = define(
    "pq_unpack_codes(Tensor packed, int nbits, SymInt columns) -> Tensor",
    _unpack,
    _empty_codes,
    cuda=True,
)
hash_ids = define(
    "pq_hash_codes(Tensor ids, int[] seeds, int[] sizes) -> Tensor",
    _hash_ids,
    lambda ids, seeds, sizes: _empty_rows(ids, sizes),
    cuda=True,
)
digits = define("pq_digits(Tensor ids, int[] sizes) -> Tensor", _digits, _empty_rows, cuda=True)

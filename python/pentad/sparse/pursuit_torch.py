# SPDX-License-Identifier: Apache-2.0
"""Matching pursuit of torch tensors: the rows are chosen first, then the path is differentiable."""

import torch

from pentad._ops import autocast_device
from pentad.sparse import pursuit
from pentad.sparse.topk import SparseCodes


def pursue(op, x, dictionary, steps, absolute, tolerance):
    wide = torch.promote_types(torch.promote_types(x.dtype, dictionary.dtype), torch.float32)
    with torch.autocast(autocast_device(x), enabled=False):
        x, dictionary = x.to(wide), dictionary.to(wide)
        with torch.no_grad():
            pursuit._check_contents(op, x, dictionary)
            picks, active = pursuit._picks(x, dictionary, steps, absolute, tolerance)
        # One gather of all rows: each would give a gradient as large as the dictionary.
        products, residual = pursuit._path(x, dictionary[picks], active)
        codes = _codes(picks, torch.stack(products, 1), active, len(dictionary))
    return codes, residual


def _codes(picks, products, active, columns):
    n = len(picks)
    keys = torch.arange(n)[:, None] * columns + picks
    keys, slot = keys[active].unique(return_inverse=True)
    values = products.new_zeros(len(keys)).index_add(0, slot, products[active])
    indptr = torch.searchsorted(keys, torch.arange(n + 1) * columns)
    return SparseCodes(indptr, (keys % columns).int(), values, columns)

# SPDX-License-Identifier: Apache-2.0
"""The torch side of `pentad.pq.assign`: its operator, and the soft form with its gradient."""

import torch

from pentad._ops import autocast_device, define
from pentad.pq.assign import assign_kernel, code_dtype


def _fake(x, codebooks, metric, form, top):
    last = () if top == 0 else (top,)
    dtype = getattr(torch, code_dtype(codebooks.shape[1]))
    return x.new_empty((*x.shape[:-1], codebooks.shape[0], *last), dtype=dtype)


assign = define(
    "pq_assign(Tensor x, Tensor codebooks, str metric, str form, SymInt top) -> Tensor",
    assign_kernel,
    _fake,
    cuda=True,
)


def soft_assign(x, codebooks, metric, temperature):
    with torch.autocast(autocast_device(x), enabled=False):
        return _soft(x, codebooks, metric, temperature)


def _soft(x, codebooks, metric, temperature):
    work = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    books = codebooks.to(work)
    parts = x.to(work).reshape(*x.shape[:-1], books.shape[0], books.shape[2])
    bias = 0
    if metric == "l2":  # up to a constant of each row, which the softmax does not see
        centre = books.detach().mean(1)
        books, parts = books - centre[:, None], parts - centre
        bias = (books**2).sum(-1)
        books = books * 2
    elif metric == "cosine":
        squares = (books**2).sum(-1, keepdim=True)
        books = books * torch.where(squares > 0, squares, 1).rsqrt()
    logits = (torch.einsum("...md,mkd->...mk", parts, books) - bias) / temperature
    return logits.softmax(-1).to(x.dtype)

# SPDX-License-Identifier: Apache-2.0
"""The raw entries of attention with arrays of any strides, and with empty ones."""

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from attention_raw import (
    DV,
    HK,
    HQ,
    OUTPUTS,
    D,
    arrays_of,
    backward,
    draw,
    draw_cached,
    draw_packed,
    draw_paged,
    forward,
    with_gradients,
    with_outputs,
)


def views_of(x):
    """The same numbers in other memory."""
    x = x.numpy()
    gaps = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    gaps[..., ::2] = x
    return {
        "contiguous": x,
        "columns": np.asfortranarray(x),
        "gaps": gaps[..., ::2],
        "reversed": np.flip(np.flip(x).copy()),
        "middle_reversed": np.flip(np.flip(x, -2).copy(), -2) if x.ndim > 1 else x,
    }


NEEDS_CONTIGUOUS = ["sink", "lse", "key_mass", "d_key_mass", "dbias", "dkey_bias", "dsink"]


@pytest.mark.parametrize("layout", ["columns", "gaps", "reversed", "middle_reversed"])
@pytest.mark.parametrize(
    ("entry", "draw_arguments"),
    [
        (forward, draw),
        (forward, draw_packed),
        (forward, draw_paged),
        (forward, draw_cached),
        (backward, draw),
        (backward, draw_packed),
    ],
)
def test_strides(entry, draw_arguments, layout):
    args = (with_outputs if entry is forward else with_gradients)(draw_arguments())
    strided = dict(args)
    for name in arrays_of(args):
        whole = name in NEEDS_CONTIGUOUS
        strided[name] = args[name].clone() if whole else views_of(args[name])[layout]
    for got, want in zip(entry(strided), entry(args), strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entry", [forward, backward])
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_inputs_that_are_broadcast(entry, dims):
    make = with_outputs if entry is forward else with_gradients
    args, names = make(draw()), ["q", "k", "v", "key_bias", "d_out", "d_lse"]
    broadcast, plain = dict(args), dict(args)
    for name in (n for n in names if n in args):
        x = args[name]
        for d in dims:
            if d < x.ndim:
                x = x.narrow(d, 0, 1)
        broadcast[name] = x.expand(args[name].shape)
        plain[name] = broadcast[name].contiguous()
    for name in OUTPUTS:
        if name in args:
            plain[name] = args[name].clone()
    for got, want in zip(entry(broadcast), entry(plain), strict=True):
        assert torch.equal(got, want)


def test_index_arrays_of_any_strides():
    args = with_outputs(draw_packed())
    want = [x.clone() for x in forward(args)]
    cu_q, cu_k = args["cu_seqlens_q"].numpy(), args["cu_seqlens_k"].numpy()
    args |= {"cu_seqlens_q": np.flip(np.flip(cu_q).copy()), "cu_seqlens_k": cu_k.repeat(2)[::2]}
    for got, expected in zip(forward(args), want, strict=True):
        assert torch.equal(got, expected)
    args = with_outputs(draw_paged())
    want = [x.clone() for x in forward(args)]
    table = args["block_table"].numpy()
    args |= {
        "block_table": np.asfortranarray(table),
        "k_lengths": np.flip(np.flip(args["k_lengths"].numpy()).copy()),
    }
    for got, expected in zip(forward(args), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sizes", list(itertools.product([0, 2], [0, 3], [0, 4])))
def test_nothing_to_do(sizes):
    """Empty batches, queries and keys: the outputs that exist are those of rows without keys."""
    b, nq, nk = sizes
    args = draw() | {
        "q": torch.randn(b, HQ, nq, D),
        "k": torch.randn(b, HK, nk, D),
        "v": torch.randn(b, HK, nk, DV),
        "bias": torch.randn(1, HQ, nq, nk),
        "key_bias": torch.randn(b, HK, nk),
        "sink": None,
    }
    small = args | {"sink": torch.randn(HQ)}
    out, lse, mass = forward(with_outputs(small) | {"sink": None})
    gradients = backward(with_gradients(small) | {"sink": None, "dsink": None})
    assert not any((x == 7).any() for x in (out, lse, mass, *gradients))
    if nk == 0:
        assert not out.any()
        assert (lse == -torch.inf).all()
    if b * nq * nk == 0:
        assert not mass.any()
        assert not any(x.any() for x in gradients)

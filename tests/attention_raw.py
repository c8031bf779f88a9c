# SPDX-License-Identifier: Apache-2.0
"""Arguments for the raw entries of attention, by name."""

import math

import torch

from pentad import _C
from pentad._arrays import on_device

B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 6, 9, 5, 3
SCALARS = ["scale", "softcap", "left", "right", "top_left", "dropout", "seed"]
ADDED = ["bias", "key_bias", "alibi", "sink", "cu_seqlens_q", "cu_seqlens_k"]
CACHES = ["k_lengths", "cache_rows", "left_pad", "block_table"]
FORWARD = ["q", "k", "v", "out", "lse", "key_mass", *ADDED, *CACHES, "mask", *SCALARS]
WRITTEN = ["dq", "dk", "dv", "dbias", "dkey_bias", "dsink"]
BACKWARD = ["q", "k", "v", "out", "lse", "d_out", "d_lse", "d_key_mass", *WRITTEN, *ADDED, "mask"]
BACKWARD += SCALARS
APPEND = ["k_new", "v_new", "k_cache", "v_cache", "cache_lengths", *CACHES[1:]]
OUTPUTS = ["out", "lse", "key_mass", *WRITTEN, "k_cache", "v_cache"]


def options(**given):
    plain = {"scale": 0.4, "softcap": 0.0, "left": -1, "right": -1, "top_left": False}
    return plain | {"dropout": 0.0, "seed": None} | given


def draw(dtype=torch.float32, *, masked=False):
    """Arguments of one call with every array of a dense problem."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    args = {
        "q": torch.randn(B, HQ, SQ, D, dtype=dtype),
        "k": torch.randn(B, HK, SK, D, dtype=dtype),
        "v": torch.randn(B, HK, SK, DV, dtype=dtype),
        "bias": torch.randn(1, HQ, SQ, SK, dtype=small),
        "key_bias": torch.randn(B, HK, SK, dtype=small),
        "alibi": torch.rand(HQ, dtype=small),
        "sink": torch.randn(HQ, dtype=small),
    }
    if masked:
        args["mask"] = (4, 4, *mask_lists())
    return args | options()


def mask_lists():
    """Blocks of 4 x 4 on 6 x 9: (0, 0) full, (0, 2) partial, (1, 1) full."""
    i32 = torch.int32
    return [
        torch.tensor([[[0, 2, 3]]]),
        torch.tensor([0, 2, 1], dtype=i32),
        torch.tensor([-1, 0, -1], dtype=i32),
        torch.tensor([[[0, 1, 2, 3]]]),
        torch.tensor([0, 1, 0], dtype=i32),
        torch.tensor([-1, -1, 0], dtype=i32),
        torch.eye(4, dtype=torch.uint8)[None].contiguous(),
    ]


def draw_packed(dtype=torch.float32):
    args = draw(dtype)
    del args["bias"]
    return args | {
        "q": torch.randn(7, HQ, D, dtype=dtype),
        "k": torch.randn(11, HK, D, dtype=dtype),
        "v": torch.randn(11, HK, DV, dtype=dtype),
        "key_bias": torch.randn(HK, 11, dtype=args["key_bias"].dtype),
        "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 6, 11]),
    }


def draw_paged():
    args = draw()
    del args["key_bias"], args["bias"]
    return args | {
        "k": torch.randn(5, HK, 4, D),
        "v": torch.randn(5, HK, 4, DV),
        "k_lengths": torch.tensor([7, 4]),
        "block_table": torch.tensor([[3, 0, -9], [1, 777, -9]], dtype=torch.int32),
    }


def draw_cached():
    args = draw_paged()
    del args["block_table"]
    return args | {
        "k": torch.randn(3, HK, 8, D),
        "v": torch.randn(3, HK, 8, DV),
        "cache_rows": torch.tensor([2, 0], dtype=torch.int32),
        "left_pad": torch.tensor([1, 0]),
    }


def draw_append(**given):
    args = {
        "k_new": torch.randn(B, HK, 3, D),
        "v_new": torch.randn(B, HK, 3, DV),
        "k_cache": torch.full((5, HK, 4, D), 7.0),
        "v_cache": torch.full((5, HK, 4, DV), 7.0),
        "cache_lengths": torch.tensor([5, 0]),
        "block_table": torch.tensor([[3, 0, -9], [1, 777, -9]], dtype=torch.int32),
    }
    return args | given


def draw_append_rows():
    rows = torch.tensor([4, 1])
    return draw_append(cache_lengths=torch.tensor([1, 0]), block_table=None, cache_rows=rows)


def with_outputs(args):
    q, v, small = args["q"], args["v"], args["sink"].dtype
    packed = q.ndim == 3
    rows = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    keys = (v.shape[0],) if packed else (v.shape[2],)
    out = {
        "out": torch.full((*q.shape[:-1], v.shape[-1]), 7.0, dtype=q.dtype),
        "lse": torch.full(rows, 7.0, dtype=small),
    }
    if args.get("k_lengths") is None:
        out["key_mass"] = torch.full((*rows[:-1], *keys), 7.0, dtype=small)
    return args | out


def with_gradients(args):
    args = with_outputs(args)
    mass = args.pop("key_mass")
    names = ["q", "k", "v", "bias", "key_bias", "sink"]
    given = [n for n in names if args.get(n) is not None]
    return args | {
        "d_out": torch.randn(args["out"].shape).to(args["q"].dtype),
        "d_lse": torch.randn_like(args["lse"]),
        "d_key_mass": torch.randn_like(mass),
        **{"d" + n: torch.full_like(args[n], 7.0) for n in given},
    }


def call(entry, names, args, *more):
    unknown = set(args) - set(names)
    assert not unknown, unknown
    entry(*(args.get(name) for name in names), *more)


def scratch(args):
    """What CUDA kernels take on top."""
    lse = args.get("lse")
    rows = math.prod(getattr(lse, "shape", (0,)))  # None, or what is refused, has none
    return on_device(torch.empty(0), _C.attention_scratch, rows)


def forward(args):
    call(_C.attention_forward, FORWARD, args, *scratch(args))
    return [args[n] for n in FORWARD if n in OUTPUTS and args.get(n) is not None]


def backward(args):
    call(_C.attention_backward, BACKWARD, args, *scratch(args))
    return [args[n] for n in WRITTEN if args.get(n) is not None]


def append(args):
    call(_C.attention_append, APPEND, args)
    return args["k_cache"], args["v_cache"]


def arrays_of(args):
    return [n for n, x in args.items() if torch.is_tensor(x) and x.is_floating_point()]

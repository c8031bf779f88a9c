# SPDX-License-Identifier: Apache-2.0
"""The definition of attention in plain PyTorch, with every option and the matrix written out.

The functions of `pentad.attention` are tested against it. It computes in the dtype of its
arguments, so float64 ones give the values that the others approximate; autograd differentiates it.
"""

import math

import numpy as np
import torch


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    scale=None,
    bias=None,
    key_bias=None,
    block_mask=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    generator=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    return_lse=False,
    return_key_mass=False,
    seed=None,
):
    """`pentad.attention.attention`; `seed` is that of the dropout, else drawn from `generator`."""
    if dropout_p and seed is None:
        seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator))
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "sink": sink}
    if cu_seqlens_q is None:
        b, hq, sq, _ = q.shape
        keep = dropout_mask(seed, b, hq, sq, k.shape[2], dropout_p) if dropout_p else None
        found = _attention(
            q, k, v, bias, key_bias, block_mask, alibi_slopes, keep, dropout_p, **options
        )
    else:
        q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        results = []
        for n in range(len(q_ends) - 1):
            rows, keys = slice(*q_ends[n : n + 2]), slice(*k_ends[n : n + 2])
            one_q, one_k, one_v = (
                t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys])
            )  # (1, H, S, D)
            one_bias = None if key_bias is None else key_bias[None, :, keys]
            slopes = alibi_slopes
            if slopes is not None and slopes.ndim == 2:
                slopes = slopes[n]
            keep = None
            if dropout_p:
                size = n + 1, q.shape[1], one_q.shape[2], one_k.shape[2]
                keep = dropout_mask(seed, *size, dropout_p)[n:]
            results.append(
                _attention(
                    one_q, one_k, one_v, None, one_bias, None, slopes, keep, dropout_p, **options
                )
            )
        out, lse, mass = zip(*results, strict=True) if results else ((), (), ())
        found = (
            torch.cat([o[0].transpose(0, 1) for o in out]) if out else q.new_empty(0, *v.shape[1:]),
            torch.cat([x[0] for x in lse], -1) if lse else q.new_empty(q.shape[1], 0),
            torch.cat([m[0] for m in mass], -1) if mass else q.new_empty(q.shape[1], 0),
        )
    wanted = found[0], *found[1:2] * bool(return_lse), *found[2:] * bool(return_key_mass)
    return wanted if len(wanted) > 1 else wanted[0]


def _attention(
    q, k, v, bias, key_bias, block_mask, alibi_slopes, keep, dropout_p,
    causal, window, scale, softcap, sink,
):  # fmt: skip
    b, hq, sq, d = q.shape
    sk = k.shape[2]
    group = hq // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = visible(sq, sk, causal, window, block_mask, bias).expand(b, hq, sq, sk)

    s = scores(q, k, mask) * (d**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias
    if key_bias is not None:
        s = s + key_bias.repeat_interleave(hq // key_bias.shape[1], 1)[:, :, None]
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * distance(sq, sk, causal).abs().to(s.dtype)
    s = s.masked_fill(~mask, -math.inf)

    every = s
    if sink is not None:
        every = torch.cat([s, sink[:, None, None].expand(b, hq, sq, 1).to(s.dtype)], -1)
    blind = (every == -math.inf).all(-1)  # the gradient of logsumexp is nan there
    lse = every.masked_fill(blind[..., None], 0).logsumexp(-1).masked_fill(blind, -math.inf)
    lowest = torch.nn.functional.pad(every.detach(), (0, 1), value=-math.inf)  # never empty
    top = lowest.amax(-1, keepdim=True).masked_fill(blind[..., None], 0)
    z = (every - top).exp().sum(-1, keepdim=True).masked_fill(blind[..., None], 1)
    p = ((s - top).exp() / z).masked_fill(~mask, 0)
    mass = p.sum(2)
    if keep is not None:
        p = p * keep.to(p.dtype) / (1 - dropout_p)
    out = weighted_sum(p.to(v.dtype), v, mask & ~blind[..., None])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, lse.to(wide), mass.to(wide)


def distance(sq, sk, causal=False):
    """(sq, sk): how many keys before its own position a query finds each key."""
    offset = 0 if causal == "top_left" else sk - sq
    return torch.arange(sq)[:, None] + offset - torch.arange(sk)


def visible(sq, sk, causal=False, window=None, block_mask=None, bias=None):
    """M, True where query i may see key j: (sq, sk), or of rank 4."""
    left, right = (None if n is None or n < 0 else n for n in window or (None, None))
    back = distance(sq, sk, causal)
    mask = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        right = 0
    if left is not None:
        mask &= back <= left
    if right is not None:
        mask &= back >= -right
    if block_mask is not None:
        mask = mask & block_mask.to_dense()
    if bias is not None and bias.dtype == torch.bool:
        mask = mask & bias
    return mask


# What an unseen key holds must not matter, and neither must it in the gradients: 0 * nan is not 0.
# Where something is not finite, these take the products one by one.


def scores(q, k, mask):
    """(..., Sq, Sk) of <q_i, k_j>; anything where `mask` is False."""
    if q.isfinite().all() and k.isfinite().all():
        return q @ k.transpose(-1, -2)
    seen = mask[..., None]
    return (q[..., :, None, :].where(seen, 0) * k[..., None, :, :].where(seen, 0)).sum(-1)


def weighted_sum(p, v, mask):
    """sum_j p_ij v_j over the keys j where `mask` is True."""
    if v.isfinite().all() and p.isfinite().all():
        return p @ v
    seen = mask[..., None]
    return (p[..., None].where(seen, 0) * v[..., None, :, :].where(seen, 0)).sum(-2)


def dropout_mask(seed, b, hq, sq, sk, p):
    """(b, hq, sq, sk), True where a weight is kept."""
    key_words = -(-sk // 4)
    j, i, bh = np.ogrid[:key_words, :sq, : b * hq]
    counter = (c.astype(np.uint64).T for c in np.broadcast_arrays(j, i, bh))
    words = np.stack(philox(seed, *counter, np.uint64(0)), -1)
    words = words.reshape(b, hq, sq, 4 * key_words)[..., :sk]
    return torch.from_numpy(words >= p * 2.0**32)


def philox(key, *counter):
    """Four words of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3", SC '11); all of them 32-bit numbers in uint64 arrays, the key a 64-bit int."""
    low = np.uint64(2**32 - 1)
    k0, k1 = key % 2**32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        shift = np.uint64(32)
        c0, c1, c2, c3 = (
            (b >> shift) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def decode(q, k_cache, v_cache, lengths, *, block_table=None, left_pad=None, bias=None, **options):
    """Attention of each sequence to the first `lengths[b]` keys of its cache, bottom-right aligned.

    `options` are those of `attention`.
    """
    results = []
    for n, length in enumerate(lengths):
        k, v = (
            gather(cache, n, block_table, 0 if left_pad is None else left_pad[n], length)
            for cache in (k_cache, v_cache)
        )
        own = dict(options)
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].ndim == 2:
            own["alibi_slopes"] = own["alibi_slopes"][n]
        if bias is not None:
            own["bias"] = bias.expand(len(lengths), *bias.shape[1:])[n : n + 1, ..., :length]
        results.append(attention(q[n : n + 1], k, v, return_lse=True, **own))
    out, lse = zip(*results, strict=True)
    return torch.cat(out), torch.cat(lse)


def gather(cache, n, block_table, first, length):
    """(1, H, length, D): keys or values of sequence n."""
    if block_table is None:
        return cache[n : n + 1, :, first : first + length]
    pages = cache[block_table[n].long()]  # (pages, H, page_size, D)
    return pages.transpose(0, 1).flatten(1, 2)[None, :, :length]

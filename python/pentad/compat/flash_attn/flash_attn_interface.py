# SPDX-License-Identifier: Apache-2.0
"""The functions of flash-attention 2 on CPU: its names, argument order, defaults and results.

Tensors are laid out (batch, sequence, heads, head_dim), packed sequences (total, heads, head_dim),
and go to `pentad.attention` as views. `causal` and `window_size` align the last query with the
last key, negative window sizes are no bound, a row that sees no key gives zeros and a `softmax_lse`
of +inf.

More than flash-attention 2: float32 and float64; any head_dim up to 512, another one for the
values; pages of any size; ``cu_seqlens`` of int64; a gradient through `softmax_lse`; results whose
bits are always the same, so that `deterministic` and `num_splits` have nothing to choose. The
lengths ``max_seqlen_q`` and ``max_seqlen_k`` are not needed. A length or page out of range is a
ValueError.

Differences:

- `softmax_lse` with `alibi_slopes` is that of the documented bias ``-slope * |i + Sk - Sq - j|``.
  flash-attention's causal kernels leave out the part that is constant in a row, so that its
  values are larger by ``slope * (i + Sk - Sq)``; the outputs are the same.
- `S_dmask`, returned by `return_attn_probs` for tests, holds the normalised probabilities, negative
  where dropout has dropped one, in its exact shape (batch, heads, longest Sq, longest Sk). It is
  formed only on request, in memory proportional to its size, and is None without dropout.
- Dropout draws one seed from torch's default generator for each call.
"""

import torch

from pentad.attention import apply_rotary, attention, decode

_EYE_COLUMNS = 512  # of a value tensor, the most that attention takes


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of each query to all keys of its sequence.

    Parameters
    ----------
    q : (B, Sq, H, D)
    k, v : (B, Sk, Hk, D)
        H a multiple of Hk: query head h reads head ``h // (H / Hk)``.
    dropout_p : float
        Acts whenever it is positive; pass 0 in evaluation. Not with `softcap`.
    softmax_scale : float, optional
        By default ``D ** -0.5``.
    causal : bool
    window_size : (int, int), or a tensor of two integers
        Query i sees the keys from ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)`` where it is positive.
    alibi_slopes : (H,) or (B, H) float, optional
        Adds ``-slope * |i + Sk - Sq - j|``.
    deterministic : bool
        Results are deterministic always.
    return_attn_probs : bool

    Returns
    -------
    out : (B, Sq, H, D)
    softmax_lse : (B, H, Sq) float32
        With `return_attn_probs`, as is the next.
    S_dmask : (B, H, Sq, Sk), or None where `dropout_p` is 0
    """
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of keys and values in one tensor.

    Parameters
    ----------
    q : (B, Sq, H, D)
    kv : (B, Sk, 2, Hk, D)

    Returns
    -------
    As `flash_attn_func`, whose other parameters it has.
    """
    k, v = _unbound(kv, "kv", 5, 2)
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` of queries, keys and values in one tensor.

    Parameters
    ----------
    qkv : (B, S, 3, H, D)

    Returns
    -------
    As `flash_attn_func`, whose other parameters it has.
    """
    q, k, v = _unbound(qkv, "qkv", 5, 3)
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """`flash_attn_func` of sequences that lie one after another.

    Parameters
    ----------
    q : (total_q, H, D)
    k, v : (total_k, Hk, D)
        With `block_table`: (pages, page_size, Hk, D), of which the keys in use are copied.
    cu_seqlens_q, cu_seqlens_k : (B + 1,) int32
        Sequence b is the rows ``[cu_seqlens[b], cu_seqlens[b + 1])``.
    max_seqlen_q, max_seqlen_k : int
    block_table : (B, pages_per_sequence) int32, optional

    Returns
    -------
    out : (total_q, H, D)
    softmax_lse : (H, total_q) float32
        With `return_attn_probs`, as is the next.
    S_dmask : (B, H, longest Sq, longest Sk), or None where `dropout_p` is 0
    """
    if block_table is not None:
        k, v = _from_pages(k, v, cu_seqlens_k, block_table)
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of keys and values in one tensor.

    Parameters
    ----------
    q : (total_q, H, D)
    kv : (total_k, 2, Hk, D)

    Returns
    -------
    As `flash_attn_varlen_func`, whose other parameters it has.
    """
    k, v = _unbound(kv, "kv", 4, 2)
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` of queries, keys and values in one tensor.

    Parameters
    ----------
    qkv : (total, 3, H, D)
    cu_seqlens : (B + 1,) int32
    max_seqlen : int

    Returns
    -------
    As `flash_attn_varlen_func`, whose other parameters it has.
    """
    q, k, v = _unbound(qkv, "qkv", 4, 3)
    return _attend(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_attn_probs, cu_seqlens, cu_seqlens,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention to a cache, to which `k` and `v` are appended in place first. No gradients.

    Parameters
    ----------
    q : (B, Sq, H, D)
    k_cache, v_cache : (Bc, capacity, Hk, D), or (pages, page_size, Hk, D) with `block_table`
    k, v : (B, T, Hk, D), optional
        Written at `cache_seqlens`, which they need.
    rotary_cos, rotary_sin : (positions, rotary_dim / 2), optional
        Rotate `k` from position `cache_seqlens` on, and `q` likewise where `causal` or a window is
        given, else all of it at `cache_seqlens`. Only with `k`.
    cache_seqlens : int or (B,) int32, optional
        Where the cached tokens end, before this call; by default the cache is full.
    cache_batch_idx : (B,) int32, optional
        The cache's row of each sequence. Not with `block_table`.
    cache_leftpad : (B,) int32, optional
        Where each sequence begins in its row; `cache_seqlens` and positions count from the row's
        begin. Not with `block_table`.
    block_table : (B, pages_per_sequence) int32, optional
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`.
    rotary_interleaved : bool
        Whether dimensions 2 j and 2 j + 1 are a pair, instead of j and j + rotary_dim / 2.
    num_splits : int
        Ignored.
    return_softmax_lse : bool

    Returns
    -------
    out : (B, Sq, H, D)
    softmax_lse : (B, H, Sq) float32
        With `return_softmax_lse`.
    """
    window = _window(window_size)
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("[flash_attn_with_kvcache] cache_seqlens is None, expected it with k")
        pages = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = k_cache.shape[1] * pages
    q, k_cache, v_cache = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    k_new, v_new = (None if x is None else x.transpose(1, 2) for x in (k, v))
    with torch.no_grad():
        lengths = cache_seqlens
        if cache_leftpad is not None:
            # `decode` counts lengths and positions from the sequence's begin.
            lengths = torch.as_tensor(cache_seqlens, device=q.device) - cache_leftpad
            if rotary_cos is not None and k_new is not None:
                local = causal or window is not None
                tables = rotary_cos, rotary_sin
                k_new = _rotated(k_new, tables, cache_seqlens, rotary_interleaved, True)
                q = _rotated(q, tables, cache_seqlens, rotary_interleaved, local)
                rotary_cos = rotary_sin = None
        out, lse = decode(
            q,
            k_cache,
            v_cache,
            lengths,
            k_new=k_new,
            v_new=v_new,
            block_table=block_table,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            causal=bool(causal),
            window=window,
            scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_lse=True,
        )
    out = out.transpose(1, 2).contiguous()
    return (out, _lse(lse)) if return_softmax_lse else out


# --- What they share ------------------------------------------------------------------------------


def _attend(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    return_attn_probs, cu_seqlens_q=None, cu_seqlens_k=None,
):  # fmt: skip
    if softcap and dropout_p:
        raise ValueError("[flash_attn] softcap cannot be used with dropout_p")
    packed = cu_seqlens_q is not None
    if not packed:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    options = {
        "causal": bool(causal),
        "window": _window(window_size),
        "scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    if not return_attn_probs:
        out = attention(q, k, v, dropout_p=dropout_p, **options)
        return out if packed else out.transpose(1, 2).contiguous()
    generator = state = None
    if dropout_p:
        generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        state = generator.get_state()
    out, lse = attention(
        q, k, v, dropout_p=dropout_p, generator=generator, return_lse=True, **options
    )
    probabilities = None
    if dropout_p:
        probabilities = _signed_probabilities(q, k, dropout_p, state, options)
    return (out if packed else out.transpose(1, 2).contiguous()), _lse(lse), probabilities


def _window(window_size):
    """(left, right) or None; negative sizes are no bound."""
    if window_size is None:
        return None
    if isinstance(window_size, torch.Tensor):
        window_size = window_size.tolist()
    left, right = (-1 if n is None or n < 0 else int(n) for n in window_size)
    return None if left == right == -1 else (left, right)


def _lse(lse):
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _unbound(packed, name, rank, parts):
    dim = rank - 3
    if packed.ndim != rank or packed.shape[dim] != parts:
        expected = f"({'B, S' if rank == 5 else 'total'}, {parts}, H, D)"
        raise ValueError(
            f"[flash_attn] {name} has shape {tuple(packed.shape)}, expected {expected}"
        )
    return packed.unbind(dim)


def _rotated(x, tables, offsets, interleaved, per_token):
    if per_token:
        return apply_rotary(x, *tables, offsets=offsets, interleaved=interleaved)
    offsets = torch.as_tensor(offsets, device=x.device).expand(x.shape[0])
    positions = offsets[:, None].expand(-1, x.shape[2])
    return apply_rotary(x, *tables, positions=positions, interleaved=interleaved)


def _places(cu_seqlens):
    """The sequence of each packed token, and its position there."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(lengths)
    steps = torch.arange(sequence.shape[0], device=cu_seqlens.device)
    return sequence, steps - cu_seqlens[sequence]


def _from_pages(k, v, cu_seqlens_k, block_table):
    """The pages' keys and values in use, packed."""
    if k.ndim != 4 or block_table.ndim != 2:
        raise ValueError(
            f"[flash_attn] k has shape {tuple(k.shape)} and block_table "
            f"{tuple(block_table.shape)}, expected (pages, page_size, H, D) and "
            "(B, pages_per_sequence)"
        )
    page_size = k.shape[1]
    if block_table.shape[0] != cu_seqlens_k.shape[0] - 1:
        raise ValueError(
            f"[flash_attn] block_table has batch {block_table.shape[0]} "
            f"but cu_seqlens_k {cu_seqlens_k.shape[0] - 1}"
        )
    lengths = cu_seqlens_k.diff()
    if cu_seqlens_k[0] != 0 or (lengths < 0).any():
        raise ValueError("[flash_attn] cu_seqlens_k does not rise from 0")
    if (lengths > page_size * block_table.shape[1]).any():
        raise ValueError(
            f"[flash_attn] cu_seqlens_k has {int(lengths.max())} keys of one sequence, "
            f"but block_table has room for {page_size * block_table.shape[1]}"
        )
    sequence, position = _places(cu_seqlens_k)
    pages = block_table[sequence, position // page_size].long()
    if pages.numel() and (pages.min() < 0 or pages.max() >= k.shape[0]):
        raise ValueError(f"[flash_attn] block_table has pages outside 0 to {k.shape[0] - 1}")
    rows = position % page_size
    return k[pages, rows], v[pages, rows]


@torch.no_grad()
def _signed_probabilities(q, k, dropout_p, state, options):
    """The weights (B, H, Sq, Sk), negative where dropped: attention to the unit vectors."""
    packed = options["cu_seqlens_q"] is not None
    longest = k.shape[-2]
    if packed:
        sequence, position = _places(options["cu_seqlens_k"])
        longest = int(position.max()) + 1 if position.numel() else 0
    else:
        position = torch.arange(longest, device=k.device)
    generator = torch.Generator()
    parts = []
    for begin in range(0, longest, _EYE_COLUMNS):
        columns = torch.arange(begin, min(begin + _EYE_COLUMNS, longest), device=k.device)
        units = (position[:, None] == columns).to(k.dtype)
        if packed:
            units = units.unsqueeze(1).expand(-1, k.shape[1], -1)
        else:
            units = units.expand(*k.shape[:2], -1, -1)
        p = attention(q, k, units, **options)
        generator.set_state(state)
        kept = attention(q, k, units, dropout_p=dropout_p, generator=generator, **options)
        parts.append(torch.where((kept == 0) & (p != 0), -p, p))
    signed = torch.cat(parts, -1) if parts else q.new_zeros((*q.shape[:-1], 0))
    if not packed:
        return signed
    sequence, position = _places(options["cu_seqlens_q"])
    batch = options["cu_seqlens_q"].shape[0] - 1
    rows = int(position.max()) + 1 if position.numel() else 0
    padded = signed.new_zeros((batch, rows, q.shape[1], longest))
    padded[sequence, position] = signed
    return padded.transpose(1, 2)

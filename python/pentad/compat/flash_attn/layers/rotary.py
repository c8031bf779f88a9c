# SPDX-License-Identifier: Apache-2.0
"""flash-attention's rotary embedding: its functions and module, for (B, S, H, D) tensors.

Computed in float32 whatever the dtype of the tables. The functions whose name ends in an
underscore work in place, also on leaves that require a gradient, as flash-attention's do. A
position outside the tables is a ValueError.
"""

import torch

from pentad.attention import apply_rotary


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Rotate the first dimensions of each head.

    Parameters
    ----------
    x : (B, S, H, D), or (total, H, D) with `cu_seqlens`
    cos, sin : (positions, rotary_dim / 2)
    interleaved : bool
        Whether dimensions 2 j and 2 j + 1 are a pair, instead of j and j + rotary_dim / 2.
    inplace : bool
    seqlen_offsets : int or (B,)
        Position of each sequence's first token.
    cu_seqlens : (B + 1,) int32, optional
    max_seqlen : int, optional
        Not needed.

    Returns
    -------
    Of the shape of `x`; `x` itself where `inplace`.
    """
    options = {"interleaved": interleaved, **_positions(x, seqlen_offsets, cu_seqlens)}
    if inplace:
        return _InPlace.apply(x, (((), cos, sin),), options)
    return _rotated(x, cos, sin, options)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv,
    cos,
    sin,
    cos_k=None,
    sin_k=None,
    interleaved=False,
    seqlen_offsets=0,
    num_heads_q=None,
):
    """Rotate queries and keys in place.

    Parameters
    ----------
    qkv : (B, S, 3, H, D), or (B, S, Hq + 2 * Hk, D) with `num_heads_q`
    cos, sin : (positions, rotary_dim / 2)
    cos_k, sin_k : optional
        Those of the keys, by default the same.
    interleaved : bool
    seqlen_offsets : int or (B,)
    num_heads_q : int, optional
        Hq.

    Returns
    -------
    `qkv`
    """
    everything = slice(None)
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        q, k = (everything, everything, 0), (everything, everything, 1)
    elif qkv.ndim == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        last = num_heads_q + (qkv.shape[2] - num_heads_q) // 2
        q = everything, everything, slice(num_heads_q)
        k = everything, everything, slice(num_heads_q, last)
    else:
        raise ValueError(
            f"[apply_rotary_emb_qkv_] qkv has shape {tuple(qkv.shape)}, "
            "expected (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) with num_heads_q"
        )
    cos_k = cos if cos_k is None else cos_k
    sin_k = sin if sin_k is None else sin_k
    options = {"interleaved": interleaved, **_positions(qkv, seqlen_offsets)}
    return _InPlace.apply(qkv, ((q, cos, sin), (k, cos_k, sin_k)), options)


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets=0):
    """Rotate keys in place.

    Parameters
    ----------
    kv : (B, S, 2, H, D)
    cos, sin : (positions, rotary_dim / 2)
    interleaved : bool
    seqlen_offsets : int or (B,)

    Returns
    -------
    `kv`
    """
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"[apply_rotary_emb_kv_] kv has shape {tuple(kv.shape)}, expected (B, S, 2, H, D)"
        )
    options = {"interleaved": interleaved, **_positions(kv, seqlen_offsets)}
    return _InPlace.apply(kv, (((slice(None), slice(None), 0), cos, sin),), options)


def _positions(x, offsets, cu_seqlens=None):
    """The options of `apply_rotary` that say where the tokens are."""
    if cu_seqlens is None:
        return {"offsets": offsets}
    cu_seqlens = cu_seqlens.long()
    first = offsets - cu_seqlens[:-1]
    steps = torch.arange(x.shape[0], device=x.device)
    return {"positions": steps + torch.repeat_interleave(first, cu_seqlens.diff())}


def _rotated(x, cos, sin, options):
    heads_first = x.transpose(-3, -2)
    packed = x.ndim == 3
    if packed:
        heads_first = heads_first.unsqueeze(0)
    out = apply_rotary(heads_first, cos, sin, **options)
    return (out.squeeze(0) if packed else out).transpose(-3, -2)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pieces, options):
        ctx.pieces, ctx.options = pieces, options
        for index, cos, sin in pieces:
            part = x[index]
            part.copy_(_rotated(part, cos, sin, options))
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.clone()
        for index, cos, sin in ctx.pieces:
            part = grad[index]
            part.copy_(_rotated(part, cos, -sin, ctx.options))
        return grad, None, None


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables that grow as needed (Su et al. 2021, arXiv 2104.09864).

    Parameters
    ----------
    dim : int
        Dimensions to rotate.
    base : float
    interleaved : bool
    scale_base : float, optional
        XPos: scales queries and keys by position (Sun et al. 2022, "A Length-Extrapolatable
        Transformer", arXiv 2212.10554, section 2.3).
    device : optional
    """

    def __init__(self, dim, base=10000.0, interleaved=False, scale_base=None, device=None):
        super().__init__()
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._rates(device), persistent=False)
        self.register_buffer("scale", self._decays(device), persistent=False)
        self._length = 0
        self._tables = None

    def _rates(self, device):
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-steps / self.dim)

    def _decays(self, device):
        if self.scale_base is None:
            return None
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (steps + 0.4 * self.dim) / (1.4 * self.dim)

    def _tables_for(self, length, device, dtype):
        """(cos, sin, cos_k, sin_k), the last two None without XPos."""
        stale = self._tables is None or length > self._length
        if not stale:
            cos = self._tables[0]
            stale = cos.device != device or cos.dtype != dtype
            stale = stale or (self.training and cos.is_inference())
        if stale:
            # In float32 even where the module's buffers have been cast to less.
            steps = torch.arange(length, device=device, dtype=torch.float32)
            wide = self.inv_freq.dtype == torch.float32
            angles = steps[:, None] * (self.inv_freq.to(device) if wide else self._rates(device))
            cos, sin = angles.cos(), angles.sin()
            tables = cos, sin
            if self.scale_base is not None:
                power = (steps - length // 2) / self.scale_base
                scale = self._decays(device) ** power[:, None]
                tables = cos * scale, sin * scale, cos / scale, sin / scale
            self._tables = tuple(table.to(dtype) for table in tables)
            self._length = length
        return self._tables if self.scale_base is not None else (*self._tables, None, None)

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """Rotate in place.

        Parameters
        ----------
        qkv : (B, S, 3, H, D), or (B, S, Hq + 2 * Hk, D) with `num_heads_q`
            With `kv`, the queries: (B, S, H, D).
        kv : (B, S, 2, H, D), optional
        seqlen_offset : int or (B,)
            A tensor needs `max_seqlen`, or tables that an earlier call has made.
        max_seqlen : int, optional
            Length of the tables.
        num_heads_q : int, optional

        Returns
        -------
        `qkv`, or (`qkv`, `kv`).
        """
        length = max_seqlen
        if length is None:
            known = isinstance(seqlen_offset, int)
            length = qkv.shape[1] + seqlen_offset if known else self._length
        cos, sin, cos_k, sin_k = self._tables_for(length, qkv.device, qkv.dtype)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        cos_k, sin_k = (cos, sin) if cos_k is None else (cos_k, sin_k)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

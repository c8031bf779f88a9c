# SPDX-License-Identifier: Apache-2.0
"""Attention as a module."""

import torch

from pentad.attention.functional import attention


class Attention(torch.nn.Module):
    """Multi-head attention with its four projections, over `pentad.attention.attention`.

    Parameters
    ----------
    dim : int
        Of the input and the output.
    heads : int
    kv_heads : int, optional
        Heads of keys and values, each shared by ``heads // kv_heads`` of the queries; by default
        `heads`.
    head_dim : int, optional
        By default ``dim // heads``.
    context_dim : int, optional
        Of what keys and values are made of, by default `dim`.
    bias : bool
        Whether the projections add one.
    causal : bool or "top_left"
    window : (int, int), optional
    dropout_p : float
        In training only.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.Attention(32, heads=4, kv_heads=2, causal=True)
    >>> layer(torch.randn(3, 10, 32)).shape
    torch.Size([3, 10, 32])
    """

    def __init__(
        self,
        dim,
        heads,
        *,
        kv_heads=None,
        head_dim=None,
        context_dim=None,
        bias=True,
        causal=False,
        window=None,
        dropout_p=0.0,
    ):
        super().__init__()
        kv_heads, context_dim = kv_heads or heads, context_dim or dim
        if head_dim is None and dim % heads:
            raise ValueError(f"[Attention] dim is {dim}, expected a multiple of {heads} heads")
        if heads % kv_heads:
            raise ValueError(
                f"[Attention] heads is {heads}, expected a multiple of {kv_heads} kv_heads"
            )
        head_dim = head_dim or dim // heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.causal, self.window, self.dropout_p = causal, window, dropout_p
        self.q_proj = torch.nn.Linear(dim, heads * head_dim, bias)
        self.k_proj = torch.nn.Linear(context_dim, kv_heads * head_dim, bias)
        self.v_proj = torch.nn.Linear(context_dim, kv_heads * head_dim, bias)
        self.out_proj = torch.nn.Linear(heads * head_dim, dim, bias)

    def forward(self, x, context=None, **options):
        """(B, S, dim) -> (B, S, dim); keys and values of `context` (B, Sk, context_dim), or of `x`.

        `options` are those of `pentad.attention.attention` that give no further results: bias,
        key_bias, block_mask and so on.
        """
        context = x if context is None else context
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = (
            project(context).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        options = {"causal": self.causal, "window": self.window} | options
        out = attention(q, k, v, dropout_p=self.dropout_p if self.training else 0.0, **options)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self):
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window={self.window}, dropout_p={self.dropout_p}"
        )

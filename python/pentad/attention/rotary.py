# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, "RoFormer", arXiv 2104.09864, equation 34)."""

import torch

from pentad.attention.functional import check_device, check_float, check_integers, check_shape


def rotary_tables(length, dim, *, base=10000.0, dtype=torch.float32, device=None):
    """Cosines and sines of ``position * base ** (-2 j / dim)``.

    Parameters
    ----------
    length : int
        Positions 0 to ``length - 1``.
    dim : int
        Number of dimensions to rotate; even.
    base : float
    dtype : torch.dtype
    device : optional

    Returns
    -------
    cos : (length, dim / 2)
    sin : (length, dim / 2)

    Examples
    --------
    >>> cos, sin = pentad.attention.rotary_tables(3, 4)
    >>> cos[:, 0]
    tensor([ 1.0000,  0.5403, -0.4161])
    """
    if dim % 2:
        raise ValueError(f"[rotary_tables] dim is {dim}, expected an even number")
    rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x, cos, sin, *, offsets=0, positions=None, interleaved=False):
    """Rotate pairs of the first dimensions of `x` by angles that grow with the position.

    With ``r = 2 * cos.shape[1]`` dimensions rotated, pair j is (j, j + r / 2), or (2 j, 2 j + 1)
    where `interleaved`; the other dimensions stay. Computed in float32 (float64 for float64), which
    also the gradient is. The inverse is the same with ``-sin``.

    Parameters
    ----------
    x : (B, H, S, D) float
    cos, sin : (positions, r / 2) float
        `rotary_tables`, say; r at most D.
    offsets : int or (B,) int32 or int64
        Position of the first token.
    positions : (S,) or (B, S) int32 or int64, optional
        Position of each token, in place of `offsets`.
    interleaved : bool

    Returns
    -------
    (B, H, S, D) in the dtype of `x`

    Raises
    ------
    ValueError
        For a position outside the tables, where a token on a CUDA device becomes NaN; or sizes that
        do not fit.

    Examples
    --------
    >>> import torch
    >>> cos, sin = pentad.attention.rotary_tables(8, 2)
    >>> x = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
    >>> pentad.attention.apply_rotary(x, cos, sin)[0, 0, :, 0]
    tensor([ 1.0000,  0.5403, -0.4161])
    """
    op = "apply_rotary"
    check_float(op, "x", x)
    if x.ndim != 4:
        raise ValueError(f"[{op}] x has shape {tuple(x.shape)}, expected (B, H, S, D)")
    check_tables(op, cos, sin, x, "x")
    b, s = x.shape[0], x.shape[2]
    if positions is None:
        chosen = token_positions(op, offsets, x, b, s)
    else:
        check_integers(op, "positions", positions)
        check_device(op, "positions", positions, x)
        check_shape(op, "positions", positions, (s,), (b, s))
        chosen = positions.expand(b, s)
    return rotate(x, *rows_at(op, cos, sin, chosen), interleaved)


def check_tables(op, cos, sin, q, name):
    """Of rotary_cos and rotary_sin, for heads of the size of q's."""
    for table_name, table in (("cos", cos), ("sin", sin)):
        check_float(op, table_name, table)
        check_device(op, table_name, table, q)
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"[{op}] cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}, "
            "expected (positions, rotary_dim / 2) of both"
        )
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"[{op}] cos and sin rotate {2 * cos.shape[1]} dimensions "
            f"but {name} has head_dim {q.shape[3]}"
        )


def token_positions(op, offsets, like, b, s):
    """(B or 1, S) positions from the first token's."""
    steps = torch.arange(s, device=like.device)
    if isinstance(offsets, int):
        return (steps + offsets)[None]
    check_integers(op, "offsets", offsets)
    check_device(op, "offsets", offsets, like)
    check_shape(op, "offsets", offsets, (b,))
    return offsets[:, None] + steps


def rows_at(op, cos, sin, positions):
    """The tables' rows (B or 1, 1, S, r / 2) at `positions`; on a CUDA device, where nobody waits
    for them, NaN where there is no such row."""
    if positions.is_cuda:
        missing = (positions < 0) | (positions >= cos.shape[0])
        if not cos.shape[0]:
            cos, sin = (t.new_zeros(1, t.shape[1]) for t in (cos, sin))
        positions = positions.masked_fill(missing, 0)
        return tuple(
            t[positions].masked_fill(missing[..., None], torch.nan).unsqueeze(1) for t in (cos, sin)
        )
    if not torch.compiler.is_compiling() and positions.numel() and positions.device.type != "meta":
        low, high = positions.aminmax()
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"[{op}] positions are {int(low)} to {int(high)}, "
                f"expected 0 to {cos.shape[0] - 1}, the rows of cos and sin"
            )
    return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def rotate(x, cos, sin, interleaved):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin, half = cos.to(wide), sin.to(wide), cos.shape[-1]
    turned = x[..., : 2 * half].to(wide)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)

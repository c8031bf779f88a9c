# SPDX-License-Identifier: Apache-2.0
"""The selective scan of Mamba and the block around it: mamba_ssm's names, arguments and results.

What mamba_ssm leaves out works here: every gradient, that of the last state included, any strides
and any number of states, float64.
"""

from torch.nn.functional import linear, rms_norm

from pentad import scan
from pentad.scan import reference


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """`pentad.scan.selective_scan`.

    Parameters
    ----------
    u, delta, z : (B, D, L)
    A : (D, N) float32 or complex64
    B, C : (D, N), (B, N, L) or (B, G, N, L)
        With a complex A those over time are real, (..., 2 L): real and imaginary parts in turn.
    D, delta_bias : (D,)
    delta_softplus, return_last_state : bool

    Returns
    -------
    out : (B, D, L)
    last_state : (B, D, N) float32 or complex64
        With `return_last_state`.
    """
    return scan.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state
    )


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """`selective_scan_fn` in plain PyTorch: a loop over time in float32 (float64 for float64)."""
    return reference.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state
    )


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """A Mamba block between its first projection and its result.

    Convolution, SiLU, the projections to the time step, B and C, the selective scan gated by z, and
    the last projection.

    Parameters
    ----------
    xz : (B, 2 D, L)
        x and z, one behind the other.
    conv1d_weight : (D, 1, W)
    conv1d_bias : (D,), optional
    x_proj_weight : (R + 2 N, D)
        The rows are those of the time step, of B (where B is None) and of C (where C is None). With
        a complex A, 2 N each: real and imaginary parts in turn.
    delta_proj_weight : (D, R)
    out_proj_weight : (E, D)
    out_proj_bias : (E,), optional
    A : (D, N) float32 or complex64
    B, C : as `selective_scan_fn`, optional
    D, delta_bias : (D,), optional
    B_proj_bias, C_proj_bias : (N,), optional
        Added to the projected B and C.
    delta_softplus : bool
    checkpoint_lvl : int
        Ignored.
    b_rms_weight, c_rms_weight : (N,), optional
        The projected B and C are divided by their root mean square over the states.
    dt_rms_weight : (D,), optional
        Likewise the time step, over the channels, after its projection.
    b_c_dt_rms_eps : float

    Returns
    -------
    (B, L, E)
    """
    return _mamba_inner(
        scan, xz, conv1d_weight, conv1d_bias, x_proj_weight,
        delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`mamba_inner_fn` in plain PyTorch."""
    return _mamba_inner(
        reference, xz, conv1d_weight, conv1d_bias, x_proj_weight,
        delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    )  # fmt: skip


def _mamba_inner(
    ops, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
    delta_softplus, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, eps=1e-6,
):  # fmt: skip
    """With the convolution and the scan of the module `ops`."""
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    sizes = [rank, *(states for given in (B, C) if given is None)]
    if x_proj_weight.shape[0] != sum(sizes):
        raise ValueError(
            f"[mamba_inner_fn] x_proj_weight has {x_proj_weight.shape[0]} rows, expected "
            + " + ".join(map(str, sizes))
        )
    x, z = xz.chunk(2, 1)
    x = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    low_rank, *projected = _projected(x, x_proj_weight).split(sizes, 1)
    delta = _projected(low_rank, delta_proj_weight)
    if dt_rms_weight is not None:
        delta = _normalised(delta, dt_rms_weight, eps)
    if B is None:
        B = _parameter(projected.pop(0), A, B_proj_bias, b_rms_weight, eps)
    if C is None:
        C = _parameter(projected.pop(0), A, C_proj_bias, c_rms_weight, eps)
    y = ops.selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if out_proj_bias is not None:
        out_proj_bias = out_proj_bias.to(out_proj_weight.dtype)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _projected(x, weight):
    """weight (K, D) times x (B, D, L): (B, K, L), laid out as x is, so that x is never copied."""
    if x.stride(1) == 1:
        return linear(x.transpose(1, 2), weight).transpose(1, 2)
    return weight @ x


def _normalised(x, weight, eps):
    """x (B, K, L) over K."""
    return rms_norm(x.transpose(1, 2), weight.shape, weight.to(x.dtype), eps).transpose(1, 2)


def _parameter(x, A, bias, rms_weight, eps):
    """Of the projection x (B, N, L): B or C as `selective_scan_fn` takes it."""
    if bias is not None:
        x = x + bias.to(x.dtype)[:, None]
    if rms_weight is not None:
        x = _normalised(x, rms_weight, eps)
    if A.is_complex():
        x = x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2)
    return x


__all__ = ["mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]

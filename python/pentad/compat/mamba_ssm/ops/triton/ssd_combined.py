# SPDX-License-Identifier: Apache-2.0
"""Mamba-2's scan (SSD) and the block around it: mamba_ssm's names, arguments and results.

The chunk size is without effect: the kernels have their own. States are float32 throughout, so
`state_dtype` is ignored as well.
"""

import torch
from torch.nn.functional import linear, silu

from pentad import scan
from pentad.compat.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from pentad.scan import reference


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
):
    """`pentad.scan.ssd`.

    Parameters
    ----------
    x, z : (B, L, H, P)
    dt : (B, L, H)
    A : (H,)
    B, C : (B, L, G, N)
    chunk_size : int
        Ignored.
    D : (H,) or (H, P), optional
    dt_bias : (H,), optional
    initial_states : (B, H, P, N), optional
    seq_idx : (B, L) int, optional
        The sequence of each step, ascending.
    cu_seqlens : (S + 1,) int, optional
        With `return_varlen_states`: where the sequences begin, and the end. Otherwise ignored: it
        is `seq_idx` that keeps sequences apart.
    dt_softplus : bool
    dt_limit : (float, float)
        The smallest and the largest time step.
    return_final_states, return_varlen_states : bool
    state_dtype : torch.dtype, optional
        Ignored.

    Returns
    -------
    out : (B, L, H, P)
    final_states : (B, H, P, N) float32
        With `return_final_states`.
    varlen_states : (S, H, P, N) float32
        With `return_varlen_states`, for B = 1: the state after each sequence, begun from zeros.
    """
    options = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    result = scan.ssd(
        x, dt, A, B, C, **options, initial_states=initial_states, seq_idx=seq_idx,
        return_final_states=return_final_states,
    )  # fmt: skip
    if not return_varlen_states:
        return result
    if cu_seqlens is None:
        raise ValueError("[mamba_chunk_scan_combined] return_varlen_states needs cu_seqlens")
    _, states = scan.ssd(
        x, dt, A, B, C, **options, cu_seqlens=cu_seqlens, return_final_states=True
    )  # fmt: skip
    return (*result, states) if return_final_states else (result, states)


def ssd_chunk_scan_combined_ref(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """`mamba_chunk_scan_combined` in plain PyTorch: a loop over time in float32 (float64 for
    float64)."""
    return reference.ssd(
        x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )  # fmt: skip


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """A Mamba-2 block between its first projection and its result.

    Convolution, the scan with softplus on its time steps, the gate, with or without a norm, and the
    last projection; beside it a gated MLP on the columns that are left.

    Parameters
    ----------
    zxbcdt : (B, L, 2 M + 2 H P + 2 G N + H)
        One behind the other: the gate and the input of the MLP of M columns, which may be none, z,
        x, B, C and the time steps.
    conv1d_weight : (H P + 2 G N, W)
    conv1d_bias : (H P + 2 G N,), optional
    dt_bias : (H,)
    A : (H,)
    D : (H,) or (H, P)
    chunk_size : int
        Ignored.
    initial_states : (B, H, P, N), optional
    seq_idx : (B, L) int32, optional
        The sequence of each step, ascending; the convolution keeps to it as well.
    dt_limit : (float, float)
    return_final_states : bool
    activation : None, "silu" or "swish"
        Of the convolution.
    rmsnorm_weight : (H P,), optional
        With it the result is divided by its root mean square over the channels of a group.
    rmsnorm_eps : float
    outproj_weight : (E, M + H P), optional
    outproj_bias : (E,), optional
    headdim : int, optional
        P; needed where `D` is (H,).
    ngroups : int
        G.
    norm_before_gate : bool
        Whether the norm or the gate comes first.
    state_dtype : torch.dtype, optional
        Ignored.

    Returns
    -------
    out : (B, L, E), or (B, L, M + H P) without `outproj_weight`
    final_states : (B, H, P, N) float32
        With `return_final_states`.
    """
    return _split_conv1d_scan(
        scan, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D,
        initial_states, seq_idx, dt_limit, return_final_states, activation, rmsnorm_weight,
        rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
    )  # fmt: skip


def mamba_split_conv1d_scan_ref(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """`mamba_split_conv1d_scan_combined` in plain PyTorch."""
    return _split_conv1d_scan(
        reference, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D,
        None, None, dt_limit, False, activation, rmsnorm_weight,
        rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
    )  # fmt: skip


def _split_conv1d_scan(
    ops, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D,
    initial_states, seq_idx, dt_limit, return_final_states, activation, rmsnorm_weight,
    rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, norm_before_gate,
):  # fmt: skip
    """With the convolution and the scan of the module `ops`."""
    heads = D.shape[0]
    if D.ndim == 2:
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError("[mamba_split_conv1d_scan_combined] D is (H,), which needs headdim")
    inner, conv = heads * headdim, conv1d_weight.shape[0]
    states, rest = divmod(conv - inner, 2 * ngroups)
    mlp, odd = divmod(zxbcdt.shape[-1] - inner - conv - heads, 2)
    if min(states, mlp) < 0 or rest or odd:
        raise ValueError(
            f"[mamba_split_conv1d_scan_combined] zxbcdt has {zxbcdt.shape[-1]} columns and "
            f"conv1d_weight {conv} rows, which are not those of {heads} heads of {headdim} and "
            f"{ngroups} groups"
        )
    mlp_gate, mlp_x, z, xBC, dt = zxbcdt.split([mlp, mlp, inner, conv, heads], -1)
    conv_options = {} if seq_idx is None else {"seq_idx": seq_idx}
    xBC = ops.causal_conv1d(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation, **conv_options
    ).transpose(1, 2)
    x, B, C = xBC.split([inner, ngroups * states, ngroups * states], -1)
    x, B, C = x.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    gate = None if rmsnorm_weight is not None else z.unflatten(-1, (heads, -1))
    out, final_states = ops.ssd(
        x, dt, A, B, C, D=D, z=gate, dt_bias=dt_bias, dt_softplus=True,
        dt_limit=dt_limit, initial_states=initial_states, seq_idx=seq_idx,
        return_final_states=True,
    )  # fmt: skip
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(
            out, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate
        )
    if mlp:
        out = torch.cat([silu(mlp_gate) * mlp_x, out], -1)
    if outproj_weight is not None:
        bias = None if outproj_bias is None else outproj_bias.to(outproj_weight.dtype)
        out = linear(out.to(outproj_weight.dtype), outproj_weight, bias)
    return (out, final_states) if return_final_states else out


__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
]

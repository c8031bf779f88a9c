# SPDX-License-Identifier: Apache-2.0
"""Norms beside a gate, in PyTorch: mamba_ssm's names, arguments and results."""

import torch
from torch.nn.functional import silu


def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """Layer norm over groups of channels, and the gate ``silu(z)``, in float32.

    Parameters
    ----------
    x, z : (..., D)
    weight : (D,)
    bias : (D,), optional
    eps : float
    group_size : int, optional
        The channels of a group, D by default.
    norm_before_gate : bool
        ``norm(x) silu(z)``, or else ``norm(x silu(z))``.
    is_rms_norm : bool
        Divide by the root mean square, and subtract no mean.

    Returns
    -------
    (..., D), the dtype of x
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    y, gate = x.to(wide), None if z is None else silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    if not is_rms_norm:
        groups = groups - groups.mean(-1, keepdim=True)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = groups.flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """`layernorm_fn` with ``is_rms_norm=True``."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class LayerNorm(torch.nn.Module):
    """`layernorm_fn` with its weight and bias.

    Parameters
    ----------
    hidden_size : int
    eps : float
    group_size : int, optional
    norm_before_gate : bool
    device, dtype : optional
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x, z=None):
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )


class RMSNorm(torch.nn.Module):
    """`rmsnorm_fn` with its weight.

    Parameters
    ----------
    hidden_size : int
    eps : float
    group_size : int, optional
    norm_before_gate : bool
    device, dtype : optional
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)

    def forward(self, x, z=None):
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


__all__ = ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"]

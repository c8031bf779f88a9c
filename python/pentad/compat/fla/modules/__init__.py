# SPDX-License-Identifier: Apache-2.0
"""The gated norm behind a delta rule, in PyTorch."""

import torch
from torch.nn.functional import silu

_ACTIVATIONS = {"silu": silu, "swish": silu, "sigmoid": torch.sigmoid}


class FusedRMSNormGated(torch.nn.Module):
    """``x / rms(x) * weight * activation(g)`` over the last dimension, in float32.

    Parameters
    ----------
    hidden_size : int
    elementwise_affine : bool
        Whether there is a weight.
    eps : float
        Added to the mean square.
    activation : "swish" or "silu" (the same) or "sigmoid"
    device, dtype : optional
    """

    def __init__(
        self,
        hidden_size,
        elementwise_affine=True,
        eps=1e-5,
        activation="swish",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"[FusedRMSNormGated] activation is {activation!r}, not one of "
                + ", ".join(map(repr, _ACTIVATIONS))
            )
        self.hidden_size, self.elementwise_affine = hidden_size, elementwise_affine
        self.eps, self.activation = eps, activation
        weight = None
        if elementwise_affine:
            weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)

    def forward(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
        """
        Parameters
        ----------
        x, g : (..., hidden_size)
        residual : (..., hidden_size), optional
            Added to `x` before the norm.
        prenorm : bool
            Return the sum as well.
        residual_in_fp32 : bool
            Return it in float32.

        Returns
        -------
        out : (..., hidden_size), the dtype of x
        residual : (..., hidden_size)
            With `prenorm`.
        """
        wide = torch.promote_types(torch.float32, x.dtype)
        total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.to(wide)
        out = (y * _ACTIVATIONS[self.activation](g.to(wide))).to(x.dtype)
        if not prenorm:
            return out
        kept = x.dtype if residual is None else residual.dtype
        return out, total.to(wide if residual_in_fp32 else kept)


__all__ = ["FusedRMSNormGated"]

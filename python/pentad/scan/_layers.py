# SPDX-License-Identifier: Apache-2.0
"""Parts that the modules of this family have in common."""

import math

import torch
from torch.nn.functional import pad, rms_norm, silu

from pentad.scan._checks import accumulator
from pentad.scan.functional import causal_conv1d
from pentad.scan.update import causal_conv1d_update

_EPSILON = 1e-6  # beside a squared length


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm of groups of channels, times ``silu(z)`` before or after (Zhang & Sennrich 2019,
    "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4). In float32."""

    def __init__(self, size, eps, *, group_size=None, norm_before_gate=True, **made):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, **made))
        self.eps, self.group_size = eps, group_size or size
        self.norm_before_gate = norm_before_gate

    def forward(self, x, z=None):
        wide, dtype = accumulator(x.dtype), x.dtype
        x = x.to(wide)
        gate = None if z is None else silu(z.to(wide))
        if gate is not None and not self.norm_before_gate:
            x = x * gate
        groups = (x.shape[-1] // self.group_size, self.group_size)
        x = rms_norm(x.unflatten(-1, groups), groups[1:], eps=self.eps).flatten(-2)
        x = x * self.weight.to(wide)
        if gate is not None and self.norm_before_gate:
            x = x * gate
        return x.to(dtype)

    def extra_repr(self):
        return f"{len(self.weight)}, eps={self.eps}, group_size={self.group_size}"


def depthwise(channels, width, bias, **made):
    """A convolution of each channel by itself, whose parameters `convolved` takes."""
    return torch.nn.Conv1d(
        channels, channels, width, groups=channels, padding=width - 1, bias=bias, **made
    )


def convolved(conv, x, cache=None, goes_on=False, **where):
    """silu of the causal convolution of x (B, L, C); `cache` (B, C, W) gets the latest inputs.

    It is continued from where it `goes_on`. `where` the sequences are, is for `causal_conv1d`.
    """
    before = cache[..., 1:].to(x.dtype, copy=True) if goes_on else None
    result = causal_conv1d(
        x.transpose(1, 2), conv.weight.squeeze(1), conv.bias, activation="silu",
        initial_states=before, return_final_states=cache is not None, **where,
    )  # fmt: skip
    if cache is not None:
        result, latest = result
        cache.copy_(pad(latest, (1, 0)))  # the oldest leaves before it is read
    return result.transpose(1, 2)


def convolved_step(conv, x, cache):
    """`convolved` of one more input (B, C)."""
    return causal_conv1d_update(x, cache, conv.weight.squeeze(1), conv.bias, activation="silu")


def rates(A_log):
    """``-exp(A_log)``, not in 16 bits."""
    return -torch.exp(A_log.to(accumulator(A_log.dtype)))


def step_bias(heads, low, high, floor, **made):
    """Biases whose softplus is log-uniform between two step sizes, and at least `floor`."""
    dt = torch.empty(heads, dtype=torch.float32, device=made["device"])
    dt = dt.uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    inverse = dt + torch.log(-torch.expm1(-dt))  # of softplus
    return inverse.to(made["dtype"] or torch.get_default_dtype())


def no_decay(*parameters):
    """Mark what training scripts of mamba_ssm and flash-linear-attention do not decay."""
    for parameter in parameters:
        parameter._no_weight_decay = True


def cached_states(layer, inference_params, batch):
    """The layer's states in the caller's cache, which are made at the first call."""
    if layer.layer_idx is None:
        raise ValueError(
            f"[{type(layer).__name__}] layer_idx is None, expected an int with inference_params"
        )
    memory = inference_params.key_value_memory_dict
    if layer.layer_idx not in memory:
        memory[layer.layer_idx] = layer.allocate_inference_cache(batch, 0)
    states = memory[layer.layer_idx]
    if states[0].shape[0] != batch:
        raise ValueError(
            f"[{type(layer).__name__}] the cache of inference_params has {states[0].shape[0]} rows "
            f"for a batch of {batch}"
        )
    return states


def check_steps(layer, name, x, size):
    """(B, L, size)."""
    if x.ndim != 3 or x.shape[2] != size:
        raise ValueError(
            f"[{type(layer).__name__}] {name} has shape {tuple(x.shape)}, expected (B, L, {size})"
        )


def one_token(layer, hidden_states, size):
    """(B, 1, size) as (B, size)."""
    if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
        raise ValueError(
            f"[{type(layer).__name__}] hidden_states has shape {tuple(hidden_states.shape)}, "
            f"expected (B, 1, {size})"
        )
    return hidden_states.squeeze(1)


def unit_length(x):
    """x over its length along the last dimension, in its dtype."""
    wide = x.to(accumulator(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _EPSILON)).to(x.dtype)


def whole(op, name, value):
    """A size that came out of a factor, as an int."""
    if value < 1 or value != int(value):
        raise ValueError(f"[{op}] {name} is {value}, expected a whole number")
    return int(value)

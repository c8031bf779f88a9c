# SPDX-License-Identifier: Apache-2.0
"""Retention as a module."""

import torch

from pentad.attention.rotary import rotate
from pentad.scan._checks import accumulator
from pentad.scan._layers import GatedRMSNorm, cached_states, check_steps, one_token, whole
from pentad.scan.linear_attention import linear_attention
from pentad.scan.matrix_update import linear_attention_update
from pentad.scan.modules import _project

_BASE = 10000.0  # of the rotary angles


class MultiScaleRetention(torch.nn.Module):
    """The layer of RetNet: projections, `linear_attention` with a decay per head, a gated norm.

    Head h decays by ``1 - 2^(-5 - h)`` a step (Sun et al. 2023, "Retentive Network: A Successor to
    Transformer for Large Language Models", arXiv 2307.08621, equations 6 to 8). Names and shapes of
    the parameters are those of flash-linear-attention with its default options, so that its
    checkpoints load: an RMSNorm of each head is the group norm.

    Parameters
    ----------
    hidden_size : int
        Of the input and the output.
    expand_k : float
        Queries and keys have ``expand_k * hidden_size`` dimensions, all heads together.
    expand_v : float
        Values have ``expand_v * hidden_size``.
    num_heads : int
    use_output_gate : bool
        Multiply what has been normalised with a gate.
    use_rotary : bool
        Rotate queries and keys by angles that grow with the position: dimension j of N by
        ``10000^(-2 j / N)`` a step, together with dimension ``j + N / 2``.
    norm_eps : float
    layer_idx : int, optional
        Key of this layer in the cache of `inference_params`.
    device, dtype : optional
        Of the parameters.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.MultiScaleRetention(16, num_heads=2, layer_idx=0)
    >>> x = torch.randn(2, 10, 16)
    >>> out = layer(x)
    >>> out.shape
    torch.Size([2, 10, 16])
    >>> states = layer.allocate_inference_cache(2, 10)
    >>> with torch.no_grad():
    ...     steps = [layer.step(x[:, t : t + 1], *states)[0] for t in range(10)]
    >>> torch.allclose(torch.cat(steps, 1), out, atol=1e-5)
    True
    """

    def __init__(
        self,
        hidden_size=1024,
        expand_k=1.0,
        expand_v=2.0,
        num_heads=8,
        use_output_gate=True,
        use_rotary=True,
        norm_eps=1e-5,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        op = "MultiScaleRetention"
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.use_output_gate, self.use_rotary = use_output_gate, use_rotary
        self.layer_idx = layer_idx
        if num_heads < 1:
            raise ValueError(f"[{op}] num_heads is {num_heads}, expected at least 1")
        self.head_k_dim = whole(op, "expand_k * hidden_size / num_heads",
                                expand_k * hidden_size / num_heads)  # fmt: skip
        self.head_v_dim = whole(op, "expand_v * hidden_size / num_heads",
                                expand_v * hidden_size / num_heads)  # fmt: skip
        if use_rotary and self.head_k_dim % 2:
            raise ValueError(
                f"[{op}] use_rotary needs an even number of dimensions per head, "
                f"but there are {self.head_k_dim}"
            )
        keys, values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        made = {"device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(hidden_size, keys, bias=False, **made)
        self.k_proj = torch.nn.Linear(hidden_size, keys, bias=False, **made)
        self.v_proj = torch.nn.Linear(hidden_size, values, bias=False, **made)
        norm = GatedRMSNorm(self.head_v_dim, norm_eps, **made)
        if use_output_gate:
            self.g_proj = torch.nn.Linear(hidden_size, values, bias=False, **made)
            self.g_norm_swish_gate = norm
        else:
            self.g_norm = norm
        self.o_proj = torch.nn.Linear(values, hidden_size, bias=False, **made)

    def forward(self, hidden_states, inference_params=None):
        """(B, L, hidden_size) -> (B, L, hidden_size).

        With `inference_params` (an object with ``key_value_memory_dict`` and ``seqlen_offset``, as
        in mamba_ssm) the state after the last step is kept there; an offset above 0 continues from
        it, by one step or by many.
        """
        check_steps(self, "hidden_states", hidden_states, self.hidden_size)
        state = position = None
        goes_on = False
        if inference_params is not None:
            state, position = cached_states(self, inference_params, hidden_states.shape[0])
            goes_on = inference_params.seqlen_offset > 0
            if goes_on and hidden_states.shape[1] == 1:
                return self.step(hidden_states, state, position)[0]
        length = hidden_states.shape[1]
        steps = torch.arange(length, device=hidden_states.device)
        q, k, v = self._heads(
            *(layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)),
            steps + position if goes_on else steps,
        )
        out = linear_attention(
            q, k, v, decay=self._decay(v), scale=self.head_k_dim**-0.5,
            initial_state=state.clone() if goes_on else None,
            return_final_state=state is not None,
        )  # fmt: skip
        if state is not None:
            out, last = out
            state.copy_(last)
            position.copy_(position + length if goes_on else torch.full_like(position, length))
        gate = self.g_proj(hidden_states) if self.use_output_gate else None
        return self.o_proj(self._normalised(out, gate))

    def step(self, hidden_states, state, position):
        """One step: (B, 1, hidden_size) -> ((B, 1, hidden_size), state, position).

        Both, of `allocate_inference_cache`, are changed in place.
        """
        x = one_token(self, hidden_states, self.hidden_size)
        q, k, v = self._heads(
            *(_project(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj)), position
        )
        out = linear_attention_update(
            state, q, k, v, decay=self._decay(v), scale=self.head_k_dim**-0.5
        )
        position.add_(1)
        gate = _project(self.g_proj, x) if self.use_output_gate else None
        return _project(self.o_proj, self._normalised(out, gate)).unsqueeze(1), state, position

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """A zero state (B, heads, N, P), in float32 unless `dtype` is given, and the position."""
        weight = self.q_proj.weight
        wide = dtype or accumulator(weight.dtype)
        sizes = (batch_size, self.num_heads, self.head_k_dim, self.head_v_dim)
        return (
            torch.zeros(sizes, dtype=wide, device=weight.device),
            torch.zeros(1, dtype=torch.int64, device=weight.device),
        )

    def extra_repr(self):
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, "
            f"head_k_dim={self.head_k_dim}, head_v_dim={self.head_v_dim}"
        )

    def _heads(self, q, k, v, positions):
        """By heads; queries and keys (..., positions, H, N) are rotated."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        if self.use_rotary:
            size = self.head_k_dim
            rates = torch.arange(0, size, 2, dtype=torch.float64, device=q.device) / -size
            angles = (positions.unsqueeze(-1) * _BASE**rates).unsqueeze(1)
            cos, sin = angles.cos(), angles.sin()
            q, k = rotate(q, cos, sin, False), rotate(k, cos, sin, False)
        return q, k, v

    def _decay(self, v):
        """Not a buffer, which would be rounded with the parameters."""
        heads = torch.arange(self.num_heads, dtype=accumulator(v.dtype), device=v.device)
        return 1 - torch.exp2(-5 - heads)

    def _normalised(self, out, gate):
        if gate is None:
            return self.g_norm(out).flatten(-2)
        return self.g_norm_swish_gate(out, gate.unflatten(-1, out.shape[-2:])).flatten(-2)

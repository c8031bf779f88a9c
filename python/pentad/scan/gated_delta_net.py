# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule as a module."""

import torch
from torch.nn.functional import silu, softplus

from pentad.scan._checks import accumulator
from pentad.scan._layers import (
    GatedRMSNorm,
    cached_states,
    check_steps,
    convolved,
    convolved_step,
    depthwise,
    no_decay,
    one_token,
    rates,
    step_bias,
    unit_length,
    whole,
)
from pentad.scan.delta_rule import delta_rule
from pentad.scan.matrix_update import delta_rule_update
from pentad.scan.modules import _project


class GatedDeltaNet(torch.nn.Module):
    """The layer of Gated DeltaNet: projections, short convolutions, `delta_rule`, a gated norm.

    Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv
    2412.06464, section 3.3. Names and shapes of the parameters are those of flash-linear-attention,
    so that its checkpoints load, and so are the arguments.

    Parameters
    ----------
    hidden_size : int
        Of the input and the output.
    expand_v : int or float
        Values of a head have ``expand_v * head_dim`` dimensions.
    head_dim : int
        Of queries and keys.
    num_heads : int
        Of queries and keys.
    num_v_heads : int, optional
        Of values; a multiple of `num_heads`, which it is by default.
    mode : str
        Accepted for flash-linear-attention's sake: there is one path.
    use_gate : bool
        Multiply what has been normalised with a gate.
    use_short_conv : bool
        Convolve queries, keys and values; without, silu is left of it.
    allow_neg_eigval : bool
        Let beta go up to 2 (Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs Through
        Negative Eigenvalues", arXiv 2411.12537).
    conv_size : int
        Width of the convolutions.
    conv_bias : bool
    layer_idx : int, optional
        Key of this layer in the cache of `inference_params`.
    norm_eps : float
    device, dtype : optional
        Of the parameters, but for `A_log` and `dt_bias`, which are float32.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.GatedDeltaNet(16, head_dim=4, num_heads=2, layer_idx=0)
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
        hidden_size=2048,
        expand_v=2,
        head_dim=256,
        num_heads=6,
        num_v_heads=None,
        mode="chunk",
        use_gate=True,
        use_short_conv=True,
        allow_neg_eigval=False,
        conv_size=4,
        conv_bias=False,
        layer_idx=None,
        norm_eps=1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.hidden_size, self.head_dim, self.num_heads = hidden_size, head_dim, num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.head_v_dim = whole("GatedDeltaNet", "expand_v * head_dim", expand_v * head_dim)
        self.use_gate, self.use_short_conv = use_gate, use_short_conv
        self.allow_neg_eigval, self.conv_size = allow_neg_eigval, conv_size
        self.layer_idx = layer_idx
        if num_heads < 1 or self.num_v_heads % num_heads:
            raise ValueError(
                f"[GatedDeltaNet] num_v_heads is {self.num_v_heads}, "
                f"expected a multiple of {num_heads} num_heads, at least 1"
            )
        keys, values = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        made = {"device": device, "dtype": dtype}

        def projection(inputs, outputs):
            return torch.nn.Linear(inputs, outputs, bias=False, **made)

        self.q_proj = projection(hidden_size, keys)
        self.k_proj = projection(hidden_size, keys)
        self.v_proj = projection(hidden_size, values)
        self.a_proj = projection(hidden_size, self.num_v_heads)
        self.b_proj = projection(hidden_size, self.num_v_heads)
        wide = {"device": device, "dtype": torch.float32}
        A = torch.empty(self.num_v_heads, **wide).uniform_(0, 16)
        self.A_log = torch.nn.Parameter(A.log())
        self.dt_bias = torch.nn.Parameter(step_bias(self.num_v_heads, 0.001, 0.1, 1e-4, **wide))
        no_decay(self.A_log, self.dt_bias)
        if use_short_conv:
            self.q_conv1d = depthwise(keys, conv_size, conv_bias, **made)
            self.k_conv1d = depthwise(keys, conv_size, conv_bias, **made)
            self.v_conv1d = depthwise(values, conv_size, conv_bias, **made)
        if use_gate:
            self.g_proj = projection(hidden_size, values)
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps, **made)
        self.o_proj = projection(values, hidden_size)

    def forward(self, hidden_states, inference_params=None):
        """(B, L, hidden_size) -> (B, L, hidden_size).

        With `inference_params` (an object with ``key_value_memory_dict`` and ``seqlen_offset``, as
        in mamba_ssm) the states after the last step are kept there; an offset above 0 continues
        from them, by one step or by many.
        """
        check_steps(self, "hidden_states", hidden_states, self.hidden_size)
        state, convs, goes_on = None, (None, None, None), False
        if inference_params is not None:
            states = cached_states(self, inference_params, hidden_states.shape[0])
            goes_on = inference_params.seqlen_offset > 0
            if goes_on and hidden_states.shape[1] == 1:
                return self.step(hidden_states, *states)[0]
            state, *convs = states
        inputs = [layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self.use_short_conv:
            inputs = [
                convolved(conv, x, cache, goes_on)
                for conv, x, cache in zip(self._convs(), inputs, convs, strict=True)
            ]
        else:
            inputs = [silu(x) for x in inputs]
        q, k, v = self._heads(*inputs)
        beta, decay = self._rates(self.b_proj(hidden_states), self.a_proj(hidden_states))
        out = delta_rule(
            q, k, v, beta, decay=decay, log_space=True, scale=self.head_dim**-0.5,
            initial_state=state.clone() if goes_on else None,
            return_final_state=state is not None,
        )  # fmt: skip
        if state is not None:
            out, last = out
            state.copy_(last)
        gate = self._gate(self.g_proj(hidden_states)) if self.use_gate else None
        return self.o_proj(self.o_norm(out, gate).flatten(2))

    def step(self, hidden_states, *states):
        """One step: (B, 1, hidden_size) -> ((B, 1, hidden_size), *states).

        The states, of `allocate_inference_cache`, are changed in place.
        """
        x = one_token(self, hidden_states, self.hidden_size)
        state, *convs = states
        inputs = [_project(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self.use_short_conv:
            inputs = [
                convolved_step(*given) for given in zip(self._convs(), inputs, convs, strict=True)
            ]
        else:
            inputs = [silu(x) for x in inputs]
        q, k, v = self._heads(*inputs)
        beta, decay = self._rates(_project(self.b_proj, x), _project(self.a_proj, x))
        if decay.shape == state.shape[1:3]:  # could be one per key
            decay = decay.unsqueeze(2).expand(-1, -1, self.head_dim)
        out = delta_rule_update(
            state, q, k, v, beta, decay=decay, log_space=True, scale=self.head_dim**-0.5
        )
        gate = self._gate(_project(self.g_proj, x)) if self.use_gate else None
        out = _project(self.o_proj, self.o_norm(out, gate).flatten(1))
        return out.unsqueeze(1), *states

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states, whatever the length: (B, heads, N, P) in float32 unless `dtype` is given.

        With short convolutions three more, (B, channels, conv_size), of queries, keys and values.
        """
        weight = self.q_proj.weight
        wide = dtype or accumulator(weight.dtype)
        sizes = (batch_size, self.num_v_heads, self.head_dim, self.head_v_dim)
        state = torch.zeros(sizes, dtype=wide, device=weight.device)
        if not self.use_short_conv:
            return (state,)
        return state, *(
            torch.zeros(
                batch_size, len(conv.weight), self.conv_size, dtype=dtype or weight.dtype,
                device=weight.device,
            )
            for conv in self._convs()
        )  # fmt: skip

    def extra_repr(self):
        return (
            f"hidden_size={self.hidden_size}, head_dim={self.head_dim}, "
            f"num_heads={self.num_heads}, num_v_heads={self.num_v_heads}"
        )

    def _convs(self):
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _heads(self, q, k, v):
        """By heads, with queries and keys of length 1."""
        q, k = (unit_length(t.unflatten(-1, (self.num_heads, self.head_dim))) for t in (q, k))
        return q, k, self._gate(v)

    def _gate(self, x):
        return x.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _rates(self, b, a):
        """beta and the logarithms of the decays (..., heads)."""
        wide = accumulator(a.dtype)
        beta = b.to(wide).sigmoid()
        decay = rates(self.A_log) * softplus(a.to(wide) + self.dt_bias)
        return 2 * beta if self.allow_neg_eigval else beta, decay.to(wide)

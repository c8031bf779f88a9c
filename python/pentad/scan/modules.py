# SPDX-License-Identifier: Apache-2.0
"""Selective state spaces as a module."""

import math

import torch
from torch.nn.functional import linear, pad

from pentad._ops import needs_grad
from pentad.scan import autograd
from pentad.scan.functional import causal_conv1d, selective_scan
from pentad.scan.update import causal_conv1d_update, selective_state_update

_FEW_ROWS = 8  # that the kernel takes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _linear(x, weight, bias=None):
    """`linear` of x (B, inputs), which for a few rows and without gradients reads faster."""
    given = (x, weight) if bias is None else (x, weight, bias)
    plain = (
        0 < x.shape[0] <= _FEW_ROWS
        and x.dtype in _DTYPES
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(t) in (torch.Tensor, torch.nn.Parameter)
            and t.is_cpu
            and t.dtype == x.dtype
            and t.layout == torch.strided
            for t in given
        )
        and weight.stride(1) == 1
        and not needs_grad(*given)
    )
    return autograd.few_rows_linear(x, weight, bias) if plain else linear(x, weight, bias)


def _project(layer, x):
    """``layer(x)``; by `_linear` where the layer does nothing else."""
    own = type(layer) is torch.nn.Linear and "forward" not in layer.__dict__
    if own and not (layer._forward_hooks or layer._forward_pre_hooks):
        return _linear(x, layer.weight, layer.bias)
    return layer(x)


class Mamba(torch.nn.Module):
    """The block of Mamba: projections, a causal convolution, a selective scan and its gate.

    Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv
    2312.00752, section 3.4. Names and shapes of the parameters are those of mamba_ssm, so that its
    checkpoints load, and so are the arguments.

    Parameters
    ----------
    d_model : int
        Of the input and the output.
    d_state : int
        States per channel, N.
    d_conv : int
        Width of the convolution.
    expand : int or float
        The block has ``int(expand * d_model)`` channels inside.
    dt_rank : int or "auto"
        Of the projection that gives the step sizes; "auto" is ``ceil(d_model / 16)``.
    dt_min, dt_max : float
        The step sizes at initialisation are log-uniform between them.
    dt_init : "random" or "constant"
        How the weight of `dt_proj` is initialised.
    dt_scale : float
        Factor of that weight.
    dt_init_floor : float
        Least step size at initialisation.
    conv_bias : bool
    bias : bool
        Of the projections in and out.
    use_fast_path : bool
        Accepted for mamba_ssm's sake: there is one path.
    layer_idx : int, optional
        Key of this layer in the cache of `inference_params`.
    device, dtype : optional
        Of the parameters, but for `A_log` and `D`, which are float32.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.Mamba(16, layer_idx=0)
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
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"[Mamba] dt_init is {dt_init!r}, expected 'random' or 'constant'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

        inner, made = self.d_inner, {"device": device, "dtype": dtype}
        self.in_proj = torch.nn.Linear(d_model, 2 * inner, bias=bias, **made)
        self.conv1d = torch.nn.Conv1d(
            inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.x_proj = torch.nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = torch.nn.Linear(self.dt_rank, inner, **made)
        self.out_proj = torch.nn.Linear(inner, d_model, bias=bias, **made)
        self.A_log = torch.nn.Parameter(
            torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(inner, 1)
        )
        self.D = torch.nn.Parameter(torch.ones(inner, dtype=torch.float32, device=device))
        self._initialise_steps(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        # Marks that training scripts for mamba_ssm look for.
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.dt_proj.bias._no_reinit = True

    @torch.no_grad()
    def _initialise_steps(self, dt_min, dt_max, dt_init, dt_scale, dt_init_floor):
        """softplus(bias) is the step size at first, and the projection keeps the variance."""
        bound = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            self.dt_proj.weight.fill_(bound)
        else:
            self.dt_proj.weight.uniform_(-bound, bound)
        low, high = math.log(dt_min), math.log(dt_max)
        bias = self.dt_proj.bias
        dt = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp()
        dt.clamp_(min=dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, hidden_states, inference_params=None):
        """(B, L, d_model) -> (B, L, d_model).

        With `inference_params` (an object with ``key_value_memory_dict`` and ``seqlen_offset``, as
        in mamba_ssm) the states after the last step are kept there; an offset above 0 continues
        from them, by one step or by many.
        """
        conv_state = ssm_state = None
        if inference_params is not None:
            conv_state, ssm_state = self._cached(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0 and hidden_states.shape[1] == 1:
                return self.step(hidden_states, conv_state, ssm_state)[0]
        cached = conv_state is not None
        goes_on = cached and inference_params.seqlen_offset > 0

        # (B, channels, L) everywhere, as views of (B, L, channels) memory.
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        before = None
        if cached:
            inputs, size = x, conv_state.shape[2]
            if goes_on:
                before = conv_state[..., 1:].to(x.dtype, copy=True)
                inputs = torch.cat([conv_state, x.to(conv_state.dtype)], 2)
            conv_state.copy_(pad(inputs, (size - inputs.shape[2], 0)))  # cut, or zeros before
        x = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            initial_states=before,
        )  # fmt: skip
        dt, B, C = self._step_sizes_and_matrices(x.transpose(1, 2))
        result = selective_scan(
            x, dt.transpose(1, 2), self._A(), B.transpose(1, 2), C.transpose(1, 2), self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True,
            initial_state=ssm_state.clone() if goes_on else None, return_last_state=cached,
        )  # fmt: skip
        if cached:
            result, last = result
            ssm_state.copy_(last)
        return self.out_proj(result.transpose(1, 2))

    def step(self, hidden_states, conv_state, ssm_state):
        """One step: (B, 1, d_model) -> ((B, 1, d_model), conv_state, ssm_state).

        The states, of `allocate_inference_cache`, are changed in place.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"[Mamba] hidden_states has shape {tuple(hidden_states.shape)}, "
                f"expected (B, 1, {self.d_model})"
            )
        x, z = _project(self.in_proj, hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = _project(self.x_proj, x).split(sizes, -1)
        dt = _linear(dt, self.dt_proj.weight)
        y = selective_state_update(
            ssm_state, x, dt, self._A(), B, C, self.D, z=z, dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )  # fmt: skip
        return _project(self.out_proj, y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states (B, channels, d_conv) and (B, channels, d_state), whatever the length."""
        made = {"device": self.out_proj.weight.device}
        shape = (batch_size, self.d_inner)
        return (
            torch.zeros(*shape, self.d_conv, dtype=dtype or self.conv1d.weight.dtype, **made),
            torch.zeros(*shape, self.d_state, dtype=dtype or self.dt_proj.weight.dtype, **made),
        )

    def extra_repr(self):
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}"

    def _A(self):
        A_log = self.A_log
        if A_log.dtype in (torch.bfloat16, torch.float16):
            A_log = A_log.float()
        A = A_log.exp()
        return -A if A.requires_grad else A.neg_()

    def _step_sizes_and_matrices(self, x):
        """dt without its bias, B and C of (..., channels)."""
        low_rank, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), -1)
        return linear(low_rank, self.dt_proj.weight), B, C

    def _cached(self, inference_params, batch):
        if self.layer_idx is None:
            raise ValueError("[Mamba] layer_idx is None, expected an int with inference_params")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch, 0)
        return memory[self.layer_idx]

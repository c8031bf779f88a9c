# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 as a module."""

import math

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
    whole,
)
from pentad.scan.modules import _project
from pentad.scan.ssd import limited, ssd
from pentad.scan.update import selective_state_update


class Mamba2(torch.nn.Module):
    """The block of Mamba-2: one projection, a causal convolution, `ssd`, and a gated norm.

    Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
    Structured State Space Duality", arXiv 2405.21060, section 7 and figure 6. Names and shapes of
    the parameters are those of mamba_ssm, so that its checkpoints load, and so are the arguments.

    Parameters
    ----------
    d_model : int
        Of the input and the output.
    d_state : int
        Size of the state of each channel, N.
    d_conv : int
        Width of the convolution.
    conv_init : float, optional
        Bound of the convolution's weights at initialisation.
    expand : int or float
        The block has ``expand * d_model`` channels inside.
    headdim : int
        Channels of a head, P.
    d_ssm : int, optional
        Channels that go through the state space model, by default all; the others are a gated MLP.
    ngroups : int
        Groups of heads that share B and C.
    A_init_range : (float, float)
        The decay rates at initialisation are uniform between them.
    D_has_hdim : bool
        One factor D per channel, and not per head.
    rmsnorm : bool
        Normalise before the last projection, each group by itself.
    norm_before_gate : bool
        Multiply with the gate after that norm, and not before.
    dt_min, dt_max : float
        The step sizes at initialisation are log-uniform between them.
    dt_init_floor : float
        Least step size at initialisation.
    dt_limit : (float, float)
        Least and greatest step size, always.
    bias : bool
        Of the projections.
    conv_bias : bool
    chunk_size : int
        Accepted for mamba_ssm's sake: the kernel has its own.
    use_mem_eff_path : bool
        Accepted for mamba_ssm's sake: there is one path.
    layer_idx : int, optional
        Key of this layer in the cache of `inference_params`.
    process_group : None
        Other values are refused: there is no tensor parallelism.
    sequence_parallel : bool
        Without effect.
    device, dtype : optional
        Of the parameters, but for `D`, which is float32.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.Mamba2(16, d_state=8, headdim=8, layer_idx=0)
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
        d_state=128,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=64,
        d_ssm=None,
        ngroups=1,
        A_init_range=(1, 16),
        D_has_hdim=False,
        rmsnorm=True,
        norm_before_gate=False,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, math.inf),
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        process_group=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups, self.dt_limit = headdim, ngroups, tuple(dt_limit)
        self.D_has_hdim, self.rmsnorm, self.layer_idx = D_has_hdim, rmsnorm, layer_idx
        self.d_inner = whole("Mamba2", "expand * d_model", expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self._check(A_init_range, process_group)
        self.nheads = self.d_ssm // headdim

        made = {"device": device, "dtype": dtype}
        shared = 2 * ngroups * d_state
        self.in_proj = torch.nn.Linear(
            d_model, 2 * self.d_inner + shared + self.nheads, bias=bias, **made
        )
        self.conv1d = depthwise(self.d_ssm + shared, d_conv, conv_bias, **made)
        if conv_init is not None:
            torch.nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = torch.nn.Parameter(
            step_bias(self.nheads, dt_min, dt_max, dt_init_floor, **made)
        )
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = torch.nn.Parameter(A.log().to(dtype))
        self.D = torch.nn.Parameter(
            torch.ones(
                self.d_ssm if D_has_hdim else self.nheads, dtype=torch.float32, device=device
            )
        )
        no_decay(self.dt_bias, self.A_log, self.D)
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm, 1e-5, group_size=self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate, **made,
            )  # fmt: skip
        self.out_proj = torch.nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def _check(self, A_init_range, process_group):
        if process_group is not None:
            raise ValueError(f"[Mamba2] process_group is {process_group!r}, expected None")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"[Mamba2] A_init_range is {A_init_range!r}, expected 0 < low <= high")
        if not 0 < self.d_ssm <= self.d_inner:
            raise ValueError(f"[Mamba2] d_ssm is {self.d_ssm}, expected 1 to {self.d_inner}")
        if self.headdim < 1 or self.d_ssm % self.headdim:
            raise ValueError(
                f"[Mamba2] headdim is {self.headdim}, expected a divisor of {self.d_ssm} channels"
            )
        if self.ngroups < 1 or (self.d_ssm // self.headdim) % self.ngroups:
            raise ValueError(
                f"[Mamba2] ngroups is {self.ngroups}, "
                f"expected a divisor of {self.d_ssm // self.headdim} heads"
            )

    def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
        """(B, L, d_model) -> (B, L, d_model), or (B * L, d_model) of both where `seqlen` is L.

        Steps of different `seq_idx` (B, L), which rises along a row, do not see each other; nor do
        those of the sequences ``[cu_seqlens[s], cu_seqlens[s + 1])`` of the only batch row. With
        both, `cu_seqlens` alone is looked at. With `inference_params` (an object with
        ``key_value_memory_dict`` and ``seqlen_offset``, as in mamba_ssm) the states after the last
        step of each sequence are kept there; an offset above 0 continues from them, by one step or
        by many.
        """
        flat = seqlen is not None
        if flat:
            u = u.unflatten(0, (-1, seqlen))
        check_steps(self, "u", u, self.d_model)
        conv_state = ssm_state = None
        goes_on = False
        if inference_params is not None:
            sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            conv_state, ssm_state = cached_states(self, inference_params, sequences)
            goes_on = inference_params.seqlen_offset > 0
            if goes_on and u.shape[1] == 1 and cu_seqlens is None:
                out = self.step(u, conv_state, ssm_state)[0]
                return out.flatten(0, 1) if flat else out
        cached = conv_state is not None
        if cu_seqlens is not None:
            where = {"cu_seqlens": cu_seqlens}
        elif seq_idx is not None and cached:
            raise ValueError("[Mamba2] seq_idx cannot be used with inference_params")
        else:
            where = {"seq_idx": None if seq_idx is None else seq_idx.to(torch.int32)}

        mlp, z, hidden, dt = self._split(self.in_proj(u))
        hidden = convolved(self.conv1d, hidden, conv_state, goes_on, **where)
        x, B, C = self._heads(hidden)
        result = ssd(
            x, dt, rates(self.A_log), B, C, D=self._D(), z=None if self.rmsnorm else self._like(z),
            dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit,
            initial_states=ssm_state.clone() if goes_on else None, return_final_states=cached,
            **where,
        )  # fmt: skip
        if cached:
            result, last = result
            ssm_state.copy_(last)
        out = self.out_proj(self._normalised(result.flatten(2), z, mlp))
        return out.flatten(0, 1) if flat else out

    def step(self, hidden_states, conv_state, ssm_state):
        """One step: (B, 1, d_model) -> ((B, 1, d_model), conv_state, ssm_state).

        The states, of `allocate_inference_cache`, are changed in place.
        """
        hidden_states = one_token(self, hidden_states, self.d_model)
        mlp, z, hidden, dt = self._split(_project(self.in_proj, hidden_states))
        x, B, C = self._heads(convolved_step(self.conv1d, hidden, conv_state))
        gate = None if self.rmsnorm else self._like(z)
        dt_bias, dtype = self.dt_bias, x.dtype
        if self.dt_limit != (0.0, math.inf):  # in float32, as in `ssd`
            wide = accumulator(dtype)
            x, B, C, gate = (None if t is None else t.to(wide) for t in (x, B, C, gate))
            dt = softplus(dt.to(wide) + dt_bias.to(wide))
            dt, dt_bias = limited("Mamba2", dt, self.dt_limit, positive=True), None
        A = rates(self.A_log).view(-1, 1, 1).expand(-1, self.headdim, self.d_state)
        y = selective_state_update(
            ssm_state, x, dt.unsqueeze(2).expand(x.shape), A, B, C, self._D(each=True), z=gate,
            dt_bias=None if dt_bias is None else dt_bias.unsqueeze(1).expand(x.shape[1:]),
            dt_softplus=dt_bias is not None,
        )  # fmt: skip
        y = self._normalised(y.to(dtype).flatten(1), z, mlp)
        return _project(self.out_proj, y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zero states (B, channels, d_conv) and (B, heads, P, N), whatever the length."""
        weight = self.in_proj.weight
        made = {"device": weight.device, "dtype": dtype or weight.dtype}
        channels = self.conv1d.weight.shape[0]
        return (
            torch.zeros(batch_size, self.d_conv, channels, **made).transpose(1, 2),
            torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, **made),
        )

    def extra_repr(self):
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, headdim={self.headdim}, "
            f"ngroups={self.ngroups}"
        )

    def _split(self, projected):
        """The two halves of the MLP (or None), z, the convolution's input and dt."""
        rest = self.d_inner - self.d_ssm
        sizes = (rest, rest, self.d_ssm, self.conv1d.weight.shape[0], self.nheads)
        gate, mlp, z, hidden, dt = projected.split(sizes, -1)
        return (gate, mlp) if rest else None, z, hidden, dt

    def _heads(self, hidden):
        """x (..., H, P), B and C (..., G, N)."""
        shared = self.ngroups * self.d_state
        x, B, C = hidden.split((self.d_ssm, shared, shared), -1)
        groups = (self.ngroups, self.d_state)
        return self._like(x), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _like(self, x):
        return x.unflatten(-1, (self.nheads, self.headdim))

    def _D(self, *, each=False):
        if self.D_has_hdim:
            return self._like(self.D)
        return self.D.unsqueeze(1).expand(-1, self.headdim) if each else self.D

    def _normalised(self, y, z, mlp):
        if self.rmsnorm:
            y = self.norm(y, z)
        return y if mlp is None else torch.cat([silu(mlp[0]) * mlp[1], y], -1)

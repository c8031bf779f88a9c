# SPDX-License-Identifier: Apache-2.0
"""The layers of `model` in PyTorch's own functions: the same parameters, the same results.

What one writes without kernels. The scan goes step by step over tensors (B, channels, L, states),
as the models of transformers do on a CPU.
"""

import torch
from torch.nn.functional import embedding_bag, scaled_dot_product_attention, silu, softplus

import pentad.nn


class Mamba(pentad.nn.Mamba):
    def forward(self, hidden_states):
        length = hidden_states.shape[1]
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        x = silu(self.conv1d(x)[..., :length])
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(sizes, -1)
        dt = softplus(self.dt_proj(dt)).transpose(1, 2)
        A = -self.A_log.exp()

        # h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t. Unbound, since the gradient
        # of an index into a tensor is a tensor of its whole size, once for each step.
        decay = torch.exp(dt[..., None] * A[:, None]).unbind(2)
        added = ((dt * x)[..., None] * B[:, None]).unbind(2)
        h, ys = torch.zeros_like(decay[0]), []
        for decay_t, added_t, C_t in zip(decay, added, C.unbind(1), strict=True):
            h = decay_t * h + added_t
            ys.append((h * C_t[:, None]).sum(-1))
        y = torch.stack(ys, -1) + self.D[:, None] * x
        return self.out_proj((y * silu(z)).transpose(1, 2))


class Attention(pentad.nn.Attention):
    def forward(self, x):
        projected = [
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        ]
        at = torch.arange(x.shape[1])
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance <= self.window[0])
        out = scaled_dot_product_attention(*projected, attn_mask=mask, enable_gqa=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class ProductKeyMemory(pentad.nn.ProductKeyMemory):
    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        queries = self.norm(self.query(rows)).unflatten(-1, (self.heads, 2, -1))

        # The best k of either half, all sums of two of those, and the best k among these.
        scores = torch.einsum("rhpd,hpnd->prhn", queries, self.subkeys)
        most = min(self.k, self.n_keys)
        (first, second), (i, j) = scores.topk(most, -1)
        sums = (first[..., :, None] + second[..., None, :]).flatten(-2)
        pairs = (i[..., :, None] * self.n_keys + j[..., None, :]).flatten(-2)
        best, places = sums.topk(self.k, -1)
        out = embedding_bag(
            pairs.gather(-1, places).flatten(1),
            self.values,
            per_sample_weights=best.softmax(-1).flatten(1),
            mode="sum",
        )
        return out.view(*x.shape[:-1], -1)

# SPDX-License-Identifier: Apache-2.0
"""A small language model over bytes, built from the layers of `pentad.nn`.

The shape is Samba's (Ren et al. 2024, arXiv 2406.07522): units of a selective scan, which carries
what was said long ago, and of attention to a sliding window, which looks up what was said just now,
each followed by a layer for every byte alone. The last of those is a memory of product keys (Lample
et al. 2019, arXiv 1907.05242): thousands of values of which a byte reads a few.
"""

from dataclasses import dataclass

import torch
from torch import nn

import pentad.nn
from pentad.attention import decode

BYTES = 256


@dataclass(frozen=True)
class Config:
    """Sizes of a `HybridLM`."""

    dim: int = 128
    units: int = 2
    d_state: int = 16
    heads: int = 4
    kv_heads: int = 2
    window: int = 64  # bytes that attention sees, the present one included
    memory_heads: int = 4
    n_keys: int = 64  # a memory of 64 x 64 values
    k: int = 16  # of which a head reads 16


class HybridLM(nn.Module):
    """Bytes (B, L) -> scores of the byte that follows each (B, L, 256).

    Parameters
    ----------
    config : Config
    layers : module
        Where `Mamba`, `Attention` and `ProductKeyMemory` come from: `pentad.nn`, or its twin in
        plain PyTorch, `pentad.demo.plain`. The parameters are the same.
    """

    def __init__(self, config: Config = Config(), layers=pentad.nn):
        super().__init__()
        self.config, dim = config, config.dim
        self.embed = nn.Embedding(BYTES, dim)
        self.mixers = nn.ModuleList()
        for unit in range(config.units):
            scan = layers.Mamba(dim, d_state=config.d_state)
            attention = layers.Attention(
                dim,
                config.heads,
                kv_heads=config.kv_heads,
                causal=True,
                window=(config.window - 1, 0),
            )
            memory = layers.ProductKeyMemory(
                dim, heads=config.memory_heads, n_keys=config.n_keys, k=config.k, key_dim=dim // 2
            )
            last = unit == config.units - 1
            self.mixers.extend([scan, feed_forward(dim), attention])
            self.mixers.append(memory if last else feed_forward(dim))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in self.mixers)
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, BYTES, bias=False))

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)

    # --- One byte at a time: a step costs the same however much was said before ------------------

    def caches(self, batch: int, length: int):
        """What each layer remembers between steps, for sequences of up to `length` bytes."""
        return [self._cache(mixer, batch, length) for mixer in self.mixers]

    def _cache(self, mixer, batch, length):
        if isinstance(mixer, pentad.nn.Mamba):
            return mixer.allocate_inference_cache(batch, length)
        if isinstance(mixer, pentad.nn.Attention):
            return torch.zeros(2, batch, mixer.kv_heads, length, mixer.head_dim)
        return None

    @torch.no_grad()
    def step(self, token, caches, position: int):
        """Scores (B, 256) after `token` (B,), the one at `position`; changes the caches."""
        x = self.embed(token[:, None])
        for norm, mixer, cache in zip(self.norms, self.mixers, caches, strict=True):
            h = norm(x)
            if isinstance(mixer, pentad.nn.Mamba):
                h = mixer.step(h, *cache)[0]
            elif isinstance(mixer, pentad.nn.Attention):
                h = _attend(mixer, h, *cache, position)
            else:
                h = mixer(h)
            x = x + h
        return self.head(x)[:, 0]

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float = 0.6, seed: int = 0):
        """`prompt` and `length` bytes that the model draws to follow it."""
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        caches, text = self.caches(1, len(prompt) + length), bytearray(prompt)
        for position in range(len(prompt) + length - 1):
            scores = self.step(torch.tensor([text[position]]), caches, position)
            if position + 1 == len(text):
                odds = (scores[0] / temperature).softmax(-1)
                text.append(int(odds.multinomial(1, generator=generator)))
        return bytes(text)


def feed_forward(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))


def _attend(layer, x, k_cache, v_cache, position):
    """`layer`, a `pentad.nn.Attention`, of one byte to those in the caches."""

    def heads(project, count):
        return project(x).unflatten(-1, (count, layer.head_dim)).transpose(1, 2)

    out = decode(
        heads(layer.q_proj, layer.heads),
        k_cache,
        v_cache,
        position,
        k_new=heads(layer.k_proj, layer.kv_heads),
        v_new=heads(layer.v_proj, layer.kv_heads),
        window=layer.window,
    )
    return layer.out_proj(out.transpose(1, 2).flatten(2))

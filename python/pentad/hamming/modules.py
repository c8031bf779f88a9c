# SPDX-License-Identifier: Apache-2.0
"""Modules on binary codes."""

import torch

from pentad.hamming import functional


class Binarize(torch.nn.Module):
    """`pentad.hamming.binarize` as a layer; in eval mode the sign, without sampling.

    Parameters
    ----------
    estimator : {"ste", "tanh", "bernoulli"}
    temperature : float
        Kept as an attribute, so that a schedule may lower it.

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.Binarize("tanh")
    >>> layer(torch.tensor([0.3, -2.0]))
    tensor([ 1., -1.])
    """

    def __init__(self, estimator: str = "ste", temperature: float = 1.0):
        super().__init__()
        functional.check_choice("Binarize", "estimator", estimator, functional._ESTIMATORS)
        self.estimator = estimator
        self.temperature = temperature

    def forward(self, x):
        """(..., dim) -> (..., dim) of +-1."""
        estimator = self.estimator
        if estimator == "bernoulli" and not self.training:
            estimator = "tanh"
        return functional.binarize(x, estimator, self.temperature)

    def extra_repr(self):
        return f"estimator={self.estimator!r}, temperature={self.temperature}"


class BinaryMemory(torch.nn.Module):
    """Clean-up over a packed codebook: ``softmax(beta * score(x, codes)) @ (+-1 codes)``.

    One attention step of a resonator or Hopfield network whose patterns are binary codes; the
    codebook takes 1/32 of the memory of a float one.

    Parameters
    ----------
    codes : (n, ceil(dim / 8)) uint8
        Kept as a buffer.
    dim : int
    beta : float
        Inverse temperature; by default ``1 / sqrt(dim)``.

    Examples
    --------
    >>> import torch
    >>> codes = pentad.hamming.pack(torch.eye(4) - 0.5)
    >>> memory = pentad.nn.BinaryMemory(codes, 4, beta=8.0)
    >>> memory(torch.tensor([[0.9, -0.2, -0.1, -0.3]])).sign()
    tensor([[ 1., -1., -1., -1.]])
    """

    def __init__(self, codes, dim: int, beta: float | None = None):
        super().__init__()
        functional.check_codes("BinaryMemory", "codes", codes)
        self.dim = functional.check_dim("BinaryMemory", codes, dim)
        self.beta = dim**-0.5 if beta is None else beta
        self.register_buffer("codes", codes)

    def forward(self, x):
        """(..., dim) -> (..., dim) float32."""
        weights = torch.softmax(self.beta * functional.score(x, self.codes), dim=-1)
        return functional.weighted_sum(weights, self.codes, self.dim)

    def extra_repr(self):
        return f"codes={len(self.codes)}, dim={self.dim}, beta={self.beta:.4g}"

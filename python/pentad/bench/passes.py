# SPDX-License-Identifier: Apache-2.0
"""What is timed of a differentiable function: its forward pass, or both passes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .harness import Call

Op = Callable[..., torch.Tensor]


def forward(op: Op, leaves, d_out) -> Call:
    def call():
        with torch.no_grad():
            return (op(*leaves),)

    return call


def training(op: Op, leaves, d_out) -> Call:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call():
        out = op(*leaves)
        return out, *torch.autograd.grad(out, leaves, d_out)

    return call


PASSES = {"forward": forward, "training": training}

# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with torch's dispatcher: the one place that knows how.

`Library.define` / `impl` with a fake beside it, because `custom_op` and `register_autograd` cost
three to five times as much per call. Gradients live in `torch.autograd.Function`s outside the op,
which a caller skips when none is needed. Going through the dispatcher is what makes torch.compile,
FakeTensor, lazily negated tensors and opcheck work: a raw call would read the memory of a lazy
tensor unnegated.
"""

import inspect

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("pentad", "DEF")


def define(schema: str, kernel, fake):
    """Define ``pentad::<schema>`` with its CPU kernel and its shape function; return the overload.

    Parameters
    ----------
    schema : str
        ``"name(Tensor x, ...) -> Tensor"``; fixed arity, no output aliases an input.
    kernel, fake : callable
        Take the schema's arguments. `kernel` computes; `fake` returns empty tensors of the same
        shapes and dtypes, and is what tracing runs.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"pentad::{name}", fake, lib=_library)
    return getattr(torch.ops.pentad, name).default


def quick_apply(function):
    """Decorate a `torch.autograd.Function`: its forward's signature is found out once.

    `apply` asks for it at each call, which takes a quarter of the time of a small one.
    """
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def forward_mode() -> bool:
    """Whether forward-mode differentiation is under way.

    An autograd.Function then refuses, where the bare operator would give tangents of 0.
    """
    return forward_ad._current_level >= 0


def needs_grad(*tensors) -> bool:
    """Whether an autograd.Function is needed at all; skipping it saves about a microsecond."""
    if forward_mode():
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Once(torch.autograd.Function):
    """The identity on the first tensors, which depends on all and refuses to be differentiated."""

    @staticmethod
    def forward(op, count, *tensors):
        return tensors[:count]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"[{ctx.op}] the gradient cannot be differentiated a second time")


def spread(op, grads, wanted, inputs):
    """One gradient or None for each input, from those of the wanted ones; once differentiable."""
    grads = iter(differentiated_once(op, grads, inputs))
    return tuple(next(grads) if want else None for want in wanted)


def differentiated_once(op, grads, inputs):
    """The gradients that a backward pass returns, which depend on all `inputs`.

    Where a graph of that pass is built, a second derivative is refused and not silently zero.
    """
    if torch.is_grad_enabled():
        return _Once.apply(op, len(grads), *grads, *inputs)
    return grads

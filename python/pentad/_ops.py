# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with torch's dispatcher: the one place that knows how.

`Library.define` / `impl` with a fake beside it, because `custom_op` and `register_autograd` cost
three to five times as much per call. Gradients live in `torch.autograd.Function`s outside the op,
which a caller skips when none is needed. Going through the dispatcher is what makes torch.compile,
FakeTensor, lazily negated tensors and opcheck work: a raw call would read the memory of a lazy
tensor unnegated. `direct` says where nobody would see the difference, as in a step of some
microseconds, of which the dispatcher's way takes 3.5.
"""

import inspect

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

_library = torch.library.Library("pentad", "DEF")

try:
    _modes = torch._C._dispatch_tls_local_include_set
    _functions = torch._C._len_torch_function_stack
    _profiled = torch._C._autograd._profiler_enabled
    _INFERENCE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    _NO_MODE = _INFERENCE.add(torch._C.DispatchKey.ADInplaceOrView)
except AttributeError:  # a torch that tells nobody: every call goes through the dispatcher

    def _functions():
        return 1


def define(schema: str, kernel, fake, *, cuda=False):
    """Define ``pentad::<schema>`` with its kernel and its shape function; return the overload.

    Parameters
    ----------
    schema : str
        ``"name(Tensor x, ...) -> Tensor"``; fixed arity, no output aliases an input.
    kernel, fake : callable
        Take the schema's arguments. `kernel` computes; `fake` returns empty tensors of the same
        shapes and dtypes, and is what tracing runs.
    cuda : bool
        Whether `kernel` takes CUDA tensors too.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA") if cuda else ("CPU",):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"pentad::{name}", fake, lib=_library)
    return getattr(torch.ops.pentad, name).default


def direct(*tensors) -> bool:
    """Whether a kernel may be called on these, or None among them, without the dispatcher.

    Not where torch.compile traces, a mode is on (whoever wants to see operators adds a key to the
    thread's set: fake tensors, counters of flop, torch.func, functionalization, torch.jit.trace)
    or the profiler runs; nor for subclasses and lazily negated tensors. What has no memory, as a
    meta tensor, the kernel refuses: the caller then asks the dispatcher.
    """
    if is_dynamo_compiling() or _functions() or _profiled():
        return False
    modes = _modes()
    if modes != _NO_MODE and modes != _INFERENCE:
        return False
    for t in tensors:  # noqa: SIM110 -- a generator takes 0.3 us longer
        if t is not None and (type(t) is not Tensor or t.is_neg()):
            return False
    return True


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


def autocast_device(tensor) -> str:
    """The device to name to `torch.autocast`, which knows none for meta tensors."""
    return "cpu" if tensor.is_meta else tensor.device.type


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

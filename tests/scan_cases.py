# SPDX-License-Identifier: Apache-2.0
"""Problems for `pentad.scan`, and how far a result may lie from the definition in float64."""

import math

import torch
from attention_cases import DTYPES, HALVES, dtype_name

from pentad import scan
from pentad.scan import reference

__all__ = [
    "ALL", "DTYPES", "HALVES", "LAYOUTS", "SPREADS", "Problem", "assert_gradcheck",
    "assert_same_bits", "check", "dtype_name", "scan_problem", "views_of",
]  # fmt: skip

# Granted beside the error of plain PyTorch, which is nearly exact in small float32 problems:
# roundings of the largest value.
ROUNDINGS = {torch.float32: 20, torch.bfloat16: 4, torch.float16: 4, torch.float64: 256}
IN_PLACE = {
    "selective_state_update": "state",
    "causal_conv1d_update": "conv_state",
    "linear_attention_update": "state",
    "delta_rule_update": "state",
}


class Problem:
    """Arguments of a function of `pentad.scan`, and what an implementation of it gives for them."""

    def __init__(self, op, dtype, inputs, seed=0, spread=lambda upstream: upstream):
        self.op, self.dtype, self.inputs, self.seed = op, dtype, inputs, seed
        self.spread = spread  # puts the gradient of the first output into other memory

    def results(self, function=None, double=False, gradients=True):
        """Outputs and gradients by name: out0, out1, ... and d<input>."""
        function = function or self.function_of(scan)
        given, leaves = {}, {}
        for name, value in self.inputs.items():
            if differentiable(value):
                value = value.detach()
                if double:
                    value = value.to(torch.complex128 if value.is_complex() else torch.float64)
                leaves[name] = value.requires_grad_(gradients)
            given[name] = value
        found = function(**given)
        found = found if isinstance(found, tuple) else (found,)
        results = {f"out{i}": t.detach() for i, t in enumerate(found)}
        if gradients:
            upstream = self.upstream(found)
            grads = torch.autograd.grad(
                found, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
            )
            results |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
        return results

    def function_of(self, module):
        """The function as `module` has it; what it writes in place becomes its second output."""
        function = getattr(module, self.op)
        state_name = IN_PLACE.get(self.op)
        if state_name is None:
            return function

        def on_a_copy(**given):
            state = given[state_name].clone()
            return function(**given | {state_name: state}), state

        return on_a_copy

    def slack(self, name):
        """How many times `ROUNDINGS` a result is granted."""
        return 1

    def upstream(self, outputs):
        """The same numbers for each implementation, which self.dtype can hold."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(output):
            shape = torch.view_as_real(output).shape if output.is_complex() else output.shape
            numbers = torch.randn(shape, generator=generator)
            if not self.dtype.is_complex:
                numbers = numbers.to(self.dtype)
            numbers = numbers.to(output.dtype.to_real())
            return torch.view_as_complex(numbers) if output.is_complex() else numbers

        first, *others = map(draw, outputs)
        return [self.spread(first), *others]


def differentiable(value):
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def assert_gradcheck(problem):
    """The gradients of float64 inputs against finite differences."""
    leaves = {n: t.requires_grad_() for n, t in problem.inputs.items() if differentiable(t)}
    rest = {n: t for n, t in problem.inputs.items() if n not in leaves}
    function = problem.function_of(scan)
    assert torch.autograd.gradcheck(
        lambda *given: function(**dict(zip(leaves, given, strict=True)), **rest),
        tuple(leaves.values()),
    )


def assert_same_bits(problem, threads, gradients):
    threads(1)
    want = problem.results(gradients=gradients)
    for count in (2, 3, 8):
        threads(count)
        for name, got in problem.results(gradients=gradients).items():
            assert torch.equal(got, want[name]), (name, count)


def check(problem, function=None, gradients=True, factor=2):
    """Errors against the definition in float64 are at most twice (gradients: three times) those of
    plain PyTorch with the same inputs."""
    defined = problem.function_of(reference)
    ours = problem.results(function, gradients=gradients)
    plain = problem.results(defined, gradients=gradients)
    exact = problem.results(defined, double=True, gradients=gradients)
    assert ours.keys() == plain.keys() == exact.keys()
    for name, got in ours.items():
        assert got.dtype == plain[name].dtype, name
        grown = factor + 1 if name[0] == "d" else factor
        assert_as_close(name, got, plain[name], exact[name], grown, problem.slack(name))
    return ours


def error(got, exact):
    """Largest difference; inf unless what is not finite is the same."""
    got, exact = (torch.view_as_real(t) if t.is_complex() else t for t in (got, exact))
    got, exact = got.double(), exact.double()
    assert got.shape == exact.shape
    rest = ~(got.isfinite() & exact.isfinite())
    same = (got == exact) | (got.isnan() & exact.isnan())
    if not same[rest].all():
        return math.inf
    return float((got - exact)[~rest].abs().max()) if not rest.all() else 0.0


def within(exact, dtype):
    """`exact`, but infinite where `dtype` is."""
    rounded = exact.to(dtype)
    return exact.where(rounded.isfinite() | exact.isnan(), rounded.to(exact.dtype))


def assert_as_close(name, got, plain, exact, factor, slack=1):
    exact = within(exact, got.dtype)
    finite = exact[exact.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    dtype = got.dtype.to_real()
    roundings = slack * ROUNDINGS[dtype] * torch.finfo(dtype).eps * size
    limit = factor * error(plain, exact) + roundings
    assert math.isfinite(limit), f"anything would do for {name}"
    found = error(got, exact)
    assert found <= limit, f"{name} is {found:.3g} off, at most {limit:.3g} accepted"


# --- Memory ---------------------------------------------------------------------------------------


def transposed(x):
    """The last dimension but one is the inner one in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


def reversed_dims(x):
    """The first dimension is the inner one in memory."""
    order = tuple(range(x.ndim))[::-1]
    return x.permute(order).contiguous().permute(order)


def gaps(x):
    """Every second element of each dimension; nan between them."""
    memory = x.new_full([2 * size for size in x.shape], math.nan)
    view = memory[(slice(None, None, 2),) * x.ndim]
    view.copy_(x)
    return view


def repeated(x, dim):
    """The first element along `dim`, with stride 0."""
    return x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x)


def views_of(inputs, layout):
    """The same numbers (but with "repeated...") in other memory."""
    # What varies with time as transformers passes it: B and C are columns of a projection.
    views = dict(inputs)
    for i, (name, x) in enumerate(inputs.items()):
        if not differentiable(x) or not x.ndim:
            continue
        if layout == "transposed":
            views[name] = transposed(x)
        elif layout == "reversed_dims":
            views[name] = reversed_dims(x)
        elif layout == "gaps":
            views[name] = gaps(x)
        elif layout == "repeated":
            views[name] = repeated(x, (i + 1) % x.ndim)
        elif layout == "repeated_time":
            views[name] = repeated(x, -1)
        elif layout == "transformers":
            if name in ("u", "z", "x"):
                views[name] = transposed(x)
            elif name in ("B", "C") and x.ndim >= 3:
                wide = torch.cat([torch.zeros_like(x), x, torch.ones_like(x)], -2)
                views[name] = transposed(wide)[..., x.shape[-2] : 2 * x.shape[-2], :]
        else:
            assert layout == "contiguous"
    return views


LAYOUTS = (
    "contiguous", "transposed", "transformers", "reversed_dims", "gaps", "repeated",
    "repeated_time",
)  # fmt: skip
SPREADS = {
    "contiguous": lambda x: x,
    "transposed": transposed,
    "transformers": transposed,
    "reversed_dims": reversed_dims,
    "gaps": gaps,
    "repeated": lambda x: repeated(x, 1),
    "repeated_time": lambda x: repeated(x, -1),
}


# --- Selective scan -------------------------------------------------------------------------------

SCAN_OPTIONS = (
    "D", "z", "delta_bias", "delta_softplus", "initial_state", "packed", "reverse", "last_state",
    "constant_B", "constant_C", "grouped", "complex", "complex_BC",
)  # fmt: skip


def possible(names, dtype):
    """The names, less those that contradict others: complex B and C have no half precision."""
    without = set()
    if {"constant_B", "constant_C"} <= set(names):
        without |= {"grouped", "complex_BC"}
    if "complex" in names or dtype in HALVES:
        without |= {"complex_BC"}
    return [name for name in names if name not in without]


ALL = ("D", "z", "delta_bias", "delta_softplus", "initial_state", "last_state")


def ends_of(length):
    """cu_seqlens with an empty sequence, and one of a single step."""
    ends = [0, length // 3, length // 3, min(length // 3 + 1, length), length]
    return torch.tensor(ends, dtype=torch.int32)


def scan_problem(dtype, names=(), b=2, d=18, n=5, l=40, groups=3, layout="contiguous", seed=0):  # noqa: E741
    """Arguments of selective_scan. "complex" has B and C of interleaved parts, "complex_BC" of
    complex numbers."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def draw_complex(*shape):
        return torch.complex(draw(*shape), draw(*shape)).to(wide.to_complex())

    complex_ = "complex" in names or "complex_BC" in names
    b = 1 if "packed" in names else b
    A = -torch.exp(draw(d, n)).to(wide) / 2
    if complex_:
        A = torch.complex(A, draw(d, n).to(wide))
    softplus = "delta_softplus" in names
    inputs = {
        "u": draw(b, d, l).to(dtype),
        "delta": (draw(b, d, l) - 1.5 if softplus else 0.3 * draw(b, d, l).abs()).to(dtype),
        "A": A,
    }
    for name in ("B", "C"):
        many = (groups,) if "grouped" in names else ()
        if f"constant_{name}" in names:
            inputs[name] = draw_complex(d, n) if complex_ else draw(d, n).to(wide)
        elif "complex_BC" in names:
            inputs[name] = draw_complex(b, *many, n, l)
        else:
            inputs[name] = draw(b, *many, n, 2 * l if complex_ else l).to(dtype)
    if "D" in names:
        inputs["D"] = draw(d).to(wide)
    if "z" in names:
        inputs["z"] = draw(b, d, l).to(dtype)
    if "delta_bias" in names:
        inputs["delta_bias"] = (draw(d) if softplus else 0.1 * draw(d).abs()).to(wide)
    if softplus:
        inputs["delta_softplus"] = True
    sequences = b
    if "packed" in names:
        inputs["cu_seqlens"] = ends_of(l)
        sequences = len(inputs["cu_seqlens"]) - 1
    if "initial_state" in names:
        shape = sequences, d, n
        inputs["initial_state"] = draw_complex(*shape) if complex_ else draw(*shape).to(wide)
    if "reverse" in names:
        inputs["reverse"] = True
    if "last_state" in names:
        inputs["return_last_state"] = True
    views = views_of(inputs, layout)
    return Problem("selective_scan", dtype, views, seed, SPREADS[layout])

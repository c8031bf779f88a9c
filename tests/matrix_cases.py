# SPDX-License-Identifier: Apache-2.0
"""Problems for the recurrences of `pentad.scan` whose state is a matrix.

What a result may differ from the definition in float64 by stands in `scan_cases.check`.
"""

import itertools
import random

import torch
from scan_cases import HALVES, Problem, gaps, repeated, reversed_dims, transposed

from pentad import scan
from pentad.scan import reference

# Two chunks of the kernels, of which the second is begun.
LENGTH = 75


def sampled(what, count, *key):
    return random.Random(repr(key)).sample(list(what), count)


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def ends_of(length):
    """cu_seqlens with a short, an empty and a single-step sequence before a long one."""
    short = length // 10
    return torch.tensor([0, short, short, min(short + 1, length), length], dtype=torch.int32)


def sequences_of(batch, length, seed=0):
    """A seq_idx that changes here and there, up as well as down."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(batch, length, generator=generator) < 3 / 40
    return (changes.cumsum(1) * 3 % 5 - 1).int()


# --- Memory ---------------------------------------------------------------------------------------


def heads_first(x):
    """The heads before the steps in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x


def columns(x):
    """Columns of a projection: the heads of a step side by side, other numbers around them."""
    if x.ndim < 3:
        return x
    flat = x.flatten(2)
    wide = torch.cat([torch.full_like(flat, torch.nan), flat, torch.full_like(flat, torch.nan)], 2)
    return wide[:, :, flat.shape[2] : 2 * flat.shape[2]].view(x.shape)


LAYOUTS = {
    "contiguous": lambda x: x,
    "heads_first": heads_first,
    "columns": columns,
    "transposed": transposed,
    "reversed_dims": reversed_dims,
    "gaps": gaps,
    "repeated": lambda x: repeated(x, x.numel() % x.ndim) if x.ndim else x,
    "repeated_time": lambda x: repeated(x, 1) if x.ndim > 2 else x,
}


def spread(x, layout):
    view = LAYOUTS[layout](x)
    assert view.shape == x.shape
    return view


def problem_of(op, dtype, inputs, layout, seed):
    inputs = {n: spread(t, layout) if is_float(t) else t for n, t in inputs.items()}
    return MatrixProblem(op, dtype, inputs, seed, lambda upstream: spread(upstream, layout))


class MatrixProblem(Problem):
    """Each result is asked for its gradient only where it has one: not a state that is always 0."""

    def results(self, function=None, double=False, gradients=True):
        function = function or self.function_of(scan)
        if not gradients:
            return super().results(function, double, gradients)

        def connected(**given):
            zero = sum(t.sum() for t in given.values() if is_float(t) and t.requires_grad) * 0
            found = function(**given)
            parts = found if isinstance(found, tuple) else (found,)
            return tuple(t if t.requires_grad else t + zero for t in parts)

        return super().results(connected, double, gradients)

    def slack(self, name):
        slack = 1
        if self.op == "delta_rule":
            # Where keys are overwritten in a chunk, its sums of 64 steps are larger than what is
            # left: by up to 64 times where all are parallel, by 8 where they are in random order.
            keys = self.inputs["k"]
            parallel = keys.shape[-1] == 1 or keys.stride(1) == 0
            slack = 64 if parallel else max(1, 8 / keys.shape[-1])
        constant = name == "ddecay" and self.inputs["decay"].ndim < 3
        if constant or name in ("dA", "dD", "ddt_bias"):
            slack *= 4  # a sum over all steps, larger on the way than in the end
        return slack


# --- SSD ------------------------------------------------------------------------------------------

SSD_OPTIONS = (
    "D", "D_per_value", "z", "dt_bias", "dt_softplus", "dt_limit", "dt_float", "initial",
    "seq_idx", "packed", "reverse", "not_causal", "grouped", "chunk_size",
)  # fmt: skip
SSD_ALL = ("D", "z", "dt_bias", "dt_softplus", "initial", "grouped")


def ssd_possible(names):
    """The names, less those that contradict others."""
    without = set()
    if "D" in names:
        without |= {"D_per_value"}
    if "packed" in names:
        without |= {"seq_idx"}
    if "not_causal" in names:
        without |= {"initial", "seq_idx", "packed"}
    return [name for name in names if name not in without]


def ssd_problem(
    dtype, names=(), b=2, l=LENGTH, h=4, p=5, n=6, groups=2, layout="contiguous", seed=0  # noqa: E741
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    b = 1 if "packed" in names else b
    groups = groups if "grouped" in names else 1
    softplus = "dt_softplus" in names
    dt = draw(b, l, h) - 1.5 if softplus else 0.3 * draw(b, l, h).abs() - 0.05
    inputs = {
        "x": draw(b, l, h, p).to(dtype),
        "dt": dt.to(wide if "dt_float" in names else dtype),
        "A": -torch.exp(draw(h)).to(wide),
        "B": draw(b, l, groups, n).to(dtype),
        "C": draw(b, l, groups, n).to(dtype),
    }
    if "chunk_size" in names:
        inputs["chunk_size"] = 16
    if "D" in names:
        inputs["D"] = draw(h).to(wide)
    if "D_per_value" in names:
        inputs["D"] = draw(h, p).to(wide)
    if "z" in names:
        inputs["z"] = draw(b, l, h, p).to(dtype)
    if "dt_bias" in names:
        inputs["dt_bias"] = (draw(h) if softplus else 0.1 * draw(h).abs()).to(wide)
    if softplus:
        inputs["dt_softplus"] = True
    if "dt_limit" in names:
        inputs["dt_limit"] = (0.05, 0.4)
    if "seq_idx" in names:
        inputs["seq_idx"] = sequences_of(b, l, seed)
    sequences = b
    if "packed" in names:
        inputs["cu_seqlens"] = ends_of(l)
        sequences = len(inputs["cu_seqlens"]) - 1
    if "initial" in names:
        inputs["initial_states"] = draw(sequences, h, p, n).to(wide)
    if "reverse" in names:
        inputs["reverse"] = True
    if "not_causal" in names:
        inputs["causal"] = False
    if "no_last" not in names:
        inputs["return_final_states"] = True
    return problem_of("ssd", dtype, inputs, layout, seed)


# --- Linear attention and the delta rule ----------------------------------------------------------

DECAYS = ("decay_head", "decay_step", "decay_key", "decay_key_step")
MAPS = ("elu", "relu", "cosine", "taylor", "square")
DELTA_OPTIONS = (*DECAYS, "log_space", "scale", "initial", "reverse", "packed", "grouped")
LINEAR_OPTIONS = (*DELTA_OPTIONS, *MAPS, "normalize", "not_causal", "prefix")


def linear_possible(names):
    """The names, less those that contradict others."""
    decays, maps = ([n for n in names if n in group] for group in (DECAYS, MAPS))
    without = {*decays[1:], *maps[1:]}
    if "not_causal" in names:
        without |= {*decays, "packed", "log_space"}
    if not set(decays) - without:
        without |= {"log_space"}
    return [name for name in names if name not in without]


def square(x):
    return x * x + 0.25


def decay_of(names, draw, b, l, h, n):  # noqa: E741
    """From 0.1 to nearly 1, or its logarithm; None without one."""
    shapes = {
        "decay_head": (h,),
        "decay_step": (b, l, h),
        "decay_key": (h, n),
        "decay_key_step": (b, l, h, n),
    }
    for name, shape in shapes.items():
        if name in names:
            decay = 0.1 + 0.9 * torch.sigmoid(2 * draw(*shape) + 2)
            return decay.log() if "log_space" in names else decay
    return None


def with_decays(problem, numbers, share=3):
    """Every `share`-th decay replaced by these numbers in turn."""
    decay = problem.inputs["decay"]
    places = decay.flatten()[::share]
    places.copy_(torch.tensor(numbers).repeat(len(places))[: len(places)])
    return problem


def linear_problem(
    dtype, names=(), b=2, l=LENGTH, h=4, p=5, n=6, groups=2, layout="contiguous", seed=0  # noqa: E741
):  # fmt: skip
    """Arguments of linear_attention, whose normalisers are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normalize = "normalize" in names

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def draw_key(*shape):
        keys = draw(*shape)
        return (keys.abs() + 0.1 if normalize else keys).to(dtype)

    b = 1 if "packed" in names else b
    groups = groups if "grouped" in names else 1
    inputs = {
        "q": draw_key(b, l, groups, n),
        "k": draw_key(b, l, groups, n),
        "v": draw(b, l, h, p).to(dtype),
    }
    features = 1 + n + n * n if "taylor" in names else n
    decay = decay_of(names, draw, b, l, h, features)
    if decay is not None:
        inputs["decay"] = decay.to(wide)
        inputs["log_space"] = "log_space" in names
    if normalize:
        inputs["normalize"] = True
    for name in MAPS:
        if name in names:
            inputs["feature_map"] = square if name == "square" else name
    if "scale" in names:
        inputs["scale"] = 0.3
    sequences = b
    if "packed" in names:
        inputs["cu_seqlens"] = ends_of(l)
        sequences = len(inputs["cu_seqlens"]) - 1
    if "initial" in names:
        state = draw(sequences, h, features, p + normalize)
        if normalize:
            state[..., -1].abs_()
        inputs["initial_state"] = state.to(wide)
    if "prefix" in names:
        inputs["prefix_k"] = draw_key(sequences, 7, groups, n)
        inputs["prefix_v"] = draw(sequences, 7, h, p).to(dtype)
    if "reverse" in names:
        inputs["reverse"] = True
    if "not_causal" in names:
        inputs["causal"] = False
    if "no_last" not in names:
        inputs["return_final_state"] = True
    return problem_of("linear_attention", dtype, inputs, layout, seed)


def unit(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def delta_problem(
    dtype, names=(), b=2, l=LENGTH, h=4, p=5, n=6, groups=2, layout="contiguous", seed=0  # noqa: E741
):  # fmt: skip
    """Arguments of delta_rule, with keys of length 1, without which the states grow."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    b = 1 if "packed" in names else b
    groups = groups if "grouped" in names else 1
    inputs = {
        "q": draw(b, l, groups, n).to(dtype),
        "k": unit(draw(b, l, groups, n)).to(dtype),
        "v": draw(b, l, h, p).to(dtype),
        "beta": torch.sigmoid(draw(b, l, h)).to(wide),
    }
    decay = decay_of(names, draw, b, l, h, n)
    if decay is not None:
        inputs["decay"] = decay.to(wide)
        inputs["log_space"] = "log_space" in names
    if "scale" in names:
        inputs["scale"] = 0.3
    sequences = b
    if "packed" in names:
        inputs["cu_seqlens"] = ends_of(l)
        sequences = len(inputs["cu_seqlens"]) - 1
    if "initial" in names:
        inputs["initial_state"] = draw(sequences, h, n, p).to(wide)
    if "reverse" in names:
        inputs["reverse"] = True
    if "no_last" not in names:
        inputs["return_final_state"] = True
    return problem_of("delta_rule", dtype, inputs, layout, seed)


# --- One-token steps ------------------------------------------------------------------------------


def update_problem(
    op, dtype, names=(), b=3, h=4, p=5, n=6, groups=2, rows=None, state_dtype=None, seed=0,
    layout="contiguous",
):  # fmt: skip
    """Arguments of linear_attention_update or delta_rule_update."""
    make = linear_problem if op == "linear_attention" else delta_problem
    given = make(dtype, ("initial", *names), b, 1, h, p, n, groups, seed=seed).inputs
    state = given.pop("initial_state")
    if rows is not None:
        state = torch.cat([state, state + 1, state[:1] + 2])
        given["state_batch_indices"] = torch.tensor(rows, dtype=torch.int32)
    inputs = {"state": state.to(state_dtype or state.dtype)}
    for name, value in given.items():
        if name in ("q", "k", "v", "beta") or (name == "decay" and value.ndim > 2):
            value = value[:, 0]
        if name not in ("return_final_state",):
            inputs[name] = value
    return problem_of(f"{op}_update", dtype, inputs, layout, seed)


def halves_of(index):
    return HALVES[index % len(HALVES)]


# --- The same in another way ----------------------------------------------------------------------

VARYING = ("x", "dt", "B", "C", "z", "seq_idx", "q", "k", "v", "beta")
STATES = {"ssd": ("initial_states", "return_final_states")}


def cut(given, begin, end):
    """The arguments of some steps."""
    return {
        name: value[:, begin:end]
        if name in VARYING or (name == "decay" and value.ndim > 2)
        else value
        for name, value in given.items()
    }


def in_pieces(function, given, cuts):
    """`function` piece by piece, each from the state that the piece before it left."""
    initial, _ = STATES.get(function.__name__, ("initial_state", "return_final_state"))
    length = next(given[n] for n in ("x", "v") if n in given).shape[1]
    ends, outs = [0, *cuts, length], {}
    pieces = list(itertools.pairwise(ends))
    for begin, end in pieces[::-1] if given.get("reverse") else pieces:
        outs[begin, end], given[initial] = function(**cut(given, begin, end))
    return torch.cat([outs[piece] for piece in pieces], 1), given[initial]


def one_by_one(function, given):
    """`function` for each packed sequence alone."""
    given = dict(given)
    ends = given.pop("cu_seqlens").tolist()
    outs, lasts = [], []
    for s, (begin, end) in enumerate(itertools.pairwise(ends)):
        piece = cut(given, begin, end)
        for name in ("initial_states", "initial_state", "prefix_k", "prefix_v"):
            if name in piece:
                piece[name] = piece[name][s : s + 1]
        out, last = function(**piece)
        outs.append(out)
        lasts.append(last)
    return torch.cat(outs, 1), torch.cat(lasts)


def flipped(function, given):
    """`function` of the steps in the other order."""
    given = dict(given)
    given.pop("reverse", None)
    turned = {
        name: value.flip(1) if name in VARYING or (name == "decay" and value.ndim > 2) else value
        for name, value in given.items()
    }
    out, last = function(**turned)
    return out.flip(1), last


# --- What must not matter -------------------------------------------------------------------------


def past_and_present(begin, reverse):
    """The steps before `begin` as the scan runs, and the others."""
    if reverse:
        return slice(begin + 1, None), slice(None, begin + 1)
    return slice(None, begin), slice(begin, None)


def assert_past_is_forgotten(problem, past, present, also=()):
    """It changes no bit of the values after it, and their gradients are 0 where it is concerned."""
    function, given = problem.function_of(scan), problem.inputs
    initial = "initial_states" if "initial_states" in given else "initial_state"
    written = [n for n in ("x", "B", "k", "v", "beta", *also) if n in given]
    out, last = function(**given)
    other = {n: t.clone() if torch.is_tensor(t) else t for n, t in given.items()}
    for name in written:
        other[name][:, past] = torch.rand(other[name][:, past].shape).to(other[name].dtype)
    other[initial] += 1e6
    got, got_last = function(**other)
    assert torch.equal(got[:, present], out[:, present])
    assert torch.equal(got_last, last)
    assert not torch.equal(got[:, past], out[:, past])

    leaves = {n: given[n].clone().requires_grad_() for n in (*written, initial)}
    out, last = function(**given | leaves)
    loss = out[:, present].float().square().sum() + last.square().sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert not grads.pop(initial).any()
    for name, grad in grads.items():
        assert not grad[:, past].any(), name
        assert grad[:, present].any(), name


def assert_bad_number_stays(problem, name, where, bad):
    """It reaches what depends on it by the definition, and changes no bit of anything else."""
    definition = problem.function_of(reference)

    def both(gradients):
        return (problem.results(f, gradients=gradients) for f in (None, definition))

    before, plain_before = both(gradients=False)
    problem.inputs[name][where] = bad
    for gradients in (False, True):
        ours, plain = both(gradients)
        for key, got in ours.items():
            finite, expected = got.isfinite(), plain[key].isfinite()
            if key in before:
                assert torch.equal(finite, expected), key
                assert not finite.all() or key != "out0"
                same = plain[key] == plain_before[key]
                assert torch.equal(got[same], before[key][same]), key
            elif bad != bad:  # infinities cancel, in other places where the sums are others
                assert not finite[~expected].any(), key


def assert_updates_in_any_memory(problem):
    """The same numbers for each layout, and nothing written between those of the state."""
    function, given = problem.function_of(scan), problem.inputs
    want, want_state = function(**given)
    for view in (transposed, reversed_dims, gaps):
        views = {n: view(t) if is_float(t) else t for n, t in given.items()}
        state = views.pop("state")
        got = getattr(scan, problem.op)(state, **views)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(state, want_state)
    memory = state.new_empty(0).set_(state.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - state.numel()


def assert_rows_are_used(problem, results):
    """Padding gives 0, and rows that no index names stay."""
    rows = problem.inputs["state_batch_indices"].tolist()
    for b, row in enumerate(rows):
        assert results["out0"][b].any() == (row >= 0)
    for row, state in enumerate(problem.inputs["state"]):
        assert torch.equal(results["out1"][row], state) == (row not in rows)


def steps_of(update):
    """The whole-sequence function as a loop of one-token steps."""

    def by_steps(initial_state, return_final_state=True, **given):
        state = initial_state.clone()
        given, options = dict(given), {}
        for name in [n for n in given if n not in VARYING]:
            value = given.pop(name)
            if name == "decay" and value.ndim > 2:
                given[name] = value
            else:
                options[name] = value
        outs = [
            update(state, **{n: value[:, t] for n, value in given.items()}, **options)
            for t in range(given["v"].shape[1])
        ]
        return torch.stack(outs, 1), state

    return by_steps


def decays_by_pairs(decay, q, v):
    """(B, H, T, S, N): the product of the decays after step S up to T; 0 where S is after T."""
    (batch, length, keys), heads = (*q.shape[:2], q.shape[3]), v.shape[2]
    if decay is None:
        decay = q.new_ones(heads)
    if decay.ndim in (1, 3):
        decay = decay[..., None]
    decay = decay.expand(batch, length, heads, keys)
    rows = [decay.new_zeros(batch, heads, length, keys)]
    for t in range(length):
        row = rows[-1] * decay[:, t, :, None]
        here = torch.arange(length)[:, None] == t
        rows.append(torch.where(here, torch.ones_like(row), row))
    return torch.stack(rows[1:], 2)

# SPDX-License-Identifier: Apache-2.0
"""Problems for attention, and how far a result may lie from the definition in float64."""

import math

import torch

from pentad.attention import BlockMask, attention, reference

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
# Granted because plain PyTorch is nearly exact in small float32 problems (a single query's dot
# products have 16 partial sums there, and a row of one key has gradients of exactly 0), where the
# polynomial exponential (7.5e-8, and its own roundings) shows: roundings of the largest value.
ROUNDINGS = {torch.float32: 20, torch.bfloat16: 4, torch.float16: 4, torch.float64: 256}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# --- Options --------------------------------------------------------------------------------------
# Each is a function of the problem's sizes, its dtype and draw(*shape), which gives normal numbers.


def _block_mask(sizes, dtype, draw):
    def fn(b, h, i, j):
        return ((i // 7 + j // 9 + b + h) % 3 > 0) & (i // 32 != 1)

    return {
        "block_mask": BlockMask.from_function(
            fn, sizes.b, sizes.hq, sizes.sq, sizes.sk, q_block=16, k_block=32
        )
    }


OPTIONS = {
    "causal": lambda s, dtype, draw: {"causal": True},
    "top_left": lambda s, dtype, draw: {"causal": "top_left"},
    "window": lambda s, dtype, draw: {"window": (20, 9)},
    "scale": lambda s, dtype, draw: {"scale": -0.4},
    "bias": lambda s, dtype, draw: {"bias": draw(s.b, s.hq, s.sq, s.sk).to(dtype)},
    "shared_bias": lambda s, dtype, draw: {"bias": draw(s.sq, s.sk)},
    "key_only_bias": lambda s, dtype, draw: {"bias": draw(s.b, 1, 1, s.sk).to(dtype)},
    "mask": lambda s, dtype, draw: {"bias": draw(s.b, 1, s.sq, s.sk) > 0.2},
    "key_bias": lambda s, dtype, draw: {"key_bias": draw(s.b, s.hq, s.sk)},
    "kv_key_bias": lambda s, dtype, draw: {"key_bias": draw(s.b, s.hk, s.sk)},
    "block_mask": _block_mask,
    "softcap": lambda s, dtype, draw: {"softcap": 1.5},
    "alibi": lambda s, dtype, draw: {"alibi_slopes": draw(s.hq).abs() / 8},
    "batch_alibi": lambda s, dtype, draw: {"alibi_slopes": draw(s.b, s.hq).abs() / 8},
    "sink": lambda s, dtype, draw: {"sink": draw(s.hq) + 1},
    "dropout": lambda s, dtype, draw: {"dropout_p": 0.3},
}


class Sizes:
    def __init__(self, b=2, hq=4, hk=2, sq=70, sk=150, d=24, dv=16):
        self.b, self.hq, self.hk, self.sq, self.sk, self.d, self.dv = b, hq, hk, sq, sk, d, dv


class Case:
    """Inputs, options and upstream gradients, and what a function gives for them."""

    def __init__(self, dtype, sizes=None, names=(), seed=0, **options):
        sizes = sizes or Sizes()
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.sizes, self.dtype, self.seed = sizes, dtype, seed
        s = sizes
        self.inputs = {
            "q": draw(s.b, s.hq, s.sq, s.d).to(dtype),
            "k": draw(s.b, s.hk, s.sk, s.d).to(dtype),
            "v": draw(s.b, s.hk, s.sk, s.dv).to(dtype),
        }
        self.options = {}
        for name in names:
            self.options |= OPTIONS[name](sizes, dtype, draw)
        self.options |= options
        self.upstream = [
            draw(s.b, s.hq, s.sq, s.dv).to(dtype),
            draw(s.b, s.hq, s.sq),
            draw(s.b, s.hq, s.sk) / 4,
        ]

    def results(self, function=attention, dtype=None, gradients=True, mass=True):
        """Everything that `function` computes, by name: out, lse, key_mass, and d<input>.

        Without `mass` some problems take shorter ways through the kernels.
        """
        wide = torch.float64 if torch.float64 in (dtype, self.dtype) else torch.float32
        given = {}
        for name, value in {**self.inputs, **self.options}.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.detach()
                if wide == torch.float64:
                    value = value.double()
                value.requires_grad_(gradients and name != "alibi_slopes")
            given[name] = value
        if "dropout_p" in self.options:
            given["generator"] = torch.Generator().manual_seed(self.seed)
        q, k, v = (given.pop(name) for name in "qkv")
        found = function(q, k, v, return_lse=True, return_key_mass=mass, **given)
        names = ("out", "lse", "key_mass")[: 2 + mass]
        results = dict(zip(names, (t.detach() for t in found), strict=True))
        leaves = {"q": q, "k": k, "v": v, **given}
        leaves = {
            n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad
        }
        if gradients:
            upstream = [u.to(t.dtype) for u, t in zip(self.upstream, found, strict=False)]
            grads = torch.autograd.grad(
                found, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
            )
            results |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
        return results


def check(case, gradients=True):
    """Errors against the definition in float64 are at most twice (gradients: three times) those of
    plain PyTorch in the same dtype."""
    for mass in (False, True):
        ours = case.results(gradients=gradients, mass=mass)
        plain = case.results(reference.attention, gradients=gradients, mass=mass)
        exact = case.results(reference.attention, torch.float64, gradients=gradients, mass=mass)
        assert ours.keys() == plain.keys() == exact.keys()
        for name, got in ours.items():
            factor = 3 if name[0] == "d" else 2
            assert got.dtype == plain[name].dtype, name
            assert_as_close(name, got, plain[name], exact[name], factor, case.dtype)
    return ours


def error(got, exact):
    """Largest difference; inf unless what is not finite is the same."""
    got = got.double()
    assert got.shape == exact.shape
    rest = ~(got.isfinite() & exact.isfinite())
    same = (got == exact) | (got.isnan() & exact.isnan())
    if not same[rest].all():
        return math.inf
    return float((got - exact)[~rest].abs().max()) if not rest.all() else 0.0


def assert_as_close(name, got, plain, exact, factor, dtype):
    finite = exact[exact.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    limit = factor * error(plain, exact) + ROUNDINGS[dtype] * torch.finfo(dtype).eps * size
    if dtype in HALVES and name in ("lse", "key_mass"):  # float32, with bf16's rough exponential
        limit = (5e-4 if dtype == torch.bfloat16 else 2e-5) * max(size, 1.0)
    found = error(got, exact)
    assert found <= limit, f"{name} is {found:.3g} off, at most {limit:.3g} accepted"

# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models as they are, before and after pentad takes the place of what they look for.

A Mamba imports mamba_ssm and causal_conv1d if they are there, once, when its module is loaded:
`pentad.compat.install()` before that is all there is to do. A Llama asks for its attention by name.
Each side runs in a process of its own.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from .stage import Context, Result, Table, in_process

# Of a logit, relative to the largest: float32 sums in another order, through all layers.
TOLERANCE = 1e-4
ROUNDS, SECONDS = 7, 3.0  # of a measurement, whichever ends first


class Measured(NamedTuple):
    """Logits (tokens, vocabulary) and the milliseconds of reading and of a training step."""

    logits: np.ndarray
    reading: float
    training: float


def run(context: Context) -> Result:
    before, after = (
        in_process(measure, side, context.small, progress=context.progress)
        for side in ("before", "after")
    )
    return present(before, after, tokens(context.small))


def tokens(small: bool) -> int:
    return 64 if small else 256


def present(before: dict[str, Measured], after: dict[str, Measured], length: int) -> Result:
    from . import plots  # not in the processes that measure

    result = Result("Drop-in")
    result.about = (
        f"A Mamba and a Llama of Hugging Face transformers with random weights, {length} tokens on "
        "the CPU: as they are, and after pentad.compat.install() for the Mamba, with "
        'attn_implementation="pentad" for the Llama.'
    )
    rows = []
    for name in before:
        ours, theirs = after[name], before[name]
        error = float(np.abs(ours.logits - theirs.logits).max() / np.abs(theirs.logits).max())
        result.check(
            error <= TOLERANCE,  # False of NaN
            f"{name}: logits differ by {error:.2g} of the largest, more than {TOLERANCE}",
        )
        for what in ("reading", "training"):
            old, new = getattr(theirs, what), getattr(ours, what)
            times = [f"{old:,.1f}", f"{new:,.1f}", f"{old / new:.1f}x"]
            rows.append([f"{name}, {what}", *times, f"{error:.1g}"])
    note = (
        "Milliseconds, the median of several runs; reading is a forward pass without gradients, "
        "training a forward and a backward pass. The last column is the largest difference of a "
        f"logit, relative to the largest logit; {TOLERANCE:g} is allowed. To train, the Mamba's "
        "own loop takes time that grows with the square of the length."
    )
    columns = ["model", "before, ms", "after, ms", "ratio", "logits differ by"]
    result.tables.append(Table("Models of transformers", columns, rows, note))
    panels = {
        f"{what}, ms": {
            "as they are": [getattr(before[name], what) for name in before],
            "pentad": [getattr(after[name], what) for name in before],
        }
        for what in ("reading", "training")
    }
    result.figures["dropin"] = plots.pairs(list(before), panels)
    return result


# --- In the process of its own --------------------------------------------------------------------


def measure(report, side: str, small: bool) -> dict[str, Measured]:
    """Both models on one side, "before" or "after"."""
    attention = "sdpa"  # what transformers takes by itself
    if side == "after":
        import pentad.compat

        if "mamba_ssm" not in pentad.compat.install():
            raise RuntimeError("mamba_ssm itself is installed, so there is nothing to stand in for")
        import pentad.integrations.transformers

        pentad.integrations.transformers.register()
        attention = "pentad"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # that the fast path is missing is the point here
    sizes = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 1 if small else 4}
    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}
    llama = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**sizes, **heads), attn_implementation=attention
    )
    ids = torch.randint(1000, (1, tokens(small)))
    found = {}
    for name, model in (("Mamba", mamba), ("Llama", llama)):

        def read(model=model):
            with torch.no_grad():
                return model(ids, use_cache=False).logits

        def train(model=model):
            model.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()

        logits = read()[0].numpy()
        found[name] = Measured(logits, milliseconds(read), milliseconds(train))
        report(f"models of transformers, {side}", len(found), 2)
    return found


def milliseconds(call) -> float:
    """The median, after a first call that does not count."""
    call()
    seconds = []
    while len(seconds) < ROUNDS and sum(seconds) < SECONDS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))

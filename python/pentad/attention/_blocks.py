# SPDX-License-Identifier: Apache-2.0
"""How block masks are put together from rules, and the checks of their arguments."""

import operator
from array import array

import numpy as np
import torch

# --- Checks ---------------------------------------------------------------------------------------


def integer(op, name, value, least, most=None):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"[{op}] {name} is {type(value).__name__}, expected an integer") from None
    if value < least or (most is not None and value > most):
        accepted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"[{op}] {name} is {value}, expected {accepted}")
    return value


def set_sizes(target, op, q_len, k_len, q_block, k_block):
    target.q_len = integer(op, "q_len", q_len, 0)
    target.k_len = target.q_len if k_len is None else integer(op, "k_len", k_len, 0)
    target.q_block = integer(op, "q_block", q_block, 1)
    target.k_block = integer(op, "k_block", k_block, 1)


def check_dtype(op, name, tensor, accepted):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"[{op}] {name} is {type(tensor).__name__}, expected a torch tensor")
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        came = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"[{op}] {name} has dtype {came}, expected {names}")


def check_range(op, name, tensor, least, most):
    if tensor.numel() and (int(tensor.min()) < least or int(tensor.max()) > most):
        raise ValueError(
            f"[{op}] {name} has values from {int(tensor.min())} to {int(tensor.max())}, "
            f"expected {least} to {most}"
        )


def parts(op, part):
    if part not in ("both", "first", "second"):
        raise ValueError(f"[{op}] part is {part!r}, expected 'both', 'first' or 'second'")
    return part != "second", part != "first"


# --- Assembly -------------------------------------------------------------------------------------


class Sizes:
    """Lengths, the first query's position, and where each block of keys begins and ends."""

    def __init__(self, op, q_len, k_len, q_block, k_block):
        set_sizes(self, op, q_len, k_len, q_block, k_block)
        self.offset = self.k_len - self.q_len
        self.begin = torch.arange(0, self.k_len, self.k_block)
        self.end = (self.begin + self.k_block).clamp(max=self.k_len)


def assemble(cls, sizes, rule, classify, batch=1, heads=1):
    """A mask of the elements where ``rule((b, h), i, j)`` is True.

    ``classify((b, h), low, high)`` says, for the queries at the positions low to high, which of the
    blocks of keys may have a visible element, and which are full; the rule decides on the others.
    """
    q_block, k_block = sizes.q_block, sizes.k_block
    # Grown in place: small tensors kept from row to row would lie between the large ones that come
    # and go, and the heap would grow by a row of blocks with each (measured: 20 times the memory).
    counts, cols, kinds, patterns = [0], array("i"), array("i"), {}
    for pair in ((b, h) for b in range(batch) for h in range(heads)):
        for first in range(0, sizes.q_len, q_block):
            last = min(first + q_block, sizes.q_len) - 1
            may, sure = classify(pair, first + sizes.offset, last + sizes.offset)
            kind = torch.where(sure, -1, -2).int()  # -2: absent
            undecided = (may & ~sure).nonzero()[:, 0]
            if len(undecided):
                i = torch.arange(first, first + q_block)[:, None]
                j = (undecided[:, None] * k_block + torch.arange(k_block))[:, None]
                inside = (i < sizes.q_len) & (j < sizes.k_len)
                bits = rule(pair, i.clamp(max=sizes.q_len - 1), j.clamp(max=sizes.k_len - 1))
                bits = bits & inside  # (blocks, q_block, k_block)
                some, full = (x.flatten(1) for x in (bits, bits | ~inside))
                some, full = some.any(1), full.all(1)
                kind[undecided[full]] = -1
                for n in (some & ~full).nonzero()[:, 0].tolist():
                    pattern = bits[n].numpy().tobytes()
                    kind[undecided[n]] = patterns.setdefault(pattern, len(patterns))
            chosen = (kind > -2).nonzero()[:, 0]
            counts.append(len(chosen))
            cols.frombytes(chosen.int().numpy().tobytes())
            kinds.frombytes(kind[chosen].numpy().tobytes())
    rows = len(range(0, sizes.q_len, q_block))
    ends = torch.tensor(counts).cumsum(0)
    row_ptr = ends[torch.arange(batch * heads)[:, None] * rows + torch.arange(rows + 1)]
    partial = torch.zeros(0, q_block, k_block, dtype=torch.bool)
    if patterns:
        partial = torch.frombuffer(bytearray(b"".join(patterns)), dtype=torch.bool)
    return cls(
        sizes.q_len,
        sizes.k_len,
        row_ptr.view(batch, heads, rows + 1),
        torch.from_numpy(np.array(cols)),
        torch.from_numpy(np.array(kinds)),
        partial.view(-1, q_block, k_block),
        q_block=q_block,
        k_block=k_block,
    )


def from_intervals(cls, sizes, low, high):
    """Query i of sample b sees the keys ``low[b, i] <= j < high[b, i]``."""

    def classify(pair, first, last):
        rows = pair[0], slice(first - sizes.offset, last - sizes.offset + 1)
        begin, end = low[rows], high[rows]
        may = (sizes.begin < end.max()) & (sizes.end > begin.min())
        return may, (sizes.begin >= begin.max()) & (sizes.end <= end.min())

    def rule(pair, i, j):
        return (j >= low[pair[0], i]) & (j < high[pair[0], i])

    return assemble(cls, sizes, rule, classify, len(low))


def from_function(cls, op, fn, batch, heads, q_len, k_len, q_block, k_block):
    sizes = Sizes(op, q_len, k_len, q_block, k_block)
    batch, heads = integer(op, "batch", batch, 1), integer(op, "heads", heads, 1)
    every, none = torch.ones_like(sizes.begin).bool(), torch.zeros_like(sizes.begin).bool()

    def rule(pair, i, j):
        seen = fn(*(torch.tensor(n) for n in pair), i, j)
        check_dtype(op, "the result of fn", seen, (torch.bool,))
        try:
            return seen.expand(len(j), len(i), j.shape[-1])
        except RuntimeError:
            raise ValueError(
                f"[{op}] the result of fn has shape {tuple(seen.shape)}, "
                f"expected one that broadcasts to {(len(j), len(i), j.shape[-1])}"
            ) from None

    return assemble(cls, sizes, rule, lambda *at: (every, none), batch, heads)


def subtrees(parents):
    """Of (B, T): each token's number in preorder, and the number after its last descendant's."""
    first, last = torch.zeros_like(parents), torch.zeros_like(parents)
    for b, sample in enumerate(parents.tolist()):
        size = [1] * len(sample)
        for token in range(len(sample) - 1, -1, -1):
            if sample[token] >= 0:
                size[sample[token]] += size[token]
        start = [0] * len(sample)
        free = [0] * len(sample) + [0]  # [-1]: of the tokens without a parent
        for token, parent in enumerate(sample):
            start[token] = free[parent]
            free[parent] += size[token]
            free[token] = start[token] + 1
        first[b] = torch.tensor(start)
        last[b] = torch.tensor(start) + torch.tensor(size)
    return first, last

# SPDX-License-Identifier: Apache-2.0
"""Masks in blocks, for attention that never reads what no query of a block may see."""

import math
import operator

import torch

from pentad.attention._blocks import (
    Sizes,
    assemble,
    check_dtype,
    check_range,
    from_function,
    from_intervals,
    integer,
    parts,
    set_sizes,
    subtrees,
)


class BlockMask:
    """Which keys each query may see, as lists of blocks of the score matrix.

    A block of `q_block` queries and `k_block` keys is absent (nothing in it is visible, and
    attention never touches it), full, or partial: then a matrix of its elements says more, held
    once for all blocks that look the same. Memory grows with the number of blocks, and no builder
    but `from_dense` forms anything of the size of the whole mask.

    Query i has the position ``i + k_len - q_len`` among the keys: the last query lies at the last
    key. Wherever ``k_len`` may be left out it is ``q_len``. A mask built for one batch entry or one
    head serves all.

    Parameters
    ----------
    q_len, k_len : int
    row_ptr : (batch, heads, ceil(q_len / q_block) + 1) int64
        Row i of blocks of a (batch, head) has the entries ``[row_ptr[i], row_ptr[i + 1])`` of
        `cols`; all pairs follow each other there.
    cols : (n,) int32
        Block columns, ascending within a row.
    kinds : (n,) int32, optional
        -1 for a full block, or its number in `partial`; by default all are full.
    partial : (m, q_block, k_block) bool, optional
    q_block, k_block : int

    Raises
    ------
    TypeError, ValueError
        For lists of another dtype, or out of range or order.

    Examples
    --------
    Blocks chosen elsewhere: each of two rows of blocks sees the first column and its own.

    >>> import torch
    >>> row_ptr, cols = torch.tensor([[[0, 1, 3]]]), torch.tensor([0, 0, 1], dtype=torch.int32)
    >>> mask = pentad.attention.BlockMask(4, 4, row_ptr, cols, q_block=2, k_block=2)
    >>> mask.to_dense()[0, 0].int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """

    def __init__(
        self, q_len, k_len, row_ptr, cols, kinds=None, partial=None, *, q_block=64, k_block=64
    ):
        op = "BlockMask"
        set_sizes(self, op, q_len, k_len, q_block, k_block)
        if kinds is None:
            kinds = torch.full_like(cols, -1)
        if partial is None:
            partial = torch.zeros(0, self.q_block, self.k_block, dtype=torch.bool)
        for name, tensor, dtype, rank in (
            ("row_ptr", row_ptr, torch.int64, 3),
            ("cols", cols, torch.int32, 1),
            ("kinds", kinds, torch.int32, 1),
            ("partial", partial, torch.bool, 3),
        ):
            check_dtype(op, name, tensor, (dtype,))
            if tensor.ndim != rank:
                raise ValueError(f"[{op}] {name} has rank {tensor.ndim}, expected {rank}")
        q_blocks, k_blocks = self.grid
        if row_ptr.shape[2] != q_blocks + 1 or row_ptr.shape[0] < 1 or row_ptr.shape[1] < 1:
            raise ValueError(
                f"[{op}] row_ptr has shape {tuple(row_ptr.shape)}, "
                f"expected (batch, heads, {q_blocks + 1})"
            )
        if kinds.shape != cols.shape:
            raise ValueError(f"[{op}] kinds has {len(kinds)} entries but cols has {len(cols)}")
        if partial.shape[1:] != (self.q_block, self.k_block):
            raise ValueError(
                f"[{op}] partial has shape {tuple(partial.shape)}, "
                f"expected (m, {self.q_block}, {self.k_block})"
            )
        starts, ends = row_ptr[..., :-1].flatten(), row_ptr[..., 1:].flatten()
        bounds = torch.cat([starts.new_zeros(1), ends])
        pairs_follow = torch.equal(row_ptr[..., -1].flatten()[:-1], row_ptr[..., 0].flatten()[1:])
        if (
            int(row_ptr.flatten()[0]) != 0
            or int(row_ptr.flatten()[-1]) != len(cols)
            or not pairs_follow
            or bool((bounds.diff() < 0).any())
        ):
            raise ValueError(f"[{op}] row_ptr does not ascend from 0 to the {len(cols)} cols")
        check_range(op, "cols", cols, 0, k_blocks - 1)
        check_range(op, "kinds", kinds, -1, len(partial) - 1)
        row_of = torch.arange(len(starts)).repeat_interleave(ends - starts)
        if bool(((cols.diff() <= 0) & (row_of.diff() == 0)).any()):
            raise ValueError(f"[{op}] cols do not ascend within a row")

        self.row_ptr, self.cols, self.kinds = (
            row_ptr.contiguous(),
            cols.contiguous(),
            kinds.contiguous(),
        )
        self.partial = partial.to(torch.uint8).contiguous()
        self._list_columns(row_of)
        self._copies = {}  # the lists on other devices

    def _list_columns(self, row_of):
        """The same blocks by columns; row_of counts the rows of all (batch, head) pairs."""
        q_blocks, k_blocks = self.grid
        batch, heads = self.row_ptr.shape[:2]
        pair = row_of // max(q_blocks, 1)
        column = pair * k_blocks + self.cols
        order = column.argsort(stable=True)
        self.rows = (row_of - pair * q_blocks)[order].int()
        self.row_kinds = self.kinds[order]
        ends = torch.bincount(column, minlength=batch * heads * k_blocks).cumsum(0)
        ends = torch.cat([ends.new_zeros(1), ends])
        at = torch.arange(batch * heads)[:, None] * k_blocks + torch.arange(k_blocks + 1)
        self.col_ptr = ends[at].view(batch, heads, k_blocks + 1)

    @property
    def grid(self):
        """(rows, columns) of blocks."""
        return -(-self.q_len // self.q_block), -(-self.k_len // self.k_block)

    @property
    def tensors(self):
        """The lists, as the kernels take them."""
        return [
            self.row_ptr, self.cols, self.kinds,
            self.col_ptr, self.rows, self.row_kinds, self.partial,
        ]  # fmt: skip

    def tensors_on(self, device):
        """The same on a device, to which they are copied once."""
        if device.type != "cuda":
            return self.tensors
        if device not in self._copies:
            self._copies[device] = [tensor.to(device) for tensor in self.tensors]
        return self._copies[device]

    @property
    def density(self):
        """Share of the blocks that attention reads."""
        blocks = self.row_ptr.shape[0] * self.row_ptr.shape[1] * math.prod(self.grid)
        return len(self.cols) / blocks if blocks else 0.0

    def __repr__(self):
        batch, heads = self.row_ptr.shape[:2]
        full = int((self.kinds < 0).sum())
        return (
            f"BlockMask(q_len={self.q_len}, k_len={self.k_len}, batch={batch}, heads={heads}, "
            f"q_block={self.q_block}, k_block={self.k_block}, full={full}, "
            f"partial={len(self.kinds) - full}, density={self.density:.3g})"
        )

    def to_dense(self):
        """(batch, heads, q_len, k_len) bool."""
        batch, heads = self.row_ptr.shape[:2]
        q_blocks, k_blocks = self.grid
        sizes = self.row_ptr.diff().flatten()
        row = torch.arange(len(sizes)).repeat_interleave(sizes)
        patterns = torch.cat([self.partial.bool(), self.partial.new_ones(1, *self._block).bool()])
        dense = torch.zeros(len(sizes), k_blocks, *self._block, dtype=torch.bool)
        dense[row, self.cols.long()] = patterns[self.kinds.long()]  # -1 is the last: full
        dense = dense.view(batch, heads, q_blocks, k_blocks, *self._block).transpose(3, 4)
        dense = dense.reshape(batch, heads, q_blocks * self.q_block, k_blocks * self.k_block)
        return dense[..., : self.q_len, : self.k_len].contiguous()

    @property
    def _block(self):
        return self.q_block, self.k_block

    # --- Builders ---------------------------------------------------------------------------------

    @classmethod
    def sliding_window(cls, q_len, k_len=None, *, window, q_block=64, k_block=64):
        """Keys within a window around the query's position.

        Beltagy et al. 2020, "Longformer", arXiv 2004.05150, section 3.1.

        Parameters
        ----------
        q_len, k_len : int
        window : (int, int)
            (left, right): keys from ``position - left`` to ``position + right``; None or -1 is no
            bound, so that (None, 0) is the causal mask.
        q_block, k_block : int

        Examples
        --------
        >>> mask = pentad.attention.BlockMask.sliding_window(4, window=(1, 0))
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        op = "BlockMask.sliding_window"
        sizes = Sizes(op, q_len, k_len, q_block, k_block)
        try:
            left, right = (-1 if n is None else operator.index(n) for n in window)
        except (TypeError, ValueError):
            left = right = -2
        if left < -1 or right < -1:
            raise ValueError(
                f"[{op}] window is {window!r}, expected (left, right) of integers from 0, "
                "or None or -1 for no bound"
            )
        position = torch.arange(sizes.q_len) + sizes.offset
        low = torch.zeros_like(position) if left < 0 else position - left
        high = torch.full_like(position, sizes.k_len) if right < 0 else position + right + 1
        return from_intervals(cls, sizes, low[None], high[None])

    @classmethod
    def strided(cls, q_len, k_len=None, *, stride, part="both", q_block=64, k_block=64):
        """The strided pattern of Sparse Transformers.

        Child et al. 2019, arXiv 1904.10509, section 4.3: of the keys j up to its own position i, a
        query sees the last ones, ``i - stride <= j`` ("first"), those with
        ``(i - j) % stride == 0`` ("second"), or with "both" the union, the paper's merged head.

        Parameters
        ----------
        q_len, k_len : int
        stride : int
            At least 1; the paper's l.
        part : "both", "first" or "second"
        q_block, k_block : int

        Examples
        --------
        >>> mask = pentad.attention.BlockMask.strided(6, stride=3, part="second")
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0, 0, 0],
                [0, 1, 0, 0, 0, 0],
                [0, 0, 1, 0, 0, 0],
                [1, 0, 0, 1, 0, 0],
                [0, 1, 0, 0, 1, 0],
                [0, 0, 1, 0, 0, 1]], dtype=torch.int32)
        """
        op = "BlockMask.strided"
        sizes = Sizes(op, q_len, k_len, q_block, k_block)
        stride = integer(op, "stride", stride, 1)
        first, second = parts(op, part)

        def classify(pair, low, high):  # of the positions low ... high
            far, near = high - sizes.begin, (low - sizes.end + 1).clamp(min=0)
            may = torch.zeros_like(sizes.begin, dtype=torch.bool)
            sure = may
            if first:
                may = may | ((far >= 0) & (near <= stride))
                sure = (sizes.end - 1 <= low) & (far <= stride)
            if second:
                may = may | ((far >= 0) & (far // stride * stride >= near))
            return may & (far >= 0), sure

        def rule(pair, i, j):
            position = i + sizes.offset
            seen = torch.tensor(False)
            if first:
                seen = seen | (j >= position - stride)
            if second:
                seen = seen | (position % stride == j % stride)
            return seen & (j <= position)

        return assemble(cls, sizes, rule, classify)

    @classmethod
    def fixed(cls, q_len, k_len=None, *, stride, summary=1, part="both", q_block=64, k_block=64):
        """The fixed pattern of Sparse Transformers.

        Child et al. 2019, arXiv 1904.10509, section 4.3: of the keys j up to its own position i, a
        query sees those of its own stretch of `stride` positions, ``j // stride == i // stride``
        ("first"), the last `summary` ones of every stretch, ``j % stride >= stride - summary``
        ("second"), or with "both" the union, which is the paper's merged head.

        Parameters
        ----------
        q_len, k_len : int
        stride : int
            At least 1; the paper's l.
        summary : int
            1 to `stride`; the paper's c.
        part : "both", "first" or "second"
        q_block, k_block : int

        Examples
        --------
        >>> mask = pentad.attention.BlockMask.fixed(6, stride=3)
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [0, 0, 1, 1, 0, 0],
                [0, 0, 1, 1, 1, 0],
                [0, 0, 1, 1, 1, 1]], dtype=torch.int32)
        """
        op = "BlockMask.fixed"
        sizes = Sizes(op, q_len, k_len, q_block, k_block)
        stride = integer(op, "stride", stride, 1)
        summary = integer(op, "summary", summary, 1, stride)
        first, second = parts(op, part)
        last_key = sizes.end - 1

        def classify(pair, low, high):
            may = torch.zeros_like(sizes.begin, dtype=torch.bool)
            sure = may
            if first:
                own = (sizes.begin // stride <= high // stride) & (
                    last_key // stride >= low // stride
                )
                may = may | own
                one = (sizes.begin // stride == last_key // stride) & (
                    low // stride == high // stride
                )
                sure = own & one & (last_key <= low)
            if second:
                wait = (stride - summary - sizes.begin % stride).clamp(min=0)
                may = may | (sizes.begin + wait <= last_key)
            return may & (sizes.begin <= high), sure

        def rule(pair, i, j):
            position = i + sizes.offset
            seen = torch.tensor(False)
            if first:
                seen = seen | (position // stride == j // stride)
            if second:
                seen = seen | (j % stride >= stride - summary)
            return seen & (j <= position)

        return assemble(cls, sizes, rule, classify)

    @classmethod
    def prefix_lm(cls, q_len, k_len=None, *, prefix, q_block=64, k_block=64):
        """Causal, but for a prefix that every query sees.

        Raffel et al. 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer", arXiv 1910.10683, section 3.2.1.

        Parameters
        ----------
        q_len, k_len : int
        prefix : int or (batch,) int32 or int64
            Length of the prefix, of each sample.
        q_block, k_block : int

        Examples
        --------
        >>> mask = pentad.attention.BlockMask.prefix_lm(4, prefix=2)
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
        """
        op = "BlockMask.prefix_lm"
        sizes = Sizes(op, q_len, k_len, q_block, k_block)
        if isinstance(prefix, int):
            prefix = torch.tensor([prefix])
        check_dtype(op, "prefix", prefix, (torch.int32, torch.int64))
        if prefix.ndim != 1 or not len(prefix):
            raise ValueError(f"[{op}] prefix has shape {tuple(prefix.shape)}, expected (batch,)")
        check_range(op, "prefix", prefix, 0, sizes.k_len)
        position = torch.arange(sizes.q_len) + sizes.offset
        high = (position + 1).maximum(prefix.long()[:, None])
        return from_intervals(cls, sizes, torch.zeros_like(high), high)

    @classmethod
    def document(cls, q_ids, k_ids=None, *, causal=False, q_block=64, k_block=64):
        """Tokens see those of their own document; several documents are packed in one sequence.

        Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv
        2107.02027.

        Parameters
        ----------
        q_ids : (S,) or (B, S) int32 or int64
            Document of each query. A negative one is padding, which sees nothing.
        k_ids : (Sk,) or (B, Sk) int32 or int64, optional
            Document of each key, by default `q_ids`. Nobody sees a negative one.
        causal : bool
            Only the keys up to the query's own position.
        q_block, k_block : int

        Examples
        --------
        >>> import torch
        >>> mask = pentad.attention.BlockMask.document(torch.tensor([0, 0, 1, 1]), causal=True)
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        op = "BlockMask.document"
        k_ids = q_ids if k_ids is None else k_ids
        for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
            check_dtype(op, name, ids, (torch.int32, torch.int64))
            if ids.ndim not in (1, 2) or not ids.shape[:-1].numel():
                raise ValueError(
                    f"[{op}] {name} has shape {tuple(ids.shape)}, expected (S,) or (B, S)"
                )
        q_ids, k_ids = (torch.atleast_2d(ids.long()) for ids in (q_ids, k_ids))
        if len(q_ids) != len(k_ids):
            raise ValueError(f"[{op}] q_ids has batch {len(q_ids)} but k_ids has {len(k_ids)}")
        sizes = Sizes(op, q_ids.shape[1], k_ids.shape[1], q_block, k_block)
        # Where all tokens of a block have one document, nothing is compared one by one.
        padded = torch.nn.functional.pad(k_ids, (0, len(sizes.begin) * sizes.k_block - sizes.k_len))
        blocks = padded.view(len(k_ids), len(sizes.begin), sizes.k_block)
        valid = sizes.begin[:, None] + torch.arange(sizes.k_block) < sizes.k_len
        most = torch.iinfo(torch.int64).max
        k_low, k_high = blocks.where(valid, most).amin(2), blocks.where(valid, -most).amax(2)

        def classify(pair, low, high):
            ids = q_ids[pair[0], low - sizes.offset : high - sizes.offset + 1]
            q_low, q_high = ids.min(), ids.max()
            may = (k_high[pair[0]] >= q_low) & (k_low[pair[0]] <= q_high) & (q_high >= 0)
            sure = (k_low[pair[0]] == q_high) & (k_high[pair[0]] == q_low) & (q_low >= 0)
            if causal:
                may, sure = may & (sizes.begin <= high), sure & (sizes.end - 1 <= low)
            return may, sure

        def rule(pair, i, j):
            q_id, k_id = q_ids[pair[0], i], k_ids[pair[0], j]
            seen = (q_id == k_id) & (q_id >= 0)
            return seen & (j <= i + sizes.offset) if causal else seen

        return assemble(cls, sizes, rule, classify, len(q_ids))

    @classmethod
    def tree(cls, parents, past=0, *, q_block=64, k_block=64):
        """Draft tokens of a tree: each sees the past, its ancestors and itself.

        Miao et al. 2023, "SpecInfer", arXiv 2305.09781.

        Parameters
        ----------
        parents : (T,) or (B, T) int32 or int64
            Parent of each token, an earlier token, or -1 for one that follows the past.
        past : int
            Keys before the tree's, which every token sees.
        q_block, k_block : int

        Returns
        -------
        BlockMask
            Of q_len T and k_len ``past + T``.

        Examples
        --------
        Two continuations of token 0, one of which goes on:

        >>> import torch
        >>> mask = pentad.attention.BlockMask.tree(torch.tensor([-1, 0, 0, 1]), past=2)
        >>> mask.to_dense()[0, 0].int()
        tensor([[1, 1, 1, 0, 0, 0],
                [1, 1, 1, 1, 0, 0],
                [1, 1, 1, 0, 1, 0],
                [1, 1, 1, 1, 0, 1]], dtype=torch.int32)
        """
        op = "BlockMask.tree"
        check_dtype(op, "parents", parents, (torch.int32, torch.int64))
        if parents.ndim not in (1, 2) or not parents.shape[:-1].numel():
            raise ValueError(
                f"[{op}] parents has shape {tuple(parents.shape)}, expected (T,) or (B, T)"
            )
        past = integer(op, "past", past, 0)
        parents = torch.atleast_2d(parents.long())
        tokens = torch.arange(parents.shape[1])
        if bool(((parents < -1) | (parents >= tokens)).any()):
            raise ValueError(f"[{op}] parents must be -1 or an earlier token's number")
        sizes = Sizes(op, len(tokens), past + len(tokens), q_block, k_block)
        first, last = subtrees(parents)

        def rule(pair, i, j):
            b, token = pair[0], (j - past).clamp(min=0)
            inside = (first[b, token] <= first[b, i]) & (first[b, i] < last[b, token])
            return (j < past) | inside

        def classify(pair, low, high):
            return sizes.begin <= high, sizes.end <= past

        return assemble(cls, sizes, rule, classify, len(parents))

    @classmethod
    def from_dense(cls, mask, *, q_block=64, k_block=64):
        """From the whole matrix.

        Parameters
        ----------
        mask : (q_len, k_len) or (batch, heads, q_len, k_len) bool
            True where the key may be seen.
        q_block, k_block : int

        Examples
        --------
        >>> import torch
        >>> mask = pentad.attention.BlockMask.from_dense(torch.ones(100, 200).bool())
        >>> mask
        BlockMask(q_len=100, k_len=200, batch=1, heads=1, q_block=64, k_block=64, full=8, \
partial=0, density=1)
        """
        op = "BlockMask.from_dense"
        check_dtype(op, "mask", mask, (torch.bool,))
        if mask.ndim not in (2, 4):
            raise ValueError(
                f"[{op}] mask has shape {tuple(mask.shape)}, "
                "expected (q_len, k_len) or (batch, heads, q_len, k_len)"
            )
        mask = mask if mask.ndim == 4 else mask[None, None]
        return from_function(
            cls, op, lambda b, h, i, j: mask[b, h, i, j], *mask.shape, q_block, k_block
        )

    @classmethod
    def from_function(cls, fn, batch, heads, q_len, k_len=None, *, q_block=64, k_block=64):
        """From a function of indices, evaluated for one row of blocks at a time.

        Parameters
        ----------
        fn : callable
            ``fn(b, h, i, j)`` of int64 tensors that broadcast against each other, to a bool one:
            whether query i sees key j. PyTorch's FlexAttention has the same convention.
        batch, heads : int
            1 where all have the same mask.
        q_len, k_len : int
        q_block, k_block : int

        Examples
        --------
        >>> dilated = lambda b, h, i, j: (i - j) % (h + 1) == 0
        >>> mask = pentad.attention.BlockMask.from_function(dilated, 1, 2, 4)
        >>> mask.to_dense()[0, 1].int()
        tensor([[1, 0, 1, 0],
                [0, 1, 0, 1],
                [1, 0, 1, 0],
                [0, 1, 0, 1]], dtype=torch.int32)
        """
        op = "BlockMask.from_function"
        if not callable(fn):
            raise TypeError(f"[{op}] fn is {type(fn).__name__}, expected a function")
        return from_function(cls, op, fn, batch, heads, q_len, k_len, q_block, k_block)

# SPDX-License-Identifier: Apache-2.0
"""BlockMask: each builder against its definition element by element, and the lists themselves."""

import pytest

torch = pytest.importorskip("torch")

from cases import run_python  # noqa: E402

from pentad.attention import BlockMask  # noqa: E402

SIZES = [(1, 1), (64, 64), (65, 65), (37, 90), (90, 37), (1, 70)]
BLOCKS = [(64, 64), (16, 32), (5, 3), (200, 7)]
grid = pytest.mark.parametrize(("q_len", "k_len"), SIZES)
blocks = pytest.mark.parametrize(("q_block", "k_block"), BLOCKS)


def expect(mask, sees, batch=1, heads=1):
    """`mask` is True exactly where sees(b, h, i, j)."""
    want = [
        [
            [[bool(sees(b, h, i, j)) for j in range(mask.k_len)] for i in range(mask.q_len)]
            for h in range(heads)
        ]
        for b in range(batch)
    ]
    want = torch.tensor(want, dtype=torch.bool).view(batch, heads, mask.q_len, mask.k_len)
    assert torch.equal(mask.to_dense(), want)
    check_lists(mask, want)


def check_lists(mask, dense):
    """Absent, full and partial blocks are what they are called; both lists say the same."""
    batch, heads = dense.shape[:2]
    found = {}
    for b in range(batch):
        for h in range(heads):
            for row in range(-(-mask.q_len // mask.q_block)):
                for col in range(-(-mask.k_len // mask.k_block)):
                    rows = slice(row * mask.q_block, (row + 1) * mask.q_block)
                    cols = slice(col * mask.k_block, (col + 1) * mask.k_block)
                    block = dense[b, h, rows, cols]
                    if block.any():
                        found[b, h, row, col] = bool(block.all())
    by_rows, by_columns = {}, {}
    for pointers, indices, kinds, into, flip in (
        (mask.row_ptr, mask.cols, mask.kinds, by_rows, False),
        (mask.col_ptr, mask.rows, mask.row_kinds, by_columns, True),
    ):
        assert pointers.dtype == torch.int64
        assert indices.dtype == kinds.dtype == torch.int32
        assert pointers.flatten()[0] == 0
        assert pointers.flatten()[-1] == len(indices) == len(kinds)
        for b in range(batch):
            for h in range(heads):
                for at in range(pointers.shape[2] - 1):
                    entries = range(pointers[b, h, at], pointers[b, h, at + 1])
                    others = [int(indices[n]) for n in entries]
                    assert others == sorted(set(others))
                    for n, other in zip(entries, others, strict=True):
                        row, col = (other, at) if flip else (at, other)
                        into[b, h, row, col] = int(kinds[n])
    assert by_rows == by_columns
    assert {at: kind < 0 for at, kind in by_rows.items()} == found
    used = {kind for kind in by_rows.values() if kind >= 0}
    assert used == set(range(len(mask.partial)))
    assert len({p.numpy().tobytes() for p in mask.partial}) == len(mask.partial)
    assert mask.partial.dtype == torch.uint8
    assert mask.partial.shape[1:] == (mask.q_block, mask.k_block)


@grid
@blocks
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (20, 11), (None, 0), (0, -1), (None, None)])
def test_sliding_window(q_len, k_len, q_block, k_block, window):
    mask = BlockMask.sliding_window(q_len, k_len, window=window, q_block=q_block, k_block=k_block)
    left, right = (10**9 if n in (None, -1) else n for n in window)
    expect(mask, lambda b, h, i, j: -right <= i + k_len - q_len - j <= left)


@grid
@blocks
@pytest.mark.parametrize("stride", [1, 4, 30])
@pytest.mark.parametrize("part", ["both", "first", "second"])
def test_strided(q_len, k_len, q_block, k_block, stride, part):
    mask = BlockMask.strided(
        q_len, k_len, stride=stride, part=part, q_block=q_block, k_block=k_block
    )

    def sees(b, h, i, j):
        i += k_len - q_len
        first, second = j in range(max(0, i - stride), i + 1), (i - j) % stride == 0 and j <= i
        return {"first": first, "second": second, "both": first or second}[part]

    expect(mask, sees)


@grid
@blocks
@pytest.mark.parametrize(("stride", "summary"), [(1, 1), (6, 2), (40, 1), (9, 9)])
@pytest.mark.parametrize("part", ["both", "first", "second"])
def test_fixed(q_len, k_len, q_block, k_block, stride, summary, part):
    mask = BlockMask.fixed(
        q_len, k_len, stride=stride, summary=summary, part=part, q_block=q_block, k_block=k_block
    )
    last = set(range(stride - summary, stride))

    def sees(b, h, i, j):
        i += k_len - q_len
        first, second = i // stride == j // stride and j <= i, j % stride in last and j <= i
        return {"first": first, "second": second, "both": first or second}[part]

    expect(mask, sees)


@grid
@blocks
def test_prefix_lm(q_len, k_len, q_block, k_block):
    prefix = [0, k_len, k_len // 2, min(k_len, 3)]
    mask = BlockMask.prefix_lm(
        q_len, k_len, prefix=torch.tensor(prefix), q_block=q_block, k_block=k_block
    )
    expect(mask, lambda b, h, i, j: j < prefix[b] or j <= i + k_len - q_len, batch=4)
    one = BlockMask.prefix_lm(q_len, k_len, prefix=prefix[2], q_block=q_block, k_block=k_block)
    assert torch.equal(one.to_dense()[0], mask.to_dense()[2])


@grid
@blocks
@pytest.mark.parametrize("causal", [False, True])
def test_document(q_len, k_len, q_block, k_block, causal):
    draw = torch.Generator().manual_seed(q_len)
    runs = torch.randint(0, 4, (3, max(q_len, k_len)), generator=draw)
    runs[0] = torch.arange(runs.shape[1]) // 33  # in order
    runs[1] = torch.arange(runs.shape[1]) // 16 % 3 - 1  # documents come back; padding
    q_ids, k_ids = runs[:, :q_len], runs[:, -k_len:].int()
    mask = BlockMask.document(q_ids, k_ids, causal=causal, q_block=q_block, k_block=k_block)

    def sees(b, h, i, j):
        same = q_ids[b, i] == k_ids[b, j] and q_ids[b, i] >= 0
        return same and (not causal or j <= i + k_len - q_len)

    expect(mask, sees, batch=3)


def test_document_of_queries_only():
    ids = torch.tensor([3, 3, -1, 7])
    mask = BlockMask.document(ids)
    expect(mask, lambda b, h, i, j: ids[i] == ids[j] >= 0)


@blocks
@pytest.mark.parametrize("past", [0, 1, 64])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_tree(q_block, k_block, past, tokens):
    draw = torch.Generator().manual_seed(tokens)
    chain = torch.arange(tokens) - 1
    random = torch.tensor([int(torch.randint(-1, t, (), generator=draw)) for t in range(tokens)])
    forest = torch.full((tokens,), -1)
    parents = torch.stack([chain, random, forest])
    mask = BlockMask.tree(parents, past, q_block=q_block, k_block=k_block)
    assert (mask.q_len, mask.k_len) == (tokens, past + tokens)

    def sees(b, h, i, j):
        while i >= 0 and i != j - past:
            i = int(parents[b, i])
        return j < past or i >= 0

    expect(mask, sees, batch=3)
    one = BlockMask.tree(random.int(), past, q_block=q_block, k_block=k_block)
    assert torch.equal(one.to_dense()[0], mask.to_dense()[1])


@grid
@blocks
def test_from_dense_and_back(q_len, k_len, q_block, k_block):
    draw = torch.Generator().manual_seed(k_len)
    dense = torch.rand(2, 3, q_len, k_len, generator=draw) < 0.5
    dense[0, 0] = True
    dense[0, 1] = False
    dense[1, 1, :, : k_len // 2] = True
    mask = BlockMask.from_dense(dense, q_block=q_block, k_block=k_block)
    assert torch.equal(mask.to_dense(), dense)
    check_lists(mask, dense)
    plane = BlockMask.from_dense(dense[1, 2], q_block=q_block, k_block=k_block)
    assert torch.equal(plane.to_dense(), dense[1:, 2:])


@grid
@blocks
def test_from_function(q_len, k_len, q_block, k_block):
    start = torch.tensor([0, 5])

    def fn(b, h, i, j):
        return (j >= start[b]) & ((i + j) % (h + 2) == 0)

    mask = BlockMask.from_function(fn, 2, 3, q_len, k_len, q_block=q_block, k_block=k_block)
    expect(mask, lambda b, h, i, j: j >= start[b] and (i + j) % (h + 2) == 0, 2, 3)


def test_from_function_of_keys_alone():
    mask = BlockMask.from_function(lambda b, h, i, j: j < 9, 1, 1, 20)
    expect(mask, lambda b, h, i, j: j < 9)


def test_from_function_stays_within_the_lengths():
    ids = torch.arange(70)  # fails where an index is beyond

    def fn(b, h, i, j):
        return ids[i] >= ids[j]

    expect(BlockMask.from_function(fn, 1, 1, 70), lambda b, h, i, j: i >= j)


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 9), (9, 0)])
def test_empty(q_len, k_len):
    ids = torch.zeros(max(q_len, k_len), dtype=torch.int64)
    for mask in (
        BlockMask.sliding_window(q_len, k_len, window=(1, 1)),
        BlockMask.strided(q_len, k_len, stride=2),
        BlockMask.fixed(q_len, k_len, stride=2),
        BlockMask.prefix_lm(q_len, k_len, prefix=0),
        BlockMask.document(ids[:q_len], ids[:k_len]),
        BlockMask.from_dense(torch.ones(q_len, k_len, dtype=torch.bool)),
        BlockMask.from_function(lambda b, h, i, j: i == j, 1, 1, q_len, k_len),
    ):
        assert mask.to_dense().shape == (1, 1, q_len, k_len)
        check_lists(mask, mask.to_dense())
        assert mask.density == 0


def test_a_full_ragged_end_is_full_and_patterns_are_shared():
    mask = BlockMask.sliding_window(1000, window=(None, 0))
    assert len(mask.partial) == 2  # on the diagonal, and its ragged end
    assert int((mask.kinds < 0).sum()) == 15 * 16 // 2
    assert BlockMask.from_dense(torch.ones(65, 70).bool()).kinds.tolist() == [-1] * 4


def test_repr_and_density():
    mask = BlockMask.sliding_window(128, window=(None, 0))
    assert mask.density == 0.75
    assert repr(mask) == (
        "BlockMask(q_len=128, k_len=128, batch=1, heads=1, q_block=64, k_block=64, full=1, "
        "partial=2, density=0.75)"
    )


def test_own_lists():
    full = BlockMask.from_dense(torch.rand(2, 1, 30, 40) < 0.1, q_block=8, k_block=4)
    again = BlockMask(
        30, 40, full.row_ptr, full.cols, full.kinds, full.partial.bool(), q_block=8, k_block=4
    )
    for a, b in zip(full.tensors, again.tensors, strict=True):
        assert torch.equal(a, b)


def lists(**changes):
    given = {
        "q_len": 4,
        "k_len": 4,
        "row_ptr": torch.tensor([[[0, 1, 3]]]),
        "cols": torch.tensor([0, 0, 1], dtype=torch.int32),
        "kinds": torch.tensor([-1, 0, -1], dtype=torch.int32),
        "partial": torch.ones(1, 2, 2, dtype=torch.bool),
        "q_block": 2,
        "k_block": 2,
    }
    return BlockMask(**given | changes)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q_len": -1}, ValueError, r"\[BlockMask\] q_len is -1, expected at least 0"),
        ({"q_block": 0}, ValueError, "q_block is 0, expected at least 1"),
        ({"k_block": 2.5}, TypeError, "k_block is float, expected an integer"),
        ({"cols": [0, 0, 1]}, TypeError, "cols is list, expected a torch tensor"),
        ({"cols": torch.tensor([0, 0, 1])}, TypeError, "cols has dtype int64, expected int32"),
        ({"row_ptr": torch.tensor([0, 1, 3])}, ValueError, "row_ptr has rank 1, expected 3"),
        ({"row_ptr": torch.tensor([[[0, 3]]])}, ValueError, r"expected \(batch, heads, 3\)"),
        ({"row_ptr": torch.tensor([[[0, 1, 2]]])}, ValueError, "ascend from 0 to the 3 cols"),
        ({"row_ptr": torch.tensor([[[1, 1, 3]]])}, ValueError, "ascend from 0"),
        ({"row_ptr": torch.tensor([[[0, 4, 3]]])}, ValueError, "ascend from 0"),
        ({"cols": i32(0, 1, 0)}, ValueError, "cols do not ascend within a row"),
        ({"cols": i32(0, 1, 1)}, ValueError, "cols do not ascend within a row"),
        ({"cols": i32(0, 0, 2)}, ValueError, "cols has values from 0 to 2, expected 0 to 1"),
        ({"kinds": i32(0, 0, 1)}, ValueError, "kinds has values from 0 to 1, expected -1 to 0"),
        ({"kinds": i32(0, 0)}, ValueError, "kinds has 2 entries but cols has 3"),
        ({"partial": torch.ones(1, 2, 3).bool()}, ValueError, r"expected \(m, 2, 2\)"),
    ],
)
def test_bad_lists(changes, error, words):
    lists()
    with pytest.raises(error, match=words):
        lists(**changes)


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BlockMask.sliding_window(5, window=3), ValueError, "window is 3, expected"),
        (lambda: BlockMask.sliding_window(5, window=(1, -2)), ValueError, r"window is \(1, -2\)"),
        (lambda: BlockMask.sliding_window(5, -1, window=(1, 1)), ValueError, "k_len is -1"),
        (lambda: BlockMask.strided(5, stride=0), ValueError, "stride is 0, expected at least 1"),
        (lambda: BlockMask.strided(5, stride=2, part="all"), ValueError, "part is 'all'"),
        (lambda: BlockMask.fixed(5, stride=2, summary=3), ValueError, "summary is 3, expected 1"),
        (lambda: BlockMask.prefix_lm(5, prefix=6), ValueError, "prefix has values from 6 to 6"),
        (lambda: BlockMask.prefix_lm(5, prefix=-1), ValueError, "expected 0 to 5"),
        (lambda: BlockMask.prefix_lm(5, prefix=1.0), TypeError, "prefix is float"),
        (lambda: BlockMask.prefix_lm(5, prefix=IDS), ValueError, r"expected \(batch,\)"),
        (lambda: BlockMask.document(IDS.float()), TypeError, "q_ids has dtype float32"),
        (lambda: BlockMask.document(IDS, IDS[0]), ValueError, "q_ids has batch 2 but k_ids has 1"),
        (lambda: BlockMask.document(IDS[None]), ValueError, r"expected \(S,\) or \(B, S\)"),
        (lambda: BlockMask.tree(torch.tensor([0])), ValueError, "earlier token"),
        (lambda: BlockMask.tree(torch.tensor([-1, 2, 0])), ValueError, "earlier token"),
        (lambda: BlockMask.tree(torch.tensor([-2])), ValueError, "earlier token"),
        (lambda: BlockMask.tree(torch.tensor([-1]), -1), ValueError, "past is -1"),
        (lambda: BlockMask.tree([-1]), TypeError, "parents is list"),
        (lambda: BlockMask.from_dense(IDS), TypeError, "mask has dtype int64, expected bool"),
        (lambda: BlockMask.from_dense(IDS[None] > 0), ValueError, r"expected \(q_len, k_len\) or"),
        (lambda: BlockMask.from_function(3, 1, 1, 5), TypeError, "fn is int"),
        (lambda: BlockMask.from_function(max, 0, 1, 5), ValueError, "batch is 0"),
        (
            lambda: BlockMask.from_function(lambda b, h, i, j: i + j, 1, 1, 5),
            TypeError,
            "the result of fn has dtype int64, expected bool",
        ),
        (
            lambda: BlockMask.from_function(lambda b, h, i, j: IDS > 0, 1, 1, 5),
            ValueError,
            r"the result of fn has shape \(2, 5\), expected one that broadcasts",
        ),
    ],
)
def test_bad_arguments(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_no_builder_forms_the_matrix():
    # The matrix of n = 20,000 has 400 MB as bool; a row of blocks has 10 MB as int64.
    grown = run_python(
        """
        import resource, torch
        from pentad.attention import BlockMask
        torch.set_num_threads(1)
        builders = (
            lambda n: BlockMask.sliding_window(n, window=(100, 0)),
            lambda n: BlockMask.prefix_lm(n, prefix=100),
            lambda n: BlockMask.document(torch.arange(n) // 500, causal=True),
            lambda n: BlockMask.tree(torch.arange(n) - 1),
            lambda n: BlockMask.from_function(lambda b, h, i, j: (i - j).abs() < 99, 1, 1, n),
        )
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for build in builders:
            build(128)
        before = peak()
        for build in builders:
            build(20_000)
            print(peak() - before)
        """
    )
    assert all(int(line) < 100_000 for line in grown.split()), grown  # KiB, after each builder

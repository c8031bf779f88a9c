# SPDX-License-Identifier: Apache-2.0
"""CompressedEmbedding: each method against its formula in plain PyTorch."""

import copy
import math

import pytest

import pentad

torch = pytest.importorskip("torch")
F = torch.nn.functional
pq = pentad.pq
Embedding = pentad.nn.CompressedEmbedding

CASES = [
    ("product", {"num_codebooks": 3}),
    ("product", {"num_codebooks": 4, "nbits": 5}),
    ("product", {"num_codebooks": 2, "nbits": 9}),
    ("product", {"num_codebooks": 3, "nbits": 4, "form": "residual"}),
    ("hash", {}),
    ("hash", {"num_hashes": 3, "table_size": 50, "combine": "mean"}),
    ("hash", {"num_hashes": 2, "table_size": 70, "combine": "concat", "seed": 9}),
    ("quotient_remainder", {}),
    ("quotient_remainder", {"sizes": (7, 9, 10), "combine": "sum"}),
    ("quotient_remainder", {"sizes": (30, 20), "combine": "mean"}),
    ("quotient_remainder", {"sizes": (60, 10), "combine": "concat"}),
    ("int8", {}),
    ("int4", {}),
    ("int8", {"train_scales": True}),
    ("int4", {"train_scales": True}),
]
NUM, DIM = 599, 12
each_case = pytest.mark.parametrize(("method", "options"), CASES)


def rows(table, ids):
    """(n, dim) of ids (n,), with gradients, by indexing alone."""
    store = table.rows
    if table.method == "product":
        codes = store.codes[ids]
        if store.nbits != 8:
            codes = pq.unpack_codes(codes, store.nbits, store.num_codebooks)
        words = [book[codes[:, m].long()] for m, book in enumerate(store.codebooks)]
        return torch.cat(words, -1) if store.form == "product" else sum(words)
    if table.method == "hash":
        codes = pq.hash_codes(ids, store.seeds, store.sizes)
        parts = [store.table[code] for code in codes.unbind(-1)]
    elif table.method == "quotient_remainder":
        parts = []
        for size, weight in zip(store.sizes, store.tables, strict=True):
            parts.append(weight[ids % size])
            ids = ids // size
    else:
        codes = store.codes[ids].int()
        if store.nbits == 4:
            halves = torch.empty(len(ids), 2 * codes.shape[1], dtype=torch.int32)
            halves[:, 0::2], halves[:, 1::2] = codes % 16 - 8, codes // 16 - 8
            codes = halves[:, :DIM]
        return codes * store.scales[ids, None]
    if store.combine == "concat":
        return torch.cat(parts, -1)
    total = math.prod(parts) if store.combine == "product" else sum(parts)
    return total / len(parts) if store.combine == "mean" else total


def learned(table):
    return [p for p in table.parameters() if p.requires_grad]


# --- Lookup ---------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_gradients_are_their_formula(method, options, dtype):
    table = Embedding(NUM, DIM, method, dtype=dtype, **options)
    ids = torch.randint(NUM, (4, 60))
    weight = torch.randn(4, 60, DIM, dtype=dtype)
    got, want = table(ids), rows(table, ids.flatten()).view(4, 60, DIM)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want)
    if method.startswith("int"):
        assert bool(learned(table)) == options.get("train_scales", False)
    if learned(table):
        grads = [torch.autograd.grad((v * weight).sum(), learned(table)) for v in (got, want)]
        torch.testing.assert_close(*grads)
        assert any(g.abs().max() > 0 for g in grads[0])
    else:
        assert not got.requires_grad


@each_case
def test_gradcheck(method, options):
    if method == "product":
        options = {**options, "nbits": 3}
    table = Embedding(20, DIM, method, dtype=torch.float64, **options)
    ids = torch.tensor([3, 0, 3, 6])
    for parameter in learned(table):
        assert torch.autograd.gradcheck(lambda _: table(ids), parameter, fast_mode=True)


@each_case
def test_new_rows_have_unit_variance(method, options):
    """So that it can take the place of torch.nn.Embedding; few of its numbers are independent."""
    options = {k: v for k, v in options.items() if k not in ("sizes", "table_size")}
    table = Embedding(3000, 24, method, **options)
    assert 0.7 < table.dense().var().item() < 1.3


@each_case
def test_shapes_and_kinds_of_ids(method, options):
    table = Embedding(100, DIM, method, **options)
    want = table.dense()
    assert want.shape == (100, DIM)
    for shape in [(), (0,), (5,), (2, 3), (2, 0, 3)]:
        ids = torch.randint(100, shape)
        assert torch.equal(table(ids), want[ids])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(table(torch.arange(100).to(dtype)), want)
    spread = torch.arange(300)[::3] // 3
    assert torch.equal(table(spread), want)


@each_case
def test_bags(method, options):
    table = Embedding(100, DIM, method, **options)
    ids, offsets = torch.randint(100, (17,)), torch.tensor([0, 4, 4, 9])
    weights = torch.randn(17)
    for mode, given in (("sum", None), ("sum", weights), ("mean", None), ("max", None)):
        got = table.bag(ids, offsets, weights=given, mode=mode)
        want = F.embedding_bag(
            ids, table.dense().detach(), offsets, mode=mode, per_sample_weights=given
        )
        torch.testing.assert_close(got, want)
        assert got.requires_grad == bool(learned(table))


@each_case
def test_memory_counts_bytes(method, options):
    table = Embedding(NUM, DIM, method, **options)
    if method == "product":
        M, nbits = options["num_codebooks"], options.get("nbits", 8)
        width = DIM if options.get("form") == "residual" else DIM // M
        want = NUM * -(-M * nbits // 8) + 4 * M * 2**nbits * width
    elif method == "hash":
        width = DIM // 2 if options.get("combine") == "concat" else DIM
        want = 4 * options.get("table_size", NUM // 10) * width
    elif method == "quotient_remainder":
        sizes = options.get("sizes", (25, 24))
        want = 4 * sum(sizes) * (DIM // 2 if options.get("combine") == "concat" else DIM)
    else:
        want = NUM * (4 + DIM // (1 if method == "int8" else 2))
    assert table.memory() == want


def test_a_second_derivative_is_refused():
    table = Embedding(NUM, DIM, "hash")
    (first,) = torch.autograd.grad(
        table(torch.arange(9)).pow(2).sum(), table.rows.table, create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated a second time"):
        first.sum().backward()


# --- From a weight --------------------------------------------------------------------------------


@each_case
def test_from_pretrained_is_nearer_than_chance_and_keeps_the_dtype(method, options):
    weight = torch.randn(NUM, DIM)
    for dtype in (torch.float32, torch.bfloat16):
        table = Embedding.from_pretrained(weight.to(dtype), method, **options)
        dense = table.dense()
        assert dense.dtype == dtype
        assert F.mse_loss(dense.float(), weight) < 0.97 * weight.square().mean()
        assert torch.equal(
            Embedding.from_pretrained(weight.to(dtype), method, **options).dense(), dense
        )


@pytest.mark.parametrize(("method", "most"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_integers_are_within_half_a_step(method, most, dim):
    weight = torch.randn(50, dim) * torch.logspace(-6, 6, 50)[:, None]
    weight[3] = 0
    table = Embedding.from_pretrained(weight, method)
    step = weight.abs().amax(-1, keepdim=True) / most
    # Half a step, and the rounding of the scale and of the products.
    assert ((table.dense() - weight).abs() <= 0.5 * step * (1 + 1e-5)).all()
    again = Embedding.from_pretrained(table.dense().detach(), method)
    assert torch.equal(again.rows.codes, table.rows.codes)


def test_integers_are_nearest_for_the_scale_that_is_kept():
    weight = torch.randn(50, 16).bfloat16()
    table = Embedding.from_pretrained(weight, "int8")
    scales = table.rows.scales.detach()
    assert scales.dtype == torch.bfloat16
    codes = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127)
    assert torch.equal(table.rows.codes.float(), codes)


def test_product_codes_are_those_of_the_nearest():
    weight = torch.randn(500, 8)
    for nbits, form in ((8, "product"), (4, "product"), (6, "residual")):
        table = Embedding.from_pretrained(weight, num_codebooks=2, nbits=nbits, form=form)
        codebooks = table.rows.codebooks.detach()
        codes = pq.assign(weight, codebooks, form=form)
        combine = "concat" if form == "product" else "sum"
        assert torch.equal(table.dense(), pq.lookup(codes, codebooks, combine=combine))
    assert F.mse_loss(table.dense(), weight) < 0.5


@pytest.mark.parametrize(("method", "options"), [c for c in CASES if c[0][0] in "hq"])
def test_tables_are_fitted_by_least_squares(method, options):
    """Of linear ones the solution of numpy's solver; a product to a stationary point."""
    weight = torch.randn(NUM, DIM, dtype=torch.float64)
    table = Embedding.from_pretrained(weight, method, **options)
    loss = F.mse_loss(table.dense(), weight)
    error, gradient = loss.item(), torch.autograd.grad(loss, learned(table))
    slope = math.sqrt(sum(g.square().sum() for g in gradient))
    product = options.get("combine", "product" if method[0] == "q" else "sum") == "product"
    # At random tables it is near 0.1; one table after the other gets there slower.
    assert slope < (1e-2 if product else 1e-3) * math.sqrt(error)
    if product:
        return
    columns = [t for p in learned(table) for t in p.detach().flatten().shape]
    system = []  # the matrix of the linear map, a column for each parameter
    ids = torch.arange(NUM)
    with torch.no_grad():
        for parameter in learned(table):
            parameter.zero_()
        for parameter in learned(table):
            for at in range(parameter.numel()):
                if at % parameter.shape[1]:  # columns are alike: one is enough
                    continue
                parameter.view(-1)[at] = 1
                system.append(table(ids)[:, :: parameter.shape[1]].flatten())
                parameter.view(-1)[at] = 0
    assert len(system) == sum(columns) // learned(table)[0].shape[1]
    matrix = torch.stack(system, -1)
    target = weight[:, :: learned(table)[0].shape[1]].reshape(-1, 1)
    best = matrix @ torch.linalg.lstsq(matrix, target, driver="gelsd").solution
    fitted = Embedding.from_pretrained(weight, method, **options).dense()
    fitted = fitted[:, :: learned(table)[0].shape[1]].reshape(-1, 1)
    assert F.mse_loss(fitted, target) < (1 + 1e-6) * F.mse_loss(best, target)


def test_a_badly_conditioned_fit():
    """Nearly as many rows as ids: within 2 %, where steepest descent is 5 % off and more."""
    weight = torch.randn(NUM, 4, dtype=torch.float64)
    table = Embedding.from_pretrained(weight, "hash", table_size=500)
    matrix = torch.zeros(NUM, 500, dtype=torch.float64)
    codes = pq.hash_codes(torch.arange(NUM), range(4), 500)
    matrix.scatter_add_(1, codes, torch.ones(NUM, 4, dtype=torch.float64))
    best = matrix @ torch.linalg.lstsq(matrix, weight, driver="gelsd").solution
    ratio = F.mse_loss(table.dense(), weight) / F.mse_loss(best, weight)
    assert 1 - 1e-9 < ratio < 1.02


def test_a_weight_that_is_a_product_is_found_again():
    tables = [torch.rand(n, 6) + 0.5 for n in (20, 15)]
    ids = torch.arange(300)
    weight = tables[0][ids % 20] * tables[1][ids // 20]
    table = Embedding.from_pretrained(weight, "quotient_remainder", sizes=(20, 15))
    torch.testing.assert_close(table.dense(), weight, rtol=1e-4, atol=1e-4)


@each_case
def test_training_lowers_a_reconstruction_loss(method, options):
    weight = torch.randn(NUM, DIM)
    table = Embedding(NUM, DIM, method, **options)
    if not learned(table):
        return
    rate = 0.1
    if method.startswith("int"):  # the integers stay, so that only their lengths can be learned
        weight, rate = table.dense().detach() * 1.5, table.rows.scales.mean().item() / 20
    optimizer = torch.optim.Adam(table.parameters(), rate)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(table(torch.arange(NUM)), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- State, and ways to run -----------------------------------------------------------------------


@each_case
def test_state(method, options):
    table = Embedding(NUM, DIM, method, **options)
    other = Embedding(NUM, DIM, method, **options)
    assert not torch.equal(table.dense(), other.dense())
    other.load_state_dict(table.state_dict())
    assert torch.equal(table.dense(), other.dense())
    assert torch.equal(copy.deepcopy(table).dense(), table.dense())
    assert table.to(torch.bfloat16).dense().dtype == torch.bfloat16


@pytest.mark.parametrize(("method", "options"), CASES)
def test_meta_tensors_have_the_shapes(method, options):
    table = Embedding(NUM, DIM, method, device="meta", **options)
    out = table(torch.empty((3, 5), dtype=torch.int64, device="meta"))
    assert (out.shape, out.device.type) == ((3, 5, DIM), "meta")


@pytest.mark.parametrize(
    ("method", "options"), [CASES[1], CASES[4], CASES[8], CASES[12], CASES[13]]
)
def test_compiled(method, options):
    torch._dynamo.reset()
    table = Embedding(NUM, DIM, method, **options)
    compiled = torch.compile(table, fullgraph=True)
    ids = torch.randint(NUM, (3, 5))
    got, want = compiled(ids), table(ids)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    if learned(table):
        grads = [torch.autograd.grad(v.square().sum(), learned(table)) for v in (got, want)]
        torch.testing.assert_close(*grads)


@each_case
def test_autocast_and_no_grad(method, options):
    table = Embedding(NUM, DIM, method, **options)
    ids = torch.arange(20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(table(ids), table.dense()[:20])
    with torch.no_grad():
        assert not table(ids).requires_grad


@pytest.mark.parametrize(("method", "options"), [CASES[0], CASES[4], CASES[7]])
def test_gradients_do_not_depend_on_threads(method, options, threads):
    table = Embedding(NUM, DIM, method, **options)
    ids = torch.randint(NUM, (5000,))
    results = []
    for n in (1, 2, 3):
        threads(n)
        loss = table(ids).square().sum(-1).sqrt().sum()
        results.append(torch.autograd.grad(loss, learned(table)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_features_share_a_table():
    """Unified embedding: several features, each with its own seeds and lookups, one table."""
    users = Embedding(1000, 12, "hash", num_hashes=2, table_size=80, combine="concat", seed=0)
    items = Embedding(5000, 18, "hash", num_hashes=3, table_size=80, combine="concat", seed=2)
    items.rows.table = users.rows.table
    user, item = torch.tensor([3, 999]), torch.tensor([3, 4999])
    out = torch.cat([users(user), items(item)], -1)
    out.sum().backward()
    rows = torch.cat([pq.hash_codes(user, range(2), 80), pq.hash_codes(item, range(2, 5), 80)], -1)
    torch.testing.assert_close(out, users.rows.table[rows].flatten(1))
    want = torch.zeros(80, 6).index_add_(0, rows.flatten(), torch.ones(10, 6))
    assert torch.equal(users.rows.table.grad, want)


def test_any_integer_is_an_id_of_the_hashes():
    table = Embedding(100, 4, "hash")
    assert table(torch.tensor([-5, 2**40])).shape == (2, 4)


def test_errors():
    with pytest.raises(ValueError, match=r"\[CompressedEmbedding\] dim is 10, which 4 codebooks"):
        Embedding(100, 10, num_codebooks=4)
    with pytest.raises(ValueError, match="dim is 10, which 4 hashes do not divide"):
        Embedding(100, 10, "hash", combine="concat")
    with pytest.raises(ValueError, match="dim is 9, which 2 tables do not divide"):
        Embedding(100, 9, "quotient_remainder", combine="concat")
    with pytest.raises(ValueError, match=r"sizes \(9, 11\) tell 99 rows apart, expected 100"):
        Embedding(100, 10, "quotient_remainder", sizes=(9, 11))
    with pytest.raises(ValueError, match="nbits is 17, expected 1 to 16"):
        Embedding(100, 8, nbits=17)
    with pytest.raises(ValueError, match="method is 'pq', expected one of product, hash"):
        Embedding(100, 8, "pq")
    with pytest.raises(ValueError, match="combine is 'product', expected one of sum"):
        Embedding(100, 8, "hash", combine="product")
    with pytest.raises(TypeError, match="num_hashes"):
        Embedding(100, 8, "int8", num_hashes=3)
    with pytest.raises(ValueError, match="num_embeddings is 0"):
        Embedding(0, 8)
    for method, options in CASES:
        table = Embedding(100, DIM, method, **options)
        with pytest.raises(TypeError, match="ids has dtype float32"):
            table(torch.zeros(3))
        if method != "hash":
            for bad in (-1, 100):
                with pytest.raises(ValueError, match=r"ids span \S+ to \S+, expected 0 to 99"):
                    table(torch.tensor([3, bad]))
    for weight in (torch.zeros(3), torch.zeros(3, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"expected floats \(num_embeddings, dim\)"):
            Embedding.from_pretrained(weight)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight contains NaN or infinity"):
            Embedding.from_pretrained(torch.full((3, 8), bad), "int8")

# SPDX-License-Identifier: Apache-2.0
"""The VectorQuantizer layer: its loss, its ways to learn, and what its peers call the same."""

import copy
import io

import numpy as np
import pytest

import pentad

torch = pytest.importorskip("torch")
F = torch.nn.functional
pq = pentad.pq

FORMS = ["product", "residual", "grouped"]


def layer(*args, **options):
    return pentad.nn.VectorQuantizer(*args, **{"seed": 5, **options})


def clusters(n, dim, centres, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    where = torch.randn(centres, dim, generator=generator) * 3
    which = torch.randint(centres, (n,), generator=generator)
    return where[which] + noise * torch.randn(n, dim, generator=generator)


def targets_and_words(x, codes, codebooks, form):
    """Per codebook: what it quantizes, and its codeword, both with gradients."""
    left = x
    for m, book in enumerate(codebooks):
        word = book[codes[:, m].long()]
        width = book.shape[1]
        yield (x[:, m * width : (m + 1) * width] if form == "product" else left), word
        if form == "residual":
            left = left - word.detach()


# --- Forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"decay": 0.8}, {"sim_vq": True}])
def test_the_loss_is_its_formula(form, options):
    vq = layer(12, 9, 3, form=form, commitment_weight=0.3, codebook_weight=0.7, **options).double()
    vq.eval()
    x = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    quantized, codes, loss = vq(x)
    learned = [p for p in vq.parameters() if p.requires_grad]
    got = torch.autograd.grad((quantized * weight).sum() + loss, [x, *learned])

    want = 0
    for target, word in targets_and_words(x, codes, vq.codebooks, form):
        want = want + 0.3 * F.mse_loss(target, word.detach()) / 3
        if vq.decay is None:
            want = want + 0.7 * F.mse_loss(word, target.detach()) / 3
    torch.testing.assert_close(loss, want)
    grads = torch.autograd.grad((x * weight).sum() + want, [x, *learned])
    torch.testing.assert_close(got, grads)
    combine = {"product": "concat", "residual": "sum", "grouped": "mean"}[form]
    exact = pq.lookup(codes, vq.codebooks, combine=combine)
    assert torch.equal(quantized, exact.to(x.dtype))
    assert torch.equal(vq.decode(codes), exact)
    assert torch.equal(vq.encode(x), codes)


def test_the_gradient_of_the_output_reaches_codebooks_on_request():
    """Codebook features (Tamkin et al.): rows of the output's gradient, added up by code."""
    x, weight = torch.randn(40, 6), torch.randn(40, 6)
    for wanted in (False, True):
        vq = layer(6, 5, 2, output_gradient=wanted, kmeans_init=False)
        out = vq(x)
        expected = torch.zeros(2, 5, 3)
        for m in range(2):
            expected[m].index_add_(0, out.codes[:, m].long(), weight[:, 3 * m : 3 * m + 3])
        assert out.quantized.requires_grad == wanted
        if wanted:
            (out.quantized * weight).sum().backward()
            torch.testing.assert_close(vq.words.grad, expected)


def test_top_codes_of_codebook_features():
    """The grouped form with one start: the mean of the codewords nearest in several codebooks."""
    vq = layer(4, 6, 3, form="grouped", kmeans_init=False)
    x = torch.randn(20, 4)
    out = vq(x)
    each = [torch.cdist(x, book).argmin(-1) for book in vq.words]
    torch.testing.assert_close(
        out.quantized, sum(b[c] for b, c in zip(vq.words, each, strict=True)) / 3
    )


@pytest.mark.parametrize("form", ["product", "grouped"])
def test_cosine_is_on_the_sphere(form):
    vq = layer(6, 7, 2, form=form, metric="cosine", kmeans_init=False)
    x = torch.randn(30, 6, requires_grad=True)
    out = vq(x)
    width = vq.width
    unit = F.normalize(x.unflatten(-1, (-1, width)), dim=-1)
    books = F.normalize(vq.words, dim=-1)
    codes = torch.einsum("nmd,mkd->nmk", unit.expand(-1, 2, -1), books).argmax(-1)
    assert torch.equal(out.codes.long(), codes)
    words = torch.stack([books[m][codes[:, m]] for m in range(2)], 1)
    targets = unit.expand_as(words)
    value = words.flatten(1) if form == "product" else words.mean(1)
    torch.testing.assert_close(out.quantized, value)
    loss = 0.25 * F.mse_loss(targets, words.detach()) + F.mse_loss(words, targets.detach())
    torch.testing.assert_close(out.loss, loss)
    straight = unit.flatten(1) + (value - unit.flatten(1)).detach()
    for got, want in ((out.quantized, straight), (out.loss, loss)):
        (a,) = torch.autograd.grad(got.pow(2).sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad(want.pow(2).sum(), x, retain_graph=True)
        torch.testing.assert_close(a, b)


def test_the_entropy_is_its_formula():
    options = {"kmeans_init": False, "codebook_weight": 0, "commitment_weight": 0}
    vq = layer(6, 5, 2, entropy_weight=0.5, entropy_temperature=0.7, **options)
    x = torch.randn(30, 6, requires_grad=True)
    want = 0
    for m in range(2):
        p = (-torch.cdist(x[:, 3 * m : 3 * m + 3], vq.words[m]).square() / 0.7).softmax(-1)
        mean = p.mean(0)
        want = want + (-(p * p.log()).sum(-1).mean() + (mean * mean.log()).sum()) / 2
    loss = vq(x).loss
    torch.testing.assert_close(loss, 0.5 * want)
    got = torch.autograd.grad(loss, (x, vq.words))
    wanted = torch.autograd.grad(0.5 * want, (x, vq.words))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)  # cdist's roots lose some digits


@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 3), (2, 0, 3)])
def test_leading_shapes(lead):
    vq = layer(6, 4, 3, decay=0.9)
    x = torch.randn(*lead, 6, requires_grad=True)
    before = copy.deepcopy(vq.state_dict())
    out = vq(x)
    assert out.quantized.shape == x.shape
    assert out.codes.shape == (*lead, 3)
    assert out.loss.shape == ()
    assert out.loss.isfinite()
    assert vq.decode(vq.encode(x)).shape == x.shape
    if x.numel() == 0:  # no batch at all
        assert same(before.values(), vq.state_dict().values())


# --- Learning -------------------------------------------------------------------------------------


def distortion(vq, x):
    return F.mse_loss(vq.eval()(x).quantized, x).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"decay": 0.7}, {"sim_vq": True}])
def test_training_lowers_the_distortion(form, options):
    x = clusters(300, 8, 20)
    vq = layer(8, 8, 2, form=form, kmeans_init=False, **options)
    before = distortion(vq, x)
    optimizer = torch.optim.Adam(vq.parameters(), 0.05) if list(vq.parameters()) else None
    for _ in range(40):
        loss = vq.train()(x).loss
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = distortion(vq, x)
    assert after < 0.7 * before, (before, after)


def test_an_autoencoder_learns_through_it():
    x = clusters(400, 10, 6)
    down, up = torch.nn.Linear(10, 4), torch.nn.Linear(4, 10)
    vq = layer(4, 16, revive_after=5)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters(), *vq.parameters()], 0.01)
    losses = []
    for _ in range(150):
        quantized, _, loss = vq(down(x))
        error = F.mse_loss(up(quantized), x)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        losses.append(error.item())
    assert down.weight.grad.abs().max() > 0
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_moving_averages_are_their_formula(form, metric):
    """Appendix A.1 of van den Oord et al., with vector-quantize-pytorch's smoothing, in numpy."""
    if (form, metric) == ("residual", "cosine"):
        return
    decay, eps, K = 0.8, 1e-3, 5
    vq = layer(6, K, 2, form=form, metric=metric, decay=decay, eps=eps, kmeans_init=False)
    words = vq.words.double().numpy().copy()
    counts, sums = np.ones((2, K)), words.copy()
    for step in range(4):
        x = torch.randn(30, 6, generator=torch.Generator().manual_seed(step))
        before = torch.from_numpy(words.copy())
        codes = vq(x).codes
        given = x.double()
        if metric == "cosine":
            given = F.normalize(given.unflatten(-1, (-1, vq.width)), dim=-1).flatten(-2)
        for m, (target, _) in enumerate(targets_and_words(given, codes, before, form)):
            n, s = np.zeros(K), np.zeros((K, vq.width))
            for row, code in zip(target.numpy(), codes[:, m].tolist(), strict=True):
                n[code] += 1
                s[code] += row
            counts[m] = decay * counts[m] + (1 - decay) * n
            sums[m] = decay * sums[m] + (1 - decay) * s
            total = counts[m].sum()
            smooth = (counts[m] + eps) / (total + K * eps) * total
            words[m] = sums[m] / smooth[:, None]
            if metric == "cosine":
                words[m] /= np.linalg.norm(words[m], axis=-1, keepdims=True)
        for got, want in ((vq.counts, counts), (vq.sums, sums), (vq.words, words)):
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)  # float32 sums
    assert not list(vq.parameters())


def test_dead_codes_become_vectors_of_the_batch():
    for options in ({}, {"decay": 0.9}):
        vq = layer(4, 6, 2, kmeans_init=False, revive_after=3, **options)
        with torch.no_grad():
            vq.words[:, 4:] = 100.0  # never the nearest
            if vq.decay is not None:
                vq.sums[:, 4:] = 100.0
        for step in range(3):
            vq(torch.randn(50, 4))
            assert vq.idle[:, 4:].tolist() == [[step + 1] * 2] * 2
        assert (vq.words[:, 4:] > 50).all()
        x = torch.randn(50, 4)
        codes = vq(x).codes
        assert (pq.usage(codes, 6)[:, 4:] > 0).all()  # used at once, by their own vectors
        assert (vq.idle[:, 4:] == 0).all()
        assert (vq.words[:, 4:].abs() < 50).all()
        if vq.decay is not None:  # a revived code counts as one vector
            want = 0.9 + 0.1 * pq.usage(codes, 6)[:, 4:].float()
            torch.testing.assert_close(vq.counts[:, 4:], want)
        if vq.decay is None:
            for m in range(2):
                parts = x[:, 2 * m : 2 * m + 2]
                for word in vq.words[m, 4:]:
                    assert (parts == word).all(-1).any()


def test_revived_codes_are_different_vectors():
    """Residual too: of what the codebooks before have left."""
    vq = layer(3, 8, 2, form="residual", kmeans_init=False, revive_after=1)
    with torch.no_grad():
        vq.words[1, :] = 50.0
    vq(torch.randn(40, 3))
    with torch.no_grad():
        first = vq.words[0].clone()
    vq.idle[0] = 0
    x = torch.randn(40, 3)
    vq(x)
    left = x - first[torch.cdist(x, first).argmin(-1)]
    assert (vq.idle[1] <= 1).all()
    revived = [w for w in vq.words[1] if (w < 40).all()]
    assert len(revived) >= 7
    for word in revived:
        assert (left - word).abs().sum(-1).min() < 1e-5
    assert len({tuple(w.tolist()) for w in revived}) == len(revived)


def test_the_start_is_k_means():
    x = clusters(500, 6, 8, noise=0.01)
    vq = layer(6, 8, kmeans_init=True, kmeans_iterations=20)
    plain = layer(6, 8, kmeans_init=False)
    vq(x)
    plain(x)
    assert distortion(vq, x) < 0.2 * distortion(plain, x)
    before = vq.words.clone()
    vq.train()(x + 5)  # only the first batch
    assert torch.equal(vq.words, before)


def test_the_second_level_starts_on_what_the_first_left():
    x = torch.randn(600, 3)
    first, both = layer(3, 16), layer(3, 16, 2, form="residual")
    first(x)
    both(x)
    assert distortion(both, x) < 0.4 * distortion(first, x)


def test_codes_that_k_means_left_empty_stay_where_they_are():
    x = F.normalize(torch.randn(3, 4), dim=-1).repeat(20, 1)
    vq = layer(4, 8, decay=0.5)
    vq(x)
    assert (vq.words.norm(dim=-1) > 0.4).all()


@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"sim_vq": True}])
def test_a_start_with_fewer_vectors_than_codes(options):
    vq = layer(4, 20, 2, kmeans_init=True, **options)
    x = torch.randn(7, 4)
    out = vq(x)
    assert vq.codebooks.isfinite().all()
    torch.testing.assert_close(out.quantized, x)  # each vector has its code


def test_sim_vq_moves_the_whole_codebook_by_one_matrix():
    """Equation 6 of Zhu et al.: codebook = C W, gradients to W alone, dense."""
    vq = layer(4, 60, sim_vq=True)
    assert [name for name, _ in vq.named_parameters()] == ["transform"]
    basis = vq.basis.clone()
    x = torch.randn(30, 4)
    loss = vq(x).loss
    loss.backward()
    C, W = vq.basis[0], vq.transform.detach()[0].clone().requires_grad_()
    codes = torch.cdist(x, C @ W).argmin(-1)
    (want,) = torch.autograd.grad(F.mse_loss((C @ W)[codes], x), W)
    torch.testing.assert_close(vq.transform.grad[0], want)
    assert (vq.transform.grad != 0).all()
    unused = torch.tensor([k for k in range(60) if k not in codes])
    assert len(unused)
    before = vq.codebooks.detach().clone()
    torch.optim.SGD(vq.parameters(), 0.1).step()
    assert (vq.codebooks[0, unused] - before[0, unused]).abs().max() > 1e-4
    vq(x)
    assert torch.equal(vq.basis, basis)


def test_latent_quantization_is_the_product_of_single_columns():
    """Hsu et al.: |x_i - v_ij| per column; fewer levels are repeated, ties take the smaller."""
    levels = [5, 3, 4]
    values = torch.stack([
        torch.cat([torch.linspace(-0.5, 0.5, n), torch.full((5 - n,), 0.5)]) for n in levels
    ])  # fmt: skip
    vq = layer(3, 5, 3, kmeans_init=False)
    with torch.no_grad():
        vq.words.copy_(values[..., None])
    x = torch.rand(60, 3, requires_grad=True) - 0.5
    out = vq(x)
    index = (x[..., None] - values).abs().argmin(-1)
    assert torch.equal(out.codes.long(), index)
    assert (index.max(0).values < torch.tensor(levels)).all()
    found = torch.stack([values[i, index[:, i]] for i in range(3)], -1)
    assert torch.equal(out.quantized, found)
    torch.testing.assert_close(out.loss, 1.25 * F.mse_loss(x, found))


def test_the_discrete_key_value_bottleneck():
    """Träuble et al.: keys by averages alone, then frozen; gradients to the values fetched."""
    keys = layer(8, 6, 4, decay=0.9)
    x = torch.randn(50, 8)
    for _ in range(3):
        keys(x)
    keys.eval()
    values = torch.randn(4, 6, 5, requires_grad=True)
    frozen = copy.deepcopy(keys.state_dict())
    codes = keys.encode(x[:3])
    pq.lookup(codes, values, combine="mean").sum().backward()
    want = torch.zeros(4, 6, 5)
    for row in codes.tolist():
        for m, code in enumerate(row):
            want[m, code] += 1 / 4
    torch.testing.assert_close(values.grad, want)
    for name, value in keys.state_dict().items():
        assert torch.equal(value, frozen[name]), name


# --- State ----------------------------------------------------------------------------------------

KINDS = [{"decay": 0.9, "revive_after": 2}, {"revive_after": 1}, {"sim_vq": True},
         {"form": "residual", "decay": 0.5, "revive_after": 1}]  # fmt: skip


def run(vq, steps, first=0, autocast=False):
    outs = []
    optimizer = torch.optim.SGD(vq.parameters(), 0.1) if list(vq.parameters()) else None
    for step in range(first, first + steps):
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(step)) * (1 + step % 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = vq(x)
        outs += [out.quantized.detach(), out.codes, out.loss.detach()]
        if optimizer:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    return outs


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", KINDS)
def test_everything_repeats(options, threads):
    def fresh():
        return layer(6, 16, 2, **options)

    want = run(fresh(), 6)
    torch.randn(3)  # torch's generator has no part in it
    threads(2)
    assert same(run(fresh(), 6), want)
    other = run(layer(6, 16, 2, **{**options, "seed": 6}), 6)
    assert not same(other, want)

    half = fresh()
    run(half, 3)
    copied = copy.deepcopy(half)
    stored = io.BytesIO()
    torch.save(half.state_dict(), stored)
    stored.seek(0)
    loaded = layer(6, 16, 2, **{**options, "seed": 99})
    loaded.load_state_dict(torch.load(stored))
    for vq in (half, copied, loaded):
        assert same(run(vq, 3, first=3), want[9:])


def test_the_default_seed_is_torchs():
    torch.manual_seed(1)
    a = pentad.nn.VectorQuantizer(4, 8)
    torch.manual_seed(1)
    b = pentad.nn.VectorQuantizer(4, 8)
    assert torch.equal(a.words, b.words)
    assert not torch.equal(a.words, pentad.nn.VectorQuantizer(4, 8).words)


@pytest.mark.parametrize("options", KINDS)
def test_eval_changes_nothing(options):
    vq = layer(6, 16, 2, **options)
    for started in (False, True):
        if started:
            vq.train()
            run(vq, 2)
        vq.eval()
        before = copy.deepcopy(vq.state_dict())
        for _ in range(3):
            vq(torch.randn(20, 6))
            vq.encode(torch.randn(20, 6))
        for name, value in vq.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_meta_tensors_have_the_shapes():
    vq = layer(6, 16, 2, device="meta").eval()
    x = torch.empty(3, 7, 6, device="meta", requires_grad=True)
    result = vq(x)
    assert (result.quantized.shape, result.codes.shape) == ((3, 7, 6), (3, 7, 2))
    (grad,) = torch.autograd.grad(result.quantized.sum() + result.loss, x)
    assert (grad.shape, grad.device.type) == (x.shape, "meta")
    assert vq.decode(vq.encode(x)).shape == x.shape


@pytest.mark.parametrize("options", [*KINDS, {"metric": "cosine"}])
def test_compiled_in_eval_mode(options):
    torch._dynamo.reset()
    vq = layer(6, 16, 2, **options)
    run(vq, 2)
    vq.eval()
    x = torch.randn(3, 7, 6, requires_grad=True)
    compiled = torch.compile(vq, fullgraph=True)
    want, got = vq(x), compiled(x)
    assert torch.equal(want.codes, got.codes)
    torch.testing.assert_close(got.quantized, want.quantized)
    torch.testing.assert_close(got.loss, want.loss)
    grads = [torch.autograd.grad(o.quantized.pow(2).sum() + o.loss, x)[0] for o in (want, got)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", KINDS)
def test_autocast_and_bfloat16_keep_float32_statistics(options):
    a, b = layer(6, 16, 2, **options), layer(6, 16, 2, **options)
    want = run(a, 3)
    got = run(b, 3, autocast=True)
    assert same(want, got)
    assert all(t.dtype != torch.bfloat16 for t in b.state_dict().values())

    vq = layer(6, 16, 2, **options).to(torch.bfloat16)
    x = torch.randn(60, 6).bfloat16().requires_grad_()
    for _ in range(3):
        out = vq(x)
    assert out.quantized.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    (out.quantized.float().sum() + out.loss).backward()
    assert x.grad.dtype == torch.bfloat16
    if vq.decay is not None:
        assert vq.words.dtype == vq.counts.dtype == vq.sums.dtype == torch.float32
    else:
        assert all(p.dtype == torch.bfloat16 for p in vq.parameters())


def test_conversion_to_bfloat16_keeps_the_averages_bits():
    vq = layer(6, 16, 2, decay=0.9)
    run(vq, 2)
    before = copy.deepcopy(vq.state_dict())
    vq.to(torch.bfloat16).half().float()
    for name, value in vq.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert vq.double().words.dtype == torch.float64


def test_a_bad_batch_changes_nothing():
    for options in KINDS:
        vq = layer(6, 16, 2, **options)
        for started in (False, True):
            if started:
                run(vq, 2)
                vq.idle.fill_(5)  # all dead
            before = copy.deepcopy(vq.state_dict())
            x = torch.randn(20, 6)
            x[3, 2] = float("nan")
            with pytest.raises(ValueError, match=r"NaN|finite"):
                vq(x)
            for name, value in vq.state_dict().items():
                assert torch.equal(value, before[name]), name
    vq = layer(2, 1)  # k-means starts on every third vector of 800, and none of those is NaN
    x = torch.randn(800, 2)
    x[1] = float("inf")
    before = vq.words.clone()
    with pytest.raises(ValueError, match=r"NaN|finite"):
        vq(x)
    assert torch.equal(vq.words, before)


def test_two_batches_before_their_gradients():
    """Codes revived in between do not spoil the first batch's gradients."""
    vq = layer(4, 8, 2, kmeans_init=False, revive_after=1)
    x = [torch.randn(9, 4) for _ in range(2)]
    first = vq(x[0])
    words = vq.words.detach().clone().requires_grad_()
    target = torch.stack([words[m][first.codes[:, m].long()] for m in range(2)], 1).flatten(1)
    (want,) = torch.autograd.grad(F.mse_loss(target, x[0]), words)
    vq(x[1])
    assert not torch.equal(vq.words, words)
    first.loss.backward()
    torch.testing.assert_close(vq.words.grad, want)


def test_errors():
    make = pentad.nn.VectorQuantizer
    with pytest.raises(ValueError, match="dim is 7, which 2 codebooks do not divide"):
        make(7, 4, 2)
    make(7, 4, 2, form="grouped")
    with pytest.raises(ValueError, match="'cosine' has no residual form"):
        make(8, 4, 2, form="residual", metric="cosine")
    with pytest.raises(ValueError, match=r"decay is 1\.0, expected 0 to below 1"):
        make(8, 4, decay=1.0)
    with pytest.raises(ValueError, match="sim_vq keeps its basis"):
        make(8, 4, decay=0.9, sim_vq=True)
    with pytest.raises(ValueError, match="sim_vq keeps its basis"):
        make(8, 4, revive_after=3, sim_vq=True)
    with pytest.raises(ValueError, match="output_gradient needs codebooks that learn"):
        make(8, 4, decay=0.9, output_gradient=True)
    with pytest.raises(ValueError, match="revive_after is 0, expected at least 1"):
        make(8, 4, revive_after=0)
    with pytest.raises(ValueError, match="codebook_size is 0"):
        make(8, 0)
    with pytest.raises(TypeError, match=r"dim is 8\.0, expected an integer"):
        make(8.0, 4)
    for name in ("metric", "form", "estimator"):
        with pytest.raises(ValueError, match=rf"{name} is 'x', expected one of"):
            make(8, 4, **{name: "x"})
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), expected \(..., 8\)"):
        make(8, 4)(torch.zeros(3, 7))
    with pytest.raises(TypeError, match="int64"):
        make(8, 4).eval()(torch.zeros(3, 8, dtype=torch.int64))

# SPDX-License-Identifier: Apache-2.0
"""Losses of dense and sparse activations against plain sums."""

import numpy as np
import pytest
import scipy.sparse

from pentad.sparse import flops_loss, l1_loss

torch = pytest.importorskip("torch")


def draw(rng, b=6, vocab=40, dtype=np.float64):
    """Rows of 0, 1, 2 ... values of both signs."""
    x = rng.standard_normal((b, vocab)).astype(dtype)
    for i, row in enumerate(x):
        row[rng.permutation(vocab)[i:]] = 0
    return x


def plain_flops(x, threshold=None):
    if threshold is not None:
        x = x * ((x != 0).sum(1) > threshold)[:, None]
    return (np.abs(x).mean(0) ** 2).sum()


def plain_l1(x):
    return np.abs(x).sum(1).mean()


def uncoalesced(x):
    """A COO tensor with every value in two parts, in a random order."""
    row, column = np.nonzero(x)
    order = np.random.default_rng(0).permutation(2 * len(row))
    indices = np.stack([np.tile(row, 2), np.tile(column, 2)])[:, order]
    values = np.concatenate([0.25 * x[row, column], 0.75 * x[row, column]])[order]
    return torch.sparse_coo_tensor(torch.from_numpy(indices), torch.from_numpy(values), x.shape)


def forms(x):
    """The same activations in every way."""
    csr = scipy.sparse.csr_array(x)
    dense = torch.from_numpy(x)
    return {
        "numpy": x,
        "torch": dense,
        "strided": dense.mT.contiguous().mT,
        "csr": dense.to_sparse_csr(),
        "coo": dense.to_sparse(),
        "uncoalesced": uncoalesced(x),
        "scipy csr": csr,
        "scipy csc": csr.tocsc(),
        "tuple": (csr.indptr, csr.indices, csr.data),
        "tuple of tensors": (
            *(torch.from_numpy(a) for a in (csr.indptr, csr.indices, csr.data)),
            x.shape[1],
        ),
    }


@pytest.mark.parametrize("threshold", [None, 0, 1, 3, 5, 100])
def test_flops_in_every_form(rng, threshold):
    x = draw(rng)
    want = plain_flops(x, threshold)
    for form, given in forms(x).items():
        got = flops_loss(given, threshold)
        np.testing.assert_allclose(float(got), want, rtol=1e-12, err_msg=form)
        assert "float64" in str(got.dtype), form
    if threshold == 100:
        assert want == 0


def test_l1_in_every_form(rng):
    x = draw(rng)
    for form, given in forms(x).items():
        got = l1_loss(given)
        np.testing.assert_allclose(float(got), plain_l1(x), rtol=1e-12, err_msg=form)
        assert "float64" in str(got.dtype), form


def test_explicit_zeros_are_no_activations():
    rows = (np.array([0, 2, 4]), np.array([0, 1, 0, 1]), np.array([1.0, 0.0, 2.0, 3.0]))
    assert flops_loss(rows, threshold=1) == 1 + 1.5**2
    assert flops_loss(rows, threshold=2) == 0
    doubled = (np.array([0, 2]), np.array([3, 3]), np.array([1.0, -1.0]))  # a sum of 0
    assert flops_loss(doubled, threshold=0) == l1_loss(doubled) == 0


@pytest.mark.parametrize("columns", [2**31 - 1, 3_000_000])
def test_a_vocabulary_mostly_unseen(columns):
    rows = (np.array([0, 2, 3]), np.array([5, columns - 1, 5]), np.array([1.0, 2.0, 3.0]), columns)
    assert flops_loss(rows) == 2.0**2 + 1.0**2
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = flops_loss((torch.tensor([0, 2, 3]), torch.tensor([5, columns - 1, 5]), values, columns))
    loss.backward()
    assert loss == 5.0
    assert values.grad.tolist() == [2.0, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_halves_are_summed_in_float32(rng, dtype):
    x = torch.from_numpy(draw(rng)).to(dtype)
    for given in (x, x.to_sparse_csr()):
        for got, want in (
            (flops_loss(given), plain_flops(x.double().numpy())),
            (l1_loss(given), plain_l1(x.double().numpy())),
        ):
            assert got.dtype == torch.float32
            # Some 40 sums of 6 terms, squared.
            torch.testing.assert_close(float(got), want, rtol=1e-6, atol=0)
    leaf = x.clone().requires_grad_()
    flops_loss(leaf).backward()
    assert leaf.grad.dtype == dtype
    numpy = flops_loss(x.float().numpy())
    assert numpy.dtype == np.float32


@pytest.mark.parametrize("threshold", [None, 2])
def test_gradients(rng, threshold):
    x = torch.from_numpy(draw(rng))
    leaf = x.clone().requires_grad_()
    flops_loss(leaf, threshold).backward()
    kept = x if threshold is None else x * ((x != 0).sum(1) > threshold)[:, None]
    want = 2 * kept.abs().mean(0) / 6 * kept.sign()
    torch.testing.assert_close(leaf.grad, want)
    row, column = x.nonzero().unbind(1)
    indptr = x.to_sparse_csr().crow_indices()
    for make in (
        lambda v: torch.sparse_coo_tensor(torch.stack([row, column]), v, x.shape),
        lambda v: torch.sparse_csr_tensor(indptr, column, v, x.shape),
        lambda v: (indptr, column, v, 40),
    ):
        values = x[row, column].requires_grad_()
        (grad,) = torch.autograd.grad(flops_loss(make(values), threshold), values)
        torch.testing.assert_close(grad, want[row, column])
        (grad,) = torch.autograd.grad(l1_loss(make(values)), values)
        torch.testing.assert_close(grad, x[row, column].sign() / 6)


def test_gradients_of_duplicates_and_of_any_order():
    indptr, indices = torch.tensor([0, 4, 5]), torch.tensor([3, 1, 3, 0, 1])
    values = torch.tensor([1.0, -2.0, 0.5, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    for loss in (flops_loss, l1_loss, lambda rows: flops_loss(rows, 2)):
        assert torch.autograd.gradcheck(lambda v, f=loss: f((indptr, indices, v, 7)), values)
    dense = torch.zeros(2, 7, dtype=torch.float64)
    dense[0, 3], dense[0, 1], dense[0, 0], dense[1, 1] = 1.5, -2.0, 3.0, 4.0
    torch.testing.assert_close(flops_loss((indptr, indices, values, 7)), flops_loss(dense))


def test_the_loss_of_sentence_transformers(rng):
    losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")
    x = torch.from_numpy(draw(rng)).abs()
    for threshold in (None, 2):
        theirs = losses.FlopsLoss(model=None, threshold=threshold)
        torch.testing.assert_close(flops_loss(x, threshold), theirs.compute_loss_from_embeddings(x))


def test_compiles_without_a_break(rng):
    torch._dynamo.reset()
    x = torch.from_numpy(draw(rng)).requires_grad_()

    def call(x):
        return flops_loss(x, 2) + l1_loss(x)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, call(x))
    assert flops_loss(torch.ones(2, 3, device="meta")).shape == ()


def test_no_rows():
    for loss in (flops_loss, l1_loss):
        for empty in (np.zeros((0, 4)), torch.zeros(0, 4), scipy.sparse.csr_array((0, 4))):
            assert loss(empty) == 0
        assert loss(np.zeros((3, 0))) == 0
        assert loss((np.array([0, 0]), np.array([], int), np.array([]))) == 0


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(3), ValueError, r"activations have shape \(3,\), expected \(B, V\)"),
        (np.zeros((3, 2), int), TypeError, "activations has dtype int64"),
        (torch.zeros(3, 2).int(), TypeError, "activations has dtype int32"),
        ([[1.0]], TypeError, "activations is list"),
        ((np.array([0, 1]), np.array([-1]), np.ones(1)), ValueError, "activations"),
        ((np.array([0, 1]), np.array([1]), np.array([np.nan])), ValueError, "activations"),
        ((np.array([0, 2]), np.array([1]), np.ones(1)), ValueError, "activations"),
    ],
)
@pytest.mark.parametrize("loss", [flops_loss, l1_loss])
def test_refusals(loss, x, error, message):
    with pytest.raises(error, match=message) as caught:
        loss(x)
    assert str(caught.value).startswith(f"[sparse.{loss.__name__}] ")


def test_thresholds_are_refused():
    with pytest.raises(TypeError, match=r"threshold is 0\.5, expected an integer"):
        flops_loss(np.ones((2, 2)), 0.5)
    with pytest.raises(ValueError, match="threshold is -1"):
        flops_loss(np.ones((2, 2)), -1)

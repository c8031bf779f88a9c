# SPDX-License-Identifier: Apache-2.0
"""The memory layer of product keys."""

import copy

import pytest

import pentad
from pentad.pq import product_key_lookup


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # tasks of microseconds would wait for each other


def memory(**options):
    pytest.importorskip("torch")
    options = {"heads": 2, "n_keys": 12, "k": 4, "key_dim": 8, **options}
    return pentad.nn.ProductKeyMemory(10, **options)


def test_the_module_is_its_formula(rng):
    torch = pytest.importorskip("torch")
    module = memory(value_dim=7)
    x = torch.randn(5, 3, 10)
    queries = torch.nn.functional.batch_norm(
        module.query(x).view(15, 16), None, None, module.norm.weight, module.norm.bias, True
    )
    want = product_key_lookup(queries.view(5, 3, 2, 8), module.subkeys, module.values, 4)
    torch.testing.assert_close(module(x), want)
    assert module(x[0, 0:2]).shape == (2, 7)
    plain_module = memory(batch_norm=False).eval()
    result = plain_module(x[0, 0], return_indices=True)
    assert result.indices.shape == (2, 4)
    want = product_key_lookup(
        plain_module.query(x[0, 0]).view(2, 8), plain_module.subkeys, plain_module.values, 4
    )
    assert torch.equal(result.out, want)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_module_learns_an_association(sparse):
    torch = pytest.importorskip("torch")
    module = memory(sparse=sparse)
    x, target = torch.randn(64, 10), torch.randn(64, 10)
    values = [module.values]
    others = [p for n, p in module.named_parameters() if n != "values"]
    optimizers = [torch.optim.Adam(others, 0.02)]
    optimizers.append((torch.optim.SparseAdam if sparse else torch.optim.Adam)(values, 0.1))
    losses = []
    for _ in range(30):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad is not None for p in module.parameters())


def test_the_module_copies_saves_and_compiles():
    torch = pytest.importorskip("torch")
    module = memory().eval()
    x = torch.randn(6, 10)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    other = memory().eval()
    assert not torch.equal(other(x), want)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), want)
    assert {"subkeys", "values", "query.weight", "norm.running_mean"} <= set(module.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.float32
    assert "n_keys=12" in repr(module)


@pytest.mark.parametrize("where", ["input_dropout", "query_dropout", "value_dropout"])
def test_dropout_is_for_training(where):
    torch = pytest.importorskip("torch")
    module = memory(**{where: 0.5})
    x = torch.randn(6, 10)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    if where == "value_dropout":
        module.train()
        assert 0 < (module(x) == 0).float().mean() < 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k is 0"),
        ({"key_dim": 7}, "key_dim is 7"),
        ({"k": 145}, "144 values"),
        ({"value_dim": 0}, "value_dim is 0, expected at least 1"),
    ],
)
def test_the_module_refuses(options, text):
    with pytest.raises(ValueError, match=rf"\[ProductKeyMemory\].*{text}"):
        memory(**options)

# SPDX-License-Identifier: Apache-2.0
"""The product-key memory layer."""

import torch
from torch import nn
from torch.nn import functional as F

from pentad._checks import check_count
from pentad.pq.product_keys import product_key_lookup


class ProductKeyMemory(nn.Module):
    """A layer with a memory of ``n_keys ** 2`` values, of which each query reads ``heads * k``.

    Lample et al. 2019, "Large Memory Layers with Product Keys": a linear map makes a query for
    each head, batch normalization spreads the queries so that more of the memory is used (section
    4.5), `pentad.pq.product_key_lookup` selects and adds the values.

    Parameters
    ----------
    dim : int
        Width of the input.
    heads : int
    n_keys : int
        Sub-keys in each half of each head; there are ``n_keys ** 2`` values.
    k : int
        Values that a head reads.
    key_dim : int
        Width of a key, and of the query of a head; even.
    value_dim : int, optional
        Width of a value and of the output, by default `dim`.
    batch_norm : bool
        Batch normalization of the queries.
    input_dropout, query_dropout, value_dropout : float
        Of the input, the queries and the output, in training.
    sparse : bool
        The gradient of `values` is sparse: see `product_key_lookup`.
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    subkeys : (heads, 2, n_keys, key_dim / 2) parameter
    values : (n_keys ** 2, value_dim) parameter
    query : torch.nn.Linear

    Examples
    --------
    >>> import torch
    >>> memory = pentad.nn.ProductKeyMemory(16, heads=2, n_keys=8, k=4, key_dim=10)
    >>> memory(torch.randn(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        n_keys: int = 512,
        k: int = 32,
        key_dim: int = 256,
        value_dim: int | None = None,
        batch_norm: bool = True,
        input_dropout: float = 0.0,
        query_dropout: float = 0.0,
        value_dropout: float = 0.0,
        sparse: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        sizes = {"dim": dim, "heads": heads, "n_keys": n_keys, "k": k, "key_dim": key_dim}
        sizes["value_dim"] = dim if value_dim is None else value_dim
        for name, size in sizes.items():
            sizes[name] = check_count("ProductKeyMemory", name, size, 1)
        if key_dim % 2:
            raise ValueError(f"[ProductKeyMemory] key_dim is {key_dim}, expected an even number")
        if k > n_keys**2:
            raise ValueError(
                f"[ProductKeyMemory] k is {k}, but {n_keys} keys have {n_keys**2} values"
            )
        options = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.n_keys, self.k, self.key_dim, self.value_dim = sizes.values()
        self.input_dropout = input_dropout
        self.query_dropout = query_dropout
        self.value_dropout = value_dropout
        self.sparse = sparse
        self.query = nn.Linear(dim, heads * key_dim, **options)
        self.norm = nn.BatchNorm1d(heads * key_dim, **options) if batch_norm else None
        self.subkeys = nn.Parameter(torch.empty(heads, 2, n_keys, key_dim // 2, **options))
        self.values = nn.Parameter(torch.empty(n_keys**2, self.value_dim, **options))
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform sub-keys of variance 1 / (3 half) and normal values of variance 1 / value_dim.

        The query's map and norm as their classes have it.
        """
        self.query.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        bound = (self.key_dim // 2) ** -0.5
        nn.init.uniform_(self.subkeys, -bound, bound)
        nn.init.normal_(self.values, std=self.value_dim**-0.5)

    def forward(self, x, return_indices=False):
        """(..., dim) -> (..., value_dim), or a `pentad.pq.ProductKeyResult` around it."""
        x = F.dropout(x, self.input_dropout, self.training)
        queries = self.query(x)
        if self.norm is not None:
            queries = self.norm(queries.reshape(-1, queries.shape[-1])).view(queries.shape)
        queries = F.dropout(queries, self.query_dropout, self.training)
        result = product_key_lookup(
            queries.unflatten(-1, (self.heads, self.key_dim)),
            self.subkeys,
            self.values,
            self.k,
            sparse_grad=self.sparse,
            return_indices=True,
        )
        result = result._replace(out=F.dropout(result.out, self.value_dropout, self.training))
        return result if return_indices else result.out

    def extra_repr(self):
        return (
            f"heads={self.heads}, n_keys={self.n_keys}, k={self.k}, key_dim={self.key_dim}, "
            f"value_dim={self.value_dim}, sparse={self.sparse}"
        )

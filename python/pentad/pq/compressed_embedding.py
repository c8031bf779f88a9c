# SPDX-License-Identifier: Apache-2.0
"""Embedding tables that take less memory: coded, hashed, factored or quantized rows."""

import math

import torch
from torch.nn.functional import embedding_bag

from pentad._checks import check_choice, check_count, check_counts, check_dtype
from pentad.pq.assign import assign
from pentad.pq.codes import hash_codes, pack_codes, quotient_remainder, unpack_codes
from pentad.pq.lookup import INTEGERS, lookup
from pentad.pq.quantize import COMBINE
from pentad.pq.train import train_codebooks

_OP = "CompressedEmbedding"
_FIT_STEPS = 30  # of conjugate gradients: the error then falls by less than 1 % in ten more


def _divided(dim, parts, name):
    if dim % parts:
        raise ValueError(f"[{_OP}] dim is {dim}, which {parts} {name} do not divide")
    return dim // parts


def _normal(shape, std, device, dtype):
    return torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * std)


class _Product(torch.nn.Module):
    """Row i is the concatenation, or the sum, of the codewords of its stored codes."""

    def __init__(
        self, rows, dim, device, dtype,
        num_codebooks=8, nbits=8, form="product", iterations=10, seed=0,
    ):  # fmt: skip
        super().__init__()
        M = self.num_codebooks = check_count(_OP, "num_codebooks", num_codebooks, 1)
        self.nbits = check_count(_OP, "nbits", nbits, 1)
        if nbits > 16:
            raise ValueError(f"[{_OP}] nbits is {nbits}, expected 1 to 16")
        check_choice(_OP, "form", form, ("product", "residual"))
        self.form, self.combine = form, COMBINE[form]
        self.iterations, self.seed = iterations, seed
        width = _divided(dim, M, "codebooks") if form == "product" else dim
        std = 1 if form == "product" else M**-0.5
        self.codebooks = _normal((M, 2**nbits, width), std, device, dtype)
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(2**nbits, (rows, M), generator=generator, dtype=torch.int32)
        self.register_buffer("codes", self._stored(codes).to(device))

    def _stored(self, codes):
        return codes.to(torch.uint8) if self.nbits == 8 else pack_codes(codes, self.nbits)

    def forward(self, ids):
        codes = self.codes.index_select(0, ids)
        if self.nbits != 8:
            codes = unpack_codes(codes, self.nbits, self.num_codebooks)
        return lookup(codes, self.codebooks, combine=self.combine)

    def fit(self, weight):
        options = {"form": self.form, "iterations": self.iterations, "seed": self.seed}
        trained = train_codebooks(weight, self.num_codebooks, self.nbits, **options)
        self.codebooks.copy_(trained.codebooks)
        self.codes.copy_(self._stored(assign(weight, self.codebooks, form=self.form)))


class _Linear(torch.nn.Module):
    """Rows that are linear in the parameters, whose `fit` is therefore least squares."""

    def fit(self, weight):
        """Conjugate gradients on ``|rows - weight|**2`` (CGLS), from zero."""
        dtype = next(self.parameters()).dtype
        self.to(weight.dtype)
        ids = torch.arange(len(weight), device=weight.device)
        tables = list(self.parameters())

        def forward(values):
            for table, value in zip(tables, values, strict=True):
                table.copy_(value)
            return self(ids)

        def adjoint(residual):
            with torch.enable_grad():
                return torch.autograd.grad(self(ids), tables, residual)

        def square(values):
            return sum(value.square().sum() for value in values)

        found = [torch.zeros_like(table) for table in tables]
        residual = weight
        slope = adjoint(residual)
        step, size = slope, square(slope)
        for _ in range(_FIT_STEPS):
            moved = forward(step)
            length = square([moved])
            if length == 0:
                break
            by = size / length
            found = [a + by * b for a, b in zip(found, step, strict=True)]
            residual = residual - by * moved
            slope = adjoint(residual)
            before, size = size, square(slope)
            step = [a + size / before * b for a, b in zip(slope, step, strict=True)]
        forward(found)
        self.to(dtype)


class _Hash(_Linear):
    """Row i is the sum, mean or concatenation of rows of one table, chosen by several hashes."""

    def __init__(
        self, rows, dim, device, dtype,
        num_hashes=4, table_size=None, combine="sum", seed=0,
    ):  # fmt: skip
        super().__init__()
        count = check_count(_OP, "num_hashes", num_hashes, 1)
        size = max(1, rows // 10) if table_size is None else table_size
        check_count(_OP, "table_size", size, 1)
        check_choice(_OP, "combine", combine, ("sum", "mean", "concat"))
        self.combine = combine
        self.seeds, self.sizes = tuple(range(seed, seed + count)), (size,) * count
        width = _divided(dim, count, "hashes") if combine == "concat" else dim
        std = {"sum": count**-0.5, "mean": count**0.5, "concat": 1}[combine]
        self.table = _normal((size, width), std, device, dtype)

    def forward(self, ids):
        codes = hash_codes(ids, self.seeds, self.sizes)
        table, each = self.table.unsqueeze(0), codes.reshape(-1, 1)
        if self.combine == "concat":
            return lookup(each, table).view(len(ids), len(self.seeds) * table.shape[-1])
        offsets = torch.arange(len(ids), device=ids.device) * len(self.seeds)
        return lookup(each, table, combine=self.combine, offsets=offsets)


class _QuotientRemainder(_Linear):
    """Row i combines one row of each table, chosen by the digits of i in mixed radix."""

    def __init__(self, rows, dim, device, dtype, sizes=None, combine="product"):
        super().__init__()
        if sizes is None:
            remainders = math.isqrt(max(rows - 1, 0)) + 1
            sizes = (remainders, -(-rows // remainders))
        sizes = self.sizes = tuple(check_counts(_OP, "sizes", sizes, 1))
        if math.prod(sizes) < rows:
            raise ValueError(
                f"[{_OP}] sizes {sizes} tell {math.prod(sizes)} rows apart, expected {rows}"
            )
        check_choice(_OP, "combine", combine, ("product", "sum", "mean", "concat"))
        self.combine = combine
        count = len(sizes)
        width = _divided(dim, count, "tables") if combine == "concat" else dim
        std = {"sum": count**-0.5, "mean": count**0.5}.get(combine, 1)
        self.tables = torch.nn.ParameterList(
            _normal((size, width), std, device, dtype) for size in sizes
        )

    def forward(self, ids):
        codes = quotient_remainder(ids, self.sizes)
        return lookup(codes, list(self.tables), combine=self.combine)

    def fit(self, weight):
        """Least squares; of a product one table after the other."""
        if self.combine != "product":
            return super().fit(weight)
        codes = quotient_remainder(torch.arange(len(weight), device=weight.device), self.sizes)
        codes = codes.long().unbind(-1)
        tables = [torch.ones_like(table, dtype=weight.dtype) for table in self.tables]
        for _ in range(_FIT_STEPS):
            for t, code in enumerate(codes):
                rest = torch.ones_like(weight)
                for other, table in enumerate(tables):
                    if other != t:
                        rest = rest * table[codes[other]]
                along = torch.zeros_like(tables[t]).index_add_(0, code, rest * weight)
                length = torch.zeros_like(tables[t]).index_add_(0, code, rest * rest)
                tables[t] = along / length.where(length > 0, 1)
        for table, value in zip(self.tables, tables, strict=True):
            table.copy_(value)


class _Integers(torch.nn.Module):
    """Row i is a scale times small integers: round(w / scale), scale = max |w| / (2^(b-1) - 1)."""

    def __init__(self, rows, dim, device, dtype, *, nbits, train_scales=False):
        super().__init__()
        self.dim, self.nbits = dim, nbits
        bytes_ = dim if nbits == 8 else -(-dim // 2)
        stored = torch.int8 if nbits == 8 else torch.uint8
        self.register_buffer("codes", torch.empty((rows, bytes_), dtype=stored, device=device))
        self.scales = torch.nn.Parameter(
            torch.empty(rows, device=device, dtype=dtype), requires_grad=bool(train_scales)
        )
        with torch.no_grad():
            self.fit(torch.randn(rows, dim, device=device))

    def forward(self, ids):
        codes = self.codes.index_select(0, ids)
        if self.nbits == 4:  # the low half first, each with 8 added
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : self.dim]
            codes = codes.to(torch.int8) - 8
        scales = self.scales.index_select(0, ids)
        return codes.to(scales.dtype) * scales.unsqueeze(-1)

    def fit(self, weight):
        most = 2 ** (self.nbits - 1) - 1
        self.scales.copy_(weight.abs().amax(-1) / most)
        scales = self.scales.to(weight.dtype).unsqueeze(-1)
        codes = (weight / scales.where(scales > 0, 1)).round().clamp(-most, most).to(torch.int8)
        if self.nbits == 4:
            codes = torch.nn.functional.pad(codes, (0, self.dim % 2)) + 8
            codes = codes.to(torch.uint8)
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        self.codes.copy_(codes)


_METHODS = ("product", "hash", "quotient_remainder", "int8", "int4")


def _rows(method, *shape, **options):
    if method in ("int8", "int4"):
        return _Integers(*shape, nbits=int(method[3:]), **options)
    made = {"product": _Product, "hash": _Hash, "quotient_remainder": _QuotientRemainder}
    return made[method](*shape, **options)


class CompressedEmbedding(torch.nn.Module):
    """An embedding table in a fraction of the memory: ids (...) -> vectors (..., dim).

    | method                 | row i                                     | what learns        |
    |------------------------|-------------------------------------------|--------------------|
    | `"product"`            | codewords of M stored codes, concatenated | codebooks          |
    | `"hash"`               | rows of one table at several hashes of i  | table              |
    | `"quotient_remainder"` | a row of each table, by the digits of i   | tables             |
    | `"int8"`, `"int4"`     | small integers times a scale per row      | nothing, or scales |

    The digits of i are i mod m, i div m mod m' and so on.

    A new module has rows of unit variance. `from_pretrained` fits it to a given weight: the
    codebooks by k-means, tables by least squares, integers by rounding to the nearest.

    Parameters
    ----------
    num_embeddings : int
    dim : int
    method : str
    device, dtype : optional
        Of what learns.
    num_codebooks, nbits, form, iterations, seed : optional
        Of "product": M codebooks (8) of ``2**nbits`` (8) codewords in form "product" or, with
        codewords of the full width that are added up, "residual"; k-means iterations (10). A new
        module draws its codes from the seed. Codes are packed to nbits.
    num_hashes, table_size, combine, seed : optional
        Of "hash": 4 rows of a table of ``num_embeddings // 10``, their "sum" (spaCy), "mean" or
        "concat" (unified embedding: dim / num_hashes columns). Any integer may be an id. The
        hashes are those of the seeds from `seed` on and no part of the state.
    sizes, combine : optional
        Of "quotient_remainder": the tables' rows, by default two near the square root, whose
        product tells all ids apart; "product", "sum", "mean" or "concat".
    train_scales : bool
        Of "int8" and "int4": whether the scales take gradients.

    References
    ----------
    Jaiswal et al. 2023, "Lightweight Adaptation of Neural Language Models via Subspace Embedding",
    arXiv 2308.08688 (product); Miranda et al. 2022, "Multi hash embeddings in spaCy", arXiv
    2212.09255, and Coleman et al. 2023, "Unified Embedding", arXiv 2305.12102 (hash); Shi et al.
    2020, "Compositional Embeddings Using Complementary Partitions", arXiv 1909.02107, section 4.1
    (quotient_remainder); Zhang et al. 2023, arXiv 2311.15578, compares them.

    Examples
    --------
    >>> import torch
    >>> table = pentad.nn.CompressedEmbedding(1000, 16, "quotient_remainder", combine="sum")
    >>> table(torch.tensor([[3, 999]])).shape, table.memory()
    (torch.Size([1, 2, 16]), 4096)
    >>> weight = torch.randn(1000, 16)
    >>> table = pentad.nn.CompressedEmbedding.from_pretrained(weight, "int8")
    >>> bool((table.dense() - weight).abs().max() < 0.02)
    True
    """

    def __init__(
        self, num_embeddings, dim, method="product", *, device=None, dtype=None, **options
    ):
        super().__init__()
        self.num_embeddings = check_count(_OP, "num_embeddings", num_embeddings, 1)
        self.dim = check_count(_OP, "dim", dim, 1)
        check_choice(_OP, "method", method, _METHODS)
        self.method = method
        self.rows = _rows(method, self.num_embeddings, self.dim, device, dtype, **options)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, weight, method="product", **options):
        """A module whose rows are near those of `weight` (num_embeddings, dim).

        Raises
        ------
        ValueError
            If `weight` is not two-dimensional, or for NaN or infinity in it.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"[{_OP}] weight is {weight.dtype} of shape {tuple(weight.shape)}, "
                "expected floats (num_embeddings, dim)"
            )
        if not weight.isfinite().all():
            raise ValueError(f"[{_OP}] weight contains NaN or infinity")
        weight = weight.detach()
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        module = cls(*weight.shape, method, **options)
        module.rows.fit(weight if weight.dtype == torch.float64 else weight.float())
        return module

    def forward(self, ids):
        """Ids (...) of any integer dtype, 0 to num_embeddings - 1 -> (..., dim).

        Raises
        ------
        TypeError
            For ids that are not integers.
        ValueError
            For ids out of range; not with method "hash", which takes any, nor in compiled code.
        """
        check_dtype(_OP, "ids", ids, INTEGERS)
        ids = ids.long()
        known = not (ids.is_meta or torch.compiler.is_compiling())
        if self.method != "hash" and ids.numel() and known:
            low, high = (t.item() for t in ids.aminmax())
            if not 0 <= low <= high < self.num_embeddings:
                raise ValueError(
                    f"[{_OP}] ids span {low} to {high}, expected 0 to {self.num_embeddings - 1}"
                )
        return self.rows(ids.reshape(-1)).view(*ids.shape, self.dim)

    def bag(self, ids, offsets, *, weights=None, mode="sum"):
        """Sums or means of rows: bag b is ``ids[offsets[b] : offsets[b + 1]]``.

        Parameters
        ----------
        ids : (n,) integers
        offsets : (bags,) int64
            Where each bag begins.
        weights : (n,) floats, optional
            Factors of the rows, with mode "sum".
        mode : "sum", "mean" or "max"

        Returns
        -------
        (bags, dim)
        """
        rows = self(ids)
        order = torch.arange(len(rows), device=rows.device)
        return embedding_bag(order, rows, offsets, mode=mode, per_sample_weights=weights)

    def dense(self):
        """All rows as a (num_embeddings, dim) weight, with their gradient."""
        return self(torch.arange(self.num_embeddings, device=next(self.parameters()).device))

    def memory(self):
        """Bytes of codes, tables and scales."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    def extra_repr(self):
        """The arguments, for repr."""
        return f"{self.num_embeddings}, {self.dim}, {self.method!r}"

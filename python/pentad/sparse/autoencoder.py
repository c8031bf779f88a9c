# SPDX-License-Identifier: Apache-2.0
"""The sparse autoencoder layer."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from pentad._checks import check_choice, check_count
from pentad.sparse import topk_autograd
from pentad.sparse._checks import check_number
from pentad.sparse.decode import decode_pairs, decode_rows, sparse_decode
from pentad.sparse.topk import SparseCodes

ACTIVATIONS = ("topk", "batch_topk", "relu")


class SparseAutoencoderLosses(NamedTuple):
    """Scalars; ``total`` is the sum of the others with their weights."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    auxiliary: torch.Tensor


class SparseAutoencoderOutput(NamedTuple):
    """What `SparseAutoencoder` returns: (..., dim), the codes of its rows, and the losses."""

    reconstruction: torch.Tensor
    codes: SparseCodes
    losses: SparseAutoencoderLosses


class SparseAutoencoder(nn.Module):
    """Vectors as sparse sums of learned directions.

    With b the bias, D the decoder's rows brought to length 1, E the encoder's weight and c its
    bias:

        pre = (x - b) @ E.T + c        z = activation(pre)        x' = z @ D + b

    - "topk": the k largest of each row, and of those what is above 0 (Gao et al. 2024, "Scaling and
      evaluating sparse autoencoders", arXiv 2406.04093, section 2.3);
    - "batch_topk": in training the ``k * n`` largest of the n rows together, so that rows may have
      more or fewer; in eval mode each number above `threshold`, the moving average of the smallest
      number that a training batch kept (Bussmann et al. 2024, "BatchTopK Sparse Autoencoders",
      arXiv 2412.06410);
    - "relu": all above 0, with the sum of z in the loss.

    The total loss is:

        mean((x - x')**2) + l1_weight * mean(z.sum(-1)) + aux_weight * mean((e - e')**2)

    where e is x - x', without gradient, and e' what the `aux_k` largest of the dead features make
    of it: those that no row of the last `dead_after` used (Gao et al., appendix A.2). It is 0 while
    no feature is dead, and in eval mode.

    Codes are rows that `pentad.sparse.score`, `SparseIndex.add` and `sparse_decode` take as they
    are, with gradients; none is below 0.

    Parameters
    ----------
    dim : int
        Width of the input.
    features : int
        Width of the codes.
    k : int, optional
        Entries of a row, for "topk" and "batch_topk".
    activation : "topk", "batch_topk" or "relu"
    tied : bool
        The encoder's weight is D; else it only starts as D.
    l1_weight : float, optional
        By default 0, and 1e-3 for "relu".
    aux_k : int, optional
        0: no auxiliary loss. By default half of `dim`, and 0 for "relu".
    aux_weight : float
    dead_after : int
        Training rows without use after which a feature is dead.
    threshold_decay : float
        Of the moving average, for "batch_topk".
    device, dtype : optional
        Of the parameters.

    Attributes
    ----------
    encoder : (features, dim) parameter, or None where tied
    encoder_bias : (features,) parameter
    decoder : (features, dim) parameter of any lengths
    bias : (dim,) parameter; the mean of the data is a good start
    idle : (features,) int64 buffer, training rows since each feature was used
    threshold : () buffer, below 0 before the first training batch

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.SparseAutoencoder(16, 64, k=4)
    >>> x = torch.randn(100, 16)
    >>> reconstruction, codes, losses = layer(x)
    >>> losses.total.backward()
    >>> reconstruction.shape, codes.values.shape, codes.columns
    (torch.Size([100, 16]), torch.Size([400]), 64)
    >>> index = pentad.sparse.SparseIndex(64)
    >>> ids = index.add(layer.eval().encode(x))
    """

    def __init__(
        self,
        dim,
        features,
        k=None,
        *,
        activation="topk",
        tied=False,
        l1_weight=None,
        aux_k=None,
        aux_weight=1 / 32,
        dead_after=10_000_000,
        threshold_decay=0.99,
        device=None,
        dtype=None,
    ):
        super().__init__()
        op = "SparseAutoencoder"
        check_choice(op, "activation", activation, ACTIVATIONS)
        self.dim = check_count(op, "dim", dim, 1)
        self.features = check_count(op, "features", features, 1)
        if (k is None) != (activation == "relu"):
            wanted = "none" if activation == "relu" else "a number"
            raise ValueError(f"[{op}] k is {k}, expected {wanted} for activation {activation!r}")
        self.k = None if k is None else check_count(op, "k", k, 1)
        if k is not None and self.k > self.features:
            raise ValueError(f"[{op}] k is {k}, expected at most {features}, the features")
        self.activation = activation
        self.tied = bool(tied)
        relu = activation == "relu"
        l1_weight = (1e-3 if relu else 0.0) if l1_weight is None else l1_weight
        self.l1_weight = check_number(op, "l1_weight", l1_weight)
        aux_k = (0 if relu else max(1, self.dim // 2)) if aux_k is None else aux_k
        self.aux_k = check_count(op, "aux_k", aux_k)
        self.aux_weight = check_number(op, "aux_weight", aux_weight)
        self.dead_after = check_count(op, "dead_after", dead_after, 1)
        self.threshold_decay = check_number(op, "threshold_decay", threshold_decay)
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"[{op}] threshold_decay is {threshold_decay}, expected 0 to below 1")
        options = {"device": device, "dtype": dtype}
        self.decoder = nn.Parameter(torch.empty(self.features, self.dim, **options))
        self.encoder = None if tied else nn.Parameter(torch.empty_like(self.decoder))
        self.encoder_bias = nn.Parameter(torch.empty(self.features, **options))
        self.bias = nn.Parameter(torch.empty(self.dim, **options))
        self.register_buffer("idle", torch.zeros(self.features, dtype=torch.int64, device=device))
        self.register_buffer("threshold", torch.tensor(-1.0, device=device))
        self.reset_parameters()

    def reset_parameters(self):
        """Random directions, the encoder equal to the decoder, biases and counts of 0."""
        with torch.no_grad():
            nn.init.normal_(self.decoder)
            self.decoder.copy_(self.dictionary)
            if self.encoder is not None:
                self.encoder.copy_(self.decoder)
        nn.init.zeros_(self.encoder_bias)
        nn.init.zeros_(self.bias)
        self.idle.zero_()
        self.threshold.fill_(-1.0)

    @property
    def dictionary(self):
        """(features, dim): the rows of `decoder`, each of length 1."""
        return F.normalize(self.decoder, dim=-1)

    def encode(self, x):
        """(..., dim) -> `SparseCodes` of as many rows, (n, features).

        With "topk" each row has k entries, zeros among them where fewer are above 0.
        """
        rows = self._rows(x)
        return self._codes(self._pre(rows, self.dictionary if self.tied else None))

    def decode(self, codes):
        """Codes (n, features), in any form that `sparse_decode` takes -> (n, dim)."""
        return sparse_decode(codes, self.dictionary, self.bias)

    def forward(self, x):
        """(..., dim) -> `SparseAutoencoderOutput`."""
        rows, dictionary = self._rows(x), self.dictionary
        pre = self._pre(rows, dictionary)
        codes = self._codes(pre)
        if self.activation == "topk":
            pair = (part.view(len(rows), self.k) for part in (codes.indices, codes.values))
            out = decode_pairs(*pair, dictionary, self.bias)
        elif self.activation == "batch_topk":
            out = decode_rows(*codes[:3], dictionary, self.bias)
        else:  # half of them are above 0 at first
            out = pre.relu().to(dictionary.dtype) @ dictionary + self.bias
        wide = _wide(rows)
        error = wide - _wide(out)
        auxiliary = error.new_zeros(())
        if self.training:
            self._count(codes, len(rows))
            if self.aux_k and self.aux_weight:
                auxiliary = self._auxiliary(pre, error.detach(), dictionary)
        reconstruction = _mean_square(error)
        sparsity = _wide(codes.values).sum() / max(1, len(rows))
        total = reconstruction + self.aux_weight * auxiliary
        if self.l1_weight:
            total = total + self.l1_weight * sparsity
        losses = SparseAutoencoderLosses(total, reconstruction, sparsity, auxiliary)
        return SparseAutoencoderOutput(out.view(x.shape), codes, losses)

    def extra_repr(self):
        return (
            f"dim={self.dim}, features={self.features}, k={self.k}, "
            f"activation={self.activation!r}, tied={self.tied}, aux_k={self.aux_k}"
        )

    # --- Parts ------------------------------------------------------------------------------------

    def _rows(self, x):
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"[SparseAutoencoder] x has shape {tuple(x.shape)}, expected (..., {self.dim})"
            )
        return x.reshape(math.prod(x.shape[:-1]), self.dim)

    def _pre(self, rows, dictionary):
        weight = dictionary if self.tied else self.encoder
        return F.linear(rows - self.bias, weight, self.encoder_bias)

    def _codes(self, pre):
        if self.activation == "topk":
            indices, values = topk_autograd.pairs(pre, self.k)
            return topk_autograd.of_pairs(indices, values.relu(), self.features)
        if self.activation == "batch_topk" and self.training:
            flat = pre.reshape(1, -1)
            place, values = topk_autograd.pairs(flat, min(self.k * len(pre), flat.shape[1]))
            place, values = place[0], values[0]
            some = values > 0
            place, values = place[some], values[some]
            row, column = place // self.features, place % self.features
        else:
            least = self.threshold.clamp_min(0) if self.activation == "batch_topk" else 0
            row, column = (pre.detach() > least).nonzero(as_tuple=True)
            values = pre[row, column]
        indptr = torch.searchsorted(row, torch.arange(len(pre) + 1, device=pre.device))
        return SparseCodes(indptr, column.int(), values, self.features)

    @torch.no_grad()
    def _count(self, codes, rows):
        """Which features were used, and the smallest number kept."""
        used = torch.zeros_like(self.idle).index_add(0, codes.indices, (codes.values > 0).long())
        self.idle.add_(rows).masked_fill_(used > 0, 0)
        if self.activation == "batch_topk" and len(codes.values):
            least = codes.values.min().to(self.threshold.dtype)
            mean = torch.lerp(least, self.threshold, self.threshold_decay)
            self.threshold.copy_(torch.where(self.threshold < 0, least, mean))

    def _auxiliary(self, pre, error, dictionary):
        dead = self.idle >= self.dead_after
        count = int(dead.sum())
        if not count:
            return error.new_zeros(())
        dead_pre = pre.masked_fill(~dead, -math.inf)
        indices, values = topk_autograd.pairs(dead_pre, min(self.aux_k, count))
        made = decode_pairs(indices, values.relu(), dictionary)
        return _mean_square(error - _wide(made))


def _mean_square(error):
    """0 of no rows."""
    return error.square().mean() if error.numel() else error.sum()


def _wide(x):
    """Losses of narrow numbers are summed in float32."""
    return x if x.dtype == torch.float64 else x.float()

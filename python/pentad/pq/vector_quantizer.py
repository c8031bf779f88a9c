# SPDX-License-Identifier: Apache-2.0
"""Vector quantization as a layer, with codebooks that learn."""

from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from pentad._checks import check_choice, check_count
from pentad._ops import autocast_device
from pentad.pq import quantize_autograd as autograd
from pentad.pq.assign import METRICS, assign, soft_assign
from pentad.pq.kmeans import kmeans
from pentad.pq.lookup import lookup
from pentad.pq.quantize import COMBINE, ESTIMATORS, usage
from pentad.pq.quantize_autograd import mean_square, scatter

_START_ROWS = 256  # vectors for each code, of which the first batch gives k-means at most


class VectorQuantizerOutput(NamedTuple):
    """What `VectorQuantizer` returns: (..., dim), (..., num_codebooks) and a scalar."""

    quantized: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor


class VectorQuantizer(torch.nn.Module):
    """Replace vectors by their nearest codewords, and learn the codewords.

    With t_m the part of x that codebook m quantizes (its columns in product form, what the
    codebooks before it left in residual form, all of x in grouped form), c_m its codeword and sg[]
    the stop of the gradient, the loss is the mean over vectors, codebooks and columns of:

        commitment_weight * (t_m - sg[c_m])**2 + codebook_weight * (sg[t_m] - c_m)**2

    How the codewords learn:

    - by default `codebooks` is a parameter, which the second term trains;
    - with `decay` it is a buffer of moving averages, and there is no second term. In each training
      batch, with n the number of the t_m that have a code and s their sum,
      ``N = decay * N + (1 - decay) * n``, ``S = decay * S + (1 - decay) * s`` and the codeword
      becomes S over N, where N is smoothed to ``(N + eps) / (sum(N) + K eps) * sum(N)``;
    - with `sim_vq` the codebook is ``basis @ transform``: the basis stays as it started and the
      second term trains the square matrix, so that every codeword moves with each used one.

    In training mode the first batch sets the codewords by k-means (`kmeans_init`), and codes that
    the last `revive_after` batches did not use become vectors of the next one before it is
    quantized. In eval mode nothing changes. With the same seed and batches everything repeats, on
    any number of threads, also after a `state_dict` has been saved and loaded.

    Metric "cosine" works on the unit sphere: the t_m and the codewords are brought to length 1 and
    `quantized` has codewords of length 1. It has no residual form.

    Averages, counts and distances are in float32 at least, also under autocast and in a module
    that was converted to bfloat16. Processes are not synchronised: with data in parallel, averages
    and revived codes differ between them unless the caller exchanges them.

    Parameters
    ----------
    dim : int
        Columns of the input: its last dimension. Channels first must be moved last.
    codebook_size : int
        Codewords in each codebook, K.
    num_codebooks : int
        M; in product form a divisor of `dim`.
    form : "product", "residual" or "grouped"
    metric : "l2", "ip" or "cosine"
    estimator : "ste", "rotation" or "none"
        See `pentad.pq.quantize`.
    decay : float, optional
        Of the moving averages, from 0 to below 1; None: codebooks learn by gradients.
    eps : float
        Smoothing of the averages' counts.
    commitment_weight, codebook_weight : float
    output_gradient : bool
        Whether the gradient of `quantized` reaches the codebooks too (the codebook features of
        Tamkin et al.); with estimator "ste" or "none".
    entropy_weight : float
        Adds ``entropy_weight * (mean entropy of p - entropy of mean p)`` with p the `soft_assign`
        of each t_m, averaged over the codebooks: codes become certain, and all of them used. It
        takes an (n, M, K) array, which nothing else does.
    entropy_temperature : float
    kmeans_init : bool, optional
        By default True, and False with `sim_vq`, whose basis is then random and `transform` starts
        at random too; with True they are the centroids and the identity.
    kmeans_iterations : int
    revive_after : int, optional
        Training batches without use after which a code is dead; None: never. Not with `sim_vq`.
    sim_vq : bool
    seed : int, optional
        Of the start and the revived codes; by default drawn from torch's generator.
    device, dtype : optional
        Of the codebooks; averages are always float32 or wider.

    References
    ----------
    van den Oord et al. 2017, arXiv 1711.00937, equation 3 and appendix A.1; Lee et al. 2022,
    "Autoregressive Image Generation using Residual Quantization", arXiv 2203.01941, equation 8;
    Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear
    Layer", arXiv 2411.02038; Tamkin et al. 2023, arXiv 2310.17230; Yu et al. 2023, arXiv
    2310.05737, equation 6 (the entropy).

    Examples
    --------
    >>> import torch
    >>> layer = pentad.nn.VectorQuantizer(8, 16, num_codebooks=2, decay=0.9, seed=0)
    >>> x = torch.randn(100, 8, requires_grad=True)
    >>> quantized, codes, loss = layer(x)
    >>> quantized.shape, codes.shape
    (torch.Size([100, 8]), torch.Size([100, 2]))
    >>> (quantized.square().mean() + loss).backward()
    >>> torch.equal(layer.eval().decode(layer.encode(x)), layer(x).quantized)
    True
    """

    def __init__(
        self,
        dim,
        codebook_size,
        num_codebooks=1,
        *,
        form="product",
        metric="l2",
        estimator="ste",
        decay=None,
        eps=1e-5,
        commitment_weight=0.25,
        codebook_weight=1.0,
        output_gradient=False,
        entropy_weight=0.0,
        entropy_temperature=1.0,
        kmeans_init=None,
        kmeans_iterations=10,
        revive_after=None,
        sim_vq=False,
        seed=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        op = "VectorQuantizer"
        self.dim = check_count(op, "dim", dim, 1)
        K = self.codebook_size = check_count(op, "codebook_size", codebook_size, 1)
        M = self.num_codebooks = check_count(op, "num_codebooks", num_codebooks, 1)
        check_choice(op, "form", form, COMBINE)
        check_choice(op, "metric", metric, METRICS)
        check_choice(op, "estimator", estimator, ESTIMATORS)
        self._check_together(form, metric, estimator, decay, revive_after, sim_vq, output_gradient)
        self.form, self.metric, self.estimator = form, metric, estimator
        self.decay, self.eps = decay, eps
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.output_gradient = output_gradient
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.kmeans_init = not sim_vq if kmeans_init is None else bool(kmeans_init)
        self.kmeans_iterations = check_count(op, "kmeans_iterations", kmeans_iterations, 1)
        self.revive_after = revive_after
        self.sim_vq = sim_vq

        width = self.width = dim // M if form == "product" else dim
        if seed is None:
            seed = torch.randint(2**62, ()).item()
        plain = {"dtype": torch.int64, "device": device}
        self.register_buffer("seed", torch.tensor(check_count(op, "seed", seed), **plain))
        self.register_buffer("batches", torch.tensor(0, **plain))  # in training mode
        self.register_buffer("idle", torch.zeros((M, K), **plain))  # batches since the last use

        made = {"dtype": dtype, "device": device}
        words = torch.empty((M, K, width), **made)
        if sim_vq:
            self.register_buffer("basis", words)
            self.transform = torch.nn.Parameter(torch.empty((M, width, width), **made))
        elif decay is None:
            self.words = torch.nn.Parameter(words)
        else:
            made = {"dtype": self._wide(words.dtype), "device": device}
            self.register_buffer("words", words.to(made["dtype"]))
            self.register_buffer("counts", torch.empty((M, K), **made))
            self.register_buffer("sums", torch.empty((M, K, width), **made))
        self.reset_parameters()

    def _check_together(self, form, metric, estimator, decay, revive, sim_vq, output_gradient):
        if form == "product" and self.dim % self.num_codebooks:
            raise ValueError(
                f"[VectorQuantizer] dim is {self.dim}, "
                f"which {self.num_codebooks} codebooks do not divide"
            )
        if form == "residual" and metric == "cosine":
            raise ValueError("[VectorQuantizer] metric 'cosine' has no residual form")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"[VectorQuantizer] decay is {decay}, expected 0 to below 1")
        if revive is not None:
            check_count("VectorQuantizer", "revive_after", revive, 1)
        if sim_vq and (decay is not None or revive is not None):
            raise ValueError(
                "[VectorQuantizer] sim_vq keeps its basis, expected decay and revive_after None"
            )
        if output_gradient and (decay is not None or estimator == "rotation"):
            raise ValueError(
                "[VectorQuantizer] output_gradient needs codebooks that learn by gradients "
                "and estimator 'ste' or 'none'"
            )

    @staticmethod
    def _wide(dtype):
        return torch.float64 if dtype == torch.float64 else torch.float32

    @torch.no_grad()
    def reset_parameters(self):
        """Codewords anew from the seed: normal, of expected length 1; no batch counts as seen."""
        words = self.basis if self.sim_vq else self.words
        self.batches.zero_()
        self.idle.zero_()
        if words.is_meta:
            return
        generator = self._generator(0)
        words.copy_(self._normal(words.shape, generator))
        if self.sim_vq:
            self.transform.copy_(self._normal(self.transform.shape, generator))
        elif self.decay is not None:
            if self.metric == "cosine":
                words.copy_(normalize(words, dim=-1))
            self.counts.fill_(1)
            self.sums.copy_(words)

    def _normal(self, shape, generator):
        return torch.randn(shape, generator=generator) * self.width**-0.5

    def _generator(self, batch):
        seed = (self.seed.item() + 0x9E3779B97F4A7C15 * batch) % 2**63
        return torch.Generator().manual_seed(seed)

    def _apply(self, fn, recurse=True):
        before = {} if self.decay is None else dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():  # averages lose their small steps in fewer bits
            new = self._buffers[name]
            if new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device)
        return self

    def _stored(self):
        """What the start and revived codes write to, also between a forward and its backward."""
        return (self.basis if self.sim_vq else self.words).data

    @property
    def codebooks(self):
        """(M, K, width): the codewords that vectors are compared with and replaced by."""
        words = self.basis @ self.transform if self.sim_vq else self.words
        return normalize(words, dim=-1) if self.metric == "cosine" else words

    # --- Use --------------------------------------------------------------------------------------

    def forward(self, x):
        """Quantize x; in training mode, update what learns without gradients.

        Parameters
        ----------
        x : (..., dim) float32, float16, bfloat16 or float64

        Returns
        -------
        VectorQuantizerOutput
            `quantized` (..., dim) in x's dtype, `codes` (..., M) uint8 where K <= 256, else int32,
            and `loss`, a scalar in float32 (float64 beside float64), also in eval mode.

        Raises
        ------
        ValueError
            If the last dimension is not `dim`, or x contains NaN or infinity; nothing is changed.
        """
        self._check(x)
        with torch.autocast(autocast_device(x), enabled=False):
            flat = self._on_sphere(x.reshape(-1, self.dim))
            if self.training and len(flat):
                self._prepare(flat.detach())
            codebooks = self.codebooks
            given = codebooks if self.output_gradient else codebooks.detach()
            codes = assign(flat.detach(), codebooks.detach(), metric=self.metric, form=self.form)
            quantized = autograd.quantize(flat, given, codes, COMBINE[self.form], self.estimator)
            words = self._words(codes, codebooks)
            targets = self._targets(flat, words.detach())
            loss = self.commitment_weight * mean_square(targets, words.detach())
            if self.decay is None:
                loss = loss + self.codebook_weight * mean_square(words, targets.detach())
            if self.entropy_weight:
                loss = loss + self.entropy_weight * self._entropy(targets, codebooks)
            if self.training and len(flat):
                self._update(targets.detach(), codes)
        codes = codes.reshape(*x.shape[:-1], self.num_codebooks)
        return VectorQuantizerOutput(quantized.to(x.dtype).view(x.shape), codes, loss)

    def encode(self, x):
        """(..., dim) -> codes (..., M), as `forward` in eval mode gives them."""
        self._check(x)
        with torch.no_grad(), torch.autocast(autocast_device(x), enabled=False):
            x = self._on_sphere(x.detach())
            return assign(x, self.codebooks.detach(), metric=self.metric, form=self.form)

    def decode(self, codes):
        """Codes (..., M) -> (..., dim) in the codebooks' dtype, with their gradient."""
        with torch.autocast(autocast_device(codes), enabled=False):
            return lookup(codes, self.codebooks, combine=COMBINE[self.form])

    def _check(self, x):
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"[VectorQuantizer] x has shape {tuple(x.shape)}, expected (..., {self.dim})"
            )

    def _on_sphere(self, x):
        if self.metric != "cosine":
            return x
        parts = x.to(self._wide(x.dtype)).unflatten(-1, (-1, self.width))
        return normalize(parts, dim=-1).flatten(-2)

    def _words(self, codes, codebooks):
        """(n, M, width): the codeword of every codebook."""
        return lookup(codes, codebooks).unflatten(-1, (self.num_codebooks, self.width))

    def _targets(self, x, words):
        """(n, M, width): what each codebook quantizes."""
        if self.form == "product":
            return x.unflatten(-1, (self.num_codebooks, self.width))
        x = x.unsqueeze(-2)
        if self.form == "grouped":
            return x.expand(-1, self.num_codebooks, -1)
        wide = words.to(self._wide(words.dtype))
        return x - (wide.cumsum(-2) - wide)

    def _entropy(self, targets, codebooks):
        wide = self._wide(targets.dtype)
        p = soft_assign(
            targets.to(wide).flatten(-2),
            codebooks.to(wide),
            metric=self.metric,
            temperature=self.entropy_temperature,
        )
        of_each = torch.special.entr(p).sum(-1).mean()
        return of_each - torch.special.entr(p.mean(0)).sum(-1).mean()

    # --- Learning without gradients ---------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, x):
        """Before a training batch x (n, dim) is quantized: the start, and dead codes."""
        start = self.kmeans_init and self.batches == 0
        dead = None if self.revive_after is None else self.idle >= self.revive_after
        if not start and (dead is None or not dead.any()):
            return
        if not x.isfinite().all():
            raise ValueError("[VectorQuantizer] x contains NaN or infinity")
        if start:
            self._start(x)
        else:
            self._revive(x, dead)

    def _start(self, x):
        """Codewords by k-means, one codebook after the other."""
        rows = x.to(self._wide(x.dtype))
        rows = rows[:: max(1, len(rows) // (_START_ROWS * self.codebook_size))]
        metric = "cosine" if self.metric == "cosine" else "l2"
        words = self._stored()
        found, sizes = words.clone(), torch.ones_like(words[..., 0])
        for m in range(self.num_codebooks):
            if self.form == "product":
                part = rows[:, m * self.width : (m + 1) * self.width].contiguous()
            else:
                part = rows
            count = min(self.codebook_size, len(part))  # the rest stay at their random start
            centroids, assignment, *_ = kmeans(
                part,
                count,
                metric=metric,
                iterations=self.kmeans_iterations,
                seed=self.seed.item() + m,
            )
            found[m, :count] = centroids.to(found.dtype)
            of_each = usage(assignment[:, None], count)[0]
            sizes[m, :count] = of_each.clamp(min=1).to(sizes.dtype)
            if self.form == "residual":
                codes = assign(rows, found[m : m + 1], metric=self.metric, form="residual")
                rows = rows - lookup(codes, found[m : m + 1])
        if metric == "cosine":
            found = normalize(found, dim=-1)
        words.copy_(found)
        if self.sim_vq:
            self.transform.copy_(torch.eye(self.width).expand_as(self.transform))
        elif self.decay is not None:
            self.counts.copy_(sizes)
            self.sums.copy_(found * sizes[..., None])

    def _revive(self, x, dead):
        """Make vectors of the batch of the dead codes, different ones as long as there are any."""
        codebooks = self.codebooks
        codes = assign(x, codebooks, metric=self.metric, form=self.form)
        targets = self._targets(x, self._words(codes, codebooks))
        order = torch.randperm(len(x), generator=self._generator(1 + self.batches.item()))
        rank = dead.long().cumsum(-1) - 1
        m, code = dead.nonzero(as_tuple=True)
        fresh = targets[order.to(x.device)[rank[m, code] % len(x)], m]
        words = self._stored()
        words[m, code] = fresh.to(words.dtype)
        self.idle[m, code] = 0
        if self.decay is not None:
            self.counts[m, code] = 1
            self.sums[m, code] = fresh.to(self.sums.dtype)

    @torch.no_grad()
    def _update(self, targets, codes):
        """After a training batch: counts, and the averages."""
        used = usage(codes, self.codebook_size)
        self.batches += 1
        self.idle += 1
        self.idle.masked_fill_(used > 0, 0)
        if self.decay is None:
            return
        wide = targets.to(self.sums.dtype).flatten(-2)
        sums = scatter(wide, codes, self.words.shape, "concat")
        self.counts.lerp_(used.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum(-1, keepdim=True)
        smooth = (self.counts + self.eps) / (total + self.codebook_size * self.eps) * total
        words = self.sums / smooth[..., None]
        self.words.copy_(normalize(words, dim=-1) if self.metric == "cosine" else words)

    def extra_repr(self):
        """The arguments, for repr."""
        parts = [f"{self.dim}, {self.codebook_size}, {self.num_codebooks}, form={self.form!r}"]
        parts.append(f"metric={self.metric!r}, estimator={self.estimator!r}")
        if self.decay is not None:
            parts.append(f"decay={self.decay}")
        if self.sim_vq:
            parts.append("sim_vq=True")
        return ", ".join(parts)

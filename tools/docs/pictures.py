# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of the guides from computations with the package: docs/images/<family>.svg.

The same bytes every time: random numbers have seeds, the SVG neither a date nor random names.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch

from pentad import hamming, pq, scan, sparse
from pentad.attention import BlockMask, attention

matplotlib.use("svg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[2] / "docs" / "images"
STYLE = {
    "svg.hashsalt": "pentad",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "image.cmap": "Blues",
}


def draw_attention():
    """The weights of one head under four masks, read off by identity values."""
    length = 48
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, length, 16).unbind()
    v = torch.eye(length)[None, None]
    blocks = {"q_block": 4, "k_block": 4}
    masks = {
        "causal": {"causal": True},
        "window=(8, 0)": {"window": (8, 0)},
        "BlockMask.fixed(stride=8)": {"block_mask": BlockMask.fixed(length, stride=8, **blocks)},
        "BlockMask.prefix_lm(prefix=16)": {
            "block_mask": BlockMask.prefix_lm(length, prefix=torch.tensor([16]), **blocks)
        },
    }
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True)
    for axis, (name, options) in zip(axes, masks.items(), strict=True):
        weights = attention(q, k, v, **options)[0, 0]
        axis.imshow(weights.sqrt(), interpolation="nearest")
        axis.set(title=name, xlabel="key", xticks=[0, length - 1], yticks=[0, length - 1])
    axes[0].set_ylabel("query")
    return figure


def draw_scan():
    """Answers to an impulse, and the matrix of a selective scan whose steps depend on the input."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), width_ratios=[1.4, 1])
    impulse = torch.zeros(1, 80)
    impulse[:, 4] = 1
    for decay in (0.5, 0.8, 0.95, -0.9):
        h = scan.linear_recurrence(torch.full((1, 80), decay), impulse)
        left.plot(h[0], label=f"decay {decay}")
    turning = 0.96 * torch.exp(0.4j * torch.ones(1, 80))
    h = scan.linear_recurrence(turning, impulse.to(torch.complex64))
    left.plot(h[0].real, label="complex decay, real part", color="black", linewidth=1)
    left.set(title="linear_recurrence of an impulse at step 4", xlabel="step")
    left.legend()

    torch.manual_seed(1)
    length = 64
    delta = torch.full((1, 1, length), -1.0)
    delta[..., ::16] = 3.0  # four steps that the scan takes in, and forgets what was before
    A, B, C = -torch.linspace(0.05, 0.5, 8)[None], torch.ones(1, 8), torch.ones(1, 8)
    matrix = scan.attention_matrix(delta, A, B, C, delta_softplus=True, reduce="mean")
    right.imshow(matrix.squeeze().sqrt(), interpolation="nearest")
    right.set(
        title="attention_matrix: delta is large at every 16th step", xlabel="from step", ylabel="to"
    )
    return figure


def draw_pq():
    """Codewords of points in the plane; recall against the bytes of a code."""
    rng = np.random.default_rng(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1, 1.3])
    points = rng.standard_normal((3000, 2)) @ np.array([[1.0, 0.6], [0.0, 0.6]])
    points = points.astype(np.float32)
    centroids = pq.kmeans(points, 16).centroids
    nearest = pq.assign(points, centroids[None])[:, 0]
    left.scatter(*points.T, c=nearest % 10, s=2, cmap="tab10", rasterized=True)
    left.scatter(*centroids.T, c="black", s=25, marker="x")
    left.set(title="kmeans, 16 codewords; assign", xticks=[], yticks=[])

    vectors, queries = _vectors(rng, 10_000, 64), _vectors(rng, 100, 64)
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    for nbits, rescore, line in ((8, None, "C0-o"), (4, None, "C1-o"), (8, "store", "C0--o")):
        sizes, recalls = [], []
        for M in (4, 8, 16, 32):
            index = pq.PQIndex(
                64, M, nbits=nbits, metric="ip", store="float16" if rescore else None
            )
            index.train(vectors)
            index.add(vectors)
            options = {"rescore": rescore, "oversample": 10} if rescore else {}
            sizes.append(M * nbits / 8)
            recalls.append(_recall(index.search(queries, 10, **options).ids, truth))
        label = f"{nbits} bits" + (", rescored with float16 vectors" if rescore else "")
        right.semilogx(sizes, recalls, line, base=2, label=label, markersize=4)
    right.set(
        title="PQIndex, 10,000 vectors of 64 dimensions (256 bytes)",
        xlabel="bytes of a code",
        ylabel="recall@10",
        ylim=(0, 1.02),
        xticks=[2, 4, 8, 16, 32],
    )
    right.xaxis.set_major_formatter("{x:g}")
    right.legend()
    return figure


def draw_hamming():
    """What a distance says about an angle; recall against the bits and the candidates."""
    rng = np.random.default_rng(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    x = rng.standard_normal((1500, 256)).astype(np.float32)
    mix = rng.uniform(-1, 1, (1500, 1)).astype(np.float32)
    y = mix * x + np.sqrt(1 - mix**2) * rng.standard_normal(x.shape, np.float32)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    codes = hamming.pack(x), hamming.pack(y)
    distances = [
        hamming.distance(codes[0][i : i + 1], codes[1][i : i + 1]).item() for i in range(1500)
    ]
    left.scatter(np.degrees(np.arccos(cosine)), distances, s=3, alpha=0.5, rasterized=True)
    left.plot([0, 180], [0, 256], "black", linewidth=1, label="dim * angle / 180")
    left.set(title="256 bits of random directions", xlabel="angle, degrees", ylabel="distance")
    left.legend()

    vectors, queries = _vectors(rng, 10_000, 256), _vectors(rng, 100, 256)
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :10]
    index = hamming.BinaryIndex(256, store="int8")
    index.add(vectors)
    steps = [1, 2, 4, 8, 16]
    for by, label in (("bits", "rescored by the codes"), ("store", "rescored by int8 vectors")):
        found = [index.search(queries, 10, rescore=by, oversample=n).ids for n in steps]
        right.semilogx(
            steps, [_recall(ids, truth) for ids in found], "-o", base=2, label=label, ms=4
        )
    plain = _recall(index.search(queries, 10).ids, truth)
    right.axhline(plain, color="black", linewidth=1, label="distances alone")
    right.set(
        title="BinaryIndex, 10,000 vectors of 256 dimensions",
        xlabel="oversample",
        ylabel="recall@10",
        ylim=(0, 1.02),
        xticks=steps,
    )
    right.xaxis.set_major_formatter("{x:g}")
    right.legend()
    return figure


def draw_sparse():
    """How BM25 variants weigh repetition; what the k largest entries of vectors keep."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    counts = range(1, 16)
    corpus = [["word"] * n + ["other"] * (20 - n) for n in counts]
    corpus += [["other"] * 20] * 200
    for variant in ("lucene", "robertson", "atire", "bm25l", "bm25+"):
        _, terms, impacts, _ = (weights := sparse.bm25(corpus, variant=variant)).docs
        column = weights.vocabulary.index("word")
        left.plot(counts, impacts[terms == column], label=variant)
    left.set(title="bm25: the weight of a repeated word", xlabel="times in a document")
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    rng = np.random.default_rng(0)
    # Activations as of a sparse autoencoder: few large, many small.
    docs = (rng.pareto(1.5, (5000, 1000)) * (rng.random((5000, 1000)) < 0.1)).astype(np.float32)
    queries = (rng.pareto(1.5, (100, 1000)) * (rng.random((100, 1000)) < 0.1)).astype(np.float32)
    truth = np.argsort(-(queries @ docs.T), axis=1, kind="stable")[:, :10]
    kept = [4, 8, 16, 32, 64, 128]
    recalls = []
    for k in kept:
        index = sparse.SparseIndex(1000)
        index.add(sparse.topk_codes(docs, k))
        recalls.append(_recall(index.search(sparse.topk_codes(queries, k), 10).ids, truth))
    right.semilogx(kept, recalls, "-o", base=2, ms=4)
    right.set(
        title="topk_codes of 100 non-zeros, SparseIndex",
        xlabel="k",
        ylabel="recall@10 of the whole vectors",
        ylim=(0, 1.02),
        xticks=kept,
    )
    right.xaxis.set_major_formatter("{x:g}")
    return figure


def _vectors(rng, count, dim):
    """Rows with a spectrum like that of embeddings, of length 1."""
    x = rng.standard_normal((count, dim)) * np.arange(1, dim + 1) ** -0.5
    mixing = np.linalg.qr(np.random.default_rng(7).standard_normal((dim, dim)))[0]
    x = x @ mixing
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def _recall(ids, truth):
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(ids, truth, strict=True)]) / 10


def main():
    IMAGES.mkdir(exist_ok=True)
    for draw in (draw_attention, draw_scan, draw_pq, draw_hamming, draw_sparse):
        with plt.rc_context(STYLE):
            figure = draw()
            figure.tight_layout()
            path = IMAGES / f"{draw.__name__.removeprefix('draw_')}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()

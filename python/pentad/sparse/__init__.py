# SPDX-License-Identifier: Apache-2.0
"""Sparse vectors: scores with gradients, the SPLADE head, sparse codes, and an inverted index."""

__all__: list[str] = []

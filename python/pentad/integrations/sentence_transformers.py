# SPDX-License-Identifier: Apache-2.0
"""Search of `sentence_transformers.SparseEncoder` embeddings, called as its other engines are.

Only torch is needed, and no server: the engine is a `pentad.sparse.SparseIndex`.
"""

import time

import torch

from pentad.sparse.index import SparseIndex


def semantic_search_pentad(
    query_embeddings,
    corpus_embeddings=None,
    corpus_index=None,
    top_k=10,
    output_index=False,
    index_kwargs=None,
    search_kwargs=None,
):
    """The documents whose sparse embeddings are most similar to each query's, by inner product.

    As the functions of ``sentence_transformers.sparse_encoder.search_engines``, but exact unless
    told otherwise.

    Parameters
    ----------
    query_embeddings : (nq, V) or (V,) sparse tensor
        COO or CSR of any floating dtype and device, as ``SparseEncoder.encode`` returns them.
    corpus_embeddings : (n, V) sparse tensor, optional
        Not negative. Not used where there is a `corpus_index`.
    corpus_index : SparseIndex, optional
        What an earlier call with ``output_index=True`` returned, or any other.
    top_k : int
    output_index : bool
        Whether to return the index too.
    index_kwargs : dict, optional
        For `SparseIndex`, such as ``{"values": "uint8"}``.
    search_kwargs : dict, optional
        For `SparseIndex.search`, such as ``{"filter": mask}`` or ``{"exact": False}``.

    Returns
    -------
    results : list of list of {"corpus_id": int, "score": float}
        For each query, best first, ties by smaller id. Documents whose score is 0, as of those
        without a common term, are left out, so that there may be fewer than `top_k`.
    search_time : float
        Seconds, without building the index.
    index : SparseIndex
        Only with `output_index`.

    Raises
    ------
    TypeError
        Embeddings that are not sparse tensors, an index of another kind.
    ValueError
        Neither a corpus nor an index, shapes that do not fit, values that are negative or not
        finite, `index_kwargs` beside a `corpus_index`.

    Examples
    --------
    >>> import torch
    >>> from pentad.integrations.sentence_transformers import semantic_search_pentad
    >>> corpus = torch.tensor([[1.0, 0, 2], [0, 3, 0], [0, 0, 4]]).to_sparse()
    >>> query = torch.tensor([[0.5, 0, 1]]).to_sparse()
    >>> results, seconds, index = semantic_search_pentad(query, corpus, output_index=True)
    >>> results
    [[{'corpus_id': 2, 'score': 4.0}, {'corpus_id': 0, 'score': 2.5}]]
    >>> semantic_search_pentad(query, corpus_index=index, top_k=1)[0]
    [[{'corpus_id': 2, 'score': 4.0}]]
    """
    queries = _rows("query_embeddings", query_embeddings)
    if corpus_index is None:
        if corpus_embeddings is None:
            raise ValueError(
                "[semantic_search_pentad] neither corpus_embeddings nor corpus_index is given"
            )
        corpus = _rows("corpus_embeddings", corpus_embeddings)
        corpus_index = SparseIndex(corpus.shape[1], **(index_kwargs or {}))
        corpus_index.add(corpus)
    elif not isinstance(corpus_index, SparseIndex):
        raise TypeError(
            f"[semantic_search_pentad] corpus_index is {type(corpus_index).__name__}, expected "
            "SparseIndex"
        )
    elif index_kwargs:
        raise ValueError("[semantic_search_pentad] index_kwargs are given beside a corpus_index")
    start = time.perf_counter()
    found = corpus_index.search(queries, top_k, **(search_kwargs or {}))
    results = [
        [
            {"corpus_id": row, "score": score}
            for score, row in zip(scores, rows, strict=True)
            if row >= 0 and score != 0
        ]
        for scores, rows in zip(found.scores.tolist(), found.ids.tolist(), strict=True)
    ]
    seconds = time.perf_counter() - start
    return (results, seconds, corpus_index) if output_index else (results, seconds)


def _rows(name, embeddings):
    """Sparse embeddings on the CPU, two axes; one embedding alone is one row."""
    if not isinstance(embeddings, torch.Tensor) or embeddings.layout == torch.strided:
        kind = (
            "a dense tensor" if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        )
        raise TypeError(
            f"[semantic_search_pentad] {name} is {kind}, expected a sparse COO or CSR tensor"
        )
    embeddings = embeddings.detach().cpu()
    return embeddings.unsqueeze(0) if embeddings.ndim == 1 else embeddings

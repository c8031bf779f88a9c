# SPDX-License-Identifier: Apache-2.0
"""`semantic_search_pentad`: its results, its signature, and embeddings of a real SparseEncoder."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pentad.integrations.sentence_transformers import semantic_search_pentad  # noqa: E402
from pentad.sparse.index import SparseIndex  # noqa: E402


def embeddings(n, columns=50, density=0.2, seed=0):
    """Dense (n, columns) with zeros: eighths, whose sums of products are exact in float32."""
    random = np.random.default_rng(seed)
    kept = random.random((n, columns)) < density
    return torch.from_numpy((kept * random.integers(1, 9, (n, columns)) / 8).astype(np.float32))


def expected(queries, corpus, k):
    """Of dense embeddings."""
    results = []
    for scores in (queries.double() @ corpus.double().T).tolist():
        order = sorted((-score, row) for row, score in enumerate(scores) if score)[:k]
        results.append([{"corpus_id": row, "score": -score} for score, row in order])
    return results


@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_results_are_those_of_the_matrix_product(form, dtype):
    queries, corpus = embeddings(7, seed=1).to(dtype), embeddings(90, seed=2).to(dtype)
    results, seconds = semantic_search_pentad(getattr(queries, form)(), getattr(corpus, form)())
    assert results == expected(queries, corpus, 10)
    assert [len(hits) for hits in results] == [10] * 7
    assert {type(x) for hits in results for hit in hits for x in hit.values()} == {int, float}
    assert isinstance(seconds, float)
    assert seconds > 0


def test_an_index_is_used_again():
    queries, corpus = embeddings(5, seed=3), embeddings(40, seed=4)
    sparse = queries.to_sparse()
    results, _, index = semantic_search_pentad(sparse, corpus.to_sparse(), None, 3, True)
    assert isinstance(index, SparseIndex)
    assert len(index) == 40
    assert results == expected(queries, corpus, 3)
    again, _, same = semantic_search_pentad(
        sparse, embeddings(9).to_sparse(), index, top_k=40, output_index=True
    )
    assert same is index, "and the other corpus is not looked at"
    assert again == expected(queries, corpus, 40)
    one = SparseIndex(50)
    one.add(corpus.to_sparse(), ids=np.arange(40) * 10)
    results, _ = semantic_search_pentad(sparse, corpus_index=one, top_k=1)
    best = [hits[:1] for hits in again]
    assert [
        [{**hit, "corpus_id": hit["corpus_id"] // 10} for hit in hits] for hits in results
    ] == best


def test_only_documents_with_a_common_term():
    corpus = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [3, 0, 0]]).to_sparse()
    queries = torch.tensor([[1.0, 0, 0], [0, 0, 5], [0, 0, 0]]).to_sparse()
    results, _ = semantic_search_pentad(queries, corpus)
    assert results == [[{"corpus_id": 3, "score": 3}, {"corpus_id": 0, "score": 1}], [], []]


def test_one_query_by_itself_and_uncoalesced_tensors():
    queries, corpus = embeddings(2, seed=5), embeddings(30, seed=6)
    (result,), _ = semantic_search_pentad(queries[0].to_sparse(), corpus.to_sparse())
    assert [result] == expected(queries[:1], corpus, 10)
    twice = corpus.to_sparse()
    twice = torch.sparse_coo_tensor(
        torch.cat([twice.indices()] * 2, 1), torch.cat([twice.values()] * 2), twice.shape
    )
    results, _ = semantic_search_pentad(queries.to_sparse().requires_grad_(), twice)
    assert results == expected(queries, 2 * corpus, 10)


def test_no_queries_and_no_documents():
    none = torch.zeros(0, 50).to_sparse()
    assert semantic_search_pentad(none, embeddings(4).to_sparse())[0] == []
    assert semantic_search_pentad(embeddings(2).to_sparse(), none)[0] == [[], []]


def test_options_reach_the_index_and_the_search():
    queries, corpus = embeddings(4, seed=7), embeddings(40, seed=8)
    keep = torch.arange(40) % 3 == 0
    results, _, index = semantic_search_pentad(
        queries.to_sparse(),
        corpus.to_sparse(),
        output_index=True,
        index_kwargs={"values": "float16"},
        search_kwargs={"filter": keep},
    )
    assert index.values == "float16"
    assert results == expected(queries, corpus * keep[:, None], 10)


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        (("q",), ValueError, "neither corpus_embeddings nor corpus_index"),
        (("dense", "c"), TypeError, "query_embeddings is a dense tensor, expected a sparse COO"),
        (("q", "dense"), TypeError, "corpus_embeddings is a dense tensor"),
        ((["a"], "c"), TypeError, "query_embeddings is list"),
        (("q", None, ("client", "name")), TypeError, "corpus_index is tuple, expected SparseIndex"),
        (("q", "wide"), ValueError, "50 columns, expected 60"),
        (("q", "negative"), ValueError, "has the value -"),
        (("q", "c", None, -1), ValueError, "k is -1"),
    ],
)
def test_what_is_refused(arguments, error, complaint):
    named = {
        "q": embeddings(2).to_sparse(),
        "c": embeddings(5).to_sparse(),
        "dense": embeddings(2),
        "wide": embeddings(5, 60).to_sparse(),
        "negative": (-embeddings(5)).to_sparse(),
    }
    given = [named[a] if isinstance(a, str) else a for a in arguments]
    with pytest.raises(error, match=complaint):
        semantic_search_pentad(*given)


def test_index_options_for_an_index_that_is_there():
    with pytest.raises(ValueError, match="index_kwargs are given beside a corpus_index"):
        semantic_search_pentad(
            embeddings(2).to_sparse(), None, SparseIndex(50), index_kwargs={"values": "uint8"}
        )


# --- With sentence-transformers -------------------------------------------------------------------


def test_the_signature_is_that_of_the_other_engines():
    engines = pytest.importorskip("sentence_transformers.sparse_encoder.search_engines")
    ours = inspect.signature(semantic_search_pentad).parameters
    names = list(inspect.signature(engines.semantic_search_qdrant).parameters)
    assert list(ours)[: len(names) - 1] == names[:-1], "the last are options of the client"
    for name, parameter in inspect.signature(engines.semantic_search_seismic).parameters.items():
        mine = ours[name.removesuffix("_decoded")]
        assert mine.default == parameter.default


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A SparseEncoder of a few random weights, made here."""
    pytest.importorskip("sentence_transformers", minversion="5.0")
    from sentence_transformers import SparseEncoder
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    try:
        from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    except ImportError:  # where they were before
        from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    folder = tmp_path_factory.mktemp("model")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog house in on red sat the tree".split()  # noqa: SIM905
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=1.0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return SparseEncoder(modules=[MLMTransformer(str(folder)), SpladePooling()], device="cpu")


def test_a_sparse_encoder_end_to_end(encoder):
    texts = ["the cat sat on the red house", "a dog in the tree", "a red cat", "the dog sat", "in"]
    corpus = encoder.encode(texts)
    queries = encoder.encode(["red dog", "the house"])
    assert corpus.is_sparse
    results, _, index = semantic_search_pentad(queries, corpus, top_k=3, output_index=True)
    products = encoder.similarity(queries, corpus)
    for hits, scores in zip(results, products, strict=True):
        best = scores.topk(3)
        assert [hit["corpus_id"] for hit in hits] == best.indices.tolist()
        np.testing.assert_allclose([hit["score"] for hit in hits], best.values, rtol=1e-6)
    alone, _ = semantic_search_pentad(encoder.encode("red dog"), corpus_index=index, top_k=3)
    assert [hit["corpus_id"] for hit in alone[0]] == [hit["corpus_id"] for hit in results[0]]


def test_seismic_returns_the_same_shape(encoder):
    pytest.importorskip("seismic")
    from sentence_transformers.sparse_encoder.search_engines import semantic_search_seismic

    corpus, queries = encoder.encode(["the cat", "a red dog", "tree"]), encoder.encode(["red cat"])
    theirs, seconds = semantic_search_seismic(
        encoder.decode(queries), encoder.decode(corpus), top_k=2
    )
    ours, own_seconds = semantic_search_pentad(queries, corpus, top_k=2)
    assert type(seconds) is type(own_seconds)
    assert [list(hit) for hits in ours for hit in hits] == [
        list(hit) for hits in theirs for hit in hits
    ]

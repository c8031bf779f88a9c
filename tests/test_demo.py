# SPDX-License-Identifier: Apache-2.0
"""The demo at a tiny size: what it writes, what it notices, the model and its twin."""

import base64
import importlib.util
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from demo_cases import failing, leaving

from pentad import cli, demo

missing = [name for name in demo.NEEDS if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"{', '.join(missing)}: not installed", allow_module_level=True)

import torch  # noqa: E402

import pentad.nn  # noqa: E402
from pentad.demo import dropin, plain, questions, report, search, training  # noqa: E402
from pentad.demo.model import Config, HybridLM  # noqa: E402
from pentad.demo.stage import ChildError, Result, Table, in_process  # noqa: E402
from pentad.docsearch import DocIndex, Passage  # noqa: E402

PACKAGES = ["json", "gzip", "glob"]
TINY = Config(dim=32, units=1, d_state=4, heads=2, kv_heads=1, window=5, n_keys=6, k=3)


def quiet(stage, done, total):
    """No progress."""


# --- The model and its twin -----------------------------------------------------------------------


def models():
    for layers in (pentad.nn, plain):
        torch.manual_seed(3)
        yield HybridLM(TINY, layers)


def test_the_twin_has_the_same_parameters_losses_and_gradients():
    ours, twin = models()
    assert ours.state_dict().keys() == twin.state_dict().keys()
    tokens = torch.randint(256, (2, 19), generator=torch.Generator().manual_seed(1))
    results = []
    for model in (ours, twin):
        scores = model(tokens)
        scores.logsumexp(-1).square().mean().backward()
        results.append((scores, {name: p.grad for name, p in model.named_parameters()}))
    (a, grads), (b, expected) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_the_window_and_the_order_of_time():
    """No byte changes what was said before it."""
    model = next(models()).eval()
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] != b[:, 7:]).any(-1).all()


def test_one_byte_at_a_time():
    model = next(models()).eval()
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(2))
    caches = model.caches(2, 17)
    steps = [model.step(tokens[:, i], caches, i) for i in range(17)]
    with torch.no_grad():
        whole = model(tokens)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)
    text = model.generate(b"ab", 5)
    assert len(text) == 7
    assert text.startswith(b"ab")
    assert text == model.generate(b"ab", 5)


def trained(losses, **more):
    made = {"peak": 1 << 20, "held_out": 2.0, "step_error": 1e-6, "step_seconds": 0.001}
    return training.Trained(losses, [0.1] * len(losses), **(made | more))


@pytest.mark.parametrize(
    ("plain_losses", "more", "said"),
    [
        ([8.0, 7.0], {}, None),
        ([8.0, 7.01], {}, "losses of the first 2 steps differ by 0.01 bits"),
        ([8.0, math.nan], {}, "losses of the first 2 steps differ by nan"),
        ([8.0, 7.0], {"step_error": 0.1}, "logits of one byte at a time differ by 0.1"),
    ],
)
def test_a_model_that_is_off(plain_losses, more, said):
    result = training.present(trained([8.0, 7.0, 6.0], **more), trained(plain_losses), [])
    assert [f[: len(said or "")] for f in result.failures] == ([said] if said else [])
    assert set(result.figures) == {"loss", "training"}


def test_training_steps(tmp_path, monkeypatch):
    """Two steps in this process: what they measure, and a checkpoint that loads."""
    text, checkpoint = tmp_path / "text", tmp_path / "model.safetensors"
    text.write_bytes(b"All that is gold does not glitter. " * 300)
    monkeypatch.setattr(training, "GENERATED", 5)
    found = training.train(quiet, "pentad", text, 2, 2, checkpoint)
    assert len(found.losses) == len(found.seconds) == 2
    assert 6 < found.losses[0] < 10
    assert found.step_error < training.STEP_TOLERANCE
    assert len(found.samples) == len(training.PROMPTS)
    from safetensors.torch import load_file

    HybridLM().load_state_dict(load_file(checkpoint))


# --- The other stages -----------------------------------------------------------------------------


def logits(times=1.0):
    return {
        name: dropin.Measured(times * np.ones((2, 3), np.float32), 1.0, 2.0)
        for name in ("Mamba", "Llama")
    }


def test_models_that_are_off():
    assert not dropin.present(logits(), logits(1 + 1e-5), 2).failures
    failures = dropin.present(logits(), logits(1.01), 2).failures
    assert [f.split(" by ")[0] for f in failures] == [
        "Mamba: logits differ",
        "Llama: logits differ",
    ]
    assert len(dropin.present(logits(), logits(math.nan), 2).failures) == 2


def test_an_index_that_is_off():
    truth = np.arange(40.0)[None]
    right = search.ask("BM25", ["x"] * 40, lambda q: np.arange(39, 29, -1), [0], truth, 400)
    assert (right.recall, right.nbytes) == (1.0, 10.0)
    wrong = search.ask("BM25", ["x"] * 40, lambda q: np.arange(38, 28, -1), [0], truth, 400)
    assert wrong.recall == 0.9
    tied = search.ask("BM25", ["x"] * 40, lambda q: np.arange(10), [0], 0 * truth, 400)
    assert tied.recall == 1.0
    for way, count in ((right, 0), (wrong, 1)):
        result = Result("Search")
        search.check(result, [way], [])
        assert len(result.failures) == count


def test_an_index_without_the_right_answers():
    passages = [Passage(name, "function", "", "", 1, "") for name in ("gzip.open", "x.y")]
    for found, count in ((0, 0), (1, 1)):
        result, question = Result("Search"), "open a gzip file for writing"
        way = search.Asked("PQ, rescored", passages, [np.array([found])], 1.0, 1.0, 1.0)
        assert way.right([question]) == [not found]
        search.check(result, [way], [question])
        assert len(result.failures) == count


def test_questions():
    assert len(questions.QUESTIONS) >= 40
    assert set(questions.CHECKED) < set(questions.QUESTIONS)


def test_a_process_that_fails():
    told = []
    with pytest.raises(ChildError, match=r"^ValueError: two lines$") as error:
        in_process(failing, progress=lambda *what: told.append(what))
    assert "in failing" in error.value.details
    assert told == [("a stage", 1, 2)]
    with pytest.raises(ChildError, match=r"^leaving ended with status 7$"):
        in_process(leaving, progress=quiet)


# --- The whole ------------------------------------------------------------------------------------


def test_the_report_holds_the_figures(tmp_path, capsys, monkeypatch):
    """The search on a few modules beside a stage that fails."""
    monkeypatch.setattr(search.splade, "available", lambda: False)  # no second model
    monkeypatch.setattr(training, "run", lambda context: failing(context.progress))
    out = tmp_path / "new" / "folder"
    assert demo.run(out, small=True, stages=["model", "search"], packages=PACKAGES) == 1
    printed = capsys.readouterr()
    assert "pentad demo: A model: ValueError: two lines\n" in printed.err
    assert "PQ, rescored" in printed.out
    html = (out / report.NAME).read_text()
    assert "ValueError: two lines" in html
    for question in questions.QUESTIONS:
        assert question in html
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', html)[1]
    assert base64.b64decode(picture) == (out / "search.png").read_bytes()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing outside the file
    docs = DocIndex.load(out / "documentation.pentad")
    assert docs.search("parse json from a string").hits[0].passage.name.startswith("json")


def test_texts_in_the_report_are_escaped(tmp_path):
    result = Result("<b>", tables=[Table("t", ["<i>"], [["<u>"]])], texts={"x": "<script>"})
    html = report.write([result], tmp_path).read_text()
    for text in ("<b>", "<i>", "<u>", "<script>"):
        assert text not in html
        assert text.replace("<", "&lt;").replace(">", "&gt;") in html


def test_the_command(tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(demo, "run", lambda out, **options: asked.update(options, out=out) or 2)
    assert cli.main(["demo", "--small", "--out", str(tmp_path), "--stage", "model"]) == 1
    assert asked == {"out": tmp_path, "small": True, "stages": ["model"]}


def test_what_is_missing(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    assert cli.main(["demo", "--out", str(tmp_path / "x")]) == 1
    said = "pentad demo: the demo needs torch: pip install 'pentad[demo]'\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "x").exists()


def test_starting_up_is_light():
    code = "import sys, pentad.demo; sys.exit(', '.join({'torch', 'rich'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)

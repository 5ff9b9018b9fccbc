"""validate.py --eval: figures of divergence are those of their definitions, tasks are paired, lm-eval asks the server."""

import contextlib
import importlib.util
import json
import math

import pytest
import torch
from live_server import live_server
from pace import KERNELS
from released_folders import write_release
from wrong_folders import edit

from checkpoint.load import load_tokenizer
from runtime_ref import validate
from runtime_ref.validation.context import ValidationContext
from runtime_ref.validation.evaluation import TokenStatistics, last_number, local_task, paired, windows
from runtime_ref.validation.guard import UserMistake
from runtime_ref.validation.provenance import model_facts
from runtime_ref.validation.quantities import Number

pytestmark = pytest.mark.skipif(KERNELS, reason="of the figures, not of a backend")
TEXT = "def f(x):\n    return x + 1\n\nThe quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("eval") / "model", "V2.5-Pro-FP4-DFlash")


def evaluated(folder, tmp_path, capsys, *more):
    code = validate.main([str(folder), "--json", str(tmp_path / "v.json"), "--html", str(tmp_path / "v.html"), "--card",
                          str(tmp_path / "card.md"), "--backend", "torch", *more])
    capsys.readouterr()
    return code, {c["name"]: c for c in json.loads((tmp_path / "v.json").read_text())["checks"]}


def test_a_report_says_whose_export_it_is_without_the_checks(folder):
    context = ValidationContext(folder)
    assert model_facts(context)["written by"] == "somebody else's exporter"
    (folder / "export.json").write_text("{}")
    assert model_facts(context)["written by"] == "this project's exporter"
    (folder / "export.json").unlink()


def test_figures_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, base = (torch.randn(37, 11, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 11, (37,), generator=generator)
    statistics = TokenStatistics.empty()
    for part in (slice(0, 20), slice(20, 37)):
        statistics.add(logits[part], base[part], tokens[part])
    found = statistics.numbers()
    p, q = base.double().softmax(-1), logits.double().softmax(-1)
    kl = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    rows = torch.arange(37)
    assert found[Number.KL_MEAN] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found[Number.KL_99] == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)
    assert found[Number.PERPLEXITY] == pytest.approx(math.exp(-float(q[rows, tokens].log().mean())), rel=1e-5)
    assert found[Number.RMS_PROBABILITY] == pytest.approx(float((q - p)[rows, tokens].square().mean().sqrt()), rel=1e-5)
    assert found[Number.SAME_TOP] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    right, was = q.argmax(-1) == tokens, p.argmax(-1) == tokens
    assert found[Number.FLIPS] == f"{int((was & ~right).sum())}, {int((right & ~was).sum())}"


def test_windows_cover_a_text_once():
    pieces = windows([list(range(600)), [1], [5, 6]], 256)
    assert [len(p) for p in pieces] == [256, 256, 88, 2] and sum(pieces[:3], []) == list(range(600))


@pytest.mark.parametrize("base, own, p", [([True] * 5, [True] * 5, 1.0), ([True] * 6, [False] * 6, 2 / 64),
                                          ([True, False] * 4, [False, True] * 4, 1.0)])
def test_the_paired_test_is_exact(base, own, p):
    assert paired(base, own)["p"] == pytest.approx(p)


def test_recovery_and_noise_floor():
    found = paired([True] * 80 + [False] * 20, [True] * 76 + [False] * 24)
    assert found["recovery"] == pytest.approx(0.95) and (found["lost"], found["won"]) == (4, 0)
    assert found["noise_floor"] == pytest.approx(196 * math.sqrt((4 - 16 / 100) / 1e4))


@pytest.mark.parametrize("text, number", [("So #### 1,234", "1234"), ("3.50 apples", "3.5"), ("-2", "-2"), ("none", None),
                                          ("a 7. Then 8.", "8")])
def test_the_last_number_of_an_answer(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("rows", ["", '{"prompt": "x"}', '{"prompt": 5, "answer": "x"}', '{"answer": "x"}'])
def test_a_task_without_answers_is_refused(tmp_path, rows):
    file = tmp_path / "t.jsonl"
    file.write_text(rows)
    with pytest.raises(UserMistake, match="prompt .or question. and answer"):
        local_task(file)


def test_quick_measures_nothing_lost_against_itself_and_something_against_another(folder, tmp_path, capsys):
    from checkpoint.load import load_model

    text = tmp_path / "t.txt"
    text.write_text(TEXT)
    original = tmp_path / "original"
    model = load_model(folder, dtype=torch.float32)
    model.save_pretrained(original)
    code, checks = evaluated(folder, tmp_path, capsys, "--eval", "quick", "--eval-text", str(text), "--original", str(original),
                             "--dtype", "float32")
    numbers = checks["quick"]["numbers"]
    assert code == 0 and numbers[Number.KL_MEAN] < 1e-6 and numbers[Number.SAME_TOP] == 1.0
    assert "mean KL to the original" in (tmp_path / "card.md").read_text() and "quick" in (tmp_path / "v.html").read_text()
    edit(original / "model.safetensors", lambda t: t.update({n: t[n] * 1.05 for n in t if ".experts." in n}))
    _, checks = evaluated(folder, tmp_path, capsys, "--eval", "quick", "--eval-text", str(text), "--original", str(original))
    assert checks["quick"]["numbers"][Number.KL_MEAN] > 1e-4


def test_quick_without_an_original_measures_perplexity_alone(folder, tmp_path, capsys):
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": TEXT}))
    code, checks = evaluated(folder, tmp_path, capsys, "--eval", "quick", "--eval-text", str(text))
    assert code == 0 and checks["quick"]["unchecked"] and Number.KL_MEAN not in checks["quick"]["numbers"]
    assert checks["quick"]["numbers"][Number.PERPLEXITY] > 1


@pytest.mark.parametrize("arguments, said", [
    (["--eval", "quick"], "--eval-text"), (["--eval", "slow"], "expected quick"), (["--eval", "tasks"], "--eval-tasks"),
    (["--eval", "tasks", "--eval-tasks", "no.jsonl"], "no such file"),
    (["--eval", "quick", "--eval-text", "no"], "no such file"),
    (["--eval", "quick", "--eval-limit", "0"], "--eval-limit")])
def test_mistakes_are_one_line_and_code_2(folder, capsys, arguments, said):
    try:
        code = validate.main([str(folder), *arguments])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'")
def test_lm_eval_asks_the_server_and_the_original_the_same_questions(folder, tmp_path, capsys):
    from runtime_ref.engine.engine import Engine, EngineOptions
    from runtime_ref.server.request_workers import RequestWorkers

    tokenizer = load_tokenizer(folder)
    engine = Engine.from_folder(folder, backend="torch", tokenizer=tokenizer, options=EngineOptions(max_context=512))
    tasks = tmp_path / "sums.jsonl"
    tasks.write_text("".join(json.dumps({"question": f"{a} + 1 = ?", "answer": f"#### {a + 1}"}) + "\n" for a in range(4)))
    with contextlib.closing(RequestWorkers(folder)) as workers, live_server(engine, tokenizer, workers) as live:
        code, checks = evaluated(folder, tmp_path, capsys, "--eval", "tasks", "--eval-tasks", str(tasks), "--endpoint",
                                 live.url, "--original-endpoint", live.url)
    rows = checks["tasks"]["tables"]["tasks: original against FP4"]
    assert code == 0 and rows[1][0] == "sums" and rows[1][1] == 4 and rows[1][2] == rows[1][3]  # the same server twice

"""metrics.jsonl survives kills and resumes; provenance is complete; a missing wandb is one line."""

import sys

import pytest

from training.report import Metrics, draw_curves, environment, read_metrics, start_wandb


def test_a_resumed_file_drops_what_came_after_the_checkpoint_and_a_cut_off_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, resumed_step=None)
    for step in range(1, 6):
        metrics.write("train", step, loss=float(step))
    metrics.close()
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    metrics = Metrics(path, resumed_step=3)
    metrics.write("train", 4, loss=0.5)
    metrics.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n')
    Metrics(path, resumed_step=None).close()
    assert path.read_text() == ""


def test_environment_names_what_a_result_needs():
    facts = environment()
    assert all(facts[key] for key in ("date", "command", "git_revision", "python", "torch", "cpu", "cpu_count"))


def test_curves_need_no_health_lines_and_no_positive_losses(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", resumed_step=None)
    for step in (1, 2):
        metrics.write("train", step, kl=0.5 / step, loss=1.0, learning_rate=1e-3)
    metrics.close()
    draw_curves(tmp_path / "m.jsonl", tmp_path / "curves.png", "t")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "curves.tmp.png").exists()


def test_curves_leave_out_what_is_no_number(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl", resumed_step=None)
    for step, sqnr in ((1, [None, 20.0]), (2, [None, None])):
        metrics.write("train", step, kl=0.5, loss=1.0, learning_rate=1e-3)
        metrics.write("health", step, tensor="t", flipped=[0.0, 0.1], sqnr_db=sqnr)
    metrics.close()
    draw_curves(tmp_path / "m.jsonl", tmp_path / "curves.png", "t")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_wandb_is_off_without_being_asked_and_refused_clearly_when_missing(tmp_path, monkeypatch):
    assert start_wandb("off", "p", "n", tmp_path, {}) is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"tracking\.wandb: the wandb package is not installed"):
        start_wandb("offline", "p", "n", tmp_path, {})


def test_damaged_lines_of_the_metrics_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, resumed_step=None)
    for step in range(1, 7):
        metrics.write("train", step, kl=0.5, learning_rate=0.1)
    metrics.close()
    lines = path.read_bytes().splitlines()
    lines[1] = lines[1].replace(b'"step"', b'"stee"')
    lines[2] = b"\xff" + lines[2]
    lines[3] = lines[3].replace(b'"kl"', b'"lk"')  # still a record: the picture goes on without the point
    path.write_bytes(b"\n".join(lines) + b"\n{\"kind\"")
    assert [r["step"] for r in read_metrics(path)] == [1, 4, 5, 6]
    draw_curves(path, tmp_path / "curves.png", "t")
    Metrics(path, resumed_step=5).close()
    assert [r["step"] for r in read_metrics(path)] == [1, 4, 5]
    assert "metrics.jsonl: 3 of 7 lines are damaged and were left out" in capsys.readouterr().out

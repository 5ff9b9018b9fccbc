"""validate.py --endpoint: a right server of the checkpoint passes; those that compute, count, sample or end wrongly do not."""

import contextlib
import itertools
import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from live_server import live_server
from pace import KERNELS
from released_folders import write_release

from checkpoint.checksums import declared_digest
from checkpoint.load import load_tokenizer
from runtime_ref import validate
from runtime_ref.server.request_workers import RequestWorkers
from runtime_ref.validation.checks.endpoint import IDENTITY_CAUSE, check_identity, tool_call_fault
from runtime_ref.validation.endpoint_client import Endpoint, _values
from runtime_ref.validation.result import Check

pytestmark = pytest.mark.skipif(KERNELS, reason="of the judgement, not of a backend")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("endpoint") / "model", "V2.5-Pro-FP4-DFlash")


@pytest.fixture(scope="module")
def preparing(folder):
    """The request workers that the servers of this file share."""
    with contextlib.closing(RequestWorkers(folder)) as workers:
        yield workers


@contextlib.contextmanager
def serving(folder, preparing, change=lambda engine: None):
    from runtime_ref.engine.engine import Engine, EngineOptions

    tokenizer = load_tokenizer(folder)
    engine = Engine.from_folder(folder, backend="torch", tokenizer=tokenizer, options=EngineOptions(max_context=256))
    change(engine)
    with live_server(engine, tokenizer, preparing) as live:
        yield live


def judged(folder, url, tmp_path, capsys, *more):
    code = validate.main([*([str(folder)] if folder else []), "--endpoint", url, "--tokens", "12", "--prompts-per-domain", "4",
                          "--json", str(tmp_path / "v.json"), "--html", str(tmp_path / "v.html"), *more])
    capsys.readouterr()
    verdict = json.loads((tmp_path / "v.json").read_text())
    return code, verdict, {c["name"]: c for c in verdict["checks"]}


def test_a_server_of_the_checkpoint_is_right(folder, preparing, tmp_path, capsys):
    with serving(folder, preparing) as live:
        code, verdict, checks = judged(folder, live.url, tmp_path, capsys, "--node-hour", "10")
    assert code == 0, verdict["causes"]
    assert all(checks[name]["status"] == "passed" for name in ("counts", "greedy", "sampling", "ends", "speed"))
    numbers = checks["greedy"]["numbers"]
    assert numbers["positions where the reference is sure"] > 10
    assert numbers["mean difference of log-probabilities (nats)"] < 0.1
    assert checks["acceptance"]["numbers"]["acceptance length"] >= 1
    speeds = checks["speed"]["numbers"]
    assert "tokens/s without drafts, one sequence" in speeds
    assert speeds["price per million tokens as served, one sequence"] == pytest.approx(
        10 / 3600 / speeds["tokens/s as served, one sequence"] * 1e6)
    assert verdict["model"]["served as"] == "small" and "endpoint" in (tmp_path / "v.html").read_text()


@pytest.mark.parametrize(("told", "sums", "status"), [
    (None, True, "unchecked"), ("other", True, "failed"), ("same", True, "passed"), ("same", False, "unchecked")])
def test_whose_files_the_server_has_is_compared_where_it_tells(told, sums, status, tmp_path):
    if sums:
        (tmp_path / "checksums.sha256").write_text("0123  model.safetensors\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checksums.sha256").write_text("4567  model.safetensors\n")
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "checksums.sha256").write_text("0123  model.safetensors\n")
    server = SimpleNamespace(model="m", cards={"m": {"checksums": declared_digest(tmp_path / told)} if told else {}})
    check = Check("identity", "")
    check_identity(check, server, tmp_path)
    assert check.status == status
    assert (check.causes == [IDENTITY_CAUSE]) == (status == "failed")


def test_this_projects_server_tells_whose_files_it_has(folder, preparing):
    with serving(folder, preparing) as live:
        assert "checksums" not in Endpoint(live.url).cards["small"]
        live.api.settings = replace(live.api.settings, checksums="0123456789abcdef")
        assert Endpoint(live.url).cards["small"]["checksums"] == "0123456789abcdef"


def test_without_a_reference_the_rest_is_still_judged(folder, preparing, tmp_path, capsys):
    with serving(folder, preparing) as live:
        code, _, checks = judged(None, live.url, tmp_path, capsys)
    assert code == 0 and checks["greedy"]["status"] == "unchecked" and checks["speed"]["status"] == "passed"


def other_experts(engine):
    for layer in engine.backend.weights.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.router.copy_(layer.mlp.router.roll(1, -1))


def test_a_server_of_other_weights_is_found(folder, preparing, tmp_path, capsys):
    with serving(folder, preparing, other_experts) as live:
        code, verdict, checks = judged(folder, live.url, tmp_path, capsys)
    assert code == 1 and checks["greedy"]["status"] == "failed"
    assert any("computes something else than this checkpoint" in c for c in verdict["causes"])


@pytest.mark.parametrize("judged_by, cause", [
    ("{% if enable_thinking | default(true) %}think {% endif %}", "thinking is on when served and was off in training"),
    ("{{ 'more' }}", "the server's tokenizer or chat template is not the checkpoint's")])
def test_a_server_that_renders_conversations_otherwise_is_found(folder, preparing, tmp_path, capsys, judged_by, cause):
    """Its template is `PLAIN`; the folder that it is judged by has more text behind it."""
    PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(PLAIN + judged_by)
    (tmp_path / "served").mkdir()
    served = shutil.copytree(folder, tmp_path / "served/model")
    (served / "chat_template.jinja").write_text(PLAIN)
    with contextlib.closing(RequestWorkers(served)) as workers, serving(served, workers) as live:
        code, verdict, checks = judged(copy, live.url, tmp_path, capsys)
    assert code == 1 and checks["counts"]["status"] == "failed" and any(cause in c for c in verdict["causes"])


def test_a_speed_without_drafts_is_only_said_where_none_were_made(folder, preparing, tmp_path, capsys, monkeypatch):
    with serving(folder, preparing) as live:
        rounds = itertools.count()  # as of a server that takes `speculate` for a field that means nothing
        monkeypatch.setattr(Endpoint, "counters", lambda self: {"drafts": next(rounds), "accepted": 0})
        _, _, checks = judged(folder, live.url, tmp_path, capsys)
    assert "tokens/s without drafts, one sequence" not in checks["speed"]["numbers"]
    assert any("cannot turn them off" in reason for reason in checks["speed"]["unchecked"])


def test_a_server_that_samples_too_cold_is_found(folder, preparing, tmp_path, capsys, monkeypatch):
    from runtime_ref.engine import sampler, speculative

    right = sampler.distribution
    for module in (sampler, speculative):
        monkeypatch.setattr(module, "distribution", lambda logits, params: right(logits * 1.5, params))
    with serving(folder, preparing) as live:
        code, verdict, checks = judged(folder, live.url, tmp_path, capsys)
    assert code == 1 and checks["sampling"]["status"] == "failed" and checks["greedy"]["status"] == "passed"
    assert any("likely tokens come too often" in c for c in verdict["causes"])


def test_a_server_that_does_not_stop_is_found(folder, preparing, tmp_path, capsys):
    with serving(folder, preparing) as live:
        answers = Endpoint(live.url).complete([5, 6, 7], max_tokens=12, temperature=0)
    end = answers[0].tokens[4]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": load_tokenizer(folder).decode([5, 6, 7])}))
    with serving(folder, preparing) as live:  # it knows the old end token
        code, verdict, checks = judged(copy, live.url, tmp_path, capsys, "--prompts", str(prompts))
    assert code == 1 and checks["ends"]["status"] == "failed" and any("runs on after the end token" in f
                                                                    for f in checks["ends"]["findings"])


class Odd(BaseHTTPRequestHandler):
    """A server that answers, but not what was asked."""

    answer = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1}}

    def do_GET(self):
        self.reply({"data": [{"id": "m"}]} if self.path == "/v1/models" else {}, 200 if self.path == "/v1/models" else 404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.answer, 200)

    def reply(self, value, status):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("answer", [{"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1}}, {}, {"choices": [{}]}, [],
                                    {"choices": None}, b"not JSON", {"choices": [5]}])
def test_any_server_ends_in_a_verdict(folder, tmp_path, capsys, monkeypatch, answer):
    monkeypatch.setattr(Odd, "answer", answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, verdict, _ = judged(folder, f"http://127.0.0.1:{server.server_port}", tmp_path, capsys)
    finally:
        server.shutdown()
    assert code == 1 and verdict["causes"]


@pytest.mark.parametrize("arguments, said", [(["--endpoint", "localhost:1"], "expected http://"),
                                             (["--endpoint", "http://127.0.0.1:9"], "no answer"), ([], "CHECKPOINT_DIR")])
def test_a_wrong_endpoint_is_one_line_and_code_2(capsys, arguments, said):
    try:
        code = validate.main(arguments)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize("call, fine", [
    ({"function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'}}, True),
    ({"function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": "3"}'}}, False),
    ({"function": {"name": "get_weather", "arguments": '{"city": "Oslo"'}}, False),
    ({"function": {"name": "other", "arguments": "{}"}}, False), ({"function": {"name": "get_weather"}}, False),
    ({}, False), (None, False), ({"function": {"name": "get_weather", "arguments": "[]"}}, False)])
def test_a_tool_call_is_one_that_fits_its_schema(call, fine):
    assert (tool_call_fault(call) is None) == fine


def test_counters_are_read_by_vllm_s_and_sglang_s_names():
    text = ("# HELP x\nvllm:spec_decode_num_drafts_total{model_name=\"m\",engine=\"0\"} 5.0\n"
            "vllm:spec_decode_num_drafts_total{engine=\"1\"} 7\nsglang:spec_accept_length{a=\"b\"} 2.5e0\n")
    assert _values(text, "vllm:spec_decode_num_drafts_total") == [5.0, 7.0]
    assert _values(text, "sglang:spec_accept_length") == [2.5] and _values(text, "vllm:spec") == []


def test_tokens_drawn_too_greedily_fill_the_lower_bins():
    """The statistic itself: of right draws and of draws at another temperature."""
    from runtime_ref.validation.checks.sampling import chi_square_z

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 50, generator=generator)
    uniform = torch.full((20,), 0.05, dtype=torch.float64)

    def z(factor):
        p = logits.softmax(-1)
        drawn = torch.multinomial((logits * factor).softmax(-1), 1, generator=generator)
        own = p.gather(1, drawn)
        place = torch.where(p > own, p, 0.0).sum(-1) + torch.rand(1024, generator=generator) * own[:, 0]
        return chi_square_z(torch.histc(place.double(), bins=20, min=0, max=1), uniform)

    assert z(1.0) < 4.3 < z(1.5)


@pytest.mark.parametrize("answers, points", [(64, 0.14), (1500, 0.03)])
def test_the_sampled_answers_show_the_bias_that_the_page_promises(answers, points):
    """The statistic alone, of 100 repetitions: so many points too many in the likelier half are found, right draws never."""
    from runtime_ref.validation.checks.endpoint import BINS, CHI_SQUARE_Z, SAMPLED_TOKENS, chi_square_z

    generator = torch.Generator().manual_seed(0)
    uniform = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
    moved = torch.full((BINS // 2,), 2 * points / BINS, dtype=torch.float64)

    def found(p):
        draws = (torch.multinomial(p, answers * SAMPLED_TOKENS, replacement=True, generator=generator) for _ in range(100))
        return sum(chi_square_z(torch.bincount(d, minlength=BINS).double(), uniform) > CHI_SQUARE_Z for d in draws)

    assert found(uniform + torch.cat((moved, -moved))) >= 97 and found(uniform) == 0

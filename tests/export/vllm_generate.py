"""What vLLM answers to several jobs, as one line of JSON. Run by test_vllm_client.py with the engine's own interpreter; the
engine's imports are most of what a start costs, so all jobs share one process.

    python vllm_generate.py FILE    # a list of
        {"folder": ..., "prompts": [[ids], ...], "tokens": n, "drafter": FOLDER or null}     greedy tokens and counters
        {"groups": [[the target's layers], a drafter's layer, its depth], ...]}              whether its layers share a group

A layer: [window or null, key heads, size of a key, size of a value].
"""

import gc
import json
import sys
import traceback
from pathlib import Path


def answers_of(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    if "quantization_config" in json.loads((Path(job["folder"]) / "config.json").read_text(encoding="utf-8")):
        allow_any_routing()
    options = {}
    if job["drafter"]:
        options["speculative_config"] = {"method": "dflash", "model": job["drafter"], "num_speculative_tokens": 7}
    llm = LLM(model=job["folder"], skip_tokenizer_init=True, enforce_eager=True, trust_remote_code=True, dtype="bfloat16",
              max_model_len=512, max_num_seqs=len(job["prompts"]), max_num_batched_tokens=512, disable_log_stats=False,
              **options)
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    counters = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name and hasattr(m, "value")}
    return {"answers": [list(a.outputs[0].token_ids) for a in answers], "counters": counters}


def allow_any_routing() -> None:
    """The CPU kernel for MXFP4 gets its experts chosen by the caller; its list of routing methods only lacks sigmoids."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    cpu_moe.CPUExpertsMxfp4._supports_routing_method = staticmethod(lambda *args, **kwargs: True)


def share_a_group(target: list[list], own: list, depth: int) -> bool:
    """Whether vLLM puts the layers of a drafter into one group of its cache."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

    def spec(window, heads: int, key: int, value: int):
        sizes = {"block_size": 128, "num_kv_heads": heads, "head_size": key, "head_size_v": value, "dtype": torch.bfloat16}
        return FullAttentionSpec(**sizes) if window is None else SlidingWindowSpec(sliding_window=window, **sizes)

    specs = {f"target.{i}": spec(*kind) for i, kind in enumerate(target)} | {f"draft.{i}": spec(*own) for i in range(depth)}
    if kv_cache_utils.is_kv_cache_spec_uniform(specs) or UniformTypeKVCacheSpecs.from_specs(specs):
        return True
    groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(kv_cache_utils.unify_kv_cache_spec_page_size(specs))
    return any({f"draft.{i}" for i in range(depth)} <= set(group.layer_names) for group in groups)


def main(jobs: list[dict]) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    for job in jobs:
        try:
            results.append([share_a_group(*case) for case in job["groups"]] if "groups" in job else answers_of(job))
        except Exception:  # the engine's: the others' answers are still wanted
            results.append({"error": traceback.format_exc()})
        gc.collect()
        cleanup_dist_env_and_memory()
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))

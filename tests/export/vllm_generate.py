"""Greedy tokens and counters of vLLM for one job, as a line of JSON. Run by test_vllm_client.py with the engine's interpreter.

    python vllm_generate.py '{"folder": ..., "prompts": [[ids], ...], "tokens": n, "drafter": FOLDER or null, "options": {...}}'
"""

import json
import sys


def main(job: dict) -> None:
    from vllm import LLM, SamplingParams

    options = job.get("options", {})
    if job["drafter"]:
        options["speculative_config"] = {"method": "dflash", "model": job["drafter"], "num_speculative_tokens": 7}
    llm = LLM(model=job["folder"], skip_tokenizer_init=True, enforce_eager=True, trust_remote_code=True, dtype="bfloat16",
              max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512, disable_log_stats=False, **options)
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling, use_tqdm=False)
    counters = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name and hasattr(m, "value")}
    print("RESULT " + json.dumps({"answers": [list(a.outputs[0].token_ids) for a in answers], "counters": counters}))


def allow_any_routing() -> None:
    """The CPU kernel for MXFP4 gets its experts chosen by the caller; its list of routing methods only lacks sigmoids."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    cpu_moe.CPUExpertsMxfp4._supports_routing_method = staticmethod(lambda *args, **kwargs: True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given.pop("mxfp4", False):
        allow_any_routing()
    main(given)

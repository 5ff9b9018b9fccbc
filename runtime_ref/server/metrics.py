"""Numbers for /metrics, in Prometheus' text format, under the names that vLLM gives them.

Benchmark tools read these names to compute acceptance (accepted length = 1 + accepted tokens / drafts), so a server that has
them can be measured like any other. Times are seen from the server: from a request's arrival to the end of the step that
gave a token. Written by hand: a client library would bring a registry of global state for what is one function.

Source: vLLM's production metrics page; Prometheus' text exposition format 0.0.4.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from runtime_ref.server.engine_thread import Statistics, StepOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

HELP = {
    "vllm:num_requests_running": "Sequences that are decoded or whose prompts are read.",
    "vllm:num_requests_waiting": "Sequences that wait for a place.",
    "vllm:kv_cache_usage_perc": "Share of the cache's pages that sequences hold, of the fullest kind (1 = all).",
    "vllm:num_preemptions_total": "Sequences that gave up their pages and started again.",
    "vllm:prompt_tokens_total": "Tokens of prompts that were computed.",
    "vllm:generation_tokens_total": "Tokens of answers.",
    "vllm:prefix_cache_queries_total": "Tokens of prompts that were looked up in the prefix cache.",
    "vllm:prefix_cache_hits_total": "Tokens of prompts that were found there.",
    "vllm:spec_decode_num_drafts_total": "Rounds of drafting.",
    "vllm:spec_decode_num_draft_tokens_total": "Drafted tokens.",
    "vllm:spec_decode_num_accepted_tokens_total": "Drafted tokens that were accepted.",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total": "Accepted drafts by their position in the round.",
    "vllm:request_success_total": "Ended answers by their reason.",
    "vllm:time_to_first_token_seconds": "From a request's arrival to the end of the step with its first token.",
    "vllm:inter_token_latency_seconds": "Between two steps of an answer, for each token of the later one.",
    "vllm:e2e_request_latency_seconds": "From a request's arrival to the end of its last step.",
    "vllm:request_prompt_tokens": "Tokens of a request's prompt.",
    "vllm:request_generation_tokens": "Tokens of an answer.",
    "fp4_dflash:engine_up": "Whether the engine computes; 0 also fails /health.",
    "fp4_dflash:event_loop_delay_seconds": "How long the event loop last took to answer the watch.",
    "fp4_dflash:request_workers_replaced_total": "Request workers that died of a request or a template.",
    "fp4_dflash:engine_steps_total": "Steps of the engine.",
    "fp4_dflash:launch_info": "How steps reach the device.",
    "fp4_dflash:pages_held": "Cache pages held by sequences, by kind.",
    "fp4_dflash:requests_refused_total": "Requests answered with an error, by status."}


def head(name: str, kind: str) -> list[str]:
    return [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}"]


@dataclass
class Histogram:
    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        out, seen = head(name, "histogram"), 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            out.append(f'{name}_bucket{{{labels},le="{bound}"}} {seen}')
        return [*out, f"{name}_sum{{{labels}}} {self.total}", f"{name}_count{{{labels}}} {seen}"]


class Timing:
    """One choice's times and drafts; `report` is what a client gets beside its answer."""

    def __init__(self, born: float):
        self.born = born
        self.first: float | None = None
        self.last = born
        self.tokens = self.steps = self.rounds = self.drafted = self.accepted = 0

    def add(self, step: StepOutput) -> None:
        output = step.output
        if self.first is None:
            self.first = step.at
        self.last = step.at
        self.tokens += len(output.tokens)
        self.steps += 1
        self.drafted, self.accepted = self.drafted + output.drafted, self.accepted + output.accepted
        self.rounds += output.drafted > 0

    def report(self) -> dict:
        """Milliseconds and tokens per second; tokens per second counts from the first token on."""
        decoding = self.last - (self.first or self.last)
        after_first = self.tokens - 1
        return {"time_to_first_token_ms": round(1e3 * ((self.first or self.last) - self.born), 3),
                "mean_itl_ms": round(1e3 * decoding / after_first, 3) if after_first > 0 else None,
                "tokens_per_second": round(after_first / decoding, 3) if after_first > 0 and decoding > 0 else None,
                "speculative_decoding": {
                    "num_drafts": self.rounds, "num_draft_tokens": self.drafted, "num_accepted_tokens": self.accepted,
                    "acceptance_length": round(1 + self.accepted / self.rounds, 4) if self.rounds else None}}


class Metrics:
    """What the server itself counts; the rest comes from the engine's statistics."""

    def __init__(self, model: str):
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self.labels = f'model_name="{escaped}",engine="0"'
        self.first_token, self.between, self.whole = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.prompt, self.answer = Histogram(TOKENS), Histogram(TOKENS)
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.refused: dict[int, int] = {}

    def token(self, timing: Timing, step: StepOutput) -> None:
        """To be called before `timing.add(step)`."""
        if timing.first is None:
            self.first_token.observe(step.at - timing.born)
        elif step.output.tokens:
            self.between.observe((step.at - timing.last) / len(step.output.tokens))

    def finish(self, timing: Timing, reason: str, prompt_tokens: int) -> None:
        self.finished[reason] += 1
        self.whole.observe(timing.last - timing.born)
        self.prompt.observe(prompt_tokens)
        self.answer.observe(timing.tokens)

    def refuse(self, status: int) -> None:
        self.refused[status] = self.refused.get(status, 0) + 1

    def render(self, found: Statistics, *, up: bool, loop_delay: float, restarts: int) -> str:
        """The page; `found` may be a little old when the engine is busy with a long step or down.

        Args:
            loop_delay: seconds that the event loop last took to answer. restarts: request workers that had to be replaced.
        """
        counts, lines = found.counts, []

        def add(name: str, kind: str, values: list[tuple[str, float]]) -> None:
            lines.extend(head(name, kind))
            lines.extend(f"{name}{{{self.labels}{extra}}} {value}" for extra, value in values)

        def counter(name: str, value: float) -> None:
            add(f"vllm:{name}_total", "counter", [("", value)])

        shares = [found.held_pages[kind] / pages for kind, pages in found.all_pages.items()]
        add("vllm:num_requests_running", "gauge", [("", counts["running"])])
        add("vllm:num_requests_waiting", "gauge", [("", counts["waiting"])])
        add("vllm:kv_cache_usage_perc", "gauge", [("", max(shares, default=0.0))])
        counter("num_preemptions", counts["preemptions"])
        counter("prompt_tokens", counts["prompt_tokens"])
        counter("generation_tokens", counts["tokens"])
        counter("prefix_cache_queries", counts["prompt_tokens"] + counts["cached_tokens"])
        counter("prefix_cache_hits", counts["cached_tokens"])
        counter("spec_decode_num_drafts", counts["rounds"])
        counter("spec_decode_num_draft_tokens", counts["drafted"])
        counter("spec_decode_num_accepted_tokens", counts["accepted"])
        add("vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter",
            [(f',position="{i}"', n) for i, n in enumerate(counts["accepted_per_position"])])
        add("vllm:request_success_total", "counter", [(f',finished_reason="{k}"', n) for k, n in self.finished.items()])
        histograms = {"time_to_first_token_seconds": self.first_token, "inter_token_latency_seconds": self.between,
                      "e2e_request_latency_seconds": self.whole, "request_prompt_tokens": self.prompt,
                      "request_generation_tokens": self.answer}
        for name, histogram in histograms.items():
            lines.extend(histogram.lines(f"vllm:{name}", self.labels))
        add("fp4_dflash:engine_up", "gauge", [("", int(up))])
        add("fp4_dflash:event_loop_delay_seconds", "gauge", [("", round(loop_delay, 4))])
        add("fp4_dflash:request_workers_replaced_total", "counter", [("", restarts)])
        add("fp4_dflash:engine_steps_total", "counter", [("", counts["steps"])])
        ways = "".join(f',{part}="{way}"' for part, way in counts["launch"].items())
        add("fp4_dflash:launch_info", "gauge", [(ways, 1)])
        add("fp4_dflash:pages_held", "gauge", [(f',kind="{k}"', n) for k, n in found.held_pages.items()])
        add("fp4_dflash:requests_refused_total", "counter", [(f',status="{k}"', n) for k, n in sorted(self.refused.items())])
        return "\n".join(lines) + "\n"

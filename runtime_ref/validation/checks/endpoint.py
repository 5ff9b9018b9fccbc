"""Checks of a running server: does it serve the checkpoint's numbers, whatever engine it is?

Everything is judged against the reference model in float32, fed with the tokens that the server emitted ("teacher forced"): so
one different token does not spoil what follows, and an engine's rounding is told from its faults by how sure the reference is.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint.checksums import declared_digest
from runtime_ref.validation.checks.chat_template import DIALOGUE, THINKING_CAUSE
from runtime_ref.validation.checks.decoding import ACCEPTANCE_SHARE, OTHER_TARGET_CAUSE, Prompts, prices
from runtime_ref.validation.checks.files import STOP_CAUSE
from runtime_ref.validation.checks.sampling import CHI_SQUARE_Z, chi_square_z
from runtime_ref.validation.endpoint_client import Answer, Endpoint, Refused
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check

# The reference is sure of a token that leads by so many nats: bf16 engines' logits are off by a few hundredths.
SURE = 0.5
# Mean absolute difference of log-probabilities that rounding to bf16 explains with room to spare.
LOGPROB_ERROR = 0.1
BINS, SAMPLED_TOKENS, SIDE_BY_SIDE = 20, 16, 8
COUNT_CAUSE = "the server's tokenizer or chat template is not the checkpoint's: prompts become other tokens"
IDENTITY_CAUSE = "the server serves another checkpoint than this folder, or an earlier export of it"
SERVER_CAUSE = "the server computes something else than this checkpoint"
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Current weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"]}}}


@dataclass
class Served:
    """What the checks of a server share.

    Attributes:
        reference: model in float32, or None and why. ends: tokens that end an answer. samples: answers that are sampled.
        answers: greedy answers to `prompts.all`. counters: of drafting, before and after them.
    """

    endpoint: Endpoint
    prompts: Prompts
    tokenizer: object | None
    reference: torch.nn.Module | None
    absent: str
    ends: list[int]
    tokens: int
    samples: int = 64
    answers: list[Answer] = field(default_factory=list)
    counters: tuple[dict | None, dict | None] = (None, None)

    @torch.no_grad()
    def logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """The reference's logits [n, vocabulary] at the positions of an answer's tokens."""
        ids = torch.tensor([prompt + answer])
        return self.reference(input_ids=ids).logits[0, len(prompt) - 1:-1].float()


def check_identity(check: Check, server: Endpoint, folder: Path | None) -> None:
    """Whose files the server says that it loaded: the digest of its checksums, which this project's server tells."""
    theirs = server.cards[server.model].get("checksums")
    ours = declared_digest(folder) if folder is not None else None
    if theirs is None:
        check.leave_out("the server does not tell it (the checks below compare what it computes)")
    elif ours is None:
        check.leave_out("there are no checksums to compare with (give the exported folder)")
    elif theirs != ours:
        check.fail(f"the server's checkpoint has the checksums {str(theirs)[:40]}, this folder {ours}", IDENTITY_CAUSE)


def check_counts(check: Check, served: Served) -> None:
    """Prompt tokens that the server counts, for texts and for a conversation."""
    if served.tokenizer is None:
        check.leave_out("no tokenizer to count with (give the checkpoint's folder)")
        return
    texts = ["Hello, world!", "def f(x):\n    return x + 1\n", "Naïve café, 东京 😀", "  two  spaces\t\n\n"]
    rows, wrong = 0, 0
    for text in texts:
        expected = len(served.tokenizer(text)["input_ids"])
        bare = len(served.tokenizer(text, add_special_tokens=False)["input_ids"])
        found = served.endpoint.complete(text, max_tokens=1, temperature=0)[0].prompt_tokens
        rows += 1
        if found not in (expected, bare):
            wrong += 1
            check.fail(f"the server counts {found} tokens in {text!r}, the checkpoint's tokenizer {expected}", COUNT_CAUSE)
    if served.tokenizer.chat_template:
        ids = served.tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=True)["input_ids"]
        raw = served.endpoint.chat(DIALOGUE, max_tokens=1, temperature=0)
        found = (raw.get("usage") or {}).get("prompt_tokens")
        rows += 1
        if found != len(ids):
            check.fail(f"the server counts {found} tokens in a conversation, the checkpoint's template makes {len(ids)}",
                       THINKING_CAUSE if found in _other_switches(served.tokenizer) else COUNT_CAUSE)
    else:
        check.unchecked.append("conversations: the tokenizer has no chat template")
    check.measure(Number.REQUESTS, rows)


def _other_switches(tokenizer) -> set[int]:
    """Lengths of the conversation with thinking on and off, where the template knows that switch."""
    found = {len(tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=True,
                                               enable_thinking=on)["input_ids"]) for on in (True, False)}
    return found if len(found) > 1 else set()


def check_greedy(check: Check, served: Served) -> None:
    """Greedy tokens where the reference is sure, and their log-probabilities; keeps the answers."""
    before = served.endpoint.counters()
    for prompt in served.prompts.all:
        served.answers += served.endpoint.complete(prompt, max_tokens=served.tokens, temperature=0, logprobs=1)
    served.counters = before, served.endpoint.counters()
    check.measure(Number.PROMPTS, len(served.answers))
    if any(answer.tokens is None for answer in served.answers):
        check.unchecked.append("tokens: the server does not return their ids (return_token_ids)")
        check.leave_out("the server does not return token ids, and text does not say which tokens it was made of")
        return
    check.measure(Number.TOKENS, sum(len(answer.tokens) for answer in served.answers))
    if served.reference is None:
        check.leave_out(served.absent)
        return
    sure = equal = 0
    differences: list[float] = []
    rows = [["prompt", "tokens", "reference is sure", "equal there"]]
    for i, (prompt, answer) in enumerate(zip(served.prompts.all, served.answers, strict=True)):
        logits = served.logits(prompt, answer.tokens)
        emitted = torch.tensor(answer.tokens)
        top = logits.topk(2, dim=-1).values
        confident = top[:, 0] - top[:, 1] > SURE
        same = (logits.argmax(-1) == emitted) & confident
        sure, equal = sure + int(confident.sum()), equal + int(same.sum())
        rows.append([i, len(answer.tokens), int(confident.sum()), int(same.sum())])
        if answer.logprobs and len(answer.logprobs) == len(answer.tokens):
            expected = logits.log_softmax(-1).gather(1, emitted[:, None])[:, 0]
            differences += (torch.tensor(answer.logprobs) - expected).abs().tolist()
    check.tables[Table.ENDPOINT_GREEDY] = rows
    check.measure(Number.SURE_POSITIONS, sure)
    check.measure(Number.SURE_EQUAL, equal, sure)
    if not sure:
        check.unchecked.append("greedy tokens: the reference is nowhere sure of one")
    if equal < sure:
        first = next(row[0] for row in rows[1:] if row[3] < row[2])
        check.fail(f"{sure - equal} of {sure} tokens of which the reference is sure are others (prompt {first} first)",
                   SERVER_CAUSE)
    if not differences:
        check.unchecked.append("likelihoods: the server gives no log-probabilities of its tokens")
        return
    mean = sum(differences) / len(differences)
    check.measure(Number.WORST_LOGPROB, max(differences))
    check.measure(Number.MEAN_LOGPROB, mean, LOGPROB_ERROR)
    if mean > LOGPROB_ERROR:
        check.fail(f"log-probabilities differ by {mean:.3f} nats on average, expected at most {LOGPROB_ERROR}", SERVER_CAUSE)


def check_samples(check: Check, served: Served) -> None:
    """Sampled tokens against the reference's distributions, at every position, drafted or not.

    Tokens are ordered by their probability; where an emitted token falls in the cumulative distribution is uniform if it was
    drawn from it. A rule that accepts drafts too often prefers the likely ones and fills the lower bins.
    """
    if served.reference is None:
        check.leave_out(served.absent)
        return
    prompt = max(served.prompts.all, key=len)
    answers: list[Answer] = []
    for first in range(0, served.samples, SIDE_BY_SIDE):
        answers += served.endpoint.complete(prompt, max_tokens=SAMPLED_TOKENS, temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0,
                                            n=min(SIDE_BY_SIDE, served.samples - first), seed=1000 + first)
    if any(answer.tokens is None for answer in answers):
        check.leave_out("the server does not return token ids")
        return
    generator, places = torch.Generator().manual_seed(6), []
    for answer in answers:
        p = served.logits(prompt, answer.tokens).double().softmax(-1)
        own = p.gather(1, torch.tensor(answer.tokens)[:, None])
        likelier = torch.where(p > own, p, 0.0).sum(-1)
        places.append(likelier + torch.rand(len(answer.tokens), generator=generator, dtype=torch.float64) * own[:, 0])
    places = torch.cat(places)
    counts = torch.histc(places, bins=BINS, min=0, max=1)
    z = chi_square_z(counts, torch.full((BINS,), 1 / BINS, dtype=torch.float64))
    check.measure(Number.DRAWS, places.shape[0])
    check.measure(Number.CHI_SQUARE, z, CHI_SQUARE_Z)
    if z > CHI_SQUARE_Z:
        likely = float((places < 0.5).double().mean())
        check.fail(f"sampled tokens do not have the reference's distribution: chi-square z {z:.1f}, expected at most "
                   f"{CHI_SQUARE_Z}; {likely:.1%} fall in its likelier half",
                   "likely tokens come too often: drafts are accepted too often, or temperature, top-p or top-k is not what "
                   "was asked for" if likely > 0.5 else "unlikely tokens come too often: temperature is not what was asked for")


def check_acceptance_of(check: Check, served: Served, trained: dict | None) -> None:
    """Acceptance length from the server's own counters, over the greedy answers."""
    before, after = served.counters
    if not after:
        check.leave_out("the server has no counters of drafting at /metrics (vLLM's or SGLang's names), or does not draft")
        return
    if "drafts" in after:
        rounds = after["drafts"] - (before or {}).get("drafts", 0)
        if not rounds:
            check.leave_out("the server did not draft")
            return
        length = 1 + (after.get("accepted", 0) - (before or {}).get("accepted", 0)) / rounds
    else:
        length = after.get("length", 1.0)
    check.measure(Number.ACCEPTANCE, length)
    values = [v["task_t0"] for v in (trained or {}).values() if isinstance(v, dict) and "task_t0" in v]
    if not values:
        check.unchecked.append("whether it is the acceptance of training: nothing to compare with (--trained SUMMARY.json)")
        return
    expected = sum(values) / len(values)
    if length < ACCEPTANCE_SHARE * expected:
        check.fail(f"acceptance length {length:.2f}, training measured {expected:.2f}", OTHER_TARGET_CAUSE + ", or the server "
                   "feeds it something else (layers, positions, mask embedding, window, causality)")


def check_ends(check: Check, served: Served) -> None:
    """Where answers end, what they say of it, and how many tokens are counted."""
    if not served.answers or any(answer.tokens is None for answer in served.answers):
        check.leave_out("there are no token ids to look at")
        return
    ends = set(served.ends)
    for i, answer in enumerate(served.answers):
        early = [n for n, token in enumerate(answer.tokens[:-1]) if token in ends]
        ended = bool(answer.tokens) and answer.tokens[-1] in ends
        if early:
            check.fail(f"prompt {i}: the answer runs on after the end token {answer.tokens[early[0]]}", STOP_CAUSE)
        if answer.finish == "length" and len(answer.tokens) != served.tokens:
            check.fail(f"prompt {i}: finish_reason 'length' after {len(answer.tokens)} of {served.tokens} tokens", STOP_CAUSE)
        if answer.finish == "stop" and not ended and served.reference is not None:
            logits = served.logits(served.prompts.all[i], [*answer.tokens, 0])[-1]  # the end token may be left out
            if int(logits.argmax()) not in ends:
                check.fail(f"prompt {i}: finish_reason 'stop', where the reference goes on", STOP_CAUSE)
        if answer.completion_tokens is not None and abs(answer.completion_tokens - len(answer.tokens)) > 1:
            check.fail(f"prompt {i}: usage counts {answer.completion_tokens} tokens, {len(answer.tokens)} came",
                       "the server's counts of tokens are not those of its answers")
    check.measure(Number.REQUESTS, len(served.answers))


def check_tools(check: Check, served: Served) -> None:
    """A forced tool call must be one: JSON that fits the function's schema."""
    question = [{"role": "user", "content": "What will the weather be in Oslo for the next 3 days? Use the tool."}]
    rows = [["tool_choice", "call"]]
    for choice in ("auto", "required"):
        try:
            raw = served.endpoint.chat(question, tools=[WEATHER], tool_choice=choice, max_tokens=256, temperature=0)
        except Refused as error:
            check.unchecked.append(f"tool_choice {choice!r}: the server does not support it ({error})")
            continue
        message = (raw.get("choices") or [{}])[0].get("message") or {}
        calls = message.get("tool_calls") or []
        faults = [fault for call in calls if (fault := tool_call_fault(call))]
        cut = (raw.get("choices") or [{}])[0].get("finish_reason") == "length"
        rows.append([choice, "cut at 256 tokens" if cut else f"{len(calls)} calls" if calls else "none"])
        if cut:
            check.unchecked.append(f"tool_choice {choice!r}: the answer was cut at 256 tokens")
        elif faults:
            check.fail(f"tool_choice {choice!r}: {faults[0]}", "tool calls are not parsed or constrained as the schema says")
        elif not calls and choice == "required":
            check.fail("tool_choice 'required': no call in the answer", "tool_choice is ignored")
        elif not calls:
            check.notes.append("tool_choice 'auto': the model made no call")
    check.tables[Table.TOOLS] = rows
    if len(rows) == 1:
        check.leave_out("the server does not support tools")


def tool_call_fault(call: dict) -> str | None:
    """What is wrong with a call of WEATHER, or None."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or function.get("name") != "get_weather":
        return f"a call of {function.get('name') if isinstance(function, dict) else function!r}, expected get_weather"
    try:
        arguments = json.loads(function.get("arguments") or "")
    except (ValueError, TypeError):
        return f"arguments that are no JSON: {str(function.get('arguments'))[:80]!r}"
    schema = WEATHER["function"]["parameters"]
    kinds = {"string": str, "integer": int}
    for key in schema["required"]:
        if not isinstance(arguments, dict) or not isinstance(arguments.get(key), kinds[schema["properties"][key]["type"]]):
            return f"arguments {arguments!r}, expected {key} of type {schema['properties'][key]['type']}"
    return None


def check_speed(check: Check, served: Served, node_hour: float | None) -> None:
    """Tokens per second of one sequence and of eight, as served and, where the server can, without drafts; what they cost."""
    prompts = served.prompts.all[:4]

    def rate(**fields) -> float:
        answers = [served.endpoint.complete(p, max_tokens=served.tokens, temperature=0, ignore_eos=True, **fields)[0]
                   for p in prompts]
        return sum(a.completion_tokens or len(a.tokens or []) for a in answers) / sum(a.seconds for a in answers)

    def rounds() -> float | None:
        return (served.endpoint.counters() or {}).get("drafts")

    speeds, before = {Number.SPEED_SERVED: rate()}, rounds()
    try:
        plain = rate(speculate=False)
    except Refused:
        plain = None
    if plain is not None and before is not None and rounds() == before:
        speeds[Number.SPEED_PLAIN] = plain
    else:  # refused, or taken for a field that means nothing
        check.unchecked.append("tokens/s without drafts: the server cannot turn them off for a request")
    with ThreadPoolExecutor(8) as pool:
        import time

        began = time.perf_counter()
        many = list(pool.map(lambda i: served.endpoint.complete(
            prompts[i % len(prompts)], max_tokens=served.tokens, temperature=0, ignore_eos=True)[0], range(8)))
        speeds[Number.SPEED_EIGHT] = sum(a.completion_tokens or len(a.tokens or []) for a in many) / (
            time.perf_counter() - began)
    check.numbers |= speeds
    if node_hour is not None:
        check.numbers |= prices(speeds, node_hour)

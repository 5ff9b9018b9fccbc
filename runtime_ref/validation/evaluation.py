"""`--eval`: what quantization cost, in the field's own terms. `quick` on text, `tasks` through lm-eval, `tools`.

quick   perplexity of the served runtime, and against the original, token by token: KL (mean, 90 % and 99 %), same top-1 token,
        RMS of the probability differences of the actual token, flips. The figures that llama.cpp prints for a quantized model.
tasks   lm-eval, twice on the same questions: the original and FP4, each through an OpenAI-compatible server
        (`local-completions`) or, for an original that has none, lm-eval's own transformers backend. Tasks are local: JSONL
        files of questions and answers, or lm-eval's task names with a folder of YAML files. Recovery, a paired test and the
        noise floor are printed.
tools   validity of tool calls at the server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling.prompt_files import read_rows
from runtime_ref.validation.guard import UserMistake
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check

WINDOW, MOST_TOKENS = 256, 65_536


@dataclass
class TokenStatistics:
    """Values of each token of a text, of a model and its original; `add` takes logits [n, V] and the tokens [n] after them."""

    losses: list[torch.Tensor]
    base_losses: list[torch.Tensor]
    kl: list[torch.Tensor]
    delta: list[torch.Tensor]
    same: list[torch.Tensor]
    right: list[torch.Tensor]
    base_right: list[torch.Tensor]

    @classmethod
    def empty(cls) -> TokenStatistics:
        return cls(*([] for _ in range(7)))

    def add(self, logits: torch.Tensor, base: torch.Tensor | None, tokens: torch.Tensor) -> None:
        own = logits.float().log_softmax(-1)
        chosen = own.gather(1, tokens[:, None])[:, 0]
        self.losses.append(-chosen)
        self.right.append(own.argmax(-1) == tokens)
        if base is None:
            return
        other = base.float().log_softmax(-1)
        base_chosen = other.gather(1, tokens[:, None])[:, 0]
        self.base_losses.append(-base_chosen)
        self.kl.append((other.exp() * (other - own)).sum(-1).clamp_min(0))
        self.delta.append(chosen.exp() - base_chosen.exp())
        self.same.append(own.argmax(-1) == other.argmax(-1))
        self.base_right.append(other.argmax(-1) == tokens)

    def numbers(self) -> dict[Number, float | int | str]:
        losses = torch.cat(self.losses).double()
        found = {Number.TOKENS: losses.numel(), Number.PERPLEXITY: math.exp(float(losses.mean()))}
        if not self.kl:
            return found
        kl, delta = torch.cat(self.kl).double(), torch.cat(self.delta).double()
        right, base = torch.cat(self.right), torch.cat(self.base_right)
        lost, won = int((base & ~right).sum()), int((right & ~base).sum())
        return found | {
            Number.PERPLEXITY_ORIGINAL: math.exp(float(torch.cat(self.base_losses).double().mean())),
            Number.KL_MEAN: float(kl.mean()), Number.KL_ERROR: float(kl.std() / kl.numel()**0.5) if kl.numel() > 1 else 0.0,
            Number.KL_90: float(kl.quantile(0.9)), Number.KL_99: float(kl.quantile(0.99)), Number.KL_MAX: float(kl.max()),
            Number.SAME_TOP: float(torch.cat(self.same).double().mean()),
            Number.RMS_PROBABILITY: float(delta.square().mean().sqrt()), Number.FLIPS: f"{lost}, {won}"}


def read_texts(path: Path, tokenizer) -> list[list[int]]:
    """Tokens of the texts of a file: .txt, or JSON lines with `text`, or `prompt` and an answer if there is one.

    Raises:
        UserMistake: no text.
    """
    if path.suffix == ".jsonl":
        try:
            rows = [row for _, row in read_rows(path, "--eval-text")]
        except ValueError as error:
            raise UserMistake(str(error)) from None
        parts = ("prompt", "question", "answer")
        texts = [row.get("text") or "\n".join(str(row[k]) for k in parts if row.get(k)) for row in rows]
    else:
        texts = [path.read_text(encoding="utf-8", errors="replace")]
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise UserMistake(f"--eval-text: {path}: no text, expected a .txt file or lines with text (or prompt)")
    return found


def windows(texts: list[list[int]], size: int = WINDOW, most: int = MOST_TOKENS) -> list[list[int]]:
    """Pieces of at most `size` tokens, `most` in all; each is predicted from its own beginning."""
    found, count = [], 0
    for ids in texts:
        for start in range(0, len(ids) - 1, size):
            piece = ids[start:start + size]
            if len(piece) > 1 and count < most:
                found.append(piece)
                count += len(piece)
    return found


@torch.no_grad()
def check_quick(check: Check, logits_of, base, texts: list[list[int]]) -> None:
    """Adds the figures of a text.

    Args:
        logits_of: tokens -> logits [n, V] of what is served. base: the original as a causal model, or None.
    """
    statistics = TokenStatistics.empty()
    for piece in windows(texts):
        following = torch.tensor(piece[1:])
        other = None if base is None else base(input_ids=torch.tensor([piece])).logits[0, :-1]
        own = logits_of(piece)[:-1]
        if other is not None and other.shape != own.shape:
            raise UserMistake(f"--original has {other.shape[1]} tokens in its vocabulary, the folder {own.shape[1]}")
        statistics.add(own, other, following)
    check.numbers |= statistics.numbers()
    if base is None:
        check.unchecked.append("KL, top-1 and flips: there is no original to compare with (--original DIR)")
    if not math.isfinite(check.numbers[Number.PERPLEXITY]):
        check.fail("the perplexity is not finite", "a weight is not finite, or the runtime overflows")


def paired(base: list[bool], own: list[bool]) -> dict[str, float]:
    """Two results on the same questions: shares, recovery, exact McNemar test, noise floor.

    noise_floor: half the 95 % interval of the difference of the two shares, paired, in points; a difference below it says
    nothing. p: probability of so uneven flips if both models are equally good.
    """
    n, lost, won = len(base), sum(b and not o for b, o in zip(base, own, strict=True)), sum(
        o and not b for b, o in zip(base, own, strict=True))
    flips, share, other = lost + won, sum(own) / n, sum(base) / n
    tail = sum(math.comb(flips, k) for k in range(min(lost, won) + 1)) / 2**flips if flips else 1.0
    variance = max(0.0, (flips - (lost - won) ** 2 / n)) / n**2
    return {"original": other, "fp4": share, "recovery": share / other if other else float("nan"), "lost": lost, "won": won,
            "p": min(1.0, 2 * tail), "noise_floor": 196 * variance**0.5}


def local_task(path: Path) -> dict:
    """A task for lm-eval of a JSONL file with `prompt` (or `question`) and `answer`: greedy, exact match.

    Numbers are compared as the last number of the answer (GSM8K's "#### 72" included), other answers as text.
    """
    rows = [row for _, row in read_rows(path, "--eval-tasks")]
    texts = [(row.get("answer"), row.get("prompt", row.get("question"))) for row in rows]
    if not texts or not all(isinstance(text, str) for pair in texts for text in pair):
        raise UserMistake(f"--eval-tasks: {path}: expected lines with prompt (or question) and answer, both text")
    numeric = all(last_number(row["answer"]) is not None for row in rows)
    return {"task": path.stem, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
            "test_split": "test", "output_type": "generate_until", "num_fewshot": 0,
            "doc_to_text": lambda doc: doc.get("prompt") or f"Question: {doc['question']}\nAnswer:",
            "doc_to_target": lambda doc: last_number(doc["answer"]) if numeric else doc["answer"].strip(),
            "process_results": lambda doc, found: {"exact_match": float(
                last_number(found[0]) == last_number(doc["answer"]) if numeric else found[0].strip() == doc["answer"].strip())},
            "generation_kwargs": {"until": ["\nQuestion:", "\n\n\n"], "max_gen_toks": 256, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands separators and trailing zeros."""
    import re

    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def run_lm_eval(model: str | object, arguments: dict | None, tasks: list, folder: Path | None, limit: int | None,
                chat: bool) -> dict[str, list[bool]]:
    """Task -> whether each question was answered rightly, in the order of the questions.

    Args:
        model: lm-eval's name of a backend with its arguments, or a model of its.

    Raises:
        UserMistake: lm-eval is not installed, or an unknown task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserMistake("--eval tasks: lm-eval is not installed; expected: pip install -e '.[eval]'") from None
    try:
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=tasks, limit=limit, log_samples=True, bootstrap_iters=0,
            apply_chat_template=chat, task_manager=TaskManager(include_path=str(folder) if folder else None))
    except KeyError as error:
        raise UserMistake(f"--eval-tasks: {error}: no such task of lm-eval") from None
    return {task: [_is_right(s) for s in sorted(samples, key=lambda s: s["doc_id"])]
            for task, samples in found["samples"].items()}


def _is_right(sample: dict) -> bool:
    """lm-eval names the metrics of a sample; the first of the usual ones decides."""
    for name in ("exact_match", "acc_norm", "acc", "pass@1", "prompt_level_strict_acc"):
        if name in sample:
            return bool(sample[name])
    raise UserMistake(f"--eval-tasks: samples have {sorted(sample.get('metrics', []))}, expected exact_match or acc")


def check_tasks(check: Check, own: dict[str, list[bool]], base: dict[str, list[bool]] | None) -> None:
    """Adds the table of recovery; FP4 that is significantly worse is told, not failed: it is what quantization cost."""
    rows = [["task", "questions", "original", "FP4", "recovery", "lost", "won", "p (paired)", "noise floor (points)"]]
    for task, results in own.items():
        if base is None:
            rows.append([task, len(results), "-", sum(results) / len(results), "-", "-", "-", "-", "-"])
            continue
        t = paired(base[task], results)
        rows.append([task, len(results), *(t[k] for k in ("original", "fp4", "recovery", "lost", "won", "p", "noise_floor"))])
        if t["p"] < 0.05 and t["lost"] > t["won"]:
            check.notes.append(f"{task}: FP4 is worse than the original (p = {t['p']:.3g}): "
                               f"{100 * (t['fp4'] - t['original']):+.1f} points, noise floor {t['noise_floor']:.1f}")
    check.tables[Table.TASKS] = rows
    check.measure(Number.PROMPTS, sum(map(len, own.values())))
    if base is None:
        check.unchecked.append("recovery: there is no original to compare with (--original DIR, or --original-endpoint URL)")

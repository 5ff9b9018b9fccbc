"""Self-distillation data: the target answers prompts; its answers are what the drafter learns to foresee.

Work is cut into batches of prompts of similar length, each with its own random generator (seed, pass, batch), so that a
killed run continues at the first missing batch and N processes that share the batches write what one would.

    <run>/data/answers-<key>.jsonl    one line per answer: prompt_ids, response_ids, temperature, ended, prompt's own fields
    <run>/data/answers-<key>.json     provenance: target, settings, counts, environment

`key` is a digest of everything that determines the answers, so that another recipe never reuses them by mistake.

With `endpoint` the same answers come from any OpenAI-compatible server of the target (vLLM, SGLang, this project's own).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from dflash_train.dialogues import Dialogue, read_jsonl, row_prompt
from dflash_train.endpoint import Endpoint
from dflash_train.reference_decoding import by_length, generate, in_batches
from dflash_train.target import TargetFiles, describe_target, identity
from modeling.dialogue_tokens import Rendering
from recipes.schema import Recipe
from storage.files import write_text
from storage.reading import json_lines, require_file
from storage.revision import git_revision
from storage.terminal import counted
from training.data_files import expand
from training.report import ProgressBar, environment

KEY = "dflash.regenerate.prompts"


@dataclass(frozen=True)
class Batch:
    """Prompts (indices) answered side by side in one pass."""

    number: int
    pass_index: int
    prompts: list[int]


def regenerated(recipe: Recipe, target: TargetFiles, folder: Path, *, accelerator=None,
                say: Callable[[str], None] = print) -> list[Dialogue]:
    """The answers that the recipe asks for, from disk if they are there, generated otherwise.

    Args:
        target: a `Target`, or, where `dflash.regenerate.endpoint` answers, its files alone.

    Raises:
        ValueError: no prompts, an unreadable prompt file, no prompt for a pass, prompts longer than a row.
        OSError: the endpoint does not answer.
    """
    path = answer_file(recipe, target, folder)
    if not path.is_file():
        generate_answers(recipe, target, path, accelerator=accelerator, say=say)
    rows = stored_answers(path, target)
    judge_answers(rows, target.end_ids, say)
    return [Dialogue(r["prompt_ids"], r["response_ids"]) for r in rows]


def stored_answers(path: Path, target: TargetFiles) -> list[dict]:
    """The rows of a file of this module. Raises ValueError, with the line: damaged, or of another vocabulary."""
    rows, vocabulary = [], target.vocabulary
    for number, row in json_lines(path):
        ids = [row.get(key) for key in ("prompt_ids", "response_ids")] if row else [None]
        if not all(isinstance(part, list) and all(type(i) is int and 0 <= i < vocabulary for i in part) for part in ids):
            raise ValueError(f"{path}:{number}: expected token ids of 0 to {vocabulary - 1}; remove the file, and the target "
                             "answers again")
        rows.append(row)
    return rows


def judge_answers(rows: list[dict], end_ids: list[int], say: Callable[[str], None] = print) -> None:
    """Says how many answers are empty or cut.

    Raises:
        ValueError: most are empty: the model does not answer prompts that are rendered like this.
    """
    empty = sum(all(token in end_ids for token in row["response_ids"]) for row in rows)
    cut = sum(not row["ended"] for row in rows)
    if 2 * empty > len(rows):
        raise ValueError(f"{KEY}: {empty} of {len(rows)} answers are empty; are the prompts what the model expects? "
                         "chat.prompts says whether the chat template renders them")
    if empty or cut:
        say(f"{counted(len(rows), 'answer')}: {empty} empty, {cut} cut at their limit of tokens")


def answer_file(recipe: Recipe, target: TargetFiles, folder: Path) -> Path:
    """Where the answers of this recipe and target are or will be."""
    settings = recipe.dflash.regenerate
    if not settings.prompts:
        raise ValueError("dflash.regenerate.prompts: required (JSONL files of prompts), unless dflash.data names own dialogues")
    facts = {"settings": settings.model_dump(exclude={"prompts", "endpoint"}), "chat": recipe.chat.model_dump(),
             "target": identity(target, recipe),
             "seed": recipe.seed, "room": recipe.dflash.sequence_length,
             "prompts": [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in expand(settings.prompts, KEY)]}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "data" / f"answers-{key}.jsonl"


def generate_answers(recipe: Recipe, target: TargetFiles, path: Path, *, accelerator=None,
                     say: Callable[[str], None] = print) -> None:
    """Writes `path` and its provenance; continues from what an interrupted run left."""
    settings = recipe.dflash.regenerate
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows = read_jsonl(settings.prompts, KEY)
    rendering = Rendering(recipe.chat.prompts, recipe.chat.template_options)
    ids = [row_prompt(row, settings.prompt_field, target.tokenizer, KEY, rendering) for row in rows]
    if not rows:
        raise ValueError(f"{KEY}: {', '.join(settings.prompts)}: no prompt there")
    batches = plan_batches(recipe, rows, ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".rank{rank}.partial")
    _cut(partial)
    done = {number for part in _partials(path) for number, _ in _whole_batches(part)}
    mine = [b for b in batches if b.number % processes == rank]
    answers, room = sum(len(b.prompts) for b in batches), recipe.dflash.sequence_length - 2
    if too_long := sum(len(i) > room for i in ids):
        say(f"{too_long} of {len(rows)} prompts are longer than dflash.sequence_length - 2 = {room} tokens: left out")
    began, tokens = time.monotonic(), 0
    say(f"the target answers {counted(len(rows), 'prompt')}: {counted(answers, 'answer')} in "
        f"{counted(len(batches), 'batch', 'batches')}"
        + (f", {len(done)} of them done before" if done else ""))
    endpoint = Endpoint(settings, target, say) if settings.endpoint and mine else None
    bar = ProgressBar(len(mine), len(done & {b.number for b in mine}), enabled=rank == 0, every=10, label="answers",
                      unit="answers: batch")
    missing = [b for b in mine if b.number not in done]
    with partial.open("a", encoding="utf-8") as out:
        for position, (batch, responses) in enumerate(_answered(recipe, target, missing, ids, endpoint),
                                                      1 + len(mine) - len(missing)):
            temperature = settings.passes[batch.pass_index].temperature
            lines = [_line(rows[i], ids[i], response, temperature, target) | {"batch": batch.number}
                     for i, response in zip(batch.prompts, responses, strict=True)]
            tokens += sum(map(len, responses))
            out.write("".join(json.dumps(line) + "\n" for line in [*lines, {"finished": batch.number}]))
            out.flush()
            bar.update(position, f"{tokens / max(1e-9, time.monotonic() - began):,.0f} tok/s")
    bar.close()
    target.rest()
    if accelerator:
        accelerator.wait_for_everyone()
    if rank == 0:
        _merge(path, {"target": describe_target(target, recipe), "settings": settings.model_dump(mode="json"),
                      "seed": recipe.seed, "git_revision": git_revision(), "environment": environment()})
    if accelerator:
        accelerator.wait_for_everyone()


def plan_batches(recipe: Recipe, rows: list[dict], ids: list[list[int]]) -> list[Batch]:
    """Batches of all passes, prompts sorted by length within a pass.

    Raises:
        ValueError: a pass without prompts; prompts that leave no room for an answer in a row.
    """
    settings, room = recipe.dflash.regenerate, recipe.dflash.sequence_length - 2
    batches: list[Batch] = []
    for index, one in enumerate(settings.passes):
        chosen = [i for i, row in enumerate(rows) if all(str(row.get(k)) == v for k, v in one.where.items())]
        if not chosen:
            raise ValueError(f"dflash.regenerate.passes.{index}.where: {one.where} matches none of {len(rows)} prompts")
        if one.prompts is not None and one.prompts < len(chosen):
            chosen = [chosen[i * len(chosen) // one.prompts] for i in range(one.prompts)]
        short = [i for i in chosen if len(ids[i]) <= room]
        if not short:
            raise ValueError(f"{KEY}: every prompt is longer than dflash.sequence_length - 2 = {room} tokens")
        order = [short[i] for i in by_length(short, lambda i: len(ids[i])) for _ in range(one.samples)]
        batches += [Batch(len(batches) + n, index, part) for n, part in enumerate(in_batches(order, settings.batch_size))]
    return batches


def _partials(path: Path) -> list[Path]:
    """What processes have written so far, those of an earlier run included, which may have been more or fewer."""
    return sorted(path.parent.glob(f"{path.stem}.rank*.partial"))


def _whole_batches(partial: Path) -> Iterator[tuple[int, list[dict]]]:
    """(number, lines) of the batches that are whole in a partial file, up to the place where its writer was killed."""
    pending: list[dict] = []
    require_file(partial)
    for line in partial.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if "finished" in row:
            yield row["finished"], pending
            pending = []
        else:
            pending.append(row)


def _cut(partial: Path) -> None:
    """Cuts a partial file after its last whole batch, so that it can be written on."""
    if partial.exists():
        kept = [line for number, lines in _whole_batches(partial) for line in [*lines, {"finished": number}]]
        write_text(partial, "".join(json.dumps(line) + "\n" for line in kept))


def _merge(path: Path, facts: dict) -> None:
    """One copy of every batch, in order, without the markers; provenance first, so that answers imply it."""
    parts, batches = _partials(path), {}
    for part in parts:
        for number, rows in _whole_batches(part):
            batches.setdefault(number, rows)
    lines = [line for number in sorted(batches) for line in batches[number]]
    counts = {"answers": len(lines), "tokens": sum(len(r["response_ids"]) for r in lines),
              "ended": sum(r["ended"] for r in lines) / len(lines)}
    write_text(path.with_suffix(".json"), json.dumps(facts | counts, indent=1))
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    for part in parts:
        part.unlink()


def _line(row: dict, prompt: list[int], response: list[int], temperature: float, target: TargetFiles) -> dict:
    kept = {k: row[k] for k in ("id", "domain", "kind") if k in row}
    return kept | {"prompt_ids": prompt, "response_ids": response, "temperature": temperature,
                   "ended": response[-1] in target.end_ids, "text": target.tokenizer.decode(response)}


def _answered(recipe: Recipe, target: TargetFiles, batches: list[Batch], ids: list[list[int]],
              endpoint: Endpoint | None) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Each batch with its answers, in order. A server gets the next batch's prompts while the last answers of one are written:
    it always has `batch_size` to write."""
    settings, asked = recipe.dflash.regenerate, deque()
    pool = ThreadPoolExecutor(settings.batch_size)
    try:
        for batch in batches:
            temperature, prompts = settings.passes[batch.pass_index].temperature, [ids[i] for i in batch.prompts]
            # No answer is longer than its row has room for.
            limits = [min(settings.max_new_tokens, recipe.dflash.sequence_length - len(prompt)) for prompt in prompts]
            if endpoint is None:
                generator = torch.Generator(target.device).manual_seed((recipe.seed << 32) + batch.number)
                yield batch, generate(target, prompts, max_new_tokens=limits, temperature=temperature, generator=generator)
                continue
            seeds = [recipe.seed * 1_000_003 + batch.number * 4096 + i for i in range(len(prompts))]
            asked.append((batch, [pool.submit(endpoint.answer, prompt, temperature, limit, seed)
                                  for prompt, limit, seed in zip(prompts, limits, seeds, strict=True)]))
            if len(asked) > 1:
                yield _finished(*asked.popleft())
        for one in asked:
            yield _finished(*one)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(batch: Batch, answers: list[Future]) -> tuple[Batch, list[list[int]]]:
    return batch, [answer.result() for answer in answers]

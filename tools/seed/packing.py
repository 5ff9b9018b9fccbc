"""Token streams for pretraining the seed: documents packed into rows of equal length, one stream per domain.

Each stream is one flat uint16 array of documents separated by the end-of-text token, cut into rows of `length + 1`
tokens (inputs and shifted targets share them). Rows are visited in a seeded order, each once per pass, so the position
of the whole loader is one counter per stream: that is all a resumed run needs.

Attention runs across the documents of a row. Masking it off was rejected: at 512 tokens a row it costs an irregular
mask and, for a causal model that sees the end-of-text token, changes nothing that matters here.
"""

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.seed import tasks
from tools.seed.build_tokenizer import ASSISTANT, END, USER

STREAMS = ("code", "prose", "math", "tasks")
MAX_DOCUMENT = {"code": 12_000, "prose": 60_000, "math": 12_000}
TASK_COUNT = 80_000
# Shares of the pretraining draws, by what each task costs to learn: a sentence is right after 1 million task tokens, when
# renaming and arithmetic are still wrong. (Held-out prompts are drawn evenly over domains.)
TASK_MIX = {tasks.rename_task: 7, tasks.constant_task: 4, tasks.sentence_task: 1, tasks.docstring_task: 3,
            tasks.json_task: 3, tasks.arithmetic_task: 9}
TOKENS_WANTED = 8_000_000  # per stream; more than any run of an hour or two on CPU reads


def chat_text(instruction: str, answer: str) -> str:
    """One task as training text: the chat template's rendering of a user and an assistant turn."""
    return f"{USER}{instruction}{ASSISTANT}{answer}{END}"


def read_prompts(name: str = "prompts.jsonl") -> list[dict]:
    """The frozen prompts (`prompts.jsonl`: held out; `prompts.train.jsonl`: training side); empty before they exist."""
    path = Path(__file__).resolve().parents[2] / "recipes/seed" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def load_documents(work: Path, domain: str, seed: int) -> list[str]:
    """Training documents of `work/{domain}.jsonl` in a seeded order, long ones cut to `MAX_DOCUMENT` characters."""
    with (work / f"{domain}.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"][: MAX_DOCUMENT[domain]] for line in file]
    random.Random(f"{seed}/{domain}").shuffle(texts)
    return texts


def function_pool(texts: list[str]) -> list[str]:
    """Distinct short real functions of the given Python files."""
    return sorted({function for text in texts for function in tasks.short_functions(text)})


def build_streams(work: Path, tokenizer: Tokenizer, out: Path, *, seed: int, task_count: int = TASK_COUNT) -> None:
    """Write `out/{stream}.npy` (flat uint16) for every stream of `STREAMS`."""
    out.mkdir(parents=True, exist_ok=True)
    for domain in ("code", "prose", "math"):
        texts = load_documents(work, domain, seed)
        if domain == "code":
            pool = function_pool(texts)
        _write(out / f"{domain}.npy", tokenizer, [text + END for text in texts])
    drawn = draw_tasks(seed, pool, task_count)
    _write(out / "tasks.npy", tokenizer, [chat_text(t.instruction, t.answer) for t in drawn])


def draw_tasks(seed: int, pool: list[str], count: int) -> list[tasks.Task]:
    """The pretraining tasks: `count` draws in the shares of `TASK_MIX`, less the ones frozen as held-out prompts."""
    frozen = {p["instruction"] for p in read_prompts() if p["kind"] == "task"}
    rng = random.Random(f"{seed}/tasks")
    makers = rng.choices(list(TASK_MIX), weights=list(TASK_MIX.values()), k=count)
    drawn = (make(rng, pool) if make in tasks.GENERATORS["code"] else make(rng) for make in makers)
    return [task for task in drawn if task.instruction not in frozen]


def _write(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    parts, total = [], 0
    for begin in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[begin : begin + 1000]):
            parts.append(np.array(encoding.ids, dtype=np.uint16))
            total += len(parts[-1])
        if total > TOKENS_WANTED:
            break
    np.save(path, np.concatenate(parts))


class RowLoader:
    """Batches with a fixed number of rows per stream.

    `rows` maps a stream to its rows per batch. `next_batch()` returns (tokens int64 [rows, length + 1], stream of each
    row). `state()` and `restore(state)` carry the position.
    """

    def __init__(self, folder: Path, rows: dict[str, int], length: int, seed: int):
        self.rows, self.length, self.seed = {s: n for s, n in rows.items() if n}, length, seed
        self.data = {s: np.load(folder / f"{s}.npy", mmap_mode="r") for s in self.rows}
        self.position = dict.fromkeys(self.rows, 0)
        self._order: dict[str, tuple[int, np.ndarray]] = {}

    def row_count(self, stream: str) -> int:
        return (len(self.data[stream]) - 1) // self.length

    def _row(self, stream: str, position: int) -> np.ndarray:
        epoch, index = divmod(position, self.row_count(stream))
        if stream not in self._order or self._order[stream][0] != epoch:
            generator = np.random.default_rng([self.seed, STREAMS.index(stream), epoch])
            self._order[stream] = (epoch, generator.permutation(self.row_count(stream)))
        begin = int(self._order[stream][1][index]) * self.length
        return self.data[stream][begin : begin + self.length + 1]

    def next_batch(self) -> tuple[np.ndarray, list[str]]:
        picked, names = [], []
        for stream, count in self.rows.items():
            for _ in range(count):
                picked.append(self._row(stream, self.position[stream]))
                self.position[stream] += 1
                names.append(stream)
        return np.stack(picked).astype(np.int64), names

    def epochs(self) -> dict[str, float]:
        return {s: round(p / self.row_count(s), 3) for s, p in self.position.items()}

    def state(self) -> dict[str, int]:
        return dict(self.position)

    def restore(self, state: dict[str, int]) -> None:
        self.position.update(state)

"""Text -> packed token sequences, in an order that a resumed run can rejoin exactly.

Documents are tokenized, each followed by the end-of-text token, joined, and cut into rows of `sequence_length` tokens;
no padding, and only what remains after the last document is dropped. A document is a row of a table (a line of a .jsonl
file), or a whole .txt file, line breaks included: to end it at each line would teach that texts are one line long.
Loading, tokenizing and caching is the `datasets` library's (memory-mapped Arrow: a corpus need not fit in memory). The
order of rows in epoch e is a permutation drawn from (seed, e), so the position in the data is one integer: rows
consumed.

With `data.loss_on: answers` a token that nobody is to learn to say is stored as its complement, ~id: rows stay one column, and
their digest covers the mask. `split_rows` takes them apart. Rows without an answer are left out.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader

from modeling.dialogue_tokens import AUTO, Rendering, begin_ids, dialogue_tokens, said_by_assistant
from modeling.prompt_files import open_data
from recipes.schema import Data, Source
from storage.digests import json_digest
from storage.reading import first_line
from storage.terminal import counted
from training.data_files import expand, format_of, json_rows
from training.epoch_order import EpochOrder

COUNTS = ("documents", "long", "empty")  # of the packer, beside the rows that they became
WHERE = "_where"  # in a dialogue on its way to the packer: key, file and line, for messages
# What a dialogue is made of (`modeling.dialogue_tokens`).
DIALOGUE_FIELDS = ("messages", "conversations", "prompt", "response", "completion", "tools")


def packed_dataset(sources: list[str | Source], tokenizer, data: Data, *, key: str = "data.train",
                   rendering: Rendering = AUTO, seed: int = 0, say: Callable[[str], None] | None = None):
    """A `datasets.Dataset` with column input_ids: lists of exactly `sequence_length` token ids.

    Args:
        sources: local files, globs, save_to_disk folders, "hub:NAME", or sources with keys of their own.
        tokenizer: transformers tokenizer with an end-of-text token.
        key: recipe key for error messages.
        rendering: how dialogues become tokens.
        seed: of the order in which weighted sources are mixed.
        say: called with a line for documents that are longer than a row, and one for rows of a table that hold none.

    Raises:
        ValueError: no such file, an unreadable one (with file and line), no such column or one that is not text, an empty
            result, a hub that cannot be reached, a tokenizer without an end-of-text token.
    """
    import datasets

    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: the tokenizer has no end-of-text token to separate documents with")
    parts = [_source(Source(hub=s.removeprefix("hub:")) if isinstance(s, str) and s.startswith("hub:") else
                     Source(path=s) if isinstance(s, str) else s, data.text_field, key) for s in sources]
    weights = [None if isinstance(s, str) else s.weight for s in sources]
    if all(weight is None for weight in weights):
        raw = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    else:
        shares = torch.tensor([weight or 1.0 for weight in weights], dtype=torch.float64)
        raw = datasets.interleave_datasets(parts, probabilities=(shares / shares.sum()).tolist(), seed=seed,
                                           stopping_strategy="all_exhausted")
    # In this process, batch after batch: a batch's rest begins the next one's first row.
    try:
        packed = raw.map(Packer(tokenizer, data.sequence_length, rendering, answers_only=data.loss_on == "answers"),
                         batched=True, batch_size=1000, remove_columns=raw.column_names, desc=f"tokenizing {key}")
    except ValueError as error:
        text = first_line(error)
        raise ValueError(text if text.startswith(f"{key}: ") else f"{key}: {text}") from None
    if len(packed) == 0:
        raise ValueError(f"{key}: fewer than sequence_length={data.sequence_length} tokens in all"
                         + (", or no answer in them (data.loss_on: answers)" if data.loss_on == "answers" else ""))
    if say is not None:
        _say_counts(packed, data.sequence_length, key, say)
    return packed.remove_columns(list(COUNTS)).with_format("torch")


def _say_counts(packed, length: int, key: str, say: Callable[[str], None]) -> None:
    documents, long, empty = (int(pc.sum(packed.data.column(name)).as_py() or 0) for name in COUNTS)
    if long:
        say(f"{key}: {long:,} of {counted(documents, 'document')} longer than data.sequence_length={length} tokens: they go on "
            "in the next rows, which do not see how they begin")
    if empty:
        say(f"{key}: {counted(empty, 'row')} left out, without text or dialogue (null)")


def split_rows(rows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(token ids, which positions a loss covers) of packed rows, int64 and bool [B, T]; None where it covers all.

    A position counts if the token after it is to be learned; the last one of a masked row does not.
    """
    if bool((rows_BT >= 0).all()):
        return rows_BT, None
    ids = torch.where(rows_BT < 0, ~rows_BT, rows_BT)
    return ids, torch.nn.functional.pad(rows_BT[:, 1:] >= 0, (0, 1), value=False)


def counted_positions(rows_BT: torch.Tensor) -> int:
    """How many positions of packed rows a loss covers."""
    ids, counted = split_rows(rows_BT)
    return ids.numel() if counted is None else int(counted.sum())


def _pieces(rows) -> Iterator[np.ndarray]:
    """The stored values of packed rows, in order."""
    if rows._indices is None:
        for chunk in rows.with_format("arrow").data.column("input_ids").chunks:
            yield np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype="<i4")
    else:
        for row in rows.with_format("numpy")["input_ids"]:
            yield np.ascontiguousarray(row, dtype="<i4")


def rows_digest(rows) -> str:
    """SHA-256 (hex) of packed rows: their token ids in order, whatever type and pieces they are stored in. About 1 GB/s."""
    found = hashlib.sha256(f"{len(rows)} rows".encode())
    for piece in _pieces(rows):
        found.update(piece.tobytes())
    return found.hexdigest()


def learned_tokens(rows) -> int:
    """How many tokens of packed rows are to be learned (all of them, but with `data.loss_on: answers`)."""
    return sum(int((piece >= 0).sum()) for piece in _pieces(rows))


def _source(source: Source, field: str, key: str):
    """A dataset of documents, columns `text` and `dialogue` (a JSON object): one of them holds something."""
    import datasets

    if source.hub is not None:
        return _documents(_hub(source, key), field, f"{key}: hub dataset {source.hub!r}", source.documents)
    files = expand([source.path], key)
    kinds = {format_of(file) for file in files}
    for file in files:
        try:
            if Path(file).is_file() and not _has_text(file):
                raise ValueError(f"{key}: {file}: is empty")
        except (OSError, EOFError) as error:
            raise ValueError(f"{key}: {file}: cannot be read: {first_line(error)}") from None
    parts = []
    for kind in sorted(kinds):
        own = [file for file in files if format_of(file) == kind]
        if kind in ("json", "text"):
            facts = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in own]
            parts.append(_generated(_read_documents, {"files": facts, "kind": kind, "field": field, "key": key}, key, own))
        else:
            parts += [_documents(_table(file, kind, source, key), field, f"{key}: {file}", None) for file in own]
    joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return joined if source.documents is None else joined.select(range(min(source.documents, len(joined))))


def _hub(source: Source, key: str):
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision,
                                     streaming=source.documents is not None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: hub dataset {source.hub!r} cannot be read: {first_line(error)}") from None


def _table(file: str, kind: str, source: Source, key: str):
    import datasets

    try:
        if kind == "folder":
            loaded = datasets.load_from_disk(file)
            if isinstance(loaded, datasets.DatasetDict):
                if source.split not in loaded:
                    raise ValueError(f"no split {source.split!r}; it has {', '.join(loaded)}")
                return loaded[source.split]
            return loaded
        return datasets.load_dataset(kind, data_files=[glob.escape(file)], split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"{key}: {file}: cannot be read: {first_line(error.__cause__ or error)}") from None


def _documents(table, field: str, where: str, limit: int | None):
    """Rows of a table of the `datasets` library (or a stream of them) as documents."""
    columns = list(table.column_names or next(iter(table), {}))
    wanted = [field] if field in columns else [c for c in DIALOGUE_FIELDS if c in columns]
    if not {"messages", "conversations", "prompt", field} & set(wanted):
        raise ValueError(f"data.text_field: {field!r} is not a column of {where}; it has {columns}")
    if limit is not None:
        return _generated(_stream_documents, {"table": table.take(limit), "field": field, "where": where}, where, [])
    if wanted == [field]:
        kind = getattr(table.features[field], "dtype", "nested values")
        if kind in ("string", "large_string"):
            texts = table.select_columns([field])
            texts = texts if field == "text" else texts.rename_column(field, "text")
            return texts.map(lambda batch: {"dialogue": [None] * len(batch["text"])}, batched=True, features=_features())
        if field not in DIALOGUE_FIELDS:
            raise ValueError(f"data.text_field: column {field!r} of {where} holds {kind}, expected text")
    table = table.select_columns(wanted)
    return table.map(lambda row: document_of(row, field, where), remove_columns=wanted, features=_features())


def _features():
    import datasets

    return datasets.Features({"text": datasets.Value("string"), "dialogue": datasets.Value("string")})


def _generated(function, arguments: dict, where: str, files: list[str]):
    import datasets

    try:
        return datasets.Dataset.from_generator(function, gen_kwargs=arguments, features=_features())
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        names = ", ".join(files)
        raise ValueError(str(cause) if isinstance(cause, ValueError) else
                         f"{where}: {names}: cannot be read: {first_line(cause)}") from None


def _read_documents(files: list[tuple[str, int, int]], kind: str, field: str, key: str) -> Iterator[dict]:
    """Documents of JSON and text files; sizes and times of the files are part of the cache's key."""
    for file, *_ in files:
        if kind == "text":
            with open_data(file) as stream:
                try:
                    yield {"text": stream.read().decode("utf-8"), "dialogue": None}
                except UnicodeDecodeError as error:
                    byte = error.object[error.start]
                    raise ValueError(f"{key}: {file}: not UTF-8: byte 0x{byte:02x} at {error.start}") from None
            continue
        for where, row in json_rows(file, key):
            yield document_of(row, field, f"{key}: {where}")


def _stream_documents(table, field: str, where: str) -> Iterator[dict]:
    for row in table:
        yield document_of(row, field, where)


def document_of(row: dict, field: str, where: str) -> dict:
    """{"text", "dialogue"} of a row: its text, or as JSON the fields that make a dialogue; neither for a null row.

    Raises:
        ValueError: the row has no such field, or holds something else than text in it.
    """
    if field in row and field not in DIALOGUE_FIELDS:
        if row[field] is not None and not isinstance(row[field], str):
            raise ValueError(f"{where}: {field!r} is {type(row[field]).__name__}, expected text")
        return {"text": row[field], "dialogue": None}
    found = {name: row[name] for name in DIALOGUE_FIELDS if row.get(name) is not None}
    if not {"messages", "conversations", "prompt"} & set(found):
        raise ValueError(f"{where}: no {field!r} (data.text_field) and no dialogue; it has {sorted(row)}")
    return {"text": None, "dialogue": json.dumps(found | {WHERE: where})}


def _has_text(file: str) -> bool:
    with open_data(file) as stream:
        return any(line.strip() for line in stream)


class Packer:
    """Called with the documents of one batch after the other: their rows of exactly `length` tokens.

    Tokenizes documents, ends each with end-of-text and joins them; what does not fill a row waits in `rest` for the next
    batch. A text begins as the tokenizer begins texts (with its beginning-of-text token, if it has one); a dialogue is what
    the chat template makes of it. Before the first call it is the same for the same arguments, so `datasets` finds what it
    has packed before.

    answers_only: mark what nobody is to learn (see the module's text).
    """

    def __init__(self, tokenizer, length: int, rendering: Rendering = AUTO, *, answers_only: bool = False):
        self.tokenizer, self.length, self.rendering, self.answers_only = tokenizer, length, rendering, answers_only
        self.begin, self.end = begin_ids(tokenizer), tokenizer.eos_token_id
        self.rest: list[int] = []
        self.counts = dict.fromkeys(COUNTS, 0)  # since the last row

    def __call__(self, batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        ids, length = self.rest, self.length
        texts = [text for text in batch["text"] if text is not None]
        # verbose=False: rows are cut below, so a text may be longer than what the model takes.
        tokenized = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for text, dialogue in zip(batch["text"], batch.get("dialogue", [None] * len(batch["text"])), strict=True):
            if text is None and dialogue is None:
                self.counts["empty"] += 1
                continue
            own = self._dialogue(json.loads(dialogue)) if text is None else [*self.begin, *next(tokenized), self.end]
            self.counts["documents"] += 1
            self.counts["long"] += len(own) > length
            ids += own
        whole = len(ids) // length * length
        self.rest = ids[whole:]
        rows = [ids[i:i + length] for i in range(0, whole, length)]
        rows = [row for row in rows if max(row[1:]) >= 0] if self.answers_only else rows
        counts = {name: [count, *[0] * (len(rows) - 1)] if rows else [] for name, count in self.counts.items()}
        if rows:
            self.counts = dict.fromkeys(COUNTS, 0)
        return {"input_ids": rows} | counts

    def _dialogue(self, row: dict) -> list[int]:
        where = row.pop(WHERE, None)
        try:
            ids = dialogue_tokens(row, self.tokenizer, self.rendering)
            said = said_by_assistant(row, ids, self.tokenizer, self.rendering) if self.answers_only else [True] * len(ids)
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None
        if ids[-1] != self.end:
            ids, said = [*ids, self.end], [*said, said[-1]]
        return [token if learned else ~token for token, learned in zip(ids, said, strict=True)]


def make_loader(dataset, *, batch_size: int, seed: int, shuffle: bool, processes: int, numbered: bool = False) -> DataLoader:
    """DataLoader over packed rows, incomplete batches dropped. Its `sampler` is an `EpochOrder`.

    numbered: batches also say which rows of the dataset they are ("row", int64 [batch]).

    Raises:
        ValueError: fewer rows than one batch for every process.
    """
    if len(dataset) < batch_size * processes:
        raise ValueError(f"data.train: {counted(len(dataset), 'packed sequence')}, fewer than one batch of qat.batch_size="
                         f"{batch_size} on each of {processes} processes")
    if numbered:
        dataset = dataset.add_column("row", range(len(dataset)))
    return DataLoader(dataset, batch_size=batch_size, drop_last=True,
                      sampler=EpochOrder(len(dataset), seed=seed, shuffle=shuffle))


def endless_batches(accelerator, loader, *, consumed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches ("input_ids", int64 [batch, T]) for ever, epoch after epoch, beginning after `consumed` of this process."""
    per_epoch = len(loader)
    epoch, skip = divmod(consumed, per_epoch)
    while True:
        loader.set_epoch(epoch)
        epoch_loader = accelerator.skip_first_batches(loader, skip) if skip else loader
        yield from epoch_loader
        epoch, skip = epoch + 1, 0


def heldout_domains(patterns: list[str], tokenizer, data: Data, rendering: Rendering = AUTO) -> dict[str, torch.Tensor]:
    """Evaluation rows by domain: file "code.heldout.jsonl" is domain "code". int64 [rows, T] as packed, at most eval_sequences.

    Raises:
        ValueError: as `packed_dataset`; two files of one domain.
    """
    files: dict[str, str] = {}
    for file in expand(patterns, "data.heldout"):
        domain = Path(file).name.split(".")[0]
        if domain in files:
            raise ValueError(f"data.heldout: {files[domain]} and {file} are both domain {domain!r}; expected one file each")
        files[domain] = file
    domains: dict[str, torch.Tensor] = {}
    for domain, file in files.items():
        rows = packed_dataset([file], tokenizer, data, key="data.heldout", rendering=rendering)
        rows = rows.select(range(min(len(rows), data.eval_sequences)))
        domains[domain] = torch.stack(list(rows["input_ids"]))
    return domains


def heldout_digest(domains: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of what `heldout_domains` gave: runs whose digests differ were measured on different text."""
    return json_digest({name: hashlib.sha256(rows.numpy().tobytes()).hexdigest() for name, rows in domains.items()})

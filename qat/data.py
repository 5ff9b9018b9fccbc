"""Text -> packed token sequences, in an order that a resumed run can rejoin exactly.

Documents are tokenized, each followed by the end-of-text token, joined, and cut into rows of `sequence_length` tokens;
no padding, and only what remains after the last document is dropped. A document is a row of a table (a line of a .jsonl
file), or a whole .txt file, line breaks included: to end it at each line would teach that texts are one line long.
Loading, tokenizing and caching is the `datasets` library's (memory-mapped Arrow: a corpus need not fit in memory). The
order of rows in epoch e is a permutation drawn from (seed, e), so the position in the data is one integer: rows
consumed.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from recipes.schema import Data
from training.epoch_order import EpochOrder
from training.files import FORMATS, expand


def packed_dataset(patterns: list[str], tokenizer, data: Data, *, key: str = "data.train"):
    """A `datasets.Dataset` with column input_ids: lists of exactly `sequence_length` token ids.

    Args:
        patterns: local files or globs, or one "hub:NAME" dataset (its train split).
        tokenizer: transformers tokenizer with an end-of-text token.
        key: recipe key for error messages.

    Raises:
        ValueError: no such file, an unreadable one, no such column or one that is not text, an empty result, a hub that
            cannot be reached, a tokenizer without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: the tokenizer has no end-of-text token to separate documents with")
    raw = _read(patterns, key)
    if data.text_field not in raw.column_names:
        raise ValueError(f"data.text_field: {data.text_field!r} is not a column of {key}; it has {raw.column_names}")
    kind = getattr(raw.features[data.text_field], "dtype", "nested values")
    if kind not in ("string", "large_string"):
        raise ValueError(f"data.text_field: column {data.text_field!r} of {key} holds {kind}, expected text")

    # In this process, batch after batch: a batch's rest begins the next one's first row.
    packed = raw.map(Packer(tokenizer, data.sequence_length, data.text_field), batched=True, batch_size=1000,
                     remove_columns=raw.column_names, desc=f"tokenizing {key}")
    if len(packed) == 0:
        raise ValueError(f"{key}: fewer than sequence_length={data.sequence_length} tokens in all")
    return packed.with_format("torch")


def _read(patterns: list[str], key: str):
    """The documents as `datasets` reads them; everything that it cannot read is a ValueError of one line."""
    import datasets

    if any(p.startswith("hub:") for p in patterns):
        if len(patterns) > 1:
            raise ValueError(f"{key}: a hub: dataset stands alone, found {len(patterns)} entries")
        name = patterns[0].removeprefix("hub:")
        try:
            return datasets.load_dataset(name, split="train")
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: hub dataset {name!r} cannot be read: {_first_line(error)}") from None
    files = expand(patterns, key)
    kinds = {FORMATS[Path(f).suffix] for f in files}
    if len(kinds) > 1:
        raise ValueError(f"{key}: files of different types {sorted(kinds)}; give one type")
    for file in files:
        if not _has_text(file):  # datasets ends without a word at a file without rows
            raise ValueError(f"{key}: {file}: is empty")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=[glob.escape(file) for file in files], split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"{key}: {', '.join(files)}: cannot be read: {_first_line(error.__cause__ or error)}") from None


def _has_text(file: str) -> bool:
    with open(file, "rb") as stream:
        return any(line.strip() for line in stream)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Packer:
    """Called with the documents of one batch after the other: their rows of exactly `length` tokens.

    Tokenizes documents, ends each with end-of-text and joins them; what does not fill a row waits in `rest` for the next
    batch. Before the first call it is the same for the same arguments, so `datasets` finds what it has packed before.
    """

    def __init__(self, tokenizer, length: int, field: str):
        self.tokenizer, self.length, self.field = tokenizer, length, field
        self.rest: list[int] = []

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids, length = self.rest, self.length
        documents = [text for text in batch[self.field] if text is not None]
        # verbose=False: rows are cut below, so a document may be longer than what the model takes.
        for document in self.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []:
            ids += document
            ids.append(self.tokenizer.eos_token_id)
        whole = len(ids) // length * length
        self.rest = ids[whole:]
        return {"input_ids": [ids[i:i + length] for i in range(0, whole, length)]}


def make_loader(dataset, *, batch_size: int, seed: int, shuffle: bool, processes: int) -> DataLoader:
    """DataLoader over packed rows, incomplete batches dropped. Its `sampler` is an `EpochOrder`.

    Raises:
        ValueError: fewer rows than one batch for every process.
    """
    if len(dataset) < batch_size * processes:
        raise ValueError(f"data.train: {len(dataset)} packed sequences, fewer than one batch of qat.batch_size="
                         f"{batch_size} on each of {processes} processes")
    return DataLoader(dataset, batch_size=batch_size, drop_last=True,
                      sampler=EpochOrder(len(dataset), seed=seed, shuffle=shuffle))


def endless_batches(accelerator, loader, *, consumed: int) -> Iterator[torch.Tensor]:
    """[batch, T] int64 batches for ever, epoch after epoch, beginning after `consumed` batches of this process."""
    per_epoch = len(loader)
    epoch, skip = divmod(consumed, per_epoch)
    while True:
        loader.set_epoch(epoch)
        epoch_loader = accelerator.skip_first_batches(loader, skip) if skip else loader
        for batch in epoch_loader:
            yield batch["input_ids"]
        epoch, skip = epoch + 1, 0


def heldout_domains(patterns: list[str], tokenizer, data: Data) -> dict[str, torch.Tensor]:
    """Evaluation rows by domain: file "code.heldout.jsonl" is domain "code". int64 [rows, T], at most eval_sequences.

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
        rows = packed_dataset([file], tokenizer, data, key="data.heldout")
        rows = rows.select(range(min(len(rows), data.eval_sequences)))
        domains[domain] = torch.stack(list(rows["input_ids"]))
    return domains

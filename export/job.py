"""One export: from a run's trained weights (or a base checkpoint) to a verified Hugging Face folder.

    plan     units, files and the drafter from names and shapes; a fingerprint of plan and sources
    write    into `<out>.partial`, file by file; processes share the files out by their number and do not talk: process 0
             prepares the folder, the others wait for its plan.json, and it waits for all files before it goes on
    finish   index, configuration, code, tokenizer, drafter, card, checksums (process 0)
    verify   the folder is inspected from disk as `export/verify.py` does, against the trained weights
    rename   only now the folder gets its name; what had it before, if it differs, is set aside as `<out>.1`, `.2`, ...

A killed export is continued if the fingerprint is the same: complete files stay. Otherwise `<out>.partial` is cleared.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.checksums import CHECKSUMS, internal, write_checksums
from checkpoint.detect_format import local_folder, open_source
from checkpoint.drafter_folder import grouping_note
from checkpoint.families.registry import family_of, refuse_layout, resolve_layout
from checkpoint.inventory import configuration
from checkpoint.trained import Weights, packed_codes_stored
from checkpoint.verify import verify
from export import config_files, drafter_files, model_card
from export.layouts import units_of
from export.shards import INDEX, ByteProgress, Shard, index_json, plan_shards, require_room, tensor_bytes, write_shard
from modeling.names import plain_dtype
from recipes.load import dump_published, published
from recipes.schema import Recipe
from storage.digests import combined, json_digest, model_digests, require_sum, stamps
from storage.files import (
    begin_folder,
    bound_earlier,
    finish_folder,
    is_unfinished,
    next_free,
    remove_special_files,
    write_bytes,
    write_json,
    write_text,
)
from storage.locks import Lock
from storage.reading import read_json
from storage.terminal import counted, printable, printable_line, readable_size
from training.checkpoint import complete_checkpoints, disk_errors, require_newest_result, require_summary, require_whole

WAIT_SECONDS = 0.2


@dataclass
class Request:
    """What the command line asks for; None = by the recipe."""

    out: Path | None = None
    base: Path | None = None
    weights: Path | None = None
    decode: bool = False  # the base in plain numbers, nothing rounded
    rank: int = 0
    world: int = 1
    push: str | None = None  # repository that the result goes to afterwards


class Export:
    """Sources, plan and folders of one export."""

    def __init__(self, recipe: Recipe, request: Request):
        self.recipe, self.request = recipe, request
        self.run_folder = Path(recipe.output) / recipe.name
        self.rounded = request.base is not None and not request.decode
        self._open_weights()
        self.measured("qat")  # a damaged one is told before hours of writing
        self.drafter = None
        if request.base is None and recipe.export.drafter != "none":
            require_newest_result(self.run_folder / "dflash")
            self.drafter = drafter_files.open_drafter(self.run_folder / "dflash" / "model", self.text_config)
            if self.drafter is not None:
                require_summary(self.run_folder / "dflash", "dflash_train/train.py --resume ends it")
                self.measured("dflash")
            if self.drafter is not None and recipe.export.drafter == "matching" and not request.rank:
                self._require_matching_drafter()
        units = units_of(self.layout, self.weights, recipe.export.dense)
        if self.drafter is not None:
            if recipe.export.speculators:
                drafter_files.speculators_config(self.drafter.config, self.target_name, None)  # before hours of writing
            if self.mask_row:
                units = drafter_files.with_mask_row(units, self.drafter)
        elif recipe.export.speculators:
            raise ValueError(f"export.speculators: no trained drafter in {self.run_folder / 'dflash' / 'model'}")
        self.shards: list[Shard] = plan_shards(units, recipe.export.shard_bytes)
        default = ("model" if self.layout == "native" else self.layout) + ("-ptq" if self.rounded else "")
        default = "decoded" if request.decode else default
        self.out = Path(os.path.abspath(request.out)) if request.out else self.run_folder / "export" / default
        self._refuse_out()
        self.partial = self.out.with_name(self.out.name + ".partial")

    def _refuse_out(self) -> None:
        """An earlier export is set aside for the new one; any other folder of that name stays where it is."""
        out = self.out
        if out.resolve() in [location.resolve() for location in self.locations]:
            raise ValueError(f"--out {out}: holds the weights that are to be exported, expected another folder")
        if out.exists() and not (out / "export.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"--out {out}: exists and is no earlier export, expected a new folder, e.g. {out / 'model'}")

    def _require_matching_drafter(self) -> None:
        """Raises ValueError for a drafter that was trained for other weights, where its summary says for which."""
        was = (self.measured("dflash") or {}).get("target") or {}
        if was.get("weights") is None or (was.get("kind"), was["weights"]) == ("qat", self.trained_digest):
            return
        theirs = f"dflash.target: {was.get('kind')}, {was['weights']}"
        raise ValueError(f"{self.drafter.folder}: trained for other weights ({theirs}) than those of {self.trained_folder} "
                         f"({self.trained_digest}), which would reject more of its drafts; "
                         "train it for them (dflash_train/train.py), or set export.drafter to any (written with a warning and "
                         "without its numbers) or none")

    def _open_weights(self) -> None:
        recipe, request = self.recipe, self.request
        rounded = local_folder(str(request.base)) if request.base else None
        self.trained_folder = rounded or request.weights or trained_weights(self.run_folder / "qat")
        if not request.rank:
            require_whole(self.trained_folder)
        trained = open_source(self.trained_folder)
        base_folder = rounded or (local_folder(recipe.model.path) if recipe.model.path else self.trained_folder)
        base = trained if base_folder == self.trained_folder else open_source(base_folder)
        self.locations = [f for f in dict.fromkeys((self.trained_folder, base_folder)) if f.is_dir()]
        described = next((f for f in self.locations if (f / "config.json").is_file()), None)
        if described is None:
            raise ValueError(f"{base_folder}: no config.json there, nor in {self.trained_folder}")
        self.config = read_json(described / "config.json")
        config = configuration(self.config)
        self.layout = "bf16" if request.decode else resolve_layout(recipe.export.layout, config)
        refuse_layout(self.layout, config, recipe.export.dense)  # before a model is laid out for its names
        self.weights = Weights(trained, base, config, family_of(config).published(config), on_grid=not self.rounded,
                               scale_rule=recipe.quantization.scale_rule, changed=recipe.qat.train == "all",
                               decoded=request.decode)

    @property
    def text_config(self):
        """The configuration of the decoder, also where the checkpoint has more than text."""
        return self.weights.config.get_text_config()

    @property
    def mask_row(self) -> bool:
        """Whether the drafter's mask embedding takes its token's place in the vocabulary. Not where the head is the same
        matrix: engines then have mask_embedding.pt alone."""
        return self.drafter is not None and not self.text_config.tie_word_embeddings

    @property
    def target_name(self) -> str:
        """The target as dflash-speculators/ names it; the folder above is found by readers that work inside it."""
        return self.recipe.export.speculators_target or self.request.push or ".."

    @property
    def experts(self) -> str:
        """How experts become codes: "trained" on the grid, "rounded" here, or "copied" from a base that is packed already; or
        they do not: "decoded"."""
        if self.request.decode:
            return "decoded"
        if packed_codes_stored(self.weights):
            return "copied"
        return "rounded" if self.rounded else "trained"

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.shards)

    def dtypes(self) -> dict[str, str]:
        return {t.name: t.dtype for s in self.shards for t in s.tensors}

    def fingerprint(self) -> str:
        """Digest of everything that decides the weight files' bytes."""
        facts = {"shards": [[s.name, s.bytes, hashlib.sha256(s.header).hexdigest()] for s in self.shards],
                 "sources": [stamps(f) for f in dict.fromkeys((self.weights.trained.folder, self.weights.base.folder))],
                 "drafter": None if self.drafter is None else stamps(self.drafter.folder), "rounded": self.rounded,
                 "decoded": self.request.decode,
                 "rule": self.weights.scale_rule, "changed": self.weights.changed,
                 "mask": None if self.drafter is None else self.drafter.embedding.float().tolist(), "row": self.mask_row}
        return json_digest(facts)

    def prepare(self, alive=lambda: None) -> str:
        """Process 0 makes or keeps the partial folder; the others wait until it has. Returns the fingerprint."""
        plan, mark = self.partial / "plan.json", self.fingerprint()
        if self.request.rank:
            while not (plan.is_file() and read_json(plan).get("fingerprint") == mark):
                alive()
                time.sleep(WAIT_SECONDS)
            return mark
        if is_unfinished(self.partial):
            remove_special_files(self.partial)
        kept = plan.is_file() and read_json(plan).get("fingerprint") == mark
        require_room(self.out, self.bytes, self.partial if kept else None)
        if kept:
            done = sum((self.partial / s.name).is_file() for s in self.shards)
            print(f"continuing {self.partial}: {done} of {len(self.shards)} files are there", flush=True)
            return mark
        try:
            begin_folder(self.partial)
        except FileExistsError as error:
            raise ValueError(str(error)) from None
        write_json(plan, {"fingerprint": mark, "files": [s.name for s in self.shards]}, sort_keys=True)
        return mark

    def write(self, alive=lambda: None) -> None:
        """Writes this process's files (every `world`-th)."""
        own = self.shards[self.request.rank::self.request.world]
        progress = ByteProgress(sum(s.bytes for s in own), "export", enabled=self.request.rank == 0)

        def written(count: int) -> None:
            alive()
            progress(count)

        try:
            for shard in own:
                write_shard(shard, self.partial, written)
        finally:
            progress.close()

    def await_all(self, alive) -> None:
        """Waits until every file is there; `alive` raises if a writer is gone."""
        while not all((self.partial / s.name).is_file() for s in self.shards):
            alive()
            time.sleep(WAIT_SECONDS)

    def finish(self) -> None:
        """Everything beside the weights; then checksums."""
        out, sums = self.partial, {}
        for shard in self.shards:
            sums |= read_json(out / f"{shard.name}.sums")
        write_bytes(out / INDEX, index_json(self.shards).encode())
        config = config_files.model_config(self.config, self.layout, self.dtypes())
        write_json(out / "config.json", config, sort_keys=True)
        config_files.copy_companions(self.locations, out, code="auto_map" in config)
        shutil.rmtree(out / "dflash", ignore_errors=True)
        if self.drafter is not None:
            sums |= drafter_files.write_drafter(self.drafter, out / "dflash", self.recipe.export.shard_bytes)
            if self.recipe.export.speculators:
                architecture = (config.get("architectures") or [None])[0]
                sums |= drafter_files.write_speculators(
                    self.drafter, out / "dflash-speculators", self.recipe.export.shard_bytes, self.target_name, architecture)
            fits = 2 * drafter_files.target_bytes(out) <= self.recipe.export.reference_gib * 2**30  # it runs in float32
            drafter_files.write_reference(out, real_features=fits)
        # How many processes wrote it is no part of the result.
        settled = self.recipe.export.model_copy(update={"processes": 1})
        write_text(out / "resolved.yaml", dump_published(self.recipe.model_copy(update={"export": settled})))
        write_json(out / "export.json", self.manifest(), sort_keys=True)
        write_bytes(out / "README.md", model_card.card(self.facts(config)).encode())
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        write_checksums(out, sums, skip=internal)

    def manifest(self) -> dict:
        """export.json: what a verifier must know and config.json does not say."""
        facts = {"layout": self.layout, "rounded": self.rounded, "scale_rule": self.weights.scale_rule, "experts": self.experts,
                 "dense": self.recipe.export.dense, "drafter": self.drafter is not None, "format": 1}
        if self.drafter is not None and not self.mask_row:
            facts["mask_row"] = False
        wide = sorted(n for n, dtype in self.dtypes().items() if dtype == "F32" and plain_dtype(n) != "F32")
        if wide and self.layout != "native":
            facts["float32"] = wide
        trained = self.drafter_summary
        # What a runtime must reach with this drafter (contract C7).
        return facts | ({"acceptance": trained["acceptance"]} if trained and "acceptance" in trained else {})

    def facts(self, config: dict) -> model_card.Facts:
        sizes: dict[str, int] = {}
        for tensor in (t for s in self.shards for t in s.tensors):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor_bytes(tensor)
        drafter = self.drafter and self.drafter.config
        return model_card.Facts(
            name=self.recipe.name, layout=self.layout,
            base=self._base_name(), licence=model_card.licence_of(self.locations),
            scale_rule=self.weights.scale_rule, dense_rounded=self.recipe.export.dense == "fp8",
            experts=self.experts, expert_matrices=self._expert_matrices(),
            bytes_by_dtype=sizes, draft=drafter, ungrouped=drafter and grouping_note(drafter, self.text_config),
            qat=self.qat_summary, drafter=self.drafter_summary, config=config)

    def _base_name(self) -> str:
        """The base as others may know it: the recipe's name for it, or the hub's, which a snapshot's folder is named by."""
        folder = str(self.request.base or self.recipe.model.path)
        snapshot = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{os.path.realpath(folder)}/")
        named = self.recipe.export.base_model if self.request.base is None else None
        return published(named or (f"{snapshot[1]}/{snapshot[2]}" if snapshot else folder))

    def measured(self, job: str) -> dict | None:
        """summary.json of a job of this run, if it is the run's own result that is exported: nothing else was measured."""
        own = self.trained_folder.resolve() == (self.run_folder / "qat" / "model").resolve()
        path = self.run_folder / job / "summary.json"
        return require_sum(read_json(path), path) if own and path.is_file() else None

    @functools.cached_property
    def qat_summary(self) -> dict | None:
        """What was measured of the weights that are exported; None, and a line, if it was of others."""
        summary = self.measured("qat")
        if summary is None or summary.get("weights") == self.trained_digest:
            return summary
        return self._left_out("qat", f"measured with weights {summary.get('weights')}, not with those ({self.trained_digest})")

    @functools.cached_property
    def drafter_summary(self) -> dict | None:
        """What was measured with this drafter and the weights that are exported; None, and a line, if one was another."""
        summary = self.measured("dflash") if self.drafter is not None else None
        reason = None if summary is None else other_pair(summary, self.trained_digest, self.drafter_digest)
        return summary if reason is None else self._left_out("dflash", reason)

    @functools.cached_property
    def trained_digest(self) -> str:
        return combined(model_digests(self.trained_folder))

    @functools.cached_property
    def drafter_digest(self) -> str:
        return combined(model_digests(self.drafter.folder))

    def _left_out(self, job: str, reason: str) -> None:
        print(printable(f"warning: {self.run_folder / job / 'summary.json'}: {reason} of {self.trained_folder}; its numbers "
                        "are left out of card and export.json"), file=sys.stderr, flush=True)

    def _expert_matrices(self) -> int:
        names = self.weights.names
        return len(names.experts) + sum(names.shapes[name][0] for name in names.fused)

    def verify(self) -> list[str]:
        """What is wrong with the partial folder, compared with the weights it was made from."""
        return verify(self.partial, self.trained_folder, skip=internal).findings

    def close(self) -> None:
        """Removes what an interrupted export is continued by: the folder is whole, or to be written anew."""
        for path in (self.partial / "plan.json", *self.partial.glob("*.sums")):
            path.unlink()

    def rename(self) -> None:
        """Gives the folder its name. An earlier one is set aside, of which the newest `keep_earlier` stay.

        One with the same checksums is replaced: a second copy of the same bytes is of no use.
        """
        aside = None
        if self.out.exists() and not _same_file(self.out / CHECKSUMS, self.partial / CHECKSUMS):
            aside = next_free(self.out)
            self.out.rename(aside)
        self.close()
        finish_folder(self.partial, self.out)
        if aside is not None:
            print(f"an earlier export was set aside as {aside}")
            bound_earlier(self.out, "export.json", self.recipe.keep_earlier)


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def other_pair(summary: dict, target: str, drafter: str) -> str | None:
    """How the weights that a drafter's numbers were measured with differ from those that are exported; None if they do not.

    Args:
        summary: summary.json of the drafter's job. target, drafter: digests of the two folders now.
    """
    was = summary.get("target") or {}
    if was.get("kind") != "qat" or was.get("weights") != target:
        return (f"measured with the weights {was.get('weights')} of dflash.target={was.get('kind')}, not with those "
                f"({target})")
    if summary.get("weights") != drafter:
        return f"measured with the drafter {summary.get('weights')}, not with the one there is now ({drafter}), a drafter"
    return None


def trained_weights(folder: Path) -> Path:
    """The trained weights of a run: its result, or, with a line, its newest complete checkpoint.

    Raises:
        ValueError: neither is there; the result is older than the newest checkpoint, or its summary.json is missing.
    """
    if (folder / "model").is_dir():
        require_newest_result(folder)
        require_summary(folder, "qat/train.py --resume ends it")
        return folder / "model"
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise ValueError(f"{folder}: neither model/ nor a complete checkpoint; run qat/train.py first, or round a base "
                         "checkpoint with --from FOLDER")
    print(printable(f"note: {folder}: the run has not ended, so its newest checkpoint is exported ({checkpoints[-1].name})"),
          file=sys.stderr, flush=True)
    return checkpoints[-1]


def run(recipe: Recipe, request: Request, alive=lambda: None) -> int:
    """Exports; returns the exit code (1: the result did not verify; it is left under its partial name).

    Args:
        alive: called while waiting for other processes; raises if one has failed.

    Raises:
        ValueError: weights, base or layout that cannot be exported, with the reason.
    """
    began = time.monotonic()
    # Reading, encoding, hashing and writers side by side are what runs in parallel; threads within one small operation only
    # wait for each other (on a machine with other jobs, ten times longer than they work).
    torch.set_num_threads(1)
    export = Export(recipe, request)
    with contextlib.nullcontext() if request.rank else Lock(export.out):
        return _run(export, alive, began)


def _run(export: Export, alive, began: float) -> int:
    mark = export.prepare(alive)
    export.write(alive)
    if export.request.rank:
        return 0
    export.await_all(alive)
    written = time.monotonic() - began
    with disk_errors():
        export.finish()
    findings = export.verify()
    if export.fingerprint() != mark:
        findings.insert(0, f"{export.trained_folder}, the base or the drafter was written to during the export")
    if findings:
        export.close()  # a file that is damaged on the disk would be taken for written
        for finding in findings[:50]:
            print(f"FOUND  {printable_line(finding)}")
        print(f"{export.partial}: {counted(len(findings), 'finding')}; not renamed to {export.out}; the same command writes it "
              "anew")
        return 1
    export.rename()
    drafter = "with a drafter" if export.drafter is not None else "no drafter"
    print(f"written and verified: {export.out} ({export.layout}, {readable_size(export.bytes)} in "
          f"{counted(len(export.shards), 'file')}, "
          f"{drafter}; {written:.1f} s writing, {time.monotonic() - began:.1f} s in all)")
    return 0

"""What the checks of a folder learn and hand on, and how they read and word what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint.tensor_files import REFERENCE
from storage.reading import first_line

INCOMPLETE_CAUSE = "the folder is incomplete or damaged"


class Wrong(ValueError):
    """A folder that cannot be read any further, and why."""

    def __init__(self, finding: str, cause: str):
        super().__init__(finding)
        self.cause = cause


@dataclass
class ValidationContext:
    """What later checks need of the folder.

    Attributes:
        family: model_type of config.json. config: MiMoV2Config, or the geometry of another family.
        ours: written by this project's exporter, which promises more than the format asks (checksums, export.json, a stored
            reference, every alias of the drafter's keys): promised things are demanded of such folders alone.
        suspicions: (finding, cause): odd values that are wrong if outputs disagree with a reference, and notes otherwise.
        explained: a cause, known already, for which outputs will differ from the reference.
        reference: tensors and context of the stored worked example, if there is one.
    """

    folder: Path
    family: str = "mimo_v2"
    config: object = None
    raw: dict = field(default_factory=dict)
    drafter_config: dict = field(default_factory=dict)
    suspicions: list[tuple[str, str]] = field(default_factory=list)
    reference: dict[str, torch.Tensor] | None = None
    reference_info: dict = field(default_factory=dict)
    loadable: bool = True
    drafter_loadable: bool = False
    explained: str | None = None

    @property
    def ours(self) -> bool:
        return any((self.folder / name).is_file() for name in ("export.json", f"dflash/{REFERENCE}"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of other packages' loaders, which speak of kernels that are not used here."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def read_object(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        Wrong: it is missing, not JSON, or something else.
    """
    where = "/".join(path.parts[-2:]) if path.parent.name == "dflash" else path.name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Wrong(f"{where} is missing", INCOMPLETE_CAUSE) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Wrong(f"{where}: not valid JSON: {first_line(error)}", INCOMPLETE_CAUSE) from None
    if not isinstance(found, dict):
        raise Wrong(f"{where}: {type(found).__name__}, expected an object", INCOMPLETE_CAUSE)
    return found


def own_object(path: Path) -> dict:
    """A JSON object, or {} if there is none to be read."""
    try:
        return read_object(path)
    except Wrong:
        return {}


def line_within(error: Exception, folder: Path) -> str:
    """An error's first line, with names as seen from the folder."""
    return first_line(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ")


def condensed(findings: list[str]) -> list[str]:
    """The first finding of each kind: layers and experts are one kind."""
    seen: dict[str, list[str]] = {}
    for finding in findings:
        seen.setdefault(re.sub(r"\d+", "N", finding), []).append(finding)
    return [group[0] + (f" (and {len(group) - 1} more like it)" if len(group) > 1 else "") for group in seen.values()]

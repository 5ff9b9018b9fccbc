"""Writes the result: JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

from runtime_ref.validation.result import Verdict
from storage.files import write_text


def write_json(verdict: Verdict, path: Path) -> None:
    write_text(path, json.dumps(verdict.as_dict(), indent=2, default=str) + "\n")


def write_html(verdict: Verdict, path: Path) -> None:
    from runtime_ref.validation.html_report import page

    write_text(path, page(verdict))

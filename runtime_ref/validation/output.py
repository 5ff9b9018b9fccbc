"""Writes the result: JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

from runtime_ref.validation.result import ValidationReport
from storage.files import write_text


def write_json(report: ValidationReport, path: Path) -> None:
    write_text(path, json.dumps(report.as_dict(), indent=2, default=str) + "\n")


def write_card(report: ValidationReport, path: Path) -> None:
    from runtime_ref.validation.eval_run import card_section

    write_text(path, card_section(report))


def write_html(report: ValidationReport, path: Path) -> None:
    from runtime_ref.validation.html_report import page

    write_text(path, page(report))

"""Files appear whole or not at all: written aside, then renamed."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replaces `path`, whose folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)

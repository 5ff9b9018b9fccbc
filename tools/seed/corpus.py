"""The text behind the seed: where it comes from, how it is split, and what of it is frozen in the repository.

Two products. A *pretraining set* (tens of megabytes, in a work folder, never committed) holds whatever permissively
licensed Python source and documentation is installed on the machine. A *frozen set* (under 2 MB, committed as
`text/{code,prose,math}.{train,heldout}.jsonl`) is what every later job reads, so that quantization-aware training and
the drafter see the same bytes on every machine and every Python version.

Why this way:

- The split is by file and depends on nothing but the file's name: `is_heldout` hashes `package/relative/path`. A
  held-out file is never in the pretraining set, frozen or not, whatever machine or order built it.
- A name split alone leaks: model files and reference pages are copied and edited. A held-out document is dropped
  when more than `MAX_SHARED_LINES` of its longer lines also occur in some training document.
- Licence headers are cut from code. They are long, identical in every file and would flatter bits per byte.
- Only the sources of `CODE_SOURCES` and `PROSE_SOURCES` are read; each has its licence written down here rather than
  guessed from metadata, and the licence text of every frozen source is kept in `text/licences/`.

Rejected: a random split by line or by chunk (the same file on both sides); copyleft documentation (Debian policy,
git); freezing all of the text (tens of megabytes for no gain, since QAT sees about one megabyte).
"""

import argparse
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.seed import tasks

TEXT_DIR = Path(__file__).resolve().parents[2] / "recipes/seed/text"
DOMAINS = ("code", "prose", "math")
HELDOUT_PERCENT = 4
MAX_SHARED_LINES = 0.5
FROZEN_BYTES = {"train": 400_000, "heldout": 130_000}
FROZEN_DOCUMENT_BYTES = 12_000

# package folder -> licence (SPDX). Python source, read from the standard library and from site-packages roots.
CODE_SOURCES = {
    "stdlib": "PSF-2.0",
    "transformers": "Apache-2.0",
    "torch": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "django": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sqlalchemy": "MIT",
    "accelerate": "Apache-2.0",
    "huggingface_hub": "Apache-2.0",
    "datasets": "Apache-2.0",
    "twisted": "MIT",
    "pydantic": "MIT",
    "rich": "MIT",
    "sphinx": "BSD-2-Clause",
    "torchao": "BSD-3-Clause",
    "_pytest": "MIT",
    "flask": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
}
# documentation folder name -> licence. reStructuredText sources as documentation packages install them.
PROSE_SOURCES = {
    "python3.11": "PSF-2.0",
    "python-django-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "python-pandas-doc": "BSD-3-Clause",
    "python-pytest-doc": "MIT",
    "sphinx-doc": "BSD-2-Clause",
    "twisted-doc": "MIT",
}
GENERATED_LICENCE = "Apache-2.0"
_SKIP_CODE = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|encodings|site-packages|turtledemo|locale|_vendor|"
                        r"dummy_\w+|.*_pb2|ensurepip|pydoc_data|config-3[^/]*)(/|\.py$)")
_SKIP_PROSE = re.compile(r"/(reference/api|generated|api/generated|glossary|genindex)/")


def is_heldout(source: str) -> bool:
    """True when the file named `source` (package/relative/path) belongs to the held-out side. Pure function of the name."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % 100 < HELDOUT_PERCENT


def strip_licence_header(text: str) -> str:
    """Drop the leading comment block of a source file when it is a licence or copyright notice."""
    lines = text.split("\n")
    end = 0
    while end < len(lines) and (lines[end].startswith("#") or not lines[end].strip()):
        end += 1
    head = "\n".join(lines[:end])
    return "\n".join(lines[end:]) if re.search(r"(?i)copyright|licen[sc]e|coding[:=]", head) else text


def _is_plain_code(text: str) -> bool:
    """Reject data tables and generated files (source has short lines and few digits) and anything like a special token."""
    lines = text.split("\n")
    digits = sum(c.isdigit() for c in text)
    plain = 400 < len(text) < 200_000 and max(map(len, lines)) < 300 and digits < 0.06 * len(text)
    return plain and text.isascii() and "<|" not in text


def _is_plain_prose(text: str) -> bool:
    """Reject stubs, tables of names and contributor lists: prose is mostly letters and spaces in long paragraphs."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return 1500 < len(text) < 300_000 and letters > 0.8 * len(text) and text.isascii() and "<|" not in text


def iterate_code(roots: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(source, licence, text) of every accepted Python file of `CODE_SOURCES`: the standard library, then `roots`."""
    folders = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    folders += [(name, root / name) for name in CODE_SOURCES for root in roots if (root / name).is_dir()]
    seen: set[str] = set()
    for name, folder in folders:
        for path in sorted(folder.rglob("*.py")):
            source = f"{name}/{path.relative_to(folder).as_posix()}"
            if source in seen or _SKIP_CODE.search(source):
                continue
            seen.add(source)
            text = strip_licence_header(path.read_text(encoding="utf-8", errors="replace")).strip("\n") + "\n"
            if _is_plain_code(text):
                yield source, CODE_SOURCES[name], text


def iterate_prose(roots: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(source, licence, text) of every accepted documentation page of `PROSE_SOURCES` below `roots`."""
    for root in roots:
        for name, licence in PROSE_SOURCES.items():
            pages = sorted(root.glob(f"**/{name}/**/*.txt")) + sorted(root.glob(f"**/{name}/**/*.rst"))
            for path in pages:
                inside = path.as_posix().split(f"/{name}/", 1)[1]
                source = f"{name}/{inside}"
                if path.is_symlink() or _SKIP_PROSE.search(f"/{inside}"):
                    continue
                text = re.sub(r"\n{3,}", "\n\n", path.read_text(encoding="utf-8", errors="replace")).strip() + "\n"
                if _is_plain_prose(text):
                    yield source, licence, text


def iterate_math(documents: int) -> Iterator[tuple[str, str, str]]:
    """(source, licence, text) of generated documents of worked arithmetic and structured text; `source` is the seed."""
    for number in range(documents):
        source = f"generated/math-{number:06d}"
        yield source, GENERATED_LICENCE, tasks.math_document(source)


def _long_lines(text: str) -> set[int]:
    return {hash(line.strip()) for line in text.split("\n") if len(line.strip()) >= 30}


def collect(code_roots: list[Path], prose_roots: list[Path], math_documents: int) -> dict[str, dict[str, list]]:
    """All documents, deduplicated and split: `{domain: {"train" | "heldout": [(source, licence, text), …]}}`."""
    found = {"code": iterate_code(code_roots), "prose": iterate_prose(prose_roots), "math": iterate_math(math_documents)}
    result = {}
    for domain, documents in found.items():
        sides: dict[str, list] = {"train": [], "heldout": []}
        seen: set[str] = set()
        for source, licence, text in documents:
            key = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).hexdigest()
            if key not in seen:
                seen.add(key)
                sides["heldout" if is_heldout(source) else "train"].append((source, licence, text))
        if domain != "math":
            known = set().union(*(_long_lines(text) for _, _, text in sides["train"]))
            sides["heldout"] = [d for d in sides["heldout"] if _shared_share(d[2], known) <= MAX_SHARED_LINES]
        result[domain] = sides
    return result


def _shared_share(text: str, known: set[int]) -> float:
    lines = _long_lines(text)
    return len(lines & known) / max(1, len(lines))


def freeze(documents: list[tuple[str, str, str]], limit: int) -> list[dict[str, str]]:
    """Choose documents in hash order (no hand picking) up to `limit` bytes; long ones are cut at a line end."""
    chosen, used = [], 0
    for source, licence, text in sorted(documents, key=lambda d: hashlib.sha256(b"order" + d[0].encode()).digest()):
        if len(text) > FROZEN_DOCUMENT_BYTES:
            text = text[: text.rindex("\n", 0, FROZEN_DOCUMENT_BYTES) + 1]
        if used + len(text) <= limit:
            chosen.append({"source": source, "licence": licence, "text": text})
            used += len(text)
    return chosen


def read_frozen(domain: str, side: str) -> list[dict[str, str]]:
    """Documents of `text/{domain}.{side}.jsonl`: dicts with `source`, `licence`, `text`."""
    with (TEXT_DIR / f"{domain}.{side}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the pretraining set (JSON lines per domain)")
    parser.add_argument("--code-root", type=Path, action="append", default=[], help="a site-packages folder; repeatable")
    parser.add_argument("--prose-root", type=Path, action="append", default=[], help="a folder of documentation packages")
    parser.add_argument("--math-documents", type=int, default=4000)
    parser.add_argument("--freeze", action="store_true", help="also rewrite the committed text/ folder")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for domain, sides in collect(args.code_root, args.prose_root, args.math_documents).items():
        for side, documents in sides.items():
            name = f"{domain}.jsonl" if side == "train" else f"{domain}.heldout.jsonl"
            with (args.work / name).open("w", encoding="utf-8") as file:
                for source, licence, text in documents:
                    file.write(json.dumps({"source": source, "licence": licence, "text": text}) + "\n")
            total = sum(len(d[2]) for d in documents)
            print(f"{domain:6} {side:8} {len(documents):6d} documents {total / 1e6:8.2f} MB")
            if args.freeze:
                TEXT_DIR.mkdir(exist_ok=True)
                with (TEXT_DIR / f"{domain}.{side}.jsonl").open("w", encoding="utf-8") as file:
                    for row in freeze(documents, FROZEN_BYTES[side]):
                        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

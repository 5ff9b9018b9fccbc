"""Writes docs/recipes.md from the recipe's schema: every key with its type, default and meaning.

    python tools/recipe_reference.py            # write the page
    python tools/recipe_reference.py --check    # exit code 1 if the page is not what the schema says
"""

import argparse
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(ROOT)

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from recipes.schema import Recipe

PAGE = ROOT / "docs/recipes.md"
HEAD = """# Recipes

<!-- Written by tools/recipe_reference.py from recipes/schema.py: change the schema, not this page. -->

One YAML file drives all four jobs. Every key is typed; an unknown key, a wrong type or a value out of range is refused in one
line that names file, line, key and the nearest valid key, before anything is loaded.

    accelerate launch qat/train.py recipes/tiny.yaml qat.steps=50 qat.optimizer.learning_rate=2e-4

An override is `section.key=value` with a YAML value, after the recipe's path. The recipe with all its defaults is written to
`resolved.yaml` in each job's folder. `--plan` prints what a recipe would do, without weights.

`--resume` goes on with the same training or refuses: the recipe stored in the checkpoint is compared key by key. Intervals of
logging, evaluation and checkpoints may change, and so may the sections of other jobs; paths and the number of steps may change
and are named; everything else is refused.
"""


def type_name(annotation) -> str:
    """A type as a user would say it: `int > 0`, `one of a, b`, `list of str`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        own = [item for value in arguments[1:] for item in getattr(value, "metadata", [value])]
        return " ".join(filter(None, (type_name(arguments[0]), limits(own))))
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, type(int | str)):
        return " or ".join("none" if value is type(None) else type_name(value) for value in arguments)
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return annotation.__name__


def limits(metadata: list) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [f"{sign} {value:g}" for item in metadata for key, sign in signs.items()
             if (value := getattr(item, key, None)) is not None]
    lengths = [f"at least {value}" for item in metadata if (value := getattr(item, "min_length", None)) is not None]
    return ", ".join(found + lengths)


def section_of(annotation) -> type[BaseModel] | None:
    """The section that a field holds, by itself or as an option."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := section_of(inner)) is not None), None)


def default_of(field) -> str:
    value = field.get_default(call_default_factory=True) if field.default_factory else field.default
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, list):
        value = [v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value]
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def tables(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The section's table, then those of the sections inside."""
    rows, inside = [], []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and typing.get_origin(field.annotation) is not list:
            inside += tables(section, f"{prefix}{name}.")
            continue
        kind, range_ = type_name(field.annotation), limits(field.metadata)
        cells = (f"`{prefix}{name}`", kind + (f" {range_}" if range_ else ""), default_of(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if section is not None:
            inside += tables(section, f"{prefix}{name}[].")
    title, text = f"## {prefix.rstrip('.') or 'Top level'}", (model.__doc__ or "").strip().splitlines()
    about = "\n".join(line.strip() for line in text)
    head = [title, "", about, "", "| key | type | default | meaning |", "|---|---|---|---|"] if rows else [title, "", about]
    return ["", *head, *rows, *inside]


def page() -> str:
    return HEAD + "\n".join(tables(Recipe)) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if parser.parse_args(argv).check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        if not current:
            print(f"{PAGE.relative_to(ROOT)}: not what recipes/schema.py says; run python tools/recipe_reference.py",
                  file=sys.stderr)
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

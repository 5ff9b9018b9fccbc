"""YAML + `section.key=value` overrides -> a checked Recipe, with errors a person can act on.

Every mistake is reported as one line per fault: file:line (or "override"), dotted key, the value, what is expected, and
the nearest valid key. PyYAML follows YAML 1.1, where `1e-4` is a string and `on`/`no` are booleans; recipes follow
YAML 1.2 here (numbers as people write them, only true/false are booleans). A key given twice is an error: PyYAML would
silently keep the last.

A recipe may build on another one: `base: mimo.yaml` (from the recipe's own folder, or a shipped one by its name) takes that
recipe's keys, and this one's replace them, section by section; a list is replaced whole, and `null` takes a section away. What
came of it is written into every run's folder as resolved.yaml.

Names of files and folders are relative to the working directory, which wins, or else to the recipe's own folder (then to that
of the recipe that it builds on). `~` is the user's home.

No torch or transformers import: a wrong recipe is refused in a fraction of a second.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.schema import SOURCE_TAGS, Recipe
from storage.reading import first_line

# Faults whose text by pydantic speaks of Python's classes or of regular expressions.
_EXPECTED = {
    "model_type": "expected a section (keys and values)",
    "string_pattern_mismatch": "expected letters, digits, '.', '_' and '-', the first a letter or digit",
    "too_short": "expected at least {min_length} entry, found {actual_length}",
}


# Keys that name files or folders to be read.
PATHS = ("model.path", "data.train", "data.heldout", "dflash.start_from", "dflash.data", "dflash.regenerate.prompts",
         "dflash.acceptance.prompts")


class RecipeError(ValueError):
    """One or more mistakes in a recipe or its overrides; `str()` is the text to print (a line per mistake)."""


class _RecipeYaml(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and booleans."""


_RecipeYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeYaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_RecipeYaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # YAML 1.2: 010 is ten, not eight


_RecipeYaml.add_constructor("tag:yaml.org,2002:int", _construct_int)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: YAML file; a shipped one is found by its name (mimo.yaml, recipes/mimo.yaml) from any folder.
        overrides: strings `section.key=value`; the value is read as YAML. Later ones win.

    Raises:
        RecipeError: the file is missing, is not YAML, or any key or value is wrong; all mistakes in one text.
    """
    path = find_recipe(Path(path))
    homes: list[Path] = []
    data, lines = _composed(path, homes)
    for override in overrides:
        _apply_override(data, lines, override)
    _locate(data, list(dict.fromkeys(homes)))
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [_describe(fault, str(path), lines) for fault in error.errors()]
        raise RecipeError("\n".join(faults)) from None


def _locate(data: dict[str, Any], homes: list[Path]) -> None:
    """Names of files in `data`: those that nothing has in the working directory are looked for beside the recipe."""
    for dotted in PATHS:
        *sections, last = dotted.split(".")
        section: Any = data
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            continue
        value = section[last]
        if isinstance(value, list):
            section[last] = [entry | {"path": _located(entry["path"], homes)} if isinstance(entry, dict) and "path" in entry
                             else _located(entry, homes) for entry in value]
        else:
            section[last] = _located(value, homes)


def _located(value: Any, homes: list[Path]) -> Any:
    if not isinstance(value, str) or value.startswith("hub:"):
        return value
    value = os.path.expanduser(value)
    if os.path.isabs(value) or _names_something(value):
        return value
    return next((str(home / value) for home in homes if _names_something(str(home / value))), value)


def _names_something(pattern: str) -> bool:
    return os.path.exists(pattern) or next(glob.iglob(pattern, recursive=True), None) is not None


def _composed(path: Path, homes: list[Path], above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[tuple, str]]:
    """`_read_yaml` of a recipe and of those that it builds on, put together. Their folders are added to `homes`."""
    data, lines = _read_yaml(path)
    homes.append(path.parent)
    if "base" not in data:
        return data, lines
    name, where = data.pop("base"), lines.pop(("base",))
    if not isinstance(name, str):
        raise RecipeError(f"{where}: base: {name!r}: expected the file name of another recipe")
    base = find_recipe(path.parent / name if not Path(name).is_absolute() and (path.parent / name).exists() else Path(name))
    chain = [*above, path.resolve()]
    if not base.is_file():
        known = sorted({p.name for folder in (path.parent, Path(__file__).parent) for p in folder.glob("*.yaml")})
        near = _near_files(base.name, known)
        raise RecipeError(f"{where}: base: {name}: no such recipe file" + (f", did you mean {near[0]}?" if near else ""))
    if base.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(base.resolve()):], base))
        raise RecipeError(f"{where}: base: {name}: recipes that build on each other ({circle})")
    below, below_lines = _composed(base, homes, tuple(chain))
    return _merged(below, data), below_lines | lines


def _merged(below: dict, above: dict) -> dict:
    return below | {key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
                    for key, value in above.items()}


def find_recipe(path: Path) -> Path:
    """`path`, or the shipped recipe that it names where there is no such file (outside a clone)."""
    shipped = Path(__file__).resolve().parent / path.name
    return shipped if not path.exists() and str(path.parent) in (".", "recipes") and shipped.is_file() else path


def published(value: str) -> str:
    """A value of a recipe as others may read it: of a path of this machine its last name, of an address nothing."""
    if "://" in value:
        return "(an address)"
    if value.startswith(("/", "~", "..")) or re.match(r"[A-Za-z]:[\\/]", value):
        return PurePath(value).name or "(a folder)"
    return value


def dump_published(recipe: Recipe) -> str:
    """As `dump_recipe`, without paths and addresses of the machine that it was written on (`published`)."""
    def clean(value):
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return published(value) if isinstance(value, str) else value

    return yaml.safe_dump(clean(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe (every default written out) as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def valid_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe may hold, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from valid_keys(candidate, f"{prefix}{name}.")


def _near_files(name: str, known: list[str]) -> list[str]:
    """The file that was probably meant, by what stands before its ending."""
    stems = {Path(file).stem: file for file in known}
    return [stems[stem] for stem in difflib.get_close_matches(Path(name).stem, stems, n=1, cutoff=0.4)]


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple, str]]:
    """The document and, for each dotted key, where it stands ("file:line")."""
    if not path.is_file():
        near = _near_files(path.name, [p.name for p in path.parent.glob("*.yaml")])
        hint = f", did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError(f"{path}: no such recipe file{hint}")
    try:
        loader = _RecipeYaml(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            lines: dict[tuple, str] = {}
            if node is not None:
                _key_lines(node, (), lines, str(path))
            data = loader.construct_document(node) if node is not None else {}
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a UTF-8 text file (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of sections, found {type(data).__name__}")
    return data, lines


def _key_lines(node: yaml.Node, key: tuple, lines: dict[tuple, str], source: str) -> None:
    where = f"{source}:{node.start_mark.line + 1}"
    lines.setdefault(key, where)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _key_lines(child, (*key, i), lines, source)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, child in node.value:
        child_key = (*key, key_node.value)
        if child_key in lines:
            dotted = ".".join(map(str, child_key))
            raise RecipeError(f"{source}:{key_node.start_mark.line + 1}: {dotted}: given twice (first at {lines[child_key]})")
        lines[child_key] = f"{source}:{key_node.start_mark.line + 1}"
        _key_lines(child, child_key, lines, source)


def _apply_override(data: dict[str, Any], lines: dict[tuple, str], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected section.key=value")
    if key not in set(valid_keys()):
        raise RecipeError(f"override {override!r}: unknown key {key}{_nearest(key)}")
    try:
        value = yaml.load(text, _RecipeYaml)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    target = data
    for depth, section in enumerate(sections):
        child = target.get(section)
        if child is None:
            child = target[section] = {}
        if not isinstance(child, dict):
            dotted = ".".join(sections[: depth + 1])
            raise RecipeError(f"override {override!r}: {dotted} is not a section in the recipe")
        target = child
    target[last] = value
    lines[tuple(key.split("."))] = f"override {override!r}"


def _describe(fault: ErrorDetails, source: str, lines: dict[tuple, str]) -> str:
    loc = tuple(part for part in fault["loc"] if part not in SOURCE_TAGS)
    key = ".".join(map(str, loc))
    where = next((lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines), source)
    if fault["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key{_nearest(key)}"
    if fault["type"] == "missing":
        return f"{where}: {key}: required, but missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be ", "expected ", message)
    if fault["type"] in _EXPECTED:
        message = _EXPECTED[fault["type"]].format(**fault.get("ctx", {}))
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{where}: {message}"
    hint = ""
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        choices = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        near = difflib.get_close_matches(fault["input"], choices, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
    return f"{where}: {key}: {fault['input']!r}: {message}{hint}"


def _nearest(key: str) -> str:
    """', did you mean qat.steps?': the closest valid key, by initials (lr), as a whole, then by its last part."""
    keys = list(valid_keys())
    section, _, last = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    near = [k for k in siblings if "".join(word[0] for word in k.rpartition(".")[2].split("_")) == last][:1]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not near:
        by_last = {k.rpartition(".")[2]: k for k in keys}
        near = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f", did you mean {near[0]}?" if near else ""

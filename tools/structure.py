"""Counts the house: files, lines, functions, arguments, and arrows between rooms, of any revision.

    python tools/structure.py [REVISION ...]          # the working tree, and revisions beside it

A room is what lies directly in a package: a module, or a folder with all that is in it. An arrow from room to room says that
one imports the other, wherever in a file (imports for type checkers and inside functions count). A circle is a set of rooms
that reach each other; an arrow inside one has no direction that a reader could follow. Lines of code are those that are neither
blank nor a comment alone; docstrings count.
"""

import argparse
import ast
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = (".py", ".c", ".h")


def files(revision: str | None) -> dict[str, str]:
    """Path -> text of all code in a revision, or in the working tree."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    names = git("ls-files") if revision is None else git("ls-tree", "-r", "--name-only", revision)
    return {name: (ROOT / name).read_text(encoding="utf-8") if revision is None else git("show", f"{revision}:{name}")
            for name in names.splitlines() if name.endswith(CODE) and (revision is not None or (ROOT / name).is_file())}


def code_lines(text: str) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def arrows(modules: dict[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Room -> rooms of the same package that it imports."""
    def room(name: str) -> str | None:
        parts = name.split(".")
        return parts[1] if parts[0] == package and len(parts) > 1 else None

    found: dict[str, set[str]] = {}
    for name, tree in modules.items():
        if (own := room(name)) is None:
            continue
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        known = {other for other in map(room, names) if other is not None}
        found.setdefault(own, set()).update(known - {own})
    return {own: others & found.keys() for own, others in found.items()}


def circled(graph: dict[str, set[str]]) -> int:
    """Arrows inside circles."""
    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reach = {own: reached(own) for own in graph}
    return sum(own in reach[other] for own, others in graph.items() for other in others)


def measure(revision: str | None) -> dict[str, object]:
    texts = files(revision)
    trees = {path: ast.parse(text) for path, text in texts.items() if path.endswith(".py")}
    ours = {path: text for path, text in texts.items() if not path.startswith("tests/")}
    functions = [node for path, tree in trees.items() if path in ours for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions)
    arguments = sorted((len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs), node.name) for node in functions)
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for path, tree in trees.items()
               if path in ours}
    inside = arrows(modules, "runtime_ref")
    return {
        "files of code": len(ours), "lines of code": sum(map(code_lines, ours.values())),
        "files of tests": len(texts) - len(ours),
        "lines of tests": sum(code_lines(text) for path, text in texts.items() if path not in ours),
        "files over 400 lines": sum(len(text.splitlines()) > 400 for text in ours.values()),
        "functions": len(lengths), "lines of a function, median": statistics.median(lengths),
        "lines of a function, 95 %": lengths[len(lengths) * 95 // 100], "functions over 60 lines": sum(n > 60 for n in lengths),
        "largest argument list": "{} ({})".format(*arguments[-1]),
        "rooms of runtime_ref": len(inside), "arrows between them": sum(map(len, inside.values())),
        "arrows in circles": circled(inside)}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", help="beside the working tree")
    revisions = parser.parse_args(argv).revisions
    columns = [measure(revision) for revision in (*revisions, None)]
    print(f"| | {' | '.join((*revisions, 'working tree'))} |", f"|---|{'---|' * len(columns)}", sep="\n")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(format(c[name], ',') if isinstance(c[name], int) else str(c[name]) for c in columns)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

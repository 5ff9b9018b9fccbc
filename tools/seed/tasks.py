"""Generators of short instructions with one definite answer, for the seed's pretraining and for its held-out prompts.

Why generated tasks: the greedy continuation of a small model on open text soon loops, and a figure measured on a loop
(an acceptance length, a top-1 agreement) means nothing. These answers are short, follow from the prompt alone and end
with the end-of-text token, so "right" and "ended" can be decided exactly.

Every task is `Task(domain, name, instruction, answer)`. The prompt is the chat template's user turn, the answer the
assistant turn. A generator takes a `random.Random` and nothing else (code tasks also take a pool of real functions),
so a string seed reproduces a task anywhere. Identifiers, values and operands are drawn from products of word lists
that are far larger than what pretraining sees: a right answer has to be computed, not recalled.

Arithmetic is written digit by digit from the right, carries included, because a model of this size can do one step
of column arithmetic but not a whole sum at once.
"""

import ast
import builtins
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = (
    "total count index value width height offset length name path file line word token buffer cache key item node "
    "edge graph tree list table row column cell batch step rate scale weight bias layer model input output source "
    "target query result answer score limit bound lower upper first last next prev start stop begin end size depth "
    "level rank order group block chunk page frame window view panel label title text char byte bit mask flag state "
    "mode kind type field record entry user owner host port socket stream reader writer parser lexer loader saver "
    "handle event signal slot task job queue stack heap pool worker thread process lock timer clock date hour minute "
    "second month year price cost tax sum mean median factor ratio margin padding border color red green blue alpha "
    "beta gamma delta sigma theta point arc angle radius center corner left right top bottom front back inner outer "
    "local remote shared static dynamic old new raw clean dirty open closed active idle ready busy done failed error "
    "warning message reply request response header body footer prefix suffix root leaf parent child sibling version "
    "build release patch branch commit merge diff hash seed sample draw trial round turn move shift rotate flip"
).split()
VERBS = (
    "get set add remove update load save read write parse format build make find count merge split join sort filter "
    "check test apply reset clear copy move scale clip pack send fetch open close start stop print render draw compute"
).split()
FIRST_NAMES = (
    "Ada Alan Barbara Carl Clara Daniel Dora Edgar Elena Emil Eva Felix Fiona Frank Grace Hanna Hugo Ida Ivan Jana "
    "Jonas Julia Karl Kira Lara Leo Lina Louis Maria Max Mila Nils Nina Noah Olga Oscar Paul Petra Quentin Rita Robert "
    "Rosa Samuel Sara Simon Sofia Tara Theo Tom Ursula Vera Victor Walter Wanda Xenia Yara Yuri Zoe"
).split()
LAST_NAMES = (
    "Adler Becker Brandt Carter Costa Dalton Ekman Fischer Fontana Garcia Graham Hansen Hoffman Ito Jensen Keller "
    "Kovacs Lang Lopez Marsh Meyer Moreau Nakata Novak Olsen Parker Petrov Quinn Ricci Rossi Sato Schmidt Silva Tanaka "
    "Torres Ulrich Vargas Weber Wolf Young Zeller"
).split()
CITIES = (
    "Athens Berlin Bergen Boston Cairo Dublin Florence Geneva Hamburg Helsinki Kyoto Lima Lisbon London Lyon Madrid "
    "Milan Munich Naples Oslo Ottawa Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney Tokyo Turin Vienna Warsaw "
    "Zagreb Zurich"
).split()
JOBS = (
    "architect baker biologist carpenter chemist dentist designer doctor editor engineer farmer geologist historian "
    "judge lawyer librarian mechanic musician nurse painter photographer pilot plumber professor sailor tailor teacher "
    "translator writer"
).split()
MATERIALS = "wood steel glass paper cotton leather plastic copper clay stone wool rubber".split()
OBJECTS = "chair table lamp bottle basket bag clock mirror shelf box bowl jacket pipe tile rope door".split()
COLORS = "red green blue black white yellow grey brown orange purple".split()
TYPES = "int float str bool list dict bytes tuple".split()
ADJECTIVES = "maximum minimum current default expected initial final optional average relative absolute new".split()


@dataclass(frozen=True)
class Task:
    domain: str  # code, prose or math
    name: str  # which generator
    instruction: str  # the user turn
    answer: str  # the assistant turn, without the end-of-text token


def identifier(rng: random.Random, words: int | None = None) -> str:
    return "_".join(rng.sample(WORDS, words or rng.choice((1, 2, 2))))


# ---- code -----------------------------------------------------------------------------------------------------------


def _expression(rng: random.Random, names: Sequence[str]) -> str:
    a, b = rng.choice(names), rng.choice([*names, str(rng.randint(1, 99))])
    return rng.choice((f"{a} + {b}", f"{a} * {b}", f"{a} - {b}", f"max({a}, {b})", f"min({a}, {b})", f"abs({a})",
                       f"{a}[{rng.randint(0, 9)}]", f"len({a})", f"{a} // {rng.randint(2, 20)}"))


def synthetic_function(rng: random.Random) -> str:
    """A function of two to five lines over random identifiers; it need not be sensible, only regular."""
    args = [identifier(rng) for _ in range(rng.randint(1, 3))]
    names, lines = list(args), [f"def {rng.choice(VERBS)}_{identifier(rng)}({', '.join(args)}):"]
    for _ in range(rng.randint(0, 2)):
        form = rng.random()
        if form < 0.6:
            new = identifier(rng)
            lines.append(f"    {new} = {_expression(rng, names)}")
            names.append(new)
        elif form < 0.85:
            lines.append(f"    if {rng.choice(names)} {rng.choice('<>')} {rng.randint(0, 500)}:")
            lines.append(f"        {rng.choice(('return', names[-1] + ' ='))} {_expression(rng, names)}")
        else:
            lines.append(f"    print({rng.choice(names)})")
    return "\n".join([*lines, f"    return {_expression(rng, names)}"])


def short_functions(source: str) -> list[str]:
    """Real functions of a Python file that are short enough to be a task: 2 to 6 lines, at most 200 characters."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines, found = source.split("\n"), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            text = [line[node.col_offset:] for line in lines[node.lineno - 1 : node.end_lineno]]
            body = "\n".join(text)
            plain = all(not line[: node.col_offset].strip() for line in lines[node.lineno - 1 : node.end_lineno])
            if plain and 2 <= len(text) <= 6 and len(body) <= 200 and "`" not in body and '"""' not in body:
                found.append(body)
    return found


def _function(rng: random.Random, pool: Sequence[str]) -> str:
    return rng.choice(pool) if pool and rng.random() < 0.5 else synthetic_function(rng)


def _variables(function: str) -> list[str]:
    tree = ast.parse(function)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in (*n.args, *n.kwonlyargs)}
    return sorted(names - {"self", "cls"} - set(dir(builtins)))


def rename_task(rng: random.Random, pool: Sequence[str] = ()) -> Task:
    while True:
        function = _function(rng, pool)
        names = _variables(function)
        new = identifier(rng)
        if names and not re.search(rf"\b{new}\b", function):
            old = rng.choice(names)
            return Task("code", "rename", f"Rename `{old}` to `{new}`.\n{function}",
                        re.sub(rf"\b{re.escape(old)}\b", new, function))


def constant_task(rng: random.Random, pool: Sequence[str] = ()) -> Task:
    while True:
        function = _function(rng, pool)
        numbers = [n for n in re.findall(r"(?<![\w.'\"])\d+(?![\w.'\"])", function)]
        if numbers and len(numbers) == len(set(numbers)):
            old, new = rng.choice(numbers), str(rng.randint(2, 999))
            if new not in numbers:
                return Task("code", "constant", f"Change the constant {old} to {new}.\n{function}",
                            re.sub(rf"(?<![\w.'\"]){old}(?![\w.'\"])", new, function))


# ---- prose ----------------------------------------------------------------------------------------------------------


def _record(rng: random.Random) -> tuple[dict[str, str | int], str]:
    """A record and the one sentence that tells it."""
    kind = rng.randrange(4)
    if kind == 0:
        r = {"name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}", "job": rng.choice(JOBS),
             "city": rng.choice(CITIES), "since": rng.randint(1900, 2025)}
        article = "an" if r["job"][0] in "aeiou" else "a"
        return r, f"{r['name']} has worked as {article} {r['job']} in {r['city']} since {r['since']}."
    if kind == 1:
        r = {"object": rng.choice(OBJECTS), "color": rng.choice(COLORS), "material": rng.choice(MATERIALS),
             "price": rng.randint(2, 999)}
        return r, f"The {r['color']} {r['object']} is made of {r['material']} and costs {r['price']} euros."
    if kind == 2:
        r = {"module": identifier(rng), "version": f"{rng.randint(0, 9)}.{rng.randint(0, 30)}",
             "author": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}", "files": rng.randint(2, 400)}
        return r, f"Version {r['version']} of {r['module']} was written by {r['author']} and has {r['files']} files."
    r = {"from": rng.choice(CITIES), "to": rng.choice(CITIES), "hour": rng.randint(1, 23), "seats": rng.randint(2, 400)}
    return r, f"The train from {r['from']} to {r['to']} leaves at {r['hour']} and has {r['seats']} free seats."


def _record_lines(rng: random.Random, record: dict[str, str | int]) -> str:
    items = list(record.items())
    rng.shuffle(items)
    return "\n".join(f"{key}: {value}" for key, value in items)


def sentence_task(rng: random.Random) -> Task:
    record, sentence = _record(rng)
    return Task("prose", "sentence", f"Write the record as a sentence.\n{_record_lines(rng, record)}", sentence)


def docstring_task(rng: random.Random) -> Task:
    """Complete a docstring's fields from a signature and a list of descriptions in another order."""
    names = []
    while len(names) < rng.choice((1, 2, 2, 3)):
        name = identifier(rng)
        if name not in names:
            names.append(name)
    types = [rng.choice(TYPES) for _ in names]
    notes = {n: f"{rng.choice(ADJECTIVES)} {rng.choice(WORDS)} of the {rng.choice(WORDS)}" for n in names}
    gives, returned = rng.choice(TYPES), f"{rng.choice(ADJECTIVES)} {rng.choice(WORDS)}"
    signature = ", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))
    shuffled = rng.sample(names, len(names))
    prompt = [f"def {rng.choice(VERBS)}_{identifier(rng)}({signature}) -> {gives}",
              *(f"{n} is the {notes[n]}" for n in shuffled), f"returns the {returned}"]
    answer = ["Args:", *(f"    {n} ({t}): The {notes[n]}." for n, t in zip(names, types, strict=True)),
              "Returns:", f"    {gives}: The {returned}."]
    return Task("prose", "docstring", "Write the docstring fields.\n" + "\n".join(prompt), "\n".join(answer))


# ---- math and structured text ---------------------------------------------------------------------------------------


def json_task(rng: random.Random) -> Task:
    record, _ = _record(rng)
    if rng.random() < 0.5:
        record = {name: rng.choice((rng.randint(0, 9999), rng.choice(WORDS), rng.choice(CITIES)))
                  for name in rng.sample(WORDS, rng.randint(2, 4))}
    lines = _record_lines(rng, record)
    pairs = (line.split(": ", 1) for line in lines.split("\n"))
    return Task("math", "json", f"Write the record as JSON.\n{lines}",
                json.dumps({k: int(v) if v.isdigit() else v for k, v in pairs}))


def _operand(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def add_steps(a: int, b: int) -> str:
    steps, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}")
        carry = total // 10
    return "\n".join([*steps, f"{a} + {b} = {a + b}"])


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction for a ≥ b; a borrow is the third term of the next column."""
    steps, borrow = [], 0
    for x, y in _columns(a, b):
        total = x - y - borrow
        steps.append(f"{x} - {y} - {borrow} = {total % 10}")
        borrow = int(total < 0)
    return "\n".join([*steps, f"{a} - {b} = {a - b}"])


def multiply_steps(a: int, b: int) -> str:
    """`a` times one digit `b`, column by column."""
    steps, carry = [], 0
    for x, _ in _columns(a, 0):
        total = x * b + carry
        steps.append(f"{x} * {b} + {carry} = {total}")
        carry = total // 10
    return "\n".join([*steps, f"{a} * {b} = {a * b}"])


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both numbers from the right, the shorter one filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True)]


def arithmetic_task(rng: random.Random) -> Task:
    kind = rng.choice(("add", "subtract", "multiply"))
    a, b = _operand(rng, rng.randint(2, 4)), _operand(rng, rng.randint(2, 4))
    if kind == "add":
        return Task("math", kind, f"Compute {a} + {b} step by step.", add_steps(a, b))
    if kind == "subtract":
        a, b = max(a, b), min(a, b)
        return Task("math", kind, f"Compute {a} - {b} step by step.", subtract_steps(a, b))
    b = rng.randint(2, 9)
    return Task("math", kind, f"Compute {a} * {b} step by step.", multiply_steps(a, b))


# ---- mixtures -------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, tuple[Callable[..., Task], ...]] = {
    "code": (rename_task, constant_task),
    "prose": (sentence_task, docstring_task),
    "math": (json_task, arithmetic_task, arithmetic_task),
}


def sample_task(domain: str, rng: random.Random, functions: Sequence[str] = ()) -> Task:
    """One task of `domain`. `functions` is the pool of real functions for code tasks (half of them, when not empty)."""
    make = rng.choice(GENERATORS[domain])
    return make(rng, functions) if domain == "code" else make(rng)


def _csv_table(rng: random.Random) -> str:
    names = rng.sample(WORDS, rng.randint(2, 4))
    rows = [[rng.randint(0, 999) for _ in names] for _ in range(rng.randint(2, 5))]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    lines = [",".join(["row", *names])] + [",".join(map(str, [i + 1, *row])) for i, row in enumerate(rows)]
    return "Table with totals.\n" + "\n".join([*lines, ",".join(["total", *map(str, totals)])])


def _records_as_json(rng: random.Random) -> str:
    names = rng.sample(WORDS, rng.randint(2, 3))
    rows = [{n: rng.choice((rng.randint(0, 999), rng.choice(CITIES))) for n in names} for _ in range(rng.randint(2, 3))]
    return "Records.\n" + json.dumps(rows, indent=2)


def _sorted_list(rng: random.Random) -> str:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(4, 8))]
    return f"Sort {', '.join(map(str, numbers))}.\n{', '.join(map(str, sorted(numbers)))}"


def _sequence(rng: random.Random) -> str:
    start, step = rng.randint(1, 99), rng.randint(2, 12)
    return f"Count from {start} in steps of {step}.\n" + ", ".join(str(start + i * step) for i in range(10))


def _settings(rng: random.Random) -> str:
    section = rng.choice(WORDS)
    pairs = [(n, rng.choice((rng.randint(0, 999), rng.choice(WORDS)))) for n in rng.sample(WORDS, rng.randint(2, 5))]
    ini = "\n".join(f"{k} = {v}" for k, v in pairs)
    yaml = "\n".join(f"  {k}: {v}" for k, v in pairs)
    return f"Settings as INI.\n[{section}]\n{ini}\nThe same as YAML.\n{section}:\n{yaml}"


def math_document(seed: str) -> str:
    """A plain-text document of about 1.5 KB: worked arithmetic and structured text, drawn from `seed`."""
    rng = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < 1500:
        if rng.random() < 0.55:
            task = arithmetic_task(rng)
            parts.append(f"{task.instruction}\n{task.answer}")
        else:
            parts.append(rng.choice((_csv_table, _records_as_json, _sorted_list, _sequence, _settings))(rng))
    return "\n\n".join(parts) + "\n"

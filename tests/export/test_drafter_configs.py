"""A drafter's config.json with values of any type is one line, wherever it is read: to be served, trained on or exported."""

import json

import pytest
from toy_export import make_run

from checkpoint.inventory import configuration
from export.drafter_files import open_drafter
from modeling.drafter import load_drafter

VALUES = ("x", None, [None], {}, -1, 1.5, 10**400)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("toy")).parent / "runs" / "toy"


def places(value: dict, path: tuple = ()):
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


def outcome(read) -> str:
    """"read", "one line", or what else an attempt ended in."""
    try:
        read()
    except ValueError as error:
        return f"several lines: {error}" if "\n" in str(error) else "one line"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def test_ill_typed_values_of_every_key_are_one_line(run):
    folder = run / "dflash" / "model"
    file, target = folder / "config.json", configuration(json.loads((run / "qat" / "model" / "config.json").read_text()))
    whole, found = json.loads(file.read_text()), {}
    for number, where in enumerate(places(whole)):
        for value in (VALUES[number % 7], VALUES[(number + 3) % 7]):
            changed = json.loads(json.dumps(whole))
            home = changed
            for key in where[:-1]:
                home = home[key]
            home[where[-1]] = value
            file.write_text(json.dumps(changed))
            found[where, f"{value!r:.20}", "loaded"] = outcome(lambda: load_drafter(folder))
            found[where, f"{value!r:.20}", "exported"] = outcome(lambda: open_drafter(folder, target))
    file.write_text(json.dumps(whole))
    assert {case: end for case, end in found.items() if end not in ("read", "one line")} == {}
    assert list(found.values()).count("one line") > 50
    load_drafter(folder), open_drafter(folder, target)  # as it was

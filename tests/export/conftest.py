"""Session-wide: one tiny run and its native export. Tests that damage or change them work on copies."""

from pathlib import Path

import pytest
from toy_export import export, make_run


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory) -> Path:
    """Recipe of a run with a drafter; its folder must not be changed."""
    return make_run(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def exported(toy_run) -> Path:
    """The native export of `toy_run`, in several files; must not be changed."""
    return export(toy_run, "export.shard_bytes=100000", out=toy_run.parent / "native")

"""The lock files: whatever is installed for development, CI and releases is one of files with known
hashes, and pyproject.toml asks for nothing else."""

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
PIN = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.]+)(?: ; (?P<marker>.*?))? \\$")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?$")


def requirements_of(project: dict[str, Any], lock: str) -> Iterator[Requirement]:
    """What pyproject.toml requires, of what the Makefile puts into this lock."""
    [command] = re.findall(rf"\$\(LOCK\) (.*) -o requirements/{lock}.lock", MAKEFILE)
    extras = re.findall(r"--extra (\w+)", command)
    if "$(EXTRAS)" in command:
        extras = re.findall(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)[0].split(",")
    lists: list[Iterable[str]] = [
        project["project"]["optional-dependencies"][each] for each in extras
    ]
    if "pyproject.toml" in command:
        lists.append(project["project"]["dependencies"])
    lists += [project["dependency-groups"][each] for each in re.findall(r"--group (\w+)", command)]
    for each in lists:
        yield from map(Requirement, each)


def pinned(text: str) -> dict[str, set[str]]:
    """The versions by name: several where they differ from Python to Python."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        pin = PIN.match(line)
        if pin:
            found.setdefault(canonicalize_name(pin["name"]), set()).add(pin["version"])
    return found


def missing(project: dict[str, Any], lock: str) -> list[str]:
    """What is required and not in the lock, or in another version."""
    pins = pinned((ROOT / f"requirements/{lock}.lock").read_text())
    return [
        str(each)
        for each in requirements_of(project, lock)
        if not any(map(each.specifier.contains, pins.get(canonicalize_name(each.name), ())))
    ]


LOCKS = ["dev", "proxies", "release", "runtime"]


def test_each_lock_is_looked_at() -> None:
    """One that is added needs its line here."""
    assert sorted(path.stem for path in (ROOT / "requirements").iterdir()) == sorted(LOCKS)


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_what_is_asked_for(lock: str) -> None:
    """Otherwise: make lock."""
    assert missing(PROJECT, lock) == []


def test_a_lock_that_was_not_renewed_is_seen() -> None:
    """The broken twin: a package more, and a package newer, than what is locked."""
    more = {
        **PROJECT,
        "dependency-groups": {**PROJECT["dependency-groups"], "dev": ["a-new-one>=1"]},
    }
    assert missing(more, "dev") == ["a-new-one>=1"]
    newer = {**PROJECT, "project": {**PROJECT["project"], "dependencies": ["starlette>=9999"]}}
    assert missing(newer, "runtime") == ["starlette>=9999"]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_file_is_known_by_its_hash(lock: str) -> None:
    """And comes from the index: no other source is named, and no path of a machine."""
    lines = (ROOT / f"requirements/{lock}.lock").read_text().splitlines()
    for number, line in enumerate(lines):
        assert not line or line.startswith(("#", "    #")) or PIN.match(line) or HASH.match(line), (
            line
        )
        if PIN.match(line):
            assert HASH.match(lines[number + 1])


def test_ci_takes_nothing_without_its_hash() -> None:
    """Each installation in CI and in the Makefile's locked way names a lock."""
    installs = [
        line
        for text in ((ROOT / ".ci/run").read_text(), MAKEFILE.replace("\\\n", " "))
        for line in text.splitlines()
        if re.search(r"bin/pip install|/pip install", line)
    ]
    unlocked = [line.split("pip install")[1] for line in installs if "--require-hashes" not in line]
    assert [each for each in unlocked if "--no-deps" not in each and ".[" not in each] == [
        " --quiet --disable-pip-version-check --upgrade pip"
    ], "only LOCKED=0 and the demo do without"

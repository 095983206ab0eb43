"""The vocabulary holds: no word that the glossary replaced comes back.

`words_left.json` has how many each file may still have. It only ever shrinks: after a file was
rewritten, `python benchmarks/glossary_words.py --counts > tests/project/words_left.json`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from code_figures import import_graph, levels, lines, root_modules
from glossary_words import (
    KEPT,
    METAPHORS,
    PACKAGES,
    PRONOUNS,
    REPLACED,
    ROOT,
    Place,
    all_identifiers,
    all_prose,
    counts,
    identifiers,
    prose,
)

LEFT = json.loads(Path(__file__).with_name("words_left.json").read_text())
MAX_PRONOUNS = 4  # in both packages


def excess(places: Iterable[Place], allowed: dict[str, int]) -> dict[str, list[str]]:
    """Files with more places than allowed; each place as `LINE: WORD -> REPLACEMENT`."""
    found = list(places)
    return {
        file: [
            f"{p.line}: {p.word} -> {REPLACED.get(p.word, '?')}" for p in found if p.file == file
        ]
        for file, count in counts(found).items()
        if count > allowed.get(file, 0)
    }


def test_no_replaced_identifier_comes_back() -> None:
    """Classes, functions, arguments and variables of the whole repository."""
    assert excess(all_identifiers(), LEFT["identifiers"]) == {}


def test_no_metaphor_comes_back() -> None:
    """Comments and strings of the packages, and all documents."""
    places = [place for place in all_prose() if place.word in METAPHORS]
    assert excess(places, LEFT["prose"]) == {}


def test_prose_names_the_acting_part() -> None:
    """In the packages fewer than five pronouns, beside those that are left; in documents none."""
    places = [place for place in all_prose() if place.word in PRONOUNS]
    in_documents = [place for place in places if not place.file.startswith(PACKAGES)]
    assert excess(in_documents, LEFT["prose"]) == {}
    in_packages = [place for place in places if place.file.startswith(PACKAGES)]
    over = excess(in_packages, LEFT["prose"])
    assert sum(map(len, over.values())) <= MAX_PRONOUNS, over


@pytest.mark.parametrize(
    "planted",
    ["class Witness: ...", "def catch_up(): ...", "f(verdict=1)", "self.bell = 1", "import news"],
)
def test_a_planted_identifier_is_found(planted: str) -> None:
    """Its file fails, also where the file's other words are allowed."""
    places = list(identifiers(f"x = 1\n{planted}\n", "planted.py"))
    assert [(place.file, place.line) for place in places] == [("planted.py", 2)]
    assert list(excess(places, {})) == ["planted.py"]
    assert list(excess([*places, *places], {"planted.py": 1})) == ["planted.py"]


@pytest.mark.parametrize(
    "planted",
    [
        '"""Whoever rings the bell."""',
        "x = 1  # a key that was made elsewhere",
        'log.warning("could not say goodbye")',
        'f"{x} is told"',
    ],
)
def test_planted_prose_is_found(planted: str) -> None:
    """Docstrings, comments, log lines, f-strings, and documents."""
    assert list(excess(prose(planted, "planted.py"), {})) == ["planted.py"]
    assert list(excess(prose(planted, "planted.md"), {})) == ["planted.md"]


def test_other_words_are_not_found() -> None:
    """Parts of words, texts as identifiers, and words with an established meaning of their own."""
    text = "overheard = 'verdict'; line = path.touch()  # string, feeder, a line of a file\n"
    assert list(identifiers(text)) == []
    assert list(prose(text, "x.py")) == []


def test_every_word_has_one_treatment() -> None:
    """Replaced or kept for a reason, never both; and what a file may have left exists."""
    assert set(REPLACED) & set(KEPT) == set()
    assert all(KEPT.values())
    gone = [file for files in LEFT.values() for file in files if not (ROOT / file).exists()]
    assert gone == []


def test_the_figures_are_counted() -> None:
    """Those of `make figures` that need no run, within the limits of the design."""
    modules, folders = root_modules(ROOT)
    assert modules + folders <= 26
    assert 5 < levels(import_graph(ROOT, 1)) <= 13
    total, code = lines(ROOT, "middleware")
    assert 5_000 < code < total


def test_levels_are_the_longest_chain() -> None:
    """Counted in modules; a circle ends it."""
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3
    assert levels({"a": {"b"}, "b": {"a"}}) == 2


@pytest.mark.long
def test_the_files_of_each_journey_are_few() -> None:
    """On SQLite with Redis. A reader follows a hit through so many files, and no more."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/code_figures.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(re.findall(r"^files of a (.+?) +(\d+)$", done.stdout, re.MULTILINE))
    assert found.keys() == {"hit", "cold check", "DELETE"}
    assert int(found["hit"]) <= 12
    assert int(found["cold check"]) <= 29
    assert int(found["DELETE"]) <= 36

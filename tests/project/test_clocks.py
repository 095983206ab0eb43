"""Time is an argument: these packages read no clock of their own, so tests move it by hand."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "middleware/keylatch"
CLOCKS = ("clock_gettime", "monotonic", "now", "perf_counter", "time", "time_ns", "utcnow")
MODULES = ("time", "datetime")


def clock_reads(source: str) -> Iterator[int]:
    """The lines of calls of a clock, except in the defaults of arguments."""
    tree = ast.parse(source)
    defaults = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for default in (*node.defaults, *node.kw_defaults)
        if default is not None
        for inner in ast.walk(default)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in defaults:
            module, _, name = ast.unparse(node.func).rpartition(".")
            if module in MODULES and name in CLOCKS:
                yield node.lineno


@pytest.mark.parametrize("package", ["adapters", "caches", "core", "telemetry", "usage"])
def test_no_clock_is_read(package: str) -> None:
    """Not in the body of any function; the default of an argument may be a clock."""
    files = sorted((ROOT / package).glob("*.py"))
    assert files
    assert [f"{file.name}:{line}" for file in files for line in clock_reads(file.read_text())] == []


def test_a_clock_that_is_read_is_found() -> None:
    """The broken twin: a call in a body is found, a default is not."""
    source = "import time\ndef wait(timer=time.time, day=lambda: time.time() // 86400):\n"
    assert list(clock_reads(f"{source}    return timer()\n")) == []
    assert list(clock_reads(f"{source}    return time.monotonic()\n")) == [3]

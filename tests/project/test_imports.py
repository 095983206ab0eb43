"""Importing a module of the sidecar or of the load tool has no effects."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, os, pkgutil, threading, warnings
import keylatch_bench, keylatch_sidecar

def names(package):
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [each.name for each in found]

open_before = os.listdir("/dev/fd")
for name in names(keylatch_sidecar) + names(keylatch_bench):
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
assert len(os.listdir("/dev/fd")) == len(open_before), "a file or socket was opened"
"""


@pytest.mark.long
def test_importing_any_module_prints_and_starts_nothing() -> None:
    """No output, no thread, no open file; a module that runs a command would exit with its code."""
    command = [sys.executable, "-c", IMPORT_ALL]
    imported = subprocess.run(command, capture_output=True, text=True)
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")

"""Runs `keylatch` commands, in this process or in one of their own."""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from keylatch_sidecar.cli.program import main

SCRIPT = Path(sys.executable).parent / "keylatch"


@dataclass(frozen=True)
class Result:
    """How a run ended and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str


class Operator:
    """Runs `keylatch` commands with a store."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder = folder
        self.database = folder / "keys.db"
        self._monkeypatch = monkeypatch
        self._capture = capture
        self.set(STORE=f"sqlite:///{self.database}", HASHER="sha256", REDIS="")
        monkeypatch.setenv("COLUMNS", "200")

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            self._monkeypatch.setenv(f"KEYLATCH_{name}", value)

    def run(self, *arguments: str, stdin: str = "") -> Result:
        """The command in this process, which saves Python's start; an exception fails the test."""
        self._monkeypatch.setattr(sys, "argv", ["keylatch", *arguments])
        self._monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin.encode())))
        self._capture.readouterr()
        keylatch = logging.getLogger("keylatch")
        level = keylatch.level  # some commands change it, for the process that would end with them
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            keylatch.setLevel(level)
        code = ended.value.code or 0
        assert isinstance(code, int)
        return Result(code, *self._capture.readouterr())

    def start(self, *arguments: str, wrapper: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """The real console script, in a process of its own."""
        return subprocess.Popen(
            [*wrapper, str(SCRIPT), *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a server's workers can be ended with it
        )

    def create(self, *words: str) -> dict[str, Any]:
        """A key, as `--json` shows it."""
        created = self.run("keys", "create", "--name", "a key", "--json", *words)
        key: dict[str, Any] = json.loads(created.stdout)
        return key


def wait_for_exit(process: "subprocess.Popen[str]") -> Result:
    """How a process ends, in a minute at most."""
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)

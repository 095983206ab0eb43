"""Typical user code is understood by both type checkers, in their strictest mode."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

CODE = Path(__file__).with_name("typical_code.py")


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_typical_code_is_understood(tmp_path: Path, checker: str) -> None:
    """No error, no unknown type, and a mistake in it is found."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(CODE.read_text().replace('public=("/healthz",)', "public=7"))
    assert checked(checker, CODE, tmp_path) == 0
    assert checked(checker, wrong, tmp_path) != 0


def checked(checker: str, code: Path, folder: Path) -> int:
    """The exit code of a checker, run where no configuration of ours is."""
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={folder}", str(code)]
    if checker == "pyright":
        pytest.importorskip("basedpyright")
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        command = [sys.executable, "-m", "basedpyright", "-p", str(folder), str(code)]
        command += ["--pythonpath", sys.executable]
    return subprocess.run(command, cwd=folder, check=False).returncode

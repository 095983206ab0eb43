"""The library on macOS and on Windows: child processes lack what those systems lack."""

import subprocess
import sys
from pathlib import Path

import pytest

MACOS = """
import ctypes, time
del time.CLOCK_BOOTTIME
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "mremap":
            raise AttributeError("dlsym(RTLD_DEFAULT, mremap): symbol not found")
        return super().__getattr__(name)
ctypes.CDLL = Library
"""
"""It has no mremap(2) and no CLOCK_BOOTTIME."""

WINDOWS = """
import asyncio, ctypes, os, sys, tempfile, time
import sqlalchemy.ext.asyncio
class Library(ctypes.CDLL):
    def __init__(self, name, *args, **options):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        super().__init__(name, *args, **options)
ctypes.CDLL = Library
sys.modules["fcntl"] = None
for name in ("register_at_fork", "fork", "fchmod", "fchown", "geteuid", "getuid"):
    delattr(os, name)
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
    delattr(os, name)
del time.clock_gettime
for name in [name for name in dir(time) if name.startswith("CLOCK_")]:
    delattr(time, name)
"""
"""It has no fcntl, no fork, no owners of files, no POSIX clocks and no `CDLL(None)`."""

USE_TESTING = """
import keylatch, keylatch.asgi, keylatch.wsgi
from keylatch.testing import Keys

def hello(environ, start_response):
    start_response("200 OK", [])
    return [b"hello"]

def status():
    answered = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    environ["HTTP_AUTHORIZATION"] = "Bearer " + key.token
    app(environ, lambda status, headers, *error: answered.append(status[:3]))
    return answered

app = keylatch.wsgi.APIKeyMiddleware(hello, store="sqlite:///keys.db")
keys = Keys()
key = keys.create()
with keys.behind(app):
    assert status() == ["200"] and status() == ["200"]
    keys.revoke(key)
    assert status() == ["401"]
"""

USE_STORE = """
import asyncio, sys, time
from keylatch.core.decisions import Allow, Deny
from keylatch.engine import Engine
from keylatch.revocation.lease import boottime
from keylatch.settings import Settings

async def main():
    settings = Settings.load(store="sqlite:///" + sys.argv[1])
    engine, other = Engine(settings), Engine(settings)
    keyring = await other.keyring()
    created = await keyring.create("org", "a key")
    header = [f"Bearer {created.token.reveal()}".encode()]
    assert isinstance(await engine.authenticate(header), Allow)
    assert isinstance(await engine.authenticate(header), Allow)
    assert engine.store.data_version() is None
    await keyring.delete("org", created.record.id)
    assert isinstance(await engine.authenticate(header), Deny)
    await engine.stop()
    await other.stop()

before = boottime()
asyncio.run(main())
assert boottime() >= before
"""


def run(program: str, folder: Path) -> str:
    command = [sys.executable, "-c", program, str(folder / "keys.db")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.stderr.strip()


@pytest.mark.parametrize("platform", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_an_app_is_tested_on_a_laptop(platform: str, tmp_path: Path) -> None:
    """Both middlewares are imported, and `keylatch.testing` decides for an app with a store."""
    assert run(platform + USE_TESTING, tmp_path) == ""
    assert not (tmp_path / "keys.db").exists()


def test_a_store_on_macos_revokes_at_once(tmp_path: Path) -> None:
    """Without the mapped WAL index each check reads the sequence number in the file."""
    assert "Traceback" not in run(MACOS + USE_STORE, tmp_path)


def test_a_store_on_windows_is_refused(tmp_path: Path) -> None:
    """By an error with a hint, and before a file is created that other accounts could read."""
    said = run(WINDOWS + USE_STORE, tmp_path)
    assert "error: a SQLite store needs POSIX locks and permissions" in said
    assert "hint: run the app in WSL or in a container" in said
    assert not (tmp_path / "keys.db").exists()


@pytest.mark.parametrize("missing", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_the_platforms_are_played(missing: str, tmp_path: Path) -> None:
    """The broken twin: what needs Linux fails in these processes."""
    needs = "\nimport ctypes, time\ntime.CLOCK_BOOTTIME, ctypes.CDLL(None).mremap"
    assert run(missing + needs, tmp_path) != ""
    assert run(needs, tmp_path) == ""

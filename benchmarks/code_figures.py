"""Figures about the code itself: how many modules, import levels, lines, and files of each journey.

    python benchmarks/code_figures.py [ROOT] [--store URL]

ROOT is a checkout (default: this one), so two versions are compared by the same command. The three
journeys run on the real middleware and the real sidecar, with a SQLite store (or `--store`) and
Redis (fakeredis) unless `--no-redis`: a file counts if one of its functions is called.
"""

import argparse
import ast
import asyncio
import contextvars
import io
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from glossary_words import (
    COUNTED_PRONOUNS,
    PACKAGES,
    ROOT,
    all_identifiers,
    all_prose,
    python_files,
)

_IS_JOURNEY: Final = contextvars.ContextVar("is_journey", default=False)
_WARM_REQUESTS: Final = 100  # more than are timed: a timed hit calls more functions
_NO_CODE: Final = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


# Modules


def root_modules(root: Path) -> tuple[int, int]:
    """Modules and folders in the root of `keylatch`, `__init__` not counted."""
    package = root / "middleware/keylatch"
    folders = [path for path in package.iterdir() if (path / "__init__.py").exists()]
    return len([*package.glob("*.py")]) - 1, len(folders)


def import_graph(root: Path, depth: int | None = None) -> dict[str, set[str]]:
    """Which module of `keylatch` imports which; with `depth` 1, which of the root's rooms.

    Imports for type checkers alone, and those inside of functions, count as well.
    """
    package = root / "middleware/keylatch"
    modules = {_module_name(path, package) for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        name = _module_name(path, package)
        if name == "":
            continue
        imported = {found for found in _imported(path, modules) if found != name}
        graph.setdefault(_cut(name, depth), set()).update(_cut(each, depth) for each in imported)
    return {name: targets - {name, ""} for name, targets in graph.items()}


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _cut(name: str, depth: int | None) -> str:
    return ".".join(name.split(".")[:depth])


def _imported(path: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        inside = (name.removeprefix("keylatch.") for name in names if name.startswith("keylatch."))
        yield from (name for name in inside if name in modules)


def levels(graph: dict[str, set[str]]) -> int:
    """The longest chain of imports, counted in modules. Circles are not followed."""

    def depth(name: str, above: frozenset[str]) -> int:
        if name not in depths:
            below = graph.get(name, set()) - above - {name}
            depths[name] = 1 + max((depth(each, above | {name}) for each in below), default=0)
        return depths[name]

    depths: dict[str, int] = {}
    return max(depth(name, frozenset()) for name in graph)


# Lines


def lines(root: Path, folder: str) -> tuple[int, int]:
    """Lines of all Python files, and those with code: no blank line, comment or docstring."""
    texts = [path.read_text() for path in python_files(root, [folder])]
    return sum(text.count("\n") for text in texts), sum(map(_code_lines, texts))


def _code_lines(text: str) -> int:
    lines: set[int] = set()
    is_first = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _NO_CODE:
            is_first = is_first or token.type in (tokenize.NEWLINE, tokenize.INDENT)
            continue
        if not (is_first and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
        is_first = False
    return len(lines)


# Journeys


@contextmanager
def recording(root: Path, files: set[str]) -> Iterator[None]:
    """Add the packages' files whose functions are called by what this context starts."""
    folders = tuple(f"{root / folder}/" for folder in PACKAGES)
    main, token = threading.get_ident(), _IS_JOURNEY.set(True)

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(folders) or frame.f_code.co_name == "<module>":
            return
        if threading.get_ident() != main or _IS_JOURNEY.get():
            files.add(name.removeprefix(f"{root}/"))

    _thread_hook[0] = on_event
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)
        _thread_hook[0] = None
        _IS_JOURNEY.reset(token)


_thread_hook: list[Callable[[FrameType, str, Any], None] | None] = [None]


def _on_thread_event(frame: FrameType, event: str, argument: Any) -> None:
    hook = _thread_hook[0]
    if hook is not None:
        hook(frame, event, argument)


def create_key(root: Path, store: str, name: str) -> str:
    """A new FULL key, by the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "keylatch_sidecar", "keys", "create", "--name", name],
        env={**os.environ, "PYTHONPATH": _python_path(root), "KEYLATCH_STORE": store},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _python_path(root: Path) -> str:
    return os.pathsep.join(str(root / folder) for folder in PACKAGES)


async def journeys(root: Path, store: str, *, with_redis: bool) -> dict[str, set[str]]:
    """Files that a hit, a cold check and a DELETE enter."""
    import httpx

    from keylatch.asgi import APIKeyMiddleware
    from keylatch.engine import Engine
    from keylatch.settings import Settings
    from keylatch_sidecar.app import create_app
    from keylatch_sidecar.settings import ProxySettings

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    admin, tokens = create_key(root, store, "admin"), [create_key(root, store, n) for n in "abc"]
    engine = Engine(Settings.load(store=store), redis=_redis() if with_redis else None)
    await engine.start()
    app, sidecar = APIKeyMiddleware(bare, engine=engine), create_app(engine, ProxySettings.load())
    found: dict[str, set[str]] = {"hit": set(), "cold check": set(), "DELETE": set()}
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client,
        httpx.AsyncClient(transport=httpx.ASGITransport(sidecar), base_url="http://x") as manager,
    ):

        async def call(token: str) -> None:
            answer = await client.get("/", headers={"authorization": f"Bearer {token}"})
            answer.raise_for_status()

        async def delete(token: str) -> None:
            url = f"/v1/api-keys/key_{token.split('_')[2]}"
            answer = await manager.delete(url, headers={"authorization": f"Bearer {admin}"})
            answer.raise_for_status()

        await call(tokens[0])  # starts threads and caches that later checks find
        with recording(root, found["cold check"]):
            await call(tokens[1])
            await asyncio.sleep(0.2)  # what the check leaves to a task
        for _ in range(_WARM_REQUESTS):
            await call(tokens[1])
        with recording(root, found["hit"]):
            await call(tokens[1])
        await delete(tokens[0])  # the caller's key is cached from here on
        with recording(root, found["DELETE"]):
            await delete(tokens[1])
    await engine.stop()
    return found


def _redis() -> Any:
    import fakeredis

    return fakeredis.FakeAsyncRedis()


# The page


def figures(root: Path) -> list[tuple[str, object]]:
    """The figures that need no run."""
    modules, folders = root_modules(root)
    pronouns = Counter(
        place.word for place in all_prose(root) if place.file.startswith(PACKAGES)
    )  # fmt: skip
    rows: list[tuple[str, object]] = [
        ("modules in the root of keylatch", modules),
        ("folders in the root of keylatch", folders),
        (
            "import levels, between the modules and folders of the root",
            levels(import_graph(root, 1)),
        ),
        ("import levels, between all modules", levels(import_graph(root))),
    ]
    for folder in PACKAGES:
        total, code = lines(root, folder)
        rows.append((f"lines of Python in {folder} (with code)", f"{total:,} ({code:,})"))
    return [
        *rows,
        (" / ".join(COUNTED_PRONOUNS), sum(pronouns[word] for word in COUNTED_PRONOUNS)),
        ("replaced words left: identifiers", len(all_identifiers(root))),
        ("replaced words left: prose of the packages and documents", len(all_prose(root))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--store", default="", help="URL of an empty PostgreSQL database")
    parser.add_argument("--no-redis", action="store_true")
    parser.add_argument("--files", action="store_true", help="name the files of each journey")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    for name, value in figures(root):
        print(f"{name:62} {value:>16}")
    sys.path[:0] = _python_path(root).split(os.pathsep)
    threading.setprofile(_on_thread_event)
    with tempfile.TemporaryDirectory() as folder:
        store = arguments.store or f"sqlite:///{folder}/keys.db"
        for name, files in asyncio.run(
            journeys(root, store, with_redis=not arguments.no_redis)
        ).items():
            print(f"{f'files of a {name}':62} {len(files):>16}")
            if arguments.files:
                print("".join(f"    {file}\n" for file in sorted(files)), end="")


if __name__ == "__main__":
    main()

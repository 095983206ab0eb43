"""What a key costs a Flask app on gunicorn's threads: requests a second, protected ÷ open.

    python benchmarks/wsgi_throughput.py [--store sqlite:///…] [--rounds 7] [--seconds 4]

One gunicorn, one worker, four threads; `wrk` calls the same Flask view with and without the
middleware in turn, always with the same key in the header, so that L1 answers. The ratio is taken
round by round. It needs `wrk` (apt-get install wrk).
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from flask import Flask
from rich.console import Console
from rich.progress import track
from rich.table import Table

from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.wsgi import APIKeyMiddleware

flask = Flask(__name__)


@flask.get("/v1/me")
def me() -> dict[str, str]:
    """As small as views are."""
    return {"status": "ok"}


def app(environ: dict[str, Any], start_response: Any) -> Any:
    """The open app and the protected one, told apart by the query."""
    chosen = protected if environ["QUERY_STRING"] == "on" else flask.wsgi_app
    return chosen(environ, start_response)


if __name__ != "__main__":  # in gunicorn's worker
    protected = APIKeyMiddleware(flask.wsgi_app)


async def create(store: str) -> str:
    """A key to call with."""
    engine = Engine(Settings.load(store=store, redis=""))
    created = await (await engine.keyring()).create("bench", "throughput")
    await engine.stop()
    return created.token.reveal()


def requests_a_second(url: str, token: str, seconds: float) -> float:
    """What wrk counts; nothing but 200s is let pass."""
    command = ["wrk", "-t1", "-c16", f"-d{seconds}s", "-H", f"Authorization: Bearer {token}", url]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"error: not every answer was a 200\n{said}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert found
    return float(found[1])


def measure(given: argparse.Namespace, url: str, token: str) -> list[tuple[float, float]]:
    """(open, protected) of each round; who goes first takes turns."""
    rounds = []
    console = Console(stderr=True)
    for number in track(range(given.rounds + 1), "calling", console=console, transient=True):
        both = [f"{url}?no", f"{url}?on"]
        figures = {
            place: requests_a_second(place, token, given.seconds)
            for place in (both if number % 2 else reversed(both))
        }
        rounds.append((figures[both[0]], figures[both[1]]))
    return rounds[1:]  # the first one warms up


def main() -> None:
    """Start gunicorn, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--store", default="")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is missing\nhint: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        store = given.store or f"sqlite:///{folder}/keys.db"
        token = asyncio.run(create(store))
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        command = [sys.executable, "-m", "gunicorn", "wsgi_throughput:app", "--bind", place]
        command += ["--workers", "1", "--worker-class", "gthread", "--threads", "4"]
        server = subprocess.Popen(
            [*command, "--log-level", "error", "--keep-alive", "75"],
            env={**os.environ, "KEYLATCH_STORE": store},
            cwd=Path(__file__).parent,
        )
        try:
            wait_until_up(f"http://{place}/v1/me")
            rounds = measure(given, f"http://{place}/v1/me", token)
        finally:
            server.terminate()
            server.wait()
    ratios = [guarded / free for free, guarded in rounds]
    result = {
        "open, requests/s": round(statistics.median(free for free, _ in rounds)),
        "protected, requests/s": round(statistics.median(guarded for _, guarded in rounds)),
        "protected ÷ open": round(statistics.median(ratios), 3),
        "rounds from": round(min(ratios), 3),
        "to": round(max(ratios), 3),
    }
    table = Table("", "", title="Flask on gunicorn gthread, L1 hit", show_header=False)
    for name, value in result.items():
        table.add_row(name, str(value))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def wait_until_up(url: str) -> None:
    """Return when the open app answers."""
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("error: gunicorn did not come up")


if __name__ == "__main__":
    main()

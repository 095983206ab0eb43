"""The cost of importing keylatch: milliseconds and resident memory, beside Starlette alone.

    .venv/bin/python benchmarks/import_cost.py

Each figure is the median of fresh processes that take turns, so that a busy machine slows all of
them. `built` is what a middleware imports when it is built, with a SQLite store and no Redis.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Final

STARLETTE: Final = (
    "import starlette.applications, starlette.middleware, starlette.requests, starlette.responses"
)
_BUILD: Final = "keylatch.asgi.APIKeyMiddleware(None, store='sqlite:////nowhere/keys.db', redis='')"
PROGRAMS: Final = {
    "starlette": STARLETTE,
    "keylatch": "import keylatch",
    "keylatch.asgi": "import keylatch.asgi",
    "keylatch.wsgi": "import keylatch.wsgi",
    "keylatch.asgi, built": f"import keylatch.asgi; {_BUILD}",
    "keylatch_sidecar.app": "import keylatch_sidecar.app",
    "keylatch_sidecar.cli": "import keylatch_sidecar.cli.program",
}
_MEASURED: Final = """
import json, sys, time
started = time.perf_counter()
{program}
milliseconds = (time.perf_counter() - started) * 1000
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
print(json.dumps([milliseconds, pages * 4096 / 2**20, len(sys.modules)]))
"""


def measure(program: str) -> list[float]:
    """Milliseconds, MiB and modules of a fresh process."""
    command = [sys.executable, "-c", _MEASURED.format(program=program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: list[float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="processes for each row")
    rounds = parser.parse_args().rounds
    turns = [{name: measure(program) for name, program in PROGRAMS.items()} for _ in range(rounds)]
    rows = {
        name: [statistics.median(column) for column in zip(*(t[name] for t in turns), strict=True)]
        for name in PROGRAMS
    }
    base = rows["starlette"]
    print(f"{'import':<22}{'ms':>6}{'more':>7}{'ratio':>7}{'MiB':>7}{'more':>7}{'modules':>9}")
    for name, (ms, mib, modules) in rows.items():
        print(
            f"{name:<22}{ms:6.0f}{ms - base[0]:+7.0f}{ms / base[0]:7.2f}"
            f"{mib:7.1f}{mib - base[1]:+7.1f}{modules:9.0f}"
        )


if __name__ == "__main__":
    main()

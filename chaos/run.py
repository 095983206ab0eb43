"""Breaks everything around keylatch at random, and counts what it promised.

    python chaos/run.py [--quick] [--faults 2300] [--seconds 1260] [--workers 4] [--revokers 3]
                        [--lease 0.5] [--seed 1] [--nodes 3] [--json results.json] [--keep folder]

The same seed draws the same schedule. The exit code is 1 if a promise was broken, or if the naive
twin, which lives through the same faults, was not caught.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.live import Live

from faults import Faults
from report import progress, results, tables
from schedule import draw
from services import ProgramMissing
from stage import Deployment

_LONGEST_IN_LEASES: Final = 2.4  # most faults are over within a lease, and many are not


async def perform(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One run, from the first process to the last."""
    folder = Path(tempfile.mkdtemp(prefix="keylatch-chaos-"))
    deployment = Deployment(
        folder, options.workers, options.revokers, options.lease, options.seed, options.nodes
    )
    schedule = draw(
        options.seed,
        options.faults,
        options.seconds,
        _LONGEST_IN_LEASES * options.lease,
        options.only,
        has_standby=options.nodes > 1,
    )
    faults = Faults(deployment, schedule)
    try:
        await deployment.set_up()
        began = time.monotonic()
        storm = asyncio.create_task(faults.run(options.seconds))
        with Live(console=console, auto_refresh=False) as live:
            while not storm.done():
                await asyncio.wait([storm], timeout=1)
                deployment.hub.sweep()
                elapsed = time.monotonic() - began
                live.update(
                    progress(deployment.hub, len(faults.applied), len(schedule), elapsed),
                    refresh=True,
                )
        storm.result()
        await deployment.end()
        await deployment.hub.stop()
        grace_ns = int((options.lease + 1) * 1e9)
        return results(
            deployment.hub, faults.applied, grace_ns, deployment.crashes(), faults.failed
        )
    finally:
        await deployment.tear_down()
        if options.keep:
            shutil.copytree(folder, options.keep, ignore=shutil.ignore_patterns("hub"))
        shutil.rmtree(folder)


def main() -> int:
    """Read the command line, run, and say what was found."""
    parser = argparse.ArgumentParser(description="Breaks everything around keylatch at random.")
    parser.add_argument("--quick", action="store_true", help="30 faults in 20 seconds, one node")
    parser.add_argument("--faults", type=int, default=2_300)
    parser.add_argument("--seconds", type=float, default=1_260)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--revokers", type=int, default=3)
    parser.add_argument("--lease", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--nodes", type=int, choices=(1, 3), default=3, help="of PostgreSQL; 1: no failovers"
    )
    parser.add_argument("--only", default="", help="only kinds of faults with this in their name")
    parser.add_argument("--json", type=Path, help="write everything that was found to a file")
    parser.add_argument("--keep", type=Path, help="keep the logs of all processes in this folder")
    options = parser.parse_args()
    if options.quick:
        options.faults, options.seconds, options.nodes = 30, 20, 1
    console = Console()
    try:
        found = uvloop.run(_interruptible(options, console))
    except ProgramMissing as missing:
        console.print(f"error: a real server is missing\nhint: {missing}")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; everything was stopped")
        return 130
    console.print(tables(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    if found["broken"]:
        console.print(f"broken: {', '.join(found['broken'])}")
    if not found["twin caught"]:
        console.print("the naive twin was not caught: this run proves nothing")
    return 1 if found["broken"] or not found["twin caught"] else 0


async def _interruptible(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    for number in signal.SIGINT, signal.SIGTERM:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await perform(options, console)


if __name__ == "__main__":
    sys.exit(main())

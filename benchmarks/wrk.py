"""wrk (apt-get install wrk): a closed-loop load, and what it says of it. Only 200s are let pass.

Closed loop: each connection sends when its last request was answered, so a server that stalls gets
fewer requests and looks better than it is. Good for a speed; for latencies under load see
`open_loop`.
"""

import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MICROSECONDS: Final = {"us": 1, "ms": 1_000, "s": 1_000_000, "m": 60_000_000}


class NotMeasured(Exception):
    """Some answers had the wrong status: the figures are invalid."""


@dataclass(frozen=True)
class Load:
    """What wrk found: latencies in microseconds, and how many requests were answered.

    Args:
        p50_us: half of the answers took no longer.
        p99_us: 99 % of them took no longer; closed loop, see above.
        per_second: answers.
        answers: all of them.
        processor_seconds: what wrk itself took.
    """

    p50_us: float
    p99_us: float
    per_second: float
    answers: int
    processor_seconds: float = 0.0


def require() -> None:
    """End here if it is not installed."""
    if shutil.which("wrk") is None:
        raise SystemExit("error: wrk is missing\nhint: apt-get install wrk")


def load(
    url: str,
    field: str = "",
    *,
    connections: int = 16,
    seconds: float = 2,
    script: Path | None = None,
    arguments: Sequence[str] = (),
) -> Load:
    """Call for some seconds.

    Args:
        url: what to ask for.
        field: a header field, such as `Authorization: Bearer …`.
        connections: so many ask at once.
        seconds: whole ones; wrk knows no others.
        script: in Lua; makes other requests.
        arguments: for the script.

    Raises:
        NotMeasured: not every answer was a 200.
    """
    command = ["wrk", "--latency", "-t1", f"-c{connections}", f"-d{round(seconds)}s"]
    command += ["-H", field] if field else []
    command += ["-s", str(script)] if script else []
    before = _processor_seconds()
    said = subprocess.run(
        [*command, url, *(["--", *arguments] if arguments else [])],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=seconds + 30,
    ).stdout
    return parse(said, _processor_seconds() - before)


def parse(output: str, processor_seconds: float = 0.0) -> Load:
    """Take what wrk prints apart.

    Raises:
        NotMeasured: not every answer was a 200, or there was none.
    """
    if "Non-2xx" in output or "Socket errors" in output:
        raise NotMeasured(f"not every answer was a 200\n{output}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    answers = re.search(r"(\d+) requests in ", output)
    if not rate or not answers or not int(answers[1]):
        raise NotMeasured(f"there was no answer\n{output}")
    return Load(
        p50_us=_microseconds(output, "50%"),
        p99_us=_microseconds(output, "99%"),
        per_second=float(rate[1]),
        answers=int(answers[1]),
        processor_seconds=processor_seconds,
    )


def _microseconds(said: str, percentile: str) -> float:
    found = re.search(rf"^\s+{percentile}\s+([\d.]+)(us|ms|s|m)$", said, re.MULTILINE)
    assert found, said
    return float(found[1]) * _MICROSECONDS[found[2]]


def _processor_seconds() -> float:
    """Of children that have ended: wrk is the only one that ends while it is waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

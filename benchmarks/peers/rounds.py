"""The measuring: wrk calls the open and the protected route of every peer in turn, round by round.

All servers run at the same time and only one is called, so a machine that slows down slows all of
them. Who goes first changes with every round. An answer that is no 200 ends a peer's part, not the
others'.
"""

import re
import subprocess
import time
from collections.abc import Callable, Mapping

from catalogue import NotMeasured
from serving import Server, fetch

CONNECTIONS = 16
SLOWEST_ANSWER_SECONDS = 60
SLOW_SECONDS, LONGER = 0.05, 5
Rounds = list[tuple[float, float]]
"""Requests a second, open and protected, of each round."""


def per_second(said: str) -> float:
    """What wrk counted.

    Raises:
        NotMeasured: not every answer was a 200, or there was none.
    """
    for line in said.splitlines():
        if "Non-2xx" in line or "Socket errors" in line:
            raise NotMeasured(f"wrk: {line.strip()}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", said)
    if found is None or float(found[1]) == 0:
        raise NotMeasured("wrk: no answer came in time; give it more --seconds")
    return float(found[1])


def load(server: Server, path: str, seconds: int) -> float:
    """Requests a second with the key in the header, which the open route does not read.

    Caches are warm, however long ago the last turn was. A route that is slow is called for
    longer, so that there is something to count.
    """
    fetch(server, path, server.header)
    began = time.perf_counter()
    fetch(server, path, server.header)
    if time.perf_counter() - began > SLOW_SECONDS:
        seconds *= LONGER
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s"]
    command += ["--timeout", f"{SLOWEST_ANSWER_SECONDS}s", "-H", f"Authorization: {server.header}"]
    done = subprocess.run(
        [*command, server.url + path], stdout=subprocess.PIPE, text=True, timeout=seconds + 60
    )
    server.wait_until_idle()
    return per_second(done.stdout)


def measure(
    servers: Mapping[str, Server], rounds: int, seconds: int, done: Callable[[str], None]
) -> tuple[dict[str, Rounds], dict[str, str]]:
    """Every peer's rounds, and why some of them have none.

    Args:
        servers: by the peer's name.
        rounds: how many count; one more goes before them, and warms up.
        seconds: each route of each peer in each round.
        done: called with the name of the peer that was measured.
    """
    measured: dict[str, Rounds] = {name: [] for name in servers}
    failed: dict[str, str] = {}
    names = list(servers)
    for number in range(rounds + 1):
        for name in names:
            if name not in failed:
                try:
                    measured[name].append(turn(servers[name], number, seconds))
                except NotMeasured as error:
                    failed[name] = str(error)
            done(name)
        names = [*names[1:], names[0]]
    return {name: each[1:] for name, each in measured.items() if name not in failed}, failed


def turn(server: Server, number: int, seconds: int) -> tuple[float, float]:
    """Open and protected, in alternating order."""
    paths = ["/open", "/protected"]
    found = {p: load(server, p, seconds) for p in (paths if number % 2 else reversed(paths))}
    return found["/open"], found["/protected"]

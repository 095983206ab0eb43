"""Sidecar processes of one deployment, and threads that check keys at them all the while.

The law of this file: an acceptance counts by the START of its check and a revoke by its answer, so
"accepted after the answer" has one meaning.
"""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.proxies import SidecarProcess
from tests.support.servers import eventually

ACCEPTED, REFUSED, UNAVAILABLE, CUT = 200, 401, 503, 0
CLI = (sys.executable, "-m", "keylatch_sidecar")


@dataclass(frozen=True)
class Answer:
    """What a member answered, and when (in seconds of the monotonic clock)."""

    status: int
    body: Any
    began: float
    ended: float


class Member(SidecarProcess):
    """A `keylatch serve` process with a name, managed over HTTP and by its command line.

    Args:
        folder: for its log.
        store: URL of the store.
        waits: whether it is ready when this returns.
        command: that starts it; a broken twin has another one.
        settings: more `KEYLATCH_*` variables, without that prefix.
    """

    def __init__(
        self,
        folder: Path,
        store: str,
        *,
        waits: bool = True,
        command: Sequence[str] = CLI,
        **settings: str,
    ) -> None:
        self.name = folder.name
        self._command = command
        self._waits = waits
        folder.mkdir(parents=True)
        super().__init__(folder, None, STORE=store, **settings)

    def start(self) -> None:
        self._launch(*self._command, "serve")
        if self._waits:
            self.wait_until_ready()

    def wait_until_alive(self) -> None:
        """Return once it answers, ready or not."""
        eventually(lambda: self.request("GET", "/healthz").status == ACCEPTED)

    @property
    def is_ready(self) -> bool:
        return self.request("GET", "/readyz").status == ACCEPTED

    # Requests

    def request(
        self, method: str, path: str, token: str = "", body: Any = None, **headers: str
    ) -> Answer:
        """One request on a connection of its own; status 0: the connection broke."""
        with contextlib.closing(self.connection()) as connection:
            return exchange(connection, method, path, token, body, headers)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def create_key(self, admin: str, name: str = "a key") -> tuple[str, str]:
        """The id and the token of a new key."""
        said = self.request("POST", "/v1/api-keys", admin, {"name": name, "permission": "FULL"})
        assert said.status in (200, 201), f"{self.name}: {said.status} {said.body}"
        return said.body["id"], said.body["token"]

    def create_keys(self, admin: str, count: int) -> dict[str, str]:
        return dict(self.create_key(admin, f"key {number}") for number in range(count))

    def delete(self, admin: str, key_id: str, **headers: str) -> Answer:
        return self.request("DELETE", f"/v1/api-keys/{key_id}", admin, **headers)

    def revoke_all(self, admin: str, keys: Iterable[str], **headers: str) -> dict[str, float]:
        """Revoke each key, which must be answered; key id → when it was."""
        ends = {}
        for key_id in keys:
            said = self.delete(admin, key_id, **headers)
            assert said.status in (200, 202), f"{self.name}: {said.status} {said.body}"
            ends[key_id] = said.ended
        return ends

    def check(self, token: str) -> int:
        """The status of one check."""
        return self.request("GET", "/verify", token).status

    def statuses(self, tokens: Iterable[str]) -> Counter[int]:
        """Of one check of each key."""
        return Counter(self.check(token) for token in tokens)

    # What it says of itself

    def first_key(self) -> str:
        """The token of an operator's key, made by the command line."""
        return self.keylatch("keys", "create", "--name", "admin").strip().splitlines()[-1]

    def keylatch(self, *arguments: str, check: bool = True) -> str:
        """What a command prints that has this process's settings."""
        ran = subprocess.run(
            [*CLI, *arguments],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def findings(self, status: str) -> list[str]:
        """What `keylatch doctor` says, of all findings of this status."""
        said = json.loads(self.keylatch("doctor", "--json", check=False))
        return [json.dumps(each) for each in said["findings"] if each["status"] == status]

    def log(self) -> str:
        return (self._folder / "sidecar.log").read_text(errors="replace")

    def alarms(self) -> list[str]:
        """The log lines that say that the store lost what it had answered."""
        return [line for line in self.log().splitlines() if "CRITICAL" in line]

    def metric(self, name: str, admin: str) -> float:
        """The sum of a metric over its labels."""
        page = str(self.request("GET", "/metrics", admin).body)
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, values))


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    token: str = "",
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on an open connection; status 0: it broke."""
    sent = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
    if token:
        sent["Authorization"] = f"Bearer {token}"
    if body is not None:
        sent["Content-Type"] = "application/json"
    began = time.monotonic()
    try:
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        status, said = response.status, response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return Answer(CUT, str(error), began, time.monotonic())
    ended = time.monotonic()
    with contextlib.suppress(ValueError):
        return Answer(status, json.loads(said), began, ended)
    return Answer(status, said, began, ended)


class Checks(threading.Thread):
    """Checks keys at a member, one after the other, until `stop`.

    Args:
        member: that checks.
        keys: key id → token.
        pause_seconds: between two checks.
    """

    def __init__(self, member: Member, keys: Mapping[str, str], pause_seconds: float = 0.004):
        super().__init__(daemon=True)
        self.member = member
        self._keys = dict(keys)
        self._pause = pause_seconds
        self._is_over = threading.Event()
        self.rounds = 0
        """How often every key was checked."""
        self.seen: list[tuple[float, str, int]] = []
        """Of each check: when it began, the key's id and the status."""
        self.start()

    def run(self) -> None:
        connection = self.member.connection()
        while not self._is_over.is_set():
            for key_id, token in self._keys.items():
                answer = exchange(connection, "GET", "/verify", token)
                self.seen.append((answer.began, key_id, answer.status))
                self._is_over.wait(self._pause if answer.status else 0.05)
            self.rounds += 1
        connection.close()

    def stop(self) -> None:
        self._is_over.set()
        self.join()

    def wait_for_rounds(self, count: int = 2) -> None:
        """Return once every key was checked so often from now on."""
        until = self.rounds + 1 + count  # the present round began before
        eventually(lambda: self.rounds >= until)

    def accepted_after(self, ends: Mapping[str, float]) -> list[str]:
        """Each key that was accepted in a check that began after its revoke was answered, with how
        often and until when."""
        late: dict[str, list[float]] = {}
        for began, key_id, status in list(self.seen):
            if status == ACCEPTED and began > ends.get(key_id, began):
                late.setdefault(key_id, []).append(began - ends[key_id])
        return [
            f"{self.member.name} accepted {key_id} {len(times)} times,"
            f" the last time {max(times):.2f} s after the answer"
            for key_id, times in late.items()
        ]

    def all_accepted(self) -> bool:
        """Whether the last check of every key accepted it."""
        return self.rounds > 0 and set(self.last_statuses(self._keys)) == {ACCEPTED}

    def statuses(self, since: float = 0, keys: Iterable[str] | None = None) -> Counter[int]:
        """Of all checks that began later, of these keys or of all."""
        chosen = set(self._keys if keys is None else keys)
        return Counter(
            status for began, key_id, status in list(self.seen) if began > since if key_id in chosen
        )

    def last_statuses(self, keys: Iterable[str]) -> Counter[int]:
        """Of the last check of each of these keys."""
        last = {key_id: status for _, key_id, status in list(self.seen)}
        return Counter(last[key_id] for key_id in keys)


class Deployment:
    """The members of one test, the threads that check at them, and how they end.

    Args:
        folder: for the members' logs.
        lease_seconds: X.
        settings: of every member, as `KEYLATCH_*` variables without that prefix.
    """

    def __init__(self, folder: Path, lease_seconds: float = 1.0, **settings: str) -> None:
        self._folder = folder
        self.lease_seconds = lease_seconds
        self.settings = {"LEASE": str(lease_seconds), "MAX_CHANGES": "0", **settings}
        self.command: Sequence[str] = CLI
        """That starts each member; a broken twin has another one."""
        self.members: list[Member] = []
        self.checks: list[Checks] = []
        self.admin = ""
        """The token of an operator's key, once `start` returned."""

    def add(self, name: str, store: str, **options: Any) -> Member:
        """Start a member."""
        given = {"command": self.command, **self.settings, **options}
        member = Member(self._folder / name, store, **given)
        self.members.append(member)
        return member

    def start(self, **stores: str) -> list[Member]:
        """Start members at once, each with its name and store, and make the first key. The first
        one is started alone: it makes the tables."""
        (name, store), *others = stores.items()
        first = self.add(name, store)
        started = [self.add(name, store, waits=False) for name, store in others]
        self.admin = first.first_key()
        for member in started:
            member.wait_until_ready()
        return [first, *started]

    def check(self, keys: Mapping[str, str], *members: Member) -> list[Checks]:
        """Begin to check these keys at these members, or at all; return once all were accepted."""
        begun = [Checks(member, keys) for member in members or self.members]
        self.checks += begun
        for checks in begun:
            eventually(checks.all_accepted)
        return begun

    def wait_for_rounds(self, count: int = 2) -> None:
        for checks in self.checks:
            checks.wait_for_rounds(count)

    def let_leases_pass(self, count: float = 1) -> None:
        """So many lease periods pass; nothing tells when one is over but time."""
        threading.Event().wait(count * self.lease_seconds)

    def accepted_after(self, ends: Mapping[str, float]) -> list[str]:
        """See `Checks.accepted_after`; of all that check."""
        return [line for checks in self.checks for line in checks.accepted_after(ends)]

    def report(self, title: str, ends: Mapping[str, float]) -> None:
        """Print what was seen; pytest shows it of a test that fails."""
        print(f"{title}: {len(ends)} revokes were answered")
        for checks in self.checks:
            name = checks.member.name
            print(f"  {name}: all checks {dict(checks.statuses())};", end=" ")
            print(f"revoked keys at the end {dict(checks.last_statuses(ends))}")
        for member in self.members:
            for line in member.log().splitlines():
                if line.startswith(("CRITICAL", "ERROR", "WARNING")) or "Error" in line:
                    print(f"  {member.name}: {line[:300]}")

    def end(self) -> None:
        """Stop all members as an operator does."""
        for checks in self.checks:
            checks.stop()
        for member in self.members:
            member.stop()

    def remove(self) -> None:
        """Stop everything, in whatever state it is."""
        for checks in self.checks:
            checks.stop()
        for member in self.members:
            member.close()


def at_once(work: Iterable[Callable[[], Any]]) -> list[Any]:
    """What they return, all called at the same time in threads."""
    called = list(work)
    with ThreadPoolExecutor(len(called)) as pool:
        return [each.result() for each in [pool.submit(one) for one in called]]

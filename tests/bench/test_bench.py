"""`keylatch bench`: it cannot overlook a stall, it stays within its bounds, it leaves nothing."""

import asyncio
import itertools
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.core.tokens import SCAN_PATTERN, MacKeys
from keylatch.errors import StoreUnavailable
from keylatch.settings import Settings
from keylatch_bench import comparison, html_report, plan, plots, report
from keylatch_bench.comparison import FASTER, NOISE, SLOWER, UNKNOWN
from keylatch_bench.key_factories import ORGANIZATION, StoreKeyFactory
from keylatch_bench.load_generator import UNANSWERED, Credential, OpenLoop, Outcome, drive
from keylatch_bench.plan import OutOfBounds, Plan
from keylatch_bench.results import (
    Results,
    Revocation,
    ScenarioResult,
    histogram,
    percentiles,
    readable,
)
from keylatch_bench.revocation_probe import revoke_in_use
from keylatch_bench.scenarios import NEEDS
from keylatch_bench.temporary_keys import Key, Scheme, TemporaryKeys
from keylatch_sidecar.cli.bench import bench
from tests.support.command_line import Operator, wait_for_exit
from tests.support.command_line import Result as Ending
from tests.support.proxies import SidecarProcess
from tests.support.servers import RedisServer, eventually, free_port

pytestmark = pytest.mark.long

MS = 1_000_000
GOOD = Credential(b"Bearer good", 200)
SHORT = ["--seconds", "0.3", "--rate", "100", "--flood-rate", "100", "--connections", "2"]
SHORT += ["--keys", "60", "--revocations", "2"]
README = Path(__file__).parents[2] / "README.md"
FILES = {"results.json", "report.html", "latency.png", "throughput.png", "revocation.png"}


# Coordinated omission


def answered_at(began: int) -> int:
    """A server that takes 1 ms, and stands still from the second to the third second."""
    return max(began, 3_000 * MS) + MS if 2_000 * MS <= began < 3_000 * MS else began + MS


def open_loop(count: int, interval: int) -> list[int]:
    """The latencies that `OpenLoop` finds over one connection to that server."""
    books = OpenLoop(0, interval, count)
    free_at = 0
    while (due := books.next_due) is not None:
        books.enqueue_due(max(due, free_at))
        while (taken := books.pop()) is not None:
            free_at = answered_at(max(taken, free_at))
            books.record(taken, free_at, 200, 200)
    assert books.is_over
    return books.latencies


def closed_loop(count: int, interval: int) -> list[int]:
    """The broken twin: it sends when the last answer is there, and counts from sending."""
    latencies, now = [], 0
    for _ in range(count):
        done = answered_at(now)
        latencies.append(done - now)
        now = max(now + interval, done)
    return latencies


def test_a_stall_of_the_server_shows_in_p99() -> None:
    """One second out of ten: a tenth of all requests was due in it, and half of those waited
    longer than half a second. A closed loop sees one slow answer in a thousand, and no p99."""
    found = percentiles(histogram(open_loop(1_000, 10 * MS)))
    assert found["p50"] == pytest.approx(MS, rel=0.01)
    assert (found["p99"] or 0) > 850 * MS
    overlooked = percentiles(histogram(closed_loop(1_000, 10 * MS)))
    assert overlooked["p99"] == pytest.approx(MS, rel=0.01)


class Echo:
    """A connection that answers with what was expected, at once or never."""

    def __init__(self, *, is_unresponsive: bool = False) -> None:
        self._is_unresponsive = is_unresponsive
        self.requests = 0
        self.given_up = 0

    def check(self, credential: Credential, answered: Callable[[Outcome], None]) -> None:
        self.requests += 1
        if not self._is_unresponsive:
            answered(credential.expected)

    def cancel(self) -> None:
        self.given_up += 1


def test_every_check_is_sent_once_and_counted() -> None:
    """No more than the plan said, on lines that answer before they return as well."""
    lines = [Echo(), Echo()]
    turn = asyncio.run(drive(lines, itertools.repeat(GOOD), 20_000, 500))
    assert sum(line.requests for line in lines) == len(turn.latencies) == 500
    assert (turn.outcomes, turn.unexpected, turn.keeps_up) == ({200: 500}, 0, True)


def test_what_is_not_answered_is_counted_with_the_time_that_it_took_at_least() -> None:
    """Whatever waits behind it as well: silence must not make the figures better."""
    deaf = Echo(is_unresponsive=True)
    turn = asyncio.run(drive([deaf], itertools.repeat(GOOD), 1_000, 20, grace=0.05))
    assert (turn.outcomes, turn.unexpected) == ({UNANSWERED: 20}, 20)
    assert deaf.requests == deaf.given_up == 1
    assert min(turn.latencies) >= 50 * MS
    scenario = ScenarioResult(1_000)
    scenario.add(turn)
    assert (scenario.unexpected, scenario.per_second) == (20, 1_000 if scenario.keeps_up else 0)


# Bounds


@given(
    seconds=st.floats(0.2, 600),
    rate=st.integers(1, 20_000),
    keys=st.integers(40, 5_000),
    revocations=st.integers(0, 100),
)
def test_a_plan_never_needs_more_keys_than_it_may_make(
    seconds: float, rate: int, keys: int, revocations: int
) -> None:
    """Whatever the requested rate: there are as many uncached checks as keys."""
    try:
        made = Plan(seconds=seconds, rate=rate, keys=keys, revocations=revocations)
    except OutOfBounds:
        return
    first_sights = made.rounds * sum(made.checks(scenario) for scenario in plan.UNCACHED)
    others = 1 + plan.REDIS_TRIES + plan.WARM_KEYS + made.rounds + made.revocations
    assert first_sights + others <= keys
    assert all(made.checks(scenario) <= max(1, rate * seconds) for scenario in plan.SCENARIOS)


@pytest.mark.parametrize("name", plan.BOUNDS)
def test_nothing_goes_beyond_its_bounds(name: str) -> None:
    """Too long, too hard or too many is refused before anything is done."""
    _, most = plan.BOUNDS[name]
    with pytest.raises(OutOfBounds, match=f"--{name.replace('_', '-')} is"):
        Plan(**{name: int(most) + 1})


def test_a_percentile_needs_as_many_checks_as_it_speaks_of() -> None:
    """The p99.9 of a hundred checks would be the slowest of them under another name."""
    found = percentiles(histogram(range(MS, 101 * MS, MS)))
    assert found["p99.9"] is None
    assert found["p99"] == pytest.approx(99 * MS, rel=0.01)
    assert readable(found["p99.9"]) == "-"


# Comparisons


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([10, 11, 10, 12, 10], [20, 21, 20, 22, 25], SLOWER),
        ([20, 21, 20, 22, 25], [10, 11, 10, 12, 10], FASTER),
        ([10, 11, 10, 30, 10], [20, 21, 20, 22, 25], NOISE),
        ([100, 101, 100, 101, 100], [103, 104, 103, 104, 103], NOISE),
        ([10, 11, 10], [20, 21, 20], UNKNOWN),
    ],
)
def test_a_figure_moved_if_no_round_of_one_run_is_among_those_of_the_other(
    before: list[float], after: list[float], said: str
) -> None:
    """One noisy round explains a difference of medians; three rounds explain nothing."""
    assert comparison.classify(before, after) == said
    turned = {SLOWER: FASTER, FASTER: SLOWER}.get(said, said)
    assert comparison.classify(before, after, less_is_better=False) == turned


# The probe


class Sidecar:
    """A line to a keyring that may go on accepting after it said that a key is revoked."""

    def __init__(self) -> None:
        self.is_revoked = False
        self.late = 0

    def check(self, credential: Credential, answered: Callable[[Outcome], None]) -> None:
        self.late -= self.is_revoked
        answered(401 if self.is_revoked and self.late < 0 else 200)

    def cancel(self) -> None: ...

    async def revoke(self) -> None:
        self.is_revoked = True


def probed(late: int) -> Revocation:
    """A revocation while a moved clock lets a millisecond go by at each look."""
    time = itertools.count(0, MS)
    doors = [Sidecar(), Sidecar()]
    doors[1].late = late

    async def delete() -> None:
        for door in doors:
            await door.revoke()

    async def sleep(_: float) -> None:
        await asyncio.sleep(0)

    async def probe() -> Revocation:
        return await revoke_in_use(
            doors, GOOD, delete, 1_000, clock=lambda: next(time), sleep=sleep
        )

    return asyncio.run(probe())


def test_a_check_that_is_accepted_after_the_answer_is_caught() -> None:
    """One connection that learns of it late suffices; a correct keyring gets no finding."""
    kept, broken = probed(late=0), probed(late=3)
    assert (kept.accepted_after, kept.last_accepted_ns < 0) == (0, True)
    assert (broken.accepted_after, broken.last_accepted_ns > 0) == (3, True)
    results = Results("a test", {}, revocations=[kept, broken])
    assert "3 checks that began after the response to a DELETE were ACCEPTED" in report.summary(
        results
    )


# Keys


class Maker:
    """Makes keys in a dictionary, and fails on demand."""

    def __init__(self) -> None:
        self._mac_keys = MacKeys([b"k" * 32])
        self.living: dict[str, str] = {}
        self.go_on = asyncio.Event()
        self.is_broken = False
        self.loses_answers = False

    async def create(self, name: str, scheme: Scheme, ends_at: float) -> Key:
        await self.go_on.wait()
        token = self._mac_keys.mint("kl", "live")
        self.living[token.key_id] = name
        if self.loses_answers:
            raise StoreUnavailable("the answer was lost")
        return Key(token.key_id, "org", token)

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        if self.is_broken:
            raise StoreUnavailable("gone")
        del self.living[key_id]

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        return [(key_id, "org") for key_id, its in self.living.items() if its == name]


def supplied(scenario: Callable[[Maker, TemporaryKeys], Awaitable[None]]) -> None:
    """What happens to the keys of a run."""

    async def run() -> None:
        maker = Maker()
        maker.living["key_of_somebody"] = "in production"
        await scenario(maker, TemporaryKeys(maker, max_keys=50, expires_at=time.time() + 60))
        assert maker.living.pop("key_of_somebody") == "in production"

    asyncio.run(run())


def test_keys_whose_making_was_interrupted_are_taken_back() -> None:
    """Ctrl-C comes while they are made: what was under way is waited for, and revoked."""

    async def scenario(maker: Maker, supply: TemporaryKeys) -> None:
        making = asyncio.create_task(supply.create(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        making.cancel()
        await asyncio.wait([making])
        maker.go_on.set()
        await supply.revoke_all()
        assert list(maker.living) == ["key_of_somebody"]
        assert (making.cancelled(), supply.active) == (True, [])

    supplied(scenario)


def test_keys_whose_making_was_not_answered_are_found_by_their_name() -> None:
    """They exist, and their ids were not reported."""

    async def scenario(maker: Maker, supply: TemporaryKeys) -> None:
        maker.go_on.set()
        maker.loses_answers = True
        with pytest.raises(StoreUnavailable):
            await supply.create(2)
        assert len(maker.living) == 3
        await supply.revoke_all()
        assert list(maker.living) == ["key_of_somebody"]

    supplied(scenario)


def test_keys_that_cannot_be_taken_back_are_named() -> None:
    """The operator has to know which."""

    async def scenario(maker: Maker, supply: TemporaryKeys) -> None:
        maker.go_on.set()
        keys = await supply.create(2)
        maker.is_broken = True
        await supply.revoke_all()
        assert sorted(supply.active) == sorted(key.id for key in keys)
        results = Results("a test", {}, keys_left=supply.active)
        [warning] = report.warnings(results)
        assert "could not be revoked" in warning
        assert all(key.id in warning for key in keys)

    supplied(scenario)


def test_a_supply_makes_no_more_keys_than_requested() -> None:
    """Whatever is wrong with the rest of the program."""

    async def scenario(maker: Maker, supply: TemporaryKeys) -> None:
        maker.go_on.set()
        with pytest.raises(AssertionError):
            await supply.create(51)
        assert len(maker.living) == 51  # 50, and the one of another organisation
        await supply.revoke_all()

    supplied(scenario)


# The whole of it


@pytest.fixture(params=["tcp", "uds"])
def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SidecarProcess]:
    """`keylatch serve` on SQLite; that on a Unix socket expects what a proxy would tell it."""
    if request.param == "uds":
        process = SidecarProcess(tmp_path, tmp_path / "keylatch.sock", VERIFY_REQUEST="forwarded")
    else:
        process = SidecarProcess(tmp_path)
    yield process
    process.close()


def words_for(sidecar: SidecarProcess) -> list[str]:
    place = sidecar.place
    return ["--uds", str(place)] if isinstance(place, Path) else [str(place)]


def living_keys(database: Path) -> list[str]:
    """Names of the keys in a store that were not revoked."""
    with closing(sqlite3.connect(database)) as raw:
        query = "SELECT name FROM keylatch_keys WHERE deleted_at IS NULL ORDER BY name"
        return [name for (name,) in raw.execute(query)]


def written(out: Path, ending: Ending) -> dict[str, Any]:
    """The results, after looking at everything that was written for tokens."""
    assert {path.name for path in out.iterdir()} == FILES
    said = [
        ending.stdout.encode(),
        ending.stderr.encode(),
        *(path.read_bytes() for path in out.iterdir()),
    ]
    assert not any(re.search(SCAN_PATTERN.encode(), text) for text in said)
    html = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href|url)[=(]\W*(?:http|//|file)", html)
    assert "<script" not in html
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_a_sidecar_is_measured_from_outside(operator: Operator, sidecar: SidecarProcess) -> None:
    """With one FULL key: what can be prepared is measured, the rest says what to add, nothing is
    refused that should not be, and afterwards there is no key but the operator's own."""
    operator.set(BENCH_KEY=sidecar.create(name="admin_key").token.reveal())
    out = operator.folder / "out"
    ending = operator.run("bench", *words_for(sidecar), *SHORT, "--out", str(out), "--json")
    assert ending.exit_code == 0, ending.stderr
    results = written(out, ending)
    assert json.loads(ending.stdout) == results
    assert results["skipped"] == NEEDS
    assert set(results["scenarios"]) == {"L1", "cold", "refused", "flood"}
    for scenario in results["scenarios"].values():
        assert (scenario["unexpected"], len(scenario["rounds"])) == (0, plan.ROUNDS)
    assert set(results["scenarios"]["L1"]["outcomes"]) == {"200"}
    assert set(results["scenarios"]["refused"]["outcomes"]) == {"401"}
    assert [each["accepted_after"] for each in results["revocations"]] == [0, 0]
    assert all(each["everywhere_ns"] is not None for each in results["revocations"])
    assert results["keys"]["left"] == []
    assert living_keys(operator.folder / "keys.db") == ["admin_key"]
    assert "creates at most 60 keys" in ending.stderr
    moves = comparison.compare(results, results)
    assert {move.direction for move in moves} <= {NOISE, UNKNOWN}
    assert {move.ratio for move in moves} == {1.0}


def test_a_store_is_measured_in_process_and_compared(operator: Operator) -> None:
    """Without a sidecar and without a key; a later run says what moved."""
    out = operator.folder / "out"
    words = ["bench", "--store", f"sqlite:///{operator.database}", *SHORT, "--out", str(out)]
    first = operator.run(*words)
    assert first.exit_code == 0, first.stderr
    results = written(out, first)
    assert results["skipped"] == {"L2": "give --redis"}
    assert set(results["scenarios"]) == {"L1", "store", "cold", "refused", "flood"}
    assert all(scenario["unexpected"] == 0 for scenario in results["scenarios"].values())
    assert "L2 was not measured: give --redis." in first.stdout
    second = operator.run(*words, "--compare", str(out / "results.json"))
    assert second.exit_code == 0, second.stderr
    written(out, second)
    assert re.search(r"Of \d+ figures", second.stdout)
    assert "after ÷ before" in (out / "report.html").read_text()
    assert living_keys(operator.database) == []


def test_all_scenarios_of_a_sidecar_are_prepared_through_its_store_and_redis(
    operator: Operator, redis_server: RedisServer
) -> None:
    """No key is needed. A Redis that the sidecar does not use is found out, and not measured under
    the name of L2."""
    sidecar = SidecarProcess(operator.folder, REDIS=redis_server.url)
    out = operator.folder / "out"
    store = f"sqlite:///{operator.folder}/keys.db"
    words = ["bench", *words_for(sidecar), "--store", store, "--redis", redis_server.url]
    try:
        ending = operator.run(*words, *SHORT, "--out", str(out))
        assert ending.exit_code == 0, ending.stderr
        results = written(out, ending)
        assert results["skipped"] == {}
        assert set(results["scenarios"]) == set(plan.SCENARIOS)
        assert all(scenario["unexpected"] == 0 for scenario in results["scenarios"].values())
        assert living_keys(operator.folder / "keys.db") == []
        ending = operator.run(
            *words[:-1], "redis://127.0.0.1:1", *SHORT, "--revocations", "0", "--out", str(out)
        )
        assert "L2 was not measured: that --redis does not answer, or is not the" in ending.stdout
    finally:
        sidecar.close()


def test_a_sidecar_that_dies_is_reported_with_the_keys_that_are_left(
    operator: Operator, tmp_path: Path
) -> None:
    """No server is left to revoke them: their ids are named, and they expire by themselves."""
    sidecar = SidecarProcess(tmp_path)
    try:
        operator.set(BENCH_KEY=sidecar.create(name="admin_key").token.reveal())
        words = ["bench", *words_for(sidecar), "--seconds", "60", "--keys", "60", "--out", "out"]
        process = operator.start(*words)
        eventually(lambda: len(living_keys(operator.database)) > 12 or process.poll() is not None)
        sidecar.kill()
        ending = wait_for_exit(process)
    finally:
        sidecar.close()
    assert (ending.exit_code, ending.stdout) == (2, "")
    assert "Traceback" not in ending.stderr
    assert "error: the run was" not in ending.stderr
    left = re.findall(r"key_\w+", ending.stderr.partition("could not be revoked:")[2])
    assert len(left) > 10
    with closing(sqlite3.connect(operator.database)) as raw:
        query = "SELECT id, expires_at FROM keylatch_keys WHERE name LIKE 'keylatch bench %'"
        expiries = dict(raw.execute(query))
    assert set(left) <= set(expiries)
    assert all(expires_at is not None for expires_at in expiries.values())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_takes_its_keys_back(operator: Operator, how: signal.Signals) -> None:
    """Ctrl-C in the middle of a long run: an error, exit 2, and no key is left."""
    operator.create()
    words = ["bench", "--store", f"sqlite:///{operator.database}", "--seconds", "600"]
    process = operator.start(*words, "--keys", "60", "--out", "out")
    eventually(lambda: len(living_keys(operator.database)) > 20 or process.poll() is not None)
    process.send_signal(how)
    ending = wait_for_exit(process)
    assert (ending.exit_code, ending.stdout) == (2, ""), ending.stderr
    assert "error: the run was interrupted\nhint: " in ending.stderr
    assert "Traceback" not in ending.stderr
    assert living_keys(operator.database) == ["a key"]


UNKNOWN_TOKEN = MacKeys([b"s" * 32]).mint("kl", "live").reveal()
UNUSED_URL = f"http://127.0.0.1:{free_port()}"

MISTAKES = {
    "nothing to measure": ([], UNKNOWN_TOKEN, "nothing to measure"),
    "no URL": (["127.0.0.1:8700"], UNKNOWN_TOKEN, "not an HTTP URL"),
    "a port that is none": (["http://127.0.0.1:99999"], UNKNOWN_TOKEN, "not a URL"),
    "a password in the URL": (
        ["http://u:hunter2@127.0.0.1"],
        UNKNOWN_TOKEN,
        "more than an address",
    ),
    "a URL and a socket": ([UNUSED_URL, "--uds", "/x"], UNKNOWN_TOKEN, "two targets"),
    "nothing listens there": ([UNUSED_URL], UNKNOWN_TOKEN, "cannot connect to http://127.0.0.1"),
    "no socket": (
        ["--uds", "/missing/keylatch.sock"],
        UNKNOWN_TOKEN,
        "cannot connect to unix:/missing",
    ),
    "no key": ([UNUSED_URL], "", "no key to create keys with"),
    "two lines for a key": ([UNUSED_URL], "x y", "no key to create keys with"),
    "a key as an argument": ([UNUSED_URL, "--key", UNKNOWN_TOKEN], "", "never an argument"),
    "too long": ([UNUSED_URL, "--seconds", "9999"], UNKNOWN_TOKEN, "--seconds is 0.2 to 600"),
    "Redis alone": ([UNUSED_URL, "--redis", "redis://x"], UNKNOWN_TOKEN, "--redis needs --store"),
    "no store": (["--store", "mysql://u:hunter2@db"], "", "neither sqlite nor postgresql"),
    "a password of the store": (
        *(["--store", "postgresql://u:hunter2@127.0.0.1:1/keys"], "", "never an argument"),
    ),
    "an unreachable store": (["--store-file", "store.url"], "", "the store failed"),
    "no file": (["--store-file", "missing.url"], "", "KEYLATCH_STORE_FILE: the file cannot be"),
    "nothing to compare with": (
        [UNUSED_URL, "--compare", "/missing"],
        UNKNOWN_TOKEN,
        "cannot be read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_with_a_hint(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Exit code 2, no traceback, and nothing that is secret."""
    words, typed, message = MISTAKES[mistake]
    monkeypatch.chdir(operator.folder)
    Path("store.url").write_text("postgresql://u:hunter2@127.0.0.1:1/keys\n")
    ending = operator.run("bench", *words, "--out", str(operator.folder / "out"), stdin=typed)
    assert (ending.exit_code, ending.stdout) == (2, "")
    assert message in ending.stderr
    assert ending.stderr.count("error: ") == ending.stderr.count("hint: ") == 1
    assert UNKNOWN_TOKEN[:-1] not in ending.stderr
    assert "hunter2" not in ending.stderr


@pytest.mark.parametrize(
    ("permission", "message"),
    [(None, "the sidecar refuses the key"), ("SENDING", "may not manage keys")],
)
def test_a_key_that_cannot_manage_is_reported(
    operator: Operator, tmp_path: Path, permission: str | None, message: str
) -> None:
    """A key of another store, or one with a small permission."""
    sidecar = SidecarProcess(tmp_path)
    try:
        token = sidecar.create(permission).token.reveal() if permission else UNKNOWN_TOKEN
        ending = operator.run("bench", *words_for(sidecar), *SHORT, stdin=token)
        assert (ending.exit_code, ending.stdout) == (2, "")
        assert message in ending.stderr
        assert "hint: " in ending.stderr
    finally:
        sidecar.close()


def test_the_readme_names_every_option() -> None:
    """The help names all scenarios."""
    section = README.read_text().partition("## Measure your own")[2].partition("\n## ")[0]
    options = {f"--{name.replace('_', '-')}" for name in signature(bench).parameters}
    options = options - {"--url", "--as-json"} | {"--json"}
    assert options == set(re.findall(r"--[a-z-]+", section))


def test_a_missing_extra_is_named() -> None:
    """The error says what to install."""
    program = "import sys; sys.modules['hdrh'] = None; sys.argv = ['keylatch', 'bench']\n"
    program += "from keylatch_sidecar.cli.program import main; main()"
    ending = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ending.returncode == 2
    assert ending.stderr.endswith("hint: pip install 'keylatch[bench]'\n")


def test_what_went_wrong_is_on_the_page() -> None:
    """Unexpected statuses, missing answers, and a rate that was not kept: never hidden."""
    turn = asyncio.run(drive([Echo()], itertools.repeat(GOOD), 1_000, 20))
    turn.outcomes[503] = 2
    scenario = ScenarioResult(1_000)
    scenario.add(turn)
    scenario.unexpected, scenario.keeps_up = 2, False
    results = Results("a test", {}, scenarios={"L1": scenario}, skipped=dict(NEEDS))
    html = html_report.render(results, plots.pictures(results))
    for expected in (
        "2 responses were not",
        "2 x 503",
        "L1: the responses did not keep up",
        *NEEDS.values(),
    ):
        assert expected in html


def test_keys_made_in_a_store_show_no_token(tmp_path: Path) -> None:
    """Neither a key, nor what is sent, nor its creator."""

    async def made() -> Key:
        maker = StoreKeyFactory(Settings.load(store=f"sqlite:///{tmp_path}/keys.db", redis=""))
        try:
            key = await maker.create("a name", "sha256", time.time() + 60)
            assert await maker.find_by_name("a name") == [(key.id, ORGANIZATION)]
            return key
        finally:
            await maker.close()

    key = asyncio.run(made())
    assert not re.search(SCAN_PATTERN, f"{key!r} {key} {key.credential!r} {key.token}")

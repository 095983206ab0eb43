"""The lease protocol, explored: no state breaks a promise, and each broken twin is caught."""

from functools import cache

import pytest

from explorer import Explorer
from failover import Failover
from models import AnyConfiguration, model_of
from prove import MUTANTS, described, main, mutant
from states import Configuration, Member, first_world
from traces import trace

pytestmark = pytest.mark.long

SMALL: list[AnyConfiguration] = [
    Configuration(polls=2, lease=1),
    Configuration(requests=2, lease=1, shared_cache=True),
    Failover(),
    Failover(revokes="we", synchronous=True),
]
PROMOTED = "is promoted"
GRANTED = "a grant counted"

# What the trace of each mutant must contain, in this order.
STEPS = {
    "pub/sub only": ["fills L1", "DELETE 1 commits", "accepts", "G3"],
    "lease without as_of": ["as_of = 0", "commits", "tombstone = 1, lease", "accepts", "G3"],
    "as_of without lease": ["fills L1", "DELETE 1 commits", "accepts", "no lease", "G3"],
    "poll without tombstones": ["commits", "seen = 1, tombstone = 0, lease", "accepts", "G3"],
    "DELETE without waiting": ["commits", "answered", "after the answer", "accepts", "G2"],
    "lease counted from the answer": ["t0 = 0", "seq = 0", "commits", "lease until", "accepts"],
    "laggard removed at the first poll": ["lease until", "commits", "removes", "answered", "G2"],
    "removed although granted meanwhile": ["looks", GRANTED, "removes", "DELETE 1 is", "G2"],
    "silence counted from before the poll": ["reads its clock", GRANTED, "looks", "removes", "G2"],
    "lease without membership": ["removes", "no row", "lease until", "answered", "G2"],
    "deadline counted from before the commit": ["clock", "lease until", "commits", "X after", "G2"],
    "acknowledged before applied": ["polls", "acknowledged = 1", "answered", "accepts", "G2"],
    "repeated DELETE without waiting": ["commits", "does not wait", "after the answer", "accepts"],
    "notice accepted over a gap": [
        "revokes the key",
        "another key",
        "notices 2 to 2",
        "accepts",
        "G3",
    ],
    "numbers instead of history": [
        "another key",
        "promoted with 0 of 1 rows",
        "new primary at 0: seq = 1, revokes the key",
        "anchor is 1 of the old primary alone",
        "a grant, acknowledged = 1: newest row 1",
        "accepts a request: as_of = 0, tombstone = 0",
        "G2",
    ],
    "leases without the synchronous standby": [
        PROMOTED,
        "commits on the new primary",
        "the old primary answers process 1, a grant",
        "is answered",
        "accepts",
        "G2",
    ],
    "tombstones dropped at the break": [
        "revokes the key",
        "tombstone = 1",
        "promoted with 0 of 1 rows",
        "another history: caches void, floor = 0",
        'on the new primary: "active"',
        "G5",
    ],
    "no waiting on a new server": [
        "the old primary answers process 1, a grant",
        PROMOTED,
        "commits on the new primary",
        "looks at the members on the new primary",
        "is answered",
        "G2",
    ],
    "DELETE that changes servers": [
        PROMOTED,
        "commits on the new primary",
        "looks at the members on the old primary",
        "is answered",
        "G2",
    ],
    "look-up without the anchor": [
        'looks the key up on the old primary: "active", as_of = 1',
        PROMOTED,
        "tombstone = 1",
        "accepts a request: as_of = 1",
        "G5",
    ],
    "remembered revocation not applied again": [
        "revokes the key",
        "promoted with 0 of 1 rows",
        "the key is shut",
        "lets the key's look-ups pass again",
        'on the new primary: "active"',
        "G5",
    ],
    "remembered revocation opened before it is read": [
        "the key is shut",
        "has the revocation applied again",
        "the notice of row 1 of the old primary alone",
        'on the old primary: "active", as_of = 1',
        "G5",
    ],
    "notices chained by numbers": [
        "promoted with 0 of 2 rows",
        "the notice of row 1: tombstone = 1",
        "the notice of row 2 of the old primary alone",
        'on the old primary: "active", as_of = 2',
        "G5",
    ],
    "answers of two servers": [
        "the new primary answers process 1, a grant",
        "the old primary answers process 1, only reads",
        "finds another history",
        'on the old primary: "active"',
        "is answered",
        "G2",
    ],
    "caches kept on another server": [
        "makes the key active",
        "looks the key up on the old primary",
        "promoted with 1 of 2 rows",
        "the new primary answers process 1, a grant",
        "G3",
    ],
    "old primary that nothing fences": [
        PROMOTED,
        "commits on the new primary",
        "the old primary answers process 1, a grant",
        "is answered",
        "G2",
    ],
}


@cache
def traced(name: str) -> list[str]:
    """The shortest broken run of a mutant."""
    return trace(mutant(name, lease=1))


@pytest.mark.parametrize("configuration", SMALL, ids=described)
def test_no_state_of_the_protocol_breaks_a_promise(configuration: AnyConfiguration) -> None:
    """Every reachable state of the small worlds is visited; G2, G3 and G5 hold in all of them."""
    outcome = Explorer(configuration).explore(10_000_000)
    assert (outcome.violations, outcome.complete) == (0, True)
    assert outcome.states > 15_000


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_is_caught_and_its_trace_shows_how(name: str) -> None:
    """Leaving out any one rule breaks a promise; the run that shows it names what happened."""
    steps = "\n".join(traced(name))
    at = -1
    for words in STEPS[name]:
        assert words in steps[at + 1 :], steps
        at = steps.index(words, at + 1)


@pytest.mark.parametrize("c", [Configuration(lease=1), Failover(synchronous=True)], ids=described)
def test_the_explorer_leaves_nothing_out(c: AnyConfiguration) -> None:
    """It finds as many states as a search without numbering and without a cache."""
    model = model_of(c)
    first = (model.first_world(c), *model.first_members(c))
    visited, frontier = {first}, [first]
    while frontier:
        world, member = frontier.pop()
        seen = model.view(c, world)
        following = [(world, step.member) for step in model.member_steps(c, seen, member)]
        for move in model.world_steps(c, world):
            feels = model.apply_effect(c, move.effect, member)
            following += [(move.world, feels)] if feels else []
        fresh = {state for state in following if len(state[1].requests) <= c.requests} - visited
        visited |= fresh
        frontier += fresh
    assert Explorer(c).explore(1_000_000).states == len(visited)


def test_a_trace_reads_like_a_story() -> None:
    """One line per step, with the readings of one clock, and at its end the broken promise."""
    assert traced("removed although granted meanwhile") == [
        't = 0  every process is a member, has no lease yet, L1: "active", as_of = 0',
        "t = 0  DELETE 2 commits at 0: seq = 1, revokes another key",
        "t = 0  DELETE 2 reads its clock: 0",
        "t = 0  DELETE 2 looks at the members: who lags, how many grants",
        "t = 0  DELETE 2 reads its clock: 0",
        "t = 1  the clock ticks",
        "t = 1  process 1 polls: t0 = 1, acknowledges 0",
        "t = 1  the store answers process 1: seq = 1, a grant counted, acknowledged = 0",
        "t = 1  process 1 applies the answer: seen = 1, tombstone = 0, lease until 2",
        "t = 1  DELETE 1 commits at 1: seq = 2, revokes the key",
        "t = 1  DELETE 1 reads its clock: 1",
        "t = 1  DELETE 2, X after its clock reading, removes who lags, whatever it was granted",
        "t = 1  DELETE 1 looks at the members: who lags, how many grants",
        "t = 1  DELETE 1 is answered at 1",
        "t = 1  a request starts in process 1, after the answer",
        "t = 1  process 1 accepts a request: as_of = 0, tombstone = 0, lease until 2",
        "G2 is broken: accepted, though it started after the answer",
    ]


def test_a_trace_of_a_failover_names_servers_and_rows() -> None:
    """A row that the failover lost is named by the server that has it."""
    assert traced("tombstones dropped at the break") == [
        't = 0  every process is a member, has no lease yet, L1: "active", as_of = 0',
        "t = 0  the row of process 1 reaches the standby",
        "t = 0  change 1 commits on the old primary at 0: seq = 1, revokes the key",
        "t = 0  process 1 receives the notice of row 1: tombstone = 1",
        "t = 0  process 1 polls: t0 = 0, its anchor is 1",
        "t = 0  the standby is promoted with 0 of 1 rows",
        "t = 0  the new primary answers process 1, a grant, nothing acknowledged: newest row 0, "
        "the row at 1 is not the process's",
        "t = 0  process 1 finds another history: caches void, floor = 0, lease until 1",
        't = 0  process 1 looks the key up on the new primary: "active", as_of = 0',
        "t = 0  process 1 accepts a request: as_of = 0, tombstone = 0, lease until 1",
        "G5 is broken: accepted by a process that had applied the revocation",
    ]


def test_the_sound_protocol_has_no_trace() -> None:
    """Where no promise is broken there is nothing to tell."""
    assert trace(Configuration(lease=1)) == []
    assert trace(Failover(synchronous=True)) == []


def test_who_is_called_process_1_makes_no_difference() -> None:
    """States that differ only in the names of their processes are one state."""
    explorer = Explorer(Configuration(processes=2))
    world = first_world(Configuration(processes=2))
    member = Member(row=0)
    assert explorer.encode((world, (Member(), member))) == explorer.encode(
        (world, (member, Member()))
    )


@pytest.mark.parametrize(
    "words",
    [
        "gives its poll up",
        "joins under a new id: acknowledged = 0, no grants",
        "starts from the recent past: seen = 1, floor = 1",
        "polls: t0 = @+0, acknowledges 1",
        "a grant counted, acknowledged = 1",
        "seq = 1, no row",
        "receives notices 1 to 1: known = 1, tombstone = 1",
        "learns that it is no member: drops its lease and its id",
        "drops its tombstones: floor = 1",
        "the flight of {p} fails",
        "joins the flight under way",
        "asks again",
        "evicts the entry",
        'L2, restored to "active", as_of = 0',
        "stops or crashes",
        "deletes its row",
        "removes who lags and was granted nothing since",
        "does not learn of its removal",
        "is carried out late",
        "could never look",
        "looks again: no row",
        "looks again: {p} acknowledged 1",
        "accepts a request: as_of = 0, tombstone = 0, lease until @+1",
        "starts in {p}, after the answer",
    ],
)
def test_the_model_can_misbehave(explored: str, words: str) -> None:
    """The runs explored hold what the promises are made against: passing means something."""
    assert words in explored


@pytest.mark.parametrize(
    "words",
    [
        "row 1 reaches the standby",
        "the row of {p} reaches the standby",
        "promoted with 0 of 1 rows",
        "promoted with 1 of 1 rows",
        "the old primary answers {p}, only reads",
        "the new primary answers {p}: no row",
        "a grant, nothing acknowledged: newest row 1, the row at 1 is not the process's",
        "ignores the answer of the old primary",
        "finds another history: caches void, floor = 0, lease until @+1, the key is shut",
        "has the revocation applied again: tombstone = 1",
        "caches void: another server",
        "the notice of row 1 of the old primary alone",
        "commits on the old primary at @+0: seq = 1, revokes the key, and is never answered",
        "starts from the recent past of the old primary",
        "joins on the new primary under a new id",
        "stops or crashes",
        "looks at the new primary, which lacks its row, and fails",
        "looks at the new primary, another server: it waits X",
        "looks again at the new primary: {p} acknowledged 1",
        "accepts a request: as_of = 0, tombstone = 0, lease until @+1",
    ],
)
def test_the_model_of_a_failover_can_misbehave(failed_over: str, words: str) -> None:
    """The runs explored hold lost rows, an old primary that lives on, and what follows them."""
    assert words in failed_over


@pytest.fixture(scope="module")
def failed_over() -> str:
    """The steps of small worlds with a failover, one per line."""
    texts: set[str] = set()
    for c in (Failover(), Failover(synchronous=True), Failover(revokes="ww", warm=True)):
        explorer = Explorer(c)
        explorer.explore(1_000_000)
        texts |= explorer.texts()
    return "\n".join(texts)


@pytest.fixture(scope="module")
def explored() -> str:
    """The steps of two small worlds, one per line: a DELETE of the key, and one of another key."""
    texts: set[str] = set()
    for letter in "wo":
        explorer = Explorer(Configuration(revokes=letter, shared_cache=True))
        explorer.explore(1_000_000)
        texts |= explorer.texts()
    return "\n".join(texts)


@pytest.mark.timeout(600)
def test_the_command_fails_if_a_mutant_survives(capsys: pytest.CaptureFixture[str]) -> None:
    """`make prove` passes with figures and traces on the screen."""
    assert main(["--quick", "--states", "2000"]) == 0
    shown = capsys.readouterr().out
    assert "0 violations; 26 of 26 mutants caught" in shown
    assert "cut off" in shown

"""What there is in the model: the world, the processes in it, and the rules they keep.

Frozen values only. Clocks are held relative to now (ages and remaining leases, in ticks,
saturated where they stop to matter), so that equal futures are equal states. One key is watched;
revoking other keys matters because it moves `seq` and removes members.
"""

from typing import NamedTuple

BEGUN, WAITING, HOLDING = "begun", "waiting", "holding"
IDLE, STARTED, COMMITTED, COUNTING, LOOKED, WATCHING, REMOVED, LATE, ANSWERED = range(9)
ASKED, REFUSED = -1, -2


class Rules(NamedTuple):
    """The rules of the protocol; a mutant breaks one."""

    needs_lease: bool = True
    checks_as_of: bool = True
    polls: bool = True
    polls_bring_tombstones: bool = True
    delete_waits: bool = True
    lease_from_request: bool = True
    removal_waits: bool = True
    removal_minds_grants: bool = True
    look_clocked_after: bool = True
    lease_needs_membership: bool = True
    clock_read_after_commit: bool = True
    acks_after_applying: bool = True
    repeats_wait: bool = True
    notices_have_no_gap: bool = True


MUTANTS = {
    "pub/sub only": Rules(needs_lease=False, checks_as_of=False, polls=False),
    "lease without as_of": Rules(checks_as_of=False),
    "as_of without lease": Rules(needs_lease=False),
    "poll without tombstones": Rules(polls_bring_tombstones=False),
    "DELETE without waiting": Rules(delete_waits=False),
    "lease counted from the answer": Rules(lease_from_request=False),
    "laggard removed at the first poll": Rules(removal_waits=False),
    "removed although granted meanwhile": Rules(removal_minds_grants=False),
    "silence counted from before the poll": Rules(look_clocked_after=False),
    "lease without membership": Rules(lease_needs_membership=False),
    "deadline counted from before the commit": Rules(clock_read_after_commit=False),
    "acknowledged before applied": Rules(acks_after_applying=False),
    "repeated DELETE without waiting": Rules(repeats_wait=False),
    "notice accepted over a gap": Rules(notices_have_no_gap=False),
}


class Configuration(NamedTuple):
    """How large a world: `requests` and `polls` count what is under way at once.

    `revokes` has a letter per DELETE: "w" for the watched key, "o" for another; their order is
    free. `lease` is X in ticks. `warm` is for the traces of mutants, a short way to what they need:
    every process starts as a member with the key in L1, and nothing crashes, is lost or evicted.
    """

    processes: int = 1
    requests: int = 1
    revokes: str = "w"
    lease: int = 2
    polls: int = 1
    shared_cache: bool = False
    warm: bool = False
    rules: Rules = Rules()


class Poll(NamedTuple):
    """A poll under way: the age of its t0, what it acknowledges, and the seq that it brings back.

    Before its transaction `seq` is ASKED; it is REFUSED if the row was gone. An answered poll
    acknowledges nothing more. No lease and a lease that is over are the same: the age X.
    """

    age: int = 0
    acked: int = 0
    seq: int = ASKED


class Request(NamedTuple):
    """A check under way; `late` if it started after a DELETE of the watched key was answered."""

    late: bool
    stage: str = BEGUN
    as_of: int = 0


class Member(NamedTuple):
    """One process: its row, its memory, its requests, and the DELETEs that wait for it.

    `row` is what its row acknowledges (None: there is no row), `joined` whether it assumes to
    have one. `bar` is max(tombstone, floor). `entry` and `flight` are the as_of of an "active"
    value, in L1 and in a read under way; values that say "revoked" are left out, since they
    accept no request. `awaited` are the DELETEs that found it lagging and wait for it, `silent`
    those since whose first look its row counted no grant.
    """

    row: int | None = None
    joined: bool = False
    lease: int = 0
    seen: int = 0
    bar: int = 0
    entry: int | None = None
    flight: int | None = None
    polls: tuple[Poll, ...] = ()
    requests: tuple[Request, ...] = ()
    awaited: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()


class Revoke(NamedTuple):
    """A DELETE: its stage, its sequence number while that matters, the age of its clock reading."""

    stage: int = IDLE
    number: int = 0
    age: int = 0


class World(NamedTuple):
    """What all processes share: the log (is entry n about the watched key?) and the DELETEs.

    `since_commit` and `answered` are the judge's: the age of the first commit that revoked the
    watched key, and whether a DELETE of it was answered.
    """

    log: tuple[bool, ...]
    revokes: tuple[Revoke, ...]
    since_commit: int | None = None
    answered: bool = False


class View(NamedTuple):
    """As much of the world as the steps of a process depend on."""

    log: tuple[bool, ...]
    numbers: tuple[int, ...]
    overdue: bool
    answered: bool


class Step(NamedTuple):
    """What one process may do next, and the promise that this breaks, if any."""

    text: str
    member: Member
    broken: str = ""


class Effect(NamedTuple):
    """What a step of the world does to each process."""

    kind: str
    revoke: int = 0
    number: int = 0


class WorldStep(NamedTuple):
    """What a DELETE or the clock may do next."""

    text: str
    world: World
    effect: Effect


def first_world(c: Configuration) -> World:
    """No DELETE yet; the key is active at seq 0."""
    return World((), tuple(Revoke() for _ in c.revokes))


def first_members(c: Configuration) -> tuple[Member, ...]:
    """Processes that have just started, or warm ones."""
    return (Member(row=0, joined=True, entry=0) if c.warm else Member(),) * c.processes


def view(c: Configuration, world: World) -> View:
    """The world as a process's steps depend on it."""
    overdue = world.since_commit is not None and world.since_commit > c.lease
    return View(world.log, tuple(r.number for r in world.revokes), overdue, world.answered)

"""The lease protocol across a failover: two servers, two histories of the log, one promotion.

Pure functions of frozen values, under the same law as `protocol` and `deletes`: a step may be
taken or not. Until the promotion the old primary is the current one, afterwards the new one is.
The new one has what had reached it; the old one lives on, and its log may grow. Rows of the log are
named by positions: `n` is row n of the current primary, `-n` a row n that only the old primary has.

A look-up fills L1 at once, and a check is one step: a value that arrives later, or that a request
holds, is judged like a value in L1, and it is void when that is void.
"""

from collections.abc import Iterator
from typing import NamedTuple

from protocol import in_order, without
from states import Effect

OLD, NEW, NEITHER = "the old primary", "the new primary", ""
IDLE, COMMITTED, LOOKED, COUNTING, ANSWERED, FAILED = range(6)
NONE = Effect("none")


class Rules(NamedTuple):
    """The rules of the protocol that matter here; a mutant breaks one."""

    compares_history: bool = True
    leases_wait_for_standby: bool = True
    keeps_tombstones: bool = True
    waits_on_new_server: bool = True
    looks_know_server: bool = True
    lookups_check_anchor: bool = True
    applies_again: bool = True
    opens_when_read: bool = True
    believes_one_server: bool = True
    old_primary_is_fenced: bool = True
    voids_on_new_server: bool = True


MUTANTS = {
    "numbers instead of history": Rules(compares_history=False),
    "leases without the synchronous standby": Rules(leases_wait_for_standby=False),
    "tombstones dropped at the break": Rules(keeps_tombstones=False),
    "no waiting on a new server": Rules(waits_on_new_server=False),
    "DELETE that changes servers": Rules(looks_know_server=False),
    "look-up without the anchor": Rules(lookups_check_anchor=False),
    "remembered revocation not applied again": Rules(applies_again=False),
    "remembered revocation opened before it is read": Rules(opens_when_read=False),
    "answers of two servers": Rules(believes_one_server=False),
    "old primary that nothing fences": Rules(old_primary_is_fenced=False),
    "caches kept on another server": Rules(voids_on_new_server=False),
}


class Failover(NamedTuple):
    """How large a world, see `states.Configuration`.

    `revokes` has a letter per change: "w" revokes the watched key, "e" makes it active again, "o"
    concerns another key. `log` are rows that the old primary has from the beginning, for failovers
    that lose several; the standby has none of them yet. `synchronous`: commits, grants and joins
    are answered when the standby has them. Without it the standby is behind, and the old primary is
    fenced from outside: it grants nothing after the promotion. In both cases it still answers
    reads, and its log may grow by rows whose commits are never answered; in warm worlds without a
    synchronous standby it does not.
    """

    processes: int = 1
    revokes: str = "w"
    lease: int = 1
    log: str = ""
    synchronous: bool = False
    warm: bool = False
    rules: Rules = Rules()

    @property
    def requests(self) -> int:
        """A check is one step, so no request is under way."""
        return 0


class Poll(NamedTuple):
    """A poll under way: the age of its t0, the anchor that it names, and the answer.

    `seq` is the newest row of `server`, None before the answer. `fits`: the row at the anchor is
    the process's own. Reads are polls that grant nothing: `age` is the lease period.
    """

    age: int = 0
    anchor: int = 0
    seq: int | None = None
    server: str = NEITHER
    fits: bool = True
    is_refused: bool = False


class Member(NamedTuple):
    """One process: its row on both servers and its memory, see `states.Member`.

    `new` is the copy of the row that the standby has, until the promotion. `anchor` is the last row
    that the process knows, `ended` the rows that revoke the key among those that it applied,
    `home` the server that granted its lease. While it is `shut`, the key's tombstone lets nothing
    pass. `was_told` is the judge's: the last row about the key that it applied revoked it.
    """

    old: int | None = None
    new: int | None = None
    joined: bool = False
    lease: int = 0
    home: str = NEITHER
    anchor: int = 0
    bar: int = 0
    shut: bool = False
    ended: tuple[int, ...] = ()
    entry: int | None = None
    poll: Poll | None = None
    awaited: tuple[int, ...] = ()
    was_told: bool = False

    @property
    def requests(self) -> tuple[()]:
        """See `Failover.requests`."""
        return ()


class Change(NamedTuple):
    """A DELETE, or another change: its stage, its row, the age of its clock reading after the
    commit, and the server that it looked at last (before that, the one of its commit)."""

    stage: int = IDLE
    position: int = 0
    age: int = 0
    server: str = NEITHER


class World(NamedTuple):
    """What all processes share: the logs, a letter per row, and the changes.

    `copied` is how many rows the standby has, and had at the promotion. `settling` counts ticks
    since the first change on the new primary. `inactive` and `answered` are the judge's: how long
    the current primary has called the key revoked, and whether it answered a DELETE of it.
    """

    old: str = ""
    copied: int = 0
    new: str | None = None
    changes: tuple[Change, ...] = ()
    settling: int | None = None
    inactive: int | None = None
    answered: bool = False


class View(NamedTuple):
    """As much of the world as the steps of a process depend on."""

    old: str
    copied: int
    new: str | None
    changes: tuple[tuple[int, str], ...]
    overdue: bool
    answered: bool

    @property
    def current(self) -> str:
        return OLD if self.new is None else NEW

    @property
    def was_active_again(self) -> bool:
        return "e" in self.old + (self.new or "")


class Step(NamedTuple):
    """What one process may do next, and the promise that this breaks, if any."""

    text: str
    member: Member
    broken: str = ""


class WorldStep(NamedTuple):
    """What a change, the clock or the standby may do next."""

    text: str
    world: World
    effect: Effect


def first_world(c: Failover) -> World:
    """No change yet; the key is active at seq 0."""
    inactive = None if is_active(c.log) else 0
    return World(c.log, changes=(Change(),) * len(c.revokes), inactive=inactive)


def first_members(c: Failover) -> tuple[Member, ...]:
    """Processes that have just started, or warm ones, whose rows the standby lacks."""
    copy = 0 if c.synchronous else None
    warm = Member(old=0, new=copy, joined=True, home=OLD, entry=0)
    return (warm if c.warm else Member(),) * c.processes


def view(c: Failover, world: World) -> View:
    """The world as a process's steps depend on it."""
    overdue = world.inactive is not None and world.inactive > c.lease
    looks = tuple(
        (change.position, change.server) if change.stage == LOOKED else (0, NEITHER)
        for change in world.changes
    )
    return View(world.old, world.copied, world.new, looks, overdue, world.answered)


# Logs and positions


def log_of(v: View | World, server: str) -> str:
    return v.old if server == OLD else v.new or ""


def position(v: View | World, server: str, number: int) -> int:
    """The position of a row of that server's log."""
    only_old = server == OLD and v.new is not None and number > v.copied
    return -number if only_old else number


def has_row(v: View | World, server: str, at: int) -> bool:
    """Whether that server's log has that very row."""
    number = abs(at)
    return number <= len(log_of(v, server)) and position(v, server, number) == at


def is_active(log: str) -> bool:
    """Whether the key is active after these rows."""
    return log.rfind("w") <= log.rfind("e")


# The process


def member_steps(c: Failover, v: View, m: Member) -> Iterator[Step]:
    """Every step that one process, or a server about its row, may take next."""
    yield from _joining(c, v, m)
    yield from _polling(c, v, m)
    yield from _receiving_notice(c, v, m)
    yield from _applying_again(c, v, m)
    yield from _looking_up(c, v, m)
    yield from _accepting(v, m)
    yield from _waited_for(v, m)
    if v.new is None and m.old is not None and m.new != m.old and m.old <= v.copied:
        yield Step("the row of {p} reaches the standby", m._replace(new=m.old))
    forgotten = Member(m.old, m.new, awaited=m.awaited)
    if m != forgotten and not c.warm:
        yield Step("{p} stops or crashes: memory gone, row stays", forgotten)


def _servers(v: View) -> tuple[str, ...]:
    return (OLD,) if v.new is None else (OLD, NEW)


def _granting(c: Failover, v: View) -> tuple[str, ...]:
    """The servers on which a grant is answered."""
    fence = c.rules.leases_wait_for_standby if c.synchronous else c.rules.old_primary_is_fenced
    return (v.current,) if fence else _servers(v)


def _with_row(c: Failover, v: View, m: Member, server: str, row: int) -> Member:
    if server == NEW:
        return m._replace(new=row)
    return m._replace(old=row, new=row) if c.synchronous and v.new is None else m._replace(old=row)


def _joining(c: Failover, v: View, m: Member) -> Iterator[Step]:
    if m.joined:
        return
    # Under a new id: the standby has no copy of this row yet.
    fresh = m._replace(joined=True, poll=None, new=m.new if v.new is not None else None)
    joined = _with_row(c, v, fresh, v.current, 0)
    yield Step(f"{{p}} joins on {v.current} under a new id: acknowledged = 0", joined)
    if m == Member(m.old, m.new, awaited=m.awaited):
        for server in _servers(v):
            if seq := len(log_of(v, server)):
                begun = m._replace(anchor=position(v, server, seq), bar=seq)
                yield Step(f"{{p}} starts from the recent past of {server}: floor = {seq}", begun)


def _polling(c: Failover, v: View, m: Member) -> Iterator[Step]:
    poll = m.poll
    if poll is None:
        if m.joined:
            text = f"{{p}} polls: t0 = @+0, its anchor is {_row(m.anchor)}"
            yield Step(text, m._replace(poll=Poll(anchor=m.anchor)))
            for server in _servers(v):
                if not has_row(v, server, m.anchor) or abs(m.anchor) < len(log_of(v, server)):
                    yield _answered(c, v, m, Poll(c.lease, m.anchor), server, "only reads: ")
        return
    rest = m._replace(poll=None)
    if not c.warm:
        yield Step("{p} gives its poll up", rest)
    if poll.is_refused:
        text = "{p} learns that it is no member: drops its lease and its id"
        yield Step(text, rest._replace(joined=False, lease=0))
    elif poll.seq is not None:
        yield from _applied(c, v, rest, poll, poll.seq)
    else:
        for server in _granting(c, v):
            yield _transaction(c, v, m, poll, server)


def _transaction(c: Failover, v: View, m: Member, poll: Poll, server: str) -> Step:
    """The poll at a server: acknowledge if the row at the anchor is the process's, and grant."""
    if (m.old if server == OLD else m.new) is None:
        refused = Poll(c.lease, is_refused=True)
        return Step(f"{server} answers {{p}}: no row", m._replace(poll=refused))
    if not _fits(c, v, server, poll.anchor):
        return _answered(c, v, m, poll, server, "a grant, nothing acknowledged: ")
    row = abs(poll.anchor)
    m = _with_row(c, v, m, server, row)
    return _answered(c, v, m, poll, server, f"a grant, acknowledged = {row}: ")


def _answered(c: Failover, v: View, m: Member, poll: Poll, server: str, what: str) -> Step:
    seq = position(v, server, len(log_of(v, server)))
    fits = _fits(c, v, server, poll.anchor)
    text = f"{server} answers {{p}}, {what}newest row {_row(seq)}"
    text += "" if fits else f", the row at {abs(poll.anchor)} is not the process's"
    return Step(text, m._replace(poll=Poll(poll.age, seq=seq, server=server, fits=fits)))


def _fits(c: Failover, v: View, server: str, anchor: int) -> bool:
    if c.rules.compares_history:
        return has_row(v, server, anchor)
    return abs(anchor) <= len(log_of(v, server))


def _applied(c: Failover, v: View, m: Member, poll: Poll, seq: int) -> Iterator[Step]:
    """Tombstones, anchor and lease in one step of the process."""
    server = poll.server
    text = ""
    if server != m.home:
        if poll.age == c.lease and c.rules.believes_one_server:
            yield Step(f"{{p}} ignores the answer of {server}, which granted no lease", m)
            return
        m = m._replace(home=server)
        if m.entry is not None and c.rules.voids_on_new_server:
            m = m._replace(entry=None)
            text = ", caches void: another server"
    lease = max(m.lease, c.lease - poll.age)
    until = f", lease until @{lease:+}" if lease else ", no lease"
    m = m._replace(lease=lease)
    if not poll.fits or not _agrees(c, v, m, server, seq):
        m = _adopted(c, v, m, server, seq)
        text = f"{{p}} finds another history: caches void, floor = {abs(seq)}" + until
        text += ", the key is shut" if m.shut else ""
        yield Step(text, m)
        return
    if abs(seq) > abs(m.anchor):
        m = _with_rows(v, m, server, abs(seq))
    text = f"{{p}} applies the answer: anchor {_row(m.anchor)}, tombstone = {m.bar}{until}{text}"
    yield Step(text, m)
    if m.bar < abs(m.anchor) and not c.warm:
        text = f"{{p}} applies the answer and drops its tombstones: floor = {abs(m.anchor)}{until}"
        yield Step(text, m._replace(bar=abs(m.anchor)))


def _agrees(c: Failover, v: View, m: Member, server: str, seq: int) -> bool:
    """Whether an answer continues what the process knows by now, notices included."""
    return _fits(c, v, server, _own_row(v, m, min(abs(m.anchor), abs(seq))))


def _with_rows(v: View, m: Member, server: str, last: int) -> Member:
    """The process after the rows of a server that follow its anchor."""
    for number in range(abs(m.anchor) + 1, last + 1):
        letter, at = log_of(v, server)[number - 1], position(v, server, number)
        if letter != "o":
            m = m._replace(bar=number, was_told=letter == "w")
        if letter == "w":
            m = m._replace(ended=_with_ended(v, m.ended, at))
        m = m._replace(anchor=at)
    return m


def _with_ended(v: View, ended: tuple[int, ...], at: int) -> tuple[int, ...]:
    """One row for each history: a row that both servers have is lost by neither."""
    if v.new is not None and 0 < at <= v.copied:
        return ended
    return in_order({at, *(other for other in ended if (other < 0) != (at < 0))})


def _adopted(c: Failover, v: View, m: Member, server: str, seq: int) -> Member:
    """The process follows another history. What it remembers and that one lacks is shut."""
    lost = any(not has_row(v, server, at) for at in m.ended)
    shut = m.shut or (lost and c.rules.keeps_tombstones)
    return m._replace(entry=None, anchor=seq, bar=abs(seq), shut=shut)


def _receiving_notice(c: Failover, v: View, m: Member) -> Iterator[Step]:
    """Signed notices of rows that any server ever had, late or not; chained by identity."""
    if not m.joined:
        return
    for server in _servers(v):
        following = abs(m.anchor) + 1
        if following <= len(log_of(v, server)) and _fits(c, v, server, m.anchor):
            after = _with_rows(v, m, server, following)
            text = f"{{p}} receives the notice of row {_row(after.anchor)}: tombstone = {after.bar}"
            yield Step(text, after)


def _applying_again(c: Failover, v: View, m: Member) -> Iterator[Step]:
    """The process's own DELETE of what it remembers: it commits, so on the current primary.

    The commit itself is a DELETE of the world. Here the process has read the row in the history
    that it follows; before, the row's number would mean nothing to it.
    """
    if not m.shut:
        return
    if not c.rules.applies_again:
        yield Step("{p} lets the key's look-ups pass again", m._replace(shut=False))
        return
    log = log_of(v, v.current)
    number = log.rfind("w") + 1
    was_read = number <= abs(m.anchor) or not c.rules.opens_when_read
    if not is_active(log) and was_read and has_row(v, v.current, m.anchor):
        ended = _with_ended(v, (), position(v, v.current, number))
        opened = m._replace(shut=False, bar=max(m.bar, number), ended=ended)
        yield Step(f"{{p}} has the revocation applied again: tombstone = {opened.bar}", opened)


def _looking_up(c: Failover, v: View, m: Member) -> Iterator[Step]:
    """A read of any server that answers; it is believed if it has what the process knows."""
    for server in _servers(v):
        log = log_of(v, server)
        if not is_active(log) or (c.rules.believes_one_server and server != m.home):
            continue
        as_of = len(log)
        if c.rules.lookups_check_anchor:
            as_of = min(as_of, abs(m.anchor))
            if not has_row(v, server, _own_row(v, m, as_of)):
                continue
        text = f'{{p}} looks the key up on {server}: "active", as_of = {as_of}'
        yield Step(text, m._replace(entry=as_of))


def _own_row(v: View, m: Member, number: int) -> int:
    """The position of a row up to the anchor, in the history that the process follows."""
    return position(v, OLD if m.anchor < 0 else NEW, number)


def _accepting(v: View, m: Member) -> Iterator[Step]:
    """A check: one step, one clock reading. A request that it accepts may have started just now."""
    if m.entry is None or not m.lease or m.entry < m.bar or m.shut:
        return
    broken = ""
    if m.was_told and not v.was_active_again:
        broken = "G5 is broken: accepted by a process that had applied the revocation"
    elif v.answered:
        broken = "G2 is broken: accepted, though it started after the answer"
    elif v.overdue:
        broken = "G3 is broken: accepted later than X after the current primary revoked"
    text = f"{{p}} accepts a request: as_of = {m.entry}, tombstone = {m.bar}"
    yield Step(f"{text}, lease until @{m.lease:+}", m, broken)


def _waited_for(v: View, m: Member) -> Iterator[Step]:
    """A change looks again at the server that it looked at; what is settled stays settled."""
    for i in m.awaited:
        at, server = v.changes[i]
        row = m.old if server == OLD else m.new
        settled = m._replace(awaited=without(m.awaited, i))
        if server != NEITHER and (row is None or row >= abs(at)):
            what = "no row of {p}" if row is None else f"{{p}} acknowledged {row}"
            yield Step(f"change {i + 1} looks again at {server}: {what}", settled)


def _row(at: int) -> str:
    """A position in words."""
    return f"{-at} of the old primary alone" if at < 0 else str(at)


# Changes, the clock and the standby


def world_steps(c: Failover, world: World) -> Iterator[WorldStep]:
    """Every step that a change, the clock or the standby may take next."""
    yield _tick(c, world)
    if world.new is None:
        if world.copied < len(world.old):
            copied = world._replace(copied=world.copied + 1)
            yield WorldStep(f"row {copied.copied} reaches the standby", copied, NONE)
        yield _promotion(c, world)
    for i, change in enumerate(world.changes):
        if change.stage == IDLE:
            yield from _committing(c, world, i)
        elif change.stage in (COMMITTED, LOOKED, COUNTING):
            yield from _waiting(c, world, i, change)


def _tick(c: Failover, world: World) -> WorldStep:
    waiting = (COMMITTED, LOOKED, COUNTING)
    changes = tuple(
        change._replace(age=min(change.age + 1, c.lease)) if change.stage in waiting else change
        for change in world.changes
    )
    settling = None if world.settling is None else min(world.settling + 1, c.lease)
    inactive = None if world.inactive is None else min(world.inactive + 1, c.lease + 1)
    later = world._replace(changes=changes, settling=settling, inactive=inactive)
    return WorldStep("the clock ticks", later, Effect("tick"))


def _promotion(c: Failover, world: World) -> WorldStep:
    new = world.old[: world.copied]
    changes = tuple(
        change._replace(position=_lost(change.position, world.copied)) for change in world.changes
    )
    inactive = None if is_active(new) else world.inactive or 0
    if inactive is not None and "e" in c.revokes:
        inactive = 0
    after = world._replace(new=new, changes=changes, inactive=inactive)
    after = after._replace(answered=_is_answered(c, after))
    text = f"the standby is promoted with {world.copied} of {len(world.old)} rows"
    return WorldStep(text, after, Effect("promote", number=world.copied))


def _lost(at: int, copied: int) -> int:
    return -at if at > copied else at


def _is_answered(c: Failover, world: World) -> bool:
    """Whether the current primary has a DELETE of the key that was answered, and nothing later.

    What makes the key active on the old primary alone may count until X after the promotion: G3.
    """
    current = world.old if world.new is None else world.new
    since = current.rfind("e") + 1
    if world.new is not None and "e" in world.old:
        since = max(since, world.copied)
    return not is_active(current) and any(
        change.stage == ANSWERED and letter == "w" and change.position > since
        for letter, change in zip(c.revokes, world.changes, strict=True)
    )


def _committing(c: Failover, world: World, i: int) -> Iterator[WorldStep]:
    letter, name = c.revokes[i], f"change {i + 1}"
    kind = {"w": "revokes the key", "e": "makes the key active", "o": "concerns another key"}
    for server in (OLD,) if world.new is None else (OLD, NEW):
        log = log_of(world, server) + letter
        if letter == "e" and is_active(log[:-1]):
            continue
        text = f"{name} commits on {server} at @+0: seq = {len(log)}, {kind[letter]}"
        is_current = server == NEW or world.new is None
        if not is_current and c.warm and not c.synchronous:
            continue
        if not is_current:
            # Seen by reads alone: no commit is answered there any more.
            after = _with_change(world, i, Change(FAILED))._replace(old=log)
            after = after._replace(answered=_is_answered(c, after))
            yield WorldStep(text + ", and is never answered", after, NONE)
            continue
        inactive = None if is_active(log) else world.inactive or 0
        after = world._replace(inactive=inactive)
        if server == NEW:
            after = after._replace(new=log, settling=world.settling or 0)
        else:
            after = after._replace(old=log)
            after = after._replace(copied=len(log)) if c.synchronous else after
        after = _with_change(after, i, Change(COMMITTED, len(log), 0, server))
        if letter == "e":
            after = _with_change(after, i, Change(ANSWERED, len(log)))._replace(answered=False)
        yield WorldStep(text, after, NONE)


def _waiting(c: Failover, world: World, i: int, change: Change) -> Iterator[WorldStep]:
    name = f"change {i + 1}"
    if change.stage != COUNTING:
        for server in (OLD,) if world.new is None else (OLD, NEW):
            if change.stage == COMMITTED or server != change.server:
                yield _look(c, world, i, server)
    if change.age == c.lease:
        text = f"{name}, X after its clock reading, is answered at @+0"
        yield _answer(c, world, i, text, Effect("leave", i))
    elif change.stage == LOOKED:
        settled = change.server == OLD or world.settling == c.lease
        if settled or not c.rules.waits_on_new_server:
            yield _answer(c, world, i, f"{name} is answered at @+0", Effect("answer", i))


def _look(c: Failover, world: World, i: int, server: str) -> WorldStep:
    change = world.changes[i]
    name = f"change {i + 1}"
    if c.rules.looks_know_server and server != change.server:
        if not has_row(world, server, change.position):
            after = _with_change(world, i, Change(FAILED))
            text = f"{name} looks at {server}, which lacks its row, and fails"
            return WorldStep(text, after, Effect("leave", i))
        after = _with_change(world, i, change._replace(stage=COUNTING, server=NEITHER))
        text = f"{name} looks at {server}, another server: it waits X"
        return WorldStep(text, after, Effect("leave", i))
    after = _with_change(world, i, change._replace(stage=LOOKED, server=server))
    effect = Effect("look new" if server == NEW else "look old", i, abs(change.position))
    return WorldStep(f"{name} looks at the members on {server}: who lags", after, effect)


def _answer(c: Failover, world: World, i: int, text: str, effect: Effect) -> WorldStep:
    change = world.changes[i]
    after = _with_change(world, i, change._replace(stage=ANSWERED, age=0, server=NEITHER))
    # What a look at the new primary brought about is that server's answer, even of a lost row.
    is_its_answer = change.stage == LOOKED and change.server == NEW
    by_current = is_its_answer and c.revokes[i] == "w" and change.position < 0
    answered = world.answered or by_current or _is_answered(c, after)
    return WorldStep(text, after._replace(answered=answered), effect)


def _with_change(world: World, i: int, change: Change) -> World:
    return world._replace(changes=(*world.changes[:i], change, *world.changes[i + 1 :]))


def apply_effect(c: Failover, effect: Effect, m: Member) -> Member | None:
    """The process after a step of the world; None where it stands in the way of that step."""
    i = effect.revoke
    match effect.kind:
        case "tick":
            poll = m.poll and m.poll._replace(age=min(m.poll.age + 1, c.lease))
            return m._replace(poll=poll, lease=max(m.lease - 1, 0))
        case "promote":
            return _promoted(m, effect.number)
        case "look old" | "look new":
            row = m.old if effect.kind == "look old" else m.new
            lags = row is not None and row < effect.number
            return m._replace(awaited=in_order({*m.awaited, i})) if lags else m
        case "answer":
            return None if i in m.awaited else m
        case "leave":
            return m._replace(awaited=tuple(r for r in m.awaited if r != i))
    return m


def _promoted(m: Member, copied: int) -> Member:
    """Rows that the new primary lacks have other positions from now on."""
    poll = m.poll
    if poll is not None:
        seq = None if poll.seq is None else _lost(poll.seq, copied)
        poll = poll._replace(anchor=_lost(poll.anchor, copied), seq=seq)
    ended = in_order(_lost(at, copied) for at in m.ended if at > copied)
    return m._replace(anchor=_lost(m.anchor, copied), ended=ended, poll=poll)

"""The lease protocol, the side of a process: what each one, and the store about it, may do next.

Pure functions of frozen values. A step listed here may be taken at any time, or never: that is
how delay, pause, loss and partition enter. Nothing that a process remembers goes backwards.
In a step's text `{p}` stands for the process and `@+2` for the clock two ticks from now.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from states import (
    ASKED,
    BEGUN,
    HOLDING,
    REFUSED,
    WAITING,
    Configuration,
    Member,
    Poll,
    Request,
    Step,
    View,
)

T = TypeVar("T", int, Poll, Request)


def member_steps(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    """Every step that one process, or the store about its row, may take next."""
    if c.rules.polls:
        yield from _joining(v, m)
        yield from _polling(c, v, m)
    yield from _filling(c, m)
    yield from _checking(c, v, m)
    yield from _waited_for(c, v, m)
    forgotten = Member(m.row, awaited=m.awaited, silent=m.silent)
    if c.warm:
        return
    if m != forgotten:
        yield Step("{p} stops or crashes: memory gone, row stays", forgotten)
    elif m.row is not None:
        yield Step("{p}, stopped in order, deletes its row", m._replace(row=None, silent=()))


def _joining(v: View, m: Member) -> Iterator[Step]:
    if m.joined:
        return
    # A process that rejoins has no poll under way, except for answers that others overtook.
    polls = tuple(poll for poll in m.polls if poll.seq >= 0)
    row = m._replace(row=0, joined=True, polls=polls, silent=())
    yield Step("{p} joins under a new id: acknowledged = 0, no grants", row)
    if m == Member(m.row, requests=m.requests, awaited=m.awaited, silent=m.silent):
        for seq in range(1, len(v.log) + 1):
            text = f"{{p}} starts from the recent past: seen = {seq}, floor = {seq}"
            yield Step(text, m._replace(seen=seq, bar=seq))


def _polling(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    if m.joined and len(m.polls) < c.polls:
        polls = in_order([*m.polls, Poll(acked=m.seen)])
        yield Step(f"{{p}} polls: t0 = @+0, acknowledges {m.seen}", m._replace(polls=polls))
        if m.seen < len(v.log):
            # On a notice: nothing is acknowledged and nothing granted, as if the poll were too old.
            read_only = in_order([*m.polls, Poll(c.lease, seq=len(v.log))])
            text = f"the store answers {{p}}, which only reads: seq = {len(v.log)}"
            yield Step(text, m._replace(polls=read_only))
    yield from _receiving_notice(c, v, m)
    for poll in dict.fromkeys(m.polls):
        rest = m._replace(polls=without(m.polls, poll))
        if not c.warm:
            yield Step("{p} gives its poll up", rest)
        if poll.seq == ASKED:
            yield _transaction(c, v, rest, poll)
        elif poll.seq == REFUSED:
            text = "{p} learns that it is no member: drops its lease and its id"
            yield Step(text, rest._replace(joined=False, lease=0))
        else:
            yield from _applied(c, v, rest, poll)


def _receiving_notice(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    """Signed notices of any part of the log that ever existed: late, repeated, out of order. They
    count only if they follow the known sequence number; else they cause a poll, which may happen
    anyway. The store compares applied notices with its log; this log only grows: they agree."""
    if not m.joined:
        return
    for last in range(m.seen + 1, len(v.log) + 1):
        for first in range(m.seen + 1, last + 1):
            if first == m.seen + 1 or not c.rules.notices_have_no_gap:
                changed = [n for n in range(first, last + 1) if v.log[n - 1]]
                bar = max([m.bar, *changed])
                text = f"{{p}} receives notices {first} to {last}: known = {last}, "
                text += f"tombstone = {bar}"
                yield Step(text, m._replace(seen=last, bar=bar))


def _transaction(c: Configuration, v: View, m: Member, poll: Poll) -> Step:
    """The poll at the store: acknowledge, count a grant, read seq and log, all at once."""
    age = poll.age if c.rules.lease_from_request else 0
    answer = Poll(age, seq=len(v.log))
    text = f"the store answers {{p}}: seq = {len(v.log)}, "
    if m.row is None:
        if c.rules.lease_needs_membership:
            answer = Poll(c.lease, seq=REFUSED)
        return Step(text + "no row", m._replace(polls=in_order([*m.polls, answer])))
    row = poll.acked if c.rules.acks_after_applying else answer.seq
    silent = () if c.rules.removal_minds_grants else m.silent
    counted = m._replace(row=row, silent=silent, polls=in_order([*m.polls, answer]))
    return Step(text + f"a grant counted, acknowledged = {row}", counted)


def _applied(c: Configuration, v: View, m: Member, poll: Poll) -> Iterator[Step]:
    """Tombstones, seen and lease in one step of the process."""
    lease = max(m.lease, c.lease - poll.age)
    until = f"lease until @{lease:+}" if lease else "no lease"
    entry, bar, seen = m.entry, m.bar, max(m.seen, poll.seq)
    changed = [n for n in range(m.seen + 1, poll.seq + 1) if v.log[n - 1]]
    if changed and c.rules.polls_bring_tombstones:
        bar = max(bar, changed[-1])
        entry = entry if c.rules.checks_as_of else None
    m = m._replace(entry=entry, bar=bar, lease=lease, seen=seen)
    yield Step(f"{{p}} applies the answer: seen = {seen}, tombstone = {bar}, {until}", m)
    if bar < seen and c.rules.polls_bring_tombstones and not c.warm:
        text = f"{{p}} applies the answer and drops its tombstones: floor = {seen}, {until}"
        yield Step(text, m._replace(bar=seen))


def _filling(c: Configuration, m: Member) -> Iterator[Step]:
    if m.entry is not None and not c.warm:
        yield Step("{p} evicts the entry", m._replace(entry=None))
    if m.flight is not None:
        held, again = [], []
        for request in m.requests:
            waiting = request.stage == WAITING
            held.append(Request(request.late, HOLDING, m.flight) if waiting else request)
            again.append(Request(request.late) if waiting else request)
        text = f'{{p}} fills L1: "active", as_of = {m.flight}'
        landed = m._replace(entry=m.flight, flight=None, requests=in_order(held))
        yield Step(text, landed)
        yield Step("the flight of {p} fails", m._replace(flight=None, requests=in_order(again)))


def _checking(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    begun = m._replace(requests=in_order([*m.requests, Request(v.answered)]))
    yield Step("a request starts in {p}" + ", after the answer" * v.answered, begun)
    for request in dict.fromkeys(m.requests):
        rest = without(m.requests, request)
        yield Step("a request in {p} ends unaccepted", m._replace(requests=rest))
        if request.stage == HOLDING:
            yield from _checked(c, v, m._replace(requests=rest), request.late, request.as_of)
            again = m._replace(requests=in_order([*rest, Request(request.late)]))
            yield Step("a request in {p} asks again", again)
        elif request.stage == BEGUN:
            if m.entry is not None:
                yield from _checked(c, v, m._replace(requests=rest), request.late, m.entry)
            waiting = in_order([*rest, Request(request.late, WAITING)])
            yield from _reading(c, v, m._replace(requests=waiting))


def _reading(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    if m.flight is not None:
        yield Step("a request in {p} joins the flight under way", m)
        return
    until_revoked = (*v.log, True).index(True)
    if until_revoked == len(v.log):
        text = f'a request in {{p}} asks the store: "active", as_of = {len(v.log)}'
        yield Step(text, m._replace(flight=len(v.log)))
    for as_of in range(until_revoked + 1) if c.shared_cache else ():
        text = f'a request in {{p}} asks L2, restored to "active", as_of = {as_of}'
        yield Step(text, m._replace(flight=as_of))


def _checked(c: Configuration, v: View, m: Member, late: bool, as_of: int) -> Iterator[Step]:
    """A check: one step, one clock reading, one rule for values of any source."""
    if (m.lease or not c.rules.needs_lease) and (as_of >= m.bar or not c.rules.checks_as_of):
        broken = "G3 is broken: accepted later than commit + X" if v.overdue else ""
        broken = "G2 is broken: accepted, though it started after the answer" if late else broken
        lease = f"lease until @{m.lease:+}" if m.lease else "no lease"
        text = f"{{p}} accepts a request: as_of = {as_of}, tombstone = {m.bar}, {lease}"
        yield Step(text, m, broken)


def _waited_for(c: Configuration, v: View, m: Member) -> Iterator[Step]:
    """A DELETE looks again; what is settled once stays settled."""
    for i in m.awaited:
        name, number = f"DELETE {i + 1}", v.numbers[i]
        settled = m._replace(awaited=without(m.awaited, i))
        if i in m.silent:
            settled = settled._replace(silent=without(m.silent, i))
        if not c.rules.polls:
            yield Step(f"the notice of {name} to {{p}} is lost", settled)
            yield Step(f"{{p}} receives the notice of {name}", settled._replace(entry=None))
        elif m.row is None:
            yield Step(f"{name} looks again: no row of {{p}}", settled)
        elif m.row >= number:
            yield Step(f"{name} looks again: {{p}} acknowledged {m.row}", settled)


def in_order(values: Iterable[T]) -> tuple[T, ...]:
    """Equal sets of polls or requests become equal tuples."""
    return tuple(sorted(values))


def without(values: tuple[T, ...], one: T) -> tuple[T, ...]:
    """The values with one of the equal ones left out."""
    at = values.index(one)
    return values[:at] + values[at + 1 :]

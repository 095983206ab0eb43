"""The lease protocol, the side of a DELETE and of the clock, and what each process feels of them.

Pure functions of frozen values, under the same law as `protocol`: a step may be taken or not.
"""

from collections.abc import Iterator

from protocol import in_order
from states import (
    ANSWERED,
    ASKED,
    COMMITTED,
    COUNTING,
    IDLE,
    LATE,
    LOOKED,
    REMOVED,
    STARTED,
    WATCHING,
    Configuration,
    Effect,
    Member,
    Poll,
    Revoke,
    World,
    WorldStep,
)

NONE = Effect("none")


def world_steps(c: Configuration, world: World) -> Iterator[WorldStep]:
    """Every step that a DELETE or the clock may take next."""
    yield _tick(c, world)
    for i, revoke in enumerate(world.revokes):
        if revoke.stage in (IDLE, STARTED):
            yield from _beginning(c, world, i)
        else:
            yield from _waiting(c, world, i, revoke)


def _beginning(c: Configuration, world: World, i: int) -> Iterator[WorldStep]:
    name = f"DELETE {i + 1}"
    if world.revokes[i].stage == IDLE and not c.rules.clock_read_after_commit:
        yield _with_revoke(world, i, Revoke(STARTED), f"{name} reads its clock: @+0")
        return
    yield _commit(c, world, i, name)
    if c.revokes[i] == "w" and True in world.log:
        yield _repeated(c, world, i, name)


def _waiting(c: Configuration, world: World, i: int, revoke: Revoke) -> Iterator[WorldStep]:
    name, number, late = f"DELETE {i + 1}", revoke.number, revoke.age == c.lease
    if not c.rules.delete_waits:
        if revoke.stage == COMMITTED:
            yield _answered(c, world, i, f"{name} is answered at @+0", NONE)
    elif revoke.stage == COMMITTED:
        yield _with_revoke(world, i, Revoke(COUNTING, number), f"{name} reads its clock: @+0")
    elif revoke.stage == COUNTING:
        after = Revoke(LOOKED, number)
        if not c.rules.look_clocked_after:
            after = Revoke(WATCHING, number, revoke.age)
        text = f"{name} looks at the members: who lags, how many grants"
        text += "" if c.rules.removal_waits else "; removes who lags"
        effect = Effect("look", i, number)
        if not c.rules.polls:
            text, effect = f"{name} publishes its notice", Effect("ring", i)
        yield _with_revoke(world, i, after, text, effect)
        if late:
            text = f"{name} could never look, and is answered at @+0, X after its clock reading"
            yield _answered(c, world, i, text, NONE)
    elif revoke.stage == LOOKED:
        yield _with_revoke(world, i, Revoke(WATCHING, number), f"{name} reads its clock: @+0")
    elif revoke.stage == WATCHING and late:
        text = f"{name}, X after its clock reading, removes who lags"
        minds = c.rules.removal_minds_grants
        text += " and was granted nothing since" if minds else ", whatever it was granted"
        yield _with_revoke(world, i, Revoke(REMOVED), text, Effect("remove", i, number))
        text = f"{name}, X after its clock reading, does not learn of its removal and"
        answer = _answered(c, world, i, f"{text} is answered at @+0", Effect("leave", i))
        yield _with_revoke(answer.world, i, Revoke(LATE, number), answer.text, answer.effect)
    elif revoke.stage == LATE:
        text = f"the removal by {name} is carried out late"
        yield _with_revoke(world, i, Revoke(ANSWERED), text, Effect("remove", i, number))
    if revoke.stage in (LOOKED, WATCHING, REMOVED):
        yield _answered(c, world, i, f"{name} is answered at @+0", Effect("answer", i))


def _answered(c: Configuration, world: World, i: int, text: str, effect: Effect) -> WorldStep:
    after = world._replace(answered=world.answered or c.revokes[i] == "w")
    return _with_revoke(after, i, Revoke(ANSWERED), text, effect)


def _repeated(c: Configuration, world: World, i: int, name: str) -> WorldStep:
    """The key is revoked already, perhaps by a DELETE that never got to its answer."""
    if not c.rules.repeats_wait:
        text = f"{name} finds the key revoked, does not wait and is answered at @+0"
        return _answered(c, world, i, text, NONE)
    number = len(world.log)
    text = f"{name} finds the key revoked and will wait for seq = {number}"
    return _with_revoke(world, i, Revoke(COMMITTED, number), text)


def _commit(c: Configuration, world: World, i: int, name: str) -> WorldStep:
    watched = c.revokes[i] == "w"
    since = 0 if watched and world.since_commit is None else world.since_commit
    after = world._replace(log=(*world.log, watched), since_commit=since)
    before = world.revokes[i]
    revoke = Revoke(COMMITTED if before.stage == IDLE else COUNTING, len(after.log), before.age)
    text = f"{name} commits at @+0: seq = {revoke.number}, revokes "
    return _with_revoke(after, i, revoke, text + ("the key" if watched else "another key"))


def _with_revoke(
    world: World, i: int, revoke: Revoke, text: str, effect: Effect = NONE
) -> WorldStep:
    revokes = (*world.revokes[:i], revoke, *world.revokes[i + 1 :])
    return WorldStep(text, world._replace(revokes=revokes), effect)


def _tick(c: Configuration, world: World) -> WorldStep:
    since = None if world.since_commit is None else min(world.since_commit + 1, c.lease + 1)
    revokes = tuple(
        r._replace(age=min(r.age + 1, c.lease)) if r.stage in (STARTED, COUNTING, WATCHING) else r
        for r in world.revokes
    )
    later = world._replace(since_commit=since, revokes=revokes)
    return WorldStep("the clock ticks", later, Effect("tick"))


def apply_effect(c: Configuration, effect: Effect, m: Member) -> Member | None:
    """The process after a step of the world; None where it stands in the way of that step."""
    i = effect.revoke
    match effect.kind:
        case "tick":
            polls = in_order(_aged(c, poll) for poll in m.polls)
            return m._replace(polls=polls, lease=max(m.lease - 1, 0))
        case "ring":
            return m._replace(awaited=in_order([*m.awaited, i]))
        case "look" if m.row is not None and m.row < effect.number:
            if not c.rules.removal_waits:
                return m._replace(row=None, silent=())
            silent = in_order([*m.silent, i])
            return m._replace(awaited=in_order([*m.awaited, i]), silent=silent)
        case "answer":
            return None if i in m.awaited else _without_delete(m, i)
        case "leave":
            return _without_delete(m, i)._replace(silent=m.silent)
        case "remove":
            if i in m.silent and m.row is not None and m.row < effect.number:
                m = m._replace(row=None, silent=())
            return _without_delete(m, i)
    return m


def _without_delete(m: Member, i: int) -> Member:
    """That DELETE has no eye on the process any more."""
    awaited = tuple(r for r in m.awaited if r != i)
    return m._replace(awaited=awaited, silent=tuple(r for r in m.silent if r != i))


def _aged(c: Configuration, poll: Poll) -> Poll:
    ages = c.rules.lease_from_request or poll.seq == ASKED
    return poll._replace(age=min(poll.age + 1, c.lease)) if ages else poll

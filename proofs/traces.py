"""The shortest run that breaks a promise, printed step by step with the readings of one clock."""

import re
from collections.abc import Iterator

from explorer import Explorer, Named
from models import AnyConfiguration, model_of


def trace(c: AnyConfiguration) -> list[str]:
    """One line per step, the last one says which promise is broken; empty if none ever is."""
    explorer = Explorer(c)
    parents = {explorer.first: -1}
    frontier = [explorer.first]
    while frontier:
        upcoming: list[int] = []
        for state in frontier:
            following, broken = explorer.after(state)
            if broken:
                return _describe(c, explorer, _path(parents, state))
            for next_state in following:
                if next_state not in parents:
                    parents[next_state] = state
                    upcoming.append(next_state)
        frontier = upcoming
    return []


def _path(parents: dict[int, int], state: int) -> list[int]:
    path = []
    while parents[state] >= 0:
        path.append(state)
        state = parents[state]
    return path[::-1]


def _describe(c: AnyConfiguration, explorer: Explorer, path: list[int]) -> list[str]:
    """The path again with names: an int does not keep which process is which."""
    now = 0
    model = model_of(c)
    named = (model.first_world(c), model.first_members(c))
    lines = []
    if c.warm:
        lines.append(
            _line(now, 'every process is a member, has no lease yet, L1: "active", as_of = 0')
        )
    for state in path:
        steps = ((text, after) for text, after, _ in _steps(c, named))
        text, named = next(step for step in steps if explorer.encode(step[1]) == state)
        now += text.startswith("the clock ticks")
        lines.append(_line(now, text))
    text, broken = next((text, broken) for text, _, broken in _steps(c, named) if broken)
    return [*lines, _line(now, text), broken]


def _steps(c: AnyConfiguration, named: Named) -> Iterator[tuple[str, Named, str]]:
    world, members = named
    model = model_of(c)
    seen = model.view(c, world)
    for i, member in enumerate(members):
        for step in model.member_steps(c, seen, member):
            text = step.text.replace("{p}", f"process {i + 1}")
            yield text, (world, (*members[:i], step.member, *members[i + 1 :])), step.broken
    for move in model.world_steps(c, world):
        feeling = [model.apply_effect(c, move.effect, member) for member in members]
        after = tuple(member for member in feeling if member is not None)
        if len(after) == len(members):
            yield move.text, (move.world, after), ""


def _line(now: int, text: str) -> str:
    """A step whose ages and remaining times became readings of the clock."""
    return f"t = {now}  " + re.sub(r"@([+-]\d+)", lambda at: str(now + int(at[1])), text)

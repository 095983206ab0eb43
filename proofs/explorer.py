"""Breadth-first exploration of every reachable state, each visited once.

Worlds and processes are numbered as they are met; a state is one int: the world's number, then
the numbers of its processes in ascending order, so that states which differ only in who is called
process 1 are one state. What a process can do depends on itself and on little else: it is worked
out once per process state and remembered, and the exploration only puts numbers together.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from models import AnyConfiguration, model_of
from states import Effect

# A number of a process; a world's number stands above the processes and may be any.
BITS = 21
MASK = (1 << BITS) - 1
BATCH = 10_000


class Outcome(NamedTuple):
    """What an exploration found; `complete` if no reachable state was left out."""

    states: int
    transitions: int
    violations: int
    complete: bool
    seconds: float


class _Moves(NamedTuple):
    """A process's next states, those with one more request, and how many steps broke a promise."""

    moves: tuple[int, ...]
    starts: tuple[int, ...]
    broken: int


World: TypeAlias = Any
Member: TypeAlias = Any
View: TypeAlias = Any
Named: TypeAlias = tuple[World, tuple[Member, ...]]


class Explorer:
    """The states of one configuration, numbered, and what follows each of them."""

    def __init__(self, c: AnyConfiguration) -> None:
        self._c = c
        self._model = model = model_of(c)
        self._shift = BITS * c.processes
        self._shifts = [BITS * i for i in reversed(range(c.processes))]
        self._worlds: list[World] = []
        self._world_numbers: dict[World, int] = {}
        self._members: list[Member] = []
        self._member_numbers: dict[Member, int] = {}
        self._requests: list[int] = []
        self._effects: list[Effect] = []
        self._views: list[View] = []
        self._view_of_world: list[int] = []
        self._world_moves: list[tuple[tuple[int, int], ...] | None] = []
        self._moves: dict[int, _Moves] = {}
        self._felt: dict[int, int] = {}
        self.first = self.encode((model.first_world(c), model.first_members(c)))

    def explore(self, most: int, report: Callable[[int], None] = lambda _: None) -> Outcome:
        """Visit every state, or about the first `most`; report how many there are now and then."""
        began = time.perf_counter()
        visited = {self.first}
        frontier = [self.first]
        transitions = violations = 0
        while frontier and len(visited) < most:
            upcoming: list[int] = []
            for at, state in enumerate(frontier):
                following, broken = self.after(state)
                transitions += len(following)
                violations += broken
                fresh = set(following) - visited
                visited |= fresh
                upcoming += fresh
                if at % BATCH == 0:
                    report(len(visited))
                    if len(visited) >= most:
                        break
            frontier = upcoming
        report(len(visited))
        seconds = time.perf_counter() - began
        return Outcome(len(visited), transitions, violations, not frontier, seconds)

    def after(self, state: int) -> tuple[list[int], int]:
        """The states one step away, and how many of those steps break a promise."""
        world = state >> self._shift
        members = [state >> shift & MASK for shift in self._shifts]
        following: list[int] = []
        broken = 0
        full = sum([self._requests[m] for m in members]) >= self._c.requests
        base = world << self._shift
        above = self._view_of_world[world] << BITS
        previous = -1
        for i, member in enumerate(members):
            if member == previous:
                continue
            previous = member
            found = self._moves.get(above | member) or self._expand_member(above, member)
            broken += found.broken
            moves = found.moves if full else found.moves + found.starts
            rest = members[:i] + members[i + 1 :]
            if not rest:
                following += [base | m for m in moves]
            elif len(rest) == 1:
                other = rest[0]
                high = base | other << BITS
                low = base | other
                following += [high | m if other < m else low | m << BITS for m in moves]
            else:
                following += [base | self._pack([*rest, m]) for m in moves]
        for next_world, effect in self._world_moves[world] or self._expand_world(world):
            feeling = [self._effect_on(effect, m) for m in members]
            if -1 not in feeling:
                following.append(next_world << self._shift | self._pack(feeling))
        return following, broken

    def texts(self) -> set[str]:
        """The texts of all steps met so far, to see what an exploration has covered."""
        texts = {
            step.text for world in self._worlds for step in self._model.world_steps(self._c, world)
        }
        for known in self._moves:
            seen, member = self._views[known >> BITS], self._members[known & MASK]
            texts |= {step.text for step in self._model.member_steps(self._c, seen, member)}
        return texts

    def encode(self, named: Named) -> int:
        """The state's int, whatever its processes are called."""
        world, members = named
        numbers = [self._number(m) for m in members]
        return self._world_number(world) << self._shift | self._pack(numbers)

    @staticmethod
    def _pack(numbers: list[int]) -> int:
        packed = 0
        for number in sorted(numbers):
            packed = packed << BITS | number
        return packed

    def _number(self, m: Member) -> int:
        number = self._member_numbers.setdefault(m, len(self._members))
        if number == len(self._members):
            if number > MASK:
                raise OverflowError("more process states than a state has room for")
            self._members.append(m)
            self._requests.append(len(m.requests))
        return number

    def _world_number(self, world: World) -> int:
        number = self._world_numbers.setdefault(world, len(self._worlds))
        if number == len(self._worlds):
            seen = self._model.view(self._c, world)
            if seen not in self._views:
                self._views.append(seen)
            self._worlds.append(world)
            self._view_of_world.append(self._views.index(seen))
            self._world_moves.append(None)
        return number

    def _expand_member(self, above: int, member: int) -> _Moves:
        before = self._members[member]
        moves: dict[int, None] = {}
        starts: dict[int, None] = {}
        broken = 0
        for step in self._model.member_steps(self._c, self._views[above >> BITS], before):
            more = len(step.member.requests) > len(before.requests)
            (starts if more else moves)[self._number(step.member)] = None
            broken += bool(step.broken)
        found = self._moves[above | member] = _Moves(tuple(moves), tuple(starts), broken)
        return found

    def _expand_world(self, world: int) -> tuple[tuple[int, int], ...]:
        moves: list[tuple[int, int]] = []
        for step in self._model.world_steps(self._c, self._worlds[world]):
            if step.effect not in self._effects:
                self._effects.append(step.effect)
            effect = self._effects.index(step.effect)
            moves.append((self._world_number(step.world), effect << BITS))
        self._world_moves[world] = tuple(moves)
        return tuple(moves)

    def _effect_on(self, effect: int, member: int) -> int:
        number = self._felt.get(effect | member)
        if number is None:
            after = self._model.apply_effect(
                self._c, self._effects[effect >> BITS], self._members[member]
            )
            number = self._felt[effect | member] = -1 if after is None else self._number(after)
        return number

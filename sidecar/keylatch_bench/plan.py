"""What a run will do at most, decided before it does anything. No I/O, no clock.

Tiers whose checks must be the first sight of a key (L2, store, cold) spend a new key on each, so
their rate follows from how many keys may be made; the others run at the rate that was asked for.
"""

from dataclasses import dataclass
from typing import Final

L1, L2, STORE, COLD, REFUSED, FLOOD = "L1", "L2", "store", "cold", "refused", "flood"
TIERS: Final = (L1, L2, STORE, COLD, REFUSED, FLOOD)
DESCRIPTIONS: Final = {
    L1: "a key that this process knows",
    L2: "first sight of a key that Redis knows",
    STORE: "first sight of a key: the store is asked, SHA-256",
    COLD: "first sight of a key: the store is asked, argon2",
    REFUSED: "made up, wrong secret, revoked, no credential",
    FLOOD: "L1 while made-up tokens pour in",
}
UNCACHED: Final = (L2, STORE, COLD)

ROUNDS: Final = 5
WARM_KEYS: Final = 8
REDIS_TRIES: Final = 3
GRACE_SECONDS: Final = 10.0
"""How long the last answers of a round are waited for."""
KEYS_LIVE_BEYOND_SECONDS: Final = 900.0
"""Keys expire by themselves so long after the run should have ended, whatever happens to it."""

_COLD_PER_SECOND: Final = 10  # a quarter of a processor's argon2, so that nobody queues for it
_UNCACHED_PER_SECOND: Final = 200
_PROBES_PER_LINE: Final = 200
_PROBES_PER_SECOND: Final = 2_000
_SATURATED_PER_SECOND: Final = 100_000
_PREPARATION_SECONDS: Final = 120.0
_PROBE_SECONDS: Final = 10.0
_SHARES: Final = {COLD: 1, L2: 1.5, STORE: 1.5}

BOUNDS: Final = {
    "seconds": (0.2, 600.0),
    "rate": (1, 20_000),
    "flood_rate": (1, 50_000),
    "connections": (1, 128),
    "keys": (40, 5_000),
    "revocations": (0, 100),
}


class OutOfBounds(ValueError):
    """A run that would be longer or harder than this tool allows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run.

    Args:
        seconds: of load for each tier, over all rounds.
        rate: checks a second, open loop.
        flood_rate: made-up tokens a second, beside the checks of the flood tier.
        connections: to the sidecar, or checks at a time in process.
        keys: to make at most.
        revocations: how often the probe revokes a key.
        rounds: every tier takes a turn in each.
    """

    seconds: float = 10.0
    rate: int = 500
    flood_rate: int = 2_000
    connections: int = 8
    keys: int = 500
    revocations: int = 10
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                option = name.replace("_", "-")
                raise OutOfBounds(f"--{option} is {least:g} to {most:g}")
        if self._spare_keys < len(UNCACHED) * self.rounds:
            raise OutOfBounds(f"--keys {self.keys} is too few for --revocations {self.revocations}")

    @property
    def round_seconds(self) -> float:
        """How long a tier's turn is."""
        return self.seconds / self.rounds

    @property
    def _spare_keys(self) -> int:
        # One to manage with, those that are warm, one to revoke in each round and in each probe,
        # some that tell whether the sidecar uses the Redis that was given.
        return self.keys - 1 - REDIS_TRIES - WARM_KEYS - self.rounds - self.revocations

    def checks(self, tier: str) -> int:
        """How many a tier makes in each round."""
        wanted = round(self.rate * self.round_seconds)
        if tier in UNCACHED:
            fastest = _COLD_PER_SECOND if tier == COLD else _UNCACHED_PER_SECOND
            share = self._spare_keys * _SHARES[tier] / sum(_SHARES.values()) / self.rounds
            wanted = min(wanted, int(share), round(fastest * self.round_seconds))
        return max(1, wanted)

    def rate_of(self, tier: str) -> float:
        """Checks a second in a tier."""
        return self.checks(tier) / self.round_seconds

    @property
    def made_up(self) -> int:
        """How many made-up tokens a flood sends in each round."""
        return max(1, round(self.flood_rate * self.round_seconds))

    @property
    def most_saturated(self) -> int:
        """No more checks than this go out in a round's turn without a rate."""
        return round(_SATURATED_PER_SECOND * self.round_seconds)

    @property
    def probe_rate(self) -> int:
        """Checks a second while a key is revoked: each line looks often, to see when it is so."""
        return min(_PROBES_PER_SECOND, _PROBES_PER_LINE * self.connections)

    @property
    def most_requests(self) -> int:
        """No more checks than this are sent, warming up and probing included."""
        checks = sum(self.checks(tier) for tier in TIERS)
        load = self.rounds * (checks + self.made_up + self.most_saturated)
        warming = self.rounds * self.connections * 2 * (WARM_KEYS + 3)
        return load + warming + round(self.revocations * _PROBE_SECONDS) * self.probe_rate

    @property
    def expected_seconds(self) -> float:
        """About how long it takes."""
        return self.seconds * (len(TIERS) + 1) + self.revocations * 1.0 + self.keys * 0.03 + 5

    @property
    def most_seconds(self) -> float:
        """After this long, measuring stops and what was made is taken back."""
        rounds = self.rounds * (len(TIERS) + 1) * (self.round_seconds + GRACE_SECONDS / 4)
        return rounds + self.revocations * _PROBE_SECONDS + _PREPARATION_SECONDS

    @property
    def key_seconds(self) -> float:
        """How long the keys of a run live if nobody takes them back."""
        return self.most_seconds + KEYS_LIVE_BEYOND_SECONDS

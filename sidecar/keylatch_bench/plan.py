"""The bounds of a run, computed before it starts. No I/O, no clock.

Scenarios that measure the first check of a key (L2, store, cold) use a new key for every check, so
the number of keys limits their rate; the others run at the rate that the operator gave.
"""

from dataclasses import dataclass
from typing import Final

L1, L2, STORE, COLD, REFUSED, FLOOD = "L1", "L2", "store", "cold", "refused", "flood"
SCENARIOS: Final = (L1, L2, STORE, COLD, REFUSED, FLOOD)
DESCRIPTIONS: Final = {
    L1: "a key in the local cache",
    L2: "first check of a key that is in Redis",
    STORE: "first check of a key: store and SHA-256",
    COLD: "first check of a key: store and argon2",
    REFUSED: "forged, wrong secret, revoked, no credential",
    FLOOD: "L1 while forged tokens are sent",
}
UNCACHED: Final = (L2, STORE, COLD)

ROUNDS: Final = 5
WARM_KEYS: Final = 8
REDIS_TRIES: Final = 3
GRACE_SECONDS: Final = 10.0
"""How long to wait for the last responses of a round."""
KEYS_LIVE_BEYOND_SECONDS: Final = 900.0
"""Keys expire this long after the time limit of the run."""

_COLD_PER_SECOND: Final = 10  # a quarter of one processor's argon2 hashes, so that none is queued
_UNCACHED_PER_SECOND: Final = 200
_PROBES_PER_CLIENT: Final = 200
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
    """A run that exceeds the bounds of this tool."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run.

    Args:
        seconds: duration of each scenario, over all rounds.
        rate: checks per second, open loop.
        flood_rate: forged tokens per second during the flood scenario.
        connections: to the sidecar, or concurrent checks in process.
        keys: maximum number of keys to create.
        revocations: number of keys that the probe revokes.
        rounds: in each, every scenario is measured once.
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
        """Duration of a scenario in each round."""
        return self.seconds / self.rounds

    @property
    def _spare_keys(self) -> int:
        # The others: an admin key, the warm keys, one to revoke in each round and in each probe,
        # and those that show whether the sidecar uses the given Redis.
        return self.keys - 1 - REDIS_TRIES - WARM_KEYS - self.rounds - self.revocations

    def checks(self, scenario: str) -> int:
        """Checks of a scenario in each round."""
        checks = round(self.rate * self.round_seconds)
        if scenario in UNCACHED:
            fastest = _COLD_PER_SECOND if scenario == COLD else _UNCACHED_PER_SECOND
            share = self._spare_keys * _SHARES[scenario] / sum(_SHARES.values()) / self.rounds
            checks = min(checks, int(share), round(fastest * self.round_seconds))
        return max(1, checks)

    def rate_of(self, scenario: str) -> float:
        """Checks per second of a scenario."""
        return self.checks(scenario) / self.round_seconds

    @property
    def forged(self) -> int:
        """Forged tokens that the flood sends in each round."""
        return max(1, round(self.flood_rate * self.round_seconds))

    @property
    def max_saturated(self) -> int:
        """Maximum number of checks at unlimited rate in each round."""
        return round(_SATURATED_PER_SECOND * self.round_seconds)

    @property
    def probe_rate(self) -> int:
        """Checks per second while a key is revoked; more give a finer resolution in time."""
        return min(_PROBES_PER_SECOND, _PROBES_PER_CLIENT * self.connections)

    @property
    def max_requests(self) -> int:
        """Maximum number of checks, including warm-up and probes."""
        checks = sum(self.checks(scenario) for scenario in SCENARIOS)
        load = self.rounds * (checks + self.forged + self.max_saturated)
        warming = self.rounds * self.connections * 2 * (WARM_KEYS + 3)
        return load + warming + round(self.revocations * _PROBE_SECONDS) * self.probe_rate

    @property
    def expected_seconds(self) -> float:
        """Expected duration of the run."""
        return self.seconds * (len(SCENARIOS) + 1) + self.revocations * 1.0 + self.keys * 0.03 + 5

    @property
    def max_seconds(self) -> float:
        """Time limit, after which measuring stops and the keys are revoked."""
        rounds = self.rounds * (len(SCENARIOS) + 1) * (self.round_seconds + GRACE_SECONDS / 4)
        return rounds + self.revocations * _PROBE_SECONDS + _PREPARATION_SECONDS

    @property
    def key_seconds(self) -> float:
        """Time to live of the keys if they are not revoked."""
        return self.max_seconds + KEYS_LIVE_BEYOND_SECONDS

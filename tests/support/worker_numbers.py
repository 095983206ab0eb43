"""A broken twin of `keylatch`: it compares sequence numbers, and not the rows of the log.

    python worker_numbers.py serve …

It finds out that a store lost changes only if the store's number is smaller than the last one that
it knows, and believes each answer that has no smaller number.
"""

from keylatch import engine
from keylatch.revocation.invalidations import Invalidations
from keylatch.storage.invalidation_log import LogState, Position
from keylatch.storage.store import InvalidationBatch
from keylatch_sidecar.__main__ import main


class TrustsNumbers(Invalidations):
    """Invalidations that take a store with another history for the one that they know."""

    def _is_broken(self, batch: InvalidationBatch, min_seq: int) -> bool:
        return batch.epoch != self.epoch or batch.seq < max(self.seq, min_seq)

    def as_of(self, log: LogState) -> int | None:
        return min(log.anchor.seq, log.position.seq)

    def is_known(self, position: Position) -> bool:
        return position.seq <= self.seq


if __name__ == "__main__":
    vars(engine)["Invalidations"] = TrustsNumbers
    main()

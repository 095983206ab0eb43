"""A clock that tests move."""


class Clock:
    """Wall clock and monotonic timer in one, moved by hand. Seconds."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        self.seconds += seconds

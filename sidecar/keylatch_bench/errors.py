"""What stops a benchmark, for the operator."""


class BenchError(Exception):
    """The target cannot be measured.

    Args:
        message: what is wrong, in one line, without secrets.
        hint: what to do about it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

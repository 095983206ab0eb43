"""The command `keylatch`, also as `python -m keylatch_sidecar`."""

import sys
from typing import Final

_PACKAGES: Final = {"httptools", "prometheus_client", "rich", "typer", "uvicorn", "uvloop"}
"""The packages of the extra `sidecar`: an app that only has the middleware does without them."""


def main() -> None:
    try:
        from keylatch_sidecar.cli import program
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        message = f"error: the command needs the package {error.name}"
        sys.exit(f"{message}\nhint: pip install 'keylatch[sidecar]'")
    program.main()


if __name__ == "__main__":
    main()

"""A virtual environment for each peer, in a folder that git ignores; its list changed: a new one.

What this environment has as well is installed in the same version. Into this one nothing is.
"""

import hashlib
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

from catalogue import NotMeasured, Peer

CACHE = Path(__file__).parent / ".venvs"


def python_for(peer: Peer, cache: Path) -> Path:
    """The Python that runs the peer; its packages are installed if they are not there yet.

    Raises:
        NotMeasured: pip cannot install them.
    """
    if peer.is_keylatch:
        return Path(sys.executable)
    folder = cache / peer.name
    bounds = "".join(f"{name}=={version}\n" for name, version in sorted(installed().items()))
    expected = hashlib.sha256(f"{peer.packages} {sys.version} {bounds}".encode()).hexdigest()
    stamp, python = folder / "installed", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == expected:
        return python
    venv.create(folder, clear=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(bounds)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "-c", str(constraints)]
    done = subprocess.run([*command, *peer.packages], capture_output=True, text=True)
    if done.returncode:
        raise NotMeasured(f"pip: {last_line(done.stderr)}")
    stamp.write_text(expected)
    return python


def installed(folder: Path | None = None) -> dict[str, str]:
    """Packages and their versions, of this environment or another, without keylatch itself.

    Args:
        folder: where the other environment is.
    """
    places = [str(place) for place in folder.glob("lib/*/site-packages")] if folder else sys.path
    found = {each.name: each.version for each in distributions(path=places)}
    return {name: version for name, version in found.items() if name != "keylatch"}


def last_line(text: str) -> str:
    """Where programs say what was the matter."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"

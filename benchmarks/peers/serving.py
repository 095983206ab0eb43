"""A peer's server: one worker, on a free port, in a folder of its own, stopped by its pid.

uvicorn runs with uvloop and httptools, gunicorn with four threads; both write no access log. Each
server is in a session of its own: Ctrl-C reaches only the script, which stops them in order.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from catalogue import NotMeasured, Peer
from environments import last_line

APPS = Path(__file__).parent / "apps"
UVICORN = ["--loop", "uvloop", "--http", "httptools", "--workers", "1", "--lifespan", "on"]
UVICORN += ["--no-access-log", "--log-level", "error", "--timeout-graceful-shutdown", "2"]
GUNICORN = ["--worker-class", "gthread", "--workers", "1", "--threads", "4", "--keep-alive", "75"]
GUNICORN += ["--graceful-timeout", "2", "--log-level", "error", "--no-control-socket"]
START_SECONDS = 30.0
QUIET_SECONDS = 0.1
SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Server:
    """A peer that is being served."""

    url: str
    header: str
    pid: int

    def wait_until_idle(self) -> None:
        """Return once the server is idle, so that wrk's last requests do not slow the next peer."""
        deadline = time.monotonic() + SETTLE_SECONDS
        spent = ticks(self.pid)
        while time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            before, spent = spent, ticks(self.pid)
            if spent - before <= 1:
                return


def ticks(pid: int) -> int:
    """Processor time that a process and its children took so far; 0 where there is no /proc."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(fields[11]) + int(fields[12]) + sum(ticks(int(child)) for child in children)
    return 0


@contextlib.contextmanager
def serving(peer: Peer, python: Path, folder: Path, store: str) -> Iterator[Server]:
    """Make a key, start the server, see that it refuses and allows; stop it at the end.

    Args:
        peer: what to serve.
        python: of its environment.
        folder: an empty one, for its database and its log.
        store: the URL of keylatch's store.

    Raises:
        NotMeasured: it does not start, or does not check keys.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KEYLATCH_")}
    environment |= {"PEER_FOLDER": str(folder), "KEYLATCH_STORE": store}
    header = f"{peer.scheme} {token_of(peer, python, environment)}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(python), "-m", peer.server, f"{peer.file}:app"]
    if peer.server == "uvicorn":
        command += ["--app-dir", str(APPS), "--host", "127.0.0.1", "--port", port, *UVICORN]
    else:
        command += ["--chdir", str(APPS), "--bind", f"127.0.0.1:{port}", *GUNICORN]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", header, process.pid)
        wait_until_up(server, process, log)
        check(server)
        yield server
    finally:
        stop(process)


def token_of(peer: Peer, python: Path, environment: dict[str, str]) -> str:
    """A new key's token, made as the peer's documentation says: by its file, or keylatch's CLI."""
    command = [str(python), str(APPS / f"{peer.file}.py")]
    if peer.is_keylatch:
        program = Path(sys.executable).with_name("keylatch")
        command = [str(program), "keys", "create", "--name", "me"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise NotMeasured(f"it makes no key: {last_line(done.stderr)}")
    return done.stdout.strip()


def wait_until_up(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the open route answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch(server, "/open")
            return
        except OSError:
            time.sleep(0.05)
    raise NotMeasured(f"its server does not start: {last_line(log.read_text())}")


def check(server: Server) -> None:
    """Both routes do the same, and one of them only for the key."""
    expected = {
        ("/open", None): "200 hello",
        ("/open", server.header): "200 hello",
        ("/protected", server.header): "200 hello",
    }
    for (path, header), answer in expected.items():
        if (found := fetch(server, path, header)) != answer:
            raise NotMeasured(f"{path} {'with' if header else 'without'} the key says {found}")
    for header in (None, server.header[:-4] + "0000"):
        if (found := fetch(server, "/protected", header))[:3] not in ("401", "403"):
            raise NotMeasured(f"/protected {'with a wrong' if header else 'without'} key: {found}")


def fetch(server: Server, path: str, header: str | None = None) -> str:
    """The status and the text, without the quotes of JSON."""
    headers = {"Authorization": header} if header else {}
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
            text = answer.read().decode().strip('"')
            return f"{answer.status} {text}"
    except urllib.error.HTTPError as refused:
        with refused:
            return str(refused.status)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stops the server and its worker, by SIGKILL after a timeout; no other process."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

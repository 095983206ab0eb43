"""`make demo`: a sidecar and a protected app on one SQLite file, two keys, and requests to try.

All files are in a temporary folder, which Ctrl-C removes.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
KEYLATCH = str(Path(sys.executable).with_name("keylatch"))


def free_port(preferred: int) -> int:
    """The preferred port if it is free, else another one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise SystemExit("error: no free port on 127.0.0.1")


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers; exit with its log if it does not."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"error: {url} does not answer\n{log.read_text()}")


def create_key(environment: dict[str, str], name: str, permission: str) -> str:
    """Create a key; return its token."""
    command = [KEYLATCH, "keys", "create", "--name", name, "--permission", permission]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return done.stdout.decode().strip()


def main() -> None:
    """Start both servers, print the requests to try, and wait for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="keylatch-demo-") as name:
        folder = Path(name)
        environment = {**os.environ, "KEYLATCH_STORE": f"sqlite:///{folder}/keys.db"}
        environment.pop("KEYLATCH_REDIS", None)
        sidecar_port, app_port = free_port(8700), free_port(8000)
        sidecar, app = f"http://127.0.0.1:{sidecar_port}", f"http://127.0.0.1:{app_port}"
        serve = [KEYLATCH, "serve", "--port", str(sidecar_port)]
        protected = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(HERE)]
        protected += ["--port", str(app_port)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, url in ((serve, f"{sidecar}/readyz"), (protected, f"{app}/healthz")):
                log = folder / f"{len(processes)}.log"
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        command,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C reaches only this script
                    )
                processes.append(process)
                wait_until_up(url, process, log)
            full = create_key(environment, "demo", "FULL")
            sending = create_key(environment, "newsletter", "SENDING")
            print(story(sidecar, app, full, sending), flush=True)
            while all(process.poll() is None for process in processes):
                time.sleep(0.2)
            raise SystemExit("error: a server has exited")
        except KeyboardInterrupt:
            print("\nStopped.")
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=10)


def story(sidecar: str, app: str, full: str, sending: str) -> str:
    """Requests to paste into a shell, one after the other."""
    return f"""
Two keys:

  KEY={full}
  SENDING={sending}

Paste the two lines above into another terminal, then try:

# call the protected app
  curl -i {app}/v1/me -H "Authorization: Bearer $KEY"

# without a key it answers with 401
  curl -i {app}/v1/me

# list the keys: lastUsed is updated within seconds
  curl -s {sidecar}/v1/api-keys -H "Authorization: Bearer $KEY"

# a SENDING key may send and nothing else
  curl -i -X POST {app}/v1/emails -H "Authorization: Bearer $SENDING"
  curl -i {app}/v1/me -H "Authorization: Bearer $SENDING"

# revoke the key (the third part of the token is its id)
  ID=key_$(echo "$KEY" | cut -d_ -f3)
  curl -i -X DELETE {sidecar}/v1/api-keys/$ID -H "Authorization: Bearer $KEY"

# the next request is refused
  curl -i {app}/v1/me -H "Authorization: Bearer $KEY"

Ctrl-C stops both servers."""


if __name__ == "__main__":
    main()

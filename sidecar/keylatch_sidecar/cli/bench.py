"""`keylatch bench`: options and output of the load tool `keylatch_bench`.

Exit codes: 0 measured, 1 a check that began after the response to a DELETE was accepted, 2 wrong
usage, no target, or a key could not be revoked. A key is never an argument.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from keylatch._variables import variable_name
from keylatch.core import credentials
from keylatch.core.decisions import Reason
from keylatch.settings import Settings
from keylatch_bench.connection import Address
from keylatch_bench.errors import BenchError
from keylatch_bench.load_generator import Credential
from keylatch_bench.plan import OutOfBounds, Plan
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, JSONOption
from keylatch_sidecar.settings import BenchSettings

if TYPE_CHECKING:
    from keylatch_bench.benchmark import Target
    from keylatch_bench.comparison import Change
    from keylatch_bench.results import Results

KEY_VARIABLE: Final = variable_name("bench_key")
DEFAULTS: Final = Plan()


def bench(
    url: Annotated[
        str | None, typer.Argument(help="Sidecar, such as http://127.0.0.1:8700")
    ] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket of a sidecar.")] = None,
    # Not from the environment: requests go only to targets on the command line.
    store: Annotated[
        str | None,
        typer.Option(help="Store of the sidecar; without a sidecar, in process."),
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Redis of the sidecar.")] = None,
    store_file: Annotated[
        str | None, typer.Option(help="File with the URL of the store, which may have a password.")
    ] = None,
    redis_file: Annotated[str | None, typer.Option(help="File with the URL of Redis.")] = None,
    seconds: Annotated[float, typer.Option(help="Duration of each scenario.")] = DEFAULTS.seconds,
    rate: Annotated[int, typer.Option(help="Checks per second, open loop.")] = DEFAULTS.rate,
    flood_rate: Annotated[
        int, typer.Option(help="Forged tokens per second in the flood scenario.")
    ] = DEFAULTS.flood_rate,
    connections: Annotated[
        int, typer.Option(help="Number of connections for checks; the flood has as many others.")
    ] = DEFAULTS.connections,
    keys: Annotated[int, typer.Option(help="Maximum number of keys to create.")] = DEFAULTS.keys,
    revocations: Annotated[
        int, typer.Option(help="Number of revocations to measure.")
    ] = DEFAULTS.revocations,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("keylatch-bench"),
    compare: Annotated[
        Path | None, typer.Option(help="results.json of an earlier run to compare with.")
    ] = None,
    as_json: JSONOption = False,
) -> None:
    """Measure the cost of authentication, and how soon revocations take effect.

    Without --store, keys are created with a FULL key from KEYLATCH_BENCH_KEY or standard input.
    """
    _require_extra()
    from keylatch_bench import benchmark, comparison, report

    try:
        plan = Plan(seconds, rate, flood_rate, connections, keys, revocations)
        stores = {"store": store, "store_file": store_file}
        caches = {"redis": redis, "redis_file": redis_file}
        target = _target(url, uds, stores, caches)
        before = None if compare is None else comparison.read(compare)
        out.mkdir(parents=True, exist_ok=True)
    except OutOfBounds as error:
        output.fail(str(error), "keylatch bench --help", output.ERROR)
    except BenchError as error:
        output.fail(error.message, error.hint, output.ERROR)
    except OSError as error:
        message = f"cannot write to {out}: {error.strerror or error}"
        output.fail(message, "another --out", output.ERROR)
    output.stderr.print(report.bounds(target, plan))
    try:
        with _Bar(plan.expected_seconds) as bar:
            results = benchmark.run(target, plan, bar)
    except benchmark.BenchmarkFailed as failure:
        _print_keys_left(failure.results)
        output.fail(failure.message, failure.hint, output.ERROR)
    moves: list[Change] = []
    differences: list[str] = []
    if before is not None:
        moves = comparison.compare(before, results.as_json())
        differences = comparison.differences(before, results.as_json())
    _write_report(results, moves, differences, out)
    console = Console(highlight=False, markup=False, stderr=as_json)
    report.print_to(console, results)
    if before is not None:
        report.print_comparison(console, moves, differences)
    if as_json:
        output.print_json(results.as_json() | _as_json(moves, differences))
    output.stderr.print(f"Wrote {out / 'report.html'}, results.json and the plots.")
    _print_keys_left(results)
    if results.keys_left:
        raise typer.Exit(output.ERROR)
    if results.accepted_after:
        raise typer.Exit(output.REFUSED)


def _require_extra() -> None:
    try:
        from keylatch_bench import benchmark, html_report, plots  # noqa: F401
    except ImportError as error:
        message = f"{error.name} is missing"
        output.fail(message, "pip install 'keylatch[bench]'", output.ERROR)


def _write_report(
    results: "Results", moves: "list[Change]", differences: list[str], folder: Path
) -> None:
    from keylatch_bench import html_report, plots
    from keylatch_bench.results import write

    write(results, folder / "results.json")
    pictures = plots.pictures(results)
    plots.write(pictures, folder)
    page = html_report.render(results, pictures, moves, differences)
    (folder / "report.html").write_text(page)


def _target(url: str | None, uds: Path | None, stores: Given, caches: Given) -> "Target":
    from keylatch_bench.benchmark import Target

    has_store, has_cache = any(stores.values()), any(caches.values())
    if url is not None and uds is not None:
        raise BenchError("a URL and --uds are two targets", "give one of them")
    if url is None and uds is None and not has_store:
        raise BenchError("there is nothing to measure", "give a sidecar's URL, --uds or --store")
    if has_cache and not has_store:
        raise BenchError("--redis needs --store", "give the store of the sidecar as well")
    place = (
        Address(uds=uds) if uds is not None else Address.from_url(url) if url is not None else None
    )
    if has_store:
        caches = caches if has_cache else {"redis": ""}
        return Target(place, Settings.load(**stores, **caches))
    return Target(place, None, _admin_credential())


def _admin_credential() -> Credential:
    """The FULL key from the environment or from standard input."""
    key = BenchSettings().bench_key.encode()
    if not key and not sys.stdin.isatty():
        key = sys.stdin.buffer.readline(1024)
    value = b"Bearer " + key.strip()
    if isinstance(credentials.read([value]), Reason):
        raise BenchError(
            "there is no key to create keys with",
            f"give a FULL key in {KEY_VARIABLE} or on standard input, or --store",
        )
    return Credential(value, 200)


def _print_keys_left(results: "Results") -> None:
    if results.keys_left:
        key_ids = " ".join(results.keys_left)
        message = f"{len(results.keys_left)} keys could not be revoked: {key_ids}"
        output.print_error(message, "keylatch keys revoke ID for each; otherwise they expire")


def _as_json(moves: "list[Change]", differences: list[str]) -> dict[str, Any]:
    if not moves:
        return {}
    return {"comparison": {"moves": [asdict(move) for move in moves], "differences": differences}}


class _Bar:
    """A progress bar that is drawn only in `step`, never while load is running."""

    def __init__(self, seconds: float) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self._progress = Progress(
            *columns, console=output.stderr, transient=True, auto_refresh=False
        )
        self._task = self._progress.add_task("connecting", total=seconds)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, what: str, done: float) -> None:
        """See `keylatch_bench.benchmark.Progress`."""
        self._progress.update(self._task, advance=done, description=what or None)
        self._progress.refresh()

"""Ten million malformed header values, and what must hold for each of them.

    python -m tests.core.fuzz_credentials --inputs 10000000 --seed 1

The law of this file: the same seed gives the same inputs, so a failure is identified by its seed
and number. Every input is read as `Authorization` and as a header's name. The rules are written
here a second time, unlike `keylatch.core.credentials` without a regular expression.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from keylatch.core.credentials import is_identity_header, read
from keylatch.core.decisions import Reason
from keylatch.core.tokens import MacKeys, Token

CHECK_KEYS: Final = MacKeys([b"fuzz" * 8])
# Minted once with these MAC keys: minting is random. Written in halves, for secret scanners.
MINTED: Final = (
    "kl_live_" + "xd095rz2QukG_Dv74ah4OPitcV09niAVgwhcg2OfHO85uQ7H3IppYT",
    "k2_test_" + "UJjqX7qAj0cM_95GBeLzxRZZyKWTddThU9KxuHzxtEfqPmGo08LTWG",
)

B64TOKEN: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/="
HYPHENS: Final = bytes.maketrans(b"_", b"-")

Values: TypeAlias = tuple[bytes, ...]
Reader: TypeAlias = Callable[[Sequence[bytes]], Token | Reason]
Chance: TypeAlias = Callable[[], float]

SEEDS: Final[Values] = (
    *(b"Bearer " + token.encode() for token in MINTED),
    b"bearer   " + MINTED[0].encode() + b"\t ",
    b"BEARER " + b"a" * 500,
    b"Bearer" + b" " * 444 + MINTED[0].encode(),
    b"Bearer a, Bearer b",
    b"Basic dXNlcjpwYXNz",
    b'Digest username="a, Bearer b", realm="x", nc=00000001',
    b"AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host;range, Signature=c",
    b'Bearer "quoted"',
    b"Bearer\xa0\xc2\xa0a",
    b"",
    b"X-Keylatch-Key-Id",
    b"X_KEYLATCH-organization_id",
    b"x-keylatch-",
    b"X-Key-Latch",
)
PIECES: Final[Values] = (
    *(b" ", b"  ", b"\t", b",", b", ", b",,", b"=", b'"', b"'", b"\\", b";", b":", b"-", b"_"),
    *(b"\r", b"\n", b"\r\n ", b"\x00", b"\x0b", b"\x1b", b"\x7f", b"\x80", b"\x85", b"\xff"),
    *(b"Bearer", b"bearer ", b" Bearer ", b", Bearer a", b"Basic ", b"a=b", b"%41", b"~+/"),
    *(b"X-", b"x_", b"keylatch-", b"KEYLATCH_", b"\xc2\xa0", b"\xe2\x80\x8b", b"\xef\xbb\xbf"),
    *(token.encode() for token in MINTED),
)
LONGEST: Final = 1_400


def inputs(seed: int, count: int) -> Iterator[Values]:
    """So many inputs: one value as a rule, sometimes two or three, seldom none.

    Mutants join the pool that the next ones are made from.
    """
    random = Random(seed)
    chance = random.random
    pool = [*SEEDS] * 16
    size = len(pool)
    for number in range(count):
        place = int(chance() * size)
        mutant = MUTATIONS[int(chance() * len(MUTATIONS))](pool[place], chance)
        dice = chance()
        if dice < 0.5:
            pool[place] = mutant if len(mutant) <= LONGEST else SEEDS[number % len(SEEDS)]
        elif dice < 0.51:
            pool[place] = SEEDS[number % len(SEEDS)]
        if dice < 0.75:
            yield (mutant,)
        elif dice < 0.98:
            yield mutant, pool[int(chance() * size)]
        else:
            yield (mutant, mutant, b"") if dice < 0.99 else ()


def inserted(value: bytes, chance: Chance) -> bytes:
    """A piece somewhere in it."""
    place = int(chance() * (len(value) + 1))
    return value[:place] + PIECES[int(chance() * len(PIECES))] + value[place:]


def surrounded(value: bytes, chance: Chance) -> bytes:
    """A piece at one of its ends."""
    piece = PIECES[int(chance() * len(PIECES))]
    return piece + value if chance() < 0.5 else value + piece


def shortened(value: bytes, chance: Chance) -> bytes:
    """Something is missing."""
    start = int(chance() * (len(value) + 1))
    return value[:start] + value[start + 1 + int(chance() * 8) :]


def with_a_byte(value: bytes, chance: Chance) -> bytes:
    """Another byte somewhere."""
    place = int(chance() * (len(value) + 1))
    return value[:place] + bytes((int(chance() * 256),)) + value[place + 1 :]


def with_other_case(value: bytes, chance: Chance) -> bytes:
    """Letters of the other case, from some place on."""
    place = int(chance() * (len(value) + 1))
    return value[:place] + value[place:].swapcase()


def begun_anew(_: bytes, chance: Chance) -> bytes:
    """One of the seeds as it is."""
    return SEEDS[int(chance() * len(SEEDS))]


def crossed(value: bytes, chance: Chance) -> bytes:
    """The end of another one."""
    other = SEEDS[int(chance() * len(SEEDS))]
    return value[: int(chance() * (len(value) + 1))] + other[int(chance() * (len(other) + 1)) :]


def stretched(value: bytes, chance: Chance) -> bytes:
    """One byte many times."""
    place = int(chance() * (len(value) + 1))
    return value[:place] + value[place : place + 1] * int(chance() * 600) + value[place:]


MUTATIONS: Final = (
    *(inserted, inserted, surrounded, shortened, shortened, with_a_byte, with_a_byte),
    *(with_other_case, begun_anew, begun_anew, crossed, stretched),
)


class Broken(Exception):
    """A promise that does not hold for an input."""


def kind_of(values: Values, reader: Reader = read) -> str:
    """What becomes of one input.

    Args:
        values: of the `Authorization` fields; joined, they are a header's name as well.
        reader: what is tried: `credentials.read`, or a twin of it that is known to be broken.

    Raises:
        Broken: naming what does not hold.
    """
    joined = b",".join(values)
    token = reader(values)
    if len(values) != 1 and _value(reader((joined,))) != _value(token):
        raise Broken("joined with a comma it is read differently")
    if is_identity_header(joined) != poses(joined):
        raise Broken("an identity header is not recognised, or another one is taken for it")
    if (None if isinstance(token, Reason) else token.reveal().encode()) != the_token(joined):
        raise Broken("the token is not the one that the grammar finds")
    if isinstance(token, Reason):
        return token.name
    if CHECK_KEYS.verify_mac(token):
        if token.reveal() not in MINTED:
            raise Broken("the MAC of a token that was not minted is accepted")
        return "accepted, minted here"
    return "accepted, of another store"


def _value(token: Token | Reason) -> str:
    return token.name if isinstance(token, Reason) else token.reveal()


def the_token(value: bytes) -> bytes | None:
    """The one token in a value of at most 512 bytes, None where there is none."""
    if len(value) > 512:
        return None
    scheme, _, rest = value.strip(b" \t").partition(b" ")
    token = rest.lstrip(b" ")
    return token if token and scheme.lower() == b"bearer" and _is_b64token(token) else None


def _is_b64token(text: bytes) -> bool:
    return not text.translate(None, B64TOKEN)


def poses(name: bytes) -> bool:
    """Whether a name reads as one of keylatch's, in any case and with any separator."""
    return name[:11].lower().translate(HYPHENS) == b"x-keylatch-"


@dataclass
class Report:
    """What became of many inputs: how many of each kind, and the failures."""

    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(
    seed: int,
    count: int,
    reader: Reader = read,
    tell: Callable[[int], object] = lambda number: None,
) -> Report:
    """Throw so many inputs at the parsers; `tell` is called now and then with the count."""
    report = Report()
    for number, values in enumerate(inputs(seed, count)):
        try:
            report.kinds[kind_of(values, reader)] += 1
        except Exception as error:  # noqa: BLE001 - whatever is raised is what is looked for
            report.failures.append(f"seed {seed}, input {number}: {values!r}: {error!r}")
        if number % 50_000 == 0:
            tell(number)
    return report


def main() -> int:
    """Fuzz from the command line; 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    console = Console()
    began = time.perf_counter()
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=arguments.inputs)
        report = fuzz(
            arguments.seed, arguments.inputs, tell=lambda number: bar.update(task, completed=number)
        )
        bar.update(task, completed=arguments.inputs)
    seconds = time.perf_counter() - began
    for kind, number in report.kinds.most_common():
        console.print(f"{number:>12,}  {kind}")
    for failure in report.failures[:20]:
        console.print(failure, style="red", markup=False)
    speed = arguments.inputs / seconds
    console.print(
        f"{arguments.inputs:,} inputs of seed {arguments.seed} in {seconds:.1f} s"
        f" ({speed:,.0f}/s): {len(report.failures):,} failures"
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

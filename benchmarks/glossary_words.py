"""Words that `docs/glossary.md` replaced, and where they still stand.

    python benchmarks/glossary_words.py            each place: file, line, word, replacement
    python benchmarks/glossary_words.py --counts   the counts for each file, as JSON

Two searches. `identifiers` compares whole identifiers of Python code, so `heard` is found and
`overheard` or a text that contains the word is not. `prose` reads comments and strings of Python
files, and whole Markdown documents. Words with another, established meaning are in `KEPT`.
"""

import argparse
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
CODE: Final = ("middleware", "sidecar", "tests", "chaos", "proofs", "benchmarks")
PACKAGES: Final = ("middleware", "sidecar")
_SKIPPED: Final = {".venv", ".venvs", "__pycache__", "node_modules"}

REPLACED: Final = {
    # words that mislead
    "Witness": "Freshness",
    "witness": "freshness",
    "moment": "now_if_fresh",
    "catch_up": "revalidate",
    "Foreign": "ImportedToken",
    "foreign": "imported",
    "Vault": "StoreSecrets",
    "vault": "store_secrets",
    "makes": "primary",
    "Seal": "Signer",
    "seal": "signer",
    "sealed": "signed",
    "Condition": "Health",
    "unwell": "is_healthy",
    "calm": "recovery_seconds",
    "barred": "allow_pipe",
    "Line": "Connection",
    "Lines": "ConnectionPool",
    "LineLost": "ConnectionLost",
    "Question": "Query",
    "ask": "fetch, request",
    "asked": "requested, required",
    "Touched": "Invalidation",
    "settle": "wait_until_acknowledged, decide, set_result",
    "forget": "after_fork_in_child, clear",
    # private words
    "glance": "check_cached",
    "peek": "check_token_cached",
    "_resolve": "_check_store",
    "_resolved": "_check_or_deny",
    "_recognised": "_cached_allow",
    "_remembered": "_cached",
    "_renewed": "_still_valid",
    "proven": "by_fingerprint",
    "mark_now": "data_version",
    "Feed": "Invalidations",
    "feed": "invalidations",
    "hear": "add_pending",
    "heard": "pending",
    "Changes": "InvalidationBatch",
    "_bury": "_add_tombstones",
    "bury": "invalidate",
    "_start_from": "_set_floor",
    "News": "Notice",
    "news": "notice",
    "Bell": "Notifier",
    "bell": "notifier",
    "ring": "publish",
    "_must_look": "_must_poll",
    "announce": "propagate",
    "Announce": "Propagate",
    "_announce": "_propagate",
    "_spread": "_propagated",
    "SecondLook": "RevocationMonitor",
    "Deed": "AuditEvent",
    "deed": "event",
    "deeds": "events",
    "write_down": "record",
    "Wanted": "Requirement",
    "wanted": "requirement",
    "demands": "required_by",
    "wanted_of": "any_of, all_of",
    "Unsettled": "DeferredDeny",
    "Verdict": "Decision",
    "verdict": "decision",
    "Absence": "NegativeEntry",
    "absence": "negative_entry",
    "ABSENCE": "NEGATIVE_CACHE",
    "Absent": "NotFound",
    "vouch": "verify_mac",
    "CheckKeys": "MacKeys",
    "check_keys": "mac_keys",
    "STRANGER": "MAC",
    "NOWHERE": "NONE",
    "stranger": "forged, unknown, other",
    "strangers": "forged, unknown, other",
    "Gate": "BaseMiddleware",
    "ProxyGate": "ProxyIdentity",
    "Trail": "RequestTrace",
    "trail": "trace",
    "Followed": "TracedAuthenticator",
    "followed": "traced",
    "is_followed": "traces_requests",
    "telling": "with_headers",
    "told": "reported, published, stated",
    "Use": "UsageCounter",
    "note": "record",
    "Unstored": "UsageBuffer",
    "Tally": "UsageBatch",
    "tally": "batch",
    "surplus": "dropped",
    "Flights": "SingleFlight",
    "flights": "single_flight",
    "_Lane": "HashPool",
    "lane": "pool",
    "Aside": "Diagnostics",
    "Draft": "NewKey",
    "draft": "new_key",
    "drafts": "new_keys",
    "Brought": "Imported",
    "brought": "imported",
    "bring_many": "import_many",
    "holders": "keys_by_locator",
    "made_many": "create_many",
    "speaking": "errors_in",
    "spell": "dialect",
    "spelled": "sql_text, encoded",
    "Facts": "OriginalRequest",
    "Profile": "RequestSource",
    "boss": "admin_key",
    "rig": "proxy",
    "knock": "request",
    "says": "decision, message",
}

KEPT: Final = {
    "line": "a line of a text file, of a log or of an HTTP head",
    "listen": "PostgreSQL's LISTEN, and sockets",
    "touch": "`pathlib.Path.touch`",
    "join": "`str.join`, `Thread.join`",
    "resolve": "`pathlib.Path.resolve`, Django's `resolve`",
    "between": "SQL's BETWEEN",
    "reads": "counts of reads",
    "waits": "counts of waits",
    "well": "an adverb",
    "opened": "a file, a connection or a store that is open",
    "known": "an adjective",
    "held": "a lock or a lease that is held",
    "faults": "what `chaos/` injects (fault injection)",
    "declared": "permissions that a view declares",
    "following": "the states that follow a state (`proofs/`)",
    "days": "the unit",
    "copies": "copies of a file",
    "Counter": "`collections.Counter`; a Prometheus counter",
    "facts": "what `chaos/` observed",
}
"""Words of the old vocabulary that have an established meaning as well, and which one."""

PRONOUNS: Final = (
    "whoever",
    "nobody",
    "somebody",
    "whom",
    "everybody",
    "anybody",
    "he",
    "his",
    "him",
)
"""Prose names the acting part instead: the process, the cache, the client."""
COUNTED_PRONOUNS: Final = PRONOUNS[:4]

METAPHORS: Final = (
    "bell", "bells", "rings", "rang", "ringing", "news", "witness", "witnesses", "hears", "heard",
    "told", "feed", "vouch", "vouches", "vouched", "deed", "deeds", "stranger", "strangers",
    "goodbye", "farewell", "errand", "errands", "made elsewhere",
)  # fmt: skip

_WORDS_OF_PROSE: Final = re.compile(rf"\b(?:{'|'.join((*PRONOUNS, *METAPHORS))})\b", re.IGNORECASE)
_FSTRING: Final = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # from Python 3.12 on
_TEXTS: Final = {tokenize.COMMENT, tokenize.STRING, _FSTRING}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a word stands."""

    file: str
    line: int
    word: str


def identifiers(text: str, file: str = "") -> Iterator[Place]:
    """Identifiers of Python code that were replaced."""
    for token in _tokens(text):
        if token.type == tokenize.NAME and token.string in REPLACED:
            yield Place(file, token.start[0], token.string)


def prose(text: str, file: str = "") -> Iterator[Place]:
    """Words in the comments and strings of Python code, or in all of a Markdown document."""
    if file.endswith(".md"):
        yield from _words(text, file, 1)
        return
    for token in _tokens(text):
        if token.type in _TEXTS:
            yield from _words(token.string, file, token.start[0])


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    return tokenize.generate_tokens(io.StringIO(text).readline)


def _words(text: str, file: str, first_line: int) -> Iterator[Place]:
    for match in _WORDS_OF_PROSE.finditer(text):
        line = first_line + text.count("\n", 0, match.start())
        yield Place(file, line, match.group().lower())


def python_files(root: Path, folders: Iterable[str]) -> list[Path]:
    """The Python files of some folders, without virtual environments."""
    files = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return sorted(path for path in files if not _SKIPPED & set(path.relative_to(root).parts))


def documents(root: Path) -> list[Path]:
    """The Markdown documents of the repository, without the changelog, which names old words."""
    folders = ("docs", "deploy", "benchmarks", "chaos", "proofs")
    below = [path for folder in folders for path in (root / folder).rglob("*.md")]
    documents = [*root.glob("*.md"), *(path for path in below if not _SKIPPED & set(path.parts))]
    return sorted(path for path in documents if path.name != "CHANGELOG.md")


def all_identifiers(root: Path = ROOT) -> list[Place]:
    """All places of replaced identifiers in the repository."""
    return [
        place
        for path in python_files(root, CODE)
        for place in identifiers(path.read_text(), path.relative_to(root).as_posix())
    ]


def all_prose(root: Path = ROOT) -> list[Place]:
    """All places of replaced words in the packages' comments and strings, and in the documents."""
    return [
        place
        for path in (*python_files(root, PACKAGES), *documents(root))
        for place in prose(path.read_text(), path.relative_to(root).as_posix())
    ]


def counts(places: Iterable[Place]) -> dict[str, int]:
    """How many places each file has."""
    return dict(sorted(Counter(place.file for place in places).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--counts", action="store_true", help="the counts for each file, as JSON")
    arguments = parser.parse_args()
    found = {
        "identifiers": all_identifiers(arguments.root), "prose": all_prose(arguments.root)
    }  # fmt: skip
    if arguments.counts:
        json.dump({name: counts(places) for name, places in found.items()}, sys.stdout, indent=1)
        print()
        return
    for place in (place for places in found.values() for place in places):
        print(
            f"{place.file}:{place.line}: {place.word} -> {REPLACED.get(place.word, '')}".rstrip(
                " >-"
            )
        )


if __name__ == "__main__":
    main()

"""Creates the keys of an import in batches, each in one transaction, and reports each after its
commit. So an import that stops has done all lines up to one that can be named.

The law of this file: nothing is printed. The caller writes each report before it asks for the next
one. Imported keys have no tokens to write, and importing one again changes nothing.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from keylatch.core.imported_tokens import ImportedToken
from keylatch.errors import InvalidValue, KeylatchError
from keylatch.management.keyring import Created, Imported, Keyring, NewKey
from keylatch_sidecar.importing.file import NumberedKey


@dataclass(frozen=True, slots=True)
class CreatedBatch:
    """New keys that were committed, in the order of the rows."""

    rows: Sequence[NumberedKey]
    created: Sequence[Created]


@dataclass(frozen=True, slots=True)
class ImportedBatch:
    """Imported keys that were committed or looked up, in the order of the rows."""

    rows: Sequence[NumberedKey]
    imported: Sequence[Imported]


@dataclass(slots=True)
class ImportReport:
    """How many keys were created, were imported, and existed already."""

    created: int = 0
    imported: int = 0
    existing: int = 0

    def add(self, batch: CreatedBatch | ImportedBatch) -> None:
        """Count a batch."""
        if isinstance(batch, CreatedBatch):
            self.created += len(batch.created)
        else:
            self.imported += sum(each.is_new for each in batch.imported)
            self.existing += sum(not each.is_new for each in batch.imported)


class BatchFailed(Exception):
    """A batch was not committed; the ones before it were.

    Args:
        first_line, last_line: of the batch, in the file.
        message: why.
        hint: what to do about it.
    """

    def __init__(self, first_line: int, last_line: int, message: str, hint: str) -> None:
        super().__init__(message)
        self.first_line = first_line
        self.last_line = last_line
        self.message = message
        self.hint = hint


def count_to_hash(rows: Sequence[NumberedKey]) -> int:
    """The number of keys whose tokens must be hashed."""
    return sum(
        each.imported_token is None or each.imported_token.token is not None for each in rows
    )


async def import_batches(
    keyring: Keyring, rows: Sequence[NumberedKey], size: int
) -> AsyncIterator[CreatedBatch | ImportedBatch]:
    """Create all keys; yields after each commit.

    Raises:
        BatchFailed: the batch after the last one yielded was not committed.
    """
    for batch in _batches(rows, size):
        try:
            committed = await _commit(keyring, batch)
        except KeylatchError as error:
            hint = "correct the file" if isinstance(error, InvalidValue) else error.hint
            raise BatchFailed(batch[0].line, batch[-1].line, str(error), hint) from None
        yield committed
    with contextlib.suppress(KeylatchError):  # statistics only affect speed
        await keyring.analyze()


async def preview(
    keyring: Keyring, rows: Sequence[NumberedKey], size: int
) -> AsyncIterator[ImportedBatch]:
    """What an import would do with each imported key; nothing is changed."""
    for batch in _batches(rows, size):
        tokens = [token for _, token in _imported_tokens(batch)]
        if tokens:
            yield ImportedBatch(batch, await keyring.find_imported(tokens))


async def _commit(keyring: Keyring, batch: Sequence[NumberedKey]) -> CreatedBatch | ImportedBatch:
    imported_tokens = _imported_tokens(batch)
    if imported_tokens:
        return ImportedBatch(batch, await keyring.import_many(imported_tokens))
    return CreatedBatch(batch, await keyring.create_many([each.new_key for each in batch]))


def _batches(rows: Sequence[NumberedKey], size: int) -> Iterator[list[NumberedKey]]:
    """In the order of the file; a batch has either imported keys or new ones."""
    for _, group in groupby(rows, lambda each: each.imported_token is None):
        same_kind = list(group)
        yield from (same_kind[start : start + size] for start in range(0, len(same_kind), size))


def _imported_tokens(batch: Sequence[NumberedKey]) -> list[tuple[NewKey, ImportedToken]]:
    return [
        (each.new_key, each.imported_token) for each in batch if each.imported_token is not None
    ]

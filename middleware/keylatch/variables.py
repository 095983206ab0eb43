"""The `KEYLATCH_*` variables: which there are, which name a file, and which nothing reads.

The law of this file: the known names are the fields of the settings classes, never a list of their
own, and no message repeats a value, because a URL may hold a password.
"""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX: Final = "KEYLATCH_"
_FILE: Final = "_file"
_MAX_FILE_BYTES: Final = 65_536
_NEARLY_EQUAL: Final = 0.85
_ALIKE: Final = 0.6

# Imported only to learn its names, and only when a variable is found that is not known yet: one
# file of variables is often given to the app and to the sidecar.
_SIDECAR: Final = "keylatch_sidecar"

# What Kubernetes sets in every pod for a Service `keylatch` or `keylatch-…`
# (kubernetes.io/docs/concepts/services-networking/service, "Environment variables").
_OF_A_SERVICE: Final = re.compile(
    r"KEYLATCH(_\w+)?(_SERVICE_HOST|_SERVICE_PORT(_\w+)?"
    r"|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS_OF_A_SERVICE: Final = re.compile(r"(tcp|udp|sctp)://")

Mistake = tuple[str, str]
"""What is wrong, and a hint."""


class Variables(BaseSettings):
    """The base of all settings classes: the field `lease` is the variable `KEYLATCH_LEASE`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    kinds: ClassVar[list[type["Variables"]]] = []
    """Every settings class that was imported so far."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        Variables.kinds.append(cls)


def variable(name: str) -> str:
    """The variable of a field."""
    return PREFIX + name.upper()


def unknown(environment: Mapping[str, str]) -> list[Mistake]:
    """The variables that look like keylatch's and that nothing reads, each with the name that was
    probably meant. Those that Kubernetes makes of a Service are left out."""
    strays = [
        name
        for name in sorted(environment)
        if name.upper().startswith(PREFIX)
        if not _is_of_a_service(name, environment[name])
    ]
    if all(name.upper() in _known() for name in strays):
        return []
    if find_spec(_SIDECAR) is not None:
        import_module(f"{_SIDECAR}.settings")
    known = _known()
    return [
        (f"{name}: no such setting", _meant(name, known))
        for name in strays
        if name.upper() not in known
    ]


def _known() -> set[str]:
    return {variable(name) for kind in Variables.kinds for name in kind.model_fields}


def _is_of_a_service(name: str, value: str) -> bool:
    if name.endswith("_PORT") and _ADDRESS_OF_A_SERVICE.match(value):
        return True
    return _OF_A_SERVICE.fullmatch(name) is not None


def _meant(name: str, known: Collection[str]) -> str:
    word = name.upper().removeprefix(PREFIX)
    words = {each.removeprefix(PREFIX) for each in known}
    alike = (
        difflib.get_close_matches(word, words, 1, _NEARLY_EQUAL)
        or sorted((each for each in words if word.startswith(f"{each}_")), key=len)[-1:]
        or difflib.get_close_matches(word, words, 1, _ALIKE)
    )  # KEYLATCH_REDIS_URL is rather KEYLATCH_REDIS than KEYLATCH_REDIS_FILE
    if alike:
        return f"is {PREFIX}{alike[0]} meant?"
    return "unset it, or correct it: the README lists all settings"


def from_files(
    kind: type[Variables], given: Mapping[str, Any], hints: Mapping[str, str]
) -> tuple[dict[str, str], list[Mistake]]:
    """The settings that are in files: `KEYLATCH_STORE_FILE` names one that holds the store's URL.

    An argument, in either form, comes before a variable in either form.

    Args:
        kind: whose fields; `x_file` is such a file if there is a field `x` as well.
        given: the arguments.
        hints: of each field.

    Returns:
        What to set, and what is wrong.
    """
    found: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for name in (each for each in kind.model_fields if each + _FILE in kind.model_fields):
        file = name + _FILE
        by_argument = {each for each in (name, file) if each in given}
        values = given if by_argument else _from_environment()
        if by_argument == {name}:
            found[file] = ""  # whatever the environment says
        elif values.get(name) and values.get(file):
            mistakes.append(_wrong(file, f"{variable(name)} is set as well", "set one of the two"))
        elif values.get(file):
            try:
                found[name] = _content(Path(values[file]))
            except ValueError as error:
                mistakes.append(_wrong(file, str(error), hints[file]))
    return found, mistakes


def _from_environment() -> dict[str, str]:
    """By field; letters of either case will do, as for pydantic."""
    names = {name: name.upper() for name in os.environ}
    return {
        upper.removeprefix(PREFIX).lower(): os.environ[name]
        for name, upper in names.items()
        if upper.startswith(PREFIX)
    }


def _wrong(name: str, what: str, hint: str) -> Mistake:
    return f"{variable(name)}: {what}", hint


def _content(path: Path) -> str:
    """What a file holds, without the end of its line.

    Raises:
        ValueError: it cannot be read, or holds anything else than one line.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode().strip("\r\n")
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # without its name, which may be a URL by mistake
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(f"the file cannot be read: {reason or 'not a path'}") from None
    if not text.strip():
        raise ValueError("the file is empty")
    if len(text.splitlines()) > 1:
        raise ValueError("the file has more than one line")
    return text


def hand_down(given: Mapping[str, str | None]) -> None:
    """Set the variables of what was given, for processes that are started from here on. The other
    form of the same setting is unset: it would be a mistake beside it, or come before it."""
    for name, value in given.items():
        if value is None:
            continue
        for other in (name + _FILE, name.removesuffix(_FILE)):
            for each in [each for each in os.environ if each.upper() == variable(other)]:
                del os.environ[each]
        os.environ[variable(name)] = value

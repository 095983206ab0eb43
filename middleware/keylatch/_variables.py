"""The `KEYLATCH_*` variables: which are known, which name a file, and which are unknown.

The law of this file: the known names are the fields of the settings classes, never a separate
list, and no message repeats a value, because a URL may hold a password.
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
_FILE_SUFFIX: Final = "_file"
_MAX_FILE_BYTES: Final = 65_536
_STRICT_CUTOFF: Final = 0.85
_LOOSE_CUTOFF: Final = 0.6

# Imported only for its names, and only when a variable is unknown so far: an app and the sidecar
# often read the same file of variables.
_SIDECAR_PACKAGE: Final = "keylatch_sidecar"

# Kubernetes sets these in every pod for a Service `keylatch` or `keylatch-…`
# (kubernetes.io/docs/concepts/services-networking/service, "Environment variables").
_KUBERNETES_VARIABLE: Final = re.compile(
    r"KEYLATCH(_\w+)?(_SERVICE_HOST|_SERVICE_PORT(_\w+)?"
    r"|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_KUBERNETES_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://")

Mistake = tuple[str, str]
"""An error and a hint."""


class EnvironmentSettings(BaseSettings):
    """The base of all settings classes: the field `lease` is the variable `KEYLATCH_LEASE`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    settings_classes: ClassVar[list[type["EnvironmentSettings"]]] = []
    """Every settings class that was imported so far."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        EnvironmentSettings.settings_classes.append(cls)


def variable_name(name: str) -> str:
    """The variable of a field."""
    return PREFIX + name.upper()


def find_unknown(environment: Mapping[str, str]) -> list[Mistake]:
    """The `KEYLATCH_*` variables that no settings class has, each with the most similar name.

    Variables that Kubernetes sets for a Service are not included.
    """
    candidates = [
        name
        for name in sorted(environment)
        if name.upper().startswith(PREFIX)
        if not _is_from_kubernetes(name, environment[name])
    ]
    if all(name.upper() in _known_names() for name in candidates):
        return []
    if find_spec(_SIDECAR_PACKAGE) is not None:
        import_module(f"{_SIDECAR_PACKAGE}.settings")
    names = _known_names()
    return [
        (f"{name}: no such setting", _hint_for(name, names))
        for name in candidates
        if name.upper() not in names
    ]


def _known_names() -> set[str]:
    return {
        variable_name(name)
        for model in EnvironmentSettings.settings_classes
        for name in model.model_fields
    }


def _is_from_kubernetes(name: str, value: str) -> bool:
    if name.endswith("_PORT") and _KUBERNETES_ADDRESS.match(value):
        return True
    return _KUBERNETES_VARIABLE.fullmatch(name) is not None


def _hint_for(name: str, names: Collection[str]) -> str:
    word = name.upper().removeprefix(PREFIX)
    words = {each.removeprefix(PREFIX) for each in names}
    matches = (
        difflib.get_close_matches(word, words, 1, _STRICT_CUTOFF)
        or sorted((each for each in words if word.startswith(f"{each}_")), key=len)[-1:]
        or difflib.get_close_matches(word, words, 1, _LOOSE_CUTOFF)
    )  # for KEYLATCH_REDIS_URL this suggests KEYLATCH_REDIS, not KEYLATCH_REDIS_FILE
    if matches:
        return f"is {PREFIX}{matches[0]} meant?"
    return "unset it, or correct it: the README lists all settings"


def read_files(
    model: type[EnvironmentSettings], arguments: Mapping[str, Any], hints: Mapping[str, str]
) -> tuple[dict[str, str], list[Mistake]]:
    """The settings in files: `KEYLATCH_STORE_FILE` names a file that contains the store's URL.

    An argument, in either form, takes precedence over a variable in either form.

    Args:
        model: the settings class; its field `x_file` names a file for its field `x`.
        arguments: of the caller, by field.
        hints: the allowed values, by field.

    Returns:
        Values by field, and mistakes.
    """
    found: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for name in (each for each in model.model_fields if each + _FILE_SUFFIX in model.model_fields):
        file_name = name + _FILE_SUFFIX
        by_argument = {each for each in (name, file_name) if each in arguments}
        values = arguments if by_argument else _from_environment()
        if by_argument == {name}:
            found[file_name] = ""  # overrides the variable
        elif values.get(name) and values.get(file_name):
            mistakes.append(
                _mistake(file_name, f"{variable_name(name)} is set as well", "set one of the two")
            )
        elif values.get(file_name):
            try:
                found[name] = _read_file(Path(values[file_name]))
            except ValueError as error:
                mistakes.append(_mistake(file_name, str(error), hints[file_name]))
    return found, mistakes


def _from_environment() -> dict[str, str]:
    """By field; letter case does not matter, as in pydantic-settings."""
    names = {name: name.upper() for name in os.environ}
    return {
        upper.removeprefix(PREFIX).lower(): os.environ[name]
        for name, upper in names.items()
        if upper.startswith(PREFIX)
    }


def _mistake(name: str, what: str, hint: str) -> Mistake:
    return f"{variable_name(name)}: {what}", hint


def _read_file(path: Path) -> str:
    """The only line of a file.

    Raises:
        ValueError: the file cannot be read, or does not contain exactly one line.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode().strip("\r\n")
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # not with the name, which may be a URL by mistake
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(f"the file cannot be read: {reason or 'not a path'}") from None
    if not text.strip():
        raise ValueError("the file is empty")
    if len(text.splitlines()) > 1:
        raise ValueError("the file has more than one line")
    return text


def export_variables(settings: Mapping[str, str | None]) -> None:
    """Set variables for child processes. The other form of the same setting (`x` and `x_file`) is
    unset: both together would be a mistake."""
    for name, value in settings.items():
        if value is None:
            continue
        for other in (name + _FILE_SUFFIX, name.removesuffix(_FILE_SUFFIX)):
            for each in [each for each in os.environ if each.upper() == variable_name(other)]:
                del os.environ[each]
        os.environ[variable_name(name)] = value

"""`keylatch`: every command of the program, and its entry point.

Exit codes: 0 done, 1 refused, 2 wrong usage or the store cannot be reached. Errors are reported as
`error: …` and `hint: …`, never as tracebacks. Tokens and passwords are rejected as arguments,
because arguments end up in shell histories and process lists; error messages do not repeat them.
"""

import logging
import re
import sys
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote

import typer

from keylatch.core.tokens import SCAN_PATTERN
from keylatch.errors import ConfigurationError
from keylatch_sidecar.cli import (
    backup,
    key_changes,
    keys,
    organizations,
    output,
    revocations,
    secrets,
)
from keylatch_sidecar.cli.audit import audit
from keylatch_sidecar.cli.bench import bench
from keylatch_sidecar.cli.doctor import doctor
from keylatch_sidecar.cli.key_import import import_keys
from keylatch_sidecar.cli.migrate import migrate
from keylatch_sidecar.cli.scan import scan
from keylatch_sidecar.cli.serve import serve
from keylatch_sidecar.cli.usage import usage
from keylatch_sidecar.cli.verify import verify

Commands = dict[str, Callable[..., None]]

_COMMANDS: Final[Commands] = {
    "serve": serve,
    "verify": verify,
    "audit": audit,
    "scan": scan,
    "migrate": migrate,
    "doctor": doctor,
    "backup": backup.backup,
    "restore": backup.restore,
    "bench": bench,
}
_FAMILIES: Final[dict[str, tuple[str, Commands]]] = {
    "keys": (
        "Create, list, change and revoke keys.",
        {
            "create": keys.create,
            "import": import_keys,
            "list": keys.list_keys,
            "show": keys.show,
            "usage": usage,
            "rotate": key_changes.rotate,
            "cancel-rotation": key_changes.cancel_rotation,
            "finish-rotation": key_changes.finish_rotation,
            "change": key_changes.change,
            "disable": key_changes.disable,
            "enable": key_changes.enable,
            "revoke": key_changes.revoke,
        },
    ),
    "organizations": (
        "Disable or enable an organisation, or revoke all its keys.",
        {
            "disable": organizations.disable,
            "enable": organizations.enable,
            "revoke": organizations.revoke,
        },
    ),
    "revocations": (
        "Export revoked and disabled keys, and revoke them again after a restore.",
        {"export": revocations.export, "apply": revocations.apply},
    ),
    "secrets": (
        "List, rotate and retire the store's secrets: MAC keys and peppers.",
        {"list": secrets.list_secrets, "rotate": secrets.rotate, "retire": secrets.retire},
    ),
}

# A URL of a store or of Redis, as an argument or as the value of an option, that has a password
# before the last @, where SQLAlchemy looks for it, or among its parameters.
_URL_WITH_PASSWORD: Final = re.compile(
    r"(--?[\w-]+=)?\s*(postgres|redis|valkey|unix)[\w+]*://"
    r"([^:/]*:[^@]+@|.*[?&][^=&]*passw[^=&]*=)",
    re.IGNORECASE | re.DOTALL,
)


def _group(help_text: str, commands: Commands) -> typer.Typer:
    group = typer.Typer(
        help=help_text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # its tracebacks show local variables
        add_completion=False,
    )
    for name, command in commands.items():
        # `verify TOKEN` is answered by the command, with what to do about the token.
        extra = {"allow_extra_args": True} if command is verify else {}
        group.command(name, context_settings=extra)(command)
    return group


cli: Final = _group("Manage and verify API keys for web applications.", _COMMANDS)
for _name, (_help, _commands) in _FAMILIES.items():
    cli.add_typer(_group(_help, _commands), name=_name)


def main() -> None:
    """The entry point of the console script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    if any(re.search(SCAN_PATTERN, argument) for argument in sys.argv):
        output.refuse_token_in_argument()
    if any(_URL_WITH_PASSWORD.match(unquote(argument)) for argument in sys.argv[1:]):
        output.refuse_password_in_argument()
    try:
        cli()
    except ConfigurationError as error:
        for message, hint in error.mistakes:
            output.print_error(message, hint)
        sys.exit(output.ERROR)

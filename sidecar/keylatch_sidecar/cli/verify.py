"""`keylatch verify`: checks one token, which it reads from standard input."""

import sys
from typing import Annotated

import typer

from keylatch.core import credentials
from keylatch.core.decisions import Allow, Reason
from keylatch.core.refusals import ANSWERS
from keylatch.settings import Settings
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, setting_options
from keylatch_sidecar.cli.session import with_engine
from keylatch_sidecar.forward_auth.decision import all_of

_MAX_BYTES = 1024


@setting_options("store", "redis")
def verify(
    context: typer.Context,
    permission: Annotated[
        list[str] | None, typer.Option(help="Permission that the key must have; may be repeated.")
    ] = None,
    *,
    given: Given,
) -> None:
    """Check the token on standard input. Exit code: 0 allowed, 1 refused, 2 cannot decide."""
    if context.args:
        output.refuse_token_in_argument()
    line = sys.stdin.buffer.readline(_MAX_BYTES).strip()
    token = credentials.read([b"Bearer " + line], allow_pipe=True)
    if isinstance(token, Reason):
        output.fail(
            "there is no token on standard input", "keylatch verify < token.txt", output.REFUSED
        )
    requirement = all_of(permission or ())
    settings = Settings.load(**given)
    decision = with_engine(
        settings, lambda engine: engine.authenticator.check_token(token, requirement)
    )
    if isinstance(decision, Allow):
        principal = decision.principal
        output.stderr.print(f"Allowed: {principal.key_id} ({principal.permission})")
        return
    answer = ANSWERS[decision.reason]
    output.stderr.print(f"Refused: {answer.error}")
    raise typer.Exit(output.ERROR if answer.status == 503 else output.REFUSED)

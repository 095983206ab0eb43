"""`keylatch organizations`: disables or enables an organisation, or revokes all its keys."""

import re
from typing import Annotated

import typer

from keylatch.core.validation import ORGANIZATION_PATTERN
from keylatch.settings import Settings
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, OrganizationArgument, ReasonOption, setting_options
from keylatch_sidecar.cli.session import with_keyring


@setting_options("store", "redis")
def disable(organization: OrganizationArgument, *, given: Given) -> None:
    """Refuse all keys of an organisation, with immediate effect, until it is enabled again."""
    _set_active(organization, False, Settings.load(**given))


@setting_options("store", "redis")
def enable(organization: OrganizationArgument, *, given: Given) -> None:
    """Accept the keys of a disabled organisation again."""
    _set_active(organization, True, Settings.load(**given))


@setting_options("store", "redis")
def revoke(
    organization: OrganizationArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm: this cannot be undone.")] = False,
    reason: ReasonOption = None,
    *,
    given: Given,
) -> None:
    """Revoke every key of an organisation, with immediate effect. This cannot be undone."""
    if not yes:
        message = "this revokes every key of the organisation and cannot be undone"
        output.fail(message, "confirm with --yes, or keylatch organizations disable", output.ERROR)
    revoked = with_keyring(
        Settings.load(**given), lambda keyring: keyring.revoke_all(organization, reason=reason)
    )
    output.stderr.print(f"Revoked {revoked.count:,} keys: {output.propagation(revoked.receipt)}.")


def _set_active(organization: str, active: bool, settings: Settings) -> None:
    is_valid_name = re.fullmatch(ORGANIZATION_PATTERN, organization)
    receipt = is_valid_name and with_keyring(
        settings, lambda keyring: keyring.set_organization_active(organization, active)
    )
    if not receipt:
        hint = "an organisation is created with its first key"
        output.fail("there is no such organisation", hint, output.REFUSED)
    output.stderr.print(
        f"{'Enabled' if active else 'Disabled'} {organization}: {output.propagation(receipt)}."
    )

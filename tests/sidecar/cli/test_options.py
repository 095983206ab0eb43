"""What each command takes: scripts depend on it, so an option that disappears breaks them."""

from collections.abc import Iterator

import pytest
from typer.core import TyperGroup
from typer.main import get_group

from keylatch_sidecar.cli.program import cli

TAKEN = {
    "audit": "--organization --key --limit --json-lines --store --redis",
    "bench": (
        "URL --uds --store --redis --store-file --redis-file --seconds --rate --flood-rate "
        "--connections --keys --revocations --out --compare --json"
    ),
    "doctor": "--json --store --redis --hasher --lease",
    "migrate": "--check --store",
    "backup": "PATH --store",
    "restore": "PATH --store",
    "scan": "PATH… --offline --revoke --all --json --store --redis",
    "serve": (
        "--host --port --uds --admin-host --admin-port --admin-uds --grpc-port --grpc-uds "
        "--metrics-host --metrics-port --workers --store --store-direct --store-read --durable "
        "--redis --pepper-file --prefix --hasher --lease --max-keys --max-changes --audit-days "
        "--clients --log --log-failures --timing --tracing --verify-request "
        "--ext-authz-request --proxy-cache-ttl --drain"
    ),
    "verify": "--permission --store --redis",
    "keys rotate": "ID --grace --organization --json --store --redis --prefix --hasher",
    "keys cancel-rotation": "ID --organization --json --store --redis",
    "keys finish-rotation": "ID --organization --json --store --redis",
    "keys change": (
        "ID --name --permission --expires-in --expires-at --never-expires --metadata "
        "--organization --json --store --redis"
    ),
    "keys disable": "ID --organization --json --store --redis",
    "keys enable": "ID --organization --json --store --redis",
    "keys revoke": "ID --reason --descendants --organization --json --store --redis",
    "keys usage": "ID --days --organization --json --store --redis",
    "keys create": (
        "--name --organization --permission --environment --expires-in --expires-at "
        "--metadata --json --store --redis --prefix --hasher"
    ),
    "keys import": (
        "FILE --format --organization --permission --environment --from-line --batch "
        "--dry-run --store --redis --prefix --hasher"
    ),
    "keys list": "--organization --limit --idle --json --store --redis",
    "keys show": "ID --organization --json --store --redis",
    "organizations revoke": "ORGANIZATION --yes --reason --store --redis",
    "organizations disable": "ORGANIZATION --store --redis",
    "organizations enable": "ORGANIZATION --store --redis",
    "revocations export": "--store",
    "revocations apply": "[FILE] --dry-run --store --redis --lease",
    "secrets list": "--json --store --redis",
    "secrets rotate": "--check-key --pepper --store --redis --lease",
    "secrets retire": "ID --yes --store --redis --lease",
}


def parameters(group: TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Each command with its arguments and options, in the order of `--help`."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from parameters(command, (*path, name))
        else:
            words = (
                "/".join(each.opts) if each.param_type_name == "option" else str(each.metavar)
                for each in command.params
            )
            yield " ".join((*path, name)), " ".join(words).replace("None", "URL")


def test_no_command_is_gained_or_lost() -> None:
    """The families together have exactly these commands."""
    assert set(dict(parameters(get_group(cli)))) == set(TAKEN)


@pytest.mark.parametrize("command", TAKEN)
def test_each_command_takes_its_options_in_this_order(command: str) -> None:
    """Its own first, then those of the settings that it uses."""
    assert dict(parameters(get_group(cli)))[command] == TAKEN[command]

"""The files in `deploy/` for programs that no test starts: Docker, systemd, Kubernetes, APISIX.

They are checked against what can be known without them: schemas, our own options, settings and
ports, and the proxies' rules for which request is asked about. For the resources of Istio and of
the Gateway API there is no schema here.
"""

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from compose_spec import PyCompose

from keylatch.errors import ConfigurationError
from proxied_app import app
from tests.support import manifests
from tests.support.manifests import Request, documents, of_kind, parts
from tests.support.proxies import DEPLOY, IDENTITY, SEARCHED
from tests.support.raw_http import send
from tests.support.servers import eventually, free_port, require_program, serving

ROOT = DEPLOY.parent
WORKER = ROOT / "tests/support/worker_seccomp.py"
YAML = sorted(
    str(path.relative_to(DEPLOY))
    for pattern in (
        *("*.yaml", "kubernetes/*.yaml", "apisix/*.yaml"),
        *("patroni/*.yaml", "cloudnativepg/*.yaml"),
    )
    for path in DEPLOY.glob(pattern)
)
KUBERNETES = [
    name
    for name in YAML
    if name.startswith(("kubernetes/", "cloudnativepg/")) and "mesh" not in name
]
WITHOUT_SCHEMA = {
    *("AuthorizationPolicy", "DestinationRule", "EnvoyFilter", "HTTPRoute"),
    *("Cluster", "Pooler"),
}

COMPOSE = documents("compose.yaml")[0]
SIDECAR = documents("kubernetes/sidecar.yaml")
ALONE = documents("kubernetes/keylatch.yaml")
INGRESS = documents("kubernetes/ingress-nginx.yaml")
GATEWAY = documents("kubernetes/gateway-api.yaml")
ISTIO = documents("kubernetes/istio.yaml")
(MESH,) = documents("kubernetes/istio-mesh.yaml")
(APISIX,) = documents("apisix/apisix.yaml")

Change = Callable[[Any], object]


def twin(of: Any, change: Change) -> Any:
    """A copy with a mistake in it."""
    copied = copy.deepcopy(of)
    change(copied)
    return copied


def pod_of(resources: list[Any]) -> Any:
    """The pod of a file's only Deployment."""
    (deployment,) = of_kind(resources, "Deployment")
    return deployment["spec"]["template"]["spec"]


def containers(spec: Any) -> dict[str, Any]:
    """A pod's containers, by name."""
    return {each["name"]: each for each in spec.get("initContainers", []) + spec["containers"]}


# All of them


@pytest.mark.parametrize("name", YAML)
def test_a_file_is_yaml_and_closed(name: str) -> None:
    """No key twice, nothing that opens when the sidecar is down, no identity header left out."""
    found = documents(name)
    assert found
    assert manifests.open_doors(found) == manifests.half_identities(found) == []


def test_a_key_that_comes_twice_is_seen() -> None:
    """YAML's own readers take the second, and a reviewer may look at the first."""
    with pytest.raises(yaml.YAMLError, match="failOpen"):
        yaml.load("failOpen: false\nfailOpen: true\n", manifests.Strict)


@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        ("kubernetes/istio-mesh.yaml", "failOpen: false", "failOpen: true", "failOpen is on"),
        ("kubernetes/istio-mesh.yaml", 'OnError: "503"', 'OnError: "200"', "statusOnError is 200"),
        ("apisix/apisix.yaml", "_degradation: false", "_degradation: true", "degradation is on"),
        ("apisix/apisix.yaml", "_on_error: 503", "_on_error: 200", "status_on_error is 200"),
        ("kubernetes/ingress-nginx.yaml", "/use-regex:", "/auth-cache-key:", "for 5 minutes"),
        ("kubernetes/ingress-nginx.yaml", "/use-regex:", "/auth-signin:", "auth-signin answers"),
        ("kubernetes/ingress-nginx.yaml", ",x-keylatch-permission", "", "permission is missing"),
        ("kubernetes/gateway-api.yaml", "- x-keylatch-key-id\n", "- x\n", "key-id is missing"),
        (
            "kubernetes/istio-mesh.yaml",
            "- x-keylatch-environment\n",
            "- x\n",
            "environment is missing",
        ),
        ("apisix/apisix.yaml", "x-keylatch-key-name, ", "", "key-name is missing"),
    ],
)
def test_an_open_twin_is_seen(file: str, old: str, new: str, found: str) -> None:
    """The judges see each mistake when it is made."""
    text = (DEPLOY / file).read_text()
    assert old in text
    broken = list(yaml.safe_load_all(text.replace(old, new)))
    assert found in str(manifests.open_doors(broken) + manifests.half_identities(broken))


@pytest.mark.parametrize("name", YAML)
def test_the_sidecar_is_where_it_listens(name: str) -> None:
    """8700, on the loopback or as the Service of that name; and no other path than is served."""
    for text in (each for each in parts(documents(name)) if isinstance(each, str)):
        for place, path in re.findall(r"//([\w.-]+:87\d\d)(/[^\s?]*)?", text):
            assert place in ("127.0.0.1:8700", "keylatch.default.svc.cluster.local:8700")
            assert path in ("", "/verify")


# Docker


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each on one line."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in kept)]


def test_the_image_is_made_from_what_is_there() -> None:
    """What is copied exists and is not ignored; what else is in the folder is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[(.+)\]'", (DEPLOY / "Dockerfile").read_text())
    assert "postgres" in extras.split(",")
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    first, *others = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    ]
    assert first == "*", "an image gets nothing but what is named"
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY"]
    sources = {name for names in copied for name in names if not name.startswith(("--", "/"))}
    assert sources == {line[1:] for line in others if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sources)
    assert {line for line in others if line[0] != "!"} == {"**/__pycache__", "**/*.pyc"}


def test_the_image_has_the_command() -> None:
    """Its entry point is in an extra, which `pip install keylatch` does not install."""
    (extras,) = re.findall(r"'\.\[(.+)\]'", (DEPLOY / "Dockerfile").read_text())
    assert dict(instructions())["ENTRYPOINT"] == '["keylatch"]'
    assert "sidecar" in extras.split(",")


def test_the_image_serves_without_root() -> None:
    """Not as root, by exec and not by a shell, where it says, with options that there are."""
    words = dict(instructions())
    user, group = words["USER"].split(":")
    assert int(user) > 999
    assert int(group) > 999
    assert json.loads(words["ENTRYPOINT"]) == ["keylatch"]
    options = manifests.options_of(json.loads(words["CMD"]))
    assert (options["host"], str(options["port"])) == ("0.0.0.0", words["EXPOSE"])
    environment = dict(re.findall(r"(KEYLATCH_\w+)=(\S+)", words["ENV"]))
    assert manifests.settings_mistakes(environment) == []
    assert environment["KEYLATCH_STORE"].startswith(f"sqlite:///{words['VOLUME']}/")
    assert words["WORKDIR"] == words["VOLUME"]
    stages = [rest for word, rest in instructions() if word == "FROM"]
    assert [stage.split()[0] for stage in stages] == ["python:${PYTHON}-slim"] * 2


def probes() -> list[list[str]]:
    """The commands that probe a sidecar or an app."""
    words = dict(instructions())
    found = [json.loads(words["HEALTHCHECK"].partition("CMD ")[2])]
    found += [
        each["healthcheck"]["test"][1:]
        for each in COMPOSE["services"].values()
        if "healthcheck" in each
    ]
    for container in containers(pod_of(SIDECAR)).values():
        found += [
            container[name]["exec"]["command"]
            for name in ("startupProbe", "livenessProbe", "readinessProbe")
            if "exec" in container.get(name, {})
        ]
    scripts = dict.fromkeys(tuple(command) for command in found if command[0] == "python")
    return [list(script) for script in scripts]


@pytest.mark.long
@pytest.mark.parametrize(
    "command", probes(), ids=lambda command: " ".join(re.findall(r"8\d+|/[a-z]+z", command[2]))
)
def test_a_probe_distinguishes_healthy_and_unhealthy(command: list[str]) -> None:
    """It succeeds on 200 only: not on 503, not without a response."""

    async def ill(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def well(scope: Any, receive: Any, send: Any) -> None:
        async def better(message: Any) -> None:
            await send(message | ({"status": 200} if "status" in message else {}))

        await ill(scope, receive, better)

    def ended(port: str) -> int:
        code = re.sub(r"\b8[07]00\b", port, command[2])
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode

    with serving(well) as url:
        assert ended(url.rpartition(":")[2]) == 0
    assert ended(url.rpartition(":")[2]) != 0
    with serving(ill) as url:
        assert ended(url.rpartition(":")[2]) != 0


def test_the_composition_is_one() -> None:
    """By the specification; every file and service that it names is there."""
    PyCompose.from_json(json.dumps(COMPOSE)).validate()
    services = COMPOSE["services"]
    assert set(COMPOSE) == {"name", "x-hardened", "services", "networks", "volumes"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service.get("networks", [])) <= set(COMPOSE["networks"])
        assert service.get("network_mode", "service:pod") == "service:pod"
        assert re.fullmatch(r"keylatch|.+:[\d.]+", service["image"]), "a tag, and not the latest"
        for volume in service.get("volumes", []):
            source, _, target = volume.partition(":")
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists()
            assert source in COMPOSE["volumes"] or target.endswith(":ro")
    build = services["keylatch"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    broken = twin(COMPOSE, lambda file: file["services"]["app"].update(reed_only=True))
    with pytest.raises(ValueError, match="reed_only"):
        PyCompose.from_json(json.dumps(broken))


def test_the_composition_is_hardened() -> None:
    """Each service; and only nginx can be reached, from this host."""
    services = COMPOSE["services"]
    assert {name: manifests.flaws_of_service(each) for name, each in services.items()} == {
        name: [] for name in services
    }
    assert [name for name, each in services.items() if "ports" in each] == ["pod"]
    assert services["pod"]["ports"] == ["127.0.0.1:8080:8080", "127.0.0.1:8702:8702"]
    assert COMPOSE["networks"]["back"] == {"internal": True}
    for change in (
        lambda service: service.update(read_only=False),
        lambda service: service.update(cap_add=["NET_ADMIN"]),
        lambda service: service.pop("security_opt"),
        lambda service: service.update(privileged=True),
        lambda service: service.pop("mem_limit"),
        lambda service: service.update(ports=["8700:8700"]),
    ):
        assert manifests.flaws_of_service(twin(services["keylatch"], change))


def test_the_compositions_nginx_calls_its_sidecar() -> None:
    """Its options, its settings, its address, and the facts that nginx sends."""
    keylatch = COMPOSE["services"]["keylatch"]
    options = manifests.options_of(keylatch["command"])
    assert (options["host"], options["port"]) == ("127.0.0.1", 8700)
    assert any(str(options["admin_uds"].parent) in each for each in keylatch["tmpfs"])
    secret = {"DB_PASSWORD"}
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == secret == set(re.findall(r"\$\{(\w+)", text))
    environment = {
        name: re.sub(r"\$\{.*?\}", "secret", value)
        for name, value in keylatch["environment"].items()
    }
    assert manifests.settings_mistakes(environment) == []
    assert environment["KEYLATCH_VERIFY_REQUEST"] == "forwarded"
    database = COMPOSE["services"]["postgres"]["environment"]
    url = environment["KEYLATCH_STORE"]
    assert (
        url == f"postgresql://{database['POSTGRES_USER']}:secret@postgres/{database['POSTGRES_DB']}"
    )


@pytest.mark.parametrize(
    "command",
    [COMPOSE["services"]["nginx"]["command"], containers(pod_of(SIDECAR))["nginx"]["command"]],
    ids=["compose", "kubernetes"],
)
def test_nginx_runs_on_our_files(tmp_path: Path, command: list[str]) -> None:
    """One line is changed in them: only nginx is reached from outside of the pod."""
    *shell, script = command
    assert shell == ["sh", "-ec"]
    prepare, _, start = script.rpartition("&& exec ")
    prepare = prepare.replace("/etc/keylatch", str(DEPLOY / "nginx"))
    for name in ("nginx.conf", "keylatch_app.conf", "keylatch_check.conf"):
        assert (DEPLOY / "nginx" / name).exists()
    subprocess.run(["sh", "-ec", prepare.replace("/run/", f"{tmp_path}/")], check=True)
    ours = (DEPLOY / "nginx/nginx.conf").read_text().splitlines()
    theirs = (tmp_path / "nginx.conf").read_text().splitlines()
    changed = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    assert [tuple(line.partition("#")[0].strip() for line in pair) for pair in changed] == [
        ("listen 127.0.0.1:8080;", "listen 8080;")
    ]
    assert start.split() == ["nginx", "-c", "/run/nginx.conf", "-g", "'daemon", "off;'"]
    folders = {"/run", "/var/lib/nginx", "/var/log/nginx"}  # made for it, the last by its image
    text = "\n".join(theirs)
    assert set(re.findall(r"(/(?:run|var/\w+/nginx))/", text)) == folders
    for folder in folders:
        text = text.replace(f"{folder}/", f"{tmp_path}/")
    (tmp_path / "nginx.conf").write_text(text)
    nginx = require_program(shutil.which("nginx", path=SEARCHED), "nginx")
    judged = [nginx, "-t", "-q", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)]
    assert subprocess.run(judged).returncode == 0


def test_the_example_behind_a_proxy_trusts_only_the_proxy() -> None:
    """It takes the identity from the proxy's headers, and checks the permission again."""
    fields = [
        *(b"x-keylatch-key-id: key_1", b"x-keylatch-key-name: me"),
        *(b"x-keylatch-organization-id: acme", b"x-keylatch-environment: live"),
    ]
    full, sending = ([*fields, b"x-keylatch-permission: " + word] for word in (b"FULL", b"SENDING"))
    with serving(app) as url:
        assert send(url, b"GET /healthz").status == 200
        assert send(url, b"GET /v1/me").status == 401
        assert json.loads(send(url, b"GET /v1/me", *full).body) == {"key": "key_1", "name": "me"}
        assert send(url, b"GET /v1/me", *sending).status == 403
        assert send(url, b"POST /v1/emails", *sending).status == 200
        assert send(url, b"GET /v1/me", *full, b"X_Keylatch_Key_Id: key_2").status != 200
    serve = COMPOSE["services"]["app"]["entrypoint"]
    assert "--no-proxy-headers" in serve, "or X-Forwarded-For says who the proxy is"


# systemd


def unit() -> dict[str, list[str]]:
    """The unit's settings; some come more than once."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd/keylatch.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def analyzed(folder: Path, text: str, *words: str) -> str:
    """What systemd says of a unit, with the program at a place where it is."""
    analyze = require_program(shutil.which("systemd-analyze"), "systemd")
    (folder / "keylatch.service").write_text(
        text.replace(
            "/opt/keylatch/bin/keylatch serve", f"{sys.executable} -m keylatch_sidecar serve"
        )
    )
    done = subprocess.run(
        [analyze, *words, str(folder / "keylatch.service")], capture_output=True, text=True
    )
    return done.stdout + done.stderr


def of_the_unit(output: str) -> str:
    """What is said of ours: the other units of the machine are no concern of the test."""
    return "\n".join(line for line in output.splitlines() if "keylatch.service" in line)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Without a word; a misspelled lock it would ignore, with one."""
    text = (DEPLOY / "systemd/keylatch.service").read_text()
    assert of_the_unit(analyzed(tmp_path, text, "verify")) == ""
    broken = text.replace("ProtectSystem=strict", "ProtectSytem=strict")
    output = of_the_unit(analyzed(tmp_path, broken, "verify"))
    assert "'ProtectSytem' in section [Service], ignoring" in output


def test_another_unit_of_the_machine_may_draw_a_warning(tmp_path: Path) -> None:
    """One that ours waits for is read as well."""
    (tmp_path / "network-online.target").write_text("[Unit]\nDescripton=misspelled\n")
    text = (DEPLOY / "systemd/keylatch.service").read_text()
    output = analyzed(tmp_path, text, "verify")
    assert "Descripton" in output
    assert of_the_unit(output) == ""


def test_systemd_finds_the_unit_locked(tmp_path: Path) -> None:
    """By its own measure, 0 to 10: what is left is the network and the clock's device."""
    text = (DEPLOY / "systemd/keylatch.service").read_text()
    exposure = re.compile(r"exposure level for keylatch.service: ([\d.]+)")

    def measured(text: str) -> float:
        return float(exposure.findall(analyzed(tmp_path, text, "security", "--offline=true"))[0])

    assert measured(text) < 1.5
    assert measured(text.replace("CapabilityBoundingSet=\n", "")) > 1.5


def test_the_unit_is_ours() -> None:
    """What is served is where the proxy looks, and the proxy's group may enter."""
    settings = {name: values[-1] for name, values in unit().items()}
    _, *arguments = shlex.split(settings["ExecStart"].replace("%t", "/run"))
    options = manifests.options_of(arguments)
    assert {str(options[name].parent) for name in ("uds", "admin_uds")} == {"/run/keylatch"}
    environment = dict(value.split("=", 1) for value in unit()["Environment"])
    store = environment["KEYLATCH_STORE"] = environment["KEYLATCH_STORE"].replace("%S", "/var/lib")
    assert store.startswith("sqlite:////var/lib/keylatch/")
    assert manifests.settings_mistakes(environment) == []
    assert environment["KEYLATCH_VERIFY_REQUEST"] == "forwarded"
    assert str(options["uds"]) in (DEPLOY / "nginx/nginx.conf").read_text()
    assert (settings["RuntimeDirectory"], settings["RuntimeDirectoryMode"]) == ("keylatch", "0750")
    assert settings["Group"] == "www-data", "nginx's"
    assert (settings["StateDirectory"], settings["StateDirectoryMode"]) == ("keylatch", "0700")
    assert f"-E KEYLATCH_STORE={store} " in (DEPLOY / "systemd/keylatch.service").read_text()


def syscall_groups() -> dict[str, set[str]]:
    """The calls of each of systemd's groups, and of those within."""
    analyze = require_program(shutil.which("systemd-analyze"), "systemd")
    output = subprocess.run([analyze, "syscall-filter"], capture_output=True, text=True).stdout
    named = {
        block.split()[0]: {line.strip() for line in block.splitlines()[1:] if "#" not in line}
        for block in re.split(r"\n(?=@)", output)
    }

    def flat(group: str) -> set[str]:
        inner = {name for name in named[group] if name.startswith("@")}
        return (named[group] - inner).union(*map(flat, inner))

    return {group: flat(group) for group in named if group.startswith("@")}


def test_the_sidecar_bears_its_locks(tmp_path: Path) -> None:
    """It makes its store, checks keys and stops behind the unit's filter of system calls, and with
    uvloop and argon2 in memory that is never both written and run."""
    allowed: set[str] = set()
    known = syscall_groups()
    for line in unit()["SystemCallFilter"]:
        groups = set().union(*(known[group] for group in line.removeprefix("~").split()))
        allowed = allowed - groups if line.startswith("~") else allowed | groups
    assert unit()["MemoryDenyWriteExecute"] == ["yes"]
    environment = {"KEYLATCH_STORE": f"sqlite:///{tmp_path}/keys.db"}

    def locked(*words: str, **options: Any) -> "subprocess.Popen[bytes]":
        worker = [sys.executable, str(WORKER)]
        command = [*worker, ",".join(sorted(allowed)), *words]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, **options)

    place, admin = tmp_path / "keylatch.sock", tmp_path / "admin.sock"
    created = locked("keys", "create", "--name", "me", stderr=subprocess.DEVNULL)
    token = created.communicate()[0].strip()
    assert created.returncode == 0
    field = b"Authorization: Bearer " + token
    log = tmp_path / "log"

    def is_ready() -> bool:
        assert served.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return send(place, b"GET /readyz").status == 200
        return False

    with log.open("wb") as output:
        served = locked("serve", "--uds", str(place), "--admin-uds", str(admin), stderr=output)
    try:
        eventually(is_ready)
        assert send(place, b"GET /verify", field).status == 200
        assert send(admin, b"GET /v1/api-keys", field).status == 200
        served.terminate()
        served.communicate(timeout=20)
        assert served.returncode == 0, log.read_text()
    finally:
        served.kill()
        served.wait()
    denied = subprocess.run(
        [sys.executable, str(WORKER), "write", "serve"],
        env=environment,
        capture_output=True,
    )
    assert denied.returncode != 0, "the locks are real: nothing runs with one call alone"


# Kubernetes


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_knows_the_resources(name: str) -> None:
    """By its schemas, strictly; of the kinds that are not its own only their names are known."""
    for resource in documents(name):
        if resource["kind"] in WITHOUT_SCHEMA:
            with pytest.raises(kubernetes_validate.SchemaNotFoundError):
                kubernetes_validate.validate(resource, "1.31", strict=True)
        else:
            kubernetes_validate.validate(resource, "1.31", strict=True)
            broken = twin(resource, lambda each: each.update(sepc={}))
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("resources", [SIDECAR, ALONE], ids=["sidecar", "keylatch"])
def test_a_pod_is_restricted(resources: list[Any]) -> None:
    """By Kubernetes' restricted profile, and with a read-only file system."""
    pod = pod_of(resources)
    assert manifests.flaws_of_pod(pod) == []
    last = pod["containers"][-1]["name"]
    changes: list[Change] = [
        lambda spec: spec.update(hostNetwork=True),
        lambda spec: spec.pop("enableServiceLinks"),
        lambda spec: spec["securityContext"].pop("seccompProfile"),
        lambda spec: spec["securityContext"].pop("runAsNonRoot"),
        lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        lambda spec: containers(spec)[last]["securityContext"].update(runAsUser=0),
        lambda spec: containers(spec)[last]["securityContext"].pop("readOnlyRootFilesystem"),
        lambda spec: containers(spec)[last]["securityContext"].update(privileged=True),
        lambda spec: containers(spec)[last]["securityContext"].pop("capabilities"),
        lambda spec: containers(spec)[last].update(image="keylatch"),
        lambda spec: containers(spec)[last].update(ports=[{"containerPort": 1, "hostPort": 1}]),
    ]
    for change in changes:
        assert len(manifests.flaws_of_pod(twin(pod, change))) >= 1


def test_what_a_pod_mounts_is_there() -> None:
    """Every volume that is mounted is one of the pod's, and every one of the pod's is mounted."""
    for resources in (SIDECAR, ALONE):
        pod = pod_of(resources)
        mounted = {
            mount["name"] for each in containers(pod).values() for mount in each["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        labels = of_kind(resources, "Deployment")[0]["spec"]["template"]["metadata"]["labels"]
        for resource in resources:
            spec = resource["spec"]
            selector = spec.get("podSelector") or spec["selector"]
            assert selector in (labels, {"matchLabels": labels})


def test_the_sidecar_in_the_pod_is_on_the_loopback() -> None:
    """nginx calls it there as on one host; no client outside of the pod can."""
    keylatch = containers(pod_of(SIDECAR))["keylatch"]
    assert keylatch["restartPolicy"] == "Always", "a sidecar: there before the app, and after it"
    options = manifests.options_of(keylatch["args"])
    assert (options["host"], options["port"]) == ("127.0.0.1", 8700)
    assert (options["admin_host"], options["admin_port"]) == ("127.0.0.1", 8701)
    assert "ports" not in keylatch
    values = {each["name"]: each.get("value", "sqlite:///x") for each in keylatch["env"]}
    assert manifests.settings_mistakes(values) == []
    assert values["KEYLATCH_VERIFY_REQUEST"] == "forwarded"
    policy = of_kind(SIDECAR, "NetworkPolicy")[0]["spec"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8080}]}]
    assert policy["policyTypes"] == ["Ingress"]


def test_the_sidecar_on_its_own_answers_proxies_alone() -> None:
    """On the network there is no management, and not every pod may connect."""
    keylatch = containers(pod_of(ALONE))["keylatch"]
    options = manifests.options_of(keylatch["args"])
    assert (options["host"], options["port"]) == ("0.0.0.0", 8700)
    assert (options["admin_host"], options["admin_port"]) == ("127.0.0.1", 8701)
    assert keylatch["ports"] == [{"name": "http", "containerPort": 8700}]
    paths = {
        name: keylatch[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")
    }
    assert paths == {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    (service,) = of_kind(ALONE, "Service")
    assert service["metadata"]["name"] == "keylatch"
    assert service["spec"]["ports"][0]["port"] == 8700
    assert manifests.unexpected_clients(ALONE) == []
    changes: list[Change] = [
        lambda each: of_kind(each, "Service")[0]["spec"].update(type="LoadBalancer"),
        lambda each: of_kind(each, "NetworkPolicy")[0]["spec"]["ingress"][0].pop("from"),
        lambda each: of_kind(each, "NetworkPolicy")[0]["spec"]["ingress"].append({"from": []}),
        lambda each: of_kind(each, "NetworkPolicy")[0]["spec"]["ingress"][0]["from"].append(
            {"namespaceSelector": {}}
        ),
    ]
    for change in changes:
        assert manifests.unexpected_clients(twin(ALONE, change))


@pytest.mark.parametrize(("found", "drains"), [(ALONE, True), (SIDECAR, False)])
def test_a_pod_that_is_stopped_goes_on_for_a_while(found: Any, *, drains: bool) -> None:
    """Until proxies send it nothing more; and it is not killed before it has finished."""
    pod = pod_of(found)
    assert manifests.flaws_of_stop(pod, drains=drains) == []
    changes: list[tuple[Change, str]] = [
        (lambda each: each.pop("terminationGracePeriodSeconds"), "killed before it has finished"),
        (lambda each: each.update(terminationGracePeriodSeconds=15), "killed before"),
    ]
    if drains:
        changes.append(
            (lambda each: each["containers"][0].update(args=["serve"]), "before proxies")
        )
    else:
        changes.append((lambda each: containers(each)["nginx"].pop("lifecycle"), "before proxies"))
        changes.append((lambda each: containers(each)["app"].pop("lifecycle"), "before nginx"))
    for change, flaw in changes:
        assert flaw in str(manifests.flaws_of_stop(twin(pod, change), drains=drains))


def test_each_proxy_sends_the_facts_that_its_sidecar_expects() -> None:
    """X-Original-…, the request line, X-Forwarded-…; with another source, a sidecar refuses all."""
    values = {each["name"]: each.get("value", "") for each in pod_of(ALONE)["containers"][0]["env"]}
    assert values["KEYLATCH_VERIFY_REQUEST"] == "original"
    assert values["KEYLATCH_EXT_AUTHZ_REQUEST"] == "envoy"
    for name, word in {
        "kubernetes/ingress-nginx.yaml": "VERIFY_REQUEST=original",
        "kubernetes/gateway-api.yaml": "EXT_AUTHZ_REQUEST=envoy",
        "kubernetes/istio.yaml": "EXT_AUTHZ_REQUEST=envoy",
        "apisix/apisix.yaml": "VERIFY_REQUEST=forwarded",
    }.items():
        head = (DEPLOY / name).read_text().partition("\n\n")[0]
        assert f"KEYLATCH_{word}" in head
    with pytest.raises(ConfigurationError):
        manifests.settings_mistakes({"KEYLATCH_VERIFY_REQUEST": "guess"})
    assert manifests.settings_mistakes({"KEYLATCH_VERIFY_FACT": "none"})
    with pytest.raises(Exception, match="No such option"):
        manifests.options_of(["serve", "--admin-prot", "8701"])


# Prometheus


def the_units_arguments() -> list[str]:
    return shlex.split(unit()["ExecStart"][0].replace("%t", "/run"))[1:]


DEPLOYMENTS: dict[str, list[str]] = {
    "systemd": the_units_arguments(),
    "compose": COMPOSE["services"]["keylatch"]["command"],
    "sidecar": containers(pod_of(SIDECAR))["keylatch"]["args"],
    "keylatch": containers(pod_of(ALONE))["keylatch"]["args"],
}
METRICS_PORT = 8702


def scraped(resources: list[Any]) -> list[int]:
    """The ports that pods in the namespace `monitoring` may reach."""
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    rules = [
        rule
        for policy in of_kind(resources, "NetworkPolicy")
        for rule in policy["spec"]["ingress"]
        if rule.get("from") == [peer]
    ]
    return [port["port"] for rule in rules for port in rule["ports"]]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_prometheus_finds_the_metrics(name: str) -> None:
    """On a port of their own, and where it can come from: the host's loopback, or the pod's
    address, if the network permits it; never on the listener for proxies."""
    options = manifests.options_of(DEPLOYMENTS[name])
    assert options["metrics_port"] == METRICS_PORT
    assert options["metrics_host"] == ("127.0.0.1" if name == "systemd" else "0.0.0.0")
    assert options["metrics_port"] not in (options["port"], options["admin_port"])
    if name == "compose":
        published = COMPOSE["services"]["pod"]["ports"]
        assert f"127.0.0.1:{METRICS_PORT}:{METRICS_PORT}" in published
    if name in ("sidecar", "keylatch"):
        resources = {"sidecar": SIDECAR, "keylatch": ALONE}[name]
        assert scraped(resources) == [METRICS_PORT]
        (deployment,) = of_kind(resources, "Deployment")
        notes = deployment["spec"]["template"]["metadata"]["annotations"]
        assert notes == {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(METRICS_PORT),
        }
        assert METRICS_PORT not in [
            port["port"] for each in of_kind(resources, "Service") for port in each["spec"]["ports"]
        ]


@pytest.mark.long
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_metrics_are_there(tmp_path: Path, name: str) -> None:
    """The very arguments that are shipped, on other ports and in another folder, and Prometheus'
    own request. Without the option there is no such page where it could look."""
    ports = {str(port): str(free_port()) for port in (8700, 8701, METRICS_PORT)}
    words = [
        ports.get(word, re.sub(r"^/run/keylatch", str(tmp_path), word))
        for word in DEPLOYMENTS[name]
    ]
    main = next((word for word in words if word.endswith("keylatch.sock")), None)
    if main is None:
        words += ["--port", ports["8700"]]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KEYLATCH_")},
        "KEYLATCH_STORE": f"sqlite:///{tmp_path}/keys.db",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "keylatch_sidecar", *words],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    metrics = f"http://127.0.0.1:{ports[str(METRICS_PORT)]}"

    def is_there() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return send(metrics, b"GET /metrics").body.startswith(
                b"# HELP keylatch_decisions_total"
            )
        return False

    try:
        eventually(is_there)
        target = Path(main) if main else f"http://127.0.0.1:{ports['8700']}"
        assert send(target, b"GET /metrics").status == 404
        assert send(target, b"GET /readyz").body == b'{"status":"ok"}'
    finally:
        process.kill()
        process.wait()


def test_the_ports_are_distinguished() -> None:
    """Management, metrics, gRPC and Traefik's own entry point can all run on one host."""
    traefik = (DEPLOY / "traefik/traefik.yaml").read_text()
    envoy = (DEPLOY / "envoy/envoy-grpc.yaml").read_text()
    used = {
        "management": [str(manifests.options_of(DEPLOYMENTS["keylatch"])["admin_port"])],
        "metrics": [str(METRICS_PORT)],
        "gRPC": re.findall(r"--grpc-port (\d+)", envoy),
        "Traefik": re.findall(r"address: 127.0.0.1:(87\d\d)", traefik),
    }
    ports = [port for each in used.values() for port in each]
    assert len(ports) == len(set(ports)) == len(used)


# What proxies require

BROWSER = frozenset(("origin", "access-control-request-method"))
QUESTIONS = {
    Request("GET", "/"): "FULL",
    Request("GET", "/v1/me"): "FULL",
    Request("DELETE", "/v1/me"): "FULL",
    Request("GET", "/v1/emails"): "FULL",
    Request("POST", "/v1/emails/"): "FULL",
    Request("POST", "/v1/emailsx"): "FULL",
    Request("POST", "/v1/emails/batch/x"): "FULL",
    Request("POST", "/x/v1/emails"): "FULL",
    Request("POST", "/v1/emails"): "SENDING",
    Request("POST", "/v1/emails/batch"): "SENDING",
    Request("GET", "/healthz"): None,
    Request("GET", "/healthz/x"): "FULL",
    Request("GET", "/healthzx"): "FULL",
    Request("GET", "/x/healthz"): "FULL",
    Request("OPTIONS", "/v1/me"): "FULL",
    Request("OPTIONS", "/v1/emails"): "FULL",
    Request("OPTIONS", "/v1/me", frozenset(("origin",))): "FULL",
    Request("OPTIONS", "/v1/me", frozenset(("access-control-request-method",))): "FULL",
    Request("OPTIONS", "/v1/me", BROWSER): None,
    Request("OPTIONS", "/v1/emails", BROWSER): None,
    Request("GET", "/v1/me", BROWSER): "FULL",
    Request("GET", "/chat", frozenset(("upgrade",))): "FULL",
}
each_question = pytest.mark.parametrize(
    ("request_", "permission"),
    QUESTIONS.items(),
    ids=[f"{each.method} {each.path} {'+'.join(sorted(each.headers))}" for each in QUESTIONS],
)


@each_question
def test_istio_checks_requests(request_: Request, permission: str | None) -> None:
    """One check per request, for the right permission."""
    policies = of_kind(ISTIO, "AuthorizationPolicy")
    required = manifests.asked_by_istio(policies, MESH, request_)
    assert required == ({permission} if permission else set())


@each_question
def test_a_gateway_checks_requests(request_: Request, permission: str | None) -> None:
    """About everything but what is public; it cannot say for which permission."""
    (route,) = of_kind(GATEWAY, "HTTPRoute")
    assert manifests.asked_by_gateway(route, request_) == (permission is not None)


@each_question
def test_ingress_nginx_checks_requests(request_: Request, permission: str | None) -> None:
    """By path alone: what is said of a path holds for all of its methods, and CORS is its own."""
    if request_.path in ("/v1/emails", "/v1/emails/batch"):
        permission = "SENDING"
    elif request_.headers == BROWSER:
        permission = "FULL"
    assert manifests.asked_by_ingress_nginx(of_kind(INGRESS, "Ingress"), request_) == permission


@each_question
def test_apisix_checks_requests(request_: Request, permission: str | None) -> None:
    """The route with the highest priority that fits, and WebSockets on one of their own."""
    assert manifests.asked_by_apisix(APISIX, request_) == permission


TRICKS = ["//v1/emails", "/v1/./emails", "/v1/%65mails", "/admin/..%2fv1/emails", "/%68ealthz"]


@pytest.mark.parametrize("path", TRICKS)
def test_apisix_needs_full_for_another_spelling_of_a_path(path: str) -> None:
    """Its routes see the resolved path; without `vars` such a request would need less."""
    request = Request("POST", path)
    assert manifests.asked_by_apisix(APISIX, request) == "FULL"
    naive = twin(APISIX, lambda each: [route.pop("vars", 0) for route in each["routes"][2:3]])
    naive["routes"][0].pop("vars")
    assert manifests.asked_by_apisix(naive, request) != "FULL"


def test_ingress_nginx_hands_on_the_path_that_it_compared() -> None:
    """Where a route needs less than FULL; the raw path could be another route of the app."""

    def raw(ingresses: list[Any]) -> list[str]:
        found = []
        for ingress in ingresses:
            notes = {
                name.partition("/")[2]: text
                for name, text in ingress["metadata"]["annotations"].items()
            }
            path = ingress["spec"]["rules"][0]["http"]["paths"][0]["path"]
            whole = re.fullmatch(r"/\([\w/|]+\)\$", path) and notes.get("rewrite-target") == "/$1"
            if not whole and not notes.get("auth-url", "").endswith("?permission=FULL"):
                found.append(ingress["metadata"]["name"])
            assert notes["use-regex"] == "true"
        return found

    ingresses = of_kind(INGRESS, "Ingress")
    assert raw(ingresses) == []
    broken = copy.deepcopy(ingresses)
    broken[1]["metadata"]["annotations"].pop("nginx.ingress.kubernetes.io/rewrite-target")
    assert raw(broken) == ["app-sending"]


def test_a_policy_without_rules_would_check_no_request() -> None:
    """Why istio.yaml warns of it: Istio takes such a policy for one that fits nothing."""
    policies = of_kind(ISTIO, "AuthorizationPolicy")
    assert {policy["spec"]["action"] for policy in policies} == {"CUSTOM"}
    broken = twin(policies, lambda each: each[0]["spec"].pop("rules"))
    assert manifests.asked_by_istio(broken, MESH, Request("GET", "/v1/me")) == set()


def test_istio_s_providers() -> None:
    """Each checks one permission with a timeout, and copies all identity headers."""
    (service,) = of_kind(ALONE, "Service")
    for provider in MESH["meshConfig"]["extensionProviders"]:
        asks = provider["envoyExtAuthzHttp"]
        assert asks["service"] == f"{service['metadata']['name']}.default.svc.cluster.local"
        assert asks["port"] == service["spec"]["ports"][0]["port"]
        assert (asks["pathPrefix"], asks["timeout"]) == ("/ext_authz", "1s")
        assert asks["headersToUpstreamOnAllow"] == IDENTITY
        (permission,) = asks["includeAdditionalHeadersInCheck"].values()
        assert provider["name"] == f"keylatch-{permission.lower()}"
        assert "x-keylatch-require" not in asks["includeRequestHeadersInCheck"]
    used = {each["spec"]["provider"]["name"] for each in of_kind(ISTIO, "AuthorizationPolicy")}
    assert used == {each["name"] for each in MESH["meshConfig"]["extensionProviders"]}


LIES = ["x-keylatch-key-id", "x_keylatch_key_id", "x-keylatch_key-id", "x.keylatch.key.id"]
OVERRIDES = ["x-http-method-override", "x-http-method", "x-method-override"]


@pytest.mark.parametrize("name", [*LIES, *OVERRIDES, "x-keylatch-require"])
def test_istio_removes_what_only_looks_like_the_answer(name: str) -> None:
    """Before the check, by the same expressions as deploy/envoy; and the key after it."""
    (filters,) = of_kind(ISTIO, "EnvoyFilter")
    early, late = filters["spec"]["configPatches"]
    (extension,) = early["patch"]["value"]["typed_config"]["early_header_mutation_extensions"]
    expressions = [
        each["remove_on_match"]["key_matcher"]["safe_regex"]["regex"]
        for each in extension["typed_config"]["mutations"]
    ]
    assert any(re.fullmatch(expression, name) for expression in expressions)
    assert not any(re.fullmatch(expression, "authorization") for expression in expressions)
    mutations = late["patch"]["value"]["typed_config"]["mutations"]["request_mutations"]
    assert (late["patch"]["operation"], mutations) == (
        "INSERT_BEFORE",
        [{"remove": "authorization"}],
    )


def test_a_gateway_removes_what_only_looks_like_the_answer() -> None:
    """The identity on public routes only: on others the check may have run before."""
    (route,) = of_kind(GATEWAY, "HTTPRoute")
    public, rest = route["spec"]["rules"]
    removed = [
        set(each["requestHeaderModifier"]["remove"])
        for rule in (public, rest)
        for each in rule["filters"]
        if each["type"] == "RequestHeaderModifier"
    ]
    underscored = {name.replace("-", "_") for name in IDENTITY}
    for names in removed:
        assert {"authorization", *OVERRIDES, *underscored} <= names
        assert len(names) <= 16, "more than the API takes"
    assert set(IDENTITY) <= removed[0]
    assert not set(IDENTITY) & removed[1]
    ext_authz = rest["filters"][0]["externalAuth"]
    assert (ext_authz["protocol"], ext_authz["http"]["path"]) == ("HTTP", "/ext_authz")
    assert ext_authz["http"]["allowedHeaders"] == [], "x-keylatch-require would be the client's"
    assert ext_authz["http"]["allowedResponseHeaders"] == IDENTITY
    assert ext_authz["backendRef"] == {"name": "keylatch", "port": 8700}


LUA = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")


def test_apisix_s_function_runs(tmp_path: Path) -> None:
    """In the very Lua that APISIX is made of, past a hundred headers, whatever nginx accepts."""
    nginx = require_program(
        shutil.which("nginx", path=SEARCHED) if LUA.exists() else None, "libnginx-mod-http-lua"
    )
    (function,) = APISIX["global_rules"][0]["plugins"]["serverless-pre-function"]["functions"]
    (tmp_path / "function.lua").write_text(function)
    port = free_port()
    (tmp_path / "nginx.conf").write_text(
        f"""
        load_module {LUA.with_name("ndk_http_module.so")};
        load_module {LUA};
        daemon off; master_process off; pid nginx.pid; error_log error.log;
        events {{}}
        http {{
            access_log off; underscores_in_headers on; ignore_invalid_headers off;
            {" ".join(f"{word}_temp_path {word};" for word in ("client_body", "proxy", "fastcgi"))}
            {" ".join(f"{word}_temp_path {word};" for word in ("uwsgi", "scgi"))}
            server {{ listen 127.0.0.1:{port}; location / {{ content_by_lua_block {{
                local request = {{ set_header = function(_, ...) ngx.req.set_header(...) end }}
                package.loaded["apisix.core"] = {{ request = request }}
                loadfile("{tmp_path}/function.lua")()({{}}, {{}})
                local left = ""
                for name in pairs(ngx.req.get_headers(0)) do left = left .. name .. " " end
                ngx.header.content_length = #left
                ngx.print(left)
            }} }} }}
        }}"""
    )
    process = subprocess.Popen(
        [nginx, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        with contextlib.suppress(OSError):
            return send(url, b"GET /").status == 200
        return False

    try:
        eventually(answers)
        many = [f"y-{number}: 1" for number in range(150)]
        fields = [*many, *(f"{name}: evil" for name in [*LIES, *IDENTITY, *OVERRIDES])]
        fields += ["x-keylatch: 1", "Authorization: Bearer x"]
        answer = send(url, b"GET /", *(field.title().encode() for field in fields))
    finally:
        process.kill()
        process.wait()
    left = {name for name in answer.body.decode().split() if not name.startswith("y-")}
    assert left == {"host", "connection", "authorization"}


def test_apisix_removes_what_only_looks_like_the_answer() -> None:
    """Ahead of all routes, every look-alike; and the key after the check, on every route."""
    (rule,) = APISIX["global_rules"]
    plugin = rule["plugins"]["serverless-pre-function"]
    (function,) = plugin["functions"]
    assert plugin["phase"] == "rewrite"
    assert 'name:find("^x[^%w]keylatch")' in function
    assert "get_headers(0)" in function, "all headers, or the hundred-and-first would pass"
    (config,) = documents("apisix/config.yaml")
    assert config["nginx_config"]["http"]["underscores_in_headers"] == "off"
    used = set(rule["plugins"]).union(*(each["plugins"] for each in APISIX["services"]))
    assert used == set(config["plugins"])
    assert config["apisix"]["node_listen"] == [{"ip": "127.0.0.1", "port": 8080}]
    assert (DEPLOY / "apisix/apisix.yaml").read_text().endswith("\n#END\n"), "or it loads nothing"
    for service in APISIX["services"]:
        assert service["plugins"]["proxy-rewrite"] == {"headers": {"remove": ["Authorization"]}}
        forward_auth = service["plugins"].get("forward-auth")
        assert (forward_auth is None) == (service["id"] == "public")
        if forward_auth is not None:
            assert forward_auth["upstream_headers"] == IDENTITY
            assert forward_auth["request_headers"] == ["Authorization"]
            assert forward_auth["timeout"] == 1000
            assert {"WWW-Authenticate", "Retry-After", "Content-Type"} <= set(
                forward_auth["client_headers"]
            )
    upgraded = [route["id"] for route in APISIX["routes"] if route.get("enable_websocket")]
    assert upgraded == ["websockets"], "every other Upgrade would lead past the check"
    assert list(APISIX["upstreams"][0]["nodes"]) == ["127.0.0.1:8000"]

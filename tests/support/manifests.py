"""Models of the files in `deploy/` that no test runs: parsed, validated, evaluated on requests.

A judge returns what is wrong, in words, so that a test can show that it sees the broken twin of
what we ship. An `asked_by_…` returns what a proxy would require of a key, by the proxy's own rules.
"""

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import typer
import yaml

from keylatch.settings import Settings
from keylatch_sidecar.cli.program import cli
from keylatch_sidecar.settings import ProxySettings
from tests.support.proxies import DEPLOY, IDENTITY

LOAD_BALANCER_SECONDS = 5
"""What kube-proxy and Ingress controllers may take until they send nothing to a stopped pod."""
STOP_SECONDS = 15
"""What keylatch may take to finish: a DELETE, and one lease period to store what it has counted."""
SETTINGS = Settings.model_fields | ProxySettings.model_fields


class Strict(yaml.SafeLoader):
    """YAML in which no key comes twice: the last of them would win, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key, deep) for key, _ in node.value if key.tag[-5:] != "merge"
        ]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.MarkedYAMLError(problem=f"{twice} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def documents(name: str) -> list[Any]:
    """All that a YAML file in `deploy/` holds."""
    return list(yaml.load_all((DEPLOY / name).read_text(), Strict))


def of_kind(found: Iterable[Any], kind: str) -> list[Any]:
    """The Kubernetes resources of one kind."""
    return [each for each in found if each.get("kind") == kind]


def parts(value: Any) -> Iterator[Any]:
    """A value and all that is in it."""
    yield value
    for each in value.values() if isinstance(value, dict) else ():
        yield from parts(each)
    for each in value if isinstance(value, list) else ():
        yield from parts(each)


# Judges


def open_doors(value: Any) -> list[str]:
    """Settings that would allow requests while the sidecar is down, or revoked keys."""
    found = []
    for each in parts(value):
        if not isinstance(each, dict):
            continue
        for name in ("failOpen", "failure_mode_allow", "failureModeAllow", "allow_degradation"):
            if each.get(name):
                found.append(f"{name} is on")
        for name in ("statusOnError", "status_on_error"):
            if name in each and str(each[name]) != "503":
                found.append(f"{name} is {each[name]}")
        notes = {str(name).partition("/")[2]: text for name, text in each.items()}
        if "auth-cache-key" in notes and "auth-cache-duration" not in notes:
            found.append("auth-cache-key keeps allows for 5 minutes")
        for name in {"auth-signin", "auth-snippet"} & set(notes):
            found.append(f"{name} answers in the sidecar's place")
    return found


def half_identities(value: Any) -> list[str]:
    """Lists that name some of the identity headers: the client's own would come for the others."""
    found = []
    lists = [each for each in parts(value) if isinstance(each, list)]
    for each in (each for each in parts(value) if isinstance(each, dict)):
        lists += [text.split(",") for text in each.values() if isinstance(text, str)]
    for names in lists:
        present = {name for name in names if isinstance(name, str)} & set(IDENTITY)
        found += [f"{name} is missing" for name in IDENTITY if present and name not in present]
    return found


def settings_mistakes(environment: dict[str, str]) -> list[str]:
    """`KEYLATCH_*` variables that are no settings, and values that would stop the start."""
    given = {
        name.removeprefix("KEYLATCH_").lower(): value
        for name, value in environment.items()
        if name.startswith("KEYLATCH_")
    }
    wrong = [f"{name} is no setting" for name in given if name not in SETTINGS]
    for kind in (Settings, ProxySettings):
        own = {name: value for name, value in given.items() if name in kind.model_fields}
        kind.load(**own)
    return wrong


def options_of(arguments: Sequence[str]) -> dict[str, Any]:
    """What `keylatch serve` takes these arguments for.

    Raises:
        Exception: it rejects them.
    """
    command, *rest = arguments
    assert command == "serve"
    serve = typer.main.get_group(cli).commands["serve"]
    return serve.make_context("serve", list(rest)).params


def flaws_of_pod(spec: Any) -> list[str]:
    """What Kubernetes' restricted profile would refuse, and our requirements beyond it."""
    pod = spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    if spec.get("automountServiceAccountToken") is not False:
        found.append("has a token for the cluster")
    if spec.get("enableServiceLinks") is not False:
        found.append("gets KEYLATCH_* variables from a Service of that name")
    kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
    found += [f"volume {kind}" for kind in kinds - {"configMap", "emptyDir", "secret"}]
    for container in spec.get("initContainers", []) + spec["containers"]:
        own = pod | container.get("securityContext", {})
        wrong = {
            "may be root": not own.get("runAsNonRoot") or not own.get("runAsUser"),
            "may gain privileges": own.get("allowPrivilegeEscalation") is not False,
            "has capabilities": own.get("capabilities") != {"drop": ["ALL"]},
            "may write to its files": own.get("readOnlyRootFilesystem") is not True,
            "may call all of the kernel": own.get("seccompProfile") != {"type": "RuntimeDefault"},
            "has no memory limit": "memory" not in container["resources"]["limits"],
            "is privileged": bool(own.get("privileged")),
            "listens on the node": any("hostPort" in port for port in container.get("ports", [])),
            "has no tag": not re.search(r":[\w.]+$|@sha256:", container["image"]),
        }
        found += [f"{container['name']} {what}" for what, is_so in wrong.items() if is_so]
    return found


def flaws_of_stop(spec: Any, *, drains: bool) -> list[str]:
    """Where a pod that is stopped refuses requests that proxies still send, or is killed amid its
    work.

    Args:
        spec: of the pod.
        drains: whether the proxies call keylatch, and not another container.
    """
    found: list[str] = []
    stops: dict[str, float] = {}
    for container in spec.get("initContainers", []) + spec["containers"]:
        hook = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        stops[container["name"]] = hook.get("seconds", 0)
        if container["name"] == "keylatch":
            stops["keylatch"] += float(options_of(container["args"])["drain"] or 0)
    called = "keylatch" if drains else "nginx"
    if stops[called] < LOAD_BALANCER_SECONDS:
        found.append(f"{called} stops before proxies know")
    if not drains and stops["app"] <= stops["nginx"]:
        found.append("the app stops before nginx")
    if spec.get("terminationGracePeriodSeconds", 0) < max(stops.values()) + STOP_SECONDS:
        found.append("is killed before it has finished")
    return found


def flaws_of_service(service: Any) -> list[str]:
    """What is missing around one service in a Compose file."""
    wrong = {
        "may write to its files": service.get("read_only") is not True,
        "has capabilities": service.get("cap_drop") != ["ALL"] or "cap_add" in service,
        "may gain privileges": service.get("security_opt") != ["no-new-privileges:true"],
        "is privileged": bool(service.get("privileged")),
        "has no limits": not {"mem_limit", "pids_limit", "cpus"} <= set(service),
        "listens to the world": any(
            not str(port).startswith("127.0.0.1:") for port in service.get("ports", [])
        ),
    }
    return [what for what, is_so in wrong.items() if is_so]


def unexpected_clients(found: Iterable[Any]) -> list[str]:
    """Ways in which every client could reach port 8700."""
    wrong = []
    for service in of_kind(found, "Service"):
        kind = service["spec"].get("type", "ClusterIP")
        if kind != "ClusterIP":
            wrong.append(f"a {kind}")
    for policy in of_kind(found, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            ports = [port["port"] for port in rule.get("ports", [])]
            peers = rule.get("from", [])
            selectors = [selector for peer in peers for selector in peer.values()]
            if (8700 in ports or not ports) and (not peers or not all(selectors)):
                wrong.append("a policy without a selector")
    return wrong


# What proxies would send


@dataclass(frozen=True)
class Request:
    """A request, by what proxies look at."""

    method: str
    path: str
    headers: frozenset[str] = field(default_factory=frozenset)

    @property
    def resolved(self) -> str:
        """The path as nginx compares it."""
        return re.sub("^//", "/", posixpath.normpath(unquote(self.path))) + (
            "/" if self.path.endswith("/") and self.path != "/" else ""
        )


def asked_by_istio(policies: Iterable[Any], mesh: Any, request: Request) -> set[str]:
    """The permissions of the providers of all CUSTOM policies that match."""
    asks = {
        provider["name"]: provider["envoyExtAuthzHttp"]["includeAdditionalHeadersInCheck"]
        for provider in mesh["meshConfig"]["extensionProviders"]
    }
    return {
        asks[policy["spec"]["provider"]["name"]]["x-keylatch-require"]
        for policy in policies
        if any(_istio_fits(rule, request) for rule in policy["spec"].get("rules", []))
    }


def _istio_fits(rule: Any, request: Request) -> bool:
    path = request.resolved
    for to in rule.get("to", []):
        operation = to["operation"]
        assert set(operation) <= {"paths", "notPaths", "methods", "notMethods"}
        if (
            path not in operation.get("paths", [path])
            or path in operation.get("notPaths", [])
            or request.method not in operation.get("methods", [request.method])
            or request.method in operation.get("notMethods", [])
        ):
            return False
    for condition in rule.get("when", []):
        assert condition["notValues"] == ["*"]
        if re.findall(r"\[(.*)\]", condition["key"])[0] in request.headers:
            return False
    return True


def asked_by_gateway(route: Any, request: Request) -> bool:
    """Whether the best match of an HTTPRoute has the ExternalAuth filter."""
    best: tuple[tuple[bool, int, bool, int], bool] | None = None
    for rule in route["spec"]["rules"]:
        asks = any(filter_["type"] == "ExternalAuth" for filter_ in rule.get("filters", []))
        for match in rule["matches"]:
            kind, path = match["path"]["type"], match["path"]["value"]
            headers = {header["name"].lower() for header in match.get("headers", [])}
            fits = request.path == path
            if kind == "PathPrefix":
                fits = fits or request.path.startswith(path.rstrip("/") + "/")
            fits = fits and match.get("method", request.method) == request.method
            rank = (kind == "Exact", len(path), "method" in match, len(headers))
            if fits and headers <= request.headers and (best is None or rank > best[0]):
                best = rank, asks
    return best is not None and best[1]


def asked_by_ingress_nginx(ingresses: Iterable[Any], request: Request) -> str | None:
    """The permission of the location that nginx uses: the longest of the expressions that match."""
    locations = [
        (path["path"], ingress["metadata"]["annotations"])
        for ingress in ingresses
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    for path, notes in sorted(locations, key=lambda each: -len(each[0])):
        if re.match(f"(?i){path}", request.resolved):
            url = notes.get("nginx.ingress.kubernetes.io/auth-url", "")
            return url.partition("?permission=")[2] or None
    raise AssertionError("no location")


def asked_by_apisix(configuration: Any, request: Request) -> str | None:
    """The permission of the service of the matching route with the highest priority."""
    services = {service["id"]: service for service in configuration["services"]}
    for route in sorted(configuration["routes"], key=lambda each: -each["priority"]):
        fits = bool({"/*", request.resolved} & set(route["uris"]))
        fits = fits and request.method in route.get("methods", [request.method])
        if fits and all(_apisix_fits(condition, request) for condition in route.get("vars", [])):
            plugin = services[route["service_id"]]["plugins"].get("forward-auth", {})
            return plugin.get("uri", "").partition("?permission=")[2] or None
    raise AssertionError("no route")


def _apisix_fits(condition: Any, request: Request) -> bool:
    variable, operator, pattern = condition
    name = variable.removeprefix("http_").replace("_", "-")
    value = request.path if variable == "request_uri" else "x" * (name in request.headers)
    flags = {"~~": re.NOFLAG, "~*": re.IGNORECASE}[operator]
    return re.search(pattern, value, flags) is not None

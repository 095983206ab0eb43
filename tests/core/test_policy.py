"""Policy: only named routes are allowed, and all mistakes are reported at once."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from keylatch.core.decisions import ANY_KEY, FULL, ONLY_FULL, Requirement
from keylatch.core.paths import fold_path
from keylatch.core.policy import Policy, route_path
from keylatch.errors import ConfigurationError
from tests.support.raw_http import asgi_request

EMAILS = Policy(
    public=["/healthz"],
    permissions={
        "SENDING": ["POST /v1/emails", "GET /v1/emails"],
        "READING": ["GET /v1/emails"],
        "IDLE": [],
    },
)


@pytest.mark.parametrize(
    ("method", "path", "sufficient", "scope"),
    [
        ("POST", "/v1/emails", {"FULL", "SENDING"}, "SENDING"),
        ("GET", "/v1/emails", {"FULL", "SENDING", "READING"}, "READING SENDING"),
        ("HEAD", "/v1/emails", {"FULL", "SENDING", "READING"}, "READING SENDING"),
        ("DELETE", "/v1/emails", {"FULL"}, "FULL"),
        ("post", "/v1/emails", {"FULL"}, "FULL"),
        ("OPTIONS", "/v1/emails", {"FULL"}, "FULL"),
        ("POST", "/v1/emails/", {"FULL"}, "FULL"),
        ("POST", "/v1/emails/batch", {"FULL"}, "FULL"),
        ("POST", "/v1/email", {"FULL"}, "FULL"),
        ("POST", "/v1/EMAILS", {"FULL"}, "FULL"),
        ("POST", "//v1/emails", {"FULL"}, "FULL"),
        ("POST", "/v1/./emails", {"FULL"}, "FULL"),
        ("POST", "", {"FULL"}, "FULL"),
    ],
)
def test_a_permission_allows_the_routes_named_for_it(
    method: str, path: str, sufficient: set[str], scope: str
) -> None:
    """Method and path match exactly; everything else is for FULL."""
    assert EMAILS.requirement_by_rules(method, path) == Requirement(frozenset(sufficient), scope)


@given(st.sampled_from(["GET", "POST", "PUT", "BREW", ""]), st.text(max_size=20))
def test_without_rules_every_route_is_for_full(method: str, path: str) -> None:
    """Fail closed: nothing named, nothing opened."""
    assert Policy().requirement_by_rules(method, path).permissions == frozenset((FULL,))
    assert not Policy().is_public(path)


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/healthz", True),
        *((neighbour, False) for neighbour in ("/healthz/", "/healthzz", "/health", "//healthz")),
        *((neighbour, False) for neighbour in ("/healthz/../v1", "/Healthz", "", "/", "healthz")),
    ],
)
def test_public_paths_match_exactly(path: str, public: bool) -> None:
    """A public path opens none of its neighbours."""
    assert EMAILS.is_public(path) is public


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/a", ""),
        ("/api/a", "/api"),
        ("/api", "/api"),
        ("/api/", "/api"),
        ("/apia", "/api"),
        ("/a", "/api"),
        ("/api/a", "/api/"),
        ("/api/api/a", "/api"),
        ("/", "/"),
        ("", ""),
    ],
)
async def test_a_path_is_matched_as_by_the_router(path: str, root: str) -> None:
    """Policy and router must not disagree on the path: one would guard another door."""

    async def inner(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.path_params["path"])

    app = Starlette(routes=[Route("/{path:path}", inner)])
    app.router.redirect_slashes = False
    answer = await asgi_request(app, path, root_path=root)
    seen = "/" + answer.body.decode() if answer.status == 200 else ""
    assert route_path({"path": path, "root_path": root}) == seen


PARAMETERS = Policy(
    public=["/docs/{page}", "/img/<int:number>"],
    permissions={
        "SENDING": ["GET /v1/emails/{id}", "POST /v1/emails/<string:id>/send"],
        "READING": ["GET /v1/emails/batch", "GET /v1/files/{name:path}", "GET /v1/n/<int:n>"],
        "TALKING": ["GET /v1/emails/{email}"],
        "FULL": ["GET /v1/emails/stats"],
    },
)


@pytest.mark.parametrize(
    ("method", "path", "named"),
    [
        ("GET", "/v1/emails/7", {"SENDING", "TALKING"}),
        ("HEAD", "/v1/emails/7", {"SENDING", "TALKING"}),
        ("POST", "/v1/emails/7", set()),
        ("GET", "/v1/emails/", set()),
        ("GET", "/v1/emails/7/", set()),
        ("GET", "/v1/emails/7/send", set()),
        ("POST", "/v1/emails/7/send", {"SENDING"}),
        ("POST", "/v1/emails/7/send\n", set()),
        ("GET", "/v1/emails/batch", {"READING"}),
        ("GET", "/v1/emails/stats", set()),
        ("GET", "/v1/files/a/b", {"READING"}),
        ("GET", "/v1/n/7", {"READING"}),
        ("GET", "/v1/n/x", set()),
        ("GET", "/x/v1/n/7", set()),
    ],
)
def test_parameters_open_what_they_match(method: str, path: str, named: set[str]) -> None:
    """A parameter is one segment, whole, in the spelling of any framework; a path that is named as
    it is counts before those with parameters."""
    assert PARAMETERS.requirement_by_rules(method, path).permissions == frozenset(named | {FULL})


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/docs/a", True),
        ("/docs/", False),
        ("/docs/a/b", False),
        ("/img/12", True),
        ("/img/x", False),
        ("/docs", False),
    ],
)
def test_public_parameters_open_one_segment(path: str, public: bool) -> None:
    """Never what lies below."""
    assert PARAMETERS.is_public(path) is public


def test_all_mistakes_are_reported_at_once() -> None:
    """Each mistake comes with a hint, so that one restart repairs them all."""
    with pytest.raises(ConfigurationError) as caught:
        Policy(
            public=["healthz", "/docs/*", "/good", "/{rest:path}", "/{a}/{a}"],
            permissions={
                "sending": ["POST /v1/emails"],
                "READING": ["/v1/emails", "GET /v1/{id:word}", "get /v1", "GET  /v1", "GET /good"],
                "WRITING": "POST /v1/emails",
                "PEEKING": ["HEAD /v1/emails"],
            },
            grantable=("FULL", "READING", "WRITING"),
        )
    wrong = [wrong for wrong, _ in caught.value.mistakes]
    assert len(wrong) == 12
    assert all(hint for _, hint in caught.value.mistakes)
    for named in (
        "healthz",
        "/docs/*",
        "/{rest:path}",
        "{a}",
        "{id:word}",
        "PEEKING",
        "sending",
        "WRITING",
        "HEAD /v1/emails",
    ):
        assert any(named in text for text in wrong)
    assert all(text in str(caught.value) for text in wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *("HEAD /a", "get /a", "POST", "POST  /a", " /a", "/a b", "GET/a", "/a\n", "/a%20b", "//a"),
        *(
            "/a//b",
            "/a/../b",
            "/.",
            "/a\\b",
            "/a\x00",
            "/{a:word}",
            "/{a}/{a:int}",
            "/<a>/{a}",
            "/a}",
        ),
    ],
)
def test_what_no_unambiguous_path_can_match_is_a_mistake(wrong: str) -> None:
    """In `public` as in rules: it would open nothing, or something else than is meant."""
    with pytest.raises(ConfigurationError):
        Policy(public=[wrong])
    with pytest.raises(ConfigurationError):
        Policy(permissions={"SENDING": [wrong if wrong.startswith("HEAD") else f"GET {wrong}"]})


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["-O"]])
def test_mistakes_are_reported_without_assertions_as_well(options: list[str]) -> None:
    """`python -O` takes away what Starlette asserts."""
    code = "from keylatch.core.policy import Policy; Policy(['/docs/{page:foo}'])"
    ended = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
    assert "ConfigurationError" in ended.stderr
    assert "/docs/{page:foo}" in ended.stderr


OPEN = Policy(public=["/docs/{page}"], permissions={"SENDING": ["GET /v1/{p:path}"]})


@pytest.mark.parametrize(
    "segment",
    [
        *(
            "a\n",
            "\na",
            "a\x00",
            "a\x1f",
            "a\x7f",
            "a\x85",
            "a\\b",
            "a%41",
            "%",
            "a\ufffd",
            "a\udcff",
        ),
        *(".", "..", "..;x", ".;"),
    ],
)
def test_a_path_that_can_be_read_in_two_ways_is_for_full(segment: str) -> None:
    """Whatever a rule or a public path with parameters would say of it."""
    assert OPEN.requirement_for("GET", f"/docs/{segment}") is ONLY_FULL
    assert OPEN.requirement_for("GET", f"/v1/{segment}") is ONLY_FULL
    assert OPEN.requirement_for("GET", f"/v1/a/{segment}/b") is ONLY_FULL
    assert OPEN.requirement_for("GET", "/v1/a//b") is ONLY_FULL
    assert not OPEN.is_public(f"/docs/{segment}")
    assert OPEN.requirement_by_rules("GET", f"/v1/{segment}") == ONLY_FULL


@pytest.mark.parametrize(
    "segment", ["a.b", "...", ".well-known", "a b", "gr\u00fc\u00dfe", "~", "a;b", "@"]
)
def test_other_paths_are_not(segment: str) -> None:
    """Names of files, words of any language, punctuation."""
    assert OPEN.requirement_for("GET", f"/docs/{segment}") is None
    assert OPEN.requirement_by_rules("GET", f"/v1/{segment}").permissions == frozenset(
        {"FULL", "SENDING"}
    )


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=8))
def test_a_path_is_folded_once(segment: str) -> None:
    """Letter case and a slash at the end tell no two paths apart."""
    plain = fold_path(f"/{segment}")
    assert fold_path(f"/{segment}/") == plain
    assert fold_path(f"/{segment.upper()}") == plain


@pytest.mark.parametrize(
    "same", ["/v1/Export", "/v1/export/", "/v1/export.json", "/v1/exp\uff4frt", "/V1/EXPORT.XML/"]
)
def test_forms_of_one_name_are_one_text(same: str) -> None:
    """Letter case, Unicode form, a slash at the end, a suffix."""
    assert fold_path(same) == "/v1/export"


@pytest.mark.parametrize("other", ["/v1/exports", "/v1/export/x", "/v1", "/v2/export"])
def test_other_names_are_not(other: str) -> None:
    """Nothing but those."""
    assert fold_path(other) != "/v1/export"


def test_one_string_of_public_paths_is_a_mistake() -> None:
    """A string is a sequence of letters: `public="/healthz"` would open the path `/`."""
    with pytest.raises(ConfigurationError, match=r"public=\['/healthz'\]"):
        Policy(public="/healthz")


def test_requirements_add_up() -> None:
    """A further requirement can only restrict; FULL satisfies all."""
    assert Requirement.all_of([]) is ANY_KEY
    assert Requirement.all_of(["SENDING"]) == Requirement(frozenset({"FULL", "SENDING"}), "SENDING")
    assert Requirement.all_of(["SENDING", "SENDING"]) == Requirement.all_of(["SENDING"])
    assert Requirement.all_of(["SENDING", "A"]) == Requirement(frozenset({"FULL"}), "A SENDING")


@pytest.mark.long
@given(st.lists(st.from_regex(r"[A-Z][A-Z0-9_]{0,31}", fullmatch=True), max_size=40))
def test_more_requirements_never_allow_more(permissions: list[str]) -> None:
    """What satisfies all permissions satisfies each of them, and the scope stays short."""
    requirement = Requirement.all_of(permissions)
    assert len(requirement.scope) < 300
    for permission in permissions:
        alone = Requirement.all_of([permission]).permissions
        assert requirement.permissions is not None
        assert alone is not None
        assert requirement.permissions <= alone

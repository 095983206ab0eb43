"""Flask: permissions are declared at the routes, and the middleware keeps them."""

from typing import Any, ClassVar

import pytest
from flask import Blueprint, Flask, request
from flask.views import MethodView, View

from keylatch.errors import ConfigurationError
from keylatch.flask import api_key, permissions_of, requires, requires_any
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware
from tests.support.servers import error_without_package


def who() -> str:
    """Returns the principal."""
    return api_key.display_name or "anonymous"


def protect(app: Flask, keys: Keys, **rules: Any) -> Flask:
    """The last line of every `create_app`."""
    rules = {"permissions": permissions_of(app), **rules}
    guarded = APIKeyMiddleware(app.wsgi_app, engine=keys.engine(), **rules)
    app.wsgi_app = guarded  # type: ignore[method-assign]
    return app


def test_a_view_knows_its_caller() -> None:
    """`api_key` is the principal of this request; None on a public path."""
    app, keys = Flask("app"), Keys()
    app.add_url_rule("/", view_func=who)
    app.add_url_rule("/open", view_func=who, endpoint="open")
    client = protect(app, keys, public=["/open"]).test_client()
    key = keys.create("Ada")
    assert client.get("/", headers=key.headers).text == "Ada"
    assert client.get("/open", headers=key.headers).text == "anonymous"
    assert client.get("/").status_code == 401


def test_outside_of_a_request_there_is_no_principal() -> None:
    """Outside a request, and where the middleware is missing, `api_key` says what to do."""
    with pytest.raises(RuntimeError, match="inside a view"):
        api_key.key_id  # noqa: B018
    app = Flask("app")
    app.add_url_rule("/", view_func=requires("SENDING")(who))
    with app.test_request_context("/"), pytest.raises(RuntimeError, match="wsgi_app"):
        api_key.key_id  # noqa: B018
    app.testing = True
    with pytest.raises(RuntimeError, match="wsgi_app"):
        app.test_client().get("/")


def test_permissions_are_declared_once() -> None:
    """Blueprints, methods, parameters, classes: what is declared is listed, and nothing else."""
    app = Flask("app")
    emails = Blueprint("emails", __name__, url_prefix="/v1/emails")

    @emails.route("", methods=["GET", "POST"])
    @requires_any("SENDING", "WRITING")
    def send() -> str:
        return who()

    @emails.get("/<int(min=1):number>/files/<path:name>")
    @requires("SENDING")
    def file(number: int, name: str) -> str:
        return f"{number} {name}"

    class Drafts(MethodView):
        @requires("READING")
        def get(self, draft_id: str) -> str:
            return draft_id

        def delete(self, draft_id: str) -> str:
            return draft_id

    class Outbox(View):
        decorators: ClassVar = [requires("READING")]

        def dispatch_request(self) -> str:
            return who()

    emails.add_url_rule("/drafts/<any(a,b):draft_id>", view_func=Drafts.as_view("drafts"))
    emails.add_url_rule("/outbox", view_func=Outbox.as_view("outbox"))
    app.register_blueprint(emails)
    app.add_url_rule("/v1/domains", view_func=who)
    app.add_url_rule("/v1/keys", endpoint="keys", view_func=requires("FULL")(who))
    assert permissions_of(app) == {
        "SENDING": [
            "GET /v1/emails",
            "POST /v1/emails",
            "GET /v1/emails/<int:number>/files/<path:name>",
        ],
        "WRITING": ["GET /v1/emails", "POST /v1/emails"],
        "READING": ["GET /v1/emails/drafts/<draft_id>", "GET /v1/emails/outbox"],
    }


def test_a_key_may_call_what_its_permission_is_declared_for() -> None:
    """And nothing else, with or without a slash, by HEAD as by GET."""
    app, keys = Flask("app"), Keys(permissions="FULL,SENDING,READING")

    @app.get("/emails/<int:number>")
    @requires_any("READING", "SENDING")
    def email(number: int) -> str:
        return f"{number}"

    app.add_url_rule("/domains", view_func=who)
    client = protect(app, keys).test_client()
    small, full = keys.create(permission="READING"), keys.create()
    assert client.get("/emails/7", headers=small.headers).text == "7"
    assert client.head("/emails/7", headers=small.headers).status_code == 200
    for path in ("/emails/x", "/emails/7/", "/emails/", "/domains", "/nowhere"):
        assert client.get(path, headers=small.headers).status_code == 403
    assert client.delete("/emails/7", headers=small.headers).status_code == 403
    assert client.get("/domains", headers=full.headers).status_code == 200
    assert client.get("/nowhere", headers=full.headers).status_code == 404


def test_the_view_refuses_as_the_middleware_does() -> None:
    """Where rules let more pass than a view requires: the same status, headers and body."""
    keys = Keys(permissions="FULL,SENDING,READING")
    small = keys.create(permission="READING").headers
    said = []
    for permissions in ({"READING": ["POST /v1/emails"]}, {"SENDING": ["POST /v1/emails"]}):
        app = Flask("app")
        app.add_url_rule("/v1/emails", view_func=requires("SENDING")(who), methods=["POST"])
        client = protect(app, keys, permissions=permissions).test_client()
        answer = client.post("/v1/emails", headers=small)
        said.append((answer.status, list(answer.headers), answer.data))
    assert said[0] == said[1]
    assert said[0][0] == "403 Forbidden"
    assert dict(said[0][1])["www-authenticate"].endswith('scope="SENDING"')


def test_a_public_path_has_no_principal_where_a_view_requires_one() -> None:
    """The contradiction is refused: no key is looked at on a public path. HEAD has no body."""
    app, keys = Flask("app"), Keys()
    app.add_url_rule("/", view_func=requires("SENDING")(who))
    client = protect(app, keys, public=["/"]).test_client()
    answer = client.get("/", headers=keys.create().headers)
    assert (answer.status_code, answer.headers["x-keylatch-error"]) == (401, "unauthorized")
    head = client.head("/")
    assert (head.status_code, head.headers["content-length"]) == (401, str(len(answer.data)))
    assert head.data == b""


@pytest.mark.parametrize(
    ("declared", "bare"),
    [
        ("/emails/<name>", "/emails/statistics"),
        ("/emails/<name>", "/<kind>/latest"),
        ("/emails/<name>", "/<path:anything>"),
        ("/files/<path:name>", "/files/"),
        ("/files/<path:name>", "/files/<name>/owner"),
    ],
)
def test_a_route_that_declares_nothing_is_not_opened_by_its_neighbour(
    declared: str, bare: str
) -> None:
    """Flask distinguishes the two, rules do not: the start fails, naming both."""
    app = Flask("app", static_folder=None)
    app.add_url_rule(declared, view_func=requires("SENDING")(who))
    app.add_url_rule(bare, endpoint="bare", view_func=who)
    with pytest.raises(ConfigurationError, match='requires\\("FULL"\\)') as raised:
        permissions_of(app)
    ((wrong, _),) = raised.value.mistakes
    assert wrong.startswith(f"GET {bare} ")
    assert f"GET {declared} is for SENDING" in wrong
    app.view_functions["bare"] = requires("FULL")(who)
    assert permissions_of(app) == {"SENDING": [f"GET {declared}"]}


def test_a_route_for_full_is_so_beside_one_with_a_parameter() -> None:
    """The rule lets the request pass, the view does not."""
    app, keys = Flask("app"), Keys()
    app.add_url_rule("/emails/<name>", view_func=requires("SENDING")(lambda name: name))
    app.add_url_rule("/emails/all", endpoint="all", view_func=requires("FULL")(who))
    client = protect(app, keys).test_client()
    small = keys.create(permission="SENDING").headers
    assert client.get("/emails/x", headers=small).text == "x"
    assert client.get("/emails/all", headers=small).status_code == 403


def test_neighbours_that_share_no_path_are_no_mistake() -> None:
    """Numbers are not words, methods differ, and so do lengths."""
    app = Flask("app")
    for path in ("/emails/<int:number>", "/emails/<int:number>/files/<name>"):
        app.add_url_rule(path, endpoint=path, view_func=requires("SENDING")(who))
    app.add_url_rule("/emails/statistics", view_func=who)
    app.add_url_rule("/emails/<name>/parts/<int:part>", endpoint="parts", view_func=who)
    app.add_url_rule("/emails/<int:number>", endpoint="delete", view_func=who, methods=["DELETE"])
    assert list(permissions_of(app)) == ["SENDING"]


def test_a_word_that_is_no_permission_stops_the_start() -> None:
    """At the decorator where the form is wrong, at the middleware where no key can have it."""
    with pytest.raises(ConfigurationError, match="'sending'"):
        requires("sending", "READING")
    app = Flask("app")
    app.add_url_rule("/", view_func=requires("READING")(who))
    with pytest.raises(ConfigurationError, match="KEYLATCH_PERMISSIONS"):
        protect(app, Keys())


def test_headers_that_pose_as_identity_are_gone() -> None:
    """Flask does not see them."""
    app, keys = Flask("app"), Keys()
    app.add_url_rule("/", view_func=lambda: request.headers.get("X-Keylatch-Key-Id", "none"))
    headers = {**keys.create().headers, "X-Keylatch-Key-Id": "key_boss"}
    assert protect(app, keys).test_client().get("/", headers=headers).text == "none"


@pytest.mark.long
def test_without_flask_it_says_what_to_install() -> None:
    """The import fails with the name of the package."""
    assert error_without_package("flask", "import keylatch.flask").endswith("pip install flask")

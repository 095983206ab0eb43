"""keylatch: the WSGI middleware on Flask; the store comes from KEYLATCH_STORE."""

from flask import Flask

from keylatch.wsgi import APIKeyMiddleware

flask = Flask(__name__)


@flask.get("/open")
@flask.get("/protected")
def hello() -> str:
    """The work of both routes."""
    return "hello"


guarded = APIKeyMiddleware(flask.wsgi_app)


def app(environ, start_response):
    """The open route meets no middleware."""
    chosen = flask.wsgi_app if environ["PATH_INFO"] == "/open" else guarded
    return chosen(environ, start_response)

"""Flask: a route's permission is declared at the route; the middleware is the last line.

    keylatch keys create --name me
    gunicorn --pythonpath deploy/example flask_app:app

A route that declares nothing is for FULL only, also one that is added later.
"""

from flask import Blueprint, Flask

from keylatch.flask import api_key, permissions_of, requires
from keylatch.wsgi import APIKeyMiddleware

v1 = Blueprint("v1", __name__, url_prefix="/v1")


@v1.get("/me")
def me() -> dict[str, str]:
    """Needs a key with FULL: nothing else is declared."""
    return {"key": api_key.key_id, "name": api_key.key_name}


@v1.post("/emails")
@requires("SENDING")
def send_email() -> dict[str, str]:
    """Needs a key with FULL or SENDING."""
    return {"sent by": api_key.key_name}


def create_app() -> Flask:
    """The app, protected; the store comes from KEYLATCH_STORE."""
    app = Flask(__name__)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Needs no key."""
        return {"status": "ok"}

    app.register_blueprint(v1)
    app.wsgi_app = APIKeyMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, public=["/healthz"], permissions=permissions_of(app)
    )
    return app


app = create_app()

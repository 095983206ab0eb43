"""Who is compared: each peer's file, what must be installed for it, and what its keys can do.

The peer itself is pinned; what is below it (frameworks, servers, databases) has a lower bound here
and is installed in the version that this environment has: peers and keylatch run on the same.
"""

from dataclasses import dataclass
from typing import Final, Literal

ASGI: Final = ("uvicorn>=0.52", "uvloop>=0.21", "httptools>=0.6.4")
WSGI: Final = ("gunicorn>=25.1",)
STARLETTE: Final = (*ASGI, "starlette>=1.0")
FASTAPI: Final = ("fastapi>=0.150", "sqlalchemy[asyncio]>=2.0.43", "aiosqlite>=0.21", *ASGI)
REST: Final = (*WSGI, "django>=5.2", "djangorestframework>=3.16")


@dataclass(frozen=True)
class Peer:
    """One of them.

    Args:
        name: for `--only`, the JSON, and its file, `apps/{name}.py`, if `app` names no other.
        title: for people, without the framework.
        framework: what the app is written with; DRF is Django REST framework.
        server: uvicorn for ASGI, gunicorn for WSGI.
        packages: what pip installs, the peer itself first; none: this environment has it.
        revoked: when every process refuses a revoked key.
        last_used: whether one can see when a key was used.
        scopes: whether a key can be limited to something.
        scheme: the first word of its Authorization header.
        app: the name of the file, without `.py`.
        postgresql: the keys are in PostgreSQL instead of SQLite.
    """

    name: str
    title: str
    framework: Literal["Starlette", "FastAPI", "Flask", "DRF"]
    server: Literal["uvicorn", "gunicorn"]
    packages: tuple[str, ...] = ()
    revoked: str = "at once"
    last_used: str = "yes"
    scopes: str = "yes"
    scheme: str = "Bearer"
    app: str = ""
    postgresql: bool = False

    @property
    def file(self) -> str:
        """The module in `apps/`."""
        return self.app or self.name

    @property
    def is_keylatch(self) -> bool:
        """It is not installed: it is what this checkout has."""
        return not self.packages


PEERS: Final = (
    Peer("keylatch_starlette", "keylatch", "Starlette", "uvicorn"),
    Peer(
        "keylatch_starlette_postgresql",
        "keylatch, PostgreSQL",
        "Starlette",
        "uvicorn",
        app="keylatch_starlette",
        postgresql=True,
    ),
    Peer("keylatch_fastapi", "keylatch", "FastAPI", "uvicorn"),
    Peer("keylatch_flask", "keylatch", "Flask", "gunicorn"),
    Peer("keylatch_drf", "keylatch", "DRF", "gunicorn"),
    Peer(
        "handwritten_cache",
        "by hand: argon2, cached",
        "Starlette",
        "uvicorn",
        ("argon2-cffi>=25.1", "cachetools>=6.1", *STARLETTE),
        revoked="after 60 s",
        last_used="no",
        scopes="no",
    ),
    Peer(
        "argon2_every_time",
        "by hand: argon2 every time",
        "Starlette",
        "uvicorn",
        ("argon2-cffi>=25.1", *STARLETTE),
        last_used="no",
        scopes="no",
    ),
    Peer(
        "flask_httpauth_app",
        "Flask-HTTPAuth",
        "Flask",
        "gunicorn",
        ("flask-httpauth==4.8.1", *WSGI, "flask>=3.1", "sqlalchemy>=2.0.43"),
        last_used="no",
        scopes="roles",
    ),
    Peer(
        "drf_api_key",
        "djangorestframework-api-key",
        "DRF",
        "gunicorn",
        ("djangorestframework-api-key==3.1.0", *REST),
        last_used="no",
        scopes="no",
        scheme="Api-Key",
    ),
    Peer(
        "drf_tenant_apikeys",
        "django-tenant-apikeys",
        "DRF",
        "gunicorn",
        ("django-tenant-apikeys[drf]==0.6.0", *REST),
        last_used="to 5 min",
        scheme="Api-Key",
    ),
    Peer(
        "drf_knox",
        "django-rest-knox",
        "DRF",
        "gunicorn",
        ("django-rest-knox==5.1.0", *REST),
        last_used="no",
        scopes="no",
        scheme="Token",
    ),
    Peer(
        "fastapi_sqlalchemy",
        "by hand: SELECT",
        "FastAPI",
        "uvicorn",
        FASTAPI,
        last_used="no",
        scopes="no",
    ),
    Peer(
        "fastapi_sqlalchemy_last_used",
        "by hand: SELECT, UPDATE",
        "FastAPI",
        "uvicorn",
        FASTAPI,
        scopes="no",
    ),
    Peer(
        "keyshield_fastapi",
        "keyshield",
        "FastAPI",
        "uvicorn",
        ("keyshield[fastapi,core]==2.0.1", *FASTAPI),
        revoked="after 300 s",
    ),
)


class NotMeasured(Exception):
    """A peer cannot be measured, and why; the others can."""

"""The base of the middlewares: their arguments, and what they build from these once.

A middleware is a `BaseMiddleware` that translates the requests and responses of one protocol.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from keylatch.authentication.authenticator import Authenticator, TracedAuthenticator
from keylatch.core.policy import Policy
from keylatch.core.refusals import Refusals
from keylatch.core.routes import Router
from keylatch.errors import ConfigurationError

if TYPE_CHECKING:
    from keylatch.engine import Engine

App = TypeVar("App")


class BaseMiddleware(Generic[App]):
    """Passes a request to the app if it carries a valid key.

    Args:
        app: the application to protect.
        store: `sqlite:///path.db` or `postgresql://…`; None: `KEYLATCH_STORE`.
        store_direct: a URL that reaches the primary without a transaction pooler, for leases and
            notifications; None: `KEYLATCH_STORE_DIRECT`, or `store` where that is an argument.
        store_read: URL of a standby that may answer look-ups; None: `KEYLATCH_STORE_READ`, or no
            standby where `store` is an argument.
        redis: URL of the shared cache; None: `KEYLATCH_REDIS`, empty: no shared cache.
        store_file: a file that contains `store`; None: `KEYLATCH_STORE_FILE`.
        store_direct_file: a file that contains `store_direct`; None: `KEYLATCH_STORE_DIRECT_FILE`.
        store_read_file: a file that contains `store_read`; None: `KEYLATCH_STORE_READ_FILE`.
        redis_file: a file that contains `redis`; None: `KEYLATCH_REDIS_FILE`.
        pepper_file: contains a secret that the store does not; None: `KEYLATCH_PEPPER_FILE`.
        public: paths that need no key: `/healthz` and `/docs/{page}` for GET and HEAD, or with a
            method `POST /signup`, `WEBSOCKET /chat`. A rule without parameters, and a permission
            that a view declares, take precedence over a public path with parameters.
        permissions: the routes that keys without FULL can call: permission → `["POST /v1/emails",
            …]`, with parameters spelled `{id}`, `{id:int}`, `<id>` or `<int:id>`. Of a route that
            is named for several permissions, any one suffices.
        realm: named in challenges; None: `KEYLATCH_REALM`.
        environment: the only environment whose keys are accepted; None: `KEYLATCH_ENVIRONMENT`.
        lease: seconds for which caches are used without the store; None: `KEYLATCH_LEASE`.
        hasher: `argon2id` or `sha256`, to upgrade hashes to; None: `KEYLATCH_HASHER`.
        clients: store the network that used each key last; None: `KEYLATCH_CLIENTS`.
        log: `json`: give each request an id for `keylatch.logs`; None: `KEYLATCH_LOG`.
        log_failures: log refused requests with their address; None: `KEYLATCH_LOG_FAILURES`.
        timing: add response headers with the duration of checks; None: `KEYLATCH_TIMING`.
        tracing: create OpenTelemetry spans; None: `KEYLATCH_TRACING`.
        engine: an engine that is shared with others, instead of all of the settings above.

    Raises:
        ConfigurationError: names every wrong setting and rule.
    """

    _views_decide: ClassVar = False

    def __init__(
        self,
        app: App,
        *,
        store: str | None = None,
        store_direct: str | None = None,
        store_read: str | None = None,
        redis: str | None = None,
        store_file: str | None = None,
        store_direct_file: str | None = None,
        store_read_file: str | None = None,
        redis_file: str | None = None,
        pepper_file: str | None = None,
        public: Iterable[str] = (),
        permissions: Mapping[str, Iterable[str]] | None = None,
        realm: str | None = None,
        environment: str | None = None,
        lease: float | None = None,
        hasher: str | None = None,
        clients: bool | None = None,
        log: str | None = None,
        log_failures: bool | None = None,
        timing: bool | None = None,
        tracing: bool | None = None,
        engine: "Engine | None" = None,
    ) -> None:
        mistakes: list[tuple[str, str]] = []
        grantable = None
        try:
            engine = engine or _load_engine(
                store=store,
                store_direct=store_direct,
                store_read=store_read,
                redis=redis,
                store_file=store_file,
                store_direct_file=store_direct_file,
                store_read_file=store_read_file,
                redis_file=redis_file,
                pepper_file=pepper_file,
                realm=realm,
                environment=environment,
                lease=lease,
                hasher=hasher,
                clients=clients,
                log=log,
                log_failures=log_failures,
                timing=timing,
                tracing=tracing,
            )
            grantable = engine.settings.permissions
        except ConfigurationError as error:
            mistakes += error.mistakes
        try:
            policy = Policy(public, permissions, grantable, self._views_decide)
        except ConfigurationError as error:
            mistakes += error.mistakes
        if mistakes or engine is None:
            raise ConfigurationError(mistakes)
        self.engine = engine
        self._realm = engine.settings.realm
        self._app = app
        self._policy = policy
        self._router = self._make_router(app)
        self._bind_engine()
        self._on_engine_bound()

    def use_engine(self, engine: "Engine") -> None:
        """Use another engine from now on: for an app's tests."""
        self.engine = engine
        self._bind_engine()
        self._on_engine_bound()

    def _bind_engine(self) -> None:
        self._refusals = Refusals(self._realm, log_failure=self.engine.log_failure)
        self._traces_requests = self.engine.settings.traces_requests
        authenticator = self.engine.authenticator
        self._authenticator: Authenticator | TracedAuthenticator = (
            TracedAuthenticator(authenticator) if self._traces_requests else authenticator
        )

    def _make_router(self, app: App) -> Router[Any]:
        """The router that says which view a request of this protocol reaches."""
        raise NotImplementedError

    def _on_engine_bound(self) -> None:
        """For what a subclass builds from the engine."""


def _load_engine(**settings: Any) -> "Engine":
    # Not at the top: an app that is imported and not called needs no SQLAlchemy and no pydantic.
    from keylatch.engine import Engine
    from keylatch.settings import Settings

    return Engine(Settings.load(**settings))

"""What all adapters share: the arguments, and what is decided by them once.

An adapter is a `BaseMiddleware` that translates requests and answers of one protocol.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from keylatch.core.policy import Policy
from keylatch.core.refusals import Refusals
from keylatch.core.routes import Router
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.settings import Settings
from keylatch.telemetry.request_trace import Authenticator, TracedAuthenticator

App = TypeVar("App")


class BaseMiddleware(Generic[App]):
    """Lets a request pass to the app if it carries a good key.

    Args:
        app: the application to protect.
        store: `sqlite:///path.db` or `postgresql://…`; None: `KEYLATCH_STORE`.
        redis: URL of the shared cache; None: `KEYLATCH_REDIS`, empty: work without.
        store_file: a file that holds `store`; None: `KEYLATCH_STORE_FILE`.
        redis_file: a file that holds `redis`; None: `KEYLATCH_REDIS_FILE`.
        pepper_file: holds a secret that the store does not; None: `KEYLATCH_PEPPER_FILE`.
        public: what needs no key: `/healthz` and `/docs/{page}` for GET and HEAD, or with a method
            `POST /signup`, `WEBSOCKET /chat`. What a rule names as it is, or a view declares, wins
            over one with parameters.
        permissions: what keys without FULL may call: permission → `["POST /v1/emails", …]`, with
            parameters spelled `{id}`, `{id:int}`, `<id>` or `<int:id>`.
        realm: named in challenges; None: `KEYLATCH_REALM`.
        environment: the only environment whose keys are welcome; None: `KEYLATCH_ENVIRONMENT`.
        lease: seconds to trust caches without hearing from the store; None: `KEYLATCH_LEASE`.
        clients: `on`: keep from which network each key was used last; None: `KEYLATCH_CLIENTS`.
        hasher: `argon2id` or `sha256`, to upgrade hashes to; None: `KEYLATCH_HASHER`.
        log_failures: `on`: log refused requests with their address; None: `KEYLATCH_LOG_FAILURES`.
        log: `json`: give each request an id for `keylatch.logs`; None: `KEYLATCH_LOG`.
        timing: `on`: tell in headers how long checks took; None: `KEYLATCH_TIMING`.
        tracing: `on`: make spans of OpenTelemetry; None: `KEYLATCH_TRACING`.
        engine: one that is shared with others, instead of all of the settings above.

    Raises:
        ConfigurationError: naming every wrong setting and rule.
    """

    _views_decide: ClassVar = False

    def __init__(
        self,
        app: App,
        *,
        store: str | None = None,
        redis: str | None = None,
        store_file: str | None = None,
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
        engine: Engine | None = None,
    ) -> None:
        mistakes: list[tuple[str, str]] = []
        grantable = None
        try:
            engine = engine or Engine(
                Settings.load(
                    store=store,
                    redis=redis,
                    store_file=store_file,
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

    def use_engine(self, engine: Engine) -> None:
        """Decide by another engine from now on: in an app's tests."""
        self.engine = engine
        self._bind_engine()
        self._on_engine_bound()

    def _bind_engine(self) -> None:
        self._refusals = Refusals(self._realm, log_failure=self.engine.log_failure)
        self._traces_requests = self.engine.settings.traces_requests
        self._authenticator: Authenticator = (
            TracedAuthenticator(self.engine) if self._traces_requests else self.engine
        )

    def _make_router(self, app: App) -> Router[Any]:
        """What tells which view a request of this protocol will get to."""
        raise NotImplementedError

    def _on_engine_bound(self) -> None:
        """What an adapter needs besides."""

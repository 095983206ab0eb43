"""The language in which Django resolves a path: `i18n_patterns` and translated routes depend on it.

The law of this file: it returns the language that Django's `LocaleMiddleware` will activate, and
activates it only while a path is resolved. It imports Django only in functions, for apps that have
imported it.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any


def override_language(request: Any, path: str) -> AbstractContextManager[Any]:
    """Activates the language in which the request's `LocaleMiddleware` resolves a path."""
    from django.conf import settings
    from django.utils.translation import override

    if not _has_locale_middleware(tuple(settings.MIDDLEWARE)):
        return nullcontext()
    language: AbstractContextManager[Any] = override(
        _language_from_path(request, path) or language_of(request)
    )
    return language


def language_of(request: Any) -> str | None:
    """The language of a request whose path does not name one."""
    from django.conf import settings
    from django.utils.translation import get_language, get_language_from_request

    is_chosen = _has_locale_middleware(tuple(settings.MIDDLEWARE))
    language: str | None = get_language_from_request(request) if is_chosen else get_language()
    return language


def _language_from_path(request: Any, path: str) -> str | None:
    """As `LocaleMiddleware.process_request` does it."""
    from django.conf import settings
    from django.conf.urls.i18n import is_language_prefix_patterns_used
    from django.utils.translation import get_language_from_path

    urlconf = getattr(request, "urlconf", None) or settings.ROOT_URLCONF
    is_used, is_default_prefixed = is_language_prefix_patterns_used(urlconf)
    if not is_used:
        return None
    default: str | None = None if is_default_prefixed else settings.LANGUAGE_CODE
    return get_language_from_path(path) or default


@lru_cache(maxsize=8)
def _has_locale_middleware(middlewares: tuple[str, ...]) -> bool:
    """Whether Django's middleware or a subclass of it is among them."""
    from django.middleware.locale import LocaleMiddleware
    from django.utils.module_loading import import_string

    classes = (import_string(each) for each in middlewares)
    return any(isinstance(each, type) and issubclass(each, LocaleMiddleware) for each in classes)

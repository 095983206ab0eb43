"""The project that all peers on Django REST framework share; no peer itself.

Its database connections persist (`CONN_MAX_AGE`): one for every request, which is the default,
would cost the peers more. Sessions, CSRF and messages are left out, as an API needs none.
"""

import os
from typing import Any

import django
from django.conf import settings
from django.core.management import call_command


def configure(urls: str, *apps: str, **more: Any) -> None:
    """Set Django up.

    Args:
        urls: the module with the `urlpatterns`.
        apps: more of `INSTALLED_APPS`.
        more: settings of the peer.
    """
    given = {
        "ROOT_URLCONF": urls,
        "SECRET_KEY": "for one benchmark",
        "ALLOWED_HOSTS": ["*"],
        "USE_TZ": True,
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "INSTALLED_APPS": ["django.contrib.auth", "django.contrib.contenttypes"]
        + ["rest_framework", *apps],
        "MIDDLEWARE": [
            "django.middleware.security.SecurityMiddleware",
            "django.middleware.common.CommonMiddleware",
        ],
        "DATABASES": {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{os.environ['PEER_FOLDER']}/{urls}.db",
                "CONN_MAX_AGE": None,
            }
        },
        "REST_FRAMEWORK": {"DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"]},
    }
    settings.configure(**{**given, **more})
    django.setup()


def migrate() -> None:
    """Make the tables; those of an app without migrations, too."""
    call_command("migrate", run_syncdb=True, verbosity=0)

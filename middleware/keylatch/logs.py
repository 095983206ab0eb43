"""Log records as JSON Lines.

    handler.setFormatter(JSONLines())

Each record has `time`, `level`, `logger`, `message`, and within a request `requestId`. No message
of keylatch holds a token; tokens in messages of the app or of its libraries are redacted here.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from keylatch.core.tokens import redact_tokens
from keylatch.telemetry.request_trace import REQUEST_TRACE


class JSONLines(logging.Formatter):
    """One JSON object for each record, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = REQUEST_TRACE.get()
        if trace is not None:
            line["requestId"] = trace.request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return self.redact(json.dumps(line))

    def redact(self, line: str) -> str:
        """The line with the secrets of all tokens removed."""
        return redact_tokens(line)


def configuration(level: str = "WARNING") -> dict[str, Any]:
    """For `logging.config.dictConfig`: JSON on standard error.

    Args:
        level: of keylatch's loggers.
    """
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "keylatch.logs.JSONLines"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"handlers": ["stderr"], "level": "ERROR"},
        "loggers": {
            "keylatch": {"level": level},
            "keylatch.serving": {"level": "INFO"},
            "uvicorn": {"level": "INFO"},
        },
    }

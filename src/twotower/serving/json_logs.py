"""Write log records as JSON lines to stderr. They never contain a history, a key or a filter."""

from __future__ import annotations

import json
import logging
import sys
import time

from twotower.utils.console import log

FIELDS = "fields"  # attribute of a record with additional fields


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return "time", "level", "message", the additional fields and, for an exception, "traceback" as JSON."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def setup_json_logs(level: str = "info") -> None:
    """Write the log records of the package from `level` on, and warnings of its libraries, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    log.handlers = [handler]
    log.setLevel(level.upper())
    for name in ("asyncio", "opentelemetry"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [handler], False
        library.setLevel(logging.WARNING)

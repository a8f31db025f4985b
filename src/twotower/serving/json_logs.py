"""Log lines as JSON, one a line on stderr: what a collector reads. Never a history, a key or a filter."""

from __future__ import annotations

import json
import logging
import sys
import time

from twotower.utils.console import log

FIELDS = "fields"  # of a record: more to say than its message


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """ "time", "level", "message", the record's own fields, and "traceback" of an exception."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def setup_json_logs() -> None:
    """Let the package's log lines and those of the HTTP server be JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    log.handlers = [handler]
    http = logging.getLogger("uvicorn")
    http.handlers, http.propagate = [handler], False
    http.setLevel(logging.WARNING)

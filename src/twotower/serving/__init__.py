"""Serve a bundle over HTTP. Needs the extra `serve`."""

from twotower.errors import require

require("serve", "fastapi", "httptools", "prometheus_client", "uvloop")

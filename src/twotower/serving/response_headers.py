"""Decide the headers of responses: security, other origins, caching, and whether a body may be compressed."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache

Headers = list[tuple[bytes, bytes]]

POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; img-src {images} data:; connect-src 'self'; font-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(self)"),
]
TRANSPORT = (b"strict-transport-security", b"max-age=31536000")
UNCACHED = (b"cache-control", b"no-store")
PREFLIGHT: Headers = [
    (b"content-length", b"0"),
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
    (b"access-control-max-age", b"600"),
]


def added_headers(present: Headers, *, images: str, origins: frozenset[str], origin: bytes, secure: bool) -> Headers:
    """Return the headers that a response gets besides its own.

    Parameters
    ----------
    present
        Headers of the response so far.
    images
        Origin of images that the page may show beside its own; empty: none.
    origins
        Other origins that may read responses.
    origin
        Origin of the request; empty: none.
    secure
        True if the client uses HTTPS.
    """
    own = {name for name, _ in present}
    added = [header for header in _security(images) if header[0] not in own]
    if secure:
        added.append(TRANSPORT)
    if origins:
        added.append((b"vary", b"origin"))
        if origin.decode("latin-1").lower() in origins:
            added.append((b"access-control-allow-origin", origin))
    if b"cache-control" not in own:
        added.append(UNCACHED)
    return added


def policy(images: str = "", *, scripts: str = "", styles: str = "") -> str:
    """Return the Content-Security-Policy.

    Parameters
    ----------
    images, scripts, styles
        Sources that are allowed beside the server itself.

    Examples
    --------
    >>> policy(scripts=source_hash("go()")).split("; ")[1]
    "script-src 'sha256-5KYv+PUboo5h+0+YAtGRPbwv5d/QxzHslP4YGnUaxRw=' 'self'"
    """
    sources = {"images": images, "scripts": scripts, "styles": styles}
    return POLICY.format(**{name: f"{source} 'self'".lstrip() for name, source in sources.items()})


def source_hash(text: str) -> str:
    """Return the source that allows an inline script or style with exactly this text."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _security(images: str) -> Headers:
    return [(b"content-security-policy", policy(images).encode()), *SECURITY]


def accepts_gzip(accepted: bytes) -> bool:
    """Return True if the header `Accept-Encoding` allows gzip.

    Examples
    --------
    >>> accepts_gzip(b"br, gzip;q=0.5"), accepts_gzip(b"gzip;q=0")
    (True, False)
    """
    for part in accepted.lower().split(b","):
        name, _, quality = part.strip().partition(b";")
        if name.strip() == b"gzip":
            return quality.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    return False

"""Check the head of an HTTP request: version, `Host` and target."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import unquote


class Refusal(NamedTuple):
    """Why a request is refused before the application sees it."""

    status: int
    code: str
    text: str


class Target(NamedTuple):
    """The parts of a request target; `path` is decoded."""

    path: str
    raw_path: bytes
    query: bytes

    def below(self, root_path: str) -> Target:
        """Return the target without the path under which a proxy publishes the server; a request may come without it, too.

        Examples
        --------
        >>> Target("/shop/v1/about", b"/shop/v1/about", b"").below("/shop").path
        '/v1/about'
        """
        root = root_path.encode()
        if not root or not self.path.startswith(f"{root_path}/") or not self.raw_path.startswith(root + b"/"):
            return self
        return self._replace(path=self.path[len(root_path) :], raw_path=self.raw_path[len(root) :])

    def scope(
        self, version: str, method: bytes, headers: list[tuple[bytes, bytes]], root_path: str, *, secure: bool
    ) -> dict[str, Any]:
        """Return the ASGI scope of a request for this target."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "scheme": "https" if secure else "http",
            "method": method.decode("ascii"),
            "root_path": root_path,
            "path": root_path + self.path,
            "raw_path": self.raw_path,
            "query_string": self.query,
            "headers": headers,
            "state": {},
        }


def read_target(version: str, url: bytes, headers: list[tuple[bytes, bytes]]) -> Target | Refusal:
    """Return the target of a request, or why it is refused.

    Examples
    --------
    >>> read_target("1.1", b"/v1/items/a%20b?k=3", [(b"host", b"localhost")])
    Target(path='/v1/items/a b', raw_path=b'/v1/items/a%20b', query=b'k=3')
    """
    hosts = sum(name == b"host" for name, _ in headers)
    if version not in ("1.0", "1.1"):
        return Refusal(505, "malformed", f"HTTP/{version} is not supported. Use HTTP/1.1.")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return Refusal(400, "malformed", f"The request has {hosts} Host headers. Send one.")
    if url[:1] != b"/":
        return Refusal(400, "malformed", "The request target is not a path. Send one that begins with /.")
    raw, _, query = url.partition(b"#")[0].partition(b"?")
    try:
        return Target(unquote(raw.decode("ascii"), errors="strict"), raw, query)
    except UnicodeDecodeError:
        return Refusal(400, "malformed", "The path is not valid: percent-encode it as UTF-8.")


def address_of(name: Any) -> tuple[str, int | None] | None:
    """Return host and port of a socket's name; None for a socket without them."""
    return (name[0], name[1]) if isinstance(name, tuple) and name else None


def malformed(error: Exception) -> Refusal:
    """Return the refusal of a request that the parser does not understand."""
    text = str(error).strip().rstrip(".") or type(error).__name__
    if text == "Invalid HTTP version":
        return Refusal(505, "malformed", "This version of HTTP is not supported. Use HTTP/1.1.")
    return Refusal(400, "malformed", f"The request is not valid HTTP/1.1: {text[:120]}. Send a valid one.")

"""Serve the files of the page from memory: compressed once, and under an address that changes with their content.

The page (`page_index`) refers to its files as `page/TAG/…`, where TAG is a hash of all files. So browsers keep them without asking
again, and a new version of the page never mixes with an old one.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response

from twotower.serving.response_headers import accepts_gzip

PAGE = Path(__file__).with_name("page")
KINDS = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
IMMUTABLE, REVALIDATED = "public, max-age=31536000, immutable", "no-cache"


@dataclass(frozen=True, slots=True)
class MapTiles:
    """Images of another server under the map.

    Attributes
    ----------
    url
        Address with `{z}`, `{x}` and `{y}`.
    attribution
        Text on the map, which most servers require.

    Examples
    --------
    >>> MapTiles("https://tiles.example.org/{z}/{x}/{y}.png", "© Example").origin
    'https://tiles.example.org'
    """

    url: str
    attribution: str = ""

    @property
    def origin(self) -> str:
        """Return the scheme and host, which the policy of the page must allow."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"


class PageFiles:
    """The files of the page.

    Attributes
    ----------
    tag
        12 hexadecimal digits of a hash over all files.
    """

    def __init__(self) -> None:
        names = sorted(file.relative_to(PAGE).as_posix() for file in PAGE.rglob("*") if file.suffix in KINDS)
        self._files = {name: (PAGE / name).read_bytes() for name in names}
        self._packed = {name: gzip.compress(content, 9, mtime=0) for name, content in self._files.items()}
        whole = hashlib.sha256()
        for name, content in self._files.items():
            whole.update(f"{name}\0{len(content)}\0".encode() + content)
        self.tag = whole.hexdigest()[:12]

    def text(self, name: str) -> str:
        """Return the content of a file."""
        return self._files[name].decode()

    def file(self, name: str, *, packed: bool) -> Response | None:
        """Return a file, with `packed` compressed if that is shorter; None if there is none."""
        tagged = name.startswith(f"{self.tag}/")
        name = name.removeprefix(f"{self.tag}/")
        if name not in self._files:
            return None
        headers = {"cache-control": IMMUTABLE if tagged else REVALIDATED, "vary": "accept-encoding"}
        packed = packed and len(self._packed[name]) < len(self._files[name])
        if packed:
            headers["content-encoding"] = "gzip"
        content = (self._packed if packed else self._files)[name]
        return Response(content, media_type=KINDS[Path(name).suffix], headers=headers)


def add_files(app: FastAPI, files: PageFiles) -> None:
    """Add the route of the files."""

    @app.get("/page/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if (found := files.file(name, packed=accepts_gzip(request.headers.get("accept-encoding", "").encode("latin-1")))) is None:
            raise HTTPException(404, f"The page has no file {name[:80]!r}.")
        return found

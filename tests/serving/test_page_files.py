"""Test how the files of the page are served: compressed, kept by browsers under a tagged address, with tiles only by opt-in."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from twotower.errors import ConfigError
from twotower.serving.access import Access
from twotower.serving.app import create_app
from twotower.serving.page_files import PAGE, PageFiles
from twotower.serving.service import Service
from twotower.utils.config import load_config
from twotower.utils.config_serving import Limits, ServingConfig

Connect = Callable[..., AbstractContextManager[TestClient]]


def test_every_file_that_the_page_names_is_there_and_kept(connect: Connect) -> None:
    with connect() as client:
        page = client.get("/")
        assert page.headers["cache-control"] == "no-cache"
        names = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
        assert len(names) > 10
        for name in names:
            answer = client.get(f"/{name}")
            assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
            plain = client.get(re.sub("page/[0-9a-f]{12}/", "page/", f"/{name}"))
            assert plain.content == answer.content and plain.headers["cache-control"] == "no-cache"


def test_every_module_imports_modules_that_are_there() -> None:
    for file in PAGE.glob("*.js"):
        for name in re.findall(r'(?:from|import)\s*\(?"(\./[^"]+)"', file.read_text(encoding="utf-8")):
            assert (PAGE / name).exists(), f"{file.name} imports {name}"


def test_files_are_compressed_for_who_takes_it(connect: Connect) -> None:
    with connect() as client:
        for accepted, packed in (("gzip", True), ("identity", False), ("gzip;q=0", False)):
            answer = client.get("/page/vendor/leaflet.js", headers={"accept-encoding": accepted})
            assert ("content-encoding" in answer.headers) is packed and "accept-encoding" in answer.headers["vary"]
            assert answer.content == (PAGE / "vendor/leaflet.js").read_bytes()
        for outside in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/nowhere.js", "/page/%2e%2e/index.html.jinja", "/page/"):
            assert client.get(outside).status_code == 404, outside


def test_the_tag_changes_with_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tag = PageFiles().tag
    for file in PAGE.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "app.js").write_bytes(b"// changed")
    monkeypatch.setattr("twotower.serving.page_files.PAGE", tmp_path)
    changed = PageFiles()
    assert changed.tag != tag
    answer = changed.file(f"{changed.tag}/style.css", packed=True)
    assert answer is not None and gzip.decompress(bytes(answer.body)) == (tmp_path / "style.css").read_bytes()
    assert changed.file(f"{tag}/app.js", packed=False) is None, "an old page does not get new files"


def test_tiles_open_the_policy_for_images_of_one_host(bundle: Path, tmp_path: Path) -> None:
    tiles = ServingConfig(map_tiles="https://tiles.example.org/{z}/{x}/{y}.png", map_attribution='© "Example" <b>')
    service = Service(bundle, f"sqlite:{tmp_path / 'events.sqlite'}", Limits(rate=0))
    with TestClient(create_app(service, Access(public=True), config=tiles)) as client:
        page = client.get("/")
        policy = page.headers["content-security-policy"]
        assert "img-src https://tiles.example.org 'self'" in policy and policy.count("http") == 1
        assert 'content="https://tiles.example.org/{z}/{x}/{y}.png"' in page.text and 'Example" <b>' not in page.text
        assert "© &#34;Example&#34; &lt;b&gt;" in page.text


@pytest.mark.parametrize(
    "url",
    [
        "https://tiles.example.org/a.png",
        "ftp://tiles.example.org/{z}/{x}/{y}.png",
        "https://{z}.example.org/{x}/{y}.png",
        "https://a.org/{z}/{x}/{y}.png; script-src *",
        "https://a.org/{z}/{x}/{y}.png'",
        "/{z}/{x}/{y}.png",
        "https:///{z}/{x}/{y}",
        "https://a.org@b.org:x y/{z}/{x}/{y}",
    ],
)
def test_what_is_no_address_of_tiles_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"serving\.map_tiles': invalid address"):
        load_config(None, flags={"serving": {"map_tiles": url}})

"""The documentation site: it builds without warnings, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = ("settings", "commands", "python", "registries", "http")


class Page(HTMLParser):
    """Collects the ids of a page, its links, and the files that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given["href"]] if "href" in given else []
        self.loaded += [given[name] for name in ("src", "href") if name in given and tag in ("script", "link", "img", "iframe")]


@pytest.fixture(scope="module")
def pages() -> Iterator[Any]:
    """docs/site/pages.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "site"))
        yield importlib.import_module("pages")
    sys.modules.pop("pages", None)


def test_every_page_is_in_one_part_of_the_navigation(pages: Any) -> None:
    names = ["index", "how-to/orders", "how-to/index", "data", "news", "log", "reference", "reference/http", "method"]
    parts = pages.navigation(names)
    assert parts["How-to guides"] == ["how-to/index", "how-to/orders"]
    assert parts["Reference"] == ["reference", "reference/http"]
    assert parts["Project"] == ["news", "log"], "a page that no part names, and the diary last"
    assert sorted(name for part in parts.values() for name in part) == sorted(set(names) - {"index"})


def test_links_lead_to_the_site_or_to_the_repository(pages: Any, tmp_path: Path) -> None:
    for name in ("docs/data.md", "docs/how-to/a.md", "CONTRIBUTING.md", "README.md", "src/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# Title\n")
    page = tmp_path / "docs/how-to/a.md"
    page.write_text(
        "[d](../data.md#x) [c](../../CONTRIBUTING.md) [r](../../README.md#y) [`s`](../../src/x.py) [w](https://a.b/c)\n"
    )
    staged = {tmp_path / "docs/data.md": "data.md", page: "how-to/a.md", tmp_path / "README.md": "index.md"}
    staged[tmp_path / "CONTRIBUTING.md"] = "contributing.md"
    inside = "[d](../data.md#x) [c](../contributing.md) [r](../index.md) "
    alone = pages.relinked(page, "how-to/a.md", staged, tmp_path, None)
    assert alone == inside + "`s` [w](https://a.b/c)\n"
    hosted = pages.relinked(page, "how-to/a.md", staged, tmp_path, "https://host/repo")
    assert hosted == inside + "[`s`](https://host/repo/blob/main/src/x.py) [w](https://a.b/c)\n"


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path: Path, lacking: Callable[[str], NoReturn]) -> None:
    if not all(map(find_spec, ("sphinx", "furo", "myst_parser", "sphinx_copybutton"))):
        lacking("needs the extra docs")
    command = [sys.executable, "docs/site/build.py", "--out", str(tmp_path / "site")]
    cut_off = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nothing answers there
    done = subprocess.run(command, cwd=ROOT, env=os.environ | cut_off, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    site = tmp_path / "site"
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    assert {site / "reference" / f"{name}.html" for name in GENERATED} <= pages.keys()
    for path, page in pages.items():
        for link in page.links:
            target, _, fragment = unquote(re.sub(r"\?[^#]*", "", link)).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            assert found.is_file(), f"{path.name} links to {link}"
            assert not fragment or found.suffix != ".html" or fragment in pages[found].ids, f"{path.name} links to {link}"
        assert not [name for name in page.loaded if re.match(r"([a-z]+:)?//", name)], f"{path.name} loads from elsewhere"
    sheets = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheets)

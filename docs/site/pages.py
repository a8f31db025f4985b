"""Copy the Markdown pages of the repository into the source folder of the site, with working links and a navigation."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

NAVIGATION = {
    "Getting started": ["getting-started", "python", "install*"],
    "How-to guides": [
        "how-to/index",
        *(f"how-to/{task}" for task in ("i-have-a-csv", "known-datasets", "new-users", "new-items", "similar-items")),
        *(f"how-to/{task}" for task in ("serve-with-filters", "stay-fresh", "update", "feedback-loop", "retrain", "tune", "*")),
        *("serving", "clients", "monitoring", "kubernetes", "vector-databases", "gpu"),
    ],
    "Extend": ["extend/*"],
    "Concepts": ["glossary", "data", "filters", "evaluation"],
    "Method": ["method"],
    "Results": ["results", "benchmarks"],
    "Reference": ["reference", "reference/settings", "reference/commands", "reference/*"],
    "Project": ["architecture", "contributing", "*", "changelog", "log"],
}
"""Pages of each part, as patterns in the order of the navigation. "*" stands for all pages that no other pattern names."""
UNSEARCHED = "log"
"""The diary. Search leaves it out, so that it does not hide the pages that readers look for."""
FENCED = re.compile(r"(^ *```.*?^ *```)", re.S | re.M)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")


def stage_pages(root: Path, source: Path) -> None:
    """Copy docs/ and the pages at the root of the repository into `source`, where generated pages already are."""
    staged = {path: path.relative_to(root / "docs").as_posix() for path in _files(root / "docs")}
    staged |= {path: path.name.lower() for path in root.glob("*.md") if path.name != "README.md"}
    staged[root / "README.md"] = "index.md"  # links to the README lead to the first page
    address = repository_address(root)
    for path, name in staged.items():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, target)
        elif path.name != "README.md":
            target.write_text(relinked(path, name, staged, root, address), encoding="utf-8")
    names = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.md"))
    trees = [tree(part, pages, source) for part, pages in navigation(names).items() if pages]
    index = source / "index.md"
    index.write_text("\n\n".join([index.read_text(encoding="utf-8"), *trees]), encoding="utf-8")
    diary = source / f"{UNSEARCHED}.md"
    if diary.exists():
        diary.write_text("---\nnosearch: true\n---\n\n" + diary.read_text(encoding="utf-8"), encoding="utf-8")


def repository_address(root: Path) -> str | None:
    """Return the repository's address in pyproject.toml; None where it names none."""
    urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    named = {name.lower(): address for name, address in urls.items()}
    return next((named[name].rstrip("/") for name in ("repository", "source", "homepage") if name in named), None)


def relinked(path: Path, name: str, staged: dict[Path, str], root: Path, address: str | None) -> str:
    """Return a page with links as the site has them.

    Links to pages and pictures lead to their place in the site. Links to other files of the repository lead to its address;
    without an address only their text stays.
    """

    def link(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        place, hash_sign, fragment = target.partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return found[0]
        file = Path(os.path.normpath(path.parent / place))
        if file in staged:
            lead = os.path.relpath(staged[file], Path(name).parent)
            return f"{picture}[{text}]({lead}{hash_sign + fragment if file.name != 'README.md' else ''})"
        if not file.is_relative_to(root):
            return found[0]
        return f"[{text}]({address}/blob/main/{file.relative_to(root).as_posix()}{hash_sign}{fragment})" if address else text

    parts = FENCED.split(path.read_text(encoding="utf-8"))
    return "".join(part if FENCED.fullmatch(part) else LINK.sub(link, part) for part in parts)


def navigation(names: list[str]) -> dict[str, list[str]]:
    """Return the pages of every part; each page is in one part, and every page is in some part."""
    left = [name for name in names if name != "index"]
    found: dict[str, dict[str, list[str]]] = {part: {} for part in NAVIGATION}
    order = sorted(((pattern == "*", part, pattern) for part in NAVIGATION for pattern in NAVIGATION[part]), key=lambda one: one[0])
    for _, part, pattern in order:
        found[part][pattern] = [name for name in left if fnmatch(name, pattern)]
        left = [name for name in left if name not in found[part][pattern]]
    return {part: [name for pattern in NAVIGATION[part] for name in found[part][pattern]] for part in NAVIGATION}


def tree(part: str, pages: list[str], source: Path) -> str:
    """Return the directive that puts the pages of a part into the side bar, by the first words of their titles."""
    entries = [f"{_short_title(source / f'{page}.md')} <{page}>" for page in pages]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *entries, "```"])


def _short_title(page: Path) -> str:
    """Return the title of a page up to the first colon."""
    title = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M)
    assert title, f"{page} has no title"
    return re.sub(r"[`*]", "", title[1]).partition(":")[0].strip()


def _files(docs: Path) -> list[Path]:
    return [path for path in sorted(docs.rglob("*")) if path.is_file() and not path.is_relative_to(docs / "site")]

"""Build the documentation site: `make docs`, or `python docs/site/build.py --out FOLDER`.

Copies docs/ into a source folder, writes the generated references beside it, and runs Sphinx with warnings as errors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # the modules beside this one, however it is started

from pages import stage_pages  # noqa: E402
from references import write_references  # noqa: E402
from sphinx.cmd.build import main as sphinx  # noqa: E402


def build(out: Path) -> int:
    """Build the site into `out`, whose source goes into a folder beside it; return Sphinx's exit code."""
    source = out.with_name(f"{out.name}-source")
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    write_references(source / "reference")
    stage_pages(ROOT, source)
    strict = ["--fail-on-warning", "--keep-going", "--fresh-env", "--quiet"]
    return sphinx([*strict, "-b", "html", "-c", str(HERE), "-d", str(source / ".doctrees"), str(source), str(out)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder for the site (default: build/site)")
    folder = parser.parse_args().out.resolve()
    code = build(folder)
    if code == 0:
        sys.stdout.write(f"The site is in {folder}. Open {folder / 'index.html'}\n")
    sys.exit(code)

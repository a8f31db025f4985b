"""Fill a folder with the wheels that a Kaggle notebook without internet lacks: this package and its dependencies, never PyTorch.

    python deploy/wheelhouse.py wheelhouse --python 3.11 --python 3.12

The versions are those of the environment that runs this. Upload the folder as a Kaggle dataset and add it to the notebook, which
finds it. The configurations are copied beside the wheels.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, EXTRA = "two-tower-rec", "train"
IMAGE = """torch numpy scipy pandas pyarrow scikit-learn joblib matplotlib tensorboard tensorboard-data-server grpcio protobuf
absl-py markdown werkzeug markupsafe jinja2 pyyaml requests click rich pygments packaging pillow setuptools six"""
ON_KAGGLE = frozenset(re.findall(r"\S+", IMAGE))
"""Distributions that every Kaggle image has; pip takes the image's own. Everything that only PyTorch needs is there too."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")


def normal(name: str) -> str:
    """Return a distribution's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(package: str = PACKAGE, extra: str = EXTRA) -> dict[str, str]:
    """Return the versions of all dependencies of the package with an extra that Kaggle lacks, by name."""
    found: dict[str, str] = {}
    waiting, seen = [(package, frozenset({extra}))], set[tuple[str, frozenset[str]]]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        name, extras = one
        for text in requires(name) or []:
            required = Requirement(text)
            other, wanted = normal(required.name), frozenset(required.extras)
            if required.marker and not any(required.marker.evaluate({"extra": each}) for each in (*extras, "")):
                continue
            if other in ON_KAGGLE:
                continue
            try:
                found |= {} if other == package else {other: version(other)}
            except PackageNotFoundError:
                raise SystemExit(f"{other}, which {name} needs, is not installed here. Run: make venv") from None
            waiting.append((other, wanted or (extras if other == package else frozenset())))
    return dict(sorted(found.items()))


def main() -> None:
    """Build our wheel and download the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", dest="pythons", help="Python of the notebook; default: 3.11 and 3.12")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", given.folder, ROOT], check=True)
    pins = [f"{name}=={number}" for name, number in needed().items()]
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    for python in given.pythons or ["3.11", "3.12"]:
        options = ("--no-deps", "--only-binary", ":all:", "--python-version", python, *platforms)
        subprocess.run([*pip, "download", *options, "--dest", given.folder, *pins], check=True)
    shutil.copytree(ROOT / "configs", given.folder / "configs", dirs_exist_ok=True)
    wheels = sorted(given.folder.glob("*.whl"))
    sys.stdout.write(f"{given.folder}: {len(wheels)} wheels, {sum(file.stat().st_size for file in wheels) / 1e6:.0f} MB\n")


if __name__ == "__main__":
    main()

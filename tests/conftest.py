"""Shared by all tests: one thread per process, repeatable properties, the real data where it is, and one small town.

Nothing heavy is imported here at the top: the thread counts below must stand before NumPy and PyTorch read them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from twotower.data.dataset import Dataset
    from twotower.retrieval.recommender import Recommender
    from twotower.utils.config import Config

TOWER: dict[str, Any] = {"embedding_dim": 16, "hidden_dims": [16]}  # settings of a small tower

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # sums come out the same on every machine, and tests do not fight for cores
os.environ.setdefault("MPLBACKEND", "Agg")

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


class Town(NamedTuple):
    """A simulated town: its raw Yelp files, the folder they were prepared into, and the settings that did it."""

    raw: Path
    folder: Path
    config: Config


Lacking = Callable[[str], NoReturn]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test marked `alone` while no other test of this checkout runs, whichever worker it belongs to.

    Every test holds a shared lock, a test marked `alone` an exclusive one.
    A waiting test keeps the door locked against all later ones.
    """
    locks = item.config.cache.mkdir("locks")  # type: ignore[union-attr]
    alone = item.get_closest_marker("alone") is not None
    with (locks / "door").open("w") as door, (locks / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # a process forked by the test would keep the lock of the file


@pytest.fixture(scope="session")
def lacking() -> Lacking:
    """`lacking(reason)` ends a test that wants what is not there: skipped, but in CI, which installs everything, failed."""
    return pytest.fail if os.environ.get("CI") == "true" else pytest.skip


@pytest.fixture(scope="session")
def real_data(lacking: Lacking) -> Path:
    """The folder of real data that TWOTOWER_DATA names; a wrong name fails everywhere."""
    folder = os.environ.get("TWOTOWER_DATA")
    reason = (
        f"needs real data: TWOTOWER_DATA must name the folder with yelp-raw, s3rec-yelp and lightgcn-yelp2018; it is {folder!r}"
    )
    if folder and Path(folder).is_dir():
        return Path(folder)
    give_up: Lacking = pytest.fail if folder else lacking
    give_up(reason)


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    """A town of 300 users, 200 businesses and 6,000 events, simulated and prepared once; treat it as read-only."""
    from twotower.data.prepare import prepare
    from twotower.data.simulator.simulate import simulate
    from twotower.utils.config import parse_config

    root = tmp_path_factory.mktemp("town")
    simulate(root / "raw", users=300, businesses=200, events=6_000, seed=7)
    config = parse_config({"data": {"source": "yelp", "path": str(root / "raw")}, "prepare": {"text_dim": 8}})
    prepare(config, root / "dataset")
    return Town(root / "raw", root / "dataset", config)


@pytest.fixture(scope="module")
def dataset(town: Town) -> Dataset:
    """The dataset of the town, opened once per file; treat it as read-only."""
    from twotower.data.dataset import Dataset

    return Dataset.open(town.folder)


@pytest.fixture(scope="session")
def town_bundle(town: Town, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle of the town, its weights drawn at random; treat it as read-only."""
    from twotower.bundle.bundle import export_bundle
    from twotower.data.dataset import Dataset
    from twotower.utils.checkpoint import save_checkpoint

    from .documents import BEST
    from .drawn_bundle import MODEL, checkpoint_of, drawn

    root = tmp_path_factory.mktemp("town-bundle")
    dataset = Dataset.open(town.folder)
    model, config = drawn(dataset, MODEL)
    save_checkpoint(root / "best.pt", checkpoint_of(dataset, model, config))
    export_bundle(root / "best.pt", dataset, root / "bundle", metrics=BEST)
    return root / "bundle"


@pytest.fixture(scope="session")
def recommender(town_bundle: Path) -> Recommender:
    """Return a recommender of the opened bundle."""
    from twotower.retrieval.recommender import Recommender

    return Recommender.load(town_bundle)

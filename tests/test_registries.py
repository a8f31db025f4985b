"""Test registration from outside the package: the settings accept the entry, and it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import yaml
from torch import Tensor, nn

from twotower.baselines.base import Baseline
from twotower.baselines.baselines import BASELINES
from twotower.bundle.bundle import load_bundle
from twotower.bundle.index_tuning import tune_index
from twotower.cli import main
from twotower.commands.answering import INDEX_KINDS
from twotower.data.candidates import LOSSES, Candidates, Pool, infonce
from twotower.data.dataset import Dataset
from twotower.data.prepare import SOURCES
from twotower.data.sources.account import Rejects
from twotower.data.sources.engine import Engine
from twotower.data.sources.raw_tables import RawTables
from twotower.data.sources.yelp import read_yelp
from twotower.data.views import OBJECTIVES, AnyEventObjective, NextEventObjective
from twotower.errors import ConfigError
from twotower.models.layers.attention import Widths
from twotower.models.layers.interaction import INTERACTIONS, Interaction
from twotower.models.layers.pooling import POOLINGS, Pooling, running_sum
from twotower.models.towers.head import TOWERS
from twotower.pipeline.evaluate import evaluate_stage
from twotower.pipeline.stages import plan_stage, prepare_stage, train_stage
from twotower.retriever import Queries
from twotower.search.index import ExactIndex
from twotower.search.registry import INDEXES
from twotower.utils.config import Config, DataConfig, load_config, parse_config
from twotower.utils.metrics import METRICS, ndcg
from twotower.utils.registry import Registry, check_names, names_in
from twotower.utils.types import Float, Float64, Int, Mask

from .conftest import Town

if TYPE_CHECKING:
    from twotower.bundle.bundle import Bundle

REGISTRIES: list[Registry[Any]] = [LOSSES, OBJECTIVES, POOLINGS, INTERACTIONS, SOURCES, METRICS, BASELINES, INDEXES, TOWERS]
BY_KIND = {registry.kind: registry for registry in REGISTRIES}
NAME = "my_own"
SMALL = [
    "training={recipe: fixed, max_steps: 3, batch_size: 128}",
    "model.user_tower={embedding_dim: 8, hidden_dims: [8, 8], max_history: 10, num_blocks: 1}",
    "model.item_tower={hidden_dims: [8, 8], id_init: random}",
]


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """Take away what a test registers."""
    yield
    for registry in REGISTRIES:
        registry.pop(NAME, None)


def trained(town: Town, out: Path, *settings: str) -> Bundle:
    """Train with the settings, as the command line reads them, and open the bundle."""
    train_stage(load_config(None, [*SMALL, *settings]), town.folder, out)
    return load_bundle(out / "bundle")


def test_a_loss(town: Town, tmp_path: Path) -> None:
    asked = []

    @LOSSES.register(NAME)
    def mine(target_row: Int, pool: Pool, draws: int, rng: np.random.Generator) -> Candidates:
        asked.append(len(target_row))
        return infonce(target_row, pool, draws, rng)

    bundle = trained(town, tmp_path, f"training.loss={NAME}")
    assert bundle.config.training.loss == NAME and asked
    LOSSES.pop(NAME)
    assert load_bundle(tmp_path / "bundle").config.training.loss == NAME  # answering needs no loss


@pytest.mark.parametrize("base", [AnyEventObjective, NextEventObjective])
def test_an_objective(town: Town, tmp_path: Path, base: type[AnyEventObjective] | type[NextEventObjective]) -> None:
    planned = []

    class Mine(base):  # a parameter of the test
        def plan(self, rng: np.random.Generator) -> list[Int]:
            planned.append(super().plan(rng))
            return planned[-1]

    OBJECTIVES.register(NAME)(Mine)
    bundle = trained(town, tmp_path, f"training.objective={NAME}")
    assert planned and bundle.model.user_tower.encoder.causal == base.causal
    assert "MB" in plan_stage(bundle.config, town.folder, device="cpu", budget_gb=None, processes=1)


def test_a_pooling(town: Town, tmp_path: Path) -> None:
    @POOLINGS.register(NAME)
    class Sum(Pooling):
        def pool(self, x: Tensor, widths: Widths, at: Tensor, seen: Tensor) -> Tensor:  # noqa: ARG002 - one signature
            return running_sum(x, widths)[at]

    bundle = trained(town, tmp_path, f"model.user_tower.pooling={NAME}")
    assert isinstance(bundle.model.user_tower.pooling, Sum)
    assert np.isfinite(bundle.encode(Queries.of([[2, 3]], time_s=bundle.moment_s))).all()


def test_an_interaction(town: Town, tmp_path: Path) -> None:
    @INTERACTIONS.register(NAME)
    class Maximum(Interaction):
        def __init__(self, fields: int, dim: int, layers: int) -> None:  # noqa: ARG002 - one signature
            super().__init__()
            self.width = dim

        def forward(self, x: Tensor) -> Tensor:
            return x.amax(dim=1)

    bundle = trained(town, tmp_path, f"model.user_tower.interaction={NAME}", f"model.item_tower.interaction={NAME}")
    assert sum(isinstance(layer, Maximum) for layer in bundle.model.modules()) == 2


def test_a_source(town: Town, tmp_path: Path) -> None:
    @SOURCES.register(NAME)
    def mine(config: DataConfig, engine: Engine, rejects: Rejects) -> RawTables:
        return replace(read_yelp(config, engine, rejects), counts={"mine": 1})

    config = load_config(None, [f"data.source={NAME}", f"data.path={town.raw}", "prepare.text_dim=8"])
    manifest = prepare_stage(config, tmp_path / "dataset")
    assert manifest.config.data.source == NAME
    made = Dataset.open(tmp_path / "dataset")
    assert made.n_item_rows == Dataset.open(town.folder).n_item_rows
    SOURCES.pop(NAME)
    train_stage(load_config(None, SMALL), tmp_path / "dataset", tmp_path / "run")  # a dataset needs its source no more


def test_a_metric_and_a_baseline(town: Town, tmp_path: Path) -> None:
    @METRICS.register(NAME)
    def squared(hits: Mask, n_targets: Int, k: int) -> Float64:
        return ndcg(hits, n_targets, k) ** 2

    @BASELINES.register(NAME)
    class Backwards(Baseline):
        name = NAME
        needs_history: ClassVar[bool] = False

        def scores(self, queries: Queries) -> Float:
            return np.tile(-self.popularity, (len(queries), 1))

    trained(town, tmp_path / "run", f"training.eval_metric={NAME}@10")
    overrides = [f"evaluation.baselines=[popular,{NAME}]", "evaluation.ks=[10]", "evaluation.bootstrap_resamples=10"]
    report = evaluate_stage(tmp_path / "run", tmp_path, overrides)
    mine, popular = report.systems[NAME], report.systems["popular"]
    assert 0 <= mine[f"{NAME}@10"].value < popular[f"{NAME}@10"].value < popular["NDCG@10"].value
    assert NAME in (tmp_path / "report.html").read_text() and json.loads((tmp_path / "report.json").read_text())


def test_an_index(town: Town, tmp_path: Path) -> None:
    @INDEXES.register(NAME)
    class Mine(ExactIndex):
        kind = NAME

    trained(town, tmp_path / "run")
    best, rows = tune_index(tmp_path / "run" / "bundle", kinds=[NAME])
    assert best.kind == NAME and best.recall == 1 and rows == [best]
    assert isinstance(load_bundle(tmp_path / "run" / "bundle").index, Mine)


@pytest.mark.parametrize("kind", ["loss", "objective", "pooling", "interaction", "source", "baseline"])
def test_a_mistyped_name_is_refused_with_the_nearest(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, mark = next((place, mark) for place, mark in names_in(Config) if mark.kind == kind)
    wrong = mark.built_in[0] + "x"
    message = f"Setting '{place}': unknown {kind} '{wrong}'. Did you mean '{mark.built_in[0]}'?"
    value = [wrong] if kind == "baseline" else wrong
    assert main(["run", "--out", str(tmp_path / "run"), "--set", f"{place}={json.dumps(value)}"]) == 2
    assert message in capsys.readouterr().err
    values: dict[str, Any] = {}
    inner = values
    *sections, leaf = place.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    with pytest.raises(ConfigError) as error:  # settings made in Python are checked where a stage begins
        check_names(parse_config(values))
    assert message in str(error.value)


TRAIN = ["train", "--data", "x", "--out", "y"]
REFUSED = {
    "training.loss: infonec": "unknown loss 'infonec'. Did you mean 'infonce'?",
    "training.objective: nextevent": "unknown objective 'nextevent'. Did you mean 'next_event'?",
    "model.user_tower.pooling: average": "unknown pooling 'average'. Known: attention, last, mean.",
    "model.item_tower.interaction: dcnv2": "unknown interaction 'dcnv2'. Did you mean 'dcn'?",
    "data.source: Yelp": "unknown source 'Yelp'. Did you mean 'yelp'?",
    "evaluation.baselines: [popular, itemknn]": "unknown baseline 'itemknn'. Did you mean 'item_knn'?",
    "evaluation.baselines: [EASE]": "unknown baseline 'EASE'. Did you mean 'ease'?",
    "training.eval_metric: ndcg@10": "unknown metric 'ndcg@10'. Use a known name and a list length, as in 'NDCG@10'. Did you mean",
    "training.eval_metric: NDCG@ten": "the metric 'NDCG@ten' has no list length of at least 1. Write it as in 'NDCG@10'.",
}


def test_mistyped_names_are_refused_before_pytorch_is_imported(tmp_path: Path) -> None:
    commands, messages = [], []
    for number, (setting, message) in enumerate(REFUSED.items()):
        key, _, value = setting.partition(": ")
        node: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            node = {part: node}
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(node))
        commands += [[*TRAIN, "--set", f"{key}={value}"], ["run", "--out", "y", "--config", str(file)]]
        messages += [f"Setting '{key}': {message}"] * 2
    commands += [["evaluate", "x", "--set", "evaluation.baselines=[eas]"], ["tune-index", "x", "--kinds", "exact,hnws"]]
    messages += ["unknown baseline 'eas'. Did you mean 'ease'?", "Unknown index 'hnws'. Did you mean 'hnsw'?"]
    code = (
        "import json, sys; from twotower.cli import main\n"
        "codes = [main(command) for command in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'scipy', 'duckdb', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}, exit codes {codes}' if heavy or set(codes) != {2} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for message, line in zip(messages, done.stderr.splitlines(), strict=True):
        assert message in line


def test_the_names_of_every_registry_are_repeated_where_they_are_checked() -> None:
    assert set(INDEX_KINDS) == set(INDEXES)
    marks = {mark.kind: mark for _, mark in names_in(Config)}
    assert marks.keys() == BY_KIND.keys() - {"index"}
    for kind, mark in marks.items():
        assert mark.built_in == tuple(dict.fromkeys(mark.built_in)) and set(mark.built_in) == set(BY_KIND[kind])


@pytest.mark.parametrize("registry", REGISTRIES, ids=BY_KIND)
def test_names_of_the_package_are_kept_and_unknown_ones_explained(registry: Registry[Any]) -> None:
    name = next(iter(registry))
    with pytest.raises(ConfigError, match=f"The {registry.kind} '{name}' is part of the package"):
        registry.register(name)
    with pytest.raises(ConfigError, match=f"Unknown {registry.kind} '{name}x'. Did you mean '{name}'"):
        registry[f"{name}x"]
    first: Callable[[], None] = registry.register(NAME)(nn.Identity)
    registry.register(NAME)(nn.Linear)
    assert first is nn.Identity and registry[NAME] is nn.Linear  # as a notebook's cell that runs twice

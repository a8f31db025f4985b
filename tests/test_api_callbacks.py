"""Callbacks of a training, loggers, Ctrl-C, the report's parts, and the comparison of two models."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import twotower as tt
from twotower.errors import ConfigError, DataError, TrainingError
from twotower.utils.console import Bar

from .shop import FAST, NAMED, shop


class Seen(tt.Callback):
    """Note what is called, and stop at a step."""

    def __init__(self, last: int | None = None) -> None:
        self.calls: list[str] = []
        self.steps: list[int] = []
        self.metrics: list[Mapping[str, float]] = []
        self.last = last

    def on_start(self, training: tt.Training) -> None:  # noqa: ARG002
        self.calls.append("start")

    def on_step(self, training: tt.Training) -> None:
        self.steps.append(training.step)
        if training.step == self.last:
            training.stop()

    def on_validation(self, training: tt.Training, metrics: Mapping[str, float]) -> None:
        assert training.best_step == training.step or training.best is not None
        self.metrics.append(metrics)

    def on_end(self, training: tt.Training) -> None:
        self.calls.append(f"end {training.step} of {training.last_step}")


def fitted(*callbacks: tt.Callback, **settings: Any) -> tt.Model:
    orders, products = shop()
    return tt.Model(seed=0, verbose=0, callbacks=callbacks, **{**FAST, **settings}).fit(orders, items=products, **NAMED)


def test_callbacks_see_every_step_and_every_validation(tmp_path: Path) -> None:
    seen = Seen()
    model = fitted(seen, tt.TensorBoardLogger(tmp_path / "board"))
    assert seen.calls == ["start", "end 12 of 12"] and seen.steps == list(range(1, 13))
    assert seen.metrics and all({"train_loss", "NDCG@10"} <= metrics.keys() for metrics in seen.metrics)
    rows = [row for row in model.report.data.curves if "train_loss" in row]
    assert [row["train_loss"] for row in rows] == [metrics["train_loss"] for metrics in seen.metrics]
    assert any((tmp_path / "board").glob("events.*"))
    assert model.folder is not None and any((model.folder / "model" / "tensorboard").glob("events.*"))


def test_a_callback_stops_the_training_with_a_validation() -> None:
    seen = Seen(last=5)
    model = fitted(seen)
    assert seen.steps == [1, 2, 3, 4, 5] and seen.calls[-1] == "end 5 of 12"
    assert [row["step"] for row in model.report.data.curves if "train_loss" in row][-1] == 5


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Handle Ctrl-C as a process in the foreground does: one that starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(tt.Callback):
    """Press Ctrl-C at a step."""

    def on_step(self, training: tt.Training) -> None:
        if training.step == 3:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_model_that_answers() -> None:
    model = fitted(Interrupt())
    assert len(model.recommend("C0001", k=3)) == 3 and "Not evaluated" in repr(model)
    with pytest.raises(DataError, match="has no report"):
        _ = model.report


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("more", [{}, {"eval_every_epochs": 50}])
def test_ctrl_c_in_the_recipe_race_leaves_a_model(call: int, more: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At any step of the race, also after a validation that only the race needed, which saves no best model."""
    from twotower.trainers.two_tower_trainer import TwoTowerTrainer

    calibrate, calls = TwoTowerTrainer.after_step, iter(range(1, 100))

    def interrupted(self: TwoTowerTrainer) -> None:
        calibrate(self)
        if self.label == "compare recipes" and next(calls) == call:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TwoTowerTrainer, "after_step", interrupted)
    model = fitted(training={"max_steps": 16, **more})
    assert len(model.recommend("C0001", k=3)) == 3 and "Not evaluated" in repr(model)


def test_a_callback_that_fails_ends_the_others() -> None:
    class Failing(tt.Callback):
        def on_step(self, training: tt.Training) -> None:  # noqa: ARG002
            raise ZeroDivisionError

    seen = Seen()
    with pytest.raises(ZeroDivisionError):
        fitted(seen, Failing())
    assert seen.calls == ["start", "end 1 of 12"]


def test_mlflow_keeps_settings_and_metrics(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    logger = tt.MLflowLogger(f"file://{tmp_path / 'runs'}", experiment="shop", run_name="first")
    fitted(logger)
    assert logger.run_id is not None
    client = MlflowClient(f"file://{tmp_path / 'runs'}")
    run = client.get_run(logger.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "first"
    assert run.data.params["training.max_steps"] == "12"
    assert [point.step for point in client.get_metric_history(logger.run_id, "train_loss")][-1] == 12
    assert "NDCG_at_10" in run.data.metrics


def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    fitted(tt.WandbLogger("shop", mode="offline", dir=str(tmp_path)))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_report_is_a_frame_a_figure_and_a_page(tmp_path: Path) -> None:
    report = fitted().report
    frame = report.frame()
    assert isinstance(frame, pd.DataFrame) and set(frame["system"]) == {"two-tower", "popularity", "item-kNN"}
    assert frame["NDCG@10"].is_monotonic_decreasing and (frame["low"] <= frame["NDCG@10"]).all()
    figure = report.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0].startswith("NDCG@10") and {"mean training loss", "history lengths"} <= set(titles)
    page = report.save(tmp_path / "report.html").read_text()
    assert report.verdict in page and "long tail" in page
    assert any("item-kNN" in sentence and "%" in sentence for sentence in report.sentences)


def test_two_models_are_compared_on_the_same_queries() -> None:
    one, other = fitted(), fitted(model={"exclude_features": ["item.brand", "item.price"]})
    compared = tt.compare(one, other)
    values = compared.frame().set_index("metric").loc["NDCG@10"]
    assert values["a"] == pytest.approx(one.report.frame().set_index("system").loc["two-tower", "NDCG@10"], abs=1e-6)
    assert values["low"] <= values["difference"] <= values["high"]
    assert 0 <= compared.overlap <= 1 and "a is" in compared.verdict
    assert compared.lists["user"].nunique() == 5 and len(compared.lists) == 50
    same = tt.compare(one, one)
    assert same.overlap == 1 and same.verdict.startswith("A tie: NDCG@10 of a is equal to")
    orders, _ = shop(users=150)
    with pytest.raises(DataError, match="different prepared data"):
        tt.compare(one, tt.Model(verbose=0, **FAST).fit(orders, user="customer", item="product", time="ordered_at"))


def test_a_tower_of_your_own_is_trained_saved_and_opened(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from twotower.models.towers.head import TOWERS

    @tt.register_tower("small")
    class Small(nn.Module):
        def __init__(self, fields: int, config: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(fields, 1))
            self.out = nn.Linear(config.embedding_dim, config.hidden_dims[-1])

        def forward(self, fields: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self.out((fields * self.weight).sum(dim=1))
            return vectors

    try:
        model = fitted(model={"user_tower": {"tower": "small"}, "item_tower": {"tower": "small"}})
        lists = model.recommend(["C0001"], k=5, explain=True)
        assert len(lists) == 5 and lists["reasons"].map(len).min() > 0
        again = tt.load(model.save(tmp_path / "shop"))
        pd.testing.assert_frame_equal(again.recommend(["C0001"], k=5, explain=True), lists)
    finally:
        del TOWERS["small"]
    with pytest.raises(ConfigError, match="unknown tower 'small'"):
        fitted(model={"user_tower": {"tower": "small"}})


def test_a_tower_of_the_wrong_shape_is_an_error() -> None:
    from torch import Tensor, nn

    from twotower.models.towers.head import TOWERS

    @tt.register_tower("flat")
    class Flat(nn.Module):
        def __init__(self, fields: int, config: Any) -> None:  # noqa: ARG002
            super().__init__()

        def forward(self, fields: Tensor) -> Tensor:
            return fields.flatten(1)

    try:
        with pytest.raises(ConfigError, match="The tower Flat gives the shape"):
            fitted(model={"user_tower": {"tower": "flat"}})
    finally:
        del TOWERS["flat"]


@pytest.mark.parametrize(
    ("name", "register", "settings", "said"),
    [
        ("loss", tt.register_loss, {"training": {**FAST["training"], "loss": "mine"}}, "The loss 'mine' gives a NoneType"),
        ("metric", tt.register_metric, {}, r"The metric 'mine' gives the shape \(\) for \d+ queries"),
    ],
)
def test_a_function_that_returns_something_else_is_an_error(name: str, register: Any, settings: dict[str, Any], said: str) -> None:
    from twotower.data.candidates import LOSSES
    from twotower.utils.metrics import METRICS

    register("mine")(lambda *_: None)
    try:
        with pytest.raises(ConfigError, match=said):
            fitted(**settings)
    finally:
        (LOSSES if name == "loss" else METRICS).pop("mine")


def test_mlflow_says_where_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tracking_uri is 5"):
        tt.MLflowLogger(5)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"Cannot write .*below"):
        fitted(tt.MLflowLogger(tmp_path / "file" / "below"))


def test_the_bar_follows_a_stage_that_begins_again(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        for done, total in ((80, 80), (2, 80), (100, 160), (160, 160)):
            bar.report("compare recipes", done, total)
        bar._bar.refresh()
    assert "160/160" in capsys.readouterr().err


def test_the_bar_shows_stages_and_validation_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    orders, products = shop()
    tt.Model(seed=0, **FAST).fit(orders, items=products, **NAMED)
    shown = capsys.readouterr().err
    assert "train: " in shown and "NDCG@10=" in shown and "train_loss=" in shown and "evaluate: 100%" in shown
    assert "step 12/12" not in shown
    tt.Model(seed=0, verbose=0, **FAST).fit(orders, items=products, **NAMED)
    shown = capsys.readouterr().err
    assert all(line.startswith("health: ") for line in shown.splitlines()), "warnings only"


def test_the_log_of_a_run_has_the_loss_however_short_it_is(tmp_path: Path) -> None:
    orders, products = shop()
    short = {**FAST, "training": {"max_steps": 1, "recipe": "fixed"}}
    tt.Model(verbose=0, **short).fit(orders, items=products, folder=tmp_path / "run", **NAMED)
    rows = [json.loads(line) for line in (tmp_path / "run" / "model" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_loss"] > 0 for row in rows if "train_loss" in row] == [True]

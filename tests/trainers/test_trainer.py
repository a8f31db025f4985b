"""Training: resumed equals uninterrupted to the bit, the same seed gives the same run, and every failure is one clear line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.views import VIEWS
from twotower.errors import TrainingError
from twotower.losses import LOSSES
from twotower.trainers.optimizer import choose_device, choose_precision, make_optimizer, schedule
from twotower.trainers.two_tower_trainer import TwoTowerTrainer

TOWER = {"embedding_dim": 16, "hidden_dims": [16]}


@pytest.fixture(scope="module")
def dataset(town) -> Dataset:
    return Dataset.open(town.folder)


def settings(**training: object) -> Config:
    common = {"batch_size": 256, "max_steps": 20, "eval_every": 0.4, "log_every": 1, "learning_rate": 0.01, "patience": 50}
    return parse_config({"model": {"user_tower": TOWER, "item_tower": TOWER}, "training": {**common, **training}})


def figures(out, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("view", ["set", "causal"])
def test_resumed_equals_uninterrupted_to_the_bit(dataset, tmp_path, view):
    config = settings(view=view)
    whole = TwoTowerTrainer(dataset, config, tmp_path / "whole")
    whole.fit()

    broken = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    step = broken._step

    def stop_after_thirteen(batches, board):
        step(batches, board)
        if broken.at.step == 13:
            raise KeyboardInterrupt

    broken._step = stop_after_thirteen
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    torch.manual_seed(99)  # the checkpoint brings its own random state
    resumed.fit(resume=True)

    assert resumed.at == whole.at
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert figures(tmp_path / "broken", "loss") == figures(tmp_path / "whole", "loss")


@pytest.mark.parametrize("view", sorted(VIEWS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_twenty_steps_learn(dataset, tmp_path, view, loss):
    TwoTowerTrainer(dataset, settings(view=view, loss=loss), tmp_path).fit()
    losses = figures(tmp_path, "loss")
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])


def test_golden_losses(dataset, tmp_path):
    """The same seed gives the same run: a change that is not meant to change results keeps these figures."""
    TwoTowerTrainer(dataset, settings(), tmp_path).fit()
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    assert figures(tmp_path, "loss") == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_and_checkpointing_train(dataset, tmp_path, precision):
    TwoTowerTrainer(dataset, settings(precision=precision, gradient_checkpointing=True), tmp_path).fit()
    losses = figures(tmp_path, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_gradient_checkpointing_changes_nothing(dataset, tmp_path):
    runs = []
    for save in (False, True):
        trainer = TwoTowerTrainer(dataset, settings(gradient_checkpointing=save, max_steps=5), tmp_path / str(save))
        trainer.fit()
        runs.append(figures(tmp_path / str(save), "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_accumulation_averages_micro_batches(dataset, tmp_path):
    """One step over two micro-batches has the mean of their gradients."""
    trainer = TwoTowerTrainer(dataset, settings(accumulation=2, max_steps=1), tmp_path)
    batches = [batch for batch, _ in zip(trainer.batches(0, 0), range(2), strict=False)]
    trainer.model.eval()
    each = []
    for batch in batches:
        trainer.model.zero_grad()
        trainer.loss(batch)[0].backward()
        each.append(trainer.model.tables.lookup("item.id").weight.grad.clone())
    trainer.model.zero_grad()
    for batch in batches:
        (trainer.loss(batch)[0] / 2).backward()
    torch.testing.assert_close(trainer.model.tables.lookup("item.id").weight.grad, (each[0] + each[1]) / 2)
    trainer.fit()
    assert trainer.at.examples == sum(len(batch.target) for batch in batches)


def test_accumulation_beyond_the_epoch_takes_what_there_is(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(accumulation=1000, max_steps=2), tmp_path)
    trainer.fit()
    assert trainer.at.examples == 2 * int(trainer.loader.events.positive.sum())


def test_stops_when_validation_no_longer_improves(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(max_steps=500, patience=2, eval_every=0.2), tmp_path)
    trainer.validate = lambda: {"NDCG@10": 1.0 / (1 + trainer.at.step)}
    reached = trainer.fit()
    assert reached.waited == 2
    assert reached.step < 500
    assert torch.load(tmp_path / "best.pt", weights_only=True)["progress"]["step"] == reached.best_step < reached.step


def test_non_finite_loss_is_an_error_before_the_update(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(), tmp_path)
    before = trainer.model.log_temperature.clone()
    trainer.loss = lambda _: (trainer.model.log_temperature * float("nan"), 1)
    with pytest.raises(TrainingError, match="finite"):
        trainer.fit()
    assert torch.equal(before, trainer.model.log_temperature)


def test_resume_says_what_is_wrong(dataset, tmp_path):
    with pytest.raises(TrainingError, match="Found none"):
        TwoTowerTrainer(dataset, settings(), tmp_path).fit(resume=True)
    TwoTowerTrainer(dataset, settings(max_steps=2), tmp_path).fit()
    with pytest.raises(TrainingError, match=r"training\.learning_rate was 0\.01, is 0\.02"):
        TwoTowerTrainer(dataset, settings(max_steps=2, learning_rate=0.02), tmp_path).fit(resume=True)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:1000])
    with pytest.raises(TrainingError, match="damaged"):
        TwoTowerTrainer(dataset, settings(max_steps=2), tmp_path).fit(resume=True)


def test_nothing_to_train_on(dataset, tmp_path):
    broken = Dataset(dataset.path, dataset.manifest)
    broken.__dict__["events"] = replace(dataset.events, positive=dataset.events.positive & False)
    with pytest.raises(TrainingError, match="positive"):
        TwoTowerTrainer(broken, settings(), tmp_path)


def test_precision_follows_the_hardware():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_precision("auto", cpu) is torch.float32
    for capability, expected in [
        ((6, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ]:
        assert choose_precision("auto", cuda, capability) is expected
    assert choose_precision("bf16", cpu) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_is_said():
    with pytest.raises(TrainingError, match="Found none"):
        choose_device("cuda")


def test_schedule_rises_then_falls():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.01


def test_no_decay_on_tables_norms_and_biases(dataset, tmp_path):
    model = TwoTowerTrainer(dataset, settings(), tmp_path).model
    decayed, plain = make_optimizer(model, 0.1, 0.01).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 and not names[id(p)].startswith("tables") for p in decayed["params"])
    assert {"tables.item/id.weight", "log_temperature"} <= {names[id(p)] for p in plain["params"]}


def test_a_full_disk_keeps_the_checkpoint_before(dataset, tmp_path, monkeypatch):
    trainer = TwoTowerTrainer(dataset, settings(max_steps=2), tmp_path)
    trainer.fit()
    before = (tmp_path / "last.pt").read_bytes()

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twotower.checkpoint.torch.save", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        trainer._save("last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))

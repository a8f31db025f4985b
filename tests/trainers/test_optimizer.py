"""Test the choice of device, precision, learning rate and weight decay, and the loss scale of half precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from twotower.errors import TrainingError
from twotower.trainers import base_trainer
from twotower.trainers.optimizer import LossScale, choose_device, choose_precision, make_optimizer
from twotower.trainers.schedule import Schedule
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import TrainingConfig, parse_config
from twotower.utils.hardware import Gpu, Torch

from .conftest import figures, settings


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_and_checkpointing_train(dataset, tmp_path, precision):
    TwoTowerTrainer(dataset, settings(precision=precision, gradient_checkpointing=True, max_steps=12), tmp_path).fit()
    losses = figures(tmp_path, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])


def test_an_overflow_leaves_the_weights_alone_and_the_scale_recovers(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(precision="fp16", log_every=1000), tmp_path)
    trainer.scaler = LossScale(enabled=True, patience=2)
    trainer.scaler.scale.fill_(2.0**140)  # times any gradient: infinite
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches = trainer.batches(0, 0)
    trainer._step(next(batches))
    assert float(trainer.scaler.scale) == 2.0**139
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.scaler.scale.fill_(1024.0)
    for _ in range(4):
        trainer._step(next(batches))
    assert float(trainer.scaler.scale) == 4096.0
    assert not torch.equal(trainer.model.state_dict()["user_tower.stars"], before["user_tower.stars"])


def test_gradients_that_overflow_unscaled_are_an_error(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(log_every=3), tmp_path)
    weight = trainer.model.user_tower.stars
    weight.register_hook(lambda grad: grad * float("inf"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"The gradients overflowed.*loss scale is already at its minimum"):
        trainer.fit()
    assert trainer.state.step == 3, "the first line of the log is the first to be told"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "tables.item/id.weight", name


def test_the_scale_recovers_by_itself(dataset, tmp_path):
    """A scale that overflows for some steps is halved until they are taken; good steps are counted from the last overflow."""
    trainer = TwoTowerTrainer(dataset, settings(precision="fp16", log_every=1000), tmp_path)
    trainer.scaler.scale.fill_(2.0**32)
    before = trainer.model.user_tower.stars.clone()
    goods = []
    for batch in [*trainer.batches(0, 0), *trainer.batches(1, 0)][:20]:
        trainer._step(batch)
        goods.append(int(trainer.scaler.good))
    skipped = goods.count(0)
    assert 0 < skipped < 20 and goods == [0] * skipped + list(range(1, 21 - skipped))
    assert float(trainer.scaler.scale) == 2.0 ** (32 - skipped)
    assert not torch.equal(trainer.model.user_tower.stars, before)
    trainer.scaler.update(torch.tensor(False))
    assert int(trainer.scaler.good) == 0


def test_a_scaled_norm_is_logged_unscaled(dataset, tmp_path):
    norms = []
    for precision in ("fp32", "fp16"):
        TwoTowerTrainer(dataset, settings(precision=precision, max_steps=3), tmp_path / precision).fit()
        norms.append(figures(tmp_path / precision, "grad_norm"))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize(("first", "second", "scale"), [("fp16", "fp32", 1.0), ("fp32", "fp16", 65536.0), ("fp16", "fp16", 512.0)])
def test_a_run_resumed_in_another_precision_has_the_scale_of_its_own(dataset, tmp_path, monkeypatch, first, second, scale):
    """As "auto" may mean another precision on another device, with the same settings."""
    chosen = {"fp16": torch.float16, "fp32": torch.float32}
    monkeypatch.setattr(base_trainer, "choose_precision", lambda *_: chosen[first])
    trainer = TwoTowerTrainer(dataset, settings(max_steps=4), tmp_path)
    trainer.scaler.scale.fill_(512.0 if first == "fp16" else 1.0)
    trainer._save("last.pt")
    monkeypatch.setattr(base_trainer, "choose_precision", lambda *_: chosen[second])
    resumed = TwoTowerTrainer(dataset, settings(max_steps=4), tmp_path)
    resumed._load()
    assert float(resumed.scaler.scale) == scale


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


def test_a_gpu_is_chosen_only_where_its_kernels_are():
    t4, p100 = Gpu("T4", (7, 5), 15 << 30), Gpu("P100", (6, 0), 16 << 30)
    built = {"version": "2.13.0", "build": "CUDA 13.0", "arch_list": ("sm_75", "sm_80", "sm_90")}
    assert choose_device("auto", Torch(**built, gpus=(t4,))).type == "cuda"
    assert choose_device("cpu", Torch(**built, gpus=(t4,))).type == "cpu"
    assert choose_device("auto", Torch(**built, gpus=(p100,))).type == "cpu"
    with pytest.raises(TrainingError, match="no kernels for the GPU it sees"):
        choose_device("cuda", Torch(**built, gpus=(p100,)))
    with pytest.raises(TrainingError, match="found no GPU"):
        choose_device("cuda", Torch(**built, gpus=()))


def test_schedule_rises_then_falls():
    schedule = Schedule.of(TrainingConfig(max_steps=100, warmup_frac=0.1, learning_rate=1), 10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.01


def test_no_decay_on_tables_norms_and_biases(dataset, tmp_path):
    config = settings()
    learning = config.model_copy(update={"model": config.model.model_copy(update={"learn_temperature": True})})
    model = TwoTowerTrainer(dataset, learning, tmp_path).model
    decayed, plain = make_optimizer(model, 0.1, 0.01).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 and not names[id(p)].startswith("tables") for p in decayed["params"])
    assert {"tables.item/id.weight", "log_temperature"} <= {names[id(p)] for p in plain["params"]}


def test_the_gradient_cache_teaches_every_weight_in_a_short_type_too(dataset, tmp_path):
    """The pass without gradients caches cast weights; reusing them would stop the gradients to the weights."""
    still = {"embedding_dim": 16, "hidden_dims": [32, 16], "dropout": 0, "id_dropout": 0}
    towers = {"user_tower": {**still, "history_dropout": 0}, "item_tower": {**still, "neighbour_dropout": 0}}
    gradients = []
    for micro in (None, 64):
        config = parse_config({"model": towers, "training": {"batch_size": 256, "precision": "bf16", "micro_batch_size": micro}})
        trainer = TwoTowerTrainer(dataset, config, tmp_path / str(micro))
        trainer.model.eval()  # nothing is dropped
        batch = trainer.loader.batch(trainer.loader.plan(0)[0], 0, 0)
        with torch.autocast("cpu", torch.bfloat16):
            trainer.backward(batch, 1.0)
        gradients.append({name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None})
    whole, cached = gradients
    assert whole.keys() == cached.keys() and {"geo.weight", "user_tower.encoder.blocks.0.out.weight"} <= whole.keys()
    for name, value in whole.items():
        assert (cached[name] - value).norm() <= 0.02 * value.norm(), name

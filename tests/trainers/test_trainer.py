"""Test training: resumed and uninterrupted runs are bit-identical, seeds reproduce runs, and every error is one clear line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from twotower.data.candidates import LOSSES
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.data.views import OBJECTIVES
from twotower.errors import ConfigError, TrainingError
from twotower.trainers.schedule import Schedule
from twotower.trainers.two_tower_trainer import TwoTowerTrainer
from twotower.utils.config import parse_config
from twotower.utils.losses import softmax_loss

from ..documents import with_split
from .conftest import figures, settings


def stop_after(trainer: TwoTowerTrainer, steps: int) -> None:
    """Start a training that is interrupted."""
    step = trainer._step

    def then_stop(batch):
        step(batch)
        if trainer.state.step == steps:
            raise KeyboardInterrupt

    trainer._step = then_stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_resumed_equals_uninterrupted_to_the_bit(dataset, tmp_path, objective):
    config = settings(objective=objective)
    whole = TwoTowerTrainer(dataset, config, tmp_path / "whole")
    whole.fit()

    broken = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    stop_after(broken, 13)
    resumed = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    torch.manual_seed(99)  # what is dropped depends on the step alone
    resumed.fit(resume=True)

    assert resumed.state == whole.state
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert figures(tmp_path / "broken", "loss") == figures(tmp_path / "whole", "loss")


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_twenty_steps_learn(dataset, tmp_path, objective, loss):
    TwoTowerTrainer(dataset, settings(objective=objective, loss=loss), tmp_path).fit()
    losses = figures(tmp_path, "loss")
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])


def test_fields_can_be_left_out(dataset, tmp_path):
    """All fields except ids and history can be left out; an unknown name gets a suggestion."""
    whole = TwoTowerTrainer(dataset, settings(), tmp_path / "whole")
    embeddings = {"item": (whole.model.item_embedding, whole.model.item_state), "user": (whole.model.user_embedding,)}
    fields = [f"{side}.{spec.name}" for side, parts in embeddings.items() for part in parts for spec in part.fields]
    left_out = [name for name in fields if not name.endswith(".id")]
    assert {"item.state", "item.neighbours", "user.home", "user.month"} <= set(left_out)
    model = settings().model.model_copy(update={"exclude_features": left_out})
    bare = TwoTowerTrainer(dataset, settings(max_steps=3).model_copy(update={"model": model}), tmp_path / "bare")
    bare.fit()
    assert set(bare.model.tables) == {"item/id", "user/id"} and not bare.model.item_state.fields
    with pytest.raises(ConfigError, match=r"has the unknown field 'item.stat'. Did you mean 'item.state'"):
        model = settings().model.model_copy(update={"exclude_features": ["item.stat"]})
        TwoTowerTrainer(dataset, settings().model_copy(update={"model": model}), tmp_path / "wrong")


def test_gradient_checkpointing_changes_nothing(dataset, tmp_path):
    runs = []
    for save in (False, True):
        trainer = TwoTowerTrainer(dataset, settings(gradient_checkpointing=save, max_steps=5), tmp_path / str(save))
        trainer.fit()
        runs.append(figures(tmp_path / str(save), "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("objective", ["any_event", "next_event"])
def test_gradient_cache_is_one_large_batch(dataset, tmp_path, objective):
    """In float64 and with dropout, many micro-batches give the gradients of the full batch."""
    config = settings(objective=objective, micro_batch_size=50, negatives_per_positive=2)
    trainer = TwoTowerTrainer(dataset, config, tmp_path)
    trainer.model.double().train()
    batch = doubled(next(trainer.batches(0, 0)))
    assert len(batch.users) >= 3 and len(batch.items) >= 3
    loss, _ = trainer.backward(batch, torch.ones(()))
    cached = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    trainer.model.zero_grad()
    users = [trainer._encode(n, lambda part=part: trainer.model.encode_users(part)) for n, part in enumerate(batch.users)]
    first = len(users)
    items = [trainer._encode(first + n, lambda part=part: trainer.model.encode_items(part)) for n, part in enumerate(batch.items)]
    whole = softmax_loss(
        torch.cat(users), torch.cat(items), target=batch.target, log_weight=batch.log_weight, masked=batch.masked,
        temperature=trainer.model.temperature(), prior=batch.prior, weight=batch.weight,
    )  # fmt: skip
    whole.backward()
    assert float(loss) == pytest.approx(float(whole.detach()), abs=1e-9)
    assert cached.keys() == {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(cached[name], p.grad, rtol=1e-6, atol=1e-9)


def doubled(batch):
    """Return the batch with float64 fields."""

    def wide(part):
        fields = {name: value.double() if value.is_floating_point() else value for name, value in part.fields.items()}
        return replace(part, fields=fields, **({"items": wide(part.items)} if hasattr(part, "items") else {}))

    return replace(
        batch,
        users=tuple(wide(part) for part in batch.users),
        items=tuple(wide(part) for part in batch.items),
        log_weight=batch.log_weight.double(),
        prior=batch.prior.double(),
        weight=batch.weight.double(),
    )


def test_micro_batches_hold_the_same_examples(dataset, tmp_path):
    whole = next(TwoTowerTrainer(dataset, settings(), tmp_path).batches(0, 0))
    split = next(TwoTowerTrainer(dataset, settings(micro_batch_size=64), tmp_path).batches(0, 0))
    assert sum(len(part.at) for part in split.users) == len(whole.target) == whole.examples
    assert torch.equal(torch.cat([part.row for part in split.items]), whole.items[0].row)
    for name in ("target", "log_weight", "weight", "weight_sum"):
        assert torch.equal(getattr(whole, name), getattr(split, name)), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tables_updated_by_rows_learn_and_resume_to_the_bit(dataset, tmp_path, dtype):
    by_rows = {"update": "sparse", "dtype": dtype, "weight_decay": 0.01}
    values = settings().model_dump(mode="json")
    values["model"]["tables"] = {"item.id": by_rows, "user.id": {**by_rows, "max_rows": 64}}
    config = parse_config(values)
    whole = TwoTowerTrainer(dataset, config, tmp_path / "whole")
    whole.fit()
    losses = figures(tmp_path / "whole", "loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    broken = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    stop_after(broken, 13)
    resumed = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    resumed.fit(resume=True)
    for (name, mine), theirs in zip(resumed.tables.items(), whole.tables.values(), strict=True):
        for key, value in mine.state().items():
            assert torch.equal(value, theirs.state()[key]), (name, key)


def test_stops_when_validation_no_longer_improves(dataset, tmp_path):
    trainer = TwoTowerTrainer(dataset, settings(max_steps=500, patience=2, eval_every_epochs=0.2), tmp_path)
    trainer.validate = lambda: {"NDCG@10": 1.0 / (1 + trainer.state.step)}
    reached = trainer.fit()
    assert reached.validations_since_best == 2
    assert reached.step < 500
    assert torch.load(tmp_path / "best.pt", weights_only=True)["progress"]["step"] == reached.best_step < reached.step


def test_without_a_validation_part_the_end_of_the_schedule_is_the_model(dataset, tmp_path, monkeypatch):
    held_out = dataset.held_out("valid", max_queries=0)
    monkeypatch.setattr(dataset, "held_out", lambda *_, **__: held_out)
    with pytest.raises(TrainingError, match=r"The validation part of .* is empty"):
        TwoTowerTrainer(dataset, settings(), tmp_path)
    monkeypatch.setattr(dataset, "manifest", with_split(dataset.manifest, valid=0.0))
    reached = TwoTowerTrainer(dataset, settings(), tmp_path).fit(stop_frac=0.5)
    assert (reached.step, reached.best_step, reached.total_steps, reached.best) == (10, 10, 20, None)
    rates = figures(tmp_path, "learning_rate")
    assert len(rates) == 10 and rates[-1] == Schedule.of(settings().training, 1).rate(9), "as if it went on to step 20"
    assert not figures(tmp_path, "NDCG@10")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["progress"]["step"] == 10


@pytest.mark.parametrize("tables", [{}, {"item.id": {"update": "sparse"}}])
def test_a_loss_that_is_not_finite_changes_no_weight_and_no_checkpoint(dataset, tmp_path, tables):
    """From the step that has it on: the first line of the log says which step it was."""
    values = settings(log_every=7, max_steps=20).model_dump(mode="json")
    values["model"]["tables"] = tables
    trainer = TwoTowerTrainer(dataset, parse_config(values), tmp_path)
    trainer.begin()
    batches = [*trainer.batches(0, 0), *trainer.batches(1, 0)][:7]
    for batch in batches[:2]:
        trainer._step(batch)
    trainer._save("last.pt")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    real = trainer.backward
    trainer.backward = lambda batch, scale: (real(batch, scale)[0] * float("nan"), 1)
    for batch in batches[2:4]:
        trainer._step(batch)
    trainer.backward = real
    for batch in batches[4:6]:
        trainer._step(batch)
    saved = (tmp_path / "last.pt").read_bytes()
    for fails in (lambda: trainer._save("last.pt"), lambda: trainer._validate(), lambda: trainer._step(batches[6])):
        with pytest.raises(TrainingError, match=r"step 3"):
            fails()
    assert (tmp_path / "last.pt").read_bytes() == saved
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_mean_training_loss_is_that_since_the_last_validation(dataset, tmp_path):
    """Also of a run that was cut between two validations."""
    config = settings(eval_every_epochs=0.4, max_steps=20)
    TwoTowerTrainer(dataset, config, tmp_path / "whole").fit()
    broken = TwoTowerTrainer(dataset, config, tmp_path / "broken")
    step = broken._step

    def then_stop(batch):
        step(batch)
        if broken.state.step == 10:
            broken._save("last.pt")
            raise KeyboardInterrupt

    broken._step = then_stop
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    TwoTowerTrainer(dataset, config, tmp_path / "broken").fit(resume=True)
    for name in ("whole", "broken"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        checks = [(row["step"], row["stats"]["training_loss"]) for row in rows if "stats" in row]
        assert len(checks) > 1
        for (begin, _), (end, mean) in pairwise([(0, 0.0), *checks]):
            assert mean == pytest.approx(np.mean([losses[n] for n in range(begin + 1, end + 1)]), rel=1e-6), (name, end)


def test_resume_says_what_is_wrong(dataset, tmp_path):
    with pytest.raises(TrainingError, match="No checkpoint at"):
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


def test_training_without_a_positive_first_event_is_refused(dataset, tmp_path):
    """With seen items excluded, the targets of the next-event objective are first events of items; here none is positive."""
    broken, events = Dataset(dataset.path, dataset.manifest), dataset.events
    pair = events.user_row * dataset.n_item_rows + events.item_row
    first = np.isin(np.arange(len(pair)), np.unique(pair, return_index=True)[1])
    broken.__dict__["events"] = replace(events, positive=events.positive & ~first)
    with pytest.raises(TrainingError, match="no positive events to train on"):
        TwoTowerTrainer(broken, settings(objective="next_event"), tmp_path)


def test_locations_of_items_and_users_may_be_partly_known(tmp_path):
    """A "geo" feature is read by both towers; a location with only one coordinate counts as unknown."""
    days = [f"{user},{item},2020-01-{1 + (3 * user + item) % 28:02d}" for user in range(12) for item in range(8)]
    (tmp_path / "events.csv").write_text("user,item,at\n" + "\n".join(days))
    (tmp_path / "users.csv").write_text("user,lat,lon\n" + "\n".join(f"{n},{40 + n / 10},{'' if n == 3 else 8}" for n in range(12)))
    (tmp_path / "items.csv").write_text("item,lat,lon\n" + "\n".join(f"{n},{40 + n / 10},{'' if n == 3 else 8}" for n in range(8)))
    geo = [{"name": "lives", "kind": "geo", "columns": ["lat", "lon"]}]
    data = {
        "source": "tables",
        "path": str(tmp_path),
        "interactions": {"path": "events.csv", "user_id": "user", "item_id": "item", "time": "at"},
        "users": {"path": "users.csv", "user_id": "user", "features": geo},
        "items": {"path": "items.csv", "item_id": "item", "features": [{**geo[0], "name": "lies"}]},
    }
    config = parse_config({"data": data, "training": {"max_steps": 2, "batch_size": 16}})
    prepare(config, tmp_path / "dataset")
    made = Dataset.open(tmp_path / "dataset")
    trainer = TwoTowerTrainer(made, config, tmp_path / "run")
    trainer.fit()
    (item,), (user,) = made.item_rows(["3"]), made.user_rows(["3"])
    assert np.isnan(made.item_features["lies.degrees"][item]).all() and np.isnan(made.user_features["lives.degrees"][user]).all()
    points = trainer.loader.batch(trainer.loader.plan(0)[0], 0, 0).users[0].fields["lives.point"]
    assert points.shape[1] == 3 and points.norm(dim=1).max() > 6000


def test_a_full_disk_keeps_the_checkpoint_before(dataset, tmp_path, monkeypatch):
    trainer = TwoTowerTrainer(dataset, settings(max_steps=2), tmp_path)
    trainer.fit()
    before = (tmp_path / "last.pt").read_bytes()

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twotower.utils.checkpoint.torch.save", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        trainer._save("last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))

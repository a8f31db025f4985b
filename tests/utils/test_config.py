"""Test settings: optional parts of a YAML file, invalid values, and error messages of one line that name the setting."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from twotower.data.dataset import Dataset
from twotower.data.dataset_features import resolve
from twotower.errors import ConfigError
from twotower.utils import config_model
from twotower.utils.config import Config, load_config, parse_config


def test_a_section_left_empty_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 3\ndata:\ntraining:\nmodel:\n  user_tower:\n")
    assert load_config(tmp_path / "c.yaml") == Config(seed=3)
    assert load_config(tmp_path / "c.yaml", ["training.num_epochs=2"]).training.num_epochs == 2
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_null_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size"):
        parse_config({"training": {"batch_size": None}})


@pytest.mark.parametrize(
    "content",
    [b"seed: 1\n# caf\xe9\n", b"a: [", b"prepare: {split: {valid: 2024-13-45}}", b"[]", b"0", b"a: \x00", b"[" * 5000],
)
def test_a_file_that_is_no_configuration_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c.yaml (is not valid YAML|holds a)") as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "'seed': input should be greater than or equal to 0"),
        ("seed=4294967296", "'seed'"),
        ("model.user_tower.hidden_dims=[64,0]", "'model.user_tower.hidden_dims.1'"),
        ("model.item_tower.hidden_dims=[-64]", "'model.item_tower.hidden_dims.0'"),
        (
            "model={user_tower: {embedding_dim: 128}, item_tower: {embedding_dim: 32}}",
            "item_tower.embedding_dim must be equal.*128 and 32",
        ),
        (
            "model={user_tower: {hidden_dims: [9, 8]}, item_tower: {hidden_dims: [4]}}",
            "item_tower.hidden_dims must be equal.* 8 and 4",
        ),
        ("evaluation.ks=[10,0]", "'evaluation.ks.1'"),
        ("prepare.split.valid=-0.1", "at least 0 and below 1; got -0.1 and 0.1"),
        ("prepare.split.test=1.0", "at least 0 and below 1"),
        ("prepare.split.test=.nan", "a finite number. Got nan"),
        ("evaluation.refresh_days=1e300", "less than or equal to 36500"),
        ("prepare.split.test=0.95", "to leave training events"),
        ("data.items.fetures=[]", r"Unknown setting 'data.items.fetures'. Did you mean 'features'\?"),
        ("data.interactions.item=x", r"Unknown setting 'data.interactions.item'. Did you mean 'item_id'\?"),
        ("prepare.split.valid=2024-13-45", "is not valid YAML"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def number_settings(section: type[BaseModel] = Config, before: str = "", kinds: str = "float") -> list[str]:
    """The names of all settings that may be a number, "a.b"; `kinds`: a pattern of their types."""
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += number_settings(field.annotation, f"{before}{name}.", kinds)
        elif re.search(kinds, str(field.annotation)):
            found.append(before + name)
    return found


@pytest.mark.parametrize("value", [".inf", "-.inf", "inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    assert "training.learning_rate" in number_settings() and "evaluation.refresh_days" in number_settings()
    for name in number_settings():
        with pytest.raises(ConfigError) as error:
            load_config(None, [f"{name}={value}"])
        assert "\n" not in str(error.value) and name.split(".")[-1] in str(error.value), name


@pytest.mark.parametrize("value", ["true", "no", "[true]", "{a: false}"])
def test_a_flag_is_no_number(value: str) -> None:
    names = [name for name in number_settings(kinds=r"\b(int|float)\b")]
    assert {"training.num_epochs", "evaluation.refresh_days", "evaluation.ks", "prepare.event_weights", "seed"} <= {*names}
    for name in names:
        with pytest.raises(ConfigError) as error:
            load_config(None, [f"{name}={value}"])
        assert "\n" not in str(error.value) and name.split(".")[-1] in str(error.value), name


@pytest.mark.parametrize(
    "split", [{"valid": 0, "test": 0.5}, {"valid": 0.0, "test": 0}, {"valid": date(2020, 1, 1), "test": date(2020, 1, 2)}]
)
def test_shares_from_zero_and_dates_are_fine(split: dict[str, Any]) -> None:
    found = parse_config({"prepare": {"split": split}}).prepare.split
    assert (found.valid, found.test) == (split["valid"], split["test"])


def test_the_data_settle_what_is_left_to_them():
    def widths(events: int, ids: int = 10_000, **towers: dict[str, object]) -> list[object]:
        model = parse_config({"model": towers}).model.resolved(ordered=True, timed=events % 2 == 0, events=events, ids=ids)
        assert model.resolved(ordered=False, timed=False, events=0, ids=0) == model  # once and for all
        u, i = model.user_tower, model.item_tower
        return [u.embedding_dim, u.hidden_dims, i.embedding_dim, i.hidden_dims, u.num_blocks]

    assert widths(999_998) == [128, [128], 128, [128], 1]
    assert widths(1_000_001) == [256, [256], 256, [256], 0]
    assert widths(5_000_000, ids=500_000)[0] == 256 and widths(4_999_999, ids=500_000)[0] == 128, "ten events per id"
    assert widths(2, item_tower={"embedding_dim": 64}) == [64, [64], 64, [64], 1]
    assert widths(1, user_tower={"hidden_dims": [99, 32], "num_blocks": 2}) == [128, [99, 32], 128, [32], 2]


def test_items_without_training_events_do_not_narrow_the_model(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = dataset.n_train_users + dataset.n_train_items
    assert trained < dataset.n_users + dataset.n_items, "the town has users or items that only later parts know"
    monkeypatch.setattr(config_model, "WIDE_FROM_EVENTS", 1)
    for per_id, width in ((dataset.n_train_events / trained, 256), (dataset.n_train_events / trained * 1.001, 128)):
        monkeypatch.setattr(config_model, "WIDE_FROM_EVENTS_PER_ID", per_id)
        assert resolve(parse_config({}), dataset).model.item_tower.embedding_dim == width

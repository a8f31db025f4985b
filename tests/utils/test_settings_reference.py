"""Test that the settings reference is complete, and that `twotower config` prints settings that can be read back."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from twotower.cli import main
from twotower.errors import ConfigError
from twotower.utils.config import Config, load_config, parse_config
from twotower.utils.settings_reference import Setting, sections, settings_schema, settings_yaml

ROOT = Path(__file__).parents[2]
SECTIONS = sections()
SETTINGS = {setting.name: setting for section in SECTIONS for setting in section.settings}


def plain_names(values: dict[str, Any], place: str = "") -> set[str]:
    """Return the dotted names of the values in nested dictionaries."""
    found = set()
    for key, value in values.items():
        inner = plain_names(value, f"{place}{key}.") if isinstance(value, dict) else set()
        found |= inner or {place + key}
    return found


def test_no_setting_and_no_section_is_without_text() -> None:
    assert not [setting.name for setting in SETTINGS.values() if not setting.text]
    assert not [section.name for section in SECTIONS if not section.text]


def test_the_reference_names_every_setting() -> None:
    assert plain_names(Config().model_dump()) <= SETTINGS.keys()
    assert {"data.items.features[].kind", "data.interactions.path"} <= SETTINGS.keys()
    assert any(name.startswith("model.tables.NAME.") for name in SETTINGS)


def test_defaults_are_those_of_the_program() -> None:
    for name, setting in SETTINGS.items():
        value: Any = Config().model_dump(mode="json")
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and "[]" not in name:
            assert setting.default is not None and yaml.safe_load(setting.default) == value, name


def test_types_and_ranges_are_in_words() -> None:
    assert SETTINGS["prepare.engine"].kind == '"duckdb" or "spark"'
    assert SETTINGS["prepare.positive_min_stars"].kind == "number or null"
    assert SETTINGS["prepare.positive_min_stars"].bounds == "0 to 5"
    assert SETTINGS["evaluation.ks"].kind == "list of integer (at least 1)"
    assert SETTINGS["training.warmup_frac"].unit == "fraction"
    assert isinstance(SETTINGS["data.interactions.path"], Setting) and SETTINGS["data.interactions.path"].default is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_printed_are_read_back_and_fit_the_schema(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "shown.yaml").write_text(settings_yaml(config))
    assert load_config(tmp_path / "shown.yaml") == config
    validator = jsonschema.Draft202012Validator(settings_schema())
    validator.validate(yaml.safe_load(settings_yaml(config)))
    validator.validate(yaml.safe_load(path.read_text()) or {})


def test_the_schema_refuses_what_the_program_refuses() -> None:
    validator = jsonschema.Draft202012Validator(settings_schema())
    for values in ({"trainin": {}}, {"training": {"batch_size": "many"}}, {"evaluation": {"ks": []}}):
        with pytest.raises(ConfigError):
            parse_config(values)
        assert list(validator.iter_errors(values))


def test_config_shows_the_effective_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 4\nprepare: {split: {valid: 2020-01-02, test: 2020-02-03}}\n")
    assert main(["config", "--show", "--config", str(tmp_path / "mine.yaml"), "--set", "training.batch_size=64"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown = load_config(tmp_path / "shown.yaml")
    assert shown.seed == 4 and shown.training.batch_size == 64 and shown.prepare.split.test == date(2020, 2, 3)
    assert shown == load_config(tmp_path / "mine.yaml", ["training.batch_size=64"])


def test_config_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == settings_schema()


@pytest.mark.parametrize("arguments", [[], ["--show", "--set", "sead=1"], ["--show", "--schema"], ["--schema", "reports"]])
def test_config_refuses_what_it_cannot_print(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1

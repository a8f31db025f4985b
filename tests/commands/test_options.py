"""Test what all commands share: complete help, early errors for settings, and output folders that are not overwritten."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from twotower.bundle.sealed_folder import bundle_in
from twotower.cli import app, main
from twotower.commands.options import SECTIONS, inside
from twotower.utils.run_parts import keep_sealed

HEAVY = ("torch", "ibis", "sklearn", "scipy", "implicit", "pyarrow", "twotower.utils.config")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def test_help_lists_the_commands_in_the_order_of_the_journey(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for section in SECTIONS.values() for name in section]
    assert set(names) == app.commands.keys()
    lines = shown(capsys).splitlines()
    listed = [line.split()[0].rstrip(":") for line in lines if line.startswith("  ") or line.endswith(":")]
    expected = [word for title, section in SECTIONS.items() for word in (title, *section)]
    assert [word for word in listed if word in expected] == expected
    assert any("_TWOTOWER_COMPLETE=bash_source" in line for line in lines)


@pytest.mark.parametrize("name", [None, *app.commands])
def test_help_has_full_sentences_an_example_and_every_option(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    command = app if name is None else app.commands[name]
    text = shown(capsys, *([name] if name else []))
    assert max(map(len, text.splitlines())) <= 80
    assert f"Example:\n    twotower {name or ''}" in text
    for short in [] if name else [line.split(None, 1)[1] for line in text.splitlines() if line.split(None, 1)[:1] == [name]]:
        assert short.endswith(".")
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help[0].isupper() and option.help.endswith((".", ")", "…")), option.name
    if name:
        assert command.short_help and command.short_help.endswith(".") and command.short_help in shown(capsys)


def paths_of(command: click.Command) -> list[tuple[list[str], click.Parameter]]:
    """Return the parameters of a command and its subcommands that are paths, with the words that lead to them."""
    found = [([], one) for one in command.params if isinstance(one.type, click.Path)]
    for name, inner in getattr(command, "commands", {}).items():
        found += [([name, *words], one) for words, one in paths_of(inner)]
    return found


@pytest.mark.parametrize(
    ("words", "parameter"), [pytest.param(*each, id=" ".join([*each[0], each[1].name])) for each in paths_of(app)]
)
def test_an_empty_path_is_not_the_current_folder(
    words: list[str],
    parameter: click.Parameter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = [parameter.opts[0], ""] if isinstance(parameter, click.Option) else [""]
    assert main([*words, *empty]) == 2
    assert "is empty" in capsys.readouterr().err or isinstance(parameter, click.Option), "arguments come first"
    with pytest.raises(click.BadParameter, match="is empty"):
        parameter.type.convert("", parameter, None)


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_raw_data_without_a_name_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--data", "", "--out", "x"]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "publish BUNDLE --to BUNDLE/x.parquet",
        "publish BUNDLE --to x.parquet --users BUNDLE/x.parquet",
        "publish BUNDLE --to BUNDLE/dataset/x.db",
        "recommend BUNDLE --all --out BUNDLE/x.parquet",
        "recommend BUNDLE --all --engine spark --out BUNDLE/x",
        "tune-index BUNDLE --plot BUNDLE/x.svg",
        "events backup sqlite:x --out BUNDLE/x.sqlite",
        "events export sqlite:x --out BUNDLE/x.parquet",
        "new-key x --role read --into BUNDLE/x",
        "simulate --out BUNDLE/x",
        "demo --out BUNDLE/x --overwrite",
        "serve BUNDLE --events sqlite:BUNDLE/x --port 0",
        "serve BUNDLE --events sqlite:BUNDLE/x --port 0 --workers 2",
        "publish BUNDLE --to x.parquet --users ./x.parquet",
    ],
)
def test_nothing_is_written_into_a_bundle_and_no_file_twice(
    command: str, town_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(town_bundle.rglob("*"))
    words = command.replace("BUNDLE", str(town_bundle)).split()
    done = subprocess.run([sys.executable, "-m", "twotower", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "may hold only the files that its manifest lists" in line or "are both" in line
    assert sorted(town_bundle.rglob("*")) == before and not list(tmp_path.iterdir())


def test_manifests_of_others_keep_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"hashes": {}}')
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    keep_sealed(tmp_path / "folder" / "lists.parquet")


def test_a_key_is_added_to_a_file_of_keys_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, keys = tmp_path / "env.sh", tmp_path / "keys"
    other.write_text("export A=1\n")
    assert main(["new-key", "x", "--role", "read", "--into", str(other)]) == 2
    assert "is not a key" in capsys.readouterr().err and other.read_text() == "export A=1\n"
    assert [main(["new-key", name, "--role", "read", "--into", str(keys)]) for name in "xy"] == [0, 0]
    assert len(keys.read_text().splitlines()) == 2


def test_completion_is_written_for_a_shell() -> None:
    command = [sys.executable, "-c", "from twotower.cli import main; main([])"]
    done = subprocess.run(command, env={"_TWOTOWER_COMPLETE": "bash_source", "PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert b"complete -o" in done.stdout


@pytest.mark.parametrize(
    "command", [["prepare", "--out", "x"], ["train", "--data", "x", "--out", "y"], ["run", "--out", "x"], ["evaluate", "x"]]
)
def test_a_mistyped_setting_is_refused_before_anything_heavy_loads(command: list[str]) -> None:
    name = "evaluation.bootstrapp" if command[0] == "evaluate" else "training.num_epoch"
    code = f"import sys; from twotower.cli import main; assert main({[*command, '--set', f'{name}=1']}) == 2; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Did you mean" in done.stderr
    assert not set(HEAVY[:-1]) & set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from twotower.cli import main; main(['train', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_a_run_of_run_and_of_train_are_found(tmp_path: Path) -> None:
    for part in ("whole/model", "whole/dataset", "whole/bundle", "whole/model/bundle", "bundle/dataset"):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        (tmp_path / part / "manifest.json").write_text("{}")
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    whole = tmp_path / "whole"
    assert inside(whole, "model") == inside(whole / "model", "model") == whole / "model"
    assert inside(whole, "dataset") == whole / "dataset" and inside(tmp_path / "bundle", "dataset") == tmp_path / "bundle"
    assert [bundle_in(folder) for folder in (whole, whole / "bundle", whole / "model")] == [
        whole / "bundle",
        whole / "bundle",
        whole / "model" / "bundle",
    ]


@pytest.mark.parametrize(
    ("command", "existing"),
    [
        (["simulate", "--out", "out"], "out/anything"),
        (["prepare", "--out", "out"], "out/manifest.json"),
        (["train", "--data", "x", "--out", "out"], "out/last.pt"),
        (["run", "--out", "out"], "out/model/x"),
        (["refit", "x", "--out", "out"], "out/report.json"),
        (["export", "x", "--out", "out"], "out/manifest.json"),
        (["demo", "--out", "out"], "out/raw/x"),
        (["recommend", "x", "--all", "--out", "out/lists.parquet"], "out/lists.parquet"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_existing_output_is_not_overwritten_by_default(
    command: list[str], existing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(existing).parent.mkdir(parents=True)
    Path(existing).write_text("mine")
    assert main(command) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "already" in said and "--overwrite" in said and ("--resume" in said) == (command[0] in ("train", "run", "refit"))
    assert Path(existing).read_text() == "mine"


@pytest.mark.parametrize("text", ["\x1b[2J\x1b[31m", "\x07\x08", "a\u202eb", "\x9b1m"])
@pytest.mark.parametrize("command", [["config", "--set"], ["prepare", "--output-dir", "out", "--data"], ["evaluate"]])
def test_an_error_shows_control_characters_as_text(
    command: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, text]) == 2
    said = capsys.readouterr().err
    assert said.startswith("twotower: error: ") and said.rstrip("\n").isprintable() and repr(text)[1:4] in said


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["publish", "bundle", "--to", "v.parquet", "--users", "users.csv"], ".parquet"),
        (["recommend", "bundle", "--all", "--out", "lists.csv"], ".parquet"),
        (["events", "export", "sqlite:e", "--out", "events.csv"], ".parquet"),
        (["tune-index", "bundle", "--plot", "plot.png"], ".svg"),
        (["inspect", "orders.csv", "--out", "shop.json"], ".yaml or .yml"),
    ],
)
def test_a_file_to_write_has_the_name_of_its_format(
    command: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    assert main(command) == 2
    assert f"must end with {wanted}." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "command", [["update", "run", "--data", "x", "--every"], ["serve", "bundle", "--rate"], ["plan", "--budget"]]
)
def test_a_number_is_finite(command: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, text]) == 2
    assert re.search("is not a finite number|is not in the range", capsys.readouterr().err)

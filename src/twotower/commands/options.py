"""Provide what the commands share: grouped help, settings, folders, overwrite protection and the suggested next step.

Nothing heavy is imported at the top, so that `--help` and errors in settings are shown at once.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import twotower
from twotower.errors import DataError
from twotower.utils.run_parts import MANIFEST, keep_sealed


class AnyPath(click.Path):
    """A path with at least one character: click would take an unset variable of the shell, "", as the current folder."""

    def __init__(self, *, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; fail if it is empty."""
        if value == "":
            self.fail('The path is empty. For the current folder, give ".".', param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


ANY_PATH, FOLDER, FILE = AnyPath(), AnyPath(file_okay=False), AnyPath(dir_okay=False)


class FileNamed(AnyPath):
    """A file to write, whose name must end with one of some suffixes: other programs choose the format by it."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False)
        self.suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; fail if its suffix is another."""
        file = super().convert(value, param, ctx)
        if file.suffix.lower() not in self.suffixes:
            self.fail(f"{str(file)!r} must end with {' or '.join(self.suffixes)}.", param, ctx)
        return file


PARQUET = FileNamed(".parquet")


class FloatRange(click.FloatRange):
    """A finite number in a range. Comparisons with "nan" are false, so click would accept it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; fail if it is not finite or outside of the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


SECTIONS = {  # the commands in the order of a typical project
    "Data": ("inspect", "datasets", "simulate", "prepare"),
    "Train": ("plan", "train", "run", "update", "refit", "tune"),
    "Evaluate": ("evaluate", "estimate"),
    "Serve": (
        *("export", "recommend", "tune-index", "add-items", "remove-items", "publish", "sign", "new-key", "serve"),
        *("events", "forget"),
    ),
    "Tools": ("demo", "doctor", "config"),
}


class Journey(click.Group):
    """A command group whose help lists the commands by section; commands without a section come last."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of `SECTIONS`."""
        known = [name for names in SECTIONS.values() for name in names]
        return [*known, *(name for name in super().list_commands(ctx) if name not in known)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section of the help for each group of commands."""
        grouped = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in self.list_commands(ctx) if name not in grouped)
        width = max(map(len, self.commands)) + 4
        for title, names in {**SECTIONS, "More": others}.items():
            rows = [(name, self.commands[name].get_short_help_str(80 - width)) for name in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(width - 4), text) for name, text in rows])


def show_version(context: click.Context, _: click.Parameter, requested: bool) -> None:
    """Print the version and exit."""
    if requested and not context.resilient_parsing:
        click.echo(f"twotower {twotower.__version__}")
        context.exit()


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and --set, and pass the resulting `config`; it is read before anything heavy is imported."""

    @click.option("--config", "config_path", type=FILE, help="YAML file with settings. Default: the default settings.")
    @click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override one setting. Can be repeated.")
    @functools.wraps(command)
    def with_settings(*args: Any, config_path: Path | None, overrides: tuple[str, ...], **options: Any) -> Any:
        from twotower.utils.config import load_config

        return command(*args, config=load_config(config_path, list(overrides), environment=os.environ), **options)

    return with_settings


def served(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config and --set, and pass the settings of the server as `config`: options, environment, file, defaults.

    Every other option of the command but the arguments is a setting of the same name.
    """

    @click.option("--config", "config_path", type=FILE, help="YAML file with settings, such as those of the section serving.")
    @click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override one setting. Can be repeated.")
    @functools.wraps(command)
    def with_settings(
        *args: Any, bundle: Path, other: Path | None, config_path: Path | None, overrides: tuple[str, ...], **options: Any
    ) -> Any:
        from twotower.utils.config import load_config

        given = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items() if value or value == 0}
        config = load_config(config_path, list(overrides), environment=os.environ, flags={"serving": given})
        return command(*args, bundle=bundle, other=other, config=config.serving)

    return with_settings


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --data, the roles of its columns, --config and --set, and pass the resulting `config`; a guess is told in two lines."""

    @click.option(
        "--data",
        "--data-dir",
        "--data_dir",
        multiple=True,
        metavar="PATH",
        help="Raw data: a folder, a table (can be repeated), or the name of a dataset. Default: the settings of data.",
    )
    @roles
    @click.option("--config", "config_path", type=FILE, help="YAML file with settings. Default: the default settings.")
    @click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override one setting. Can be repeated.")
    @functools.wraps(command)
    def with_data(
        *args: Any,
        data: tuple[str, ...],
        named: dict[str, str],
        config_path: Path | None,
        overrides: tuple[str, ...],
        **options: Any,
    ) -> Any:
        from twotower.utils.config import load_config

        if "" in data:
            raise click.UsageError('A path of --data is empty. For the current folder, give ".".')
        if named and not data:
            option = next(iter(named)).replace("_", "-")
            raise click.UsageError(f"--{option} describes the files of --data, which is missing. Add --data FILE.")
        if not data:  # nothing heavy is imported before a mistyped setting is reported
            return command(*args, config=load_config(config_path, list(overrides)), **options)
        from twotower.pipeline.raw_data import load_raw_config

        config, raw = load_raw_config(data, named, config_path, overrides)
        for line in raw.lines:
            click.echo(line, err=True)
        return command(*args, config=config, **options)

    return with_data


def roles(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --user, --item, --time, --time-format and --rating, and pass the given ones as `named`."""

    @click.option("--user", metavar="COLUMN", help="Column of the user ids. Default: guessed.")
    @click.option("--item", metavar="COLUMN", help="Column of the item ids. Default: guessed.")
    @click.option("--time", metavar="COLUMN", help='Column of the times; "none": the rows are in order. Default: guessed.')
    @click.option("--time-format", metavar="PATTERN", help="Format of the times, such as %d.%m.%Y. Default: guessed.")
    @click.option("--rating", metavar="COLUMN", help='Column of the ratings; "none": there is none. Default: guessed.')
    @functools.wraps(command)
    def with_roles(*args: Any, **options: Any) -> Any:
        given = {role: options.pop(role) for role in ("user", "item", "time", "time_format", "rating")}
        return command(*args, named={role: column for role, column in given.items() if column is not None}, **options)

    return with_roles


def overwriting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --overwrite."""
    return click.option("--overwrite", is_flag=True, help="Replace existing output.")(command)


def resuming(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --resume."""
    return click.option("--resume", is_flag=True, help="Continue from the last checkpoint.")(command)


def keep_existing(out: Path, names: Sequence[str], *, overwrite: bool, resume: bool | None = None) -> None:
    """Refuse to overwrite: check that the folder has no entry of these names.

    Parameters
    ----------
    names
        Names that the command would write into `out`; empty: any file.
    resume
        True if the command continues an earlier run; None if it cannot.

    Raises
    ------
    DataError
        An entry exists, and the user asked neither to overwrite nor to continue it.
    """
    from twotower.utils.console import is_first_process

    keep_sealed(out)
    if overwrite or resume or not is_first_process() or not out.is_dir():  # only the first process checks, before it writes
        return
    found = [name for name in names if (out / name).exists()] if names else sorted(path.name for path in out.iterdir())[:3]
    if found:
        advice = ", or add --overwrite" if resume is None else ", add --overwrite, or continue it with --resume"
        raise DataError(
            f"{out} already contains {', '.join(found)}. Existing files are not replaced by default. Choose another folder{advice}."
        )


def keep_file(out: Path, *, overwrite: bool) -> None:
    """Refuse to overwrite a file, and to write into a bundle or dataset.

    Raises
    ------
    DataError
        The file exists, and the user did not ask to overwrite it; or see `keep_sealed`.
    """
    keep_sealed(out)
    if out.is_file() and not overwrite:
        raise DataError(
            f"{out} already exists. Existing files are not replaced by default. Choose another file, or add --overwrite."
        )


def inside(folder: Path, name: str) -> Path:
    """Return the part of a run's folder that a command needs: FOLDER/NAME if only that one has a manifest, else FOLDER."""
    return folder if (folder / MANIFEST).is_file() or not (folder / name / MANIFEST).is_file() else folder / name


class BundleFolder(AnyPath):
    """A parameter type: a bundle, or a run that contains one."""

    def __init__(self) -> None:
        super().__init__(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the bundle's folder."""
        from twotower.bundle.sealed_folder import bundle_in  # loads the settings

        return bundle_in(super().convert(value, param, ctx))


BUNDLE = BundleFolder()


def a_user(dataset: Path) -> str:
    """Return the id of a known user, for an example that works."""
    from twotower.data.dataset import Dataset
    from twotower.schema import FIRST_ROW

    return str(Dataset.open(dataset).user_ids[FIRST_ROW])


def say_next(*words: str | Path) -> None:
    """Print the suggested next command to stderr; stdout holds only the result of the command."""
    from twotower.utils.console import is_first_process

    context = click.get_current_context(silent=True)
    if is_first_process() and not (context and context.find_root().params.get("quiet")):
        click.echo(f"Next: twotower {' '.join(shlex.quote(str(word)) for word in words)}", err=True)

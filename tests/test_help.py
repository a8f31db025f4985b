"""Every command and every option of the command line says what it does."""

from __future__ import annotations

import click

from twotower.cli import app


def test_every_command_and_every_option_has_help() -> None:
    groups = {name: command for name, command in app.commands.items() if isinstance(command, click.Group)}
    below = {f"{name} {inner}": command for name, group in groups.items() for inner, command in group.commands.items()}
    assert below.keys() >= {"datasets get", "datasets config"}
    commands = {"twotower": app, **app.commands, **below}
    assert not [name for name, command in commands.items() if not command.help]
    options = [
        (name, option) for name, command in commands.items() for option in command.params if isinstance(option, click.Option)
    ]
    assert len(options) > 40
    assert not [f"{name} {option.opts[0]}" for name, option in options if not option.help]

"""Run the command line `twotower`. Heavy modules load inside the commands, so that `--help` is instant.

Exit codes: 0 success, 1 internal error (traceback), 2 user error (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys

import click

from twotower.commands import answering, data, datasets, feedback, inspecting, publishing, tools, training
from twotower.commands.options import Journey, show_version
from twotower.errors import TwoTowerError, one_line

COMPLETION = """\b
Shell completion (add the line to your shell's start file):
  bash  eval "$(_TWOTOWER_COMPLETE=bash_source twotower)"
  zsh   eval "$(_TWOTOWER_COMPLETE=zsh_source twotower)"
  fish  _TWOTOWER_COMPLETE=fish_source twotower | source
"""


@click.group(cls=Journey, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80}, epilog=COMPLETION)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="Show no log lines and no next step.")
def app(debug: bool, quiet: bool) -> None:  # noqa: ARG001 - read by main()
    """Train, evaluate and serve a two-tower retrieval model.

    \b
    Example:
      twotower demo
      twotower serve runs/town/bundle
    """
    from twotower.utils.console import setup_logging

    setup_logging(quiet=quiet)


for command in (
    *(inspecting.inspect, datasets.datasets, data.simulate, data.prepare),
    *(training.plan, training.train, training.run, training.update, training.refit, training.tune, training.evaluate),
    *(answering.export, answering.recommend, answering.tune_index, answering.add_items, answering.remove_items),
    *(publishing.publish, publishing.sign, answering.new_key, answering.serve),
    *(feedback.events, feedback.forget, feedback.estimate),
    *(tools.demo, tools.doctor, tools.show_config),
):
    app.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app.main(given, prog_name="twotower", standalone_mode=False)
    except (TwoTowerError, click.ClickException) as error:
        if "--debug" in given:
            raise
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"twotower: error: {one_line(text)}", err=True)
        return 2
    except OSError as error:
        if "--debug" in given or error.filename is None:
            raise
        click.echo(
            f"twotower: error: {one_line(str(error.filename))}: {error.strerror}. Check the path and its permissions.", err=True
        )
        return 2
    except click.exceptions.Abort:
        click.echo("twotower: interrupted. The last checkpoint is intact.", err=True)
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0

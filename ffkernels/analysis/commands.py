"""``ffkernels analyze …``: one command for each figure and section of the paper.

The commands live in three modules by what they look at; each has ``COMMANDS``, its functions by their names.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import typer

from ffkernels.analysis import gradient_commands, stage_commands, sweep_commands

__all__ = ["app"]

app = typer.Typer(
    name="analyze",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The paper's figures: run the experiment, print what was seen, write its data and its picture.",
)

for _module in (stage_commands, gradient_commands, sweep_commands):
    for _name, _command in _module.COMMANDS.items():
        app.command(_name)(_command)

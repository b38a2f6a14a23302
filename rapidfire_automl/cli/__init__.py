"""The command line: `rapidfire-automl run search.toml`, `worker`, `demo`, `doctor`, `why`, `version`, and verbs."""

from __future__ import annotations

import typer

from rapidfire_automl.cli.demo import demo
from rapidfire_automl.cli.demo_grpo import demo_grpo
from rapidfire_automl.cli.doctor import doctor
from rapidfire_automl.cli.run import run
from rapidfire_automl.cli.steer import COMMANDS
from rapidfire_automl.cli.why import why
from rapidfire_automl.cli.worker import worker

app = typer.Typer(
    name="rapidfire-automl",
    help="AutoML search for LLM fine-tuning: many LoRA trials on one frozen base, judged chunk by chunk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(worker)
app.command()(demo)
app.command()(demo_grpo)
app.command()(doctor)
for command in COMMANDS:
    app.command()(command)
app.command()(why)


@app.command()
def version() -> None:
    """Print the versions of this package and of what it stands on."""
    from rapidfire_automl import __version__
    from rapidfire_automl.versions import installed

    typer.echo(f"rapidfire_automl {__version__}")
    for name, found in installed().items():
        if name != "rapidfire_automl":
            typer.echo(f"{name} {found or 'not installed'}")


__all__ = ["app"]

"""How the commands meet the terminal: libraries kept quiet, errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

import typer
from rich.console import Console

from rapidfire_automl.cli.interrupts import GOES_ON, INTERRUPTED, TERMINATED, graceful
from rapidfire_automl.cli.report import show_result
from rapidfire_automl.control import ControlError
from rapidfire_automl.jsonable import dumps
from rapidfire_automl.patience import StorageAway
from rapidfire_automl.refusals import FolderInUse, SearchDiffers
from rapidfire_automl.search import SearchFailed, SearchInterrupted, SearchResult
from rapidfire_automl.settings import SettingsError

BAD_INPUT, FAILED = 2, 1

_NOISY = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "mlflow",
    "alembic",
    "optuna",
    "peft",
    "torch",
    "transformers",
    "trl",
)


def quieten() -> None:
    """Keep the libraries' progress bars, warnings and log lines off the screen; errors still come through.

    Works through the environment where it can, so that libraries that are imported later obey too.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Terminal:
    """Where a command's words go.

    Args:
        as_json: Whether stdout is for JSON alone; everything else then goes to stderr.
        quiet: Whether to say nothing while the search runs.
        debug: Whether errors come with their traceback and libraries may talk; None where that can't be asked for.

    Once a search runs with which the same command would go on, its command sets `goes_on`.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, debug: bool | None = False) -> None:
        self.as_json, self.quiet, self.debug = as_json, quiet, debug
        self.goes_on = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        self._stdout = sys.stdout
        self.console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Run a command's body: libraries quiet, stdout kept for JSON where asked, errors as lines and exit codes.

        Raises:
            typer.Exit: 2 for bad input, 1 when all trials failed or something broke, 130 for Ctrl-C.
            SystemExit: SIGTERM has come; 143.
        """
        if not self.debug:
            quieten()
        try:
            quiet = contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext()
            with graceful(lambda: self.goes_on), quiet:
                yield
        except (ControlError, FolderInUse, SearchDiffers, SettingsError) as error:
            raise self._end(str(error), BAD_INPUT) from error
        except SearchFailed as error:
            self.result(error.result, show=False)
            raise self._end(str(error), FAILED) from error
        except SearchInterrupted as error:
            self.result(error.result)
            raise self._end(f"Interrupted; finished trials are kept.{self._and_then}", INTERRUPTED) from error
        except KeyboardInterrupt as error:
            raise self._end("Interrupted.", INTERRUPTED) from error
        except StorageAway as error:
            raise self._end(str(error), FAILED) from error
        except SystemExit as error:
            if error.code == TERMINATED:
                typer.echo(f"Terminated; finished trials are kept.{self._and_then}", err=True)
            raise
        except ImportError as error:
            raise self._end(str(error), BAD_INPUT) from error
        except typer.Exit:
            raise
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("`"):  # names what was given, as all of ours do
                raise self._end(str(error), BAD_INPUT) from error
            hint = " (--debug shows where)" if self.debug is False else ""
            raise self._end(f"{type(error).__name__}: {error}{hint}", FAILED) from error

    def result(self, result: SearchResult, *, show: bool = True) -> None:
        """Print a search's result: the summary as JSON on stdout, or the report."""
        if self.as_json:
            self.json(result.summary)
        elif show:
            show_result(result, self.console)

    def json(self, value: object) -> None:
        """Print JSON on the real stdout."""
        self._stdout.write(dumps(value, indent=2) + "\n")
        self._stdout.flush()

    def say(self, text: str, style: str = "") -> None:
        """Print a line for people."""
        self.console.print(text, style=style or None, markup=False, soft_wrap=True)

    @property
    def _and_then(self) -> str:
        return f" {GOES_ON}" if self.goes_on else ""

    def _end(self, message: str, code: int) -> typer.Exit:
        if self.debug:
            traceback.print_exc(file=sys.stderr)
        first, *rest = message.splitlines() or [""]
        typer.echo(f"error: {first}" if code != INTERRUPTED else first, err=True)
        for line in rest:
            typer.echo(f"error: {line}" if code == BAD_INPUT else f"  {line}", err=True)
        return typer.Exit(code)

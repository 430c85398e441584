"""The command line: parse, call, print.

Exit status: 0 fine; 1 failure; 2 bad usage or bad input, with one line that says what is wrong and how to fix it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from hallucination_guard.cli import (
    ask,
    audit_label,
    audit_replay,
    audit_sample,
    audit_show,
    audit_tail,
    audit_verify,
    audit_watch,
    calibrate,
    demo,
    doctor,
    evaluate,
    locate,
    score,
    serve,
)
from hallucination_guard.cli.console import say
from hallucination_guard.cli.options import ReaderGone, Stopped
from hallucination_guard.errors import (
    AnchorError,
    AuditError,
    CalibrationError,
    ConfigurationError,
    GuardError,
    InputError,
    ModelError,
)

__all__ = ["app", "audit", "main", "run"]

_OK, _FAILURE, _USAGE = 0, 1, 2
# The user named a file, a setting, a model, an anchor or a log that cannot be used, rather than something breaking.
_NAMED = (InputError, ConfigurationError, ModelError, AnchorError, CalibrationError, AuditError)

app = typer.Typer(
    name="hallucination-guard",
    help="Knows when a local language model makes things up.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
audit = typer.Typer(help="Read, sample, label, watch, replay and verify the log.")
for command in (demo, ask, score, serve, doctor, locate, evaluate, calibrate):
    command.register(app)
for command in (audit_tail, audit_show, audit_verify, audit_sample, audit_label, audit_watch, audit_replay):
    command.register(audit)
app.add_typer(audit, name="audit")


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and let its errors through; the exit status."""
    arguments = None if argv is None else list(argv)
    status = typer.main.get_command(app).main(arguments, prog_name=app.info.name, standalone_mode=False)
    return int(status or _OK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and say its errors in a line; the exit status."""
    try:
        _quiet()
        status = run(argv)
        sys.stdout.flush()
        return status
    except GuardError as error:
        say(f"error: {error}")
        return _USAGE if isinstance(error, _NAMED) else _FAILURE
    except typer.TyperException as error:
        say(f"error: {error.format_message()} (see --help)")
        return error.exit_code
    except (ReaderGone, BrokenPipeError):
        # Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OK
    except (Stopped, KeyboardInterrupt) as error:
        say(f"interrupted; {error}" if error.args else "interrupted")
        return _FAILURE
    except OSError as error:
        say(f"error: {error.filename or 'output'}: {error.strerror or error} (free space, or choose another path)")
        return _FAILURE


def _quiet() -> None:
    """Progress bars of transformers on a terminal only; a program's own pipe stays clean."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")

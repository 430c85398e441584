"""What every command needs: to print, to show how far it is, to load a model, to write a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hallucination_guard.cli.options import ModelChoice
from hallucination_guard.errors import InputError

if TYPE_CHECKING:
    from hallucination_guard.model import WhiteBoxModel

__all__ = ["check_folder", "load", "progress", "say", "short", "show", "show_json", "unwritable"]


def say(text: str) -> None:
    """One line to the standard error."""
    print(" ".join(text.split()), file=sys.stderr)  # noqa: T201


def show(text: str = "") -> None:
    """A line of the result."""
    print(text)  # noqa: T201


def show_json(value: object) -> None:
    """The result as JSON."""
    show(json.dumps(value, ensure_ascii=False, indent=2))


def short(text: str, width: int = 60) -> str:
    """The text on one line of at most ``width`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe; gives the function that says how far it is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def load(choice: ModelChoice) -> WhiteBoxModel:
    """The model that was chosen."""
    from transformers.utils import logging as transformers_logging

    from hallucination_guard.model import WhiteBoxModel

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if choice.name == "demo":
        return WhiteBoxModel.demo(profile=choice.profile)
    make = WhiteBoxModel.from_gguf if choice.name.endswith(".gguf") else WhiteBoxModel.from_pretrained
    return make(choice.name, device_map=choice.device_map, dtype=choice.dtype, profile=choice.profile)


def check_folder(output: Path) -> None:
    """Said before a model is loaded.

    Raises:
        InputError: if nothing can be written there.
    """
    folder = output.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise unwritable(str(output), "no such folder" if not folder.is_dir() else "the folder is read-only")


def unwritable(output: str, why: str) -> InputError:
    """The error of an output that cannot be written."""
    return InputError(f"{output!r} cannot be written: {why}", hint="give a path in a folder that exists")

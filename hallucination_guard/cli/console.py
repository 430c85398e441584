"""What every command needs: to print, to show how far it is, to load a model, to write a file."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hallucination_guard.errors import InputError

if TYPE_CHECKING:
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.model.choice import ModelChoice

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the direction of what follows
_UNSHOWN = frozenset({"Cc", "Cs"})  # control characters, and halves of surrogate pairs
__all__ = ["check_folder", "load", "progress", "say", "short", "show", "show_json", "unwritable"]


def say(text: str) -> None:
    """One line to the standard error."""
    print(_printable(" ".join(text.split())), file=sys.stderr)  # noqa: T201


def show(text: str = "") -> None:
    """A line of the result."""
    print(_printable(text))  # noqa: T201


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor or cannot be encoded: answers and logs are somebody else's texts."""
    return "".join(f"\\u{ord(each):04x}" if _is_unshown(each) else each for each in text)


def _is_unshown(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in _UNSHOWN or character in _TURNING


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
    """The model that was chosen, without what loading has to say."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    return choice.load()


def check_folder(output: Path) -> None:
    """Said before a model is loaded.

    Raises:
        InputError: if nothing can be written there.
    """
    folder = Path(os.path.realpath(output)).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise unwritable(str(output), "no such folder" if not folder.is_dir() else "the folder is read-only")


def unwritable(output: str, why: str) -> InputError:
    """The error of an output that cannot be written."""
    return InputError(f"{output!r} cannot be written: {why}", hint="give a path in a folder that exists")

"""What every command needs: to print, to show how far it is, and to load the model that was named."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hallucination_guard.model import WhiteBoxModel

__all__ = ["load", "positive", "progress", "say", "show", "show_json"]


def say(text: str) -> None:
    """One line to the standard error."""
    print(" ".join(text.split()), file=sys.stderr)  # noqa: T201


def show(text: str = "") -> None:
    """A line of the result."""
    print(text)  # noqa: T201


def show_json(value: Any) -> None:
    """The result as JSON."""
    show(json.dumps(value, ensure_ascii=False, indent=2))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing in a pipe; gives the function that says how far it is."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def load(arguments: argparse.Namespace) -> WhiteBoxModel:
    """The model of ``--model``, with ``--device-map``, ``--dtype`` and ``--profile``."""
    from transformers.utils import logging as transformers_logging

    from hallucination_guard.model import WhiteBoxModel

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    name, profile = getattr(arguments, "model", "demo"), getattr(arguments, "profile", None)
    if name == "demo":
        return WhiteBoxModel.demo(profile=profile)
    settings = {"device_map": arguments.device_map, "dtype": arguments.dtype, "profile": profile}
    if name.endswith(".gguf"):
        return WhiteBoxModel.from_gguf(name, **settings)
    return WhiteBoxModel.from_pretrained(name, **settings)


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value

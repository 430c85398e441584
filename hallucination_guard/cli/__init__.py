"""The command line: every command one file that parses, calls and prints.

In go arguments; out come lines on the standard output, notes and progress on the standard error, and an exit status.
"""

from __future__ import annotations

from hallucination_guard.cli.app import main

__all__ = ["main"]

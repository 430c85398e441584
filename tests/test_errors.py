"""An error says what it says on one line."""

from __future__ import annotations

import pytest

from hallucination_guard.errors import AuditError, GuardError


@pytest.mark.parametrize("odd", ["\n", "\r", "\x1b[2J", "\u2028", "\x85", "\ud800", "\x00"])
def test_what_cannot_be_printed_stands_as_an_escape(odd: str) -> None:
    error = AuditError(f"the field 'a{odd}2026 forged line' is unknown", hint=f"leave it out{odd}")
    assert str(error).isprintable()
    assert odd not in error.message + error.hint + str(error.args)
    assert "2026 forged line" in str(error)


def test_what_can_be_printed_stays() -> None:
    error = GuardError("die Schwelle α = ½ ist zu groß: 日本 🙂", hint="at most δ")
    assert str(error) == "die Schwelle α = ½ ist zu groß: 日本 🙂 (at most δ)"

"""What an argument must be; each check says in one sentence what it was and what it should be."""

from __future__ import annotations

import math

from hallucination_guard.errors import PolicyError

__all__ = ["count", "number", "target"]


def number(name: str, value: object, *, above: float = -math.inf, most: float = math.inf) -> None:
    """Refuse what is not a finite number in (above, most]; a bool is no number here."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not (real and math.isfinite(value) and above < value <= most):  # type: ignore[arg-type,operator]  # real says so
        limits = [f"above {above:g}"] * math.isfinite(above) + [f"at most {most:g}"] * math.isfinite(most)
        raise PolicyError(
            f"{name} is {value!r}", hint=f"give a finite number {' and '.join(limits)}".rstrip() + f" as {name}"
        )


def count(name: str, value: object, *, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PolicyError(f"{name} is {value!r}", hint=f"give a whole number of at least {least} as {name}")


def target(name: str, value: object) -> None:
    """Refuse what can neither be called nor invoked."""
    if not callable(value) and not callable(getattr(value, "invoke", None)):
        raise PolicyError(f"{name} is {value!r}", hint=f"give a callable or an object with invoke() as {name}")

"""How many labelled answers something is expected to take."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Needed"]


class Needed(BaseModel):
    """A number of labelled questions, forecast from those that there are; None stands for more than ``up_to``.

    Args:
        expected: with the answers as they were fitted.
        fewest: if the score is better than it looks (one time in ten), at most ``expected``.
        most: if it is worse (one time in ten), at least ``expected``.
        up_to: how many were tried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    expected: int | None = Field(None, ge=1)
    fewest: int | None = Field(None, ge=1)
    most: int | None = Field(None, ge=1)
    up_to: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        beyond = self.up_to + 1
        fewest, expected, most = (beyond if each is None else each for each in (self.fewest, self.expected, self.most))
        if not fewest <= expected <= most <= beyond:
            raise ValueError(f"{self.fewest!r}, {self.expected!r} and {self.most!r} labels of {self.up_to} cannot be")
        return self

    def in_words(self) -> str:
        """A few words, without a verb."""
        if self.expected is None:
            least = "" if self.fewest is None else f", with luck {self.fewest:,}"
            return f"more than {self.up_to:,} labels{least}"
        fewest = f"{self.fewest:,}"
        most = f"more than {self.up_to:,}" if self.most is None else f"{self.most:,}"
        return f"about {self.expected:,} labels ({fewest} to {most})"

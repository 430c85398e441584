"""A profile: t* as it was measured for one model and chat template, kept in a file and bound to both.

``locate`` measures where in the prompt the meaning of a question sits and writes a profile; a model that is loaded with
it takes t* from there instead of from its template. Scores of another t* are other scores, so the profile becomes part
of the model's identity, and a calibration fitted without it (or with another) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hallucination_guard.errors import AnchorError
from hallucination_guard.values import Anchor, ModelIdentity

__all__ = ["Place", "Profile", "View", "template_under"]

View = Literal["raw", "centred", "nearest"]
"""How likeness of states was measured; see :mod:`hallucination_guard.evaluation.locate`."""

_MARK = "@profile:"


class Place(BaseModel):
    """What was measured at one position, averaged over the deep half.

    Args:
        index: counted from the end of the prompt; −1 is its last token.
        raw: SPS of the states as they are.
        centred: SPS after the mean state of each (layer, position) was subtracted.
        nearest: share of prompts whose nearest neighbour asks the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    index: int = Field(lt=0)
    raw: float
    centred: float
    nearest: float


class Profile(BaseModel):
    """Where t* is, for one model with one chat template. JSON in a file, never pickle.

    Args:
        fingerprint: of the model it was measured on; also ``dtype`` and ``template``.
        anchor: t*, counted from the end of the prompt; −1 is its last token.
        tail: the ids that all prompts ended with, from t* on as far as they agree. A position counted from the end
            means something only where prompts end alike, so a prompt that ends otherwise is refused.
        view: the likeness that chose; ``caller`` where somebody chose another position than that.
        layers: the first and the last h_l that were averaged over.
        table: what was measured at each position, −1 first.
        prompt: what the questions were put into; has ``{query}``.
        queries: how many questions were asked.
        prompts: n, in how many wordings all together.
        data: hash of the wordings.
        date: when, in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    fingerprint: str
    dtype: str
    template: str
    anchor: int = Field(lt=0)
    tail: tuple[int, ...]
    view: View | Literal["caller"]
    layers: tuple[int, int]
    table: tuple[Place, ...]
    prompt: str
    queries: int = Field(ge=2)
    prompts: int = Field(ge=4)
    data: str
    date: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    @property
    def mark(self) -> str:
        """What tells a model with this profile from the same model without it."""
        return f"{_MARK}{self.anchor}"

    def anchor_in(self, token_ids: Sequence[int], tokens: Sequence[str]) -> Anchor:
        """t* in a prompt.

        Args:
            token_ids: of the prompt, generation header included.
            tokens: the same as the tokenizer writes them.

        Raises:
            AnchorError: if the prompt is too short for it, or ends otherwise than those that were measured.
        """
        if len(token_ids) < -self.anchor:
            raise AnchorError(
                f"the profile's t* is token {self.anchor} of the prompt, which has {len(token_ids)} tokens",
                hint="use the profile with prompts like those that it was measured on",
            )
        end = tuple(token_ids[len(token_ids) - len(self.tail) :])
        if end != self.tail:
            raise AnchorError(
                f"the prompt ends with the token ids {list(end)!r} and the profile was measured on prompts that end "
                f"with {list(self.tail)!r}",
                hint="measure a profile for prompts of this form: hallucination-guard locate --prompt '… {query} …'",
            )
        return Anchor(index=self.anchor, token=tokens[self.anchor], rule="profile")

    def check(self, model: ModelIdentity) -> None:
        """Refuse a profile that was measured on another model.

        Raises:
            AnchorError: naming everything that differs.
        """
        pairs = {
            "model": (self.fingerprint, model.fingerprint),
            "dtype": (self.dtype, model.dtype),
            "template": (self.template, template_under(model.template)),
        }
        differing = [f"{name} {theirs!r} against {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]
        if differing:
            raise AnchorError(
                f"the profile was measured on something else: {'; '.join(differing)}",
                hint="measure one for this model: hallucination-guard locate",
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            AnchorError: if the file is missing, is not JSON, or lacks or invents a field.
        """
        try:
            found = cls.model_validate_json(Path(path).read_bytes())
            found.model_dump_json().encode()  # half a surrogate pair is no text: it could not be written again
            return found
        except OSError as error:
            raise AnchorError(
                f"the profile {str(path)!r} cannot be read: {error.strerror}", hint="give the file that locate wrote"
            ) from error
        except UnicodeEncodeError:
            raise AnchorError(
                f"the profile {str(path)!r} is not valid: it holds half a character", hint="measure it again"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise AnchorError(
                f"the profile {str(path)!r} is not valid: {where}: {first['msg']}", hint="measure it again with locate"
            ) from None


def template_under(template: str) -> str:
    """The hash of the chat template alone, out of a :attr:`ModelIdentity.template` that may name a profile."""
    return template.partition(_MARK)[0]

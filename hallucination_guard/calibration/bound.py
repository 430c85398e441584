"""What every fitted file shares: it is bound to a model and a scorer, and a file is read whole or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from hallucination_guard.errors import CalibrationError, CalibrationMismatch
from hallucination_guard.values import ModelIdentity, ScorerIdentity

__all__ = ["loaded", "refuse_others"]

File = TypeVar("File", bound=BaseModel)


class _Bound(Protocol):
    fingerprint: str
    structure: str
    dtype: str
    template: str
    scorer: str
    scorer_version: str
    scorer_settings: dict[str, str]


def refuse_others(bound: _Bound, model: ModelIdentity, scorer: ScorerIdentity, *, what: str, hint: str) -> None:
    """Refuse what was fitted on another model or scorer.

    Args:
        bound: what was fitted.
        model: in use.
        scorer: in use.
        what: was fitted, for the message.
        hint: what to do.

    Raises:
        CalibrationMismatch: naming everything that differs.
    """
    pairs: Mapping[str, tuple[object, object]] = {
        "model": (bound.fingerprint, model.fingerprint),
        "structure (config, adapters, hooks)": (bound.structure, model.structure),
        "dtype": (bound.dtype, model.dtype),
        "template": (bound.template, model.template),
        "scorer": (bound.scorer, scorer.name),
        "scorer version": (bound.scorer_version, scorer.version),
        "scorer settings": (bound.scorer_settings, dict(scorer.settings)),
    }
    differing = [f"{name} {theirs!r} against {ours!r}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if differing:
        raise CalibrationMismatch(f"{what} was fitted on something else: {'; '.join(differing)}", hint=hint)


def loaded(kind: type[File], path: str | Path, *, named: str, part: str) -> File:
    """Read a file of one kind.

    Args:
        kind: of the file.
        path: of the file.
        named: the field whose parts are called by their content.
        part: what one of them is.

    Raises:
        CalibrationError: if the file is missing, is not JSON, lacks or invents a field, or a part has no id.
    """
    hint = "fit and save it again"
    try:
        written = Path(path).read_bytes()
        found = kind.model_validate_json(written)
        found.model_dump_json().encode()  # half a surrogate pair is no text: it could not be written again
    except OSError as error:
        raise CalibrationError(
            f"the calibration {str(path)!r} cannot be read: {error.strerror}", hint="give the file that was saved"
        ) from error
    except UnicodeEncodeError:
        raise CalibrationError(
            f"the calibration {str(path)!r} is not valid: it holds half a character", hint=hint
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CalibrationError(
            f"the calibration {str(path)!r} is not valid: {where}: {first['msg']}", hint=hint
        ) from None
    # What is made gets its id from its content; what is read has to bring it, or an edit would only take it out.
    if any(not each.get("id") for each in json.loads(written).get(named, ())):
        raise CalibrationError(f"a {part} of {str(path)!r} has no id", hint=hint)
    return found

"""Texts to vectors: by a sentence-embedding model, or by the evaluated model's own middle layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.errors import InputError, ModelError
from hallucination_guard.model.white_box import WhiteBoxModel

__all__ = ["Embed", "OwnStates", "SentenceModel"]

Vectors: TypeAlias = NDArray[np.float64]

_BATCH = 32


class Embed(Protocol):
    """Texts to unit vectors."""

    @property
    def name(self) -> str:
        """Of the model, for the report."""

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """One unit vector a text (n × d)."""


class SentenceModel:
    """A sentence-embedding model: the mean of its last states over the tokens of a text.

    Args:
        model: a loaded ``transformers`` encoder.
        tokenizer: its tokenizer.
        name: for the report.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str) -> None:
        self.name = name
        self._model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str) -> Self:
        """Load from a folder or a hub id.

        Raises:
            ModelError: if there is no such model.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            return cls(AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path), name=path)
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the sentence model {path!r} cannot be loaded: {first}", hint="give a folder or a hub id"
            ) from error

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """One unit vector a text."""
        import torch

        parts = []
        for part in _parts(texts):
            read = self._tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
            with torch.no_grad():
                states = self._model(**read).last_hidden_state
            mask = read["attention_mask"][:, :, None].to(states.dtype)
            parts.append(((states * mask).sum(dim=1) / mask.sum(dim=1)).double().cpu().numpy())
        return _unit(np.concatenate(parts))


class OwnStates:
    """The evaluated model itself: the mean of h_{⌊L/2⌋} over the tokens of a text, read alone, without a template.

    A stopgap where there is no sentence-embedding model: in small models all such states point much the same way.
    """

    def __init__(self, model: WhiteBoxModel) -> None:
        self.name = f"own states of {model.name}"
        self._model = model

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """One unit vector a text."""
        import torch

        from hallucination_guard.model.view import skipped, tapped, undisturbed

        model = self._model
        layout = model.layout
        seen: list[Any] = []
        middle = max(1, layout.depth // 2)
        layers = layout.list_of(model.model)
        changed = {
            at: skipped(layers[at], returns_tuple=layout.returns_tuple) for at in range(middle, layout.depth)
        }  # what lies above is not looked at
        changed[middle - 1] = tapped(layers[middle - 1], seen.append)
        view = layout.view(model.model, changed)
        parts = []
        for part in _parts(texts):
            rows = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in part]
            width = max(map(len, rows))
            # Padded on the right, where a causal model's text cannot see it.
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
            with undisturbed(model.model, grad=False):
                layout.decoder_of(view)(input_ids=ids, attention_mask=mask, use_cache=False)
            states = seen.pop().double()
            shares = mask[:, :, None].to(states)
            parts.append(((states * shares).sum(dim=1) / shares.sum(dim=1)).cpu().numpy())
        return _unit(np.concatenate(parts))


def _parts(texts: Sequence[str]) -> list[list[str]]:
    if not texts or any(not text.strip() for text in texts):
        raise InputError(f"there is an empty text among {list(texts)[:5]!r}", hint="embed texts that say something")
    return [list(texts[at : at + _BATCH]) for at in range(0, len(texts), _BATCH)]


def _unit(vectors: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ModelError("an embedding is zero or not finite", hint="use another sentence model")
    return np.asarray(vectors / norms, dtype=np.float64)

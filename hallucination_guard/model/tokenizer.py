"""What is used of a tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Tokenizer"]


class Tokenizer(Protocol):
    """The part of ``PreTrainedTokenizerBase`` that this package relies on."""

    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of tokens that are no text."""
        ...

    def __len__(self) -> int:
        """How many tokens there are, added ones included."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Ids by token."""
        ...

    def __call__(self, text: str, **settings: Any) -> Mapping[str, Any]:
        """``input_ids`` and, if asked for, ``offset_mapping``."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **settings: Any) -> Any:
        """The turns as text, or as ids."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """A token, or a list of them, as the tokenizer writes them."""
        ...

    def decode(self, token_ids: Sequence[int], **settings: Any) -> str:
        """The text of these ids."""
        ...

    def batch_decode(self, sequences: Any, **settings: Any) -> list[str]:
        """The text of each row of ids."""
        ...

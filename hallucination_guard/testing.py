"""What users need to test a guarded program: a tiny real model in milliseconds, a scripted one, a sink in memory."""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

from hallucination_guard.errors import ConfigurationError, InputError
from hallucination_guard.model.calling import begun_at_end, prose_of, taught, write_calls, written_calls
from hallucination_guard.model.heard import HeardAnswer, Reading
from hallucination_guard.values import (
    DRAWN,
    Anchor,
    FinishReason,
    Generation,
    GenerationSettings,
    Message,
    Messages,
    Model,
    ModelIdentity,
    Offered,
    Piece,
    Prompt,
    Score,
    ScorerIdentity,
    Sentence,
    ToolCall,
    as_messages,
    checked_text,
    is_batch,
    question_of,
)
from hallucination_guard.values.protocols import Found
from hallucination_guard.values.text import sentence_starts

if TYPE_CHECKING:
    from hallucination_guard.audit.record import AuditRecord

__all__ = ["MemorySink", "ScriptedLive", "ScriptedModel", "ScriptedScorer", "tiny_model", "tiny_tokenizer"]

Answers: TypeAlias = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Line: TypeAlias = float | str | BaseException | Score
Script: TypeAlias = Line | Sequence[Line] | Mapping[str, Line] | Callable[[Generation], Line]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_tokenizer(*, chat_template: str | None = CHATML, special: tuple[str, ...] = _SPECIAL) -> Any:
    """A byte-level tokenizer that needs no file: one token a byte, and these special tokens.

    Args:
        chat_template: Jinja source; None for a base model's tokenizer.
        special: the special tokens, ids 0 … ; the third is the end of a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        additional_special_tokens=list(special[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(family: str = "llama", *, dtype: Any = None, seed: int = 0, tied: bool = False, **sizes: Any) -> Any:
    """A random ``transformers`` model of a real architecture, small enough for unit tests.

    Args:
        family: ``llama``, ``qwen3``, ``gemma2``, ``gemma3``, ``mistral``, ``phi3`` or ``gpt2``.
        dtype: torch dtype; float32 by default.
        seed: of the weights; the global random state is left as it was.
        tied: whether head and input embedding are one matrix.
        **sizes: override the configuration, for example ``num_hidden_layers=8``.

    Raises:
        ConfigurationError: if the family is not one of these.
    """
    import torch
    import transformers

    extra: dict[str, Any] = {}
    if family in ("gemma2", "gemma3", "mistral"):
        extra["sliding_window"] = 8
    names = {
        "llama": "Llama",
        "qwen3": "Qwen3",
        "gemma2": "Gemma2",
        "gemma3": "Gemma3",
        "mistral": "Mistral",
        "phi3": "Phi3",
        "gpt2": "GPT2",
    }
    if family not in names:
        raise ConfigurationError(f"no tiny model of family {family!r}", hint=f"one of {', '.join(sorted(names))}")
    if family == "gpt2":
        gpt2 = {
            "vocab_size": 320, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied,
        }  # fmt: skip
        config = transformers.GPT2Config(**{**gpt2, **sizes})
        kind: Any = transformers.GPT2LMHeadModel
    else:
        suffix = "TextConfig" if family == "gemma3" else "Config"
        config = getattr(transformers, names[family] + suffix)(
            **{**_SIZES, **extra, "tie_word_embeddings": tied, **sizes}
        )
        kind = getattr(transformers, names[family] + "ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        # The default initialisation is so small that every gradient is nearly zero and every answer the same.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype or torch.float32).eval()


class MemorySink:
    """An audit sink that keeps its records in a list."""

    def __init__(self) -> None:
        self.records: list[AuditRecord] = []

    def __call__(self, record: AuditRecord) -> str:
        """Keep the record; its id."""
        self.records.append(record)
        return record.id


class ScriptedModel:
    """Stands in for a :class:`~hallucination_guard.WhiteBoxModel` in a guard; says what it is told.

    A token is a byte of UTF-8. Nothing can be measured of it, so its guard needs a :class:`ScriptedScorer`::

        model = ScriptedModel(["Lyon", "Paris"])
        guard = Guard(model, scorer=ScriptedScorer({"Lyon": 9.0, "Paris": 1.0}), policy=RetryBelow(score=…, limit=5))
        assert guard("What is the capital of France?").text == "Paris"

    Args:
        answers: one text for every prompt; or texts in the order in which they are asked for; or one of both for each
            question, which is the last user turn as it stands in the prompt.
        name: of the model.
        fingerprint: two scripted models with different ones are different models to a calibration.
        context: the most tokens that a prompt may have; None for no limit.
        ending: how its answers end.

    ``calls`` holds, for every answer given, the turns it answers and the settings it was generated with.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        name: str = "scripted",
        fingerprint: str = "scripted",
        context: int | None = None,
        ending: FinishReason = "stop",
    ) -> None:
        self._answers = answers
        self._ending = ending
        self.name = name
        self.context = context
        self.identity = ModelIdentity(name=name, fingerprint=fingerprint, dtype="float32", template="none")
        self.calls: list[tuple[tuple[Message, ...], dict[str, Any]]] = []
        self._told: dict[str | None, int] = {}
        self._lock = threading.Lock()

    def prompt(self, messages: Messages, **offered: Unpack[Offered]) -> Prompt:
        """What the model reads. Calls of tools are written between ``<tool_call>`` and ``</tool_call>``, as JSON.

        Raises:
            InputError: on an empty prompt, or more than ``context`` tokens.
        """
        turns = as_messages(messages)
        settings = GenerationSettings.of({**offered})
        text = "".join(f"{turn.role}: {turn.content}\n" for turn in taught(turns, settings.tools or ()))
        ids = _bytes(text)
        if self.context is not None and len(ids) >= self.context:
            raise InputError(f"the prompt has {len(ids)} tokens and the context holds {self.context}")
        return Prompt(
            messages=turns,
            text=text,
            token_ids=ids,
            header=0,
            templated=True,
            tools=settings.tools or (),
            response_schema=settings.response_schema,
        )

    def generate(self, messages: Messages | Sequence[Messages], **settings: Any) -> Any:
        """The next answer; a list of them for a list of prompts."""
        questions = settings.get("question")
        drawn = GenerationSettings.of({**DRAWN, **{key: settings[key] for key in settings if key != "question"}})
        batch: Sequence[Messages] = messages if is_batch(messages) else [cast("Messages", messages)]
        each_question = [questions] * len(batch) if questions is None or isinstance(questions, str) else questions
        made = [
            self._generation(
                self.prompt(each, **drawn.offered),
                self._next(each, settings),
                self._ending,
                replace(drawn, question=question),
            )
            for each, question in zip(batch, each_question, strict=True)
        ]
        return made if is_batch(messages) else made[0]

    def stream(
        self,
        messages: Messages,
        *,
        begin: Sequence[int] = (),
        gone: Callable[[], bool] = lambda: False,
        question: str | None = None,
        **drawing: Any,
    ) -> ScriptedLive:
        """The next answer, after ``begin``, token by token."""
        drawn = GenerationSettings.of({**DRAWN, **drawing})
        prompt = self.prompt(messages, **drawn.offered)
        ids = (*begin, *_bytes(self._next(messages, dict(drawing))))
        return ScriptedLive(self, prompt, ids, len(begin), replace(drawn, question=question), gone)

    def read(
        self,
        messages: Messages,
        answer: str | Sequence[int],
        *,
        question: str | None = None,
        **offered: Unpack[Offered],
    ) -> Generation:
        """Take an answer that something else wrote."""
        text = answer if isinstance(answer, str) else bytes(answer).decode("utf-8", "replace")
        settings = GenerationSettings.of({"question": question, **offered})
        return self._generation(self.prompt(messages, **offered), text, "read", settings)

    def compute(self, work: Callable[[], Found]) -> Found:
        """What ``work`` gives."""
        return work()

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
        """Begin to read an answer that something else is writing."""
        prompt = self.prompt(messages, **offered)
        settings = GenerationSettings.of({"question": question, **offered})

        def check(ids: Sequence[int]) -> None:
            if not all(0 <= each < 256 for each in ids):
                raise InputError(f"the answer has the token ids {ids!r}", hint="a token is a byte")

        reading = Reading(
            ids=lambda text: _bytes(checked_text(text, "the answer")),
            text=lambda ids: bytes(ids).decode("utf-8", "replace"),
            check=check,
            read=lambda ids: self.read(messages, ids, question=question, **offered),
            unread=lambda text, ending: Generation.unread(
                prompt, text, settings=settings, model=self.identity, finish_reason=ending
            ),
            prose=lambda text: prose_of("hermes", text) if prompt.tools else len(text),
            most=None if self.context is None else self.context - len(prompt.token_ids),
        )
        return HeardAnswer(pieces, reading, gone=gone, unscorable=unscorable)

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An answer with tool calls as text."""
        return write_calls("hermes", content, calls)

    def _next(self, messages: Messages, settings: dict[str, Any]) -> str:
        turns = as_messages(messages)
        question: str | None = None
        answers: Any = self._answers
        if isinstance(answers, Mapping):
            question = question_of(turns)
            if question not in answers:
                raise ConfigurationError(f"nothing is scripted for {question!r}", hint="add it to the answers")
            answers = answers[question]
        with self._lock:
            self.calls.append((turns, dict(settings)))
            told = self._told.get(question, 0)
            self._told[question] = told + 1
        if isinstance(answers, str):
            return answers
        if told >= len(answers):
            raise ConfigurationError(
                f"answer {told + 1} was asked for and {len(answers)} are scripted", hint="script more answers"
            )
        return str(answers[told])

    def _generation(self, prompt: Prompt, text: str, ending: FinishReason, settings: GenerationSettings) -> Generation:
        return Generation(
            messages=prompt.messages,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=_bytes(text),
            text=text,
            finish_reason=ending,
            settings=settings,
            model=self.identity,
            anchor=Anchor(index=-1, token=prompt.text[-1], rule="last_user_token"),
            written_calls=()
            if ending == "open"
            else written_calls("hermes", text, prompt.tools, prompt_token_ids=prompt.token_ids),
        )


class ScriptedLive:
    """A scripted answer while it is drawn: a token more each time that its reader waits for one.

    Args:
        model: whose it is.
        prompt: what it answers.
        ids: its tokens in the end.
        begin: how many of them are there from the beginning.
        settings: how it is drawn.
        gone: whether the reader is gone.
    """

    def __init__(
        self,
        model: ScriptedModel,
        prompt: Prompt,
        ids: tuple[int, ...],
        begin: int,
        settings: GenerationSettings,
        gone: Callable[[], bool],
    ) -> None:
        self._model, self._prompt, self._ids, self._settings = model, prompt, ids, settings
        self._gone, self.drawn = gone, begin
        self.left = False

    @property
    def ended(self) -> FinishReason | None:
        """How it ended; None while it is drawn."""
        return self._model._ending if self.drawn >= len(self._ids) else None

    def wait(self, ready: Callable[[], bool]) -> None:
        """Draw until then."""
        while not ready() and self.ended is None and not self._gone():
            self.draw()

    def draw(self) -> None:
        """Draw one token."""
        self.drawn += 1

    def texts(self) -> tuple[str, ...]:
        """What each token so far adds to the text."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        return tuple(decoder.decode(bytes((each,))) for each in self._ids[: self.drawn])

    def prose(self) -> int:
        """How many characters are surely in no call and in no stop text."""
        text = "".join(self.texts())
        if self.ended is not None:
            return len(text)
        sure = len(text) - begun_at_end(text, self._settings.stop or ())
        return min(sure, prose_of("hermes", text)) if self._settings.tools else sure

    def beginning(self, tokens: int | None = None) -> Generation:
        """Its first tokens as an answer."""
        answer = self._ids[: self.drawn][:tokens]
        ending = self.ended if len(answer) == len(self._ids) else None
        text = bytes(answer).decode("utf-8", "replace")
        return self._model._generation(self._prompt, text, ending or "open", self._settings)

    def compute(self, work: Callable[[], Found], *, patient: bool = False) -> Found:
        """What ``work`` gives."""
        return work()

    def leave(self) -> None:
        """The reader is gone."""
        self.left = True


class ScriptedScorer:
    """A scorer whose scores are scripted: a number; words, for "unscorable, because"; an exception, to be raised.

    Args:
        script: one of these (or a whole :class:`~hallucination_guard.values.Score`) for every answer; or a list of
            them in the order in which answers are scored; or one for each text; or a function of the generation.
        name: of the score, and of the scorer.
        settings: of its identity, to which a calibration is bound.
        by_sentence: gives the scores of a sentence by its text, for policies that act on sentences.

    Raises:
        ConfigurationError: on scoring, when nothing is scripted for an answer.
    """

    def __init__(
        self,
        script: Script,
        *,
        name: str = "hybridgrad",
        settings: Mapping[str, str] | None = None,
        by_sentence: Callable[[str], Mapping[str, float]] | None = None,
    ) -> None:
        self._script = script
        self._scored = 0
        self._lock = threading.Lock()
        self.primary = name
        self.identity = ScorerIdentity(name=name, version="scripted", settings=dict(settings or {}))
        self._by_sentence = by_sentence
        self.sentences = None if by_sentence is None else ScorerIdentity(name="sentences", version="scripted")

    def __call__(self, model: Model, generation: Generation) -> Score:
        """Score one generation."""
        score = self._whole(generation)
        if self._by_sentence is None or score.status != "scored" or generation.written_calls:
            return score
        found = tuple(_sentences(generation.content, self._by_sentence))
        return replace(score, sentences=found, sentence_scorer=self.sentences)

    def _whole(self, generation: Generation) -> Score:
        line = self._line(generation)
        if isinstance(line, BaseException):
            raise line
        if isinstance(line, Score):
            return line
        if isinstance(line, str):
            return Score.unscorable(line, scorer=self.identity)
        return Score(status="scored", scorer=self.identity, scores={self.primary: line}, anchor=generation.anchor)

    def batch(self, model: Model, generations: Sequence[Generation]) -> list[Score]:
        """One score a generation, in order."""
        return [self(model, generation) for generation in generations]

    def _line(self, generation: Generation) -> Line:
        script = self._script
        if callable(script):
            return script(generation)
        if isinstance(script, Mapping):
            if generation.text not in script:
                raise ConfigurationError(f"no score is scripted for {generation.text!r}", hint="add it to the script")
            return script[generation.text]
        if isinstance(script, str) or not isinstance(script, Sequence):
            return script
        with self._lock:
            at, self._scored = self._scored, self._scored + 1
        if at >= len(script):
            raise ConfigurationError(
                f"score {at + 1} was asked for and {len(script)} are scripted", hint="script more scores"
            )
        return script[at]


def _sentences(content: str, scores: Callable[[str], Mapping[str, float]]) -> Iterator[Sentence]:
    starts = sentence_starts(content)
    for begin, end in zip(starts, [*starts[1:], len(content)], strict=True):
        text = content[begin:end]
        first = len(_bytes(content[:begin]))
        yield Sentence(
            start=first, stop=first + len(_bytes(text)), begin=begin, end=end, text=text, scores=scores(text.strip())
        )


def _bytes(text: str) -> tuple[int, ...]:
    return tuple(text.encode("utf-8", "surrogatepass"))

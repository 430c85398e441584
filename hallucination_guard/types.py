"""The values that travel through a guarded call, and the protocols of what transforms them.

One way: prompt → :class:`Generation` → :class:`Score` → :class:`Verdict` → :class:`Decision` → :class:`Outcome`.
All values are frozen. Fail closed lives here: a :class:`Score` holds finite numbers or a reason why not, a
:class:`Decision` always has a reason, and an :class:`Outcome` without an accepted answer has no text.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from hallucination_guard.audit.record import AuditRecord

__all__ = [
    "LOWER_IS_LESS_CERTAIN",
    "Action",
    "Anchor",
    "Decision",
    "Escalate",
    "Generation",
    "Message",
    "Messages",
    "ModelIdentity",
    "Move",
    "Outcome",
    "Passage",
    "Policy",
    "Prefix",
    "Redraw",
    "Retrieve",
    "Score",
    "Scorer",
    "ScorerIdentity",
    "Sink",
    "Situation",
    "Verdict",
]

Action: TypeAlias = Literal["accept", "abstain", "retry", "retrieve", "escalate"]
Status: TypeAlias = Literal["scored", "unscorable", "error"]
FinishReason: TypeAlias = Literal["stop", "length", "read"]
Prefix: TypeAlias = Literal["kept", "reread", "whole"]
JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None


LOWER_IS_LESS_CERTAIN = frozenset({"min_token_logprob"})
"""The scores that fall where the model is less certain; all others rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Args:
        role: ``system``, ``user``, ``assistant``, ``tool``: whatever the model's chat template knows.
        content: the text of the turn.
    """

    role: str
    content: str


Messages: TypeAlias = str | Sequence[Message | Mapping[str, Any]]
"""What callers may hand in as a prompt: one user message, or the turns so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which model spoke: what a calibration is bound to and what the audit log names.

    Args:
        name: hub id, folder or file name; for reading, not for comparing.
        fingerprint: hash over the config, the dtype and a sample of every weight.
        dtype: of the weights, for example ``float32``.
        template: hash of the chat template; ``none`` for a model without one.
    """

    name: str
    fingerprint: str
    dtype: str
    template: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """The semantics-preserving token t*.

    Args:
        index: position counted from the end of the prompt; −1 is its last token.
        token: its text, as the tokenizer writes it.
        rule: what chose it: ``profile``, ``header``, ``last_user_token`` or ``question``.
    """

    index: int
    token: str
    rule: Literal["profile", "header", "last_user_token", "question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A prompt and the answer to it, exactly as the model saw them.

    Args:
        messages: the turns; for a model without a chat template one ``user`` message with the raw text.
        prompt_token_ids: x, length P, with the generation header.
        response_token_ids: ŷ, length T, without the end-of-turn token that stopped it.
        text: the answer as a reader sees it.
        finish_reason: ``stop`` or ``length``; ``read`` when something else wrote the answer.
        model: which model it belongs to.
        anchor: t*; None on a model without a chat template whose caller did not name the question.
        seconds: wall time of generating (0 for ``read``).
    """

    messages: tuple[Message, ...]
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    model: ModelIdentity
    anchor: Anchor | None
    seconds: float = 0.0
    _trace: Any = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Forget what was kept for scoring; a later score reads the text again."""
        if self._trace is not None:
            self._trace.take()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerIdentity:
    """Which scorer measured: its name, the version of its arithmetic and every setting that changes a number."""

    name: str
    version: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was measured of one generation; higher = less certain, but for :data:`LOWER_IS_LESS_CERTAIN`.

    Args:
        status: ``scored``; ``unscorable`` (there is nothing to measure); ``error`` (measuring failed).
        reason: why there is no score; empty when there is one.
        scorer: who measured.
        scores: by name, finite; empty unless ``scored``.
        anchor: t* if a gradient was taken.
        prefix: if a gradient was taken, where what comes before t* was read: ``kept`` from generating; ``reread`` in
            one pass without a graph; ``whole`` where no cache can be cut at t*: the deep half's graph spans it all.
        token_entropies: H(p_t) in nats, length T.
        token_logprobs: log p_t[ŷ_t], length T.
        seconds: wall time of scoring.

    Raises:
        ValueError: on a non-finite number, a score without ``scored``, or a missing reason.
    """

    status: Status
    scorer: ScorerIdentity
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    anchor: Anchor | None = None
    prefix: Prefix | None = None
    token_entropies: tuple[float, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status not in ("scored", "unscorable", "error"):
            raise ValueError(f"a score is {self.status!r}, which is no status")
        if (self.status == "scored") == bool(self.reason):
            raise ValueError(f"a score is {self.status!r} and its reason is {self.reason!r}")
        if (self.status == "scored") != bool(self.scores):
            raise ValueError(f"a score is {self.status!r} and its numbers are {dict(self.scores)!r}")
        for name, value in self.scores.items():
            if not math.isfinite(value):
                raise ValueError(f"score {name!r} is {value!r}, not a finite number")
        if not all(map(math.isfinite, (*self.token_entropies, *self.token_logprobs))):
            raise ValueError("a token entropy or log probability is not finite")
        object.__setattr__(self, "scores", MappingProxyType(dict(self.scores)))

    def __reduce__(self) -> tuple[Any, ...]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return (_rebuilt, (type(self), {**values, "scores": dict(self.scores)}))  # a read-only view does not travel

    def to_html(self, model: Any, generation: Generation) -> str:
        """A page that shows why: the answer's shaky sentences and tokens, and the words of the question it hangs on.

        A score keeps no text, so that it can be logged where text must not be; it is handed in again here.

        Args:
            model: the :class:`~hallucination_guard.model.WhiteBoxModel` that was scored with.
            generation: that was scored.

        Raises:
            AnchorError: if the generation has no anchor.
            ScoringError: if there is nothing to explain, or the generation is not the one that was scored.
        """
        # By name: what draws the page stands floors above, and this is only a door to it.
        explain = importlib.import_module("hallucination_guard.explain").explain
        return str(explain(model, generation, score=self).to_html())

    @classmethod
    def unscorable(cls, reason: str, *, scorer: ScorerIdentity) -> Self:
        """There is nothing to measure, for example in an empty answer."""
        return cls(status="unscorable", reason=reason, scorer=scorer)

    @classmethod
    def failed(cls, reason: str, *, scorer: ScorerIdentity) -> Self:
        """Measuring was tried and failed."""
        return cls(status="error", reason=reason, scorer=scorer)


def _rebuilt(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A score and what it means.

    Args:
        score: what was measured.
        confidence: calibrated P(correct) in [0, 1]; None when nothing was calibrated.
        max_risk: the smallest certified α whose threshold lets this answer through: of all the answers let through
            there at most this share is wrong; None when no certificate does.
        certificate: id of the certificate that says so.
        suspended: why certificates do not hold at the moment; empty while they do.
    """

    score: Score
    confidence: float | None = None
    max_risk: float | None = None
    certificate: str | None = None
    suspended: str = ""

    def __post_init__(self) -> None:
        if (self.max_risk is None) != (self.certificate is None):
            raise ValueError(f"a verdict has max_risk {self.max_risk!r} by the certificate {self.certificate!r}")
        if self.max_risk is not None:
            if not 0.0 < self.max_risk < 1.0:  # also false for NaN
                raise ValueError(f"max_risk is {self.max_risk!r}, not a number between 0 and 1")
            if self.score.status != "scored" or self.suspended:
                raise ValueError("no certificate lets through what has no score, or holds while it is suspended")
        if self.confidence is not None:
            if not 0.0 <= self.confidence <= 1.0:  # also false for NaN
                raise ValueError(f"a confidence is {self.confidence!r}, not a number in [0, 1]")
            if self.score.status != "scored":
                raise ValueError(f"an answer that is {self.score.status!r} can not have a confidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of text that a retriever found, and the id under which it can be found again."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """Draw another answer to the same prompt.

    Args:
        temperature: of the redraw, > 0: a greedy redraw would repeat the draft.
        top_p: nucleus of the redraw, in (0, 1].
        seed: of the first redraw; the n-th redraw of a call uses ``seed + n - 1``.
        keep: which draft is judged next: the ``last`` one or the ``best`` (most certain) so far.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    keep: Literal["last", "best"] = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieve:
    """Look something up, put it into the prompt, generate and score again.

    Args:
        retriever: ``callable(query)`` or an object with ``invoke(query)``; it may be async. Gives strings,
            :class:`Passage` objects or LangChain documents.
        k: at most this many passages are used.
        timeout: seconds for one call.
        tries: calls in all when the retriever raises.
        template: has ``{passages}`` and ``{question}``.
    """

    retriever: Any
    k: int
    timeout: float
    tries: int
    template: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalate:
    """Hand the question to something else.

    Args:
        to: ``callable(messages)`` or an object with ``invoke(messages)``, messages being a list of role/content
            dicts; it may be async. Gives a string or a message with ``.content``. None hands over to the caller
            (a human, a queue): the outcome then has no text.
        timeout: seconds for the call.
    """

    to: Any
    timeout: float


Move: TypeAlias = Redraw | Retrieve | Escalate
"""How a decision that is neither ``accept`` nor ``abstain`` is carried out."""

_MOVES: Mapping[Action, type | None] = {
    "accept": None,
    "abstain": None,
    "retry": Redraw,
    "retrieve": Retrieve,
    "escalate": Escalate,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to happen with an answer, by which rule, and why.

    Args:
        action: the verb.
        rule: the rule that fired, for example ``abstain_below``; stable, for counting and for the log.
        reason: the same in words, with the numbers.
        move: how to carry it out; present exactly for ``retry``, ``retrieve`` and ``escalate``.
        spent: an abstention only because this rule has used up its attempts; a following rule may still accept.
    """

    action: Action
    rule: str
    reason: str
    move: Move | None = None
    spent: bool = False

    def __post_init__(self) -> None:
        if not self.rule or not self.reason:
            raise ValueError(f"a decision needs a rule and a reason: {self.rule!r}, {self.reason!r}")
        kind = _MOVES[self.action]
        if not (self.move is None if kind is None else isinstance(self.move, kind)):
            raise ValueError(f"action {self.action!r} does not go with the move {self.move!r}")
        if self.spent and self.action != "abstain":
            raise ValueError(f"only an abstention can be spent, not {self.action!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a policy may know besides the verdict.

    Args:
        attempt: 1 for the first draft.
        rules: the rules that fired so far in this call, in order.
        seconds: since the call began.
    """

    attempt: int = 1
    rules: tuple[str, ...] = ()
    seconds: float = 0.0

    def fired(self, rule: str) -> int:
        """How often ``rule`` has fired in this call."""
        return self.rules.count(rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the caller gets.

    Args:
        text: the answer let through; None when there is none.
        decision: the last one taken.
        verdict: the one that was judged last.
        attempts: how many answers were generated.
        audit_ids: one id an attempt, in order, and one for an escalation's answer; empty without an audit log.
        seconds: ``generate`` and ``score``, over all attempts, and ``total``.
        generation: the draft that was judged last, for inspection; its text is *not* cleared by an abstention.
        tokens: ``in`` and ``out``, over all attempts.
        retrieved: ids of the passages in the prompt of the judged draft.
        request_id: of this call, for the log.
    """

    text: str | None
    decision: Decision
    verdict: Verdict
    attempts: int
    generation: Generation = field(repr=False)
    audit_ids: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    retrieved: tuple[str, ...] = ()
    request_id: str = ""

    def __post_init__(self) -> None:
        if self.text is not None and self.decision.action not in ("accept", "escalate"):
            raise ValueError(f"an outcome decided {self.decision.action!r} must not carry a text")
        if self.text is None and self.decision.action == "accept":
            raise ValueError("an accepted outcome must carry a text")

    @property
    def accepted(self) -> bool:
        """Whether the model's own answer was let through."""
        return self.decision.action == "accept"

    @property
    def confidence(self) -> float | None:
        """Calibrated P(correct) of the judged answer; None when uncalibrated or unscored."""
        return self.verdict.confidence


@runtime_checkable
class Scorer(Protocol):
    """Measures generations of one model; must be deterministic and must not change the model."""

    @property
    def identity(self) -> ScorerIdentity:
        """Name, version and settings."""
        ...

    @property
    def primary(self) -> str:
        """The name in ``Score.scores`` that this scorer is about."""
        ...

    def batch(self, model: Any, generations: Sequence[Generation]) -> list[Score]:
        """One score a generation, in order. What can not be measured is ``unscorable``, with its reason."""
        ...


@runtime_checkable
class Policy(Protocol):
    """One question about a verdict. Pure: same verdict and situation, same decision."""

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        ...

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on; hashed into the audit record."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Where audit records go. Returns the id under which the record can be found; raises if it was not kept."""

    def __call__(self, record: AuditRecord) -> str:
        """Keep one record."""
        ...


Retriever: TypeAlias = Callable[[str], Sequence[Any]]

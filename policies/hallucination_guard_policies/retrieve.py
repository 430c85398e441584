"""Whether something should be looked up first."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import ClassVar

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import Action, Retrieve, Retriever
from hallucination_guard_policies._check import count, number, target
from hallucination_guard_policies.below import ActBelow

__all__ = ["TEMPLATE", "RetrieveBelow"]

# The question comes last: the token whose meaning is scored (t*) then is still the end of the question. Nothing is
# asked besides: small models answer more rightly without further instructions, large ones do not need them.
TEMPLATE = "{passages}\n\n{question}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveBelow(ActBelow):
    """Look something up and answer again: ``RetrieveBelow(confidence=0.5, retriever=search)``.

    Args:
        confidence: accepts from here up, in (0, 1].
        score: or: name of a raw score that is higher where the model is less certain.
        limit: accepts up to here.
        max_risk: or: accepts what a certificate of at most this risk lets through, in (0, 1).
        name: of the rule, for the log; ``retrieve_below`` when not given.
        times: retrievals in one call; then it is spent.
        retriever: ``callable(query)`` or an object with ``invoke(query)``; it may be async.
        k: at most this many passages are used.
        timeout: seconds for one call.
        tries: calls in all when the retriever raises.
        corpus: which documents are searched, and how: a name that changes with them, for example ``handbook-2026-11``.
            A certificate is bound to it. By default the retriever's own ``identity``, where it has one.
        template: the new prompt, for ``str.format``, with ``{passages}`` and ``{question}``.
    """

    action: ClassVar[Action] = "retrieve"
    retriever: Retriever
    k: int = 3
    timeout: float = 10.0
    tries: int = 2
    template: str = TEMPLATE
    corpus: str = ""

    def __post_init__(self) -> None:
        ActBelow.__post_init__(self)
        target("retriever", self.retriever)
        count("k", self.k)
        number("timeout", self.timeout, above=0)
        count("tries", self.tries)
        own = getattr(self.retriever, "identity", "")
        if not self.corpus and isinstance(own, str):
            object.__setattr__(self, "corpus", own)
        if not isinstance(self.corpus, str):
            raise PolicyError(f"corpus is {self.corpus!r}", hint="give a name, for example 'handbook-2026-11'")
        if _fields(self.template) != {"passages", "question"}:
            raise PolicyError(
                f"template is {self.template!r}",
                hint="give it {passages} and {question} and no other field; a literal brace is doubled",
            )

    @property
    def unnamed(self) -> str:
        """Where nothing says which documents are searched, no certificate can be bound to them."""
        return "" if self.corpus else f"{self.rule} does not say which corpus its retriever searches"

    def _move(self) -> Retrieve:
        return Retrieve(
            retriever=self.retriever, k=self.k, timeout=self.timeout, tries=self.tries, template=self.template
        )


def _fields(template: object) -> set[str]:
    """The names that ``str.format`` would fill in; none of a text that it would stumble over."""
    try:
        parsed = list(Formatter().parse(template)) if isinstance(template, str) else []
    except ValueError:  # a single brace
        return set()
    return {f"{name}{spec}{conversion or ''}" for _, name, spec, conversion in parsed if name is not None}

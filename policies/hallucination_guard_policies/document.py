"""A policy written down: YAML, a mapping or a ready pack becomes a policy object."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.errors import PolicyError
from hallucination_guard.values import JSON, Answerer, Decision, Policy, Retriever, Situation, Verdict
from hallucination_guard_policies._check import number
from hallucination_guard_policies.abstain import AbstainBelow
from hallucination_guard_policies.accept import Accept
from hallucination_guard_policies.budget import Budget, Within
from hallucination_guard_policies.compose import BothObject, Composable, FirstObjection
from hallucination_guard_policies.escalate import EscalateBelow
from hallucination_guard_policies.provisional import ShowProvisional
from hallucination_guard_policies.retrieve import RetrieveBelow
from hallucination_guard_policies.retry import RetryBelow
from hallucination_guard_policies.sentences import MarkSentences, RedactSentences
from hallucination_guard_policies.unscored import Unscored

if TYPE_CHECKING:
    from hallucination_guard_policies import _schema
    from hallucination_guard_policies._source import Source

__all__ = ["Document", "load_policy", "pack_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Composable):
    """A policy with a name and a version, as a document gave it.

    Args:
        id: its name in the audit log.
        version: raised by its author with every change.
        policy: what decides.
    """

    id: str
    version: int
    policy: Policy

    @property
    def parts(self) -> tuple[Policy, ...]:
        """What decides."""
        return (self.policy,)

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of :meth:`describe`: another threshold is another hash."""
        canonical = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, verdict: Verdict, situation: Situation) -> Decision:
        """Decide."""
        return self.policy(verdict, situation)

    def describe(self) -> Mapping[str, JSON]:
        """Plain data that says all that the decision depends on."""
        return {"policy": "Document", "id": self.id, "version": self.version, "of": self.policy.describe()}


def load_policy(
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    confidence: float | None = None,
    max_risk: float | None = None,
    retriever: Retriever | None = None,
    to: Answerer | None = None,
) -> Document:
    """Load a policy document: ``load_policy("rag", confidence=0.6, retriever=search)``.

    Args:
        source: the name of a ready pack (:func:`pack_names`), the path to a YAML file, or a mapping.
        confidence: replaces the confidence in every threshold of the document; raw limits stay as they are.
        max_risk: replaces the certified risk in every threshold of the document that has one.
        retriever: what ``retrieve`` rules look things up with; a document that has none does not use it.
        to: what escalations go to; None hands over to the caller.

    Raises:
        PolicyError: in one line: file, line, keys and value of the first thing that cannot be, and how to fix it.
    """
    # pydantic and yaml are loaded here, so that importing the package costs nothing.
    from hallucination_guard_policies import _schema, _source

    if isinstance(source, Mapping):
        text = _source.Source("policy", dict(source))
    else:
        packs = _packs()
        text = _source.read(
            packs.get(fspath(source)) or Path(source),
            hint=f"give the path to a YAML file or the name of a ready pack: {', '.join(packs)}",
        )
    document = _schema.checked(text)
    if confidence is not None:
        number("confidence", confidence, above=0, most=1)
    policy = _Builder(text, confidence, max_risk, retriever, to).build(document)
    if confidence is not None and not policy.needs_confidence:
        raise PolicyError(
            f"confidence={confidence!r} replaces nothing: no threshold of {text.name} has a confidence",
            hint="leave it out, or write below: {confidence: …} in the document",
        )
    if max_risk is not None and policy.needs_risk is None:
        raise PolicyError(
            f"max_risk={max_risk!r} replaces nothing: no threshold of {text.name} has a max_risk",
            hint="leave it out, or write below: {max_risk: …} in the document",
        )
    return policy


def pack_names() -> tuple[str, ...]:
    """The ready packs, sorted."""
    return tuple(_packs())


def _packs() -> Mapping[str, Path]:
    # A wheel carries the packs inside the package; in a checkout they lie beside it, where people look for them.
    installed = Path(str(importlib.resources.files("hallucination_guard_policies"))) / "packs"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "packs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes policies of a checked document; what they refuse is told with its place in the text."""

    source: Source
    confidence: float | None
    max_risk: float | None
    retriever: Retriever | None
    to: Answerer | None

    def build(self, document: _schema.Document) -> Document:
        chain: Policy = self._rule(document.rules[0], ("rules", 0))
        for place, rule in enumerate(document.rules[1:], start=1):
            chain = self._at(("rules", place), FirstObjection, (chain, self._rule(rule, ("rules", place))))
        scored = Unscored(chain, on_unscorable=document.on_unscorable, on_error=document.on_error, to=self.to)
        budget = Budget(**document.budget.model_dump(exclude_none=True)) if document.budget else Budget()
        within: Policy = Within(scored, budget)
        policy = ShowProvisional(within) if document.provisional else within
        return Document(id=document.id, version=document.version, policy=policy)

    def _rule(self, rule: _schema.Rule, path: tuple[int | str, ...]) -> Policy:
        if rule.both is not None:
            first, second = (self._rule(part, (*path, "both", place)) for place, part in enumerate(rule.both))
            return self._at((*path, "both"), BothObject, first, second)
        if rule.abstain is not None:
            return self._at((*path, "abstain"), AbstainBelow, **rule.abstain.settings(self.confidence, self.max_risk))
        if rule.retry is not None:
            return self._at((*path, "retry"), RetryBelow, **rule.retry.settings(self.confidence, self.max_risk))
        if rule.retrieve is not None:
            if self.retriever is None:
                raise self.source.refusal(
                    (*path, "retrieve"), "there is no retriever", "give one: load_policy(…, retriever=…)"
                )
            settings = rule.retrieve.settings(self.confidence, self.max_risk)
            return self._at((*path, "retrieve"), RetrieveBelow, retriever=self.retriever, **settings)
        if rule.escalate is not None:
            settings = rule.escalate.settings(self.confidence, self.max_risk)
            return self._at((*path, "escalate"), EscalateBelow, to=self.to, **settings)
        if rule.mark is not None:
            return self._at((*path, "mark"), MarkSentences, **rule.mark.settings())
        if rule.redact is not None:
            return self._at((*path, "redact"), RedactSentences, **rule.redact.settings())
        return Accept()

    def _at(self, path: tuple[int | str, ...], make: Any, *values: Any, **settings: Any) -> Policy:
        try:
            policy: Policy = make(*values, **settings)
        except PolicyError as error:
            raise self.source.refusal(path, error.message, error.hint) from None
        return policy

"""What a guarded model must do in any framework: the same prompts and scores, the same texts, decisions and records.

A framework is an :class:`Adapter` of a few lines over the real library. A story is told to it in each of its ways
(sync, async, streamed), and to the bare guard; ``CASES`` has every check with every story that it is about. The author
of another integration loads this file by its path and parametrises over ``CASES``.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, Protocol, TypeAlias

from hallucination_guard import Guard
from hallucination_guard.audit import AuditRecord, verify
from hallucination_guard.errors import AuditError, ConfigurationError, InputError
from hallucination_guard.guard import ABSTENTION, NotAnswered
from hallucination_guard.testing import MemorySink, ScriptedModel, ScriptedScorer
from hallucination_guard.values import Passage, Policy
from hallucination_guard_policies import AbstainBelow, Accept, EscalateBelow, RetrieveBelow, RetryBelow

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of France?"
DRAFT = "Lyon, as every schoolchild knows."  # what must not be found anywhere
TOOL: dict[str, Any] = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
# An argument that no id or digest can have by chance, so that "it is not shown" is true or false and nothing between.
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 471100171, "b": 2}}\n</tool_call>'
Turns: TypeAlias = Sequence[Mapping[str, str]]
Call: TypeAlias = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a framework handed out.

    Args:
        text: of the answer.
        calls: name and arguments of each.
        verdict: what lies under "hallucination_guard"; None where the framework's streams carry no metadata.
        all: whatever came with it, to be searched for a draft.
    """

    text: str
    calls: list[Call]
    verdict: Mapping[str, Any] | None
    all: object


class Adapter(Protocol):
    """A framework. ``settings`` are those of its guarded model: ``abstention`` and ``on_abstain``."""

    def ask(self, guard: Guard, turns: Turns, *, tools: bool = False, **settings: Any) -> Heard:
        """Hand the turns to the guarded model, with :data:`TOOL` if there are ``tools``."""
        ...

    async def aask(self, guard: Guard, turns: Turns, *, tools: bool = False, **settings: Any) -> Heard:
        """The same, awaited."""
        ...

    def stream(self, guard: Guard, turns: Turns, heard: list[str], *, tools: bool = False, **settings: Any) -> Heard:
        """The same, streamed: the text of each chunk goes into ``heard`` when it comes."""
        ...

    def show_an_image(self, guard: Guard) -> object:
        """Hand it a prompt with an image in it."""
        ...


# ------------------------------------------------------------------------------------------------------ stories

LIMIT: dict[str, Any] = {"score": "hybridgrad", "limit": 0.5}
SURE, UNSURE = 0.1, 0.9


def look_up(query: str) -> list[Passage]:
    """A retriever."""
    return [Passage(id="atlas-1", text="The capital of France is Paris.")]


def librarian(messages: object) -> str:
    """Whom to ask instead."""
    return "Paris, says the librarian."


@dataclass(frozen=True, kw_only=True)
class Story:
    """A call, and what has to come of it.

    Args:
        policy: decides.
        answers: of the model, in the order in which it is asked.
        scores: of the answers, in order: a number, words (unscorable), or an exception.
        records: of each attempt: decision, rule, status and answer.
        text: that is let through; None where none is.
        calls: that are let through.
        turns: what is asked.
        tools: whether :data:`TOOL` is offered.
    """

    policy: Policy
    answers: Sequence[str]
    scores: Sequence[float | str | BaseException]
    records: Sequence[tuple[str, str, str, str]]
    text: str | None = None
    calls: list[Call] = field(default_factory=list)
    turns: Turns = ({"role": "user", "content": QUESTION},)
    tools: bool = False

    def guard(self, sink: Any = None) -> Guard:
        """A new guard for it: scripts are used up."""
        return Guard(
            ScriptedModel(list(self.answers)),
            policy=self.policy,
            scorer=ScriptedScorer(list(self.scores)),
            audit=MemorySink() if sink is None else sink,
        )


ABSTAIN = AbstainBelow(**LIMIT)
STORIES = {
    "accept": Story(
        policy=ABSTAIN,
        answers=["Paris."],
        scores=[SURE],
        text="Paris.",
        records=[("accept", "abstain_below", "scored", "Paris.")],
    ),
    "abstain": Story(
        policy=ABSTAIN, answers=[DRAFT], scores=[UNSURE], records=[("abstain", "abstain_below", "scored", DRAFT)]
    ),
    "retry then accept": Story(
        policy=RetryBelow(**LIMIT),
        answers=[DRAFT, "Paris."],
        scores=[UNSURE, SURE],
        text="Paris.",
        records=[("retry", "retry_below", "scored", DRAFT), ("accept", "retry_below", "scored", "Paris.")],
    ),
    "retrieve then accept": Story(
        policy=RetrieveBelow(**LIMIT, retriever=look_up, corpus="atlas") | ABSTAIN,
        answers=[DRAFT, "Paris."],
        scores=[UNSURE, SURE],
        text="Paris.",
        records=[("retrieve", "retrieve_below", "scored", DRAFT), ("accept", "abstain_below", "scored", "Paris.")],
    ),
    "escalate to somebody": Story(
        policy=EscalateBelow(**LIMIT, to=librarian),
        answers=[DRAFT],
        scores=[UNSURE],
        text="Paris, says the librarian.",
        records=[
            ("escalate", "escalate_below", "scored", DRAFT),
            ("escalate", "escalate_below", "unscorable", "Paris, says the librarian."),
        ],
    ),
    "escalate to the caller": Story(
        policy=EscalateBelow(**LIMIT, to=None),
        answers=[DRAFT],
        scores=[UNSURE],
        records=[("escalate", "escalate_below", "scored", DRAFT)],
    ),
    "unscorable": Story(
        policy=ABSTAIN,
        answers=[DRAFT],
        scores=["nothing to measure"],
        records=[("abstain", "on_unscorable", "unscorable", DRAFT)],
    ),
    "the scorer fails": Story(
        policy=ABSTAIN,
        answers=[DRAFT],
        scores=[ZeroDivisionError(DRAFT)],
        records=[("abstain", "on_error", "error", DRAFT)],
    ),
    "a call is let through": Story(
        policy=ABSTAIN,
        answers=[CALL],
        scores=[SURE],
        text="",
        calls=[("add", {"a": 471100171, "b": 2})],
        tools=True,
        records=[("accept", "abstain_below", "scored", CALL)],
    ),
    "a call is not let through": Story(
        policy=ABSTAIN,
        answers=[CALL],
        scores=[UNSURE],
        tools=True,
        records=[("abstain", "abstain_below", "scored", CALL)],
    ),
    "a text where tools are": Story(
        policy=ABSTAIN,
        answers=["Paris."],
        scores=[SURE],
        text="Paris.",
        tools=True,
        records=[("accept", "abstain_below", "scored", "Paris.")],
    ),
    "a conversation": Story(
        policy=ABSTAIN,
        answers=["The Seine."],
        scores=[SURE],
        text="The Seine.",
        turns=(
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "And its river?"},
        ),
        records=[("accept", "abstain_below", "scored", "The Seine.")],
    ),
}
WITHHELD = {name: story for name, story in STORIES.items() if story.text is None}


# ------------------------------------------------------------------------------------------------------- checks


def tells_it(adapter: Adapter, story: Story) -> None:
    """The text and the calls that were let through, or the abstention and no call."""
    heard = adapter.ask(story.guard(), story.turns, tools=story.tools)
    assert (heard.text, heard.calls) == (ABSTENTION if story.text is None else story.text, story.calls)


def records_it(adapter: Adapter, story: Story) -> None:
    sink = MemorySink()
    adapter.ask(story.guard(sink), story.turns, tools=story.tools)
    assert [(each.decision, each.rule, each.status, each.answer) for each in sink.records] == list(story.records)


def records_what_the_bare_guard_records(adapter: Adapter, story: Story) -> None:
    """Prompt, roles and all: nothing is lost or added on the way in."""
    bare, framed = MemorySink(), MemorySink()
    story.guard(bare)(list(story.turns), **({"tools": [TOOL]} if story.tools else {}))
    adapter.ask(story.guard(framed), story.turns, tools=story.tools)
    assert [_known(each, story) for each in framed.records] == [_known(each, story) for each in bare.records]


def says_the_verdict(adapter: Adapter, story: Story) -> None:
    sink = MemorySink()
    verdict = adapter.ask(story.guard(sink), story.turns, tools=story.tools).verdict
    assert verdict is not None
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict
    decision, rule, *_ = story.records[-1]
    assert (verdict["decision"], verdict["rule"]) == (decision, rule)
    assert verdict["audit_ids"] == [each.id for each in sink.records]
    assert verdict["retrieved"] == list(sink.records[-1].retrieved)


def lets_no_draft_out(adapter: Adapter, story: Story) -> None:
    heard = adapter.ask(story.guard(), story.turns, tools=story.tools)
    shown = repr(heard.all) + repr(heard.verdict)
    assert DRAFT not in shown
    assert story.calls or "471100171" not in shown


def awaits_the_same(adapter: Adapter, story: Story) -> None:
    called, awaited = MemorySink(), MemorySink()
    sync = adapter.ask(story.guard(called), story.turns, tools=story.tools)
    other = asyncio.run(adapter.aask(story.guard(awaited), story.turns, tools=story.tools))
    assert (other.text, other.calls) == (sync.text, sync.calls)
    assert _decided(other.verdict) == _decided(sync.verdict)
    assert [_known(each, story) for each in awaited.records] == [_known(each, story) for each in called.records]


def streams_the_same(adapter: Adapter, story: Story) -> None:
    """And no chunk has anything that was not decided on."""
    called, streamed = MemorySink(), MemorySink()
    chunks: list[str] = []
    sync = adapter.ask(story.guard(called), story.turns, tools=story.tools)
    other = adapter.stream(story.guard(streamed), story.turns, chunks, tools=story.tools)
    assert (other.text, other.calls) == (sync.text, sync.calls)
    assert "".join(chunks) == sync.text
    assert other.verdict is None or _decided(other.verdict) == _decided(sync.verdict)
    # Sentence by sentence where the framework streams so: then records say by which gate, and each part has its own.
    whole = [{**_known(each, story), "gate": None} for each in streamed.records if each.part is None]
    assert whole == [{**_known(each, story), "gate": None} for each in called.records]


def says_the_callers_abstention(adapter: Adapter, story: Story) -> None:
    assert adapter.ask(story.guard(), story.turns, tools=story.tools, abstention="Pass.").text == "Pass."


def raises_instead_of_abstaining(adapter: Adapter, story: Story) -> None:
    sink = MemorySink()
    error = _raised(
        NotAnswered, lambda: adapter.ask(story.guard(sink), story.turns, tools=story.tools, on_abstain="error")
    )
    assert DRAFT not in str(error)
    assert (error.outcome.text, error.outcome.tool_calls) == (None, ())
    assert [each.answer for each in sink.records] == [answer for *_, answer in story.records]


def raises_what_is_awaited_and_streamed(adapter: Adapter, story: Story) -> None:
    asked: dict[str, Any] = {"tools": story.tools, "on_abstain": "error"}
    _raised(NotAnswered, lambda: asyncio.run(adapter.aask(story.guard(), story.turns, **asked)))
    chunks: list[str] = []
    _raised(NotAnswered, lambda: adapter.stream(story.guard(), story.turns, chunks, **asked))
    assert "".join(chunks) == ""


def lets_nothing_out_where_nothing_is_recorded(adapter: Adapter, story: Story) -> None:
    def full(record: AuditRecord) -> str:
        raise OSError("no space left on device")

    chunks: list[str] = []
    for ask in (
        lambda: adapter.ask(story.guard(full), story.turns, tools=story.tools),
        lambda: asyncio.run(adapter.aask(story.guard(full), story.turns, tools=story.tools)),
        lambda: adapter.stream(story.guard(full), story.turns, chunks, tools=story.tools),
    ):
        _raised(AuditError, ask)
    assert chunks == []


def cannot_see_an_image(adapter: Adapter) -> None:
    sink = MemorySink()
    _raised(InputError, lambda: adapter.show_an_image(STORIES["accept"].guard(sink)))
    assert sink.records == []


def knows_two_ways_of_abstaining(adapter: Adapter) -> None:
    story = STORIES["accept"]
    _raised((ConfigurationError, ValueError), lambda: adapter.ask(story.guard(), story.turns, on_abstain="ignore"))


def gives_each_thread_its_own(adapter: Adapter) -> None:
    names = [f"city {at}" for at in range(8)]
    answers = {f"Where is {name}?": f"{name} is in France." for name in names}
    sink = MemorySink()
    guard = Guard(ScriptedModel(answers), policy=Accept(), scorer=ScriptedScorer(SURE), audit=sink)
    found: dict[str, str] = {}
    start = Barrier(len(answers))

    def ask(question: str) -> None:
        start.wait(10)
        found[question] = adapter.ask(guard, [{"role": "user", "content": question}]).text

    threads = [Thread(target=ask, args=(question,)) for question in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == answers
    assert len(sink.records) == len(answers)


OF_A_STORY = {
    **dict.fromkeys(
        (
            tells_it,
            records_it,
            records_what_the_bare_guard_records,
            says_the_verdict,
            lets_no_draft_out,
            awaits_the_same,
            streams_the_same,
            lets_nothing_out_where_nothing_is_recorded,
        ),
        STORIES,
    ),
    **dict.fromkeys(
        (says_the_callers_abstention, raises_instead_of_abstaining, raises_what_is_awaited_and_streamed), WITHHELD
    ),
}
CASES: dict[str, Callable[[Adapter], None]] = {
    **{
        f"{check.__name__}: {name}": partial(check, story=story)
        for check, stories in OF_A_STORY.items()
        for name, story in stories.items()
    },
    **{each.__name__: each for each in (cannot_see_an_image, knows_two_ways_of_abstaining, gives_each_thread_its_own)},
}


# ------------------------------------------------------------------------------------------------------- the rest


def readme_runs(framework: str, folder: Path) -> str:
    """Run the Python of an integration's README in an empty folder, with the demo model; what it printed.

    It has to write an audit log that is whole.
    """
    import os
    import subprocess
    import sys

    text = (ROOT / "integrations" / framework / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60, "a README of one screen"
    program = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = verify(folder / "audit.jsonl")
    assert found.ok and found.records
    return run.stdout


_CHANCE = ("id", "time", "request_id", "seconds")


def _known(record: AuditRecord, story: Story) -> dict[str, Any]:
    """What of a record two runs have in common. How a framework words the schema of a tool is its own."""
    left_out = (*_CHANCE, "conditions", "tokens") if story.tools else _CHANCE
    return {name: value for name, value in record.to_json_dict().items() if name not in left_out}


def _decided(verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    assert verdict is not None
    return {name: value for name, value in verdict.items() if name not in ("audit_ids", "request_id", "seconds")}


def _raised(kind: Any, call: Callable[[], object]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind} was not raised")

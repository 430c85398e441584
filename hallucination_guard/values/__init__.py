"""What travels through a guarded call, and the protocols of what it travels through.

prompt → :class:`Generation` → :class:`Score` → :class:`Verdict` → :class:`Decision` → :class:`Outcome`. Values are
frozen and refuse bad states: a score holds finite numbers or a reason why not, a decision has a reason, an outcome that
was not let through has no text. Nothing here imports anything of the package but its errors.
"""

from __future__ import annotations

from hallucination_guard.values.call import Call
from hallucination_guard.values.conditions import Conditions
from hallucination_guard.values.decision import (
    Action,
    Answerer,
    Decision,
    Escalate,
    Invoked,
    Move,
    Passage,
    Redraw,
    Retrieve,
    Retriever,
    Situation,
)
from hallucination_guard.values.generation import Anchor, FinishReason, Generation, Kept, Rule
from hallucination_guard.values.generator import Generator
from hallucination_guard.values.identity import ModelIdentity, ScorerIdentity
from hallucination_guard.values.outcome import Outcome
from hallucination_guard.values.plain import JSON, FrozenDict, from_json
from hallucination_guard.values.prompt import (
    Message,
    Messages,
    Prompt,
    as_messages,
    checked_text,
    is_batch,
    question_of,
)
from hallucination_guard.values.protocols import (
    Ending,
    FollowingModel,
    Heard,
    Live,
    Model,
    Piece,
    Policy,
    Scorer,
    StreamingModel,
    StreamingScorer,
    Watch,
)
from hallucination_guard.values.score import LOWER_IS_LESS_CERTAIN, Prefix, Score, Status
from hallucination_guard.values.sentence import Backoff, Edit, Guarantee, Manner, Sentence, edited
from hallucination_guard.values.settings import (
    DRAWN,
    Drawing,
    GenerationOptions,
    GenerationSettings,
    Offered,
    options_of,
)
from hallucination_guard.values.states import States
from hallucination_guard.values.stream import Event, Provisional, Released
from hallucination_guard.values.tools import Tool, ToolCall, ToolChoice, WrittenCall, as_tools, tool_choice_of
from hallucination_guard.values.verdict import Verdict

__all__ = [
    "DRAWN",
    "JSON",
    "LOWER_IS_LESS_CERTAIN",
    "Action",
    "Anchor",
    "Answerer",
    "Backoff",
    "Call",
    "Conditions",
    "Decision",
    "Drawing",
    "Edit",
    "Ending",
    "Escalate",
    "Event",
    "FinishReason",
    "FollowingModel",
    "FrozenDict",
    "Generation",
    "GenerationOptions",
    "GenerationSettings",
    "Generator",
    "Guarantee",
    "Heard",
    "Invoked",
    "Kept",
    "Live",
    "Manner",
    "Message",
    "Messages",
    "Model",
    "ModelIdentity",
    "Move",
    "Offered",
    "Outcome",
    "Passage",
    "Piece",
    "Policy",
    "Prefix",
    "Prompt",
    "Provisional",
    "Redraw",
    "Released",
    "Retrieve",
    "Retriever",
    "Rule",
    "Score",
    "Scorer",
    "ScorerIdentity",
    "Sentence",
    "Situation",
    "States",
    "Status",
    "StreamingModel",
    "StreamingScorer",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "Verdict",
    "Watch",
    "WrittenCall",
    "as_messages",
    "as_tools",
    "checked_text",
    "edited",
    "from_json",
    "is_batch",
    "options_of",
    "question_of",
    "tool_choice_of",
]

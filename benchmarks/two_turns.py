"""Where SemGrad should be taken in a conversation with results of tools: which t* tells more of wrong answers.

    python benchmarks/two_turns.py [--model demo | FOLDER | FILE.gguf] [--limit N]

100 conversations of two turns. In both something is looked up; the first answer is given, the second is the model's. In
two of five the last result does not have what is asked for, so that a number in the answer is made up. An answer is
right if it has the number, or says that it is not known where it is not. Each answer is scored at five places: the
template's own t* (of the generation header), the last token of the last user turn and of the last result, and the
token behind each. A base model reads the same as text, and has no header. AUROC of "wrong", with 95 % intervals from
2,000 bootstrap draws, and of each place against the last user turn on the same draws.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from hallucination_guard import Generation, HybridGrad, Message, Tool, ToolCall, WhiteBoxModel
from hallucination_guard.values import Anchor

KINDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))["kinds"]
COUNT, LACKING = 100, 0.4
SCORES = ("semgrad", "hybridgrad", "sequence_nll")
UNKNOWN = re.compile(r"\b(not|no|unknown|unable|cannot|sorry|n't|without)\b|n't\b", re.IGNORECASE)
REFERENCE = "last user turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns up to the last result, the number that is asked for, or None where the result does not have it."""

    id: str
    turns: tuple[Message, ...]
    tool: Tool
    value: int | None


def conversations() -> list[Conversation]:
    """All of them, always the same ones."""
    draw = np.random.default_rng(20261125)
    found = []
    for at in range(COUNT):
        kind = KINDS[at % len(KINDS)]
        fields = kind["fields"]
        first, second = (kind["names"][each] for each in draw.permutation(len(kind["names"]))[:2])
        asked, earlier = (list(fields)[each] for each in draw.permutation(len(fields))[:2])
        records = [
            {name: int(draw.integers(own["low"], own["high"])) for name, own in fields.items()} for _ in range(2)
        ]
        lacking = (at // len(KINDS)) % 5 < 5 * LACKING
        known = {name: value for name, value in records[1].items() if not (lacking and name == asked)}
        calls = [
            ToolCall(name=kind["tool"], arguments={kind["of"]: name}, id=f"call{at:03}{number:02}")
            for number, name in enumerate((first, second))
        ]
        said = fields[earlier]["say"].format(name=first, value=records[0][earlier])
        turns = (
            Message(role="user", content=fields[earlier]["ask"].format(name=first)),
            Message(role="assistant", content="", tool_calls=(calls[0],)),
            Message(role="tool", content=json.dumps(records[0]), tool_call_id=calls[0].id, name=kind["tool"]),
            Message(role="assistant", content=said),
            Message(role="user", content=fields[asked]["ask"].format(name=second)),
            Message(role="assistant", content="", tool_calls=(calls[1],)),
            Message(role="tool", content=json.dumps(known), tool_call_id=calls[1].id, name=kind["tool"]),
        )
        tool = Tool(
            name=kind["tool"],
            description=f"Look a {kind['of']} up.",
            parameters={"properties": {kind["of"]: {"type": "string"}}, "required": [kind["of"]]},
        )
        value = None if lacking else records[1][asked]
        found.append(Conversation(id=f"{kind['of']}-{at}", turns=turns, tool=tool, value=value))
    return found


def right(text: str, value: int | None) -> bool:
    """Whether the answer has the number, or says that it is not known where it is not."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return bool(UNKNOWN.search(text)) and not numbers if value is None else str(value) in numbers


def as_text(conversation: Conversation) -> str:
    """The conversation for a model without a template."""
    heads = {"user": "User", "assistant": "Assistant", "tool": "Record"}
    lines = [f"{heads[turn.role]}: {turn.content}" for turn in conversation.turns if turn.content]
    return "\n".join([*lines, "Assistant:"])


def answered(model: WhiteBoxModel, conversation: Conversation) -> Generation:
    """The model's answer to the last turn."""
    user, result = conversation.turns[4].content, conversation.turns[-1].content
    if model.prompt("?").templated:
        drawing: dict[str, Any] = {"tools": [conversation.tool], "tool_choice": "none"}
        return model.generate(list(conversation.turns), max_new_tokens=32, **drawing)
    return model.generate(as_text(conversation), max_new_tokens=32, question=f"{user}\nRecord: {result}", stop=["\n"])


def places(model: WhiteBoxModel, conversation: Conversation, generation: Generation) -> dict[str, Anchor]:
    """Where t* may be."""
    ids = generation.prompt_token_ids
    text = str(model.tokenizer.decode(ids))
    read = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tuple(read["input_ids"]) == ids, "the prompt is not what it decodes to"
    assert generation.anchor is not None
    found = {"header": generation.anchor} if generation.anchor.rule == "header" else {}
    for name, content in (
        ("last user turn", conversation.turns[4].content),
        ("last result", conversation.turns[-1].content),
    ):
        stop = text.rindex(content) + len(content)
        at = max(number for number, (start, _) in enumerate(read["offset_mapping"]) if start < stop)
        for label, place in ((name, at), (f"behind the {name}", at + 1)):
            token = str(model.tokenizer.convert_ids_to_tokens(ids[place]))
            found[label] = Anchor(index=place - len(ids), token=token, rule="question")
    return found


def interval(values: Sequence[float]) -> str:
    """The middle 95 %."""
    low, high = np.quantile(values, (0.025, 0.975))
    return f"{low:+.3f} to {high:+.3f}" if low < 0 else f"{low:.3f} to {high:.3f}"


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print it as Markdown."""
    wrong = np.array([not row["right"] for row in rows])
    print(f"{len(rows)} answers, {int(wrong.sum())} wrong")
    print("| t* | " + " | ".join(SCORES[:2]) + " | semgrad against the last user turn |\n|---|---|---|---|")
    draw = np.random.default_rng(0)
    draws = [
        at for at in (draw.integers(len(rows), size=len(rows)) for _ in range(2000)) if 0 < wrong[at].sum() < len(at)
    ]
    for place in rows[0]["scores"]:
        cells = []
        for name in SCORES[:2]:
            value = np.array([row["scores"][place][name] for row in rows])
            auroc = roc_auc_score(wrong, value)
            cells.append(f"{auroc:.3f} ({interval([roc_auc_score(wrong[at], value[at]) for at in draws])})")
        own, other = (np.array([row["scores"][each]["semgrad"] for row in rows]) for each in (place, REFERENCE))
        gains = [roc_auc_score(wrong[at], own[at]) - roc_auc_score(wrong[at], other[at]) for at in draws]
        gain = roc_auc_score(wrong, own) - roc_auc_score(wrong, other)
        cells.append("" if place == REFERENCE else f"{gain:+.3f} ({interval(gains)})")
        print(f"| {place} | " + " | ".join(cells) + " |")
    nll = np.array([row["scores"][REFERENCE]["sequence_nll"] for row in rows])
    print(f"\nsequence_nll, which needs no t*: {roc_auc_score(wrong, nll):.3f}")


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    console = Console(stderr=True)
    if options.model == "demo":
        model = WhiteBoxModel.demo()
    elif options.model.endswith(".gguf"):
        model = WhiteBoxModel.from_gguf(options.model)
    else:
        model = WhiteBoxModel.from_pretrained(options.model)
    rows = []
    asked = conversations()[: options.limit]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        done = progress.add_task("conversations", total=len(asked))
        for each in asked:
            generation = answered(model, each)
            row: dict[str, Any] = {"id": each.id, "text": generation.text, "right": right(generation.text, each.value)}
            row["scores"] = {
                place: dict(HybridGrad()(model, replace(generation, anchor=anchor, _trace=None)).scores)
                for place, anchor in places(model, each, generation).items()
            }
            rows.append(row)
            progress.advance(done)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report([row for row in rows if all(row["scores"].values())])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether the confidence of an argument tells a right one from a wrong or an invented one.

    python benchmarks/tool_calls.py [--model demo | FOLDER | FILE.gguf] [--choice required] [--limit N]

240 questions, each with one right call of one of twelve tools; four tools are offered. In two of five questions an
argument that the tool needs is nowhere said, so the model has to invent it. The call is decoded under the grammar; the
tool is named (``--choice required`` lets the model choose).
Every argument is scored twice: with what the grammar masked kept in the probabilities, and left out. AUROC of "wrong
or invented", with 95 % intervals from 2,000 bootstrap draws of questions.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from hallucination_guard import Generation, Tool, WhiteBoxModel
from hallucination_guard.scoring import score_arguments

CATALOGUE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EACH, INVENTED = 20, 8  # questions a tool, and how many of them leave an argument out


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question, the tools that are offered with it, and the right call; an argument that was not said is absent."""

    id: str
    text: str
    tools: tuple[Tool, ...]
    tool: str
    arguments: dict[str, Any]


def questions() -> list[Question]:
    """All of them, always the same ones."""
    draw = np.random.default_rng(20261124)
    tools = [
        Tool(
            name=each["name"],
            description=each["description"],
            parameters={
                "properties": {name: {"type": own["type"]} for name, own in each["arguments"].items()},
                "required": list(each["arguments"]),
                "additionalProperties": False,
            },
        )
        for each in CATALOGUE["tools"]
    ]
    made = []
    for number, tool in enumerate(CATALOGUE["tools"]):
        name, whole, lacking = tool["name"], tool["whole"], tool["lacking"]
        values = list(product(*(each["values"] for each in tool["arguments"].values())))
        picked = [values[at] for at in draw.permutation(len(values))[:EACH]]
        picked += [values[at] for at in draw.integers(len(values), size=EACH - len(picked))]
        for at, chosen in enumerate(picked):
            said: dict[str, Any] = dict(zip(tool["arguments"], chosen, strict=True))
            if at < INVENTED:
                missing = sorted(lacking)[at % len(lacking)]
                text = lacking[missing].format(**said)
                del said[missing]
            else:
                text = whole[at % len(whole)].format(**said)
            others = [tools[each] for each in draw.permutation(len(tools)) if each != number][:3]
            offered = [tools[number], *others]
            offered = [offered[each] for each in draw.permutation(4)]
            made.append(Question(id=f"{name}-{at}", text=text, tools=tuple(offered), tool=name, arguments=said))
    return made


def right(question: Question, tool: str, name: str, value: Any) -> bool:
    """Whether an argument was said and is as it was said; case, articles and punctuation do not matter."""
    if tool != question.tool or name not in question.arguments:
        return False
    said = question.arguments[name]
    if isinstance(said, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and float(value) == float(said)
    return _bare(str(value)) == _bare(str(said))


def _bare(text: str) -> str:
    return " ".join(word for word in re.findall(r"\w+", text.casefold()) if word not in ("the", "a", "an"))


def asked(model: WhiteBoxModel, question: Question) -> tuple[str, str | None]:
    """The prompt; for a model without a chat template with the tools and three examples in it."""
    if model.prompt("?").templated:
        return question.text, None
    listed = "\n".join(json.dumps(each.to_json_dict()["function"]) for each in question.tools)
    shots = "".join(
        f"Request: {each['request']}\nCall: <tool_call>\n{json.dumps(each['call'])}\n</tool_call>\n\n"
        for each in CATALOGUE["examples"]
    )
    head = f"Each request is answered by a call of a tool.\nTools:\n{listed}\n\n{shots}"
    return f"{head}Request: {question.text}\nCall: ", question.text


def rows_of(model: WhiteBoxModel, question: Question, generation: Generation) -> Iterator[dict[str, Any]]:
    """A row an argument; one without a name where there is no call."""
    common = {"id": question.id, "question": question.text, "answer": generation.text}
    if not generation.written_calls:
        yield {**common, "argument": None}
        return
    kept = score_arguments(model, generation, masked="kept")
    left = score_arguments(model, generation, masked="left_out")
    for one, other in zip(kept, left, strict=True):
        yield {
            **common,
            "tool": one.tool == question.tool,
            "argument": one.name,
            "value": one.value,
            "said": one.name in question.arguments,
            "right": right(question, one.tool, one.name, one.value),
            **{f"{name} (kept)": value for name, value in one.scores.items()},
            **{f"{name} (left out)": value for name, value in other.scores.items()},
        }


def auroc(rows: Sequence[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """AUROC of "not right", and a 95 % interval by drawing questions."""
    sign = -1.0 if name.startswith("min_token_logprob") else 1.0
    wrong = np.array([not row["right"] for row in rows])
    if not 0 < wrong.sum() < len(wrong):
        return (math.nan,) * 3
    value = sign * np.array([row[name] for row in rows])
    ids = [row["id"] for row in rows]
    groups = [np.flatnonzero([each == own for each in ids]) for own in dict.fromkeys(ids)]
    draw, found = np.random.default_rng(0), []
    for _ in range(2000):
        at = np.concatenate([groups[each] for each in draw.integers(len(groups), size=len(groups))])
        if 0 < wrong[at].sum() < len(at):
            found.append(roc_auc_score(wrong[at], value[at]))
    return float(roc_auc_score(wrong, value)), *np.quantile(found, (0.025, 0.975)).tolist()


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--choice", choices=("named", "required"), default="named", help="who names the tool")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    console = Console(stderr=True)
    if options.model == "demo":
        model = WhiteBoxModel.demo()
    elif options.model.endswith(".gguf"):
        model = WhiteBoxModel.from_gguf(options.model)
    else:
        model = WhiteBoxModel.from_pretrained(options.model)
    all_questions = questions()[: options.limit]
    rows = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        done = progress.add_task("questions", total=len(all_questions))
        for question in all_questions:
            text, named = asked(model, question)
            generation = model.generate(
                text,
                tools=question.tools,
                tool_choice=question.tool if options.choice == "named" else "required",
                max_new_tokens=96,
                question=named,
            )
            rows += rows_of(model, question, generation)
            progress.advance(done)
    if options.output is not None:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report(rows, len(all_questions))
    return 0


def report(rows: Sequence[dict[str, Any]], asked_of: int) -> None:
    """Print it as Markdown."""
    called = [row for row in rows if row["argument"] is not None]
    chosen = {row["id"] for row in called if row["tool"]}
    print(
        f"{asked_of} questions, {len({row['id'] for row in called})} with a whole call, {len(chosen)} of the right tool"
    )
    sets = {"all calls": called, "right tool": [row for row in called if row["tool"]]}
    sets["right tool, said"] = [row for row in sets["right tool"] if row["said"]]
    names = [name for name in (called[0] if called else ()) if name.endswith(")")]
    print(
        "| score | "
        + " | ".join(f"{name} (n = {len(own)}, {sum(not r['right'] for r in own)} wrong)" for name, own in sets.items())
        + " |"
    )
    print("|---|" + "---|" * len(sets))
    for name in names:
        cells = [auroc(own, name) for own in sets.values()]
        print(f"| {name} | " + " | ".join(f"{mid:.3f} ({low:.3f} to {high:.3f})" for mid, low, high in cells) + " |")


if __name__ == "__main__":
    sys.exit(main())

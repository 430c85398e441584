"""Whether the score of a sentence tells a right one from a wrong one, and what a back-off threshold leaves of answers.

    python benchmarks/long_answers.py draw   RUN.jsonl [--model demo | FOLDER | FILE.gguf] [--seconds 400]
    python benchmarks/long_answers.py report RUN.jsonl [--rows OUT.jsonl] [--judged 30]

The questions (``long_answers.yaml``) ask for several facts that rules can check, a sentence each; the models answer in
their own words after three examples of other facts. ``draw`` goes on where it was stopped. ``report`` judges every
sentence by rule and prints the AUROC of "wrong" of each score, with 95 % intervals from 2,000 bootstrap draws of
responses, and what thresholds certified on half of the responses keep of the other half. ``--rows`` writes what
``calibrate --for sentences`` reads.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml

from hallucination_guard import Generation, WhiteBoxModel
from hallucination_guard.evaluation.store import Store
from hallucination_guard.scoring import score_sentences
from hallucination_guard.values import Conditions

CATALOGUE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EACH, ITEMS, LENGTH, BATCH = 11, 5, 80, 8  # questions a relation, items a question, tokens an answer, answers a batch

Judged: TypeAlias = Literal["right", "wrong", "unchecked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question; of a relation its name, of a set its number."""

    id: str
    text: str
    relation: str = ""
    set: int = -1


def questions() -> list[Question]:
    """All of them, always the same ones, relations and sets mixed."""
    draw = np.random.default_rng(20261126)
    made = []
    for name, relation in CATALOGUE["relations"].items():
        items = list(relation["items"])
        for at in range(EACH):
            picked = [items[each] for each in draw.permutation(len(items))[:ITEMS]]
            made.append(
                Question(id=f"{name}-{at}", text=relation["ask"].format(items=", ".join(picked)), relation=name)
            )
    for at, each in enumerate(CATALOGUE["sets"]):
        text = f"Name {each['how many']} {each['name']}, one sentence for each."
        made.append(Question(id=f"set-{at}", text=text, set=at))
    return [made[each] for each in draw.permutation(len(made))]


def judge(question: Question, sentence: str) -> Judged:
    """Whether a sentence is right, by rule; ``unchecked`` where the rule cannot say what it claims."""
    text = " ".join(re.sub(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+", "", sentence).replace("**", "").split())
    if re.search(r"\b(?:not|no|never|isn't|or)\b|\?$", text, re.IGNORECASE):
        return "unchecked"
    return _of_set(CATALOGUE["sets"][question.set], text) if question.set >= 0 else _of_relation(question, text)


def _of_set(kind: Mapping[str, Any], text: str) -> Judged:
    members = {_bare(each) for each in str(kind["members"]).split("|")}
    found = re.match(r"(.+?)(?: (?:is|are|was|borders|has|begins|starts)\b.*)?[.!:]?$", text)
    if found is None or re.search(r",| and (?!Juliet|Cleopatra|Cressida)", found.group(1)):
        return "unchecked"
    said = _bare(
        re.sub(r"^(?:The (?:number|letter|planet|month|color|colour|state|country)|Lake) ", "", found.group(1))
    )
    if said in members or f"lake {said}" in members:
        return "right"
    # "It is …", "One of them is …": what it is about stands elsewhere.
    return "unchecked" if len(said.split()) > 3 or said in ("it", "they", "this", "one", "he", "she") else "wrong"


def _of_relation(question: Question, text: str) -> Judged:
    relation = CATALOGUE["relations"][question.relation]
    items, exact = relation["items"], relation.get("exact", False)
    named = {str(key) for key in items if _mentions(text, str(key))}
    named = {key for key in named if not any(key != other and _mentions(other, key) for other in named)}
    if len(named) != 1:
        return "unchecked"
    (key,) = named
    right = [each.strip() for each in str(items[key] if key in items else items[int(key)]).split("|")]
    for pattern in relation["claims"]:
        if found := re.search(pattern, text):
            said = found.group(1).strip(" .,;:\"'“”`()")
            if _mentions(said, key) and len(said) > len(key) + 12:
                continue  # not what the pattern was made for
            said = re.sub(r"^(?:the|an?) ", "", said, flags=re.IGNORECASE)
            ok = any(_begins(said, each, exact=exact) for each in right)
            return "right" if ok else "wrong"
    return "unchecked"


def _begins(said: str, right: str, *, exact: bool) -> bool:
    if exact:
        return re.match(rf"[\"'“(]?{re.escape(right)}(?!\w)", said) is not None
    return re.match(rf"{re.escape(_bare(right))}(?!\w)", _bare(said)) is not None


def _mentions(text: str, key: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_bare(key))}(?!\w)", _bare(text)) is not None


def _bare(text: str) -> str:
    """Without case, articles, quotation marks and the digits' commas; ``×`` is ``times``."""
    text = re.sub(r"\s*[×x*]\s*(?=\d)", " times ", text.casefold().replace(",", ""))
    return " ".join(word for word in re.findall(r"[\w.'-]+", text) if word not in ("the", "a", "an")).strip(" .'\"")


def prompt_of(model: WhiteBoxModel, question: Question) -> tuple[Any, str | None]:
    """The question after the examples: as turns, or as text for a model without a chat template."""
    shots = CATALOGUE["shots"]
    if model.prompt("?").templated:
        turns = [
            {"role": role, "content": each[part]}
            for each in shots
            for role, part in (("user", "ask"), ("assistant", "answer"))
        ]
        return [*turns, {"role": "user", "content": question.text}], None
    before = "".join(f"Question: {each['ask']}\nAnswer: {each['answer']}\n\n" for each in shots)
    return f"{before}Question: {question.text}\nAnswer:", question.text


def row_of(model: WhiteBoxModel, question: Question, generation: Generation) -> dict[str, Any]:
    """What is kept of an answer."""
    sentences = score_sentences(model, generation) if any(map(str.isalnum, generation.content)) else ()
    return {
        "id": question.id,
        "answer": generation.content,
        "ending": generation.finish_reason,
        "conditions": Conditions.of(generation).to_json_dict(),
        "sentences": [{"text": each.text, **each.to_json_dict()} for each in sentences],
    }


def loaded(name: str) -> WhiteBoxModel:
    """The model of that name."""
    return WhiteBoxModel.demo() if name == "demo" else WhiteBoxModel.from_pretrained(name)


def draw(options: argparse.Namespace) -> int:
    """Answer and score what is missing in the store, for so many seconds."""
    model, began = loaded(options.model), time.monotonic()
    identity = {
        "model": asdict(model.identity),
        "length": LENGTH,
        "shots": CATALOGUE["shots"],
        "questions": [each.text for each in questions()],
    }
    store = Store(options.run, identity)
    missing = [each for each in questions()[: options.limit] if each.id not in store.rows]
    for begin in range(0, len(missing), BATCH):
        if time.monotonic() - began > options.seconds:
            break
        part = missing[begin : begin + BATCH]
        prompts, named = zip(*(prompt_of(model, each) for each in part), strict=True)
        made = model.generate(
            list(prompts),
            max_new_tokens=LENGTH,
            stop=["\n\n", "Question:"],
            question=None if named[0] is None else named,
        )
        store.add([row_of(model, *each) for each in zip(part, made, strict=True)])
        print(f"{len(store.rows)} answers, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return 0 if len(store.rows) >= len(questions()[: options.limit]) else 3


def main() -> int:
    """Draw, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("draw", "report"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    return draw(options)


if __name__ == "__main__":
    sys.exit(main())

"""Whether the score of a sentence tells a right one from a wrong one, and what a back-off threshold leaves of answers.

    python benchmarks/long_answers.py draw   RUN.jsonl [--model demo | FOLDER | FILE.gguf] [--seconds 400]
    python benchmarks/long_answers.py report RUN.jsonl [--rows OUT.jsonl] [--judged 30]

The questions (``long_answers.yaml``) ask for several facts that rules can check, a sentence each; the models answer in
their own words after three examples of other facts. ``draw`` goes on where it was stopped. ``report`` judges every
sentence by rule and prints the AUROC of "wrong" of each score, with 95 % intervals from 2,000 bootstrap draws of
responses, that of learned scores out of fold beside what the text alone tells, and what thresholds certified on a part
of the responses keep of the rest. ``--rows`` writes what ``calibrate --for sentences`` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from hallucination_guard import Generation, WhiteBoxModel
from hallucination_guard.calibration import LabelledResponse, LabelledSentence, calibrate_sentences, write_responses
from hallucination_guard.calibration.backoff import Scored, limits, retention
from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.fusion import cross_fitted
from hallucination_guard.calibration.probe import fit_probe
from hallucination_guard.calibration.ranking import gain
from hallucination_guard.calibration.responses import CheckedSentence
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.evaluation.store import Store
from hallucination_guard.scoring import score_sentences
from hallucination_guard.scoring.sentences import sentence_scorer
from hallucination_guard.values import Conditions, ModelIdentity, States

CATALOGUE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EACH, ITEMS, LENGTH, BATCH = 11, 5, 80, 24  # questions a relation, items a question, tokens an answer, answers a batch
ALPHAS, ALLOWED = (0.1, 0.2, 0.3, 0.5), (0, 1, 2)
GRADIENTS = 48  # so many answers, the first ones in the mixed order, get SemGrad of their sentences

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
    text = _unmarked(sentence)
    if re.search(r"\b(?:not|no|never|isn't|or)\b|\?$", text, re.IGNORECASE):
        return "unchecked"
    if question.set >= 0:
        return _of_set(CATALOGUE["sets"][question.set], text)
    # The last example is about colours, and some answers go on with it.
    return "unchecked" if "colour" in text else _of_relation(question, text)


def _unmarked(sentence: str) -> str:
    """Without what makes it an item of a list, or bold."""
    return " ".join(re.sub(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+", "", sentence).replace("**", "").split())


def _of_set(kind: Mapping[str, Any], text: str) -> Judged:
    """Of "Mars is a planet.", or of a line of a list, whether Mars is one."""
    found = re.match(rf"(.+?) (?:is|are|was|borders?)\b.*(?:{kind['noun']})", text, re.IGNORECASE)
    found = found or re.match(r"((?:[\w.']+ ?){1,3})[.:]?$", text)
    if found is None or re.search(r",| and (?!Juliet|Cleopatra|Cressida)", found.group(1)):
        return "unchecked"
    kinds = "number|letter|planet|month|color|colour|state|country|sign|element|string"
    said = _bare(re.sub(rf"^(?:The )?(?:(?:{kinds}) |(?=Lake ))", "", found.group(1), flags=re.IGNORECASE))
    members = {_bare(each) for each in str(kind["members"]).split("|")}
    if said in members:
        return "right"
    # "It is …", "One of them is …", "The number of … is 6": what it is about stands elsewhere, or is something else.
    vague = len(said.split()) > 3 or re.search(rf"\b(?:it|they|this|these|one|there|of)\b|{kind['noun']}", said, re.I)
    return "unchecked" if vague else "wrong"


def item_of(question: Question, text: str) -> str:
    """The one item of a relation that a sentence is about; empty where there is none, or several."""
    items = CATALOGUE["relations"][question.relation]["items"] if question.relation else ()
    named = {str(key) for key in items if _mentions(text, str(key))}
    named = {key for key in named if not any(key != other and _mentions(other, key) for other in named)}
    if len(named) > 1:  # "The opposite of wide is fast": it is about the one before the verb
        named = {key for key in named if re.search(rf"(?:of|for|in) {re.escape(_bare(key))} (?:is|was)\b", _bare(text))}
    return named.pop() if len(named) == 1 else ""


def _of_relation(question: Question, text: str) -> Judged:
    relation = CATALOGUE["relations"][question.relation]
    items, exact = relation["items"], relation.get("exact", False)
    key = item_of(question, text)
    if not key:
        return "unchecked"
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


def row_of(model: WhiteBoxModel, question: Question, generation: Generation, *, gradient: bool) -> dict[str, Any]:
    """What is kept of an answer."""
    some = any(map(str.isalnum, generation.content))
    sentences = score_sentences(model, generation, gradient=gradient, states=True) if some else ()
    generation.release()
    return {
        "id": question.id,
        "answer": generation.content,
        "ending": generation.finish_reason,
        "conditions": Conditions.of(generation).to_json_dict(),
        "sentences": [
            {"text": each.text, **each.to_json_dict(), "states": each.states and each.states.to_json_dict()}
            for each in sentences
        ],
    }


def loaded(name: str) -> WhiteBoxModel:
    """The model of that name."""
    if name == "demo":
        return WhiteBoxModel.demo()
    return WhiteBoxModel.from_gguf(name) if name.endswith(".gguf") else WhiteBoxModel.from_pretrained(name)


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
        for each, generation in zip(part, made, strict=True):
            with_gradient = sum("semgrad" in str(row["sentences"]) for row in store.rows.values())
            store.add([row_of(model, each, generation, gradient=with_gradient < options.gradients)])
        print(f"{len(store.rows)} answers, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return 0 if len(store.rows) >= len(questions()[: options.limit]) else 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """The sentences of a run that could be judged: of each its response, relation, item, label, text and scores."""

    response: np.ndarray
    kind: np.ndarray
    item: np.ndarray
    wrong: np.ndarray
    texts: Sequence[str]
    scores: Mapping[str, np.ndarray]


def rows_of_run(path: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """The binding of a run, and its answers with every sentence judged."""
    header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = {each.id: each for each in questions()}
    for row in rows:
        for each in row["sentences"]:
            each["judged"] = judge(asked[row["id"]], each["text"])
    return header, [row for row in rows if row["sentences"]]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Beside the scores three that know nothing of the model: number, length, chance."""
    every = [(at, number, each) for at, row in enumerate(rows) for number, each in enumerate(row["sentences"])]
    every = [each for each in every if each[2]["judged"] != "unchecked"]
    names = [name for name in every[0][2]["scores"] if name != "min_token_logprob"]
    scores = {name: np.array([each["scores"].get(name, math.nan) for *_, each in every]) for name in names}
    scores["highest token NLL"] = -np.array([each["scores"]["min_token_logprob"] for *_, each in every])
    scores["number of the sentence"] = np.array([float(number) for _, number, _ in every])
    scores["tokens"] = np.array([float(each["stop"] - each["start"]) for *_, each in every])
    scores["chance"] = np.random.default_rng(0).random(len(every))
    asked = {each.id: each for each in questions()}
    kinds = [asked[rows[at]["id"]] for at, *_ in every]
    return Table(
        response=np.array([at for at, *_ in every]),
        kind=np.array([each.relation or f"set {each.set}" for each in kinds]),
        item=np.array(
            [
                f"{asked.relation} {asked.set} {item_of(asked, _unmarked(each['text'])) or each['text']}"
                for asked, (*_, each) in zip(kinds, every, strict=True)
            ]
        ),
        wrong=np.array([each["judged"] == "wrong" for *_, each in every]),
        texts=[each["text"] for *_, each in every],
        scores=scores,
    )


def learned(table: Table, checked: Sequence[CheckedSentence]) -> dict[str, np.ndarray]:
    """What is learned from labels, of each sentence by what was learned from others.

    Others are those of other questions; of other items, since some are asked for several times; or of other relations,
    kinds of fact that nothing learned from has. Beside the fused score and its probe stands what the text alone shows:
    a relation is easy or hard as a whole, and its name tells which.
    """
    found = {}
    ids = [each.id for each in checked]
    for named, groups in (
        ("", ids),
        (", items never labelled", table.item.tolist()),
        (", relations never labelled", table.kind.tolist()),
    ):
        if len(set(groups)) < 5:
            continue  # fewer than folds
        own = [replace(each, id=group) for each, group in zip(checked, groups, strict=True)]
        found[f"fused{named}"] = np.array(cross_fitted(own, fit=fit_fused))
        states = [each.states for each in own if each.states is not None]
        found[f"probe{named}"] = fit_probe(states, table.wrong.tolist(), groups)[1]
        found[f"text alone{named}"] = by_text(table, groups)
    return found


def by_text(table: Table, groups: Sequence[str]) -> np.ndarray:
    """Logits out of fold of the sentence's letters and length."""
    parts, found = fold_of(groups, 5), np.zeros(len(groups))
    length = np.log(table.scores["tokens"])[:, None]
    for part in range(5):
        inside, rest = parts == part, parts != part
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2)
        letters.fit([text for text, take in zip(table.texts, rest, strict=True) if take])
        x = np.column_stack([letters.transform(table.texts).toarray(), length])
        fitted = LogisticRegression(C=1.0, max_iter=2000).fit(x[rest], table.wrong[rest])
        found[inside] = fitted.decision_function(x[inside])
    return found


def aurocs(table: Table, draws: int = 2000) -> dict[str, tuple[float, float, float]]:
    """AUROC of "wrong" among the checked sentences that have the score, and 95 % intervals by drawing responses."""
    groups = [np.flatnonzero(table.response == at) for at in range(table.response.max() + 1)]
    rng = np.random.default_rng(0)
    drawn = [
        np.concatenate([groups[each] for each in rng.integers(len(groups), size=len(groups))]) for _ in range(draws)
    ]
    found = {}
    for name, score in table.scores.items():
        samples = [_auroc(table.wrong[at], score[at]) for at in drawn]
        low, high = np.nanquantile(samples, (0.025, 0.975))
        found[name] = (_auroc(table.wrong, score), float(low), float(high))
    return found


def within(table: Table, score: np.ndarray) -> float:
    """AUROC among sentences of the same relation: over all pairs of a wrong and a right one of one relation."""
    same = table.kind[table.wrong][:, None] == table.kind[~table.wrong]
    wrong, right = score[table.wrong][:, None], score[~table.wrong]
    same &= ~np.isnan(wrong) & ~np.isnan(right)
    return float(((wrong > right) + 0.5 * (wrong == right))[same].mean()) if same.any() else math.nan


def _auroc(wrong: np.ndarray, score: np.ndarray) -> float:
    has = ~np.isnan(score)
    wrong, score = wrong[has], score[has]
    n = int(wrong.sum())
    if not 0 < n < len(wrong):
        return math.nan
    return float((rankdata(score)[wrong].sum() - n * (n + 1) / 2) / (n * (len(wrong) - n)))


@dataclass(frozen=True, slots=True)
class Left:
    """What thresholds calibrated on a part leave of the rest, mean over many splits; see ``Retention``.

    Args:
        sentences: share kept.
        right: share of the right ones kept.
        wrong: share of wrong ones among the kept that were checked.
        empty: share of responses of which nothing is kept.
        failing: share of responses that keep more than k wrong ones.
    """

    sentences: float
    right: float
    wrong: float
    empty: float
    failing: float


def backed_off(
    responses: Sequence[LabelledResponse],
    name: str,
    *,
    alphas: Sequence[float] = ALPHAS,
    allowed: Sequence[int] = ALLOWED,
    part: float = 0.5,
    times: int = 100,
) -> dict[tuple[str, int, float], Left]:
    """Calibrate on a part of the responses, apply to the rest; by guarantee, k and α, without what is infeasible."""
    rng, found = np.random.default_rng(1), defaultdict(list)
    for _ in range(times):
        order = rng.permutation(len(responses)).tolist()
        cut = round(part * len(order))
        fitted = calibrate_sentences([responses[at] for at in order[:cut]], score=name, alphas=alphas, at_most=allowed)
        others = [
            [(fitted.value(own.scores, own.states), own.correct) for own in responses[at].sentences]
            for at in order[cut:]
        ]
        for each in fitted.thresholds:
            found[each.guarantee, each.at_most, each.alpha].append(_left(others, each.threshold, each.at_most))
    return {key: Left(*np.nanmean(np.array(rows), axis=0).tolist()) for key, rows in found.items()}


def _left(others: Sequence[Scored], threshold: float, k: int) -> tuple[float, float, float, float, float]:
    """The fields of ``Left``, of one split."""
    kept = retention(others, threshold)
    sure = [correct for each in others for score, correct in each if score <= threshold and correct is not None]
    failing = np.mean([limit <= threshold for limit in limits(others, at_most=k)])
    return kept.sentences, kept.right, sure.count(False) / len(sure) if sure else math.nan, kept.empty, float(failing)


def with_chance(responses: Sequence[LabelledResponse]) -> list[LabelledResponse]:
    """The same with a score that is drawn at random."""
    rng = np.random.default_rng(0)
    return [
        replace(
            each,
            sentences=tuple(replace(own, scores={**own.scores, "chance": rng.random()}) for own in each.sentences),
        )
        for each in responses
    ]


def report(options: argparse.Namespace) -> int:
    """Print it as Markdown; write the rows, and some judged sentences to be looked at."""
    header, rows = rows_of_run(options.run)
    responses = [labelled(header, row) for row in rows]
    if options.rows is not None:
        write_responses(options.rows, responses)
    table = table_of(rows)
    table = replace(
        table, scores={**table.scores, **learned(table, [own for each in responses for own in each.checked])}
    )
    judged = Counter(each["judged"] for row in rows for each in row["sentences"])
    sentences = judged.total()
    failing = [int((table.wrong & (table.response == at)).sum()) for at in range(len(rows))]
    print(f"{header['model']['name']}: {len(rows)} responses, {sentences} sentences: {dict(judged)}; of the checked")
    print(
        f"{table.wrong.mean():.1%} wrong; responses with more than 0, 1, 2 wrong: "
        + ", ".join(f"{np.mean([each > k for each in failing]):.0%}" for k in (0, 1, 2))
    )
    print("\n| score | AUROC of wrong (95 %) | within a relation | fused less this |\n|---|---|---|---|")
    fused, ids = table.scores["fused"], [str(each) for each in table.response]
    for name, (value, low, high) in sorted(aurocs(table).items(), key=lambda each: -each[1][0]):
        score = table.scores[name]
        less = "" if np.isnan(score).any() else str(gain(fused, score, table.wrong, ids, level=0.95))
        print(f"| {name} | {value:.3f} ({low:.3f} to {high:.3f}) | {within(table, score):.3f} | {less} |")
    drawn = with_chance(responses)
    left = {name: backed_off(drawn, name, part=options.part, times=options.times) for name in options.scores}
    for guarantee in ("certified", "average"):
        used = round(options.part * len(rows))
        print(f"\n{guarantee}; calibrated on {used} responses, kept of the others (mean of {options.times} splits)")
        print(
            "| score | k | α | sentences kept | right kept | wrong among kept | empty | failing |\n" + "|---" * 8 + "|"
        )
        for name, k, alpha in product(options.scores, ALLOWED, ALPHAS):
            row = left[name].get((guarantee, k, alpha))
            cells = (
                "INFEASIBLE | | | |"
                if row is None
                else f"{row.sentences:.3f} | {row.right:.3f} | {row.wrong:.3f} | {row.empty:.3f} | {row.failing:.3f}"
            )
            print(f"| {name} | {k} | {alpha:g} | {cells} |")
    every = [(row["id"], each["judged"], each["text"]) for row in rows for each in row["sentences"]]
    for at in np.random.default_rng(options.seed).permutation(len(every))[: options.judged]:
        print(f"{every[at][1]:<10}{every[at][0]:<14}{every[at][2].strip()!r}")
    return 0


def labelled(header: Mapping[str, Any], row: Mapping[str, Any]) -> LabelledResponse:
    """A response as ``calibrate --for sentences`` reads it."""
    correct = {"right": True, "wrong": False, "unchecked": None}
    return LabelledResponse(
        id=row["id"],
        judge="long_answers rules",
        sentences=tuple(
            LabelledSentence(
                scores={name: value for name, value in each["scores"].items() if not name.startswith("semgrad")},
                correct=correct[each["judged"]],
                states=States.from_json_dict(each["states"]),
            )
            for each in row["sentences"]
        ),
        model=ModelIdentity(**header["model"]),
        scorer=sentence_scorer(gradient=False, states=True),
        conditions=Conditions.from_json_dict(row["conditions"]),
    )


def main() -> int:
    """Draw, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("draw", "report"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gradients", type=int, default=GRADIENTS, help="answers that get SemGrad of their sentences")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--scores", nargs="+", default=["fused", "sequence_nll", "mean_nll", "chance"])
    parser.add_argument("--part", type=float, default=0.5, help="share of the responses that calibrates")
    parser.add_argument("--times", type=int, default=100, help="so many splits")
    parser.add_argument("--judged", type=int, default=0, help="so many judged sentences are printed")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these")
    options = parser.parse_args()
    return draw(options) if options.step == "draw" else report(options)


if __name__ == "__main__":
    sys.exit(main())

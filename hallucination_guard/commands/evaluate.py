"""``evaluate``: ask a file of questions, score the answers, judge them, and report which score finds the wrong ones."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.commands.console import load, positive, progress, say, show, show_json
from hallucination_guard.errors import ConfigurationError, InputError, MissingExtra

if TYPE_CHECKING:
    from hallucination_guard.evaluation.data import Item, Prompting
    from hallucination_guard.evaluation.embedding import Embed
    from hallucination_guard.evaluation.judges import Judge
    from hallucination_guard.evaluation.report import Report
    from hallucination_guard.evaluation.store import Store

__all__ = ["add"]

_OK, _FAILURE = 0, 1
_JUDGES = ("contains", "rouge", "embedding", "llm")


def add(commands: Any, *, common: argparse.ArgumentParser, model: argparse.ArgumentParser) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=[common, model],
        help="which score finds the wrong answers?",
        description="Ask a file of questions, score and judge the answers, and write a report. Everything paid for is "
        "kept in the output folder, so the same command continues an interrupted run, and another judge, --limit or "
        "added score answers no question twice.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help="a JSON object a line: query and answers (the references), or query, response and label",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of report and answers")
    parser.add_argument("--judge", choices=_JUDGES, help="who says what is right (default: contains)")
    parser.add_argument("--threshold", type=float, help="of the judges rouge (default: 0.3) and embedding (0.8)")
    parser.add_argument(
        "--judge-model", metavar="PROVIDER:NAME", help="of the judge llm, as LangChain's init_chat_model takes it"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")
    parser.add_argument("--scores", default="", metavar="A,B,…", help="only these in the report (default: all)")
    parser.add_argument("--reference", metavar="SCORE", help="compare with this one (default: the best single score)")
    parser.add_argument(
        "--samples",
        type=positive,
        nargs="?",
        const=5,
        metavar="K",
        help="also draw K answers each (5), and their scores",
    )
    parser.add_argument("--p-true", action="store_true", help="also ask the model whether its answer is true")
    parser.add_argument(
        "--sentence-model",
        metavar="FOLDER_OR_HUB_ID",
        help="for the judge embedding and for scores of samples; without it these take the model's own states",
    )
    parser.add_argument("--prompt", metavar="TEMPLATE", help="with {query}")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="N", help="model without a chat template: the first N rows as examples"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--resamples", type=positive, default=2000, help="of the bootstrap (default: %(default)s)")
    parser.set_defaults(run=_evaluate)


@dataclass(slots=True)
class _Work:
    """What one run has at hand and what it has found."""

    arguments: argparse.Namespace
    model: Any
    items: Sequence[Item]
    prompting: Prompting
    binding: Mapping[str, Any]
    embed: Embed
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def store(self, name: str, **more: Any) -> Store:
        from hallucination_guard.evaluation.store import Store

        return Store(self.arguments.output / f"{name}.jsonl", {**self.binding, **more})


def _evaluate(arguments: argparse.Namespace) -> int:
    from hallucination_guard.evaluation.answers import answer, judge, labelled
    from hallucination_guard.evaluation.columns import columns
    from hallucination_guard.evaluation.data import given_judge, read_items
    from hallucination_guard.evaluation.report import make_report, write_report
    from hallucination_guard.labelled import write_labelled
    from hallucination_guard.scoring import HybridGrad

    items = read_items(arguments.data)
    given = given_judge(items)
    _check(arguments, items, given)
    _folder(arguments.output)
    work = _work(arguments, items)
    by = None if given is not None else _judge(arguments, work.embed)
    answers, scorer = work.store("generations"), HybridGrad()
    with progress("answering and scoring", len(work.items)) as done:
        answer(
            work.model,
            work.items,
            work.prompting,
            answers,
            scorer=scorer,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            done=done,
        )
    good = [item for item in work.items if not answers.rows[item.id]["problem"]]
    for part in ("generate", "score"):
        work.costs[part] = sum(answers.rows[item.id]["seconds"][part] for item in good)
    if by is None:
        labels = {item.id: bool(item.correct) for item in work.items}
        undecided: list[str] = []
    else:
        verdicts = work.store(f"labels-{_slug(by.name)}", judge=by.name)
        with progress("judging", len(work.items)) as done:
            judge(work.items, answers, verdicts, by, done=done)
        found = {item.id: verdicts.rows[item.id] for item in good}
        labels = {key: row["correct"] for key, row in found.items() if row["correct"] is not None}
        undecided = [row["problem"] for row in found.values() if row["correct"] is None]
    name = str(given if by is None else by.name)
    rows = labelled(work.items, answers, labels, by=name, model=work.model.identity, scorer=scorer.identity)
    write_labelled(arguments.output / "answers.jsonl", rows)
    _problems(work, answers, undecided, name)
    scored = [item for item in good if item.id in labels and answers.rows[item.id]["status"] == "scored"]
    if arguments.p_true:
        _p_true(work, scored, answers)
    if arguments.samples:
        _samples(work, scored)
    wanted = [each.strip() for each in arguments.scores.split(",") if each.strip()]
    table = columns(rows, extra=work.extra, only=wanted)
    counts = {
        "labelled": len(rows),
        "right": sum(each.correct for each in rows),
        "unscorable": sum(each.status == "unscorable" for each in rows),
        "undecided by the judge": len(undecided),
        "failed": len(work.items) - len(good),
    }
    report = make_report(
        table,
        about=_about(work, name),
        counts=counts,
        costs=work.costs,
        seconds=work.seconds,
        reference=arguments.reference,
        resamples=arguments.resamples,
        notes=work.notes,
    )
    written = write_report(arguments.output, report)
    if arguments.json:
        show_json(report.to_json_dict())
    else:
        _summary(report)
        show(f"report: {written[0]}")
    return _FAILURE if counts["failed"] or undecided else _OK


def _check(arguments: argparse.Namespace, items: Sequence[Item], given: str | None) -> None:
    """What can be said before a model is loaded."""
    if given is not None and arguments.judge is not None:
        raise InputError(
            f"{str(arguments.data)!r} has labels, so {arguments.judge!r} has nothing to judge",
            hint="leave --judge out, or take the labels out of the file",
        )
    if not 0 <= arguments.shots < len(items):
        raise InputError(f"{arguments.shots} of {len(items)} rows can not be examples", hint="give a smaller --shots")
    if arguments.judge == "embedding" and arguments.sentence_model is None:
        raise ConfigurationError(
            "the judge embedding needs a sentence-embedding model: a model's own states are no judge of its answers",
            hint="give --sentence-model",
        )
    if arguments.judge == "llm" and arguments.judge_model is None:
        raise ConfigurationError("the judge llm needs a chat model", hint="give --judge-model, as provider:name")
    if arguments.judge != "llm" and arguments.judge_model is not None:
        raise ConfigurationError("--judge-model goes with --judge llm", hint="give both or neither")
    if arguments.threshold is not None and arguments.judge not in ("rouge", "embedding"):
        raise ConfigurationError("--threshold is of the judges rouge and embedding", hint="leave it out")
    if arguments.samples == 1:
        raise ConfigurationError("one sample can not differ from itself", hint="give --samples 2 or more")
    if arguments.resamples < 1000:
        raise ConfigurationError(f"{arguments.resamples} resamples make poor intervals", hint="give 1000 or more")


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} can not be a folder: {error.strerror}", hint="give another --output") from None


def _work(arguments: argparse.Namespace, items: Sequence[Item]) -> _Work:
    from hallucination_guard.evaluation.data import Prompting, data_hash
    from hallucination_guard.evaluation.embedding import OwnStates, SentenceModel
    from hallucination_guard.scoring import HybridGrad

    model = load(arguments)
    prompting = Prompting.of(model, template=arguments.prompt, examples=items[: arguments.shots])
    rest = items[arguments.shots :]
    scorer = HybridGrad().identity
    binding = {
        "data": data_hash(arguments.data),
        "model": [model.identity.fingerprint, model.identity.template],
        "prompt": prompting.template,
        "shots": arguments.shots,
        "max_new_tokens": arguments.max_new_tokens,
        "scorer": [scorer.name, scorer.version, dict(scorer.settings)],
    }
    named = arguments.sentence_model
    embed: Embed = OwnStates(model) if named is None else SentenceModel.from_pretrained(named)
    return _Work(arguments, model, rest[: arguments.limit], prompting, binding, embed)


def _judge(arguments: argparse.Namespace, embed: Embed) -> Judge:
    from hallucination_guard.evaluation.judges import Contains, Embedding, Rouge, llm_judge

    threshold = {} if arguments.threshold is None else {"threshold": arguments.threshold}
    if arguments.judge == "rouge":
        return Rouge(**threshold)
    if arguments.judge == "embedding":
        return Embedding(embed=embed, **threshold)
    if arguments.judge == "llm":
        return llm_judge(_chat(arguments.judge_model), name=f"llm({arguments.judge_model})")
    return Contains()


def _chat(name: str) -> Any:
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        raise MissingExtra("the judge llm needs langchain", hint="pip install langchain") from None
    try:
        return init_chat_model(name, temperature=0)
    except ImportError as error:
        raise MissingExtra(f"{name!r} needs another package: {error}", hint="install it") from None
    except ValueError as error:
        raise ConfigurationError(f"{name!r} names no chat model: {error}", hint="give provider:name") from None


def _problems(work: _Work, answers: Store, undecided: Sequence[str], judge: str) -> None:
    failed = [row["problem"] for item in work.items if (row := answers.rows[item.id])["problem"]]
    if failed:
        work.notes.append(f"{len(failed)} questions could not be answered or scored; the first: {failed[0]}")
    if undecided:
        work.notes.append(f"{judge} left {len(undecided)} answers without a label; the first: {undecided[0]}")
    for note in work.notes:
        say(note)


def _p_true(work: _Work, items: Sequence[Item], answers: Store) -> None:
    from hallucination_guard.evaluation.answers import P_TRUE, p_true

    store = work.store("p_true", p_true=P_TRUE)
    with progress("asking whether it is true", len(items)) as done:
        for at, item in enumerate(items, start=1):
            if item.id not in store.rows:
                began = time.perf_counter()
                value = p_true(work.model, item.query, answers.rows[item.id]["response"])
                store.add([{"id": item.id, "p_true": value, "seconds": time.perf_counter() - began}])
            done(at)
    spent = sum(store.rows[item.id]["seconds"] for item in items)
    work.extra["1-p_true"] = {item.id: 1.0 - store.rows[item.id]["p_true"] for item in items}
    work.costs["P(True)"], work.seconds["1-p_true"] = spent, spent / len(items) if items else 0.0
    work.notes.append(f"1-p_true: the model was asked {P_TRUE!r}; P(True) = P(A) / (P(A) + P(B)).")


def _samples(work: _Work, items: Sequence[Item]) -> None:
    from hallucination_guard.evaluation.sampling import SAMPLED, Sample, draw, score_samples

    k = work.arguments.samples
    settings = {"k": k, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    store = work.store("samples", samples=settings)
    with progress(f"drawing {k} answers each", len(items)) as done:
        draw(
            work.model,
            items,
            work.prompting,
            store,
            **settings,
            max_new_tokens=work.arguments.max_new_tokens,
            batch_size=work.arguments.batch_size,
            done=done,
        )
    own = work.arguments.sentence_model is None
    by_meaning = None if own else 0.9
    scores = work.store("sampled", samples=settings, embedding=work.embed.name, by_meaning=by_meaning)
    with progress("comparing them", len(items)) as done:
        for at, item in enumerate(items, start=1):
            if item.id not in scores.rows:
                row = store.rows[item.id]
                samples = [
                    Sample(text=each["text"], without=tuple(each["without"]), logprobs=tuple(each["logprobs"]))
                    for each in row["samples"]
                ]
                found, seconds = score_samples(item.query, samples, embed=work.embed, by_meaning=by_meaning)
                if row["eigenscore"] is not None:
                    found["eigenscore"], seconds["eigenscore"] = row["eigenscore"], 0.0
                scores.add([{"id": item.id, "scores": found, "seconds": seconds}])
            done(at)
    drawing = sum(store.rows[item.id]["seconds"] for item in items)
    work.costs[f"drawing and reading {k} answers each"] = drawing
    work.costs["comparing them"] = sum(sum(scores.rows[item.id]["seconds"].values()) for item in items)
    for name in SAMPLED:
        having = {item.id: scores.rows[item.id] for item in items if name in scores.rows[item.id]["scores"]}
        work.extra[name] = {key: row["scores"][name] for key, row in having.items()}
        spent = sum(row["seconds"][name] for row in having.values()) + drawing
        work.seconds[name] = spent / max(1, len(items))
    meaning = "the same words after normalising" if own else f"or similarity ≥ {by_meaning} by {work.embed.name}"
    work.notes.append(
        f"Scores of samples: {k} answers at temperature 1, seed 0; likelihoods at temperature 1. Clusters of "
        f"semantic_entropy: {meaning}. Similarities of sar: {work.embed.name}"
        f"{', since no sentence model was given: a makeshift' if own else ''}. eigenscore: the model's own middle "
        "layer. The seconds of each hold the drawing, which they share."
    )


def _about(work: _Work, judge: str) -> dict[str, Any]:
    identity = work.model.identity
    about = {
        "model": identity.name,
        "fingerprint": identity.fingerprint,
        "dtype": identity.dtype,
        "data": f"{work.arguments.data.name} (sha256 {work.binding['data']})",
        "judge": judge,
        "prompt": work.prompting.template,
        "max_new_tokens": work.arguments.max_new_tokens,
        "answers": "given with the questions" if work.items[0].response is not None else "greedy",
    }
    if work.prompting.examples:
        about["examples"] = f"the first {len(work.prompting.examples)} rows, which are not evaluated"
    return about


def _summary(report: Report) -> None:
    values = report.compared.scores
    width = max(map(len, values))
    show(f"{'score':{width}}  AUROC                 AURC   PRR    seconds")
    for name in report.ranking:
        found = values[name]
        auroc = found["auroc"]
        interval = "" if auroc.low is None or auroc.high is None else f"[{auroc.low:.3f}, {auroc.high:.3f}]"
        cells = [
            "undef." if each.value is None else f"{each.value:.3f}" for each in (auroc, found["aurc"], found["prr"])
        ]
        show(f"{name:{width}}  {cells[0]:6} {interval:14} {cells[1]:6} {cells[2]:6} {report.seconds[name]:.3f}")
    right = len(report.columns.answers) - sum(report.columns.wrong)
    show(f"{len(report.columns.answers)} answers, {right} right; judge {report.about['judge']}")


def _slug(name: str) -> str:
    import hashlib
    import re

    plain = re.sub(r"[^a-z0-9.]+", "-", name.casefold()).strip("-")[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

"""``evaluate``: ask a file of questions, score the answers, judge them, and report which score finds the wrong ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import typer

from hallucination_guard.cli.console import load, progress, say, show, show_json
from hallucination_guard.cli.options import (
    Command,
    DeviceMap,
    Dtype,
    Json,
    MaxNewTokens,
    ModelChoice,
    ModelName,
    ProfilePath,
)
from hallucination_guard.errors import ConfigurationError, InputError, MissingExtra

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from hallucination_guard.calibration import Labelled
    from hallucination_guard.evaluation.columns import Columns
    from hallucination_guard.evaluation.data import Item, Prompting
    from hallucination_guard.evaluation.embedding import Embed
    from hallucination_guard.evaluation.judges import Judge
    from hallucination_guard.evaluation.report import Report
    from hallucination_guard.evaluation.store import Store
    from hallucination_guard.model import WhiteBoxModel

__all__ = ["evaluate", "register"]

_OK, _FAILURE = 0, 1
_SAMPLES = 5
JudgeName: TypeAlias = Literal["contains", "rouge", "embedding", "llm"]


class _Evaluate(Command):
    without_value: ClassVar[dict[str, str]] = {"--samples": str(_SAMPLES)}


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=_Evaluate)(evaluate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    data: Path
    output: Path
    judge: JudgeName | None
    threshold: float | None
    judge_model: str | None
    limit: int | None
    scores: str
    reference: str | None
    samples: int | None
    p_true: bool
    sentence_model: str | None
    prompt: str | None
    shots: int
    max_new_tokens: int
    batch_size: int
    resamples: int
    choice: ModelChoice
    json: bool


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE.jsonl",
            help="A JSON object a line: query and answers (the references), or query, response and label.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder of report and answers.")],
    judge: Annotated[
        JudgeName | None, typer.Option("--judge", help="Who says what is right (default: contains).")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Of the judges rouge (default: 0.3) and embedding (0.8)."),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            "--judge-model",
            metavar="PROVIDER:NAME",
            help="Of the judge llm, as LangChain's init_chat_model takes it.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="The first N questions only.")
    ] = None,
    scores: Annotated[
        str, typer.Option("--scores", metavar="A,B,…", help="Only these in the report (default: all).")
    ] = "",
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="SCORE", help="Compare with this one (default: the best single score)."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, metavar="K", help="Also draw K answers each (5), and their scores."),
    ] = None,
    p_true: Annotated[bool, typer.Option("--p-true", help="Also ask the model whether its answer is true.")] = False,
    sentence_model: Annotated[
        str | None,
        typer.Option(
            "--sentence-model",
            metavar="FOLDER_OR_HUB_ID",
            help="For the judge embedding and for scores of samples; without it these take the model's own states.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEMPLATE", help="With {query}.")] = None,
    shots: Annotated[
        int,
        typer.Option("--shots", metavar="N", help="Model without a chat template: the first N rows as examples."),
    ] = 0,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at once, at most.")] = 8,
    resamples: Annotated[int, typer.Option("--resamples", min=1, help="Of the bootstrap.")] = 2000,
    model: ModelName = "demo",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    profile: ProfilePath = None,
    as_json: Json = False,
) -> int:
    """Measure which score finds the wrong answers.

    Ask a file of questions, score and judge the answers, and write a report. Everything paid for is kept in the output
    folder, so the same command continues an interrupted run, and another judge, --limit or added score answers no
    question twice.
    """
    return _evaluated(
        _Options(
            data=data,
            output=output,
            judge=judge,
            threshold=threshold,
            judge_model=judge_model,
            limit=limit,
            scores=scores,
            reference=reference,
            samples=samples,
            p_true=p_true,
            sentence_model=sentence_model,
            prompt=prompt,
            shots=shots,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            resamples=resamples,
            choice=ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile),
            json=as_json,
        )
    )


@dataclass(slots=True)
class _Work:
    """What one run has at hand and what it has found."""

    options: _Options
    model: WhiteBoxModel
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

        return Store(self.options.output / f"{name}.jsonl", {**self.binding, **more})


def _evaluated(options: _Options) -> int:
    from hallucination_guard.calibration import write_labelled
    from hallucination_guard.evaluation.answers import labelled
    from hallucination_guard.evaluation.columns import columns
    from hallucination_guard.evaluation.data import given_judge, read_items
    from hallucination_guard.scoring import HybridGrad

    items = read_items(options.data)
    given = given_judge(items)
    _check(options, items, given)
    _folder(options.output)
    work = _work(options, items)
    by = None if given is not None else _judge(options, work.embed)
    answers = _answered(work)
    good = [item for item in work.items if not answers.rows[item.id]["problem"]]
    for part in ("generate", "score"):
        work.costs[part] = sum(answers.rows[item.id]["seconds"][part] for item in good)
    labels, undecided = _labelled(work, answers, good, by)
    name = str(given if by is None else by.name)
    rows = labelled(work.items, answers, labels, by=name, model=work.model.identity, scorer=HybridGrad().identity)
    write_labelled(options.output / "answers.jsonl", rows)
    _problems(work, answers, undecided, name)
    scored = [item for item in good if item.id in labels and answers.rows[item.id]["status"] == "scored"]
    if options.p_true:
        _p_true(work, scored, answers)
    if options.samples:
        _samples(work, scored)
    wanted = [each.strip() for each in options.scores.split(",") if each.strip()]
    table = columns(rows, extra=work.extra, only=wanted)
    failed = len(work.items) - len(good)
    _report(work, table, rows, name, undecided=len(undecided), failed=failed)
    return _FAILURE if failed or undecided else _OK


def _answered(work: _Work) -> Store:
    from hallucination_guard.evaluation.answers import answer
    from hallucination_guard.scoring import HybridGrad

    answers = work.store("generations")
    with progress("answering and scoring", len(work.items)) as done:
        answer(
            work.model,
            work.items,
            work.prompting,
            answers,
            scorer=HybridGrad(),
            max_new_tokens=work.options.max_new_tokens,
            batch_size=work.options.batch_size,
            done=done,
        )
    return answers


def _labelled(work: _Work, answers: Store, good: Sequence[Item], by: Judge | None) -> tuple[dict[str, bool], list[str]]:
    """The labels by id, and why others have none."""
    from hallucination_guard.evaluation.answers import judge

    if by is None:
        return {item.id: bool(item.correct) for item in work.items}, []
    verdicts = work.store(f"labels-{_slug(by.name)}", judge=by.name)
    with progress("judging", len(work.items)) as done:
        judge(work.items, answers, verdicts, by, done=done)
    found = {item.id: verdicts.rows[item.id] for item in good}
    labels = {key: row["correct"] for key, row in found.items() if row["correct"] is not None}
    return labels, [row["problem"] for row in found.values() if row["correct"] is None]


def _report(work: _Work, table: Columns, rows: Sequence[Labelled], judge: str, *, undecided: int, failed: int) -> None:
    """Measure, write and print."""
    from hallucination_guard.evaluation.publish import write_report
    from hallucination_guard.evaluation.report import make_report

    counts = {
        "labelled": len(rows),
        "right": sum(each.correct for each in rows),
        "unscorable": sum(each.status == "unscorable" for each in rows),
        "undecided by the judge": undecided,
        "failed": failed,
    }
    report = make_report(
        table,
        about=_about(work, judge),
        counts=counts,
        costs=work.costs,
        seconds=work.seconds,
        reference=work.options.reference,
        resamples=work.options.resamples,
        notes=work.notes,
    )
    written = write_report(work.options.output, report)
    if work.options.json:
        show_json(report.to_json_dict())
    else:
        _summary(report)
        show(f"report: {written[0]}")


def _check(options: _Options, items: Sequence[Item], given: str | None) -> None:
    """What can be said before a model is loaded."""
    if given is not None and options.judge is not None:
        raise InputError(
            f"{str(options.data)!r} has labels, so {options.judge!r} has nothing to judge",
            hint="leave --judge out, or take the labels out of the file",
        )
    if not 0 <= options.shots < len(items):
        raise InputError(f"{options.shots} of {len(items)} rows can not be examples", hint="give a smaller --shots")
    if options.judge == "embedding" and options.sentence_model is None:
        raise ConfigurationError(
            "the judge embedding needs a sentence-embedding model: a model's own states are no judge of its answers",
            hint="give --sentence-model",
        )
    if options.judge == "llm" and options.judge_model is None:
        raise ConfigurationError("the judge llm needs a chat model", hint="give --judge-model, as provider:name")
    if options.judge != "llm" and options.judge_model is not None:
        raise ConfigurationError("--judge-model goes with --judge llm", hint="give both or neither")
    if options.threshold is not None and options.judge not in ("rouge", "embedding"):
        raise ConfigurationError("--threshold is of the judges rouge and embedding", hint="leave it out")
    if options.samples == 1:
        raise ConfigurationError("one sample can not differ from itself", hint="give --samples 2 or more")
    if options.resamples < 1000:
        raise ConfigurationError(f"{options.resamples} resamples make poor intervals", hint="give 1000 or more")


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} can not be a folder: {error.strerror}", hint="give another --output") from None


def _work(options: _Options, items: Sequence[Item]) -> _Work:
    from hallucination_guard.evaluation.data import Prompting, data_hash
    from hallucination_guard.evaluation.embedding import OwnStates, SentenceModel
    from hallucination_guard.scoring import HybridGrad

    model = load(options.choice)
    prompting = Prompting.of(model, template=options.prompt, examples=items[: options.shots])
    rest = items[options.shots :]
    scorer = HybridGrad().identity
    binding = {
        "data": data_hash(options.data),
        "model": [model.identity.fingerprint, model.identity.template],
        "prompt": prompting.template,
        "shots": options.shots,
        "max_new_tokens": options.max_new_tokens,
        "scorer": [scorer.name, scorer.version, dict(scorer.settings)],
    }
    named = options.sentence_model
    embed: Embed = OwnStates(model) if named is None else SentenceModel.from_pretrained(named)
    return _Work(options, model, rest[: options.limit], prompting, binding, embed)


def _judge(options: _Options, embed: Embed) -> Judge:
    from hallucination_guard.evaluation.judges import Contains, Embedding, Rouge, llm_judge

    threshold = {} if options.threshold is None else {"threshold": options.threshold}
    if options.judge == "rouge":
        return Rouge(**threshold)
    if options.judge == "embedding":
        return Embedding(embed=embed, **threshold)
    if options.judge == "llm":
        assert options.judge_model is not None  # _check saw to it
        return llm_judge(_chat(options.judge_model), name=f"llm({options.judge_model})")
    return Contains()


def _chat(name: str) -> BaseChatModel:
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

    k = work.options.samples or _SAMPLES
    settings = {"k": k, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    store = work.store("samples", samples=settings)
    with progress(f"drawing {k} answers each", len(items)) as done:
        draw(
            work.model,
            items,
            work.prompting,
            store,
            k=k,
            max_new_tokens=work.options.max_new_tokens,
            batch_size=work.options.batch_size,
            done=done,
        )
    own = work.options.sentence_model is None
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
        "data": f"{work.options.data.name} (sha256 {work.binding['data']})",
        "judge": judge,
        "prompt": work.prompting.template,
        "max_new_tokens": work.options.max_new_tokens,
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

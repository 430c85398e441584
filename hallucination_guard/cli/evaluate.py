"""``evaluate``: ask a file of questions, score the answers, judge them, and report which score finds the wrong ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
    Replicas,
)
from hallucination_guard.errors import ConfigurationError, InputError, MissingExtra

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from hallucination_guard.calibration import Labelled
    from hallucination_guard.evaluation.columns import Columns
    from hallucination_guard.evaluation.data import Item
    from hallucination_guard.evaluation.embedding import Embed
    from hallucination_guard.evaluation.judges import Judge
    from hallucination_guard.evaluation.report import Report
    from hallucination_guard.evaluation.run import Run
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
    yardsticks: bool
    beginnings: bool
    sentence_model: str | None
    prompt: str | None
    shots: int
    max_new_tokens: int
    batch_size: int
    resamples: int
    choice: ModelChoice
    ray: int | None
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
    yardsticks: Annotated[
        bool,
        typer.Option("--yardsticks", help="Also RAUQ, Self-Certainty, BoostedProb and SATRMD, by one more pass."),
    ] = False,
    beginnings: Annotated[
        bool,
        typer.Option("--beginnings", help="Also score the beginnings of answers, to calibrate streams."),
    ] = False,
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
    ray: Replicas = None,
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
            yardsticks=yardsticks,
            beginnings=beginnings,
            sentence_model=sentence_model,
            prompt=prompt,
            shots=shots,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            resamples=resamples,
            choice=ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile),
            ray=ray,
            json=as_json,
        )
    )


def _evaluated(options: _Options) -> int:
    from hallucination_guard.calibration import write_labelled
    from hallucination_guard.evaluation.answers import labelled
    from hallucination_guard.evaluation.columns import columns
    from hallucination_guard.evaluation.data import given_judge, read_items

    items = read_items(options.data)
    given = given_judge(items)
    _check(options, items, given)
    _folder(options.output)
    run = _run(options, items)
    embed = _embed(options, run.model)
    by = None if given is not None else _judge(options, embed)
    answers = _answered(options, run)
    labels, undecided = run.labelled(answers, by)
    name = str(given if by is None else by.name)
    rows = labelled(run.items, answers, labels, by=name, model=run.model.identity, scorer=run.scorer.identity)
    write_labelled(options.output / "answers.jsonl", rows)
    failed = _problems(run, answers, undecided, name)
    scored = [item for item in run.items if item.id in labels and answers.rows[item.id].get("status") == "scored"]
    if options.p_true:
        run.add_p_true(scored, answers)
    if options.yardsticks:
        run.add_yardsticks(scored, answers, labels)
    if options.samples:
        run.add_samples(scored, answers, k=options.samples, embed=embed, own=options.sentence_model is None)
    wanted = [each.strip() for each in options.scores.split(",") if each.strip()]
    table = columns(rows, extra=run.extra, only=wanted)
    _report(options, run, table, rows, name, undecided=len(undecided), failed=failed)
    return _FAILURE if failed or undecided else _OK


def _report(
    options: _Options, run: Run, table: Columns, rows: Sequence[Labelled], judge: str, *, undecided: int, failed: int
) -> None:
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
        about=_about(options, run, judge),
        counts=counts,
        costs=run.costs,
        seconds=run.seconds,
        reference=options.reference,
        resamples=options.resamples,
        notes=run.notes,
    )
    written = write_report(options.output, report)
    if options.json:
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
        raise InputError(f"{options.shots} of {len(items)} rows cannot be examples", hint="give a smaller --shots")
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
        raise ConfigurationError("one sample cannot differ from itself", hint="give --samples 2 or more")
    if options.resamples < 1000:
        raise ConfigurationError(f"{options.resamples} resamples make poor intervals", hint="give 1000 or more")


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be a folder: {error.strerror}", hint="give another --output") from None


def _run(options: _Options, items: Sequence[Item]) -> Run:
    from hallucination_guard.evaluation.data import Prompting, data_hash
    from hallucination_guard.evaluation.run import Run
    from hallucination_guard.scoring import HybridGrad

    model, scorer = load(options.choice), HybridGrad()
    prompting = Prompting.of(model, template=options.prompt, examples=items[: options.shots])
    return Run(
        folder=options.output,
        model=model,
        scorer=scorer,
        items=items[options.shots :][: options.limit],
        prompting=prompting,
        binding={
            "data": data_hash(options.data),
            "model": [model.identity.fingerprint, model.identity.structure, model.identity.template],
            "prompt": prompting.template,
            "shots": options.shots,
            "max_new_tokens": options.max_new_tokens,
            "rows": 3,  # since they hold the states of the answers
            "scorer": [scorer.identity.name, scorer.identity.version, dict(scorer.identity.settings)],
            **({"beginnings": True} if options.beginnings else {}),
        },
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        progress=progress,
        beginnings=options.beginnings,
    )


def _answered(options: _Options, run: Run) -> Store:
    """Every question answered and scored; with ``--ray`` in processes beside this one, which does the rest."""
    if options.ray is None or run.is_answered():
        return run.answered()
    from hallucination_guard.replicas.jobs import Answers, text_of
    from hallucination_guard.replicas.ray_cluster import cluster

    processes = options.ray
    with cluster(processes) as share:
        from hallucination_guard.replicas.ray_mapping import mapped

        made_of = {
            "choice": options.choice.absolute(),
            "prompting": run.prompting,
            "max_new_tokens": run.max_new_tokens,
            "beginnings": run.beginnings,
        }

        def work(parts: Iterable[Sequence[Item]]) -> Iterator[list[dict[str, Any]]]:
            batches = [text_of([asdict(item) for item in part]) for part in parts]
            for rows in mapped(Answers, made_of, batches, processes=processes, share=share):
                yield json.loads(rows)

        run.work = work
        try:
            return run.answered()
        finally:
            run.work = None


def _embed(options: _Options, model: WhiteBoxModel) -> Embed:
    from hallucination_guard.evaluation.embedding import OwnStates, SentenceModel

    named = options.sentence_model
    return OwnStates(model) if named is None else SentenceModel.from_pretrained(named)


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


def _problems(run: Run, answers: Store, undecided: Sequence[str], judge: str) -> int:
    """Say what went wrong; how many questions have no answer or score."""
    failed = [row["problem"] for item in run.items if (row := answers.rows[item.id])["problem"]]
    if failed:
        run.notes.append(f"{len(failed)} questions could not be answered or scored; the first: {failed[0]}")
    if undecided:
        run.notes.append(f"{judge} left {len(undecided)} answers without a label; the first: {undecided[0]}")
    for note in run.notes:
        say(note)
    return len(failed)


def _about(options: _Options, run: Run, judge: str) -> dict[str, Any]:
    identity = run.model.identity
    about = {
        "model": identity.name,
        "fingerprint": identity.fingerprint,
        "dtype": identity.dtype,
        "data": f"{options.data.name} (sha256 {run.binding['data']})",
        "judge": judge,
        "prompt": run.prompting.template,
        "max_new_tokens": options.max_new_tokens,
        "answers": "given with the questions" if run.items[0].response is not None else "greedy",
    }
    if run.prompting.examples:
        about["examples"] = f"the first {len(run.prompting.examples)} rows, which are not evaluated"
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

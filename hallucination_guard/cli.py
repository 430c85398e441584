"""The command line: parse, call, print.

Exit status: 0 fine; 1 failure; 2 bad usage or bad input, with one line that says what and how to mend it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hallucination_guard.commands import audit_label, audit_replay, calibrate, evaluate, locate
from hallucination_guard.commands.console import load, positive, progress, say, show, show_json
from hallucination_guard.errors import AuditError, ConfigurationError, GuardError, InputError

if TYPE_CHECKING:
    from hallucination_guard import demo
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.rows import Line, Rows
    from hallucination_guard.types import Outcome, Scorer

__all__ = ["main"]

_OK, _FAILURE, _USAGE = 0, 1, 2
_AUDIT = "audit.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _quiet()
        run: Callable[[argparse.Namespace], int] = arguments.run
        status = run(arguments)
        sys.stdout.flush()
        return status
    except GuardError as error:
        say(f"error: {error}")
        return _USAGE if isinstance(error, InputError | ConfigurationError) or _names_a_thing(error) else _FAILURE
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OK
    except KeyboardInterrupt as error:
        say(f"interrupted; {error}" if error.args else "interrupted")
        return _FAILURE
    except OSError as error:
        say(f"error: {error.filename or 'output'}: {error.strerror or error} (free space, or choose another path)")
        return _FAILURE


def _names_a_thing(error: GuardError) -> bool:
    """Whether the user named a model, an anchor or a log that can not be used, rather than something breaking."""
    from hallucination_guard.errors import AnchorError, CalibrationError, ModelError

    return isinstance(error, ModelError | AnchorError | CalibrationError | AuditError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hallucination-guard", description="Knows when a local language model makes things up."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="demo", help="demo, a folder, a .gguf file or a hub id (default: demo)")
    model.add_argument("--device-map", help="as in transformers, for example auto")
    model.add_argument("--dtype", help="as in transformers, for example bfloat16")
    model.add_argument("--profile", type=Path, metavar="FILE", help="t* as `locate` measured it (default: by template)")

    demo = commands.add_parser("demo", parents=[common], help="a small model with and without a guard")
    demo.add_argument("--audit", type=Path, default=Path(".demo") / _AUDIT, help="the log (default: %(default)s)")
    demo.add_argument("--confidence", type=float, default=0.5, help="let through from here up (default: 0.5)")
    demo.add_argument("--fit", action="store_true", help="fit the calibration here instead of using the shipped one")
    demo.add_argument("--save-calibration", type=Path, metavar="FILE", help="where to keep what --fit fitted")
    demo.set_defaults(run=_demo)

    ask = commands.add_parser("ask", parents=[common, model], help="ask one question through a guard")
    ask.add_argument("question")
    ask.add_argument("--policy", help="a pack (observe, abstain, rag, strict) or a YAML file")
    ask.add_argument("--confidence", type=float, help="the packs' threshold")
    ask.add_argument("--calibration", type=Path, help="a calibration file; the demo model has one")
    ask.add_argument("--documents", type=Path, help="for retrieval: a folder of texts, or JSON lines of id and text")
    ask.add_argument("--audit", type=Path, default=Path(_AUDIT), help="the log (default: %(default)s)")
    ask.add_argument("--max-new-tokens", type=positive, default=64)
    ask.add_argument("--system", help="a system message")
    ask.add_argument("--anchor-question", help="model without a chat template: the part of the text that asks")
    ask.add_argument(
        "--explain", type=Path, metavar="FILE.html", help="a page with what is shaky in the answer that was judged"
    )
    ask.set_defaults(run=_ask)

    score = commands.add_parser(
        "score",
        parents=[common, model],
        help="score a file of prompts or answers",
        description="Score a file of prompts or answers: one row a line, in the order of the input. Finished rows are "
        "kept in OUTPUT.partial; after an interruption (Ctrl-C, kill, a full disk) the same command continues there, "
        "scoring no row twice, and OUTPUT appears once it is whole. To start anew, delete OUTPUT.partial.",
    )
    score.add_argument("--input", required=True, help="JSON lines; - for standard input")
    score.add_argument(
        "--output",
        required=True,
        help="JSON lines; - for standard output: rows come at once and in order, and an interrupted run starts anew "
        "(so does one that writes to a pipe or a device)",
    )
    score.add_argument("--batch-size", type=positive, default=8, help="rows at once, at most (default: %(default)s)")
    score.add_argument(
        "--batch-tokens",
        type=positive,
        default=8192,
        metavar="N",
        help="tokens at once, at most: rows times the longest, prompt and answer; a longer row goes alone; less "
        "takes less memory (default: %(default)s)",
    )
    score.add_argument("--max-new-tokens", type=positive, default=64)
    score.set_defaults(run=_score)

    doctor = commands.add_parser("doctor", parents=[common, model], help="can this model be guarded here?")
    doctor.add_argument("--prompt", default="What is the capital of France?")
    doctor.add_argument("--anchor-question", help="model without a chat template: the part of the prompt that asks")
    doctor.set_defaults(run=_doctor)

    locate.add(commands, common=common, model=model)
    evaluate.add(commands, common=common, model=model)
    calibrate.add(commands, common=common, model=model)

    audit = commands.add_parser("audit", help="read and verify the log").add_subparsers(required=True, metavar="WHAT")
    log = argparse.ArgumentParser(add_help=False)
    log.add_argument("--log", type=Path, default=Path(_AUDIT), help="the log (default: %(default)s)")
    tail = audit.add_parser("tail", parents=[common, log], help="the last records")
    tail.add_argument("-n", type=positive, default=10)
    tail.set_defaults(run=_audit_tail)
    show = audit.add_parser("show", parents=[common, log], help="one record, whole")
    show.add_argument("id", help="or its beginning")
    show.set_defaults(run=_audit_show)
    verify = audit.add_parser("verify", parents=[common, log], help="is the log whole and unchanged?")
    verify.add_argument("--key-file", type=Path, help="the key that the log was written with, if any")
    verify.set_defaults(run=_audit_verify)
    audit_label.add(audit, common=common, log=log)
    audit_replay.add(audit, common=common, log=log)
    return parser


def _quiet() -> None:
    """Progress bars of transformers on a terminal only; a program's own pipe stays clean."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


# --------------------------------------------------------------------------------------------------------------- score


def _score(arguments: argparse.Namespace) -> int:
    from hallucination_guard.rows import read_lines

    try:
        raw = sys.stdin.buffer.read() if arguments.input == "-" else Path(arguments.input).read_bytes()
    except OSError as error:
        raise InputError(
            f"{arguments.input!r} can not be read: {error.strerror}", hint="give a readable file"
        ) from None
    lines = read_lines(raw.splitlines(keepends=True))
    output = Path(arguments.output)
    # A pipe or a device has no beside, and must not be replaced by a file.
    streamed = arguments.output == "-" or (output.exists() and not output.is_file())
    counts = _score_stream(arguments, lines) if streamed else _score_file(arguments, raw, lines)
    if arguments.json and arguments.output != "-":
        show_json(counts)
    else:
        say(", ".join(f"{count} {status}" for status, count in counts.items()))
    return _FAILURE if counts["error"] else _OK


def _score_stream(arguments: argparse.Namespace, lines: Sequence[Line]) -> dict[str, int]:
    from hallucination_guard.resume import encoded, write_all
    from hallucination_guard.scoring import HybridGrad

    counts = {"scored": 0, "unscorable": 0, "error": 0}
    if arguments.output == "-":
        out = FileIO(sys.stdout.fileno(), "wb", closefd=False)
    else:
        try:
            out = FileIO(arguments.output, "wb")
        except OSError as error:
            raise _unwritable(arguments.output, str(error.strerror)) from None
    with out:
        rows = _rows(arguments, load(arguments), lines, scorer=HybridGrad(), by_length=False)
        with progress("scoring", len(lines)) as done:
            for batch in rows:
                write_all(out, b"".join(encoded(row) for _, row in batch))
                for _, row in batch:
                    counts[row["status"]] += 1
                done(sum(counts.values()))
    return counts


def _score_file(arguments: argparse.Namespace, raw: bytes, lines: Sequence[Line]) -> dict[str, int]:
    from hallucination_guard.resume import Partial
    from hallucination_guard.scoring import HybridGrad

    output = Path(arguments.output)
    _check_folder(output)
    model, scorer = load(arguments), HybridGrad()
    binding = {
        "input": hashlib.sha256(raw).hexdigest(),
        "model": [model.identity.fingerprint, model.identity.template],
        "scorer": [scorer.identity.name, scorer.identity.version, dict(scorer.identity.settings)],
        # Not the size of batches: who ran out of memory goes on with smaller ones.
        "max_new_tokens": arguments.max_new_tokens,
    }
    try:
        with Partial(output, binding) as partial:
            done_before = len(partial.statuses)
            if done_before:
                say(f"continuing: {done_before} of {len(lines)} rows are in {partial.path}")
            rest = [line for line in lines if line.number not in partial.statuses]
            with progress("scoring", len(lines)) as done:
                done(done_before)
                for batch in _rows(arguments, model, rest, scorer=scorer, by_length=True):
                    partial.add(batch)
                    done(len(partial.statuses))
            partial.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished rows are in {output}.partial: the same command continues") from None
    statuses = list(partial.statuses.values())
    return {status: statuses.count(status) for status in ("scored", "unscorable", "error")}


def _rows(
    arguments: argparse.Namespace, model: WhiteBoxModel, lines: Sequence[Line], *, scorer: Scorer, by_length: bool
) -> Iterator[Rows]:
    from hallucination_guard.rows import score_lines

    return score_lines(
        model,
        lines,
        scorer=scorer,
        batch_size=arguments.batch_size,
        batch_tokens=arguments.batch_tokens,
        max_new_tokens=arguments.max_new_tokens,
        by_length=by_length,
    )


def _check_folder(output: Path) -> None:
    """Said before a model is loaded."""
    folder = output.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise _unwritable(str(output), "no such folder" if not folder.is_dir() else "the folder is read-only")


def _unwritable(output: str, why: str) -> InputError:
    return InputError(f"{output!r} can not be written: {why}", hint="give a path in a folder that exists")


# ----------------------------------------------------------------------------------------------------------------- ask


def _ask(arguments: argparse.Namespace) -> int:
    from hallucination_guard.audit import AuditLog
    from hallucination_guard.bm25 import BM25Retriever
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.guard import Guard
    from hallucination_guard.types import Message
    from hallucination_guard_policies import load_policy

    if arguments.explain is not None:
        _check_folder(arguments.explain)
    retriever = None if arguments.documents is None else BM25Retriever.from_path(arguments.documents)
    model = load(arguments)
    calibration = None if arguments.calibration is None else Calibration.load(arguments.calibration)
    if calibration is None and arguments.model == "demo":
        from hallucination_guard.demo import calibrated

        calibration = calibrated(model)
    # Without a calibration nothing can be decided by confidence: the default then is to observe, and it says so.
    chosen = arguments.policy or ("observe" if calibration is None else "abstain")
    settings = {} if arguments.confidence is None else {"confidence": arguments.confidence}
    policy = load_policy(chosen, retriever=retriever, **settings)
    messages = [Message(role="user", content=arguments.question)]
    if arguments.system:
        messages.insert(0, Message(role="system", content=arguments.system))
    generation: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.anchor_question:
        generation["question"] = arguments.anchor_question
    with AuditLog(arguments.audit) as log:
        outcome = Guard(model, policy=policy, calibration=calibration, audit=log, generation=generation)(messages)
    _print_outcome(arguments, outcome)
    if arguments.explain is not None:
        _explain(arguments.explain, model, outcome)
    return _OK


def _explain(path: Path, model: WhiteBoxModel, outcome: Outcome) -> None:
    """Write the page of the answer that was judged last, also where it was not let through."""
    from hallucination_guard.explain import explain

    score = outcome.verdict.score
    if score.status != "scored":
        say(f"nothing to explain: {score.reason}")
        return
    said = "" if outcome.accepted else " This answer was not let through."
    note = f"{outcome.decision.action} by {outcome.decision.rule}: {outcome.decision.reason}.{said}"
    page = explain(model, outcome.generation).to_html(note=note)
    path.write_text(page, encoding="utf-8")
    say(f"explained in {path}")


def _print_outcome(arguments: argparse.Namespace, outcome: Outcome) -> None:
    if arguments.json:
        show_json(
            {
                "text": outcome.text,
                "decision": outcome.decision.action,
                "rule": outcome.decision.rule,
                "reason": outcome.decision.reason,
                "confidence": outcome.confidence,
                "status": outcome.verdict.score.status,
                "scores": dict(outcome.verdict.score.scores),
                "attempts": outcome.attempts,
                "retrieved": list(outcome.retrieved),
                "seconds": dict(outcome.seconds),
                "audit_ids": list(outcome.audit_ids),
                "audit": str(arguments.audit),
            }
        )
        return
    show(outcome.text if outcome.text is not None else f"[{outcome.decision.action}: no answer was let through]")
    confidence = "" if outcome.confidence is None else f"confidence {outcome.confidence:.2f}, "
    say(
        f"{outcome.decision.action} by {outcome.decision.rule}: {outcome.decision.reason}; {confidence}"
        f"{outcome.attempts} attempt(s), record {outcome.audit_ids[-1][:12]} in {arguments.audit}"
    )


# -------------------------------------------------------------------------------------------------------------- doctor


def _doctor(arguments: argparse.Namespace) -> int:
    from importlib import metadata

    from hallucination_guard.anchor import NO_ANCHOR, locate_anchor

    model = load(arguments)
    prompt = model.prompt(arguments.prompt)
    anchor = locate_anchor(model.tokenizer, prompt, question=arguments.anchor_question, profile=model.profile)
    tokens = [str(token) for token in model.tokenizer.convert_ids_to_tokens(list(prompt.token_ids))]
    report: dict[str, Any] = {
        "model": model.name,
        "architecture": type(model.model).__name__,
        "device": str(model.device),
        "dtype": model.identity.dtype,
        "layers": model.layout.depth,
        "deep_layers": [model.deep_layers.start, model.deep_layers.stop - 1],
        "vocabulary": model.vocabulary,
        "context": model.context,
        "fingerprint": model.identity.fingerprint,
        "template": model.identity.template,
        "anchor": None if anchor is None else {"index": anchor.index, "token": anchor.token, "rule": anchor.rule},
        "anchor_context": None,
        "self_test": {
            "logit_error": model.self_test.logit_error,
            "gradient_norm": model.self_test.gradient_norm,
            "slope_error": model.self_test.slope_error,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "langchain-core")},
    }
    if anchor is not None:
        at = len(tokens) + anchor.index
        before, after = tokens[max(0, at - 6) : at], tokens[at + 1 :]
        report["anchor_context"] = f"… {' '.join(before)} [[{tokens[at]}]] {' '.join(after)}"
    if arguments.json:
        show_json(report)
    else:
        test = report["self_test"]
        slope = "not taken below float32" if test["slope_error"] is None else f"{test['slope_error']:.1e}"
        low, high = report["deep_layers"]
        show(f"model      {report['model']} ({report['architecture']}, {report['layers']} layers)")
        show(f"device     {report['device']}, {report['dtype']}, context {report['context']}")
        show(f"deep half  h_{low} … h_{high}")
        if anchor is None:
            show(f"anchor t*  none: {NO_ANCHOR}")
        else:
            show(f"anchor t*  {anchor.token!r} at {anchor.index}, by the rule {anchor.rule!r}")
            show(f"           {report['anchor_context']}")
        show(
            f"self-test  passed: logits differ by {test['logit_error']:.1e}, "
            f"gradient norm {test['gradient_norm']:.3g}, finite differences differ by {slope}"
        )
        show(f"versions   {', '.join(f'{name} {version}' for name, version in report['versions'].items())}")
    return _OK


# --------------------------------------------------------------------------------------------------------------- audit


def _audit_tail(arguments: argparse.Namespace) -> int:
    from hallucination_guard.audit import tail

    records = tail(arguments.log, arguments.n)
    if arguments.json:
        show_json([record.to_json_dict() for record in records])
        return _OK
    line = "{:>5}  {:12}  {:19}  {:8}  {:16}  {:>5}  {}"
    show(line.format("seq", "id", "time (UTC)", "decision", "rule", "conf.", "answer"))
    for record in records:
        confidence = "" if record.confidence is None else f"{record.confidence:.2f}"
        answer = record.answer if isinstance(record.answer, str) else json.dumps(_plain(record.answer))
        seq = "" if record.seq is None else str(record.seq)
        shown = (seq, record.id[:12], record.time[:19], record.decision, record.rule, confidence, _short(answer))
        show(line.format(*shown))
    return _OK


def _audit_show(arguments: argparse.Namespace) -> int:
    from hallucination_guard.audit import find

    show_json(find(arguments.log, arguments.id).to_json_dict())
    return _OK


def _audit_verify(arguments: argparse.Namespace) -> int:
    from hallucination_guard.audit import verify

    key = None
    if arguments.key_file is not None:
        try:
            key = arguments.key_file.read_bytes().strip()
        except OSError as error:
            raise InputError(f"the key file {str(arguments.key_file)!r} can not be read: {error.strerror}") from None
    found = verify(arguments.log, key)
    problems = [{"line": each.line, "what": each.what, "id": each.id} for each in found.problems]
    if arguments.json:
        show_json({"ok": found.ok, "records": found.records, "problems": problems})
    elif found.ok:
        show(f"{arguments.log}: {found.records} records, whole and unchanged")
    else:
        for each in problems:
            show(f"{arguments.log}:{each['line']}: {each['what']}" + (f" (record {each['id']})" if each["id"] else ""))
    return _OK if found.ok else _FAILURE


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "keys") else value


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------- demo


def _demo(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from hallucination_guard import demo
    from hallucination_guard.calibration import Calibration
    from hallucination_guard.questions import shipped

    model = load(arguments)
    calibration = None if arguments.fit else demo.calibrated(model)
    if calibration is None:
        say("fitting the calibration on this machine, on other questions than those of the demo")
        with progress("fitting", len(demo.prompts_to_fit())) as done:
            for step in demo.fit(model):
                if isinstance(step, Calibration):
                    calibration = step
                else:
                    done(step)
    assert calibration is not None
    if arguments.save_calibration is not None:
        calibration.save(arguments.save_calibration)
    total = len(shipped("demo"))
    rows = []
    with _live_table(total, hidden=arguments.json) as add:
        for row in demo.run(model, calibration, arguments.audit, confidence=arguments.confidence):
            rows.append(row)
            add(row)
    summary = demo.summarise(rows)
    if arguments.json:
        show_json(
            {
                **asdict(summary),
                "calibrated_on": calibration.examples,
                "confidence": arguments.confidence,
                "audit": str(arguments.audit),
                "rows": [_demo_row(row) for row in rows],
            }
        )
        return _OK
    show()
    show(f"threshold: confidence {arguments.confidence:g}, fitted on {calibration.examples} answers to other questions")
    show(f"{'':34}{'without guard':>14}{'with guard':>12}")
    show(f"{'wrong answers let through':34}{summary.wrong_without:>14}{summary.wrong_with:>12}")
    show(f"{'right answers let through':34}{summary.right_without:>14}{summary.right_with:>12}")
    show(f"{'seconds a question':34}{summary.seconds_without:>14.2f}{summary.seconds_with:>12.2f}")
    show(
        f"right answers withheld: {summary.withheld_right}; questions looked up: {summary.retrieved} of "
        f"{summary.questions}; scoring took {summary.score_share:.0%} of the generating time"
    )
    show(f"audit log: {arguments.audit}  (hallucination-guard audit tail --log {arguments.audit})")
    return _OK


def _demo_row(row: demo.Row) -> dict[str, Any]:
    return {
        "id": row.question.id,
        "question": row.question.query,
        "without_guard": row.bare,
        "without_guard_correct": row.bare_correct,
        "answer": row.outcome.text,
        "correct": row.correct,
        "confidence": row.outcome.confidence,
        "action": row.outcome.decision.action,
        "rule": row.outcome.decision.rule,
        "attempts": row.outcome.attempts,
        "retrieved": list(row.outcome.retrieved),
    }


@contextmanager
def _live_table(total: int, *, hidden: bool) -> Iterator[Callable[[demo.Row], None]]:
    """Rows as they come: on a terminal a table that grows, in a pipe a line each."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()
    names = ("question", "answer of the model", "conf.", "action", "judged")
    widths = (44, 28, 5, 18, 8)

    def cells(row: demo.Row) -> tuple[str, ...]:
        outcome = row.outcome
        confidence = "" if outcome.confidence is None else f"{outcome.confidence:.2f}"
        action = f"retrieve, {outcome.decision.action}" if outcome.retrieved else outcome.decision.action
        judged = {True: "right", False: "WRONG", None: "withheld"}[row.correct]
        return (row.question.query, outcome.generation.text, confidence, action, judged)

    def line(values: Sequence[str]) -> str:
        return "  ".join(
            f"{_short(value, width):{width}}" for value, width in zip(values, widths, strict=True)
        ).rstrip()

    if hidden:
        yield lambda row: None
    elif console.is_terminal:
        table = Table(*names, box=None)
        with Live(table, console=console, vertical_overflow="visible") as live:

            def grow(row: demo.Row) -> None:
                fitted = zip(cells(row), widths, strict=True)
                table.add_row(*(Text(_short(value, width)) for value, width in fitted))
                table.caption = f"{table.row_count} of {total}"
                live.refresh()

            yield grow
    else:
        show(line(names))

        def write(row: demo.Row) -> None:
            show(line(cells(row)))
            sys.stdout.flush()

        yield write


if __name__ == "__main__":
    sys.exit(main())

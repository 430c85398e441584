"""The same answers, the same labels, measured by this project and by its peers: LM-Polygraph, UQLM, published SemGrad.

    make peers DATA=questions.jsonl SENTENCE_MODEL=FOLDER [MODELS="demo FILE.gguf"] [LIMIT=N]

``evaluate --yardsticks --samples K`` answers, judges and scores. Then each peer's own code scores these very answers,
in an environment of its own that is made here (see ``benchmarks/peers``). Where a score is the same by definition the
numbers have to be equal, or this fails. The same command goes on where it was. Written are a table and a plot: AUROC
and PRR with paired 95 % intervals against a score of ours, seconds, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoTokenizer

from hallucination_guard.evaluation import Prompting, bootstrap, read_items
from hallucination_guard.evaluation.metrics import Compared
from hallucination_guard.model import WhiteBoxModel

SAY = Console(stderr=True)
SIDES = Path(__file__).with_suffix("")
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # in float32; SmolLM2: the median is 1e-6, and one short answer of 36 was 1e-4 apart
TORCH = "torch==2.13.0"  # first and pinned: a range would be free to fetch another build of several gigabytes
ENVIRONMENTS: Mapping[str, Sequence[Sequence[str]]] = {
    # LM-Polygraph asks for far more than its estimators import.
    "lm-polygraph": (
        (TORCH,),
        (
            "transformers>=5.16,<6", "accelerate", "bert-score", "boostedprob==0.1.3", "datasets", "diskcache",
            "evaluate", "nltk", "numpy", "omegaconf", "openai", "pandas", "rouge-score", "sacrebleu", "scikit-learn",
            "scipy", "sentence-transformers", "spacy", "tqdm",
        ),
        ("--no-deps", "lm-polygraph==0.7.0"),
    ),
    # Its numpy is below 2, which newer pyarrow refuses.
    "uqlm": ((TORCH,), ("uqlm==0.6.7", "pyarrow<22")),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Same:
    """A peer's number that is ours by definition, after ``turned``."""

    peer: str
    theirs: str
    ours: str
    turned: Callable[[float], float] = lambda value: value
    within: float = TOLERANCE


POLYGRAPH, UQLM, SEMGRAD, OURS = "LM-Polygraph 0.7", "UQLM 0.6", "SemGrad, published", "ours"
EQUAL = (
    Same(peer=POLYGRAPH, theirs="MaximumSequenceProbability", ours="sequence_nll"),
    Same(peer=POLYGRAPH, theirs="Perplexity", ours="mean_nll"),
    Same(peer=POLYGRAPH, theirs="MeanTokenEntropy", ours="mean_token_entropy"),
    Same(peer=POLYGRAPH, theirs="SelfCertainty", ours="-self_certainty"),
    Same(peer=POLYGRAPH, theirs="BoostedProbSequence", ours="1-boostedprob", turned=lambda value: value + 1.0),
    Same(peer=POLYGRAPH, theirs="RAUQ", ours="rauq", turned=lambda value: value - 1.0),
    Same(peer=POLYGRAPH, theirs="CocoaMSP", ours="cocoa"),
    Same(peer=POLYGRAPH, theirs="CocoaPPL", ours="cocoa_mean"),
    Same(peer=POLYGRAPH, theirs="CocoaMTE", ours="cocoa_entropy"),
    Same(peer=POLYGRAPH, theirs="MonteCarloSequenceEntropy", ours="predictive_entropy"),
    Same(peer=POLYGRAPH, theirs="SAR, with question", ours="sar"),
    Same(peer=UQLM, theirs="sequence_probability", ours="mean_nll", turned=lambda value: -float(np.log(value))),
    Same(peer=UQLM, theirs="min_probability", ours="-min_token_logprob", turned=lambda value: -float(np.log(value))),
    Same(peer=SEMGRAD, theirs="SemGrad, paper", ours="semgrad", within=GRADIENT_TOLERANCE),
    Same(peer=SEMGRAD, theirs="ParaGrad, paper", ours="paragrad"),
    Same(peer=SEMGRAD, theirs="HybridGrad, paper", ours="hybridgrad", within=GRADIENT_TOLERANCE),
)

OF_TEXTS = ("cocoa", "cocoa_mean", "cocoa_entropy", "sar")  # of what samples say, and not only of how probable they are

UNLIKE = (
    "Of the same name, and not the same number:",
    "",
    "- `SAR` of LM-Polygraph compares whole answers without the question; the paper, and we, with it.",
    "- `EigenScore` of LM-Polygraph takes the state that predicts a sample's last token, not that of the token, and "
    "does not divide the covariance by d − 1.",
    "- `consistency_and_confidence` of UQLM, its CoCoA, is (1 + cos) / 2 times the mean token probability; the paper's "
    "is the product of the two doubts.",
    "- Its negentropies are of the 15 most probable tokens, as a service gives them.",
    "- `SemGrad, code` and its like: the loss divided by the number of tokens, one layer more, and on tied embeddings "
    "the path through the input as well.",
    "- LM-Polygraph on its own would also count the token that ends the answer, and forbids answers of one token.",
)


@dataclass(slots=True, kw_only=True)
class Measured:
    """What one model's answers came to.

    Args:
        name: of the model.
        answers: how many there were, and how many of them wrong.
        compared: every score of every side, named ``side: score``.
        seconds: of an answer, by the same names.
        apart: by pair, the largest relative difference and how many answers it was taken over.
        memory: peak resident memory of each side, in MiB.
    """

    name: str
    answers: tuple[int, int]
    compared: Compared
    seconds: dict[str, float]
    apart: dict[str, tuple[float, int]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------- environments


def environment(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there."""
    home = folder / f"peers-{name}"
    python, made = home / "bin" / "python", home / ".made"
    wanted = json.dumps([*map(list, ENVIRONMENTS[name])])
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        SAY.print(f"making {home}")
        venv.create(home, with_pip=True, clear=True)
        for step in ENVIRONMENTS[name]:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
            subprocess.run(command, check=True)
        made.write_text(wanted, encoding="utf-8")
    return python


def run(command: Sequence[str | Path], memory: Path) -> None:
    """Run a side; its peak memory is kept in a file, the greatest of all its runs."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if "hallucination_guard.cli" not in command:
        quiet.pop("PYTHONPATH", None)
    process = subprocess.Popen([str(each) for each in command], env=quiet, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} … ended with {process.returncode}")
    before = float(memory.read_text(encoding="utf-8")) if memory.exists() else 0.0
    memory.write_text(str(max(before, usage.ru_maxrss / 1024)), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- sides


def rows_of(path: Path, *, header: bool = False) -> dict[str, dict[str, Any]]:
    """Rows of a file by id, without the line that says what they are bound to."""
    lines = path.read_text(encoding="utf-8").splitlines()[int(header) :]
    return {row["id"]: row for row in map(json.loads, lines)}


def ours(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Answer, judge, score: everything of ours."""
    shots = ["--shots", str(args.shots)] if name != "demo" and args.shots else []
    samples = ["--samples", str(args.samples)] if args.samples else []
    limit = ["--limit", str(args.limit)] if args.limit else []
    command = [
        sys.executable, "-m", "hallucination_guard.cli", "evaluate", "--data", args.data, "--output", folder,
        "--model", name, "--judge", "contains", "--yardsticks", "--sentence-model", args.sentence_model,
        "--max-new-tokens", str(args.max_new_tokens), *shots, *samples, *limit,
    ]  # fmt: skip
    run(command, folder.with_name(f"{folder.name}.memory-ours"))


def hand_over(args: argparse.Namespace, name: str, folder: Path) -> tuple[Path, Path]:
    """What the peers are given: a file of answers and a folder with the model as plain weights."""
    handoff, weights = folder / f"handoff-{args.samples}.jsonl", folder / "weights"
    generations = rows_of(folder / "generations.jsonl", header=True)
    drawn = rows_of(folder / "samples.jsonl", header=True) if args.samples else {}
    labelled = rows_of(folder / "scores.jsonl")
    items = [item for item in read_items(args.data) if item.id in labelled]
    if handoff.exists() and set(rows_of(handoff)) == {item.id for item in items} and (weights / "config.json").exists():
        return handoff, weights
    model = WhiteBoxModel.demo() if name == "demo" else WhiteBoxModel.from_pretrained(name)
    if not (weights / "config.json").exists():
        model.model.save_pretrained(weights)
        model.tokenizer.save_pretrained(weights)
    templated = bool(model.prompt("Who?").templated)
    examples = [] if templated else read_items(args.data)[: args.shots]
    prompting = Prompting.of(model, examples=examples)
    lines = []
    for item in items:
        made, text = generations[item.id], prompting(item.query)
        prompt = model.prompt(text)
        anchor = model.anchor(prompt, prompting.question(item.query))
        assert anchor is not None
        samples = drawn[item.id]["samples"] if args.samples else []
        row = {
            "id": item.id,
            "query": item.query,
            "prompt": text,
            "prompt_token_ids": list(prompt.token_ids),
            "anchor": anchor.index,
            "text": made["response"],
            "token_ids": made["response_token_ids"],
            "samples": [{name: each[name] for name in ("text", "token_ids")} for each in samples],
        }
        lines.append(json.dumps(row) + "\n")
    handoff.write_text("".join(lines), encoding="utf-8")
    return handoff, weights


def peers(args: argparse.Namespace, folder: Path, handoff: Path, weights: Path) -> None:
    """Every peer, on the answers handed over."""

    def memory(side: str) -> Path:
        return folder.with_name(f"{folder.name}.memory-{side}")

    run([sys.executable, SIDES / "semgrad_side.py", handoff, weights, folder / "semgrad.jsonl"], memory(SEMGRAD))
    python = environment(args.envs, "lm-polygraph")
    polygraph = folder / f"lm-polygraph-{args.samples}.jsonl"
    run([python, SIDES / "lm_polygraph_side.py", handoff, weights, args.sentence_model, polygraph], memory(POLYGRAPH))
    python, found = environment(args.envs, "uqlm"), folder / f"uqlm-{args.samples}.jsonl"
    run([python, SIDES / "uqlm_side.py", handoff, polygraph, args.sentence_model, found], memory(UQLM))


# -------------------------------------------------------------------------------------------------------------- reading


def measured(args: argparse.Namespace, name: str, folder: Path) -> Measured:
    """Put the sides together, see that what must be equal is, and compare."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    answers = rows_of(folder / "scores.jsonl")
    sides = {
        POLYGRAPH: rows_of(folder / f"lm-polygraph-{args.samples}.jsonl"),
        UQLM: rows_of(folder / f"uqlm-{args.samples}.jsonl"),
        SEMGRAD: rows_of(folder / "semgrad.jsonl"),
    }
    names = next(iter(answers.values()))["scores"]
    own = {score: {key: row["scores"][score] for key, row in answers.items()} for score in names}
    apart = {}
    unequal = []
    samples = rows_of(folder / f"handoff-{args.samples}.jsonl")
    special = set(AutoTokenizer.from_pretrained(folder / "weights").all_special_ids)
    # An empty sample is held against the answer here, and is not there for LM-Polygraph; one with a special token in
    # its middle (a base or small model writes the next turn's mark) has another text there.
    alike = {
        key: all(each["token_ids"] and not special & set(each["token_ids"]) for each in row["samples"])
        for key, row in samples.items()
    }
    for each in EQUAL:
        found = [
            (each.turned(rows["scores"][each.theirs]), own[each.ours][key])
            for key, rows in sides[each.peer].items()
            if each.theirs in rows["scores"]
            and key in own.get(each.ours, {})
            and (each.ours not in OF_TEXTS or alike[key])
        ]
        if found:
            # What is a thousandth of the usual is rounding of what it was made of.
            floor = 1e-3 * float(np.median([abs(other) for _, other in found]))
            gaps = [abs(one - other) / max(abs(other), floor) for one, other in found]
            pair = f"{each.peer}: {each.theirs} = {each.ours}"
            apart[pair] = (max(gaps), len(gaps))
            if max(gaps) > each.within:
                unequal.append(f"{pair} to {each.within:g}")
    for pair, (gap, count) in apart.items():
        SAY.print(f"{name}: {pair}: {gap:.1e} over {count} answers")
    if unequal:
        sys.exit(f"not equal: {'; '.join(unequal)}")
    table = {f"{OURS}: {score}": values for score, values in own.items()}
    seconds = {f"{OURS}: {score}": each["seconds"] for score, each in report["scores"].items()}
    for side, rows in sides.items():
        for score in dict.fromkeys(name for row in rows.values() for name in row["scores"]):
            sign = -1.0 if side == UQLM else 1.0  # UQLM's are confidences
            values = {key: sign * row["scores"][score] for key, row in rows.items() if score in row["scores"]}
            table[f"{side}: {score}"] = {key: value for key, value in values.items() if np.isfinite(value)}
            seconds[f"{side}: {score}"] = spent(side, score, rows)
    keys = [key for key in answers if all(key in values for values in table.values())]
    wrong = [answers[key]["wrong"] for key in keys]
    compared = bootstrap(
        {score: [values[key] for key in keys] for score, values in table.items()},
        wrong,
        reference=f"{OURS}: {args.reference}",
    )
    prefix = f"{folder.name}.memory-"
    memory = {path.name.removeprefix(prefix): float(path.read_text()) for path in folder.parent.glob(f"{prefix}*")}
    return Measured(
        name=Path(report["about"]["model"]).name,  # of a folder, not where it lies
        answers=(len(keys), sum(wrong)),
        compared=compared,
        seconds=seconds,
        apart=apart,
        memory=memory,
    )


def spent(side: str, score: str, rows: Mapping[str, dict[str, Any]]) -> float:
    """Seconds of an answer, on top of drawing it and its samples."""
    sampled = ("SAR", "Cocoa", "MonteCarlo", "EigenScore", "monte_carlo", "consistency")
    part = "samples" if score.startswith(sampled) else "plain" if side == UQLM else "one pass"
    return float(np.mean([row["seconds"][part] for row in rows.values() if part in row["seconds"]] or [float("nan")]))


# ---------------------------------------------------------------------------------------------------------------- table


def markdown(args: argparse.Namespace, found: Sequence[Measured]) -> str:
    """The fragment for the docs."""
    lines = [
        f"The same answers and labels (judge: contains), on a CPU ({platform.machine()}, torch {version('torch')}). "
        f"In brackets paired 95 % bootstrap intervals of the difference to our `{args.reference}`, on the same 2,000 "
        "resamples; a star where it does not hold 0. Seconds are of an answer, on top of drawing it. Ours: in batches "
        "of 8, with what decoding kept; those of samples hold the drawing of the samples. LM-Polygraph and published "
        "SemGrad: one answer at a time, with a pass over it, most of which LM-Polygraph would save had it drawn the "
        "answer itself. UQLM starts from log probabilities that are there.",
        "",
    ]
    for each in found:
        count, wrong = each.answers
        lines += [f"### {each.name}: {count} answers, {wrong} wrong", ""]
        lines += ["| score | AUROC | Δ AUROC | PRR | Δ PRR | seconds |", "|---|---|---|---|---|---|"]
        values = each.compared.scores
        for name in sorted(values, key=lambda score: -(values[score]["auroc"].value or 0.0)):
            cells = []
            for metric in ("auroc", "prr"):
                value = values[name][metric].value
                cells += ["undefined" if value is None else f"{value:.3f}", difference(each.compared, name, metric)]
            lines.append(f"| {name} | {' | '.join(cells)} | {each.seconds.get(name, float('nan')):.3f} |")
        peak = ", ".join(f"{side} {size:,.0f} MiB" for side, size in sorted(each.memory.items()))
        lines += [
            "",
            f"Peak memory of the process: {peak}.",
            "",
            "Numbers that have to be equal, and how far apart:",
            "",
        ]
        lines += ["| pair | largest relative difference | answers |", "|---|---|---|"]
        lines += [f"| {pair} | {gap:.1e} | {count} |" for pair, (gap, count) in each.apart.items()]
        lines.append("")
    return "\n".join([*lines, *UNLIKE, ""])


def difference(compared: Compared, name: str, metric: str) -> str:
    """To the reference, with its interval and a star where that does not hold 0."""
    if name == compared.reference:
        return "reference"
    found = compared.differences[name][metric]
    if found.value is None or found.low is None or found.high is None:
        return "undefined"
    star = r" \*" if found.low > 0 or found.high < 0 else ""
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f}){star}"


def draw(path: Path, found: Sequence[Measured]) -> None:
    """AUROC with its interval, a panel a model, a colour a side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {OURS: "#0072B2", POLYGRAPH: "#D55E00", UQLM: "#009E73", SEMGRAD: "#CC79A7"}
    most = max(len(each.compared.scores) for each in found)
    figure = Figure(figsize=(6.5 * len(found), 1.2 + 0.19 * most), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        values = each.compared.scores
        names = sorted(values, key=lambda score: values[score]["auroc"].value or 0.0)
        for at, name in enumerate(names):
            side = name.partition(": ")[0]
            auroc = values[name]["auroc"]
            if auroc.value is None or auroc.low is None:
                continue
            axes.plot([auroc.low, auroc.high], [at, at], color=colours[side], linewidth=1.2)
            axes.plot([auroc.value], [at], "o", color=colours[side], markersize=3.5)
        axes.set_yticks(range(len(names)), [name.partition(": ")[2] for name in names], fontsize=6)
        axes.axvline(0.5, color="#777777", linewidth=0.8)
        axes.set_xlabel("AUROC of wrong answers, 95 % interval")
        axes.set_title(f"{each.name}: {each.answers[0]} answers", fontsize=9)
        for side, colour in colours.items():
            axes.plot([], [], "o-", color=colour, label=side, markersize=3.5)
        axes.legend(fontsize=7, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all sides for every model, then write table and plot."""
    parser = argparse.ArgumentParser(description="This project beside its peers, on the same answers.")
    parser.add_argument("--data", type=Path, required=True, help="questions with reference answers, as for evaluate")
    parser.add_argument("--sentence-model", required=True, help="folder of a sentence-embedding model")
    parser.add_argument("--model", action="append", default=[], help="demo, a folder or a GGUF file; may be repeated")
    parser.add_argument("--shots", type=int, default=5, help="examples for a model that is not the demo's")
    parser.add_argument("--limit", type=int, help="the first N questions only")
    parser.add_argument(
        "--samples", type=int, default=5, help="answers drawn beside each; 0 for scores of one pass only"
    )
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--reference", default="fused", help="score of ours that all are compared with")
    parser.add_argument("--output", type=Path, default=Path("peers"), help="folder of everything that is kept")
    parser.add_argument("--envs", type=Path, default=Path(".venvs"), help="folder of the peers' environments")
    parser.add_argument("--table", type=Path, default=Path("docs/peers-table.md"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/peers.png"))
    args = parser.parse_args()
    found = []
    for name in args.model or ["demo"]:
        folder = args.output / Path(name).stem
        folder.mkdir(parents=True, exist_ok=True)
        SAY.print(f"{name}: ours")
        ours(args, name, folder)
        handoff, weights = hand_over(args, name, folder)
        SAY.print(f"{name}: peers")
        peers(args, folder, handoff, weights)
        found.append(measured(args, name, folder))
    args.table.write_text(markdown(args, found), encoding="utf-8")
    draw(args.plot, found)
    SAY.print(f"written: {args.table}, {args.plot}")


if __name__ == "__main__":
    main()

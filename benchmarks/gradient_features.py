"""Does the shape of the gradient at t* say more than its size? SemGrad taken apart, beside the learned score.

    python benchmarks/gradient_features.py --model demo --data FILE --answers WORK/demo-sciq --limit 500

``--answers`` is a folder of ``evaluate`` (``benchmarks/evidence.py`` leaves one for a model and a set), ``--data`` what
it was asked. Each answer is read again for ∂ℓ/∂h_{l,t*} of every deep layer. From these, out of fold over questions:

norms    log ‖·‖₁ of each layer, through a ridge regression
cosines  how much nearer each layer's gradient is to the mean direction of wrong answers than to that of right ones, of
         the other folds; the mean over the layers

each alone, and the same number of standard deviations beside the fused score, without a probe and with one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from hallucination_guard import WhiteBoxModel
from hallucination_guard.calibration import Labelled, read_labelled
from hallucination_guard.calibration.folds import fold_of
from hallucination_guard.calibration.fusion import cross_fitted, fit_fusion
from hallucination_guard.calibration.ranking import gain
from hallucination_guard.calibration.stack import fit_fused
from hallucination_guard.evaluation import Prompting, read_items
from hallucination_guard.model.replay import replay
from hallucination_guard.model.view import undisturbed
from hallucination_guard.scoring.gradients import GradientSettings, at_anchor
from hallucination_guard.scoring.head_walk import walk_head
from hallucination_guard.values import Generation

FOLDS, STRENGTH, SHARES = 5, 1e-2, (0.25, 0.5, 1.0)


def gradient(model: WhiteBoxModel, generation: Generation) -> np.ndarray[Any, Any]:
    """∂ℓ/∂h_{l,t*}, layers × d."""
    settings = GradientSettings()
    layers = settings.deep(model.layout.depth)
    trace, answer = model.trace(generation, layers), settings.counted(generation)
    with undisturbed(model.model, grad=True):
        run = replay(model.model, model.layout, [trace], layers)
        rows = slice(trace.states.shape[0] - len(answer), trace.states.shape[0])
        walk = walk_head(model.head, run.final[0, rows].detach(), answer, weighting=settings.weighting)
        upstream = torch.zeros_like(run.final, dtype=model.head.dtype)
        upstream[0, rows] = walk.by_states.to(upstream)
        return at_anchor(run, upstream)[:, 0].float().numpy()


def gradients(model: WhiteBoxModel, options: argparse.Namespace) -> tuple[list[Labelled], np.ndarray[Any, Any]]:
    """The labelled answers that could be scored, and the gradients of each (answers × layers × d)."""
    items = read_items(options.data)
    templated = bool(model.prompt("Who?").templated)
    prompting = Prompting.of(model, examples=[] if templated else items[: options.shots])
    lines = (options.answers / "generations.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    stored = {row["id"]: row for row in map(json.loads, lines)}
    labelled = [each for each in read_labelled(options.answers / "answers.jsonl") if each.status == "scored"]
    labelled = labelled[: options.limit]
    found = []
    for each in labelled:
        row = stored[each.id]
        read = model.read(prompting(row["query"]), row["response_token_ids"], question=prompting.question(row["query"]))
        found.append(gradient(model, read))
    return [replace(each, id=each.id.split("~")[0]) for each in labelled], np.stack(found)


def by_norms(norms: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any], parts: np.ndarray[Any, Any]) -> Any:
    """Logits out of fold."""
    found = np.zeros(len(wrong))
    for part in range(FOLDS):
        inside, rest = parts == part, parts != part
        centre, scale = norms[rest].mean(axis=0), norms[rest].std(axis=0) + 1e-9
        fitted = LogisticRegression(C=STRENGTH, max_iter=1000).fit((norms[rest] - centre) / scale, wrong[rest])
        found[inside] = (norms[inside] - centre) / scale @ fitted.coef_[0]
    return found


def by_cosines(units: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any], parts: np.ndarray[Any, Any]) -> Any:
    """Nearer to the wrong ones, out of fold."""
    found = np.zeros(len(wrong))
    for part in range(FOLDS):
        inside, rest = parts == part, parts != part
        means = [units[rest & kind].mean(axis=0) for kind in (wrong, ~wrong)]
        directions = [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in means]
        found[inside] = np.einsum("nld,ld->nl", units[inside], directions[0] - directions[1]).mean(axis=1)
    return found


def standard(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean 0, standard deviation 1."""
    found = np.array(values, float)
    return (found - found.mean()) / found.std()


def main() -> int:
    """Read, fit, print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int, default=5)
    options = parser.parse_args()
    model = WhiteBoxModel.demo() if options.model == "demo" else WhiteBoxModel.from_pretrained(options.model)
    labelled, all_gradients = gradients(model, options)
    wrong, ids = np.array([not each.correct for each in labelled]), [each.id for each in labelled]
    parts = fold_of(ids, FOLDS, seed=0)
    sizes = np.linalg.norm(all_gradients, axis=-1, keepdims=True)
    features = {
        "norms by layer": by_norms(np.log(np.abs(all_gradients).sum(axis=-1) + 1e-12), wrong, parts),
        "cosines": by_cosines(all_gradients / np.maximum(sizes, 1e-30), wrong, parts),
    }
    plain = standard(np.log(cross_fitted(labelled, fit=fit_fusion)))
    probed = standard(np.log(cross_fitted(labelled, fit=fit_fused)))
    nothing = np.zeros(len(wrong))
    print(f"{options.model}: {len(wrong)} answers to {len(set(ids))} questions, {wrong.mean():.0%} wrong\n")
    print("| what | AUROC alone | share beside | over fused, no probe | over fused |\n|---|---|---|---|---|")
    for name, values in features.items():
        alone = gain(values, nothing, wrong, ids, level=0.95)
        said = f"{alone.value + 0.5:.3f} ({alone.low + 0.5:.3f} to {alone.high + 0.5:.3f})"
        for share in SHARES:
            more = [gain(fused + share * standard(values), fused, wrong, ids, level=0.95) for fused in (plain, probed)]
            print(f"| {name} | {said} | {share:g} | {more[0]} | {more[1]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

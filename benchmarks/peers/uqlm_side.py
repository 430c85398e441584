"""Scores of UQLM for answers that are given. Runs in an environment of its own, and imports nothing of ours.

    python uqlm_side.py HANDOFF.jsonl LM_POLYGRAPH.jsonl SENTENCE_MODEL OUT.jsonl

UQLM takes answers and log probabilities as a service gives them, so it is given those that LM-Polygraph's side
measured. Left out are the scorers that need a model for entailment, and those that ask a language model.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from uqlm import WhiteBoxUQ

PLAIN = [
    "sequence_probability",
    "min_probability",
    "min_token_negentropy",
    "mean_token_negentropy",
    "probability_margin",
]
SAMPLED = ["monte_carlo_probability", "consistency_and_confidence"]


def logprobs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one answer, in the shape of a service's reply."""
    pairs = zip(row["logprobs"], row["top"], strict=True)
    return [{"token": "", "logprob": own, "top_logprobs": [{"logprob": each} for each in top]} for own, top in pairs]


def main() -> None:
    """Score all rows, unless it is done."""
    handoff, measured, sentence, out = sys.argv[1:5]
    rows = [json.loads(line) for line in Path(handoff).read_text(encoding="utf-8").splitlines()]
    kept = Path(out).read_text(encoding="utf-8").splitlines() if Path(out).exists() else []
    if {json.loads(line)["id"] for line in kept} == {row["id"] for row in rows}:
        return
    known = {row["id"]: row for row in map(json.loads, Path(measured).read_text(encoding="utf-8").splitlines())}
    warnings.simplefilter("ignore")
    plain = WhiteBoxUQ(scorers=PLAIN)
    quiet = {"show_progress_bars": False}
    found, seconds = {}, {}
    began = time.perf_counter()
    result = asyncio.run(plain.score([logprobs(known[row["id"]]) for row in rows], **quiet)).to_dict()["data"]
    seconds["plain"] = (time.perf_counter() - began) / len(rows)
    for name in PLAIN:
        found[name] = dict(zip([row["id"] for row in rows], map(float, result[name]), strict=True))
    drawn = [row for row in rows if known[row["id"]]["sampled"]]
    if drawn:
        sampled = WhiteBoxUQ(scorers=SAMPLED, sentence_transformer=sentence)
        began = time.perf_counter()
        result = asyncio.run(
            sampled.score(
                [logprobs(known[row["id"]]) for row in drawn],
                prompts=[row["query"] for row in drawn],
                responses=[row["text"] for row in drawn],
                sampled_responses=[[each["text"] for each in row["samples"] if each["token_ids"]] for row in drawn],
                sampled_logprobs_results=[
                    [[{"token": "", "logprob": each} for each in one] for one in known[row["id"]]["sampled"]]
                    for row in drawn
                ],
                **quiet,
            )
        ).to_dict()["data"]
        seconds["samples"] = (time.perf_counter() - began) / len(drawn)
        for name in SAMPLED:
            found[name] = dict(zip([row["id"] for row in drawn], map(float, result[name]), strict=True))
    with Path(out).open("w", encoding="utf-8") as file:
        for row in rows:
            scores = {name: values[row["id"]] for name, values in found.items() if row["id"] in values}
            file.write(json.dumps({"id": row["id"], "scores": scores, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()

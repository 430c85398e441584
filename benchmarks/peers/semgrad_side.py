"""SemGrad as published, written again from its paper: one forward pass with a graph over everything, one backward.

    python semgrad_side.py HANDOFF.jsonl MODEL_FOLDER OUT.jsonl

Nothing of ours is imported: no cache, no closed form, no batch. Of each answer two readings are scored. The paper's: a
sum over the answer's tokens, layers L/2+1 … L−1, the head a variable of its own. The published code's: the loss divided
by T, layers L/2 … L−1, the head's gradient through tied embeddings as well. Resumable, row by row.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def scored(model: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Both readings of one answer, and the seconds of the published one."""
    prompt, answer = row["prompt_token_ids"], row["token_ids"]
    depth, at = model.config.get_text_config().num_hidden_layers, len(prompt) + row["anchor"]
    began = time.perf_counter()
    tied = model.get_output_embeddings().weight
    own = tied.detach().clone().requires_grad_(True)
    # A head of its own and one with the path through the embeddings: the graph is walked for both at once.
    ids = torch.tensor([[*prompt, *answer]])
    out = model.get_decoder()(ids, use_cache=False, output_hidden_states=True)
    final = out.last_hidden_state[0, len(prompt) - 1 : -1]
    logits = final @ own.T
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    logp = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    loss = -(entropy * logp[range(len(answer)), answer]).sum()
    states = out.hidden_states[depth // 2 : depth]
    gradients = torch.autograd.grad(loss, [*states, own, tied], allow_unused=True)
    *by_state, head, through = gradients
    moved = [each[0, at] for each in by_state]
    share = math.exp(-float(entropy.mean()))
    semgrad, paragrad = float(torch.cat(moved[1:]).abs().mean()), float(head.abs().mean())
    whole = head if through is None else head + through
    published = {
        "semgrad": float(torch.cat(moved).abs().mean()) / len(answer),
        "paragrad": float(whole.abs().mean()) / len(answer),
    }
    seconds = time.perf_counter() - began
    return {
        "id": row["id"],
        "scores": {
            "SemGrad, paper": semgrad,
            "ParaGrad, paper": paragrad,
            "HybridGrad, paper": (1 - share) * semgrad + share * paragrad,
            "SemGrad, code": published["semgrad"],
            "ParaGrad, code": published["paragrad"],
            "HybridGrad, code": (1 - share) * published["semgrad"] + share * published["paragrad"],
        },
        "seconds": {"one pass": seconds},
    }


def main() -> None:
    """Score what has no row yet."""
    handoff, folder, out = sys.argv[1:4]
    rows = [json.loads(line) for line in Path(handoff).read_text(encoding="utf-8").splitlines()]
    kept = Path(out).read_text(encoding="utf-8").splitlines() if Path(out).exists() else []
    done = {json.loads(line)["id"] for line in kept}
    if all(row["id"] in done for row in rows):
        return
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.get_output_embeddings().weight)
    with Path(out).open("a", encoding="utf-8") as file:
        for row in rows:
            if row["id"] not in done:
                file.write(json.dumps(scored(model, row)) + "\n")
                file.flush()


if __name__ == "__main__":
    main()

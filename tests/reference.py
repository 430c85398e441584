"""The yardstick: the definitions of method, word for word, by plain autograd over the full sequence.

No cache, no closed form, no batch, no block: slow and obvious.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def full_sequence_scores(
    model: Any,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    anchor: int,
    *,
    layers: range | None = None,
    weights: str = "entropy",
) -> dict[str, float]:
    """Every score from one forward pass with a graph over all of it; ``anchor`` counts from the prompt's end."""
    depth = model.config.num_hidden_layers
    layers = range(depth // 2 + 1, depth) if layers is None else layers
    head = model.get_output_embeddings().weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is head]
    name = next(name for name in names if "embed" not in name and "wte" not in name)
    own = head.detach().clone().requires_grad_(True)  # a variable of its own, also where embeddings are tied
    ids = torch.tensor([[*prompt, *answer]])
    out = torch.func.functional_call(
        model, {name: own}, (ids,), {"output_hidden_states": True, "use_cache": False}, tie_weights=False
    )
    logits = out.logits[0, len(prompt) - 1 : -1]
    logp = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).log_softmax(-1)
    chosen = logp[range(len(answer)), list(answer)]
    entropy = -(logp.exp() * logp).sum(-1).detach()
    weighted = -(entropy * chosen).sum()
    plain = -chosen.sum()
    states = [out.hidden_states[level] for level in layers]
    loss = weighted if weights == "entropy" else plain
    at = len(prompt) + anchor
    grads = [g[0, at] for g in torch.autograd.grad(loss, states, retain_graph=True)]
    semgrad = float(torch.cat(grads).abs().mean())
    paragrad = float(torch.autograd.grad(weighted, own, retain_graph=True)[0].abs().mean())
    exgrad = float(torch.autograd.grad(plain, own)[0].abs().mean())
    share = math.exp(-float(entropy.mean()))
    return {
        "semgrad": semgrad,
        "paragrad": paragrad,
        "exgrad": exgrad,
        "hybridgrad": (1 - share) * semgrad + share * paragrad,
        "mean_token_entropy": float(entropy.mean()),
        "max_token_entropy": float(entropy.max()),
        "sequence_nll": float(plain.detach()),
        "mean_nll": float(plain.detach()) / len(answer),
        "min_token_logprob": float(chosen.detach().min()),
    }


def loss_with_moved_state(
    model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], at: int, level: int, move: Tensor, weights: Tensor
) -> float:
    """ℓ(w) when ``move`` is added to h_{level} at position ``at``; for finite differences."""
    layer = model.get_decoder().get_submodule("layers" if hasattr(model.get_decoder(), "layers") else "h")[level - 1]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        moved = output.clone()
        moved[0, at] += move
        return moved

    handle = layer.register_forward_hook(add)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    finally:
        handle.remove()
    logp = logits.double().log_softmax(-1)
    return float(-(weights * logp[range(len(answer)), list(answer)]).sum())

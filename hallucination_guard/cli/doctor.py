"""``doctor``: whether this model can be guarded here."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hallucination_guard.cli.console import load, show, show_json
from hallucination_guard.cli.options import (
    AnchorQuestion,
    Command,
    DeviceMap,
    Dtype,
    Json,
    ModelChoice,
    ModelName,
    ProfilePath,
)

if TYPE_CHECKING:
    from hallucination_guard.model import WhiteBoxModel
    from hallucination_guard.values import Anchor, Prompt

__all__ = ["doctor", "register"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(doctor)


def doctor(
    prompt: Annotated[str, typer.Option("--prompt", help="What t* is shown in.")] = "What is the capital of France?",
    anchor_question: AnchorQuestion = None,
    model: ModelName = "demo",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    profile: ProfilePath = None,
    as_json: Json = False,
) -> int:
    """Say whether this model can be guarded here: t*, the self-test, the versions."""
    white = load(ModelChoice(name=model, device_map=device_map, dtype=dtype, profile=profile))
    read = white.prompt(prompt)
    anchor = white.anchor(read, anchor_question)
    context = None if anchor is None else _context(white, read, anchor)
    if as_json:
        show_json(_as_json(white, anchor, context))
    else:
        _print(white, anchor, context)
    return 0


def _context(model: WhiteBoxModel, prompt: Prompt, anchor: Anchor) -> str:
    tokens = [str(token) for token in model.tokenizer.convert_ids_to_tokens(list(prompt.token_ids))]
    at = len(tokens) + anchor.index
    before, after = tokens[max(0, at - 6) : at], tokens[at + 1 :]
    return f"… {' '.join(before)} [[{tokens[at]}]] {' '.join(after)}"


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers", "langchain-core")}


def _as_json(model: WhiteBoxModel, anchor: Anchor | None, context: str | None) -> dict[str, Any]:
    return {
        "model": model.name,
        "architecture": type(model.model).__name__,
        "device": str(model.device),
        "dtype": model.identity.dtype,
        "layers": model.layout.depth,
        "deep_layers": [model.deep_layers.start, model.deep_layers.stop - 1],
        "vocabulary": model.vocabulary,
        "context": model.context,
        "fingerprint": model.identity.fingerprint,
        "structure": model.identity.structure,
        "template": model.identity.template,
        "anchor": None if anchor is None else {"index": anchor.index, "token": anchor.token, "rule": anchor.rule},
        "anchor_context": context,
        "self_test": {
            "logit_error": model.self_test.logit_error,
            "gradient_norm": model.self_test.gradient_norm,
            "slope_error": model.self_test.slope_error,
        },
        "versions": _versions(),
    }


def _print(model: WhiteBoxModel, anchor: Anchor | None, context: str | None) -> None:
    from hallucination_guard.model.anchor import NO_ANCHOR

    test = model.self_test
    slope = "not taken below float32" if test.slope_error is None else f"{test.slope_error:.1e}"
    show(f"model      {model.name} ({type(model.model).__name__}, {model.layout.depth} layers)")
    show(f"device     {model.device}, {model.identity.dtype}, context {model.context}")
    show(f"deep half  h_{model.deep_layers.start} … h_{model.deep_layers.stop - 1}")
    if anchor is None:
        show(f"anchor t*  none: {NO_ANCHOR}")
    else:
        show(f"anchor t*  {anchor.token!r} at {anchor.index}, by the rule {anchor.rule!r}")
        show(f"           {context}")
    show(
        f"self-test  passed: logits differ by {test.logit_error:.1e}, "
        f"gradient norm {test.gradient_norm:.3g}, finite differences differ by {slope}"
    )
    show(f"versions   {', '.join(f'{name} {version}' for name, version in _versions().items())}")

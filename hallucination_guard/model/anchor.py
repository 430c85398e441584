"""The semantics-preserving token t*: where in the prompt the question's meaning sits.

Source: "Gradients with Respect to Semantics Preserving Embeddings Tell the Uncertainty of Large Language Models",
arXiv 2605.04638. The authors give a table of three models; here t* is measured, or found from the chat template:

1. there is a profile (:mod:`hallucination_guard.model.profile`) → what it measured;
2. the generation header starts with a special token → that token (ChatML, Llama 3, Gemma, Phi);
3. there is no header, or none that starts so → the last token of the last user text (Mistral);
4. there is no template → the caller names the question inside the raw text, and its last token is t*.

It is never guessed: where no rule holds there is no anchor, and what needs one says so.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from hallucination_guard.errors import AnchorError, InputError
from hallucination_guard.model.literal import encoded
from hallucination_guard.model.profile import Profile
from hallucination_guard.model.template import rendered
from hallucination_guard.model.tokenizer import Tokenizer
from hallucination_guard.values import Anchor, Prompt, Rule, question_of

__all__ = ["NO_ANCHOR", "end_of_user_text", "locate_anchor", "offsets_of"]

NO_ANCHOR = AnchorError(
    "this model has no chat template, so nothing says where the question ends",
    hint="name it: generate(prompt, question='the part of the prompt whose last token carries the meaning')",
)


def locate_anchor(
    tokenizer: Tokenizer, prompt: Prompt, *, question: str | None = None, profile: Profile | None = None
) -> Anchor | None:
    """Name t*; None when there is neither a profile, a template nor a ``question``.

    Args:
        tokenizer: of the model.
        prompt: what :func:`~hallucination_guard.model.template.render` wrote.
        question: a part of the prompt's text whose last token is to be t*; overrides the template's rule.
        profile: of this model and template; it comes first.

    Raises:
        AnchorError: if the question is not in the prompt, or the user's text cannot be found in it again; if the
            prompt does not end as those that the profile was measured on.
        InputError: if both a profile and a question name t*.
    """
    if profile is not None:
        if question is not None:
            # The model's identity says "measured with this profile"; a score of another t* must not pass under it.
            raise InputError(
                f"the question {question[:60]!r} names t*, and so does the model's profile",
                hint="leave out the question, or load the model without the profile",
            )
        return profile.anchor_in(prompt.token_ids, tokenizer.convert_ids_to_tokens(list(prompt.token_ids)))
    if question is not None:
        return _last_token_of(tokenizer, prompt, question, end_of_user_text(tokenizer, prompt), rule="question")
    if not prompt.templated:
        return None
    first = len(prompt.token_ids) - prompt.header
    if prompt.header and _is_special(tokenizer, prompt.token_ids[first]):
        return _anchor(tokenizer, prompt, first, rule="header")
    limit = end_of_user_text(tokenizer, prompt)
    return _last_token_of(tokenizer, prompt, question_of(prompt.messages), limit, rule="last_user_token")


def end_of_user_text(tokenizer: Tokenizer, prompt: Prompt) -> int:
    """Where in the prompt's text the last user turn ends.

    Looking for the turn's text is not enough: it may also stand in the template, or in an answer that repeats it. So
    the turn is replaced by two others that end differently; what these two prompts end with in common is the template's
    and comes after the turn, whatever the turn says.

    Raises:
        AnchorError: if what the template writes after the turn depends on it.
        InputError: if no turn is the user's.
    """
    if not prompt.templated:
        return len(prompt.text)
    last = max((at for at, turn in enumerate(prompt.messages) if turn.role == "user"), default=None)
    if last is None:
        raise InputError("no message has the role 'user'", hint="the last user message is what the answer is to")
    others = []
    for content in ("one", "two"):
        turns = list(prompt.messages)
        turns[last] = replace(turns[last], content=content)
        others.append(rendered(tokenizer, prompt, turns))
    ends = zip(*(reversed(other) for other in others), strict=False)
    after = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends))[::-1]
    if not prompt.text.endswith(after):
        raise AnchorError(
            "what the chat template writes after the user's text depends on that text, so its end cannot be found",
            hint="name the question yourself on a tokenizer without this template",
        )
    return len(prompt.text) - len(after)


def _is_special(tokenizer: Tokenizer, token_id: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token_id)
    return token_id in tokenizer.all_special_ids or bool(added is not None and added.special)


def _anchor(tokenizer: Tokenizer, prompt: Prompt, position: int, *, rule: Rule) -> Anchor:
    token = tokenizer.convert_ids_to_tokens(prompt.token_ids[position])
    return Anchor(index=position - len(prompt.token_ids), token=str(token), rule=rule)


def _last_token_of(tokenizer: Tokenizer, prompt: Prompt, part: str, limit: int, *, rule: Rule) -> Anchor:
    part = part.strip()
    if not part:
        raise InputError("the question is empty", hint="name the part of the prompt that asks")
    end = prompt.text.rfind(part, 0, limit) + len(part)
    if end < len(part):
        raise AnchorError(
            f"{part[:60]!r} does not occur in the prompt", hint="name a part of the prompt as it is written there"
        )
    covering = [at for at, (start, stop) in enumerate(offsets_of(tokenizer, prompt)) if start < end <= stop]
    if not covering:
        raise AnchorError(f"no token covers the end of {part[:60]!r}", hint="end the question with a visible character")
    return _anchor(tokenizer, prompt, covering[-1], rule=rule)


def offsets_of(tokenizer: Tokenizer, prompt: Prompt) -> list[tuple[int, int]]:
    """Which characters of the prompt's text each of its tokens stands for.

    Raises:
        AnchorError: if the tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise AnchorError(
            f"the tokenizer {type(tokenizer).__name__!r} cannot tell which token a character belongs to",
            hint="load the fast version of the tokenizer (use_fast=True)",
        )
    if prompt.literal:
        ids, offsets = encoded(tokenizer, prompt.text, prompt.literal)
    else:
        found = tokenizer(prompt.text, add_special_tokens=not prompt.templated, return_offsets_mapping=True)
        ids, offsets = tuple(found["input_ids"]), list(found["offset_mapping"])
    if ids != prompt.token_ids:
        raise AnchorError(
            "the rendered prompt tokenizes differently the second time, so no token can be named",
            hint="report the tokenizer; or name the question yourself on a tokenizer without such a template",
        )
    return [(start, stop) for start, stop in offsets]

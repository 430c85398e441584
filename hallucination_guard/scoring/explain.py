"""Why an answer scores as it does: its shaky sentences and tokens, and the words of the question it depends on.

:func:`explain` gives the numbers as values; :meth:`Explanation.to_html` one page of them that needs nothing else: no
script, no network, no other file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any, Literal, TypeAlias, assert_never

from hallucination_guard.errors import AnchorError, ScoringError
from hallucination_guard.model.white_box import WhiteBoxModel
from hallucination_guard.scoring.gradients import GradientSettings
from hallucination_guard.scoring.scorers import HybridGrad
from hallucination_guard.scoring.sensitivity import Word, question_sensitivity
from hallucination_guard.scoring.spans import Span, semgrad_by_span
from hallucination_guard.scoring.token_texts import token_texts
from hallucination_guard.values import Generation, Score, question_of

__all__ = ["Explanation", "Token", "explain"]

Doubt: TypeAlias = Literal["none", "some", "much", "most"]

# In nats; e^H is the number of equally likely words that would be as uncertain: below 1.6, to 4.5, to 20, beyond.
_SOME, _MUCH, _MOST = 0.5, 1.5, 3.0
_WHOLE = 20  # characters
_SHADE = 0.6  # opacity of the strongest shade: text stays readable on it in light and dark
_WHAT = {
    "semgrad": "how much the answer depends on the exact state at the question's meaning",
    "paragrad": "how much it pulls at the weights of the head",
    "exgrad": "the same, every token counting alike",
    "hybridgrad": "SemGrad where the model hesitates, ParaGrad where it is sure",
    "mean_token_entropy": "mean uncertainty of a token, nats",
    "max_token_entropy": "that of the least certain one",
    "sequence_nll": "−log of the answer's probability",
    "mean_nll": "the same for a token",
    "min_token_logprob": "log probability of the least likely token; here lower is less certain",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of the answer.

    Args:
        text: what it adds to the text; empty for a special token, or where it only begins a character.
        entropy: ω_t in nats.
        logprob: log p_t[ŷ_t].
    """

    text: str
    entropy: float
    logprob: float

    @property
    def doubt(self) -> Doubt:
        """How uncertain the model was here, in four steps of the entropy (bounds 0.5, 1.5 and 3 nats)."""
        if self.entropy < _SOME:
            return "none"
        if self.entropy < _MUCH:
            return "some"
        return "much" if self.entropy < _MOST else "most"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What in an answer is shaky, and what in the question it is sensitive to.

    Args:
        model: its name.
        question: the last user message.
        words: of the question; empty where the chat template rewrote it, so that its tokens cannot be found.
        spans: the sentences of the answer; their shares add up to ``score.scores["semgrad"]``.
        tokens: of the answer.
        score: of the whole answer.
    """

    model: str
    question: str
    words: tuple[Word, ...]
    spans: tuple[Span, ...]
    tokens: tuple[Token, ...]
    score: Score

    @property
    def shaky(self) -> tuple[Span, ...]:
        """The sentences that have more than an even part of SemGrad; none where there is one sentence only.

        This compares the sentences of one answer; whether the answer as a whole is to be trusted, a policy says.
        """
        even = self.score.scores["semgrad"] / len(self.spans)
        return tuple(span for span in self.spans if len(self.spans) > 1 and span.share > even)

    def part(self, span: Span) -> float:
        """The span's share of SemGrad as a fraction of it; 0 where SemGrad is 0."""
        whole = self.score.scores["semgrad"]
        return span.share / whole if whole else 0.0

    def to_html(self, *, note: str = "") -> str:
        """One self-contained page.

        Args:
            note: a line above the answer, for example what was decided about it.
        """
        return _PAGE.format(
            style=_STYLE,
            model=escape(self.model),
            note=f'<p class="note">{escape(note)}</p>' if note else "",
            question=self._question(),
            answer="".join(self._sentence(number, span) for number, span in enumerate(self.spans, 1)),
            sentences="".join(self._sentence_row(number, span) for number, span in enumerate(self.spans, 1)),
            words="".join(self._word_rows()),
            tokens="".join(self._token_row(number, token) for number, token in enumerate(self.tokens, 1)),
            scores="".join(_row(name, f"{value:.4g}", _WHAT.get(name, "")) for name, value in self._scores()),
            anchor=escape(f"{self.score.anchor.token!r} at {self.score.anchor.index}" if self.score.anchor else "none"),
        )

    def _scores(self) -> Iterable[tuple[str, float]]:
        return self.score.scores.items()

    def _question(self) -> str:
        text = self.question.strip()
        if not self.words:
            return escape(text) + '<br><small class="why">The chat template rewrote it: no words to shade.</small>'
        most = max(word.sensitivity for word in self.words) or 1.0
        parts, at = [], 0
        for word in self.words:
            shade = word.sensitivity / most
            title = f"sensitivity {word.sensitivity:.3g}, {shade:.0%} of the strongest word's"
            parts.append(escape(text[at : word.start]))
            parts.append(f'<mark class="word"{_shade(shade)} title="{title}">{escape(word.text)}</mark>')
            at = word.start + len(word.text)
        return "".join(parts) + escape(text[at:])

    def _sentence(self, number: int, span: Span) -> str:
        part = self.part(span)
        label = f"sentence {number}: {part:.0%} of SemGrad{', shaky' if span in self.shaky else ''}"
        tokens = "".join(self._token(token) for token in self.tokens[span.start : span.stop])
        # The blanks around a sentence belong to its tokens; shade and number stand close to its words all the same.
        inside = tokens.strip()
        at = tokens.index(inside)
        before, after = tokens[:at], tokens[at + len(inside) :]
        warning = " ⚠" if span in self.shaky else ""
        return (
            f'{before}<mark class="sentence"{_shade(part)} title="{label}">{inside}</mark>'
            f'<sup title="{label}">{number}{warning}</sup>{after}'
        )

    def _token(self, token: Token) -> str:
        if not token.text:
            return ""
        text = escape(token.text)
        bare = token.text.lstrip()
        if token.doubt == "none" or not bare:
            return text
        before = escape(token.text[: len(token.text) - len(bare)])
        after = escape(token.text[len(token.text.rstrip()) :])
        title = f"entropy {token.entropy:.2f} nats, log p {token.logprob:.2f}"
        return f'{before}<span class="{token.doubt}" title="{title}">{escape(token.text.strip())}</span>{after}'

    def _sentence_row(self, number: int, span: Span) -> str:
        shaky = "shaky" if span in self.shaky else ""
        return _row(f"{number}", f"{self.part(span):.0%}", shaky, f"{span.semgrad:.4g}", span.text.strip())

    def _word_rows(self) -> Iterable[str]:
        most = max((word.sensitivity for word in self.words), default=0.0) or 1.0
        for word in sorted(self.words, key=lambda word: -word.sensitivity):
            yield _row(word.text, f"{word.sensitivity:.3g}", f"{word.sensitivity / most:.0%}")

    def _token_row(self, number: int, token: Token) -> str:
        doubt = "" if token.doubt == "none" else token.doubt
        return _row(f"{number}", repr(token.text), f"{token.entropy:.2f}", f"{token.logprob:.2f}", doubt)


def explain(
    model: WhiteBoxModel,
    generation: Generation,
    settings: GradientSettings = GradientSettings(),  # noqa: B008 - frozen
    *,
    score: Score | None = None,
) -> Explanation:
    """Measure an answer whole, by sentence, by token and by word of its question.

    Args:
        model: the :class:`~hallucination_guard.WhiteBoxModel` that the generation belongs to.
        generation: from ``model.generate`` or ``model.read``, with an anchor.
        settings: as for the scorers.
        score: of this very generation by a gradient scorer, where it is at hand; its settings are then used.

    Raises:
        AnchorError: if the generation has no anchor.
        ScoringError: if there is nothing to measure, a number is not finite, or the generation is another model's or
            not the one that was scored.
    """
    if score is None:
        score = HybridGrad(**{name: getattr(settings, name) for name in asdict(settings)})(model, generation)
    elif score.status == "scored":
        settings = _settings_of(score, generation)
    match score.status:
        case "scored":
            pass
        case "unscorable" | "error":
            raise ScoringError(score.reason, hint="there is nothing to explain")
        case never:
            assert_never(never)
    try:
        words = question_sensitivity(model, generation, settings)
    except AnchorError:  # the score above has one, so this is about the question's text alone
        words = ()
    texts = token_texts(model.tokenizer, generation.response_token_ids)
    return Explanation(
        model=model.name,
        question=question_of(generation.messages),
        words=words,
        spans=semgrad_by_span(model, generation, settings=settings),
        tokens=tuple(
            Token(text=text, entropy=entropy, logprob=logprob)
            for text, entropy, logprob in zip(texts, score.token_entropies, score.token_logprobs, strict=True)
        ),
        score=score,
    )


def _settings_of(score: Score, generation: Generation) -> GradientSettings:
    if "semgrad" not in score.scores or len(score.token_logprobs) != len(generation.response_token_ids):
        raise ScoringError(
            f"a score by {score.scorer.name!r} of {len(score.token_logprobs)} tokens does not belong to this answer of "
            f"{len(generation.response_token_ids)}, or has no gradient",
            hint="leave it out, or give the score that HybridGrad gave this generation",
        )
    known = {each.name for each in fields(GradientSettings)}
    own: dict[str, Any] = {
        name.removeprefix("gradient_"): value
        for name, value in score.scorer.settings.items()
        if name.removeprefix("gradient_") in known
    }
    return GradientSettings(**own)


def _shade(amount: float) -> str:
    # The root: among many sentences a third of the whole is much, and would hardly be seen.
    return f' style="--shade:{_SHADE * min(1.0, max(0.0, amount)) ** 0.5:.3f}"'


def _row(*cells: str) -> str:
    # A number or a label stays in one piece, whatever the table's width.
    whole = [' class="whole"' if len(cell) <= _WHOLE else "" for cell in cells]
    inside = "".join(f'<td dir="auto"{kind}>{escape(cell)}</td>' for kind, cell in zip(whole, cells, strict=True))
    return f"<tr>{inside}</tr>\n"


_STYLE = """
:root { color-scheme: light dark; --hot: 230 95 20; --cool: 40 120 220; --line: light-dark(#c4c4c4, #555); }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; }
h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .3rem 0; }
.why, caption, .legend { color: light-dark(#555, #aaa); font-size: .85rem; }
.note { border-left: 4px solid rgb(var(--hot)); padding-left: .7rem; margin: .8rem 0; }
.text { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.9; }
mark { color: inherit; border-radius: 3px; padding: .1em 0; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
mark.sentence { background: rgb(var(--hot) / var(--shade)); }
mark.word { background: rgb(var(--cool) / var(--shade)); padding: .1em .15em; }
sup { font-size: .7em; line-height: 0; margin-left: .15em; }
.some, .much, .most { text-decoration: underline; text-underline-offset: .25em; text-decoration-skip-ink: none; }
.some { text-decoration-style: dotted; }
.much { text-decoration-style: dashed; text-decoration-thickness: 2px; }
.most { text-decoration-style: double; text-decoration-thickness: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
td.whole { white-space: nowrap; }
thead th { border-top: 0; white-space: nowrap; }
details { margin-top: .8rem; }
summary { cursor: pointer; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What is shaky in this answer</title>
<style>{style}</style>
</head>
<body>
<h1>What is shaky in this answer</h1>
<p class="why">by {model}</p>
{note}
<h2>Question</h2>
<div class="text" dir="auto">{question}</div>
<p class="legend">Shade: how sensitive the answer is to a word, compared with the word it is most sensitive to.</p>
<h2>Answer</h2>
<div class="text" dir="auto">{answer}</div>
<p class="legend">Shade: a sentence's share of the answer's SemGrad; ⚠ more than an even share.
Underline: the model wavered at this token: <span class="some">some</span> (entropy from 0.5 nats),
<span class="much">much</span> (from 1.5), <span class="most">most</span> (from 3).
The shades compare this answer's sentences with one another; they do not say that the rest is true.</p>
<table>
<caption>The shares add up to SemGrad; a negative one pulls the other way. “Alone”: SemGrad of that sentence
only.</caption>
<thead><tr><th scope="col">#</th><th scope="col">share</th><th scope="col">mark</th><th scope="col">alone</th>
<th scope="col">sentence</th></tr></thead>
<tbody>
{sentences}</tbody>
</table>
<h2>Scores</h2>
<table>
<caption>Higher is less certain, unless said otherwise. Anchor t*: {anchor}.</caption>
<thead><tr><th scope="col">score</th><th scope="col">value</th><th scope="col">what it is</th></tr></thead>
<tbody>
{scores}</tbody>
</table>
<details>
<summary>The question's words by sensitivity</summary>
<table>
<thead><tr><th scope="col">word</th><th scope="col">sensitivity</th><th scope="col">of the strongest</th></tr></thead>
<tbody>
{words}</tbody>
</table>
</details>
<details>
<summary>The answer's tokens</summary>
<table>
<thead><tr><th scope="col">#</th><th scope="col">token</th><th scope="col">entropy (nats)</th>
<th scope="col">log p</th><th scope="col">wavered</th></tr></thead>
<tbody>
{tokens}</tbody>
</table>
</details>
</body>
</html>
"""

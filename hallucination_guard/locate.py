"""Where in the prompt the meaning of a question sits: the Semantic Preservation Score, measured.

Source: "Gradients with Respect to Semantics Preserving Embeddings Tell the Uncertainty of Large Language Models",
arXiv 2605.04638. h_{l,t} is the residual stream after layer l (h_0: what enters the first) at prompt position t. Every
query is asked in several wordings, and

    SPS(l, t) = S_within(l, t) − S_across(l, t),

where S_within is the mean cosine similarity of h_{l,t} over all pairs of wordings of one query, and S_across over all
pairs of different queries. Averaged over the deep half, its largest value says where t* is.

In small models the cosine is drowned by a direction that all states share: what all wordings have in common at the
template's tokens hides what they differ in, and tokens of the question win for their letters. So there are three views:

- ``raw``: SPS as above;
- ``centred``: SPS after the mean state of each (l, t) was subtracted; this one chooses, unless another is asked for;
- ``nearest``: the share of wordings whose nearest neighbour (cosine, centred) among all others asks the same query.

A state cannot hold the meaning of a question that it has not read to its end: only positions from the question's last
token on can be chosen. Nor is the prompt's last token chosen while there is another: the answer's first word is read
from its deep states, so wordings are alike there because their answers are. (SmolLM2-135M, 184 questions: SPS is
highest there and the AUROC of SemGrad .52, against .59 to .63 elsewhere; 152 SciQ answers, 14 of them right, show
nothing.) What can not be chosen is shown.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from hallucination_guard.anchor import locate_anchor
from hallucination_guard.errors import ConfigurationError, InputError, MissingExtra, ScoringError
from hallucination_guard.profile import Place, Profile, View, template_under
from hallucination_guard.questions import contains_match
from hallucination_guard.replay import replay
from hallucination_guard.scoring import GradientSettings
from hallucination_guard.scoring.gradients import check_felt, walk_head
from hallucination_guard.template import Prompt
from hallucination_guard.types import Anchor, Generation, ModelIdentity
from hallucination_guard.view import copy_of, tapped, undisturbed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hallucination_guard.model import WhiteBoxModel

__all__ = [
    "Group",
    "Likeness",
    "Located",
    "Predicted",
    "auroc",
    "draw",
    "likeness",
    "locate",
    "predict",
    "read_groups",
    "shipped_groups",
    "spearman",
]

VIEWS: tuple[View, ...] = get_args(View)
_PLAIN = "{query}"
_BATCH = 16
_NOTHING = 1e-6  # of a state's length: what is left of states that are all the same, after their mean was subtracted


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One query in several wordings.

    Args:
        query: the first wording.
        paraphrases: the others.
        answers: every form of answer that counts as right; needed only to check the choice on labels.
    """

    query: str
    paraphrases: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        """All of them, none twice."""
        return tuple(dict.fromkeys((self.query, *self.paraphrases)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike the states of one (layer, position) are within queries and across, in the three views."""

    raw: float
    centred: float
    nearest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """What was measured, and what it says.

    Args:
        model: which model, without any profile that it was loaded with.
        positions: −1, −2, …: counted from the end of the prompt.
        tokens: at each position, as the tokenizer writes them, in the first prompt.
        shared: for each position, whether all prompts have that token there.
        layers: the l whose mean chooses.
        table: by view, layer (0 … L) and position.
        read: how many positions, from −1 on, have read the question to its end in every prompt.
        view: the view that chose.
        template: what the chat template's own rule names; None without a template.
        tail: the ids that all prompts end with after the question, the last one last.
        prompt: what the queries were put into; has ``{query}``.
        queries: how many.
        prompts: n, their wordings all together.
        data: hash of the wordings.
    """

    model: ModelIdentity
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    shared: tuple[bool, ...]
    layers: range
    table: Mapping[View, tuple[tuple[float, ...], ...]]
    read: int
    view: View
    template: Anchor | None
    tail: tuple[int, ...]
    prompt: str
    queries: int
    prompts: int
    data: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", MappingProxyType(dict(self.table)))

    def by_position(self, view: View) -> tuple[float, ...]:
        """The mean over the deep half, at each position."""
        rows = [self.table[view][layer] for layer in self.layers]
        return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))

    @property
    def candidates(self) -> range:
        """Which of the positions are chosen from: those that have read the question and do not yet speak the answer."""
        return range(min(1, self.read - 1), self.read)

    def choice(self, view: View) -> int:
        """The position that this view chooses, counted from the end."""
        values = self.by_position(view)
        return self.positions[max(self.candidates, key=values.__getitem__)]

    @property
    def chosen(self) -> int:
        """t*, counted from the end of the prompt."""
        return self.choice(self.view)

    @property
    def agree(self) -> bool:
        """Whether all views choose the same position."""
        return len({self.choice(view) for view in VIEWS}) == 1

    def profile(self, *, anchor: int | None = None) -> Profile:
        """The choice, to be kept.

        Args:
            anchor: another of the positions, where labels speak for it; by default the chosen one.

        Raises:
            ConfigurationError: if nothing was measured there, or it comes before the question's end.
        """
        index = self.chosen if anchor is None else anchor
        if index not in self.positions[: self.read]:
            raise ConfigurationError(
                f"position {index!r} can not be t*", hint=f"choose from {list(self.positions[: self.read])}"
            )
        values = {view: self.by_position(view) for view in VIEWS}
        return Profile(
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype,
            template=self.model.template,
            anchor=index,
            tail=self.tail[max(0, len(self.tail) + index) :],
            view=self.view if index == self.chosen else "caller",
            layers=(self.layers[0], self.layers[-1]),
            table=tuple(
                Place(index=position, **{view: round(values[view][at], 4) for view in VIEWS})
                for at, position in enumerate(self.positions)
            ),
            prompt=self.prompt,
            queries=self.queries,
            prompts=self.prompts,
            data=self.data,
        )

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data, every layer included."""
        return {
            "model": {
                "name": self.model.name,
                "fingerprint": self.model.fingerprint,
                "dtype": self.model.dtype,
                "template": self.model.template,
            },
            "queries": self.queries,
            "prompts": self.prompts,
            "data": self.data,
            "prompt": self.prompt,
            "deep_layers": list(self.layers),
            "positions": [
                {
                    "index": position,
                    "token": self.tokens[at],
                    "same_in_all_prompts": self.shared[at],
                    "has_read_the_question": at < self.read,
                    "chosen_from": at in self.candidates,
                    **{view: self.by_position(view)[at] for view in VIEWS},
                }
                for at, position in enumerate(self.positions)
            ],
            "choices": {view: self.choice(view) for view in VIEWS},
            "views_agree": self.agree,
            "template_rule": None
            if self.template is None
            else {"index": self.template.index, "token": self.template.token, "rule": self.template.rule},
            "view": self.view,
            "chosen": self.chosen,
            "layers": {view: [list(row) for row in self.table[view]] for view in VIEWS},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """How well SPS foretold where the gradient tells wrong answers from right ones.

    Args:
        positions: as in :class:`Located`.
        auroc: of SemGrad at each position, for wrong answers.
        rank_correlation: by view, Spearman's ρ between SPS and AUROC over the positions that are chosen from; None
            where one of them is the same everywhere.
        answers: how many were judged; empty ones are not.
        wrong: how many of them were wrong.
        judge: what judged.
    """

    positions: tuple[int, ...]
    auroc: tuple[float, ...]
    rank_correlation: Mapping[View, float | None]
    answers: int
    wrong: int
    judge: str = "contains"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_correlation", MappingProxyType(dict(self.rank_correlation)))

    @property
    def margin(self) -> float:
        """The standard error of an AUROC of ½ with so many right and wrong answers: less than that is no difference."""
        right = self.answers - self.wrong
        return math.sqrt((self.answers + 1) / (12 * right * self.wrong))

    def to_json_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "judge": self.judge,
            "answers": self.answers,
            "wrong": self.wrong,
            "auroc": dict(zip(map(str, self.positions), self.auroc, strict=True)),
            "auroc_standard_error": self.margin,
            "rank_correlation": dict(self.rank_correlation),
        }


# ------------------------------------------------------------------------------------------------------------- data


def shipped_groups() -> list[Group]:
    """The package's own 40 queries in five wordings each."""
    with resources.as_file(resources.files("hallucination_guard").joinpath("data/paraphrases.jsonl")) as path:
        return read_groups(path)


def read_groups(path: str | Path, *, labelled: bool = False) -> list[Group]:
    """Read queries: a JSON object a line with ``query``, ``paraphrases`` and ``answers`` (or ``truthful answer``).

    Args:
        path: of the file.
        labelled: whether every row must have answers; else every row must have paraphrases.

    Raises:
        InputError: naming file and line of what can not be used.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{str(path)!r} can not be read: {error.strerror}", hint="give a readable file") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            group = _group(line, f"line {number} of {path}")
            if labelled and not group.answers:
                raise InputError(f"line {number} of {path} has no answers", hint="add 'answers', a list of texts")
            if not labelled and len(group.wordings) < 2:
                raise InputError(
                    f"line {number} of {path} has no paraphrases", hint="add 'paraphrases', a list of texts"
                )
            found.append(group)
    return found


def _group(line: bytes, where: str) -> Group:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}", hint="one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is {str(row)[:60]!r}, not an object", hint="give query and paraphrases")
    query = row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{where} has the query {query!r}", hint="a query is a text")
    lists = {"paraphrases": row.get("paraphrases", []), "answers": row.get("answers", row.get("truthful answer", []))}
    for name, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where} has {name} {str(texts)[:60]!r}", hint=f"{name} are a list of texts")
    if not all(text.strip() for text in lists["paraphrases"]):
        raise InputError(f"{where} has an empty paraphrase", hint="leave it out")
    answers = tuple(text for text in lists["answers"] if text.strip())  # published sets have empty ones
    return Group(query=query, paraphrases=tuple(lists["paraphrases"]), answers=answers)


# -------------------------------------------------------------------------------------------------------- measuring


def likeness(states: Tensor, owners: Sequence[int]) -> Likeness:
    """The three views of one (layer, position).

    The mean cosine over all pairs is read off sums of unit vectors: Σ_{i≠j} u_i·u_j = ‖Σ_i u_i‖² − Σ_i ‖u_i‖². That
    takes n steps, not n²; only the nearest neighbours need every pair.

    Args:
        states: n × d.
        owners: for each, the number of its query.

    Raises:
        InputError: if there are not two queries, or no query with two wordings.
    """
    queries = {owner: row for row, owner in enumerate(dict.fromkeys(owners))}
    if not 2 <= len(queries) < len(owners):
        raise InputError(
            f"{len(owners)} wordings of {len(queries)} queries can not be compared",
            hint="give two queries or more, each in two wordings or more",
        )
    own = torch.tensor([queries[owner] for owner in owners])
    states = states.to(torch.float64)
    centred = states - states.mean(dim=0)
    lengths = states.norm(dim=1)
    # What is left of states that are all the same is rounding, which has a direction too.
    centred[centred.norm(dim=1) <= _NOTHING * lengths] = 0.0
    units = _units(centred)
    return Likeness(raw=_sps(_units(states), own), centred=_sps(units, own), nearest=_own_nearest(units, own))


def _units(states: Tensor) -> Tensor:
    lengths = states.norm(dim=1, keepdim=True)
    return states / torch.where(lengths > 0, lengths, 1.0)


def _sps(units: Tensor, own: Tensor) -> float:
    sizes = torch.bincount(own)
    sums = torch.zeros(len(sizes), units.shape[1], dtype=units.dtype).index_add_(0, own, units)
    within = sums.square().sum()
    pairs = (sizes * (sizes - 1)).sum()
    others = len(own) ** 2 - sizes.square().sum()
    across = units.sum(dim=0).square().sum() - within
    return float((within - units.square().sum()) / pairs - across / others)


def _own_nearest(units: Tensor, own: Tensor) -> float:
    like = units @ units.T
    like.fill_diagonal_(-math.inf)
    # A state with nothing of its own is nobody's neighbour, and has none.
    there = units.any(dim=1)
    return float(((own[like.argmax(dim=1)] == own) & there).to(torch.float64).mean())


def locate(
    model: WhiteBoxModel,
    groups: Sequence[Group],
    *,
    positions: int = 10,
    prompt: str | None = None,
    view: View = "centred",
    progress: Callable[[int], None] | None = None,
) -> Located:
    """Measure where the meaning of a question sits in this model's prompts.

    Held in memory are the states of all layers at the last positions: n · (L+1) · positions · d values of the model's
    own dtype.

    Args:
        model: any; a profile that it was loaded with plays no part.
        groups: two queries or more, each in two wordings or more.
        positions: how many, from the end of the prompt.
        prompt: what every query is put into, with ``{query}``; by default the query alone. A model without a chat
            template reads it as it is.
        view: which of the three chooses.
        progress: is told how many prompts are done.

    Raises:
        InputError: if there is too little to compare, or a prompt is shorter than ``positions``.
        ConfigurationError: if ``prompt`` has no ``{query}``, or there is no such view.
        AnchorError: if the end of a question can not be found in its prompt.
        ScoringError: if a state is not finite.
    """
    form = _PLAIN if prompt is None else prompt
    if _PLAIN not in form:
        raise ConfigurationError(f"the prompt {form!r} has no {_PLAIN}", hint="say where the query goes")
    if view not in VIEWS:
        raise ConfigurationError(f"view is {view!r}", hint=f"one of {', '.join(map(repr, VIEWS))}")
    if positions < 1:
        raise ConfigurationError(f"positions is {positions!r}", hint="look at one position at least")
    for group in groups:
        if len(group.wordings) < 2:
            raise InputError(f"{group.query!r} has one wording", hint="give it a paraphrase")
    if len(groups) < 2:
        raise InputError(f"{len(groups)} queries can not be told apart", hint="give two or more")
    asked = [(at, wording) for at, group in enumerate(groups) for wording in group.wordings]
    owners = [at for at, _ in asked]
    prompts = [model.prompt(_asked(form, wording)) for _, wording in asked]
    for (_, wording), each in zip(asked, prompts, strict=True):
        if len(each.token_ids) < positions:
            raise InputError(
                f"the prompt of {wording!r} has {len(each.token_ids)} tokens, fewer than the {positions} positions",
                hint="look at fewer positions, or put the query into a longer prompt",
            )
    layers = GradientSettings().deep(model.layout.depth)
    ends = [_end_of(model.tokenizer, each, wording) for (_, wording), each in zip(asked, prompts, strict=True)]
    read = min(positions, *ends)
    states = _states(model, prompts, positions, progress)
    if not states.isfinite().all():
        raise ScoringError(
            f"a state of {model.name!r} is not finite in {model.identity.dtype}", hint="load it in float32 or bfloat16"
        )
    cells = [[likeness(at, owners) for at in layer] for layer in states]
    ids = [[each.token_ids[-at] for each in prompts] for at in range(1, positions + 1)]
    shared = tuple(len(set(column)) == 1 for column in ids)
    after = next((at for at, same in enumerate(shared) if not same), positions)
    tail = tuple(prompts[0].token_ids[len(prompts[0].token_ids) - min(after, read - 1) :])
    identity = replace(model.identity, template=template_under(model.identity.template))
    return Located(
        model=identity,
        positions=tuple(range(-1, -positions - 1, -1)),
        tokens=tuple(map(str, model.tokenizer.convert_ids_to_tokens([column[0] for column in ids]))),
        shared=shared,
        layers=layers,
        table={each: tuple(tuple(getattr(cell, each) for cell in row) for row in cells) for each in VIEWS},
        read=read,
        view=view,
        template=locate_anchor(model.tokenizer, prompts[0]),
        tail=tail,
        prompt=form,
        queries=len(groups),
        prompts=len(prompts),
        data=hashlib.sha256(json.dumps([group.wordings for group in groups]).encode()).hexdigest()[:16],
    )


def _asked(form: str, wording: str) -> str:
    return form.replace(_PLAIN, wording)


def _end_of(tokenizer: Any, prompt: Prompt, wording: str) -> int:
    """How many tokens of the prompt are left from the question's last one on, that included."""
    anchor = locate_anchor(tokenizer, prompt, question=wording)
    assert anchor is not None  # a question was named
    return -anchor.index


def _states(
    model: WhiteBoxModel, prompts: Sequence[Prompt], positions: int, progress: Callable[[int], None] | None
) -> Tensor:
    """h_{l,t} of all prompts: (L+1) × positions × n × d, position −1 first, in the model's dtype, on the CPU."""
    depth = model.layout.depth
    kept: Tensor | None = None
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at].token_ids))
    pad = int(model.tokenizer.pad_token_id or 0)
    for begin in range(0, len(order), _BATCH):
        batch = order[begin : begin + _BATCH]
        rows = [prompts[at].token_ids for at in batch]
        width = max(map(len, rows))
        columns = torch.tensor([[len(row) - 1 - at for at in range(positions)] for row in rows])
        seen: dict[int, Tensor] = {}
        view = model.layout.view(model.model, _watched(model, columns, seen))
        # Padding stands on the right, where causality hides it: no mask, and positions count from 0 of themselves.
        ids = torch.tensor([(*row, *[pad] * (width - len(row))) for row in rows], device=model.device)
        with undisturbed(model.model, grad=False):
            model.layout.decoder_of(view)(input_ids=ids, use_cache=False)
        if kept is None:
            kept = torch.empty(depth + 1, positions, len(prompts), seen[0].shape[-1], dtype=seen[0].dtype)
        for level, states in seen.items():
            kept[level, :, batch] = states.transpose(0, 1)
        if progress is not None:
            progress(begin + len(batch))
    assert kept is not None  # there are prompts
    return kept


def _watched(model: WhiteBoxModel, columns: Tensor, seen: dict[int, Tensor]) -> dict[int, Any]:
    """The layers, whose states at these columns are put into ``seen``, by level."""

    def at(level: int) -> Callable[[Tensor], None]:
        def see(states: Tensor) -> None:
            where = columns.to(states.device)
            picked = states[torch.arange(len(where), device=states.device)[:, None], where]
            seen[level] = picked.detach().cpu()

        return see

    modules = model.layout.list_of(model.model)
    watched: dict[int, Any] = {level - 1: tapped(modules[level - 1], at(level)) for level in range(1, len(modules) + 1)}
    watched[0] = _entered(watched[0], at(0))
    return watched


def _entered(layer: Any, see: Callable[[Tensor], None]) -> Any:
    """``layer``, whose input states ``see`` is shown."""

    def hook(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(args[0] if args else named["hidden_states"])

    clone = copy_of(layer)
    for table in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        clone.__dict__[table] = getattr(layer, table).copy()
    clone.register_forward_pre_hook(hook, with_kwargs=True)
    return clone


# ------------------------------------------------------------------------------------------------- against the labels


def predict(
    model: WhiteBoxModel,
    groups: Sequence[Group],
    located: Located,
    *,
    max_new_tokens: int = 24,
    batch: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Predicted:
    """Ask labelled questions, and see at which position SemGrad tells wrong answers from right ones.

    Args:
        model: the one that was measured.
        groups: each with answers; their first wording is asked, greedily.
        located: what SPS says.
        max_new_tokens: of an answer.
        batch: how many at once.
        progress: is told how many answers are scored.

    Raises:
        InputError: if a question has no answers, or the answers are all right or all wrong.
        ConfigurationError: if another model was measured.
        ScoringError: if a gradient is not finite, or nil where it can not be.
    """
    identity = replace(model.identity, template=template_under(model.identity.template), name=located.model.name)
    if identity != located.model:
        raise ConfigurationError(
            f"{model.name!r} is not the model that was measured, {located.model.name!r}", hint="locate with this model"
        )
    answered: list[tuple[Generation, bool]] = []
    for begin in range(0, len(groups), batch):
        some = groups[begin : begin + batch]
        if any(not group.answers for group in some):
            raise InputError("a labelled question has no answers", hint="add 'answers', a list of texts")
        asked = [_asked(located.prompt, group.query) for group in some]
        for group, generation in zip(some, model.generate(asked, max_new_tokens=max_new_tokens), strict=True):
            generation.release()  # it was kept for another t*
            if generation.response_token_ids:
                answered.append((generation, contains_match(generation.text, group.answers)))
    wrong = [not right for _, right in answered]
    if len(set(wrong)) < 2:
        raise InputError(
            f"of {len(wrong)} answers {sum(wrong)} are wrong, so nothing can be told apart",
            hint="give labelled questions of which the model gets some right and some wrong",
        )
    found: list[list[float]] = []
    for begin in range(0, len(answered), batch):
        found += _semgrad_everywhere(
            model, [generation for generation, _ in answered[begin : begin + batch]], located.positions
        )
        if progress is not None:
            progress(len(found))
    by_position = tuple(auroc(values, wrong) for values in zip(*found, strict=True))
    return Predicted(
        positions=located.positions,
        auroc=by_position,
        rank_correlation={
            view: spearman(
                [located.by_position(view)[at] for at in located.candidates],
                [by_position[at] for at in located.candidates],
            )
            for view in VIEWS
        },
        answers=len(answered),
        wrong=sum(wrong),
    )


def _semgrad_everywhere(
    model: WhiteBoxModel, generations: Sequence[Generation], positions: Sequence[int]
) -> list[list[float]]:
    """SemGrad of each answer as if t* were at each of the positions, by one backward for all of them."""
    settings = GradientSettings()
    layers = settings.deep(model.layout.depth)
    traces = []
    for generation in generations:
        length = len(generation.prompt_token_ids)
        if length < -min(positions):
            raise InputError(
                f"a labelled prompt has {length} tokens and none at position {min(positions)}",
                hint="look at fewer positions",
            )
        ids = (*generation.prompt_token_ids, *generation.response_token_ids)
        traces.append(model.trace_ids(ids, length + min(positions), layers))
    with undisturbed(model.model, grad=True):
        run = replay(model.model, model.layout, traces, layers)
        head = model.head
        upstream = torch.zeros_like(run.final)
        for row, (trace, generation) in enumerate(zip(traces, generations, strict=True)):
            stop = trace.states.shape[0]
            rows = slice(stop - len(generation.response_token_ids), stop)
            states = run.final[row, rows].detach().to(head.dtype)
            walk = walk_head(head, states, generation.response_token_ids, weighting=settings.weighting)
            upstream[row, rows] = walk.by_states.to(upstream)
        gradients = torch.autograd.grad(run.final, run.states, grad_outputs=upstream)
    width = len(layers) * run.final.shape[-1]
    columns = []
    for position in positions:
        there = [replace(each, anchor=Anchor(index=position, token="", rule="profile")) for each in generations]
        moved = replace(run, rows=run.rows + position - min(positions))
        by_layer = moved.at_anchor(gradients).abs().sum(dim=2)
        if not by_layer.isfinite().all():
            raise ScoringError(f"a gradient at position {position} is not finite", hint="load the model in float32")
        check_felt(model, there, layers, by_layer, upstream)
        columns.append((by_layer.sum(dim=0) / width).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive has the higher score; ties count half.

    Raises:
        InputError: if one of the two kinds is missing.
    """
    many, rest = sum(positive), len(positive) - sum(positive)
    if not many or not rest:
        raise InputError(f"{many} of {len(positive)} are positive", hint="both kinds are needed")
    ranks = _ranks(scores)
    above = math.fsum(rank for rank, is_positive in zip(ranks, positive, strict=True) if is_positive)
    return (above - many * (many + 1) / 2) / (many * rest)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation; None where one side is the same everywhere."""
    first, second = _ranks(one), _ranks(other)
    middle = (len(first) + 1) / 2
    both = math.fsum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(math.fsum((a - middle) ** 2 for a in first) * math.fsum((b - middle) ** 2 for b in second))
    return both / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 up; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end + 1 < len(order) and values[order[end + 1]] == values[order[begin]]:
            end += 1
        for at in order[begin : end + 1]:
            ranks[at] = (begin + end) / 2 + 1
        begin = end + 1
    return ranks


# ---------------------------------------------------------------------------------------------------------- drawing

_TITLES: Mapping[View, str] = {
    "raw": "raw cosine",
    "centred": "mean-centred cosine",
    "nearest": "nearest neighbour asks the same",
}


def draw(located: Located) -> Figure:
    """Layers × positions in the three views; ``figure.savefig(path)`` writes it.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise MissingExtra(
            "the heat map needs matplotlib", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None
    depth, width = len(located.table["raw"]) - 1, len(located.positions)
    figure = Figure(figsize=(3.6 + 0.95 * width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    panels = figure.subplots(1, len(VIEWS), sharey=True)
    for panel, view in zip(panels, VIEWS, strict=True):
        rows = [list(reversed(row)) for row in located.table[view]]  # reading order: the prompt's end is on the right
        image = panel.imshow(rows, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
        panel.set_xticks(
            range(width),
            [f"{_printable(token)}  {at}" for at, token in zip(located.positions, located.tokens, strict=True)][::-1],
            rotation=90,
            fontsize=8,
            parse_math=False,
        )
        panel.tick_params(length=2)
        chosen, first, last = located.choice(view), located.layers[0], located.layers[-1]
        panel.add_patch(
            Rectangle(
                (width + chosen - 0.5, first - 0.5),
                1,
                last - first + 1,
                fill=False,
                edgecolor="white",
                linewidth=2.0,
            )
        )
        if located.template is not None and -located.template.index <= width:
            panel.plot([width + located.template.index], [depth + 1.1], marker="v", color="black", clip_on=False)
        panel.set_xlim(-0.5, width - 0.5)
        panel.set_ylim(-0.5, depth + 0.5)
        panel.set_title(f"{_TITLES[view]}\nchooses {chosen}", fontsize=10, pad=12, parse_math=False)
        bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=8)
    panels[0].set_ylabel("layer  l")
    figure.suptitle(
        f"{located.model.name}: SPS of {located.queries} queries in {located.prompts} wordings\n"
        "frame: deep half at the chosen position; ▾: the chat template's rule",
        fontsize=10,
        parse_math=False,
    )
    return figure


def _printable(token: str) -> str:
    """A byte-level token as one would write it; a line break is shown as its sign."""
    token = token.replace("Ġ", "␣").replace("▁", "␣").replace("Ċ", "\\n").replace("\n", "\\n")
    return token if len(token) <= 14 else token[:13] + "…"

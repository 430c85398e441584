"""From a hub id, a folder, a GGUF file or objects of other libraries to a model and its tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from hallucination_guard.errors import MissingExtra, ModelError

__all__ = ["DeviceMap", "Loaded", "from_gguf", "from_langchain", "from_pretrained", "unwrapped"]


DeviceMap: TypeAlias = str | Mapping[str, int | str] | None
"""As in transformers, for example ``auto``."""


class Loaded(NamedTuple):
    """A ``transformers`` model with its tokenizer."""

    model: Any
    tokenizer: Any


def from_pretrained(
    path: str | Path, *, device_map: DeviceMap = None, dtype: torch.dtype | str | None = None, **kwargs: Any
) -> Loaded:
    """Load from a hub id or a folder; see :meth:`WhiteBoxModel.from_pretrained`.

    Raises:
        ModelError: if there is nothing that can be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shared = {key: kwargs[key] for key in ("revision", "token", "local_files_only") if key in kwargs}
    path = str(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        return Loaded(_load(AutoModelForCausalLM, path, device_map=device_map, dtype=dtype, **kwargs), tokenizer)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path!r} cannot be loaded: {_first_line(error)}", hint="give a hub id or a folder with a model"
        ) from error


def from_gguf(path: str | Path, *, device_map: DeviceMap = None, dtype: torch.dtype | str | None = None) -> Loaded:
    """Load from a GGUF file; its weights are dequantised.

    Raises:
        MissingExtra: if the ``gguf`` package is not installed.
        ModelError: if there is no such file or its architecture is not known.
    """
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
    folder = str(path.parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        model = _load(AutoModelForCausalLM, folder, gguf_file=path.name, device_map=device_map, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{str(path)!r} cannot be loaded: {_first_line(error)}", hint="see transformers' list of GGUF models"
        ) from error
    return Loaded(model, tokenizer)


def from_langchain(chat: Any) -> Loaded:
    """Take both out of a LangChain ``HuggingFacePipeline`` or ``ChatHuggingFace``; nothing is loaded.

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
    return Loaded(pipeline.model, getattr(chat, "tokenizer", None) or pipeline.tokenizer)


def unwrapped(model: Any) -> Any:
    """The ``transformers`` model inside a compiled or PEFT wrapper, if it can be scored.

    Raises:
        ModelError: if it is not one, was made in inference mode, or is tuned by virtual tokens.
    """
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
    return model


def _load(auto: Any, path: str, *, device_map: DeviceMap, dtype: torch.dtype | str | None, **kwargs: Any) -> Any:
    cuda = torch.cuda.is_available()
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"dtype is {dtype!r}", hint="for example bfloat16, float16, float32 or auto")
    if dtype is None:
        dtype = torch.bfloat16 if cuda else torch.float32
    if device_map is not None:
        kwargs["device_map"] = device_map
    model = auto.from_pretrained(path, dtype=dtype, **kwargs)
    if device_map is None and cuda:
        model = model.to("cuda")
    return model.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

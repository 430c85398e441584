"""Which model is meant: a name and how it is loaded, as a command line or a file says it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hallucination_guard.model.white_box import WhiteBoxModel

__all__ = ["ModelChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Which model is to be loaded.

    Args:
        name: ``demo``, a folder, a .gguf file or a hub id.
        device_map: as in transformers.
        dtype: as in transformers.
        profile: where t* was measured to be.
    """

    name: str = "demo"
    device_map: str | None = None
    dtype: str | None = None
    profile: Path | None = None

    def absolute(self) -> ModelChoice:
        """The same, for a process that stands in another folder."""
        here = Path(self.name).exists()
        return replace(
            self,
            name=str(Path(self.name).absolute()) if here and self.name != "demo" else self.name,
            profile=None if self.profile is None else self.profile.absolute(),
        )

    def load(self) -> WhiteBoxModel:
        """The model."""
        from hallucination_guard.model.white_box import WhiteBoxModel

        if self.name == "demo":
            return WhiteBoxModel.demo(device_map=self.device_map, dtype=self.dtype, profile=self.profile)
        make = WhiteBoxModel.from_gguf if self.name.endswith(".gguf") else WhiteBoxModel.from_pretrained
        return make(self.name, device_map=self.device_map, dtype=self.dtype, profile=self.profile)

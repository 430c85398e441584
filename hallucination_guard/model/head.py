"""The head: what stands between the final states and the logits, as a formula.

The closed form of ∂ℓ/∂W needs to know it. u = scale·(W h + b), then logits = c·tanh(u / c) if there is a soft cap c.
Whether that is all the model does is not believed but measured, by :mod:`hallucination_guard.model.selftest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hallucination_guard.errors import ModelError

__all__ = ["Head"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """W (V × d), and what is done besides.

    Args:
        weight: W, the model's own parameter.
        bias: b, length V, or None.
        scale: factor on W h + b.
        softcap: c, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Read the head off a causal language model.

        Raises:
            ModelError: if there is no plain, loaded, floating-point matrix at its end.
        """
        module = model.get_output_embeddings()
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ModelError(
                f"the head of {type(model).__name__!r}, {type(module).__name__!r}, is no floating-point V × d matrix",
                hint="a quantised head has no closed-form gradient: load with the head left out of quantisation",
            )
        if weight.device.type == "meta":
            raise ModelError(
                "the weights of the head are not in memory (offloaded to disk)",
                hint="give device_map a place for the head: it is read at every score",
            )
        config = model.config.get_text_config(decoder=True)
        scale = 1.0
        if getattr(config, "logit_scale", None):
            scale = float(config.logit_scale)
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(
            weight=weight.detach(),
            bias=None if module.bias is None else module.bias.detach(),
            scale=scale,
            softcap=float(cap) if cap else None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 for a float64 model, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def logits(self, states: Tensor) -> Tensor:
        """Logits (T × V) of final states (T × d), both in :attr:`dtype`."""
        out = states.to(self.dtype) @ self.weight.to(self.dtype).T
        if self.bias is not None:
            out = out + self.bias.to(self.dtype)
        if self.scale != 1.0:
            out = out * self.scale
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out

    def pulled_back(self, by_logits: Tensor, logits: Tensor) -> Tensor:
        """∂ℓ/∂(W h + b) from ∂ℓ/∂logits (both T × V): through the soft cap and the scale."""
        if self.softcap is not None:
            by_logits = by_logits * (1.0 - (logits / self.softcap) ** 2)
        return by_logits * self.scale if self.scale != 1.0 else by_logits

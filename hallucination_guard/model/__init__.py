"""The only wall to transformers: a causal language model that generates, reads and can be looked into.

In go messages; out come a :class:`~hallucination_guard.values.Generation`, and on demand the :class:`Trace` of its deep
half, which scoring runs again with a graph. Nothing is imported until a name is used: templates and profiles need no
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hallucination_guard._lazy import lazily

if TYPE_CHECKING:
    from hallucination_guard.model.profile import Place, Profile
    from hallucination_guard.model.replay import Trace
    from hallucination_guard.model.white_box import WhiteBoxModel

_HOME = {"Place": "profile", "Profile": "profile", "Trace": "replay", "WhiteBoxModel": "white_box"}

__getattr__ = lazily(__name__, _HOME)

__all__ = ["Place", "Profile", "Trace", "WhiteBoxModel"]


def __dir__() -> list[str]:
    return __all__

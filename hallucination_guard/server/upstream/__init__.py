"""The sidecar: a server such as vLLM draws the answers, and a white-box copy of its model beside it scores them.

:func:`connect` finds out what a server is, :class:`Sidecar` is a guard whose answers it draws. A file for each kind of
server says what it is asked for and what it gives; ``docs/sidecar.md`` has the table and the rules.
"""

from __future__ import annotations

from hallucination_guard.server.upstream.kinds import connect
from hallucination_guard.server.upstream.part import Asked, Capabilities, Part, Upstream
from hallucination_guard.server.upstream.sidecar import PROBES, Sidecar
from hallucination_guard.server.upstream.status import Status

__all__ = ["PROBES", "Asked", "Capabilities", "Part", "Sidecar", "Status", "Upstream", "connect"]

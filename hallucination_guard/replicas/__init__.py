"""Several processes that answer or score, and one that asks them: what of it is Ray's is in files of that name.

A :class:`~hallucination_guard.replicas.replica.Replica` is a plain class, made of plain settings; a
:class:`~hallucination_guard.replicas.fleet.Fleet` asks them, once more where one is lost. docs/ray.md has the promises.
"""

"""The passages that the demo looks things up in."""

from __future__ import annotations

from importlib import resources

from hallucination_guard.demo.bm25 import BM25Retriever

__all__ = ["documents"]


def documents() -> BM25Retriever:
    """The search over the package's own passages."""
    with resources.as_file(resources.files("hallucination_guard").joinpath("data/documents.jsonl")) as path:
        return BM25Retriever.from_path(path, k=1)

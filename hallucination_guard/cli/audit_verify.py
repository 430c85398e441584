"""``audit verify``: whether a log is whole and unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hallucination_guard.cli.console import show, show_json
from hallucination_guard.cli.options import Command, Json, LogPath
from hallucination_guard.errors import AuditError, InputError

if TYPE_CHECKING:
    from hallucination_guard.audit import Verification

__all__ = ["register", "verify"]


def register(app: typer.Typer) -> None:
    """Make it a command."""
    app.command(cls=Command)(verify)


def verify(
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="The key that the log was written with, if any.")
    ] = None,
    log: LogPath = Path("audit.jsonl"),
    as_json: Json = False,
) -> int:
    """Say whether the log is whole and unchanged; of a folder each of its chains."""
    from hallucination_guard.audit import verify as verified
    from hallucination_guard.audit.folder import chains_of

    key = None
    if key_file is not None:
        try:
            key = key_file.read_bytes()  # as they are: a key of random bytes may begin or end with a blank
        except OSError as error:
            raise InputError(f"the key file {str(key_file)!r} cannot be read: {error.strerror}") from None
    if not log.is_dir():
        found = verified(log, key)
        _show(log, found, as_json=as_json)
        return 0 if found.ok else 1
    chains = {path: _of_folder(path, key) for path in chains_of(log)}
    ok = all(each.ok for each in chains.values())
    if as_json:
        records = sum(each.records for each in chains.values())
        plain = {path.name: _plain(each) for path, each in chains.items()}
        show_json({"ok": ok, "records": records, "chains": plain})
    else:
        for path, each in chains.items():
            _show(path, each, as_json=False)
    return 0 if ok else 1


def _of_folder(path: Path, key: bytes | None) -> Verification:
    """A chain that cannot be read, or is gone and has left its anchor, is a finding among others."""
    from hallucination_guard.audit import Problem, Verification, verify

    try:
        return verify(path, key)
    except AuditError as error:
        return Verification(0, (Problem(0, error.message),))


def _plain(found: Verification) -> dict[str, Any]:
    problems = [{"line": each.line, "what": each.what, "id": each.id} for each in found.problems]
    return {"ok": found.ok, "records": found.records, "problems": problems}


def _show(log: Path, found: Verification, *, as_json: bool) -> None:
    if as_json:
        show_json(_plain(found))
    elif found.ok:
        again = f"; {found.repeated} done again, which count once" if found.repeated else ""
        show(f"{log}: {found.records} records, whole and unchanged{again}")
    else:
        for each in found.problems:
            show(f"{log}:{each.line}: {each.what}" + (f" (record {each.id})" if each.id else ""))

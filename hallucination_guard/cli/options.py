"""What commands share: typed options, and a command that takes several values after one flag."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import typer
from typer.core import TyperCommand, TyperOption

from hallucination_guard.model.choice import ModelChoice

__all__ = [
    "AnchorQuestion",
    "AuditPath",
    "Command",
    "DeviceMap",
    "Dtype",
    "Json",
    "LogPath",
    "MaxNewTokens",
    "ModelChoice",
    "ModelName",
    "ProfilePath",
    "ReaderGone",
    "Replicas",
    "SampledLog",
    "Stopped",
]

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName: TypeAlias = Annotated[str, typer.Option("--model", help="demo, a folder, a .gguf file or a hub id.")]
DeviceMap: TypeAlias = Annotated[
    str | None, typer.Option("--device-map", help="As in transformers, for example auto.", show_default=False)
]
Dtype: TypeAlias = Annotated[
    str | None, typer.Option("--dtype", help="As in transformers, for example bfloat16.", show_default=False)
]
ProfilePath: TypeAlias = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="t* as `locate` measured it (default: by the chat template)."),
]
AuditPath: TypeAlias = Annotated[Path, typer.Option("--audit", metavar="FILE", help="The log.")]
LogPath: TypeAlias = Annotated[
    Path, typer.Option("--log", metavar="FILE_OR_FOLDER", help="The log, or a folder of logs that are read as one.")
]
SampledLog: TypeAlias = Annotated[Path, typer.Argument(metavar="LOG", help="The log.")]
Replicas: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--ray", min=1, max=256, metavar="N", help="In N processes, by Ray (docs/ray.md).", show_default=False
    ),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer, at most.")]
AnchorQuestion: TypeAlias = Annotated[
    str | None,
    typer.Option("--anchor-question", help="Model without a chat template: the part of the text that asks."),
]


class Stopped(Exception):
    """Ctrl-C within a command; its words say what was kept."""


class ReaderGone(Exception):
    """Who reads the output (head, less) has seen enough."""


class Command(TyperCommand):
    """A command whose list options take several values after one flag: ``--alpha 0.1 0.2``.

    It also hands on an interruption and a closed pipe under names of their own, which Typer would end by itself.
    """

    without_value: ClassVar[dict[str, str]] = {}
    """Flags that may stand alone, and the value that they then have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write every further value behind a flag of its own, as Typer wants it."""
        several = {
            flag for each in self.params if isinstance(each, TyperOption) and each.multiple for flag in each.opts
        }
        return super().parse_args(ctx, self._spelt_out(args, several))

    def _spelt_out(self, args: list[str], several: set[str]) -> list[str]:
        found: list[str] = []
        flag = ""
        for at, each in enumerate(args):
            ahead = args[at + 1] if at + 1 < len(args) else "--"
            if each.startswith("--"):
                flag = each if each in several else ""
            elif flag and found[-1] != flag:
                found.append(flag)
            found.append(each)
            if each in self.without_value and not ahead[:1].isdigit():
                found.append(self.without_value[each])
        return found

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(*error.args) from None
        except BrokenPipeError:
            raise ReaderGone from None

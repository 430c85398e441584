"""The text of a policy document: its data, and where in the text each value stands."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hallucination_guard.errors import PolicyError

__all__ = ["Source", "read"]

_LONGEST = 2**16  # characters
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Source:
    """What was read.

    Args:
        name: the file, or what to call a mapping.
        data: plain values, not checked yet.
        node: the same as YAML saw it, with line numbers; None for a mapping.
    """

    name: str
    data: object
    node: yaml.Node | None = None

    def refusal(self, path: Sequence[int | str], message: str, hint: str) -> PolicyError:
        """One line that names the file, the line if there is one, and the keys that lead to the value."""
        line = self._line(path)
        where = self.name if line is None else f"{self.name}:{line}"
        keys = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        return PolicyError(_one_line(f"{where}: {keys}: {message}" if keys else f"{where}: {message}"), hint=hint)

    def _line(self, path: Sequence[int | str]) -> int | None:
        """The line of the value, or of what would contain it."""
        node, mark = self.node, self.node and self.node.start_mark
        for step in path:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                mark = node.start_mark
            elif isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == step), None)
                if found is None:
                    break
                mark, node = found[0].start_mark, found[1]
            else:
                break
        return mark.line + 1 if mark else None


class _Loader(yaml.SafeLoader):
    """Safe, and stricter: of a key given twice YAML would quietly keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a sign and reads the limit 3e-4 as text; here it is the number that it looks like.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path, *, hint: str) -> Source:
    """Read one YAML file.

    Args:
        path: to the file.
        hint: what to give instead when it cannot be opened.

    Raises:
        PolicyError: when it is not there, not text or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > _LONGEST or _depth(text) > _DEEPEST:
            message = f"{path}: more than {_LONGEST} characters, or {_DEEPEST} brackets open at once"
            raise PolicyError(_one_line(message), hint="nest less deeply; the ready packs are a few rules")
        loader = _Loader(text)
    except OSError as error:
        raise PolicyError(f"policy {str(path)!r} cannot be read: {error.strerror}", hint=hint) from None
    except (UnicodeDecodeError, yaml.reader.ReaderError):
        raise PolicyError(f"policy {str(path)!r} is not text", hint="save it as YAML in UTF-8") from None
    try:
        node = loader.get_single_node()
        return Source(str(path), None if node is None else loader.construct_document(node), node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PolicyError(_one_line(f"{path}{line}: {error.problem}"), hint="mend the YAML in this line") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-45; a thousand brackets
        raise PolicyError(_one_line(f"{path}: {error}"), hint="put text into quotes, and nest less deeply") from None
    finally:
        loader.dispose()


def _depth(text: str) -> int:
    """How many brackets are open at once; thousands would keep the parser busy for seconds."""
    deepest = depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _one_line(text: str) -> str:
    return " ".join(text.split())

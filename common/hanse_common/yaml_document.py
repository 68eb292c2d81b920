"""A YAML file's plain values, and the line that each stands in.

    document = Document(path, text)
    document.tree, document.lines[("plan", "rounds")]

Read by the core schema of YAML 1.2.2 (section 10.3.2), not by YAML 1.1, where `1e-5` is a string and the label
`no` is a boolean. Aliases, tags, deep nesting and endless numbers are refused; keys found twice are noted.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from hanse_common.errors import ConfigError

MAX_NUMBER = 64
"""Bound of a number's length, in characters: Python refuses, or takes long, to read thousands of digits."""

MAX_DEPTH = 32
"""Bound of how deeply lists and mappings nest."""

Where = tuple[str | int, ...]
"""Keys and list positions that lead from the top of a file to a value."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema, bounded depth and no aliases."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="found an alias (*name), expected the value itself", problem_mark=mark
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_NULL, _BOOL, _INT, _FLOAT, _STR = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str")
)
_TAGS = {_NULL, _BOOL, _INT, _FLOAT, _STR, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


class Document:
    """A file's plain values (`tree`), the line of each, and the keys found twice (`faults`)."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: dict[Where, int] = {(): 1}
        self.faults: list[str] = []
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            self.tree = {} if node is None else self._plain(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            problem = ", ".join(text for text in (error.context, error.problem) if text)
            raise ConfigError(f"{path}{line}: {problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML, {' '.join(str(error).split())}") from None

    def fault(self, where: Where, text: str) -> str:
        """Return the line for a fault at `where`; a key that is not in the file has its section's line."""
        line = next(self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines)
        return f"{self.path}:{line}: {dotted(where)}{text}"

    def _plain(self, node: yaml.Node, where: Where) -> Any:
        self.lines.setdefault(where, node.start_mark.line + 1)
        if node.tag not in _TAGS:
            raise yaml.MarkedYAMLError(
                problem=f"found the tag {node.tag!r:.60}, expected a value without a tag",
                problem_mark=node.start_mark,
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(child, (*where, i)) for i, child in enumerate(node.value)]
        return self._value(node.tag, node)

    def _value(self, tag: str, node: yaml.Node) -> object:
        try:
            return _scalar(tag, node.value)
        except ValueError:
            raise yaml.MarkedYAMLError(
                problem=f"found a value that is not valid for {tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from None

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="found a key that is a list or a mapping, expected a word",
                    problem_mark=key_node.start_mark,
                )
            line, key = key_node.start_mark.line + 1, str(self._value(_STR, key_node))
            if key in found:
                first = self.lines[(*where, key)]
                name = dotted((*where, key))
                self.faults.append(
                    f"{self.path}:{line}: {name}found again (first in line {first}), expected once"
                )
            else:
                self.lines[(*where, key)] = line
                found[key] = self._plain(value_node, (*where, key))
        return found


def _scalar(tag: str, text: str) -> object:
    """Return the value of `text`; raises ValueError where it has none."""
    text.encode()  # refuses lone surrogates
    if tag in (_INT, _FLOAT) and len(text) > MAX_NUMBER:
        raise ValueError(text[:MAX_NUMBER])
    lower = text.lower()
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return lower == "true"
    if tag == _INT:
        return int(text, 0 if lower.startswith(("0x", "0o")) else 10)
    if tag == _FLOAT:
        return float(lower.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def dotted(where: Where) -> str:
    """Return `where` as `key.sub[2].x: `, empty at the top."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step!s:.80}" for step in where)
    return f"{text.removeprefix('.')}: " if text else ""

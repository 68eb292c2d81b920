"""YAML files into frozen pydantic models, with every fault found reported at once.

    class Server(Section):
        port: Annotated[int, Field(ge=1, le=65535)] = 8443
        certificate: ConfigPath

    server = load(Server, Path("server.yaml"))

A wrong file raises one `ConfigError`, a line for each fault:

    server.yaml:3: port: found 'abc' (a string), expected an integer ≥ 1 and ≤ 65535
    server.yaml:4: certifcate: unknown key, did you mean certificate?
    server.yaml:1: certificate: missing; expected a path

Files are read by the core schema of YAML 1.2.2 (section 10.3.2), not by YAML 1.1, where `1e-5` is a string
and the label `no` is a boolean. Aliases, tags and repeated keys are refused. Values are then as strict as
JSON: "5" is no integer, but 5 is a number, a list is a tuple, and a string is a path.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails

from hanse_common.errors import ConfigError

MAX_BYTES = 1 << 20
"""Bound of a configuration file, in bytes."""

MAX_NUMBER = 64
"""Bound of a number's length, in characters: Python refuses, or takes long, to read thousands of digits."""

MAX_DEPTH = 32
"""Bound of how deeply lists and mappings nest."""

Where = tuple[str | int, ...]
"""Keys and list positions that lead from the top of a file to a value."""


class Section(BaseModel):
    """Base of every model read from YAML: immutable, strictly typed, nothing unknown, nothing infinite."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


def _beside_the_file(value: object, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Path:
    path: Path = value if isinstance(value, Path) else read(value)
    if value == "" or "\0" in str(path):
        raise ValueError("expected a path, not empty, without NUL")
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError("expected a path, but there is no such user's home folder") from None
    return info.context["folder"] / path if info.context else path


ConfigPath = Annotated[Path, WrapValidator(_beside_the_file)]
"""A path; a relative one counts from the folder of the file it is written in, `~` is the user's home. A field's
default is one, too, with `Field(validate_default=True)`."""

M = TypeVar("M", bound=BaseModel)


def load(model: type[M], path: Path, **context: object) -> M:
    """Return the `model`, a `Section` or strict `RootModel`, written in the YAML file at `path`.

    Validators find `context` in their `ValidationInfo`, and under `folder` the folder of the file.

    Raises `ConfigError` that lists every fault found, each with file, line and key, what was found and what
    was expected. Values of secret fields (`pydantic.SecretStr`) and of unknown keys are never shown.
    """
    document = _Document(path, _read(path))
    faults = document.faults
    try:
        # JSON's rules are what strict means here: pydantic's strict mode for Python objects would refuse a
        # list for a tuple and a string for a path.
        section = model.model_validate_json(
            json.dumps(document.tree), context={**context, "folder": path.parent}
        )
    except ValidationError as error:
        schema = _Schema(model)
        faults += [_fault(details, document, schema) for details in error.errors(include_url=False)]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return section


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path, or start from the sample file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected a YAML file.") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_BYTES} bytes. Is this the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: found a byte that is not UTF-8, expected UTF-8 text.") from None


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


class _Document:
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
        return f"{self.path}:{line}: {_dotted(where)}{text}"

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
                name = _dotted((*where, key))
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


class _Schema:
    """What a model expects at each place, in words, from its JSON schema."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.top = model.model_json_schema()

    def branches(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the alternatives of `schema`, references resolved."""
        if "$ref" in schema:
            yield from self.branches(self.top["$defs"][schema["$ref"].rpartition("/")[2]])
        elif alternatives := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
            for alternative in alternatives:
                yield from self.branches(alternative)
        else:
            yield schema

    def child(self, schema: dict[str, Any], step: str | int) -> dict[str, Any] | None:
        """Return the schema of a key or list position, None where there is none."""
        for branch in self.branches(schema):
            if isinstance(step, int):
                prefix = branch.get("prefixItems", [])
                inner = prefix[step] if step < len(prefix) else branch.get("items")
            else:
                inner = branch.get("properties", {}).get(step) or branch.get("additionalProperties")
            if isinstance(inner, dict):
                return inner
        return None

    def keys(self, schema: dict[str, Any]) -> list[str]:
        return [key for branch in self.branches(schema) for key in branch.get("properties", {})]

    def tag(self, schema: dict[str, Any]) -> tuple[str, dict[str, str]] | None:
        """Return the key that chooses among alternatives, and the reference for each of its values."""
        for candidate in (schema, *schema.get("anyOf", [])):
            if discriminator := candidate.get("discriminator"):
                return discriminator["propertyName"], discriminator.get("mapping", {})
        return None

    def words(self, schema: dict[str, Any]) -> str:
        return " or ".join(dict.fromkeys(_words(branch) for branch in self.branches(schema)))

    def may_show(self, schema: dict[str, Any]) -> bool:
        """Return whether what stands here may be shown: a plain value, and not a secret field's."""
        branches = list(self.branches(schema))
        plain = any(branch.get("type") not in ("object", "array") for branch in branches)
        return plain and not any(branch.get("writeOnly") for branch in branches)


_KINDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping of keys to values",
    "null": "null",
}
_BOUNDS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("multipleOf", "a multiple of {}"),
    ("minLength", "at least {} long"),
    ("maxLength", "at most {} long"),
    ("pattern", "of the form {}"),
    ("minItems", "of at least {}"),
    ("maxItems", "of at most {}"),
)


def _words(schema: dict[str, Any]) -> str:
    """Return what a schema without alternatives expects, in words."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum") or [schema["const"]]
        return ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
    kind = _KINDS.get(schema.get("type", ""), "a value")
    if schema.get("format") in ("path", "file-path", "directory-path"):
        kind = "a path"
    elif schema.get("format") and not schema.get("writeOnly"):
        kind = f"a {schema['format']}"
    return " ".join(
        (kind, " and ".join(text.format(schema[key]) for key, text in _BOUNDS if key in schema))
    ).rstrip()


def _fault(details: ErrorDetails, document: _Document, schema: _Schema) -> str:
    """Return the line for one of pydantic's errors."""
    kind, loc = details["type"], details["loc"]
    if kind in ("missing", "extra_forbidden"):
        *outer, key = loc
        where, _, expected = _locate(outer, document.tree, schema)
        if kind == "missing":
            text = f"missing; expected {schema.words(schema.child(expected, key) or {})}"
        else:
            near = difflib.get_close_matches(str(key), known := schema.keys(expected), n=1)
            text = "unknown key, " + (f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}")
        return document.fault((*where, key), text)
    where, value, expected = _locate(loc, document.tree, schema)
    if kind.startswith("union_tag") and (tag := schema.tag(expected)):
        name, one_of = tag[0], _words({"enum": list(tag[1])})
        found = f"found {_shown(value[name])}, expected" if name in value else "missing; expected"
        return document.fault((*where, name), f"{found} {one_of}")
    found = _shown(value) if schema.may_show(expected) else _kind(value)
    if kind in ("value_error", "assertion_error"):
        reason = str(details["ctx"]["error"])
        return document.fault(where, reason if isinstance(value, dict) else f"found {found}, {reason}")
    words = "a finite number" if kind == "finite_number" else schema.words(expected)
    return document.fault(where, f"found {found}, expected {words}")


def _locate(loc: Sequence[str | int], tree: Any, schema: _Schema) -> tuple[Where, Any, dict[str, Any]]:
    """Follow pydantic's `loc` through file and schema: the place reached, its value and what it expects.

    Besides keys and positions, `loc` names the chosen branches of unions, which are no place in the file.
    """
    where: Where = ()
    value, expected = tree, schema.top
    for step in loc:
        if (tag := schema.tag(expected)) and step in tag[1]:
            expected = {"$ref": tag[1][str(step)]}
            continue
        inner = schema.child(expected, step)
        held = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if held and inner is not None:
            where, value, expected = (*where, step), value[step], inner
    return where, value, expected


def _dotted(where: Where) -> str:
    """Return `where` as `key.sub[2].x: `, empty at the top."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step!s:.80}" for step in where)
    return f"{text.removeprefix('.')}: " if text else ""


def _kind(value: object) -> str:
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true or false"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return f"a list of {len(value)}"
    return "a mapping of keys to values"


def _shown(value: object) -> str:
    if value is None or isinstance(value, list | dict):
        return _kind(value)
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"{text} ({_kind(value)})" if isinstance(value, str) else text

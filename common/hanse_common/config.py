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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

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
from hanse_common.yaml_document import Document, Where

MAX_BYTES = 1 << 20
"""Bound of a configuration file, in bytes."""


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
    document = Document(path, _read(path))
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
                # Keys that must have a form have their values' schema under that form.
                by_form = next(iter(branch.get("patternProperties", {}).values()), None)
                inner = (
                    branch.get("properties", {}).get(step) or by_form or branch.get("additionalProperties")
                )
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
    ("minProperties", "of at least {}"),
    ("maxProperties", "of at most {}"),
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


def _fault(details: ErrorDetails, document: Document, schema: _Schema) -> str:
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

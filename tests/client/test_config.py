"""The merchant's configuration, and the annotated sample of it that may not grow stale."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hanse_client.config import ClientConfig
from hanse_client.enrolment import annotated_config
from hanse_client.explanation import posterior_bound
from hanse_common.config import load
from hanse_common.errors import ConfigError


@pytest.fixture
def sample(root: Path) -> Path:
    return root / "client" / "hanse-client.yaml"


def fields(model: type[BaseModel], where: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the fields of `model` and of the models in it, by their path."""
    found: dict[tuple[str, ...], Any] = {}
    for name, field in model.model_fields.items():
        found[(*where, name)] = field
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= fields(part, (*where, name))
    return found


def notes(text: str) -> dict[tuple[str, ...], str]:
    """Return the comment above each key of a YAML file, by the key's path."""
    found: dict[tuple[str, ...], str] = {}
    where: tuple[str, ...] = ()
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"( *)(\w+):", line):
            where = (*where[: len(match[1]) // 2], match[2])
            found[where], comment = " ".join(comment), []
        elif line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
        else:
            comment = []
    return found


def test_the_sample_is_a_configuration(sample: Path) -> None:
    config = load(ClientConfig, sample)
    assert config.photos == sample.parent / "photos"
    assert config.ledger_path == sample.parent / "state" / "ledger.sqlite"
    assert config.policy.epsilon == 3.0 and config.league.taxonomy.classes[0] == "T-shirt"


def test_the_sample_explains_every_key_and_gives_its_default(sample: Path) -> None:
    written, known = notes(sample.read_text()), fields(ClientConfig)
    assert written.keys() == known.keys()
    for where, field in known.items():
        if field.is_required():
            expected = "(required) "
        else:
            default = field.get_default(call_default_factory=True)
            assert default is not PydanticUndefined
            value = list(default) if isinstance(default, tuple) else default
            if isinstance(value, BaseModel):  # a section whose keys have their own
                assert written[where].startswith("(default: ")
                continue
            expected = f"(default: {yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}) "
            expected = expected.replace("1.0e-05", "1e-5")
        note = written[where]
        if where == ("labels",):
            expected = "(default: none) "
        assert note.startswith(expected), f"{where}: {note[:40]!r}, expected {expected!r}"
        assert len(note) > len(expected) + 20, f"{where}: says nothing"


def test_the_samples_figures_are_right(sample: Path) -> None:
    """The growth of a suspicion of 1 % that the comment on epsilon states."""
    note = notes(sample.read_text())["policy", "epsilon"]
    for epsilon, shown in ((1, "2.7"), (3, "17"), (8, "97")):
        assert f"at {epsilon}" in note and f"to {shown} %" in note
        assert f"{100 * posterior_bound(epsilon, 0.01):.2g}" == shown


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('operator_key: "9', 'operator_key: "Z', "league.operator_key"),
        ('charter: "5', 'charter: "Z', "league.charter"),
        ("minimum_cohort: 3", "minimum_cohort: 2", "policy.minimum_cohort: found 2"),
        ("corrupt_merchants: 1", "corrupt_merchants: 0", "policy.corrupt_merchants: found 0"),
        ("epsilon: 3.0", "epsilon: 0", "policy.epsilon: found 0"),
        ("device: auto", "device: tpu", "device: found 'tpu'"),
        ('  classes: ["T-shirt", "Trouser"', '  classes: ["Coat", "Trouser"', "expected classes that differ"),
        ("state: state", "state: ''", "state"),
        ("modes: [local,", "modes: [locally,", "policy.modes"),
        ("  unit: photo", "  unit: shelf", "policy.unit: found 'shelf'"),
        ("upload_slot: 1", "upload_slot: -1", "policy.upload_slot: found -1"),
        ("false_accept: 0.05", "false_accept: 0", "search.false_accept: found 0"),
        ("false_reject: 0.1", "false_reject: 1", "search.false_reject: found 1"),
        (
            "accounting: sum",
            "accounting: rdp-1",
            "policy.accounting: found 'rdp-1' (a string), expected sum, or rdp-",
        ),
    ],
)
def test_faults(sample: Path, tmp_path: Path, old: str, new: str, found: str) -> None:
    text = sample.read_text()
    assert text.count(old) == 1
    path = tmp_path / "hanse-client.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(found)) as caught:
        load(ClientConfig, path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_sample_is_what_init_writes(sample: Path) -> None:
    """One text, with other values: what people read in the repository is what they get."""
    config = load(ClientConfig, sample)
    assert config.member is not None
    assert config.connection is not None
    written = annotated_config(
        photos="photos",
        labels="labels.yaml",
        whitening="whitening.safetensors",
        recognizer="recognizer",
        name=config.member.name,
        entity=config.member.entity,
        operator_key=config.league.operator_key,
        charter=config.league.charter,
        classes=list(config.league.taxonomy.classes),
        league=config.policy.league,
        epsilon=config.policy.epsilon,
        server=config.connection.server,
        authority="ca.crt",
        language="en",
    )
    assert sample.read_text() == written


def test_where_the_state_lies(sample: Path) -> None:
    config = load(ClientConfig, sample)
    state = sample.parent / "state"
    assert config.markers_path == state / "markers.sqlite"
    alone = config.model_copy(update={"connection": None})
    assert (alone.identity_path, alone.node_key_path) == (state / "identity.key", state / "node.key")

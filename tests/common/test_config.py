from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, SecretStr, ValidationError, model_validator

from hanse_common.config import MAX_BYTES, ConfigPath, Section, load
from hanse_common.errors import ConfigError


class Sgd(Section):
    kind: Literal["sgd"]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Adam(Section):
    kind: Literal["adam"]
    beta: float


class Layer(Section):
    width: Annotated[int, Field(ge=1)]
    name: str = "dense"


class League(Section):
    merchants: Annotated[int, Field(ge=1)]
    delta: float = 1e-5
    optimizer: Annotated[Sgd | Adam, Field(discriminator="kind")] = Sgd(kind="sgd")
    layers: tuple[Layer, ...] = ()
    shape: tuple[int, float] = (1, 2.0)
    photos: Annotated[ConfigPath, Field(validate_default=True)] = Path("photos")
    colour: Literal["red", "green"] = "red"
    limit: int | None = None
    name: int | str = "x"
    labels: dict[str, str | None] = Field(default_factory=dict)
    token: SecretStr = SecretStr("")
    private: bool = True

    @model_validator(mode="after")
    def _few(self) -> "League":
        if self.limit is not None and self.limit > self.merchants:
            raise ValueError("expected limit ≤ merchants")
        return self


@pytest.fixture
def faults(tmp_path):
    def faults(text: str | bytes) -> list[str]:
        path = tmp_path / "league.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ConfigError) as caught:
            load(League, path)
        return str(caught.value).replace(f"{path}", "league.yaml").split("\n")

    return faults


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> League:
        path = tmp_path / "league.yaml"
        path.write_text(text)
        return load(League, path)

    return read


def test_a_good_file_is_the_model_it_says(read, tmp_path):
    league = read(
        "merchants: 5\ndelta: 1\noptimizer: {kind: adam, beta: 1e-3}\nlayers:\n- width: 0x10\n"
        "- {width: 2, name: no}\n"
        "shape: [3, 4]\nphotos: shelf/a\ncolour: green\nlimit: null\n"
        "labels: {Hemd: Shirt, Sale: ~}\ntoken: abc\n"
    )
    assert league.delta == 1.0 and isinstance(league.delta, float)
    assert league.optimizer == Adam(kind="adam", beta=0.001)
    assert league.layers == (Layer(width=16), Layer(width=2, name="no"))
    assert (
        league.shape == (3, 4.0) and league.limit is None and league.labels == {"Hemd": "Shirt", "Sale": None}
    )
    assert league.photos == tmp_path / "shelf/a"
    assert league.token.get_secret_value() == "abc"
    with pytest.raises(ValidationError, match="frozen"):
        league.merchants = 6


def test_paths_count_from_the_file_defaults_too_and_home_is_expanded(read, tmp_path, monkeypatch):
    assert read("merchants: 5").photos == tmp_path / "photos"
    assert read("merchants: 5\nphotos: /srv/photos").photos == Path("/srv/photos")
    monkeypatch.setenv("HOME", "/home/shop")
    assert read("merchants: 5\nphotos: ~/photos").photos == Path("/home/shop/photos")
    assert League(merchants=1, photos=Path("here")).photos == Path("here")


def test_all_faults_are_reported_at_once_each_with_its_line(faults):
    assert faults(
        "delta: 'abc'\n"
        "layers:\n"
        "  - width: 0\n"
        "  - name: a\n"
        "    widht: 3\n"
        "    width: 2.5\n"
        "optimizer:\n"
        "  kind: sgd\n"
        "  momentum: 1\n"
        "colour: blue\n"
        "shape: [1]\n"
        "merchant: 5\n"
        "private: yes\n"
        "photos: ''\n"
        "name: []\n"
        "labels: {a: 3}\n"
        "limit: '5'\n"
        "delta: 3\n"
    ) == [
        "league.yaml:18: delta: found again (first in line 1), expected once",
        "league.yaml:1: merchants: missing; expected an integer ≥ 1",
        "league.yaml:1: delta: found 'abc' (a string), expected a number",
        "league.yaml:9: optimizer.momentum: found 1, expected a number ≥ 0 and < 1",
        "league.yaml:3: layers[0].width: found 0, expected an integer ≥ 1",
        "league.yaml:6: layers[1].width: found 2.5, expected an integer ≥ 1",
        "league.yaml:5: layers[1].widht: unknown key, did you mean width?",
        "league.yaml:11: shape[1]: missing; expected a number",
        "league.yaml:14: photos: found '' (a string), expected a path, not empty, without NUL",
        "league.yaml:10: colour: found 'blue' (a string), expected one of 'red', 'green'",
        "league.yaml:17: limit: found '5' (a string), expected an integer or null",
        "league.yaml:15: name: found a list of 0, expected an integer or a string",
        "league.yaml:16: labels.a: found 3, expected a string or null",
        "league.yaml:13: private: found 'yes' (a string), expected true or false",
        "league.yaml:12: merchant: unknown key, did you mean merchants?",
    ]


def test_other_faults_name_what_was_expected(faults):
    unknown = "optimizer: {kind: sgd, zzz: 1}\nmerchants: 1"
    assert faults(unknown) == ["league.yaml:1: optimizer.zzz: unknown key, expected kind, momentum"]
    assert faults("merchants: 1\noptimizer: {kind: lion}") == [
        "league.yaml:2: optimizer.kind: found 'lion' (a string), expected one of 'adam', 'sgd'"
    ]
    assert faults("merchants: 1\noptimizer: {beta: 3}") == [
        "league.yaml:2: optimizer.kind: missing; expected one of 'adam', 'sgd'"
    ]
    assert faults("merchants: 1\noptimizer: {kind: adam}") == [
        "league.yaml:2: optimizer.beta: missing; expected a number"
    ]
    assert faults("merchants: 1\noptimizer: 3") == [
        "league.yaml:2: optimizer: found an integer, expected a mapping of keys to values"
    ]
    assert faults("merchants: 1\ndelta: .nan") == [
        "league.yaml:2: delta: found nan, expected a finite number"
    ]
    assert faults("merchants: 1\ndelta: 1e999") == [
        "league.yaml:2: delta: found inf, expected a finite number"
    ]
    assert faults("merchants: 1\nlimit: 2") == ["league.yaml:1: expected limit ≤ merchants"]
    assert faults("- 1") == ["league.yaml:1: found a list of 1, expected a mapping of keys to values"]
    assert faults("") == faults("# nothing") == ["league.yaml:1: merchants: missing; expected an integer ≥ 1"]


def test_values_that_may_be_secret_are_never_shown(faults):
    for text in (
        "merchants: 1\ntoken: 77077",
        "merchants: 1\ntoken: [77077]",
        "merchants: 1\ntoken: {a: 77077}",
        "merchants: 1\ntokn: 77077",
        "merchants: 1\noptimizer: '77077'",
        "merchants: 1\nlayers: '77077'",
        "merchants: 1\ntoken: '77077\nmerchants: 2",
        "merchants: 1\ntoken: 77077\ntoken: 77077",
    ):
        assert "77077" not in "\n".join(faults(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merchants: [1", "league.yaml:1: "),
        ("a: b: c", "league.yaml:1: "),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x00", "not YAML"),
        (b"a: 1\nb: \xff", "league.yaml:2: found a byte that is not UTF-8"),
        ("a: &x [1]\nb: *x", "league.yaml:2: found an alias (*name), expected the value itself"),
        ("a: !!python/object/apply:os.system [ls]", "league.yaml:1: found the tag"),
        ("a: !secret x", "league.yaml:1: found the tag"),
        ("? [a]\n: 1", "league.yaml:1: found a key that is a list"),
        ('a: "\\ud800"', "league.yaml:1: found a value that is not valid for str"),
        ("a: " + "9" * 5000, "league.yaml:1: found a value that is not valid for int"),
        ("[" * 100_000, "nested more than 32 deep"),
        ("a:\n" + "\n".join(" " * n + "a:" for n in range(1, 100)), "nested more than 32 deep"),
        ("#" * (MAX_BYTES + 1), "longer than 1048576 bytes"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_in_one_line(faults, text, words):
    (fault,) = faults(text)
    assert fault.startswith("league.yaml") and words in fault


def test_a_bomb_of_aliases_is_refused_before_it_grows(faults):
    levels = "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(30))
    assert faults("a0: &a0 [lol]\n" + levels) == [
        "league.yaml:2: found an alias (*name), expected the value itself"
    ]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load(League, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(League, tmp_path)


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "1:30", "1_000", "2024-01-01", "<<", "0b1", "="])
def test_what_only_yaml_1_1_took_for_something_else_is_text(read, text):
    assert read(f"merchants: 1\nname: {text}").name == text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(codec="ascii", categories=("L",)), min_size=1), inner, max_size=3
        )
    ),
    max_leaves=8,
)


class Anything(Section):
    value: object = None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    value=json_values, keys=st.sampled_from(["merchants", "optimizer", "layers", "name", "labels", "other"])
)
def test_any_value_in_any_place_is_read_or_refused_with_lines(tmp_path, value, keys):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump({keys: value}, allow_unicode=True))
    try:
        load(League, path)
    except ConfigError as error:
        assert all(line.startswith(f"{path}:") for line in str(error).split("\n"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    value=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")))
    | st.integers()
    | st.booleans()
)
def test_scalars_survive_a_writer_that_is_not_ours(tmp_path, value):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump({"value": value}, allow_unicode=True))
    assert load(Anything, path).value == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"cohort: 0x{'f' * 9000}", "not valid for int"),
        (f"cohort: {'9' * 9000}", "not valid for int"),
        ('"\\ud800": 1', "not valid for str"),
    ],
)
def test_what_python_cannot_write_down_is_a_fault_like_others(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "league.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(League, path)

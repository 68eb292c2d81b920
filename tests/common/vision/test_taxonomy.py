import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_common.errors import ConfigError
from hanse_common.vision.taxonomy import LabelMap, Taxonomy

TAXONOMY = Taxonomy(classes=("Shirt", "Sneaker", "Schürze"))


@pytest.mark.parametrize(
    "classes",
    [
        ("Shirt",),
        (),
        ("Shirt", "Shirt"),
        ("Shirt", "shirt"),
        ("Shirt", ""),
        ("Shirt", "x" * 65),
        ("Shirt", "a\nb"),
        ("Shirt", " Sneaker"),
        ("Shirt", 3),
        tuple(f"class {n}" for n in range(1001)),
        ["Shirt", "Sneaker"],
    ],
)
def test_unfit_classes_are_refused(classes):
    with pytest.raises(ValidationError):
        Taxonomy(classes=classes)


def test_a_taxonomy_is_ordered_and_frozen():
    assert [TAXONOMY.index(name) for name in TAXONOMY.classes] == [0, 1, 2]
    assert len(Taxonomy(classes=tuple(f"class {n}" for n in range(1000))).classes) == 1000
    with pytest.raises(ValueError, match="Boot"):
        TAXONOMY.index("Boot")
    with pytest.raises(ValidationError):
        TAXONOMY.classes = ("a", "b")


def test_labels_are_mapped_left_out_or_unknown(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("Herrenhemden: Shirt\nTurnschuhe & mehr: Sneaker\nSale: null\nno: ~\nSneaker: Shirt\n")
    labels = LabelMap.load(path, TAXONOMY)
    assert labels.encode("HERRENHEMDEN ") == labels.encode("shirt") == 0
    assert labels.encode("Turnschuhe & mehr") == 1
    assert labels.encode("sneaker") == 0, "the shop's own word goes before the league's"
    assert labels.encode("sale") is None and labels.left_out("sale") and labels.left_out("no")
    assert labels.encode("Boot") is None and not labels.left_out("Boot") and not labels.left_out("Shirt")


def test_without_a_file_the_leagues_own_names_work_in_any_unicode_form():
    labels = LabelMap(TAXONOMY)
    assert labels.encode(unicodedata.normalize("NFD", "Schürze")) == 2
    assert labels.encode("SCHÜRZE") == 2


def test_all_faults_of_a_file_are_named_with_the_nearest_class(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text("a: Shrit\nb: 3\nc: Shirt\nd: Qq\n")
    with pytest.raises(ConfigError) as caught:
        LabelMap.load(path, TAXONOMY)
    assert str(caught.value).split("\n") == [
        f"{path}:1: a: found 'Shrit' (a string), expected a class of the league, Shirt?",
        f"{path}:2: b: found 3, expected a string or null",
        f"{path}:4: d: found 'Qq' (a string), expected a class of the league: Shirt, Sneaker, Schürze",
    ]
    path.write_text("hemd: Shirt\nHEMD: Sneaker\n")
    with pytest.raises(ConfigError, match=r"labels\.yaml: label 'HEMD': found twice"):
        LabelMap.load(path, TAXONOMY)
    with pytest.raises(ConfigError, match="label 'x': found 'Boot', expected a class of the league"):
        LabelMap(TAXONOMY, {"x": "Boot"})


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_every_mapped_label_encodes_to_its_class(names):
    labels = LabelMap(TAXONOMY, dict.fromkeys(names, "Sneaker"))
    assert {labels.encode(name) for name in names} == {1}
    assert {labels.encode(unicodedata.normalize("NFD", name)) for name in names} == {1}

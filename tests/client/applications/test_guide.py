"""The guide's examples are run, in order, against a real gallery."""

import re
from pathlib import Path

from PIL import Image

from hanse_client.recognition.service import Recognition


def test_every_example_of_the_guide_runs(
    root: Path, recognition: Recognition, pictures: list[tuple[Image.Image, str]], tmp_path: Path
) -> None:
    text = (root / "docs" / "applications.md").read_text()
    opening, *examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "Recognition.open(config" in opening and len(examples) >= 5
    image = pictures[20][0]
    image.save(tmp_path / "one.png")
    Image.new("RGB", (112, 112), (150, 140, 130)).save(tmp_path / "wall.png")
    shelf = Image.new("RGB", (336, 224))
    for cell in range(6):
        shelf.paste(image, (cell % 3 * 112, cell // 3 * 112))
    hidden = tmp_path / ".shelves"  # not of the folder that is counted
    hidden.mkdir()
    shelf.save(hidden / "shelf.png")
    names: dict[str, object] = {
        "recognition": recognition,
        "image": image,
        "folder": tmp_path,
        "shelf_photo": hidden / "shelf.png",
    }
    for example in examples:
        exec(example, names)  # noqa: S102 - of our own guide
    assert names["best"] == "P-20" and names["counts"] == {"P-20": 1}
    assert [Path(str(path)).parent for path in names["to_look_at"]] == [tmp_path / "unknown"]  # type: ignore[attr-defined]
    assert [(line.sku, line.count) for line in names["shelf"].counts] == [("P-20", 6)]  # type: ignore[attr-defined]
    for name in ("beside", "suggested", "ordered"):
        assert len(names[name]) == (6 if name == "beside" else 5)  # type: ignore[arg-type]
    assert "affordable" in names and names["first"] in recognition.gallery.photos_of("P-20")

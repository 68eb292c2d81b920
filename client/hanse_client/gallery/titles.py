"""What products are called, against what somebody types: tf-idf over words and their parts.

    titles = Titles()
    while titles.follow(db):
        ...
    titles.scores("wanderschuh rot")        # {3: 0.71, 12: 0.22}: products' numbers and cosines, best first

A text is folded (case, accents, compatibility forms) and counted as words and as parts of words: three characters in
a row for scripts with spaces, which finds "Wanderschuh" by "Schuh" and forgives a slip; single characters and pairs for
Chinese, Japanese and Korean, where words are not set apart [1, section 2.2.4]. Counts are hashed, so that no vocabulary
must be learned before a new product can be found, then weighed by tf-idf with lengths of one [2].

[1] Manning, Raghavan, Schütze: Introduction to Information Retrieval, 2008
[2] scikit-learn: HashingVectorizer, TfidfTransformer
"""

import re
import sqlite3
import unicodedata
from collections.abc import Iterator
from typing import Final

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from hanse_client.gallery import rows
from hanse_client.gallery.bounds import MAX_TEXT
from hanse_client.gallery.product import Product

CHUNK: Final = 5000
"""Products that are taken in at once: as long as somebody reads, old pages can't be taken out of the database."""

_TERMS = 1 << 20
_JOINERS = "\u200c\u200d"
_UNSPACED = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]"
)


def terms(text: str) -> Iterator[str]:
    """Yield the words of `text`, and their parts, each as often as it occurs."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    folded = "".join(one for one in decomposed if not unicodedata.combining(one) and one not in _JOINERS)
    for word in "".join(map(_letter, unicodedata.normalize("NFC", folded))).split():
        yield word
        if _UNSPACED.search(word):
            yield from (word[start : start + 1] for start in range(len(word)))
            yield from (word[start : start + 2] for start in range(len(word) - 1))
        else:
            padded = f" {word} "
            yield from (padded[start : start + 3] for start in range(len(padded) - 2))


def _letter(one: str) -> str:
    """Return a letter, digit, or mark that stands in a word, such as Hindi's vowel signs; a space for all else."""
    return one if one.isalnum() or unicodedata.category(one)[0] == "M" else " "


def words_of(product: Product) -> str:
    """Return what of a product is searched: title, category, values of attributes, and SKU."""
    return " ".join((product.title, product.category or "", *product.attributes.values(), product.sku))


class Titles:
    """The texts of all products, in memory. Not safe to share between threads."""

    def __init__(self) -> None:
        self._hashing = HashingVectorizer(analyzer=terms, n_features=_TERMS, norm=None, alternate_sign=False)
        self._clear(0)

    def _clear(self, removal: int) -> None:
        self._numbers = np.empty(0, np.int64)
        self._counts = scipy.sparse.csr_matrix((0, _TERMS))
        self._revision, self._removal = 0, removal
        self._weighing: TfidfTransformer | None = None

    def follow(self, db: sqlite3.Connection) -> bool:
        """Take in what has changed in the database, at most `CHUNK` products; return whether there may be more."""
        first, last = db.execute("SELECT min(number), max(number) FROM removal").fetchone()
        if first is not None and self._removal < first - 1:
            self._clear(last)
        gone = db.execute("SELECT product FROM removal WHERE number > ?", (self._removal,)).fetchall()
        revision, changed = rows.revised(db, self._revision, CHUNK)
        numbers = np.array([number for (number,) in gone if number is not None] + list(changed), np.int64)
        if len(numbers):
            keep = ~np.isin(self._numbers, numbers)
            self._numbers = np.concatenate([self._numbers[keep], np.array(list(changed), np.int64)])
            parts = [self._counts[keep]]
            if changed:
                parts.append(self._hashing.transform(map(words_of, changed.values())))
            self._counts = scipy.sparse.vstack(parts, format="csr")
            self._weighing = None
        self._revision, self._removal = revision, last or 0
        return len(changed) == CHUNK

    def scores(self, text: str) -> dict[int, float]:
        """Return how near products are to `text`, by number, best first: cosines over 0, those of all that are near."""
        if not len(self._numbers):
            return {}
        if self._weighing is None:
            self._weighing = TfidfTransformer(sublinear_tf=True).fit(self._counts)
            # By columns: a text has some tens of terms, and only what has one of them is looked at.
            self._weighted = self._weighing.transform(self._counts).tocsc()
        query = self._weighing.transform(self._hashing.transform([text[:MAX_TEXT]]))
        found = (query @ self._weighted.T).tocoo()
        numbers, cosines = self._numbers[found.col], found.data
        order = np.lexsort((numbers, -cosines))
        return dict(zip(numbers[order].tolist(), cosines[order].tolist(), strict=True))

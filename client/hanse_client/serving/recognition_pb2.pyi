from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClassifyRequest(_message.Message):
    __slots__ = ("photo", "top")
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    photo: bytes
    top: int
    def __init__(self, photo: _Optional[bytes] = ..., top: _Optional[int] = ...) -> None: ...

class Likelihood(_message.Message):
    __slots__ = ("label", "probability")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    label: str
    probability: float
    def __init__(self, label: _Optional[str] = ..., probability: _Optional[float] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("classes", "personal", "recognizer")
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    RECOGNIZER_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[Likelihood]
    personal: _containers.RepeatedCompositeFieldContainer[Likelihood]
    recognizer: bytes
    def __init__(self, classes: _Optional[_Iterable[_Union[Likelihood, _Mapping]]] = ..., personal: _Optional[_Iterable[_Union[Likelihood, _Mapping]]] = ..., recognizer: _Optional[bytes] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("photo",)
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    photo: bytes
    def __init__(self, photo: _Optional[bytes] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("vector", "embedding")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    vector: _containers.RepeatedScalarFieldContainer[float]
    embedding: bytes
    def __init__(self, vector: _Optional[_Iterable[float]] = ..., embedding: _Optional[bytes] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("category", "price_min", "price_max", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    PRICE_MIN_FIELD_NUMBER: _ClassVar[int]
    PRICE_MAX_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    category: str
    price_min: str
    price_max: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, category: _Optional[str] = ..., price_min: _Optional[str] = ..., price_max: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("photo", "text", "where", "k")
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    photo: bytes
    text: str
    where: Filter
    k: int
    def __init__(self, photo: _Optional[bytes] = ..., text: _Optional[str] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., k: _Optional[int] = ...) -> None: ...

class SimilarRequest(_message.Message):
    __slots__ = ("sku", "where", "k", "diversity")
    SKU_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    sku: str
    where: Filter
    k: int
    diversity: float
    def __init__(self, sku: _Optional[str] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., k: _Optional[int] = ..., diversity: _Optional[float] = ...) -> None: ...

class Product(_message.Message):
    __slots__ = ("sku", "title", "price", "currency", "category", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SKU_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    sku: str
    title: str
    price: str
    currency: str
    category: str
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, sku: _Optional[str] = ..., title: _Optional[str] = ..., price: _Optional[str] = ..., currency: _Optional[str] = ..., category: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Match(_message.Message):
    __slots__ = ("product", "similarity", "score", "photo")
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    product: Product
    similarity: float
    score: float
    photo: bytes
    def __init__(self, product: _Optional[_Union[Product, _Mapping]] = ..., similarity: _Optional[float] = ..., score: _Optional[float] = ..., photo: _Optional[bytes] = ...) -> None: ...

class Found(_message.Message):
    __slots__ = ("matches", "known", "threshold", "embedding")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[Match]
    known: bool
    threshold: float
    embedding: bytes
    def __init__(self, matches: _Optional[_Iterable[_Union[Match, _Mapping]]] = ..., known: _Optional[bool] = ..., threshold: _Optional[float] = ..., embedding: _Optional[bytes] = ...) -> None: ...

class SuggestRequest(_message.Message):
    __slots__ = ("viewed", "where", "k")
    VIEWED_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    viewed: _containers.RepeatedScalarFieldContainer[str]
    where: Filter
    k: int
    def __init__(self, viewed: _Optional[_Iterable[str]] = ..., where: _Optional[_Union[Filter, _Mapping]] = ..., k: _Optional[int] = ...) -> None: ...

class Suggestions(_message.Message):
    __slots__ = ("matches",)
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[Match]
    def __init__(self, matches: _Optional[_Iterable[_Union[Match, _Mapping]]] = ...) -> None: ...

class CorrectRequest(_message.Message):
    __slots__ = ("photo", "label", "sku")
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SKU_FIELD_NUMBER: _ClassVar[int]
    photo: bytes
    label: str
    sku: str
    def __init__(self, photo: _Optional[bytes] = ..., label: _Optional[str] = ..., sku: _Optional[str] = ...) -> None: ...

class Correction(_message.Message):
    __slots__ = ("number", "photo")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    number: int
    photo: bytes
    def __init__(self, number: _Optional[int] = ..., photo: _Optional[bytes] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("recognizer", "version", "embedding", "dimension", "classes", "personal_labels", "products", "photos", "corrections", "threshold", "rebuild", "problem", "rates")
    RECOGNIZER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_LABELS_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    PHOTOS_FIELD_NUMBER: _ClassVar[int]
    CORRECTIONS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    REBUILD_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    recognizer: bytes
    version: int
    embedding: bytes
    dimension: int
    classes: _containers.RepeatedScalarFieldContainer[str]
    personal_labels: _containers.RepeatedScalarFieldContainer[str]
    products: int
    photos: int
    corrections: int
    threshold: float
    rebuild: Rebuild
    problem: str
    rates: ThresholdRates
    def __init__(self, recognizer: _Optional[bytes] = ..., version: _Optional[int] = ..., embedding: _Optional[bytes] = ..., dimension: _Optional[int] = ..., classes: _Optional[_Iterable[str]] = ..., personal_labels: _Optional[_Iterable[str]] = ..., products: _Optional[int] = ..., photos: _Optional[int] = ..., corrections: _Optional[int] = ..., threshold: _Optional[float] = ..., rebuild: _Optional[_Union[Rebuild, _Mapping]] = ..., problem: _Optional[str] = ..., rates: _Optional[_Union[ThresholdRates, _Mapping]] = ...) -> None: ...

class ThresholdRates(_message.Message):
    __slots__ = ("calibrated", "false_accept", "impostor", "false_reject", "genuine")
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    FALSE_ACCEPT_FIELD_NUMBER: _ClassVar[int]
    IMPOSTOR_FIELD_NUMBER: _ClassVar[int]
    FALSE_REJECT_FIELD_NUMBER: _ClassVar[int]
    GENUINE_FIELD_NUMBER: _ClassVar[int]
    calibrated: bool
    false_accept: float
    impostor: int
    false_reject: float
    genuine: int
    def __init__(self, calibrated: _Optional[bool] = ..., false_accept: _Optional[float] = ..., impostor: _Optional[int] = ..., false_reject: _Optional[float] = ..., genuine: _Optional[int] = ...) -> None: ...

class Rebuild(_message.Message):
    __slots__ = ("done", "total")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class GetProductRequest(_message.Message):
    __slots__ = ("sku",)
    SKU_FIELD_NUMBER: _ClassVar[int]
    sku: str
    def __init__(self, sku: _Optional[str] = ...) -> None: ...

class Shelved(_message.Message):
    __slots__ = ("product", "photos")
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    PHOTOS_FIELD_NUMBER: _ClassVar[int]
    product: Product
    photos: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, product: _Optional[_Union[Product, _Mapping]] = ..., photos: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ListProductsRequest(_message.Message):
    __slots__ = ("where", "after", "limit")
    WHERE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    where: Filter
    after: str
    limit: int
    def __init__(self, where: _Optional[_Union[Filter, _Mapping]] = ..., after: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ProductPage(_message.Message):
    __slots__ = ("products", "next")
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    products: _containers.RepeatedCompositeFieldContainer[Product]
    next: str
    def __init__(self, products: _Optional[_Iterable[_Union[Product, _Mapping]]] = ..., next: _Optional[str] = ...) -> None: ...

class PutProductRequest(_message.Message):
    __slots__ = ("product", "photos")
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    PHOTOS_FIELD_NUMBER: _ClassVar[int]
    product: Product
    photos: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, product: _Optional[_Union[Product, _Mapping]] = ..., photos: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PutProductReply(_message.Message):
    __slots__ = ("photos",)
    PHOTOS_FIELD_NUMBER: _ClassVar[int]
    photos: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, photos: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ImportAnswer(_message.Message):
    __slots__ = ("sku", "done", "problem")
    SKU_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    sku: str
    done: PutProductReply
    problem: Problem
    def __init__(self, sku: _Optional[str] = ..., done: _Optional[_Union[PutProductReply, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class RemoveProductRequest(_message.Message):
    __slots__ = ("sku",)
    SKU_FIELD_NUMBER: _ClassVar[int]
    sku: str
    def __init__(self, sku: _Optional[str] = ...) -> None: ...

class RemoveProductReply(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: bool
    def __init__(self, removed: _Optional[bool] = ...) -> None: ...

class Photo(_message.Message):
    __slots__ = ("id", "photo", "top", "k", "where")
    ID_FIELD_NUMBER: _ClassVar[int]
    PHOTO_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    id: str
    photo: bytes
    top: int
    k: int
    where: Filter
    def __init__(self, id: _Optional[str] = ..., photo: _Optional[bytes] = ..., top: _Optional[int] = ..., k: _Optional[int] = ..., where: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("id", "recognized", "problem")
    ID_FIELD_NUMBER: _ClassVar[int]
    RECOGNIZED_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    id: str
    recognized: Recognized
    problem: Problem
    def __init__(self, id: _Optional[str] = ..., recognized: _Optional[_Union[Recognized, _Mapping]] = ..., problem: _Optional[_Union[Problem, _Mapping]] = ...) -> None: ...

class Recognized(_message.Message):
    __slots__ = ("classification", "found")
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    classification: Classification
    found: Found
    def __init__(self, classification: _Optional[_Union[Classification, _Mapping]] = ..., found: _Optional[_Union[Found, _Mapping]] = ...) -> None: ...

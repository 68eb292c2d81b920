"""The recognizer over gRPC: the calls of `recognition.proto`, and photos all day over one stream.

    with GrpcListener(serve) as listener:            # has the port, and serves nothing yet
        listener.start(service, token)
        listener.drain(seconds=10)

What a call means is in the proto file, and what it answers in `calls`. A stream's photos are recognized side by side,
at most `IN_FLIGHT` of them, and answered in order; beyond that the sender waits, by gRPC's own flow control. A stream
that is idle costs a thread, so there is a bound of them.

Who has no token is refused before a message of theirs is read: a call that never sends its message would otherwise
hold a thread.
"""

# ruff: noqa: N802 - methods are called as in the proto file

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NoReturn, Self, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hanse_client.serving import calls, recognition_pb2_grpc
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.access import is_bearer
from hanse_client.serving.messages import classification_message, conditions, found_message, number
from hanse_client.serving.photos import decoded
from hanse_client.serving.problems import DETAILS, Refused, explain, in_words
from hanse_client.serving.schemas import MAX_RESULTS
from hanse_client.serving.service import Service
from hanse_client.serving.settings import Serve
from hanse_common.errors import HanseError, NotServing
from hanse_common.files import read_bounded

log = logging.getLogger(__name__)

SERVICE: Final = "hanse.recognition.v1.Recognition"
IN_FLIGHT: Final = 8
"""How many photos of one stream are recognized at once."""

POLL_SECONDS: Final = 0.2
MAX_PEM_BYTES: Final = 1 << 20

_CHECK = "/grpc.health.v1.Health/Check"
_BY_STATUS = {
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

A = TypeVar("A")
Q = TypeVar("Q")


class GrpcListener:
    """A gRPC server that has its port from the beginning.

    Raises `NotServing` when it can't have it, or the certificate can't be used.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._health = health.HealthServicer(experimental_thread_pool=ThreadPoolExecutor(2))
        self._token: Callable[[], str | None] | None = None
        workers = serve.requests + serve.streams
        self._server = grpc.server(
            ThreadPoolExecutor(workers, thread_name_prefix="grpc"),
            interceptors=(_TokenNeeded(lambda: self._token),),
            maximum_concurrent_rpcs=workers,
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", serve.photo_bytes + (1 << 20)),
                ("grpc.max_metadata_size", 8192),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ),
        )
        host = f"[{serve.host}]" if ":" in serve.host else serve.host
        address = f"{host}:{serve.grpc_port}"
        try:
            if serve.certificate is None or serve.key is None:
                self.port: int = self._server.add_insecure_port(address)
            else:
                pair = tuple(
                    read_bounded(path, MAX_PEM_BYTES, "a PEM file", NotServing)
                    for path in (serve.key, serve.certificate)
                )
                self.port = self._server.add_secure_port(address, grpc.ssl_server_credentials((pair,)))
        except RuntimeError:
            raise NotServing(
                f"port {serve.grpc_port} of {serve.host}: cannot be used on this machine. Choose another "
                "serve.grpc_port, or end the program that has it."
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(None).wait()

    def start(self, service: Service, token: Callable[[], str | None] | None) -> None:
        """Serve; `token` as in `app.build`."""
        self._token = token
        add_calls: Callable[[object, object], None] = recognition_pb2_grpc.add_RecognitionServicer_to_server
        add_calls(_Calls(service), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def drain(self, seconds: float) -> None:
        """Take no more calls, and end those under way, in order if they do within `seconds`."""
        self._health.enter_graceful_shutdown()
        self._server.stop(seconds).wait()


class _TokenNeeded(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token; whether the service is well may everybody ask, but not wait for the answer."""

    def __init__(self, token: Callable[[], Callable[[], str | None] | None]) -> None:
        self._token = token

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        token = self._token()
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        if token is None or details.method == _CHECK or is_bearer(metadata.get("authorization", ""), token()):
            return continuation(details)
        return _REFUSED


def _refuse(requests: object, context: Any) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, DETAILS["token_needed"])
    raise RuntimeError  # abort raises


_ENDING: Final = "The service ends. Connect again."

_REFUSED = grpc.stream_stream_rpc_method_handler(_refuse)


class _Calls(recognition_pb2_grpc.RecognitionServicer):
    """The calls, by the core."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._recognition = service.recognition
        self._streams = threading.BoundedSemaphore(service.config.serve.streams)

    def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.Classification:
        """Say what is on a photo."""
        return self._answered(calls.classify, request, context)

    def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.Embedding:
        """Return a photo's vector."""
        return self._answered(calls.embed, request, context)

    def Search(self, request: pb.SearchRequest, context: Any) -> pb.Found:
        """Find products by a photo, a text, or both."""
        return self._answered(calls.search, request, context)

    def Similar(self, request: pb.SimilarRequest, context: Any) -> pb.Found:
        """Find products like a product."""
        return self._answered(calls.similar, request, context)

    def Suggest(self, request: pb.SuggestRequest, context: Any) -> pb.Suggestions:
        """Find products like those that a shopper looked at lately."""
        return self._answered(calls.suggest, request, context)

    def Correct(self, request: pb.CorrectRequest, context: Any) -> pb.Correction:
        """Write down what a photo shows."""
        return self._answered(calls.correct, request, context)

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.Status:
        """Say what serves now."""
        return self._answered(calls.get_status, request, context)

    def GetProduct(self, request: pb.GetProductRequest, context: Any) -> pb.Shelved:
        """Return one product."""
        return self._answered(calls.get_product, request, context)

    def ListProducts(self, request: pb.ListProductsRequest, context: Any) -> pb.ProductPage:
        """List products by SKU."""
        return self._answered(calls.list_products, request, context)

    def PutProduct(self, request: pb.PutProductRequest, context: Any) -> pb.PutProductReply:
        """Add or replace a product, and add photos."""
        return self._answered(calls.put_product, request, context)

    def RemoveProduct(self, request: pb.RemoveProductRequest, context: Any) -> pb.RemoveProductReply:
        """Remove a product."""
        return self._answered(calls.remove_product, request, context)

    def _answered(self, answer: Callable[[Service, Q], A], request: Q, context: Any) -> A:
        """Return the answer, or end the call with what went wrong."""
        try:
            return answer(self._service, request)
        except Exception as error:  # every error becomes a status, without a traceback
            status, code, text = _told(error)
        context.set_trailing_metadata((("hanse-code", code),))
        context.abort(status, text)
        raise RuntimeError  # abort raises

    def ImportProducts(
        self, requests: Iterator[pb.PutProductRequest], context: Any
    ) -> Iterator[pb.ImportAnswer]:
        """Add or replace product after product."""
        self._take_place(context)
        try:
            for request in requests:
                if not self._service.ready:
                    context.abort(grpc.StatusCode.UNAVAILABLE, _ENDING)
                try:
                    done = calls.put_product(self._service, request)
                    yield pb.ImportAnswer(sku=request.product.sku, done=done)
                except Exception as error:  # told in the answer, since the stream goes on
                    _, code, text = _told(error)
                    problem = pb.Problem(code=code, message=text)
                    yield pb.ImportAnswer(sku=request.product.sku, problem=problem)
        except grpc.RpcError:  # the sender has gone
            log.debug("a stream of products broke off")
        finally:
            self._streams.release()

    def _take_place(self, context: Any) -> None:
        """Take one of the streams' places, which the stream gives back."""
        if not self._streams.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many streams at once. End another first.")

    def Recognize(self, requests: Iterator[pb.Photo], context: Any) -> Iterator[pb.Answer]:
        """Answer photo after photo."""
        self._take_place(context)
        closed = threading.Event()
        context.add_callback(closed.set)
        try:
            with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="photo") as pool:
                coming: queue.Queue[Future[pb.Answer] | None] = queue.Queue(IN_FLIGHT - 1)
                taker = threading.Thread(
                    target=self._take, args=(requests, pool, coming, closed), name="photos", daemon=True
                )
                taker.start()
                yield from self._in_order(coming, closed, context)
        finally:
            closed.set()
            self._streams.release()

    def _take(
        self,
        requests: Iterator[pb.Photo],
        pool: ThreadPoolExecutor,
        coming: "queue.Queue[Future[pb.Answer] | None]",
        closed: threading.Event,
    ) -> None:
        """Have each photo recognized that comes, as long as there is room."""
        try:
            for photo in requests:
                if closed.is_set():
                    return
                _offer(coming, pool.submit(self._recognized, photo), closed)
        except (grpc.RpcError, RuntimeError):  # the sender has gone, or the stream has ended meanwhile
            log.debug("a stream of photos broke off")
        finally:
            _offer(coming, None, closed)

    def _in_order(
        self, coming: "queue.Queue[Future[pb.Answer] | None]", closed: threading.Event, context: Any
    ) -> Iterator[pb.Answer]:
        """Yield answers until no more come, the sender has gone, or the service ends."""
        while not closed.is_set():
            try:
                answer = coming.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._service.ready:
                    context.abort(grpc.StatusCode.UNAVAILABLE, _ENDING)
                continue
            if answer is None:
                return
            yield answer.result()

    def _recognized(self, photo: pb.Photo) -> pb.Answer:
        try:
            found = self._recognition.recognize(
                decoded(photo.photo),
                top=number(photo, "top", 5, calls.MAX_TOP),
                k=number(photo, "k", 10, MAX_RESULTS),
                where=conditions(photo.where),
            )
        except Exception as error:  # told in the answer, since the stream goes on
            _, code, text = _told(error)
            return pb.Answer(id=photo.id, problem=pb.Problem(code=code, message=text))
        recognized = pb.Recognized(
            classification=classification_message(found.classification), found=found_message(found.found)
        )
        return pb.Answer(id=photo.id, recognized=recognized)


def _offer(
    coming: "queue.Queue[Future[pb.Answer] | None]", item: "Future[pb.Answer] | None", closed: threading.Event
) -> None:
    """Put `item` into the queue once there is room, unless the stream is closed before."""
    while not closed.is_set():
        try:
            coming.put(item, timeout=POLL_SECONDS)
        except queue.Full:
            continue
        return


def _told(error: Exception) -> tuple[Any, str, str]:
    """Return gRPC's status, our code and a line of text for an error."""
    if isinstance(error, Refused):
        return _BY_STATUS.get(error.status_code, grpc.StatusCode.INTERNAL), error.code, str(error.detail)
    status, code = explain(error) if isinstance(error, HanseError) else (500, "internal")
    if status == 500:
        log.error("a call failed", exc_info=error)
        return grpc.StatusCode.INTERNAL, code, DETAILS[code]
    if code == "recognizer_missing":
        return grpc.StatusCode.FAILED_PRECONDITION, code, in_words(error)
    return _BY_STATUS[status], code, in_words(error)

"""The error table over a real gRPC call: what a handler raises is what the client gets."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from headway.errors import INTERNAL_MESSAGE, TABLE, HeadwayError, from_rpc_error, to_status
from headway.reasons import Reason
from headway.server import Server, connect
from headway.v1 import scheduler_pb2, scheduler_pb2_grpc

MEGABYTE = 1 << 20


class Raising(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Raises what the test asks for, on a unary and on a streaming call."""

    error: Exception

    async def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        raise self.error

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield scheduler_pb2.GenerateResponse()
        raise self.error


@pytest.fixture
async def service() -> AsyncIterator[tuple[Raising, Any, Any]]:
    server = Server(max_message_bytes=MEGABYTE, max_concurrent_streams=10, has_reflection=True)
    servicer = Raising()  # type: ignore[abstract]
    server.register(
        scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"],
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server,
        servicer,
    )
    port = await server.start("127.0.0.1:0")
    channel = connect(f"127.0.0.1:{port}", max_message_bytes=MEGABYTE)
    stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
    yield servicer, stub, channel
    await channel.close()
    await server.stop(0)


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_row_survives_the_wire(service: Any, reason: Reason) -> None:
    servicer, stub, _ = service
    servicer.error = HeadwayError(reason, "told to the client", retry_after_ms=2500, field="model")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(scheduler_pb2.CancelRequest())
    assert caught.value.code() == TABLE[reason].code
    error = from_rpc_error(caught.value)
    assert (error.reason, error.message, error.field) == (reason, "told to the client", "model")
    assert error.retry_after_ms == (2500 if TABLE[reason].is_retryable else None)


async def test_unknown_exceptions_keep_their_text_to_themselves(service: Any) -> None:
    servicer, stub, _ = service
    servicer.error = ZeroDivisionError("secret")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(scheduler_pb2.CancelRequest())
    error = from_rpc_error(caught.value)
    assert (error.reason, error.message) == (Reason.INTERNAL, INTERNAL_MESSAGE)
    assert "secret" not in str(caught.value)


async def test_streams_are_translated_after_their_first_message_too(service: Any) -> None:
    servicer, stub, _ = service
    servicer.error = HeadwayError(Reason.DRAINING, "shutting down")
    call = stub.Generate(scheduler_pb2.GenerateRequest())
    assert await call.read() == scheduler_pb2.GenerateResponse()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).reason is Reason.DRAINING


async def test_bare_statuses_become_reasons(service: Any) -> None:
    _, stub, _ = service
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Cancel(scheduler_pb2.CancelRequest(tenant="x" * 2 * MEGABYTE))
    assert from_rpc_error(caught.value).reason is Reason.BODY_TOO_LARGE


async def test_a_taken_port_is_an_os_error() -> None:
    first = Server(max_message_bytes=MEGABYTE, max_concurrent_streams=10, has_reflection=False)
    second = Server(max_message_bytes=MEGABYTE, max_concurrent_streams=10, has_reflection=False)
    port = await first.start("127.0.0.1:0")
    with pytest.raises(OSError, match="cannot listen"):
        await second.start(f"127.0.0.1:{port}")
    await first.stop(0)
    await second.stop(0)


@pytest.mark.parametrize("method", ["Cancel", "Generate"])
async def test_garbage_bytes_are_an_invalid_request(service: Any, method: str) -> None:
    _, _, channel = service
    path = f"/headway.v1.SchedulerService/{method}"
    make = channel.unary_unary if method == "Cancel" else channel.unary_stream
    call = make(path)(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "Cancel" else call.read())
    assert from_rpc_error(caught.value).reason is Reason.INVALID_REQUEST
    assert "Error" not in str(caught.value.details())


def test_details_that_contradict_their_status_are_not_believed() -> None:
    status = to_status(HeadwayError(Reason.MODEL_NOT_FOUND, "no"))
    for details in (status.SerializeToString(), b"\xff" * 10):
        metadata = grpc.aio.Metadata(("grpc-status-details-bin", details))
        error = grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, details="a proxy's words"
        )
        assert from_rpc_error(error).reason is Reason.NO_CAPACITY

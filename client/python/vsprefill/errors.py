"""Exceptions of the client, one class per gRPC code that a caller can act on (docs/errors.md)."""

from __future__ import annotations

import grpc


class VsprefillError(Exception):
    """A call that failed. `code` is the gRPC status code, `details` the message of the server or of a check here.

    `retryable`: the same request, sent again with a higher attempt, may succeed.
    """

    retryable = False

    def __init__(self, details: str | None, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details or ""


class InvalidRequestError(VsprefillError):
    """INVALID_ARGUMENT: the request is wrong; the message holds the value and the allowed range."""


class ModelMismatchError(VsprefillError):
    """FAILED_PRECONDITION: the server has another model (kv_id), or not that KV dtype."""


class OverloadedError(VsprefillError):
    """RESOURCE_EXHAUSTED: queue or KV pool full.

    `retry_after_seconds` is the server's advice or None; where the server says that it will never have room
    (a cache larger than its pool) `retryable` is False.
    """

    retryable = True
    retry_after_seconds: float | None = None


class ServerUnavailableError(VsprefillError):
    """UNAVAILABLE: the server is gone, draining, or a push target is dead. Worth another try, best elsewhere."""

    retryable = True


class DeadlineError(VsprefillError):
    """DEADLINE_EXCEEDED."""


class RequestCancelledError(VsprefillError):
    """CANCELLED: by this client, or by a higher attempt of the same request."""


class DuplicateRequestError(VsprefillError):
    """ALREADY_EXISTS: the same request id and attempt (or a higher one) is in flight."""


class PushDeniedError(VsprefillError):
    """PERMISSION_DENIED: a push target is not on the server's allow-list."""


class UnauthenticatedError(VsprefillError):
    """UNAUTHENTICATED: a proxy or server wants credentials that the call did not carry."""


class StalledError(VsprefillError):
    """ABORTED: this client read too slowly, or a stripe was not attached in time."""

    retryable = True


class DataLossError(VsprefillError):
    """The KV cache did not arrive whole: a checksum, a chunk or the manifest does not fit. Never use it."""

    retryable = True

    def __init__(self, details: str | None, code: grpc.StatusCode = grpc.StatusCode.DATA_LOSS) -> None:
        super().__init__(details, code)


_BY_CODE: dict[grpc.StatusCode, type[VsprefillError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatchError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequestError,
    grpc.StatusCode.PERMISSION_DENIED: PushDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.ABORTED: StalledError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
}


def from_rpc_error(error: grpc.RpcError) -> VsprefillError:
    """The exception for a grpc.RpcError (or grpc.aio.AioRpcError) that a call raised."""
    result = _BY_CODE.get(error.code(), VsprefillError)(error.details(), error.code())
    if isinstance(result, OverloadedError):
        for key, value in error.trailing_metadata() or ():
            if key != "grpc-retry-pushback-ms":
                continue
            try:
                milliseconds = int(value)
            except ValueError:
                milliseconds = -1  # gRPC's rule: what is no number means "do not try again"
            if milliseconds >= 0:
                result.retry_after_seconds = milliseconds / 1000
            else:
                result.retryable = False
    return result

"""Exceptions of the client, one class per gRPC code that a caller can act on (docs/errors.md)."""

import grpc


class VsprefillError(Exception):
    """A call that failed. `code` is the gRPC status code, `details` the server's message."""

    def __init__(self, details, code=grpc.StatusCode.UNKNOWN):
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class InvalidRequestError(VsprefillError):
    """INVALID_ARGUMENT: the request is wrong; the message holds the value and the allowed range."""


class ModelMismatchError(VsprefillError):
    """FAILED_PRECONDITION: the server has another model (kv_id), or not that KV dtype."""


class OverloadedError(VsprefillError):
    """RESOURCE_EXHAUSTED: queue or KV pool full. `retry_after_seconds` is the server's advice or None."""

    retry_after_seconds = None


class ServerUnavailableError(VsprefillError):
    """UNAVAILABLE: the server is gone, draining, or a push target is dead. Worth another try elsewhere."""


class DeadlineError(VsprefillError):
    """DEADLINE_EXCEEDED."""


class RequestCancelledError(VsprefillError):
    """CANCELLED: by this client, or by a higher attempt of the same request."""


class DuplicateRequestError(VsprefillError):
    """ALREADY_EXISTS: the same request id and attempt (or a higher one) is in flight."""


class PushDeniedError(VsprefillError):
    """PERMISSION_DENIED: a push target is not on the server's allow-list."""


class StalledError(VsprefillError):
    """ABORTED: this client read too slowly, or a stripe was not attached in time."""


class DataLossError(VsprefillError):
    """The KV cache did not arrive whole: a checksum, a chunk or the manifest does not fit. Never use it."""

    def __init__(self, details, code=grpc.StatusCode.DATA_LOSS):
        super().__init__(details, code)


_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatchError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequestError,
    grpc.StatusCode.PERMISSION_DENIED: PushDeniedError,
    grpc.StatusCode.ABORTED: StalledError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
}


def from_rpc_error(error):
    """The exception for a grpc.RpcError that a call raised."""
    result = _BY_CODE.get(error.code(), VsprefillError)(error.details(), error.code())
    if isinstance(result, OverloadedError):
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-retry-pushback-ms" and int(value) >= 0:
                result.retry_after_seconds = int(value) / 1000
    return result

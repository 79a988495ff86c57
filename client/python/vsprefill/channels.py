"""Connections to a server: TLS, channel options and the service's methods as raw bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from .v1 import prefill_pb2

_SERVICE = "/vsprefill.v1.PrefillService/"
# The largest message of the service is 4 MiB (docs/kv_wire_format.md), which is also gRPC's default limit.
# One connection per channel, or stripes would share one. Keepalive finds a peer that went without a word.
# Without a bound on its backoff gRPC looks for a server that was away for a while only every two minutes.
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 60000),
    ("grpc.keepalive_timeout_ms", 20000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


@dataclass(frozen=True)
class TlsOptions:
    """TLS of the connection. Each field is a path to a PEM file or its bytes.

    root_certificates: whom to trust; None: the system's. certificate_chain and private_key: this client's, for
    servers that want one (mutual TLS); both or neither. server_name: the name to check in the server's
    certificate where it is not the host of the address.
    """

    root_certificates: str | Path | bytes | None = None
    certificate_chain: str | Path | bytes | None = None
    private_key: str | Path | bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ValueError or OSError, naming the file, where a part is missing."""
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("TLS: certificate_chain and private_key go together; only one is given")
        return grpc.ssl_channel_credentials(_pem(self.root_certificates), _pem(self.private_key),
                                            _pem(self.certificate_chain))

    def channel_options(self) -> list[tuple[str, Any]]:
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def _pem(value: str | Path | bytes | None) -> bytes | None:
    if value is None:
        return None
    data = value if isinstance(value, bytes) else Path(value).read_bytes()
    if b"-----BEGIN" not in data:
        raise ValueError(f"TLS: {'the value' if isinstance(value, bytes) else value} is no PEM file")
    return data


def _keep_freed_memory() -> None:
    """Lets messages of megabytes take the memory of those before them.

    glibc gives such blocks back to the kernel when they are freed and takes fresh pages for the next: a third of the
    client's time. Its thresholds for that rise to the largest block that was freed, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD), so one block that nobody touches is enough; where they are set by hand it changes nothing.
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)


class Connection:
    """One channel (sync or asyncio) and the service's methods on it.

    Streams yield the bytes of messages: wire.parse_event reads chunks from them without copies.
    """

    def __init__(self, target: str, tls: TlsOptions | None, credentials: grpc.ChannelCredentials | None,
                 asyncio: bool) -> None:
        if tls is not None and credentials is not None:
            raise ValueError("give either tls or credentials, not both")
        _keep_freed_memory()
        options = list(_OPTIONS)
        if tls is not None:
            credentials = tls.credentials()
            options += tls.channel_options()
        module: Any = grpc.aio if asyncio else grpc
        if credentials is None:
            self.channel = module.insecure_channel(target, options=options)
        else:
            self.channel = module.secure_channel(target, credentials, options=options)
        stream, unary = self.channel.unary_stream, self.channel.unary_unary
        self.prefill: Callable[..., Any] = stream(
            _SERVICE + "Prefill", request_serializer=prefill_pb2.PrefillRequest.SerializeToString)
        self.attach: Callable[..., Any] = stream(
            _SERVICE + "Attach", request_serializer=prefill_pb2.AttachRequest.SerializeToString)
        self.get_model_info: Callable[..., Any] = unary(
            _SERVICE + "GetModelInfo", request_serializer=prefill_pb2.GetModelInfoRequest.SerializeToString,
            response_deserializer=prefill_pb2.ModelInfo.FromString)
        self.get_load: Callable[..., Any] = unary(
            _SERVICE + "GetLoad", request_serializer=prefill_pb2.GetLoadRequest.SerializeToString,
            response_deserializer=prefill_pb2.Load.FromString)

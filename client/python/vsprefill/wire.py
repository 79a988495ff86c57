"""Messages of the response stream, read without copying their payload (docs/kv_wire_format.md).

A KV chunk is nearly all of the traffic. protobuf would copy its payload into its own memory and again on
every access, so the few header bytes are read by hand here and the payload stays a view of the received
message. Whatever is no plain chunk goes through protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from .errors import DataLossError
from .v1 import prefill_pb2


@dataclass(slots=True)
class Chunk:
    """One layer's keys and values of tokens [token_begin, token_end). `payload` borrows the message."""

    layer: int
    token_begin: int
    token_end: int
    checksum: int
    payload: memoryview


class _Odd(Exception):
    """Not written the way senders write chunks: protobuf decides."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, offset behind it)."""
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise _Odd
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Odd


def _chunk(message: bytes) -> Chunk:
    data = memoryview(message)
    size, at = _varint(data, 1)
    if size != len(data) - at:
        raise _Odd
    chunk = Chunk(0, 0, 0, 0, data[:0])
    while at < len(data):
        tag, at = _varint(data, at)
        if tag == 0x08:
            chunk.layer, at = _varint(data, at)
        elif tag == 0x10:
            chunk.token_begin, at = _varint(data, at)
        elif tag == 0x18:
            chunk.token_end, at = _varint(data, at)
        elif tag == 0x21 and at + 8 <= len(data):
            chunk.checksum = int.from_bytes(data[at:at + 8], "little")
            at += 8
        elif tag == 0x7A:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise _Odd
            chunk.payload = data[at:at + size]
            at += size
        else:
            raise _Odd
    return chunk


def parse_event(message: bytes) -> Chunk | prefill_pb2.PrefillEvent:
    """A chunk, or the event where it is no chunk. Raises DataLossError for what is no PrefillEvent."""
    if message[:1] == b"\x12":  # PrefillEvent.kv: field 2, length-delimited
        try:
            return _chunk(message)
        except _Odd:
            pass
    try:
        event = prefill_pb2.PrefillEvent.FromString(message)
    except DecodeError as error:
        raise DataLossError(f"a message of {len(message)} bytes is no PrefillEvent: {error}") from None
    if event.WhichOneof("event") != "kv":
        return event
    kv = event.kv
    return Chunk(kv.layer, kv.token_begin, kv.token_end, kv.checksum, memoryview(kv.payload))

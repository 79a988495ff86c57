"""The hand-written reader of chunk messages says what protobuf says, for any order and any bytes."""

import random

import pytest
import vsprefill
from vsprefill.v1 import kv_pb2, prefill_pb2
from vsprefill.wire import Chunk, parse_event

# docs/kv_wire_format.md, the worked example.
EXAMPLE = bytes.fromhex("12230803" "10ac02" "18ae02" "2184fec801f75b9146" "7a10"
                        "803f0040" "40408040" "a040c040" "e0400041")


def check(message):
    """Equal to protobuf's reading, or both refuse."""
    try:
        expected = prefill_pb2.PrefillEvent.FromString(message)
    except Exception:
        with pytest.raises(vsprefill.DataLossError):
            parse_event(message)
        return False
    event = parse_event(message)
    if expected.WhichOneof("event") != "kv":
        assert event == expected
        return True
    kv = expected.kv
    assert isinstance(event, Chunk)
    # protobuf cuts an over-long varint to the field's 32 bits; here it stays and is then out of range.
    assert event.layer & 0xFFFFFFFF == kv.layer
    assert (event.token_begin, event.token_end, event.checksum) == (kv.token_begin, kv.token_end, kv.checksum)
    assert bytes(event.payload) == kv.payload
    return True


def test_worked_example():
    chunk = parse_event(EXAMPLE)
    assert (chunk.layer, chunk.token_begin, chunk.token_end, chunk.checksum) == (3, 300, 302, 0x46915BF701C8FE84)
    assert bytes(chunk.payload) == EXAMPLE[-16:]
    assert chunk.payload.obj is EXAMPLE  # borrowed, not copied


def fields(kv):
    return [part.SerializeToString() for part in (
        kv_pb2.KvChunk(layer=kv.layer), kv_pb2.KvChunk(token_begin=kv.token_begin),
        kv_pb2.KvChunk(token_end=kv.token_end), kv_pb2.KvChunk(checksum=kv.checksum),
        kv_pb2.KvChunk(payload=kv.payload))]


def wrap(body):
    size = len(body)
    prefix = bytearray(b"\x12")
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(prefix) + bytes([size]) + body


def test_any_order_unknown_fields_and_repeats():
    rng = random.Random(1)
    for _ in range(300):
        kv = kv_pb2.KvChunk(layer=rng.choice([0, 1, 200]), token_begin=rng.randrange(2**40),
                            token_end=rng.randrange(2**63), checksum=rng.randrange(2**64),
                            payload=rng.randbytes(rng.choice([0, 3, 200])))
        parts = fields(kv)
        parts += rng.choices(parts, k=rng.randrange(2)) + ([b"\xa0\x06\x05"] if rng.random() < 0.3 else [])
        rng.shuffle(parts)
        assert check(wrap(b"".join(parts)))


def test_broken_bytes_never_do_more_than_raise():
    rng = random.Random(2)
    accepted = 0
    for _ in range(5000):
        message = bytearray(EXAMPLE)
        for _ in range(rng.randrange(1, 4)):
            choice = rng.randrange(3)
            if choice == 0 and message:
                message[rng.randrange(len(message))] = rng.randrange(256)
            elif choice == 1:
                del message[rng.randrange(len(message) + 1):]
            else:
                message.insert(rng.randrange(len(message) + 1), rng.randrange(256))
        accepted += check(bytes(message))
    assert 0 < accepted < 5000  # both outcomes were seen


def test_other_events_come_from_protobuf():
    event = prefill_pb2.PrefillEvent(first_token=prefill_pb2.FirstToken(token_id=7))
    assert parse_event(event.SerializeToString()) == event
    assert parse_event(b"") == prefill_pb2.PrefillEvent()

"""The Python clients, sync and asyncio, against a fake server: whole streams, torn streams, errors."""

import grpc
import numpy as np
import pytest
import vsprefill
from blocking_async_client import BlockingAsyncClient
from fake_server import FIRST_TOKEN, LAYERS, FakeServer, make_kv
from vsprefill.v1 import kv_pb2, prefill_pb2

IDS = list(range(40))


@pytest.fixture(params=[vsprefill.PrefillClient, BlockingAsyncClient], ids=["sync", "asyncio"])
def connect(request):
    """The client class under test: both pass the same tests."""
    return request.param


def check_whole(cache, dtype, start=0):
    assert cache.first_token == FIRST_TOKEN
    for layer in range(LAYERS):
        expected = make_kv(layer, len(IDS), dtype)[:, :, start:]
        np.testing.assert_array_equal(cache.keys[layer], expected[0])
        np.testing.assert_array_equal(cache.values[layer], expected[1])


@pytest.mark.parametrize("name,dtype", [("bfloat16", kv_pb2.KV_DTYPE_BFLOAT16),
                                        ("float32", kv_pb2.KV_DTYPE_FLOAT32)])
@pytest.mark.parametrize("stripes", [1, 2, 3, LAYERS])
@pytest.mark.parametrize("start", [0, 1, 39])
def test_whole_cache(connect, name, dtype, stripes, start):
    with FakeServer() as server, connect(server.address) as client:
        cache = client.prefill(IDS, kv_dtype=name, stripes=stripes, start_token=start, want_logits=True, timeout=20)
    check_whole(cache, dtype, start)
    assert cache.layout.dtype == name
    assert cache.layout.tokens == len(IDS) - start
    np.testing.assert_array_equal(cache.logits, np.array([0.5, 1.5], np.float32))
    assert cache.stats.density == 0.25
    assert cache.stats.layer_group_density == (0.1, 0.2, 0.3, 0.4)


def test_layers_come_one_by_one(connect):
    with FakeServer() as server, connect(server.address) as client:
        stream = client.stream(IDS)
        assert stream.cache is None
        assert [layer.index for layer in stream] == list(range(LAYERS))
        check_whole(stream.cache, kv_pb2.KV_DTYPE_BFLOAT16)
        assert stream.cache.logits is None


def test_request_fields(connect):
    with FakeServer() as server, connect(server.address) as client:
        client.prefill(IDS, request_id="r", attempt=3, method="vsprefill", parameters={"threshold": 2.0},
                       preset="fast", expected_kv_id="id")
    request = server.requests[0]
    assert request.method.preset == "fast"
    assert (request.request_id, request.attempt, list(request.token_ids)) == ("r", 3, IDS)
    assert (request.method.name, dict(request.method.parameters)) == ("vsprefill", {"threshold": 2.0})


def test_text_needs_a_tokenizer(connect):
    class Letters:
        def encode(self, text):
            return [ord(c) for c in text]

    with FakeServer() as server:
        with connect(server.address, tokenizer=Letters()) as client:
            assert client.prefill(text="abc").token_ids == [97, 98, 99]
        with connect(server.address) as client:
            with pytest.raises(ValueError, match="tokenizer"):
                client.prefill(text="abc")
            with pytest.raises(ValueError, match="either"):
                client.prefill()


def test_bfloat16_values_are_exact():
    bits = np.array([0x3F80, 0xC000, 0x0001, 0x7F80], np.uint16)
    np.testing.assert_array_equal(vsprefill.bfloat16_to_float32(bits),
                                  np.array([1.0, -2.0, 2.0**-133, np.inf], np.float32))


def chunk_indices(events):
    return [i for i, e in enumerate(events) if e.HasField("kv")]


def flip_bit(events):
    chunk = events[chunk_indices(events)[3]].kv
    chunk.payload = chunk.payload[:-1] + bytes([chunk.payload[-1] ^ 1])
    return events


def drop_chunk(events):
    del events[chunk_indices(events)[2]]
    return events


def repeat_chunk(events):
    events.insert(chunk_indices(events)[0], events[chunk_indices(events)[0]])
    return events


def short_payload(events):
    chunk = events[chunk_indices(events)[1]].kv
    chunk.payload = chunk.payload[:-2]
    return events


def wrong_layer(events):
    events[chunk_indices(events)[0]].kv.layer = LAYERS
    return events


def wrong_range(events):
    chunk = events[chunk_indices(events)[-1]].kv
    chunk.token_end += 1
    return events


def no_done(events):
    return events[:-1]


def no_first_token(events):
    return [e for e in events if not e.HasField("first_token")]


def no_accepted(events):
    return events[1:]


def nothing(events):
    return []


def manifest_checksum(events):
    events[-1].done.manifest.layers[1].checksum ^= 1
    return events


def manifest_short(events):
    del events[-1].done.manifest.layers[LAYERS - 1]
    return events


def manifest_bytes(events):
    events[-1].done.manifest.bytes += 1
    return events


def another_kv_id(events):
    events[0].accepted.layout.kv_id = "other"
    return events


def another_length(events):
    events[0].accepted.layout.prompt_tokens += 1
    return events


def unknown_dtype(events):
    events[0].accepted.layout.dtype = 77
    return events


@pytest.mark.parametrize("fault", [flip_bit, drop_chunk, repeat_chunk, short_payload, wrong_layer, wrong_range,
                                   no_done, no_first_token, no_accepted, nothing, manifest_checksum,
                                   manifest_short, manifest_bytes, another_kv_id, another_length, unknown_dtype])
@pytest.mark.parametrize("stripes", [1, 2])
def test_torn_stream_is_data_loss(connect, fault, stripes):
    with FakeServer(fault=fault) as server, connect(server.address) as client:
        stream = client.stream(IDS, expected_kv_id="id", stripes=stripes, timeout=20)
        with pytest.raises(vsprefill.DataLossError):
            for _ in stream:
                pass
        assert stream.cache is None


@pytest.mark.parametrize("code,exception", [
    (grpc.StatusCode.INVALID_ARGUMENT, vsprefill.InvalidRequestError),
    (grpc.StatusCode.FAILED_PRECONDITION, vsprefill.ModelMismatchError),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, vsprefill.OverloadedError),
    (grpc.StatusCode.UNAVAILABLE, vsprefill.ServerUnavailableError),
    (grpc.StatusCode.DEADLINE_EXCEEDED, vsprefill.DeadlineError),
    (grpc.StatusCode.CANCELLED, vsprefill.RequestCancelledError),
    (grpc.StatusCode.ALREADY_EXISTS, vsprefill.DuplicateRequestError),
    (grpc.StatusCode.PERMISSION_DENIED, vsprefill.PushDeniedError),
    (grpc.StatusCode.ABORTED, vsprefill.StalledError),
    (grpc.StatusCode.DATA_LOSS, vsprefill.DataLossError),
    (grpc.StatusCode.INTERNAL, vsprefill.VsprefillError),
])
@pytest.mark.parametrize("stripes", [1, 2])
def test_codes_become_exceptions(connect, code, exception, stripes):
    with FakeServer(error=(code, "value 7 not in [1, 5]", None)) as server:
        with connect(server.address, retry=vsprefill.NO_RETRY) as client:
            with pytest.raises(exception, match="value 7 not in") as caught:
                client.prefill(IDS, stripes=stripes)
    assert caught.value.code == code
    assert type(caught.value) is exception


def test_retry_pushback(connect):
    with FakeServer(error=(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 1500)) as server:
        with connect(server.address, retry=vsprefill.NO_RETRY) as client:
            with pytest.raises(vsprefill.OverloadedError) as caught:
                client.prefill(IDS)
    assert caught.value.retry_after_seconds == 1.5


@pytest.mark.parametrize("stripes", [1, 3])
def test_deadline_and_cancellation_reach_the_server(connect, stripes):
    with FakeServer(never_end=True) as server, connect(server.address) as client:
        with pytest.raises(vsprefill.DeadlineError):
            client.prefill(IDS, timeout=0.5, stripes=stripes)
        assert server.cancelled.wait(5)
    with FakeServer(never_end=True) as server, connect(server.address) as client:
        layers = iter(client.stream(IDS, stripes=stripes))
        next(layers)
        layers.close()  # an abandoned iterator cancels the call
        del layers
        assert server.cancelled.wait(5)


def test_unreachable_server(connect):
    with FakeServer() as server:
        address = server.address
    with connect(address) as client:
        with pytest.raises(vsprefill.ServerUnavailableError):
            client.prefill(IDS, timeout=10)


def test_push(connect):
    with FakeServer() as server, connect(server.address) as client:
        result = client.push(["127.0.0.1:1", "127.0.0.1:2"], IDS)
    assert list(server.requests[0].push_targets) == ["127.0.0.1:1", "127.0.0.1:2"]
    assert result.first_token == FIRST_TOKEN
    assert result.targets == {"127.0.0.1:1": 7, "127.0.0.1:2": 7}


def test_push_that_one_target_did_not_verify(connect):
    def fail_one(events):
        events[-1].done.targets[1].code = 14
        return events

    with FakeServer(fault=fail_one) as server, connect(server.address, retry=vsprefill.NO_RETRY) as client:
        with pytest.raises(vsprefill.DataLossError, match="127.0.0.1:2: code 14"):
            client.push(["127.0.0.1:1", "127.0.0.1:2"], IDS)


def test_info_and_load(connect):
    with FakeServer() as server, connect(server.address) as client:
        assert client.model_info().vocab_size == 99
        assert client.load() == prefill_pb2.Load(requests_waiting=3)

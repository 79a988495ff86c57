"""Retries with attempt numbers, deadlines over all tries, destinations, TLS, call metadata."""

import subprocess
import time

import grpc
import numpy as np
import pytest
import vsprefill
from blocking_async_client import BlockingAsyncClient
from fake_server import FIRST_TOKEN, LAYERS, FakeServer, make_kv
from vsprefill.v1 import kv_pb2

IDS = list(range(40))
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "draining", None)
FAST = vsprefill.RetryPolicy(max_attempts=4, initial_backoff_seconds=0.001)


@pytest.fixture(params=[vsprefill.PrefillClient, BlockingAsyncClient], ids=["sync", "asyncio"])
def connect(request):
    return request.param


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS,
                                  grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_passing_failures_are_tried_again_with_the_next_attempt(connect, code):
    with FakeServer(failures=[(code, "once", None)] * 2) as server, connect(server.address, retry=FAST) as client:
        cache = client.prefill(IDS, request_id="r", attempt=5, timeout=20)
    assert [(r.request_id, r.attempt) for r in server.requests] == [("r", 5), ("r", 6), ("r", 7)]
    assert cache.attempt == 7
    np.testing.assert_array_equal(cache.keys[0], make_kv(0, len(IDS), kv_pb2.KV_DTYPE_BFLOAT16)[0])


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION,
                                  grpc.StatusCode.CANCELLED, grpc.StatusCode.ALREADY_EXISTS,
                                  grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_other_failures_are_not(connect, code):
    with FakeServer(failures=[(code, "no", None)]) as server, connect(server.address, retry=FAST) as client:
        with pytest.raises(vsprefill.VsprefillError) as caught:
            client.prefill(IDS, timeout=20)
    assert caught.value.code == code
    assert len(server.requests) == 1


def test_a_torn_stream_is_tried_again_from_its_beginning(connect):
    torn = []

    def tear_once(events):
        if not torn:
            torn.append(True)
            del events[-3]
        return events

    with FakeServer(fault=tear_once) as server, connect(server.address, retry=FAST) as client:
        cache = client.prefill(IDS, timeout=20)
    assert [r.attempt for r in server.requests] == [0, 1]
    for layer in range(LAYERS):
        k, v = make_kv(layer, len(IDS), kv_pb2.KV_DTYPE_BFLOAT16)
        np.testing.assert_array_equal(cache.keys[layer], k)
        np.testing.assert_array_equal(cache.values[layer], v)


def test_tries_are_bounded_and_the_last_cause_is_raised(connect):
    with FakeServer(error=UNAVAILABLE) as server, connect(server.address, retry=FAST) as client:
        with pytest.raises(vsprefill.ServerUnavailableError, match="draining"):
            client.prefill(IDS, timeout=20)
    assert len(server.requests) == 4


def test_pushback_is_waited_for(connect):
    with FakeServer(failures=[(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 300)]) as server:
        with connect(server.address) as client:
            begin = time.monotonic()
            assert client.prefill(IDS, timeout=20).first_token == FIRST_TOKEN
            assert time.monotonic() - begin >= 0.3


def test_pushback_beyond_the_deadline_fails_at_once(connect):
    with FakeServer(error=(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 60000)) as server:
        with connect(server.address) as client:
            begin = time.monotonic()
            with pytest.raises(vsprefill.OverloadedError) as caught:
                client.prefill(IDS, timeout=5)
            assert time.monotonic() - begin < 4
    assert caught.value.retry_after_seconds == 60
    assert len(server.requests) == 1


@pytest.mark.parametrize("pushback", [-1, "soon"])
def test_pushback_that_says_never(connect, pushback):
    with FakeServer(error=(grpc.StatusCode.RESOURCE_EXHAUSTED, "cache larger than the pool", pushback)) as server:
        with connect(server.address, retry=FAST) as client:
            with pytest.raises(vsprefill.OverloadedError) as caught:
                client.prefill(IDS, timeout=5)
    assert not caught.value.retryable
    assert len(server.requests) == 1


def test_push_is_tried_again(connect):
    with FakeServer(failures=[UNAVAILABLE]) as server, connect(server.address, retry=FAST) as client:
        assert client.push(["127.0.0.1:1"], IDS).attempt == 1


@pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"initial_backoff_seconds": -1}, {"multiplier": 0.5}])
def test_wrong_policies(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        vsprefill.RetryPolicy(**wrong)


class Recorder:
    """A destination that keeps what it was given."""

    def __init__(self, layout):
        self.layout, self.chunks = layout, []

    def write(self, layer, token_begin, keys, values):
        self.chunks.append((layer, token_begin, keys.copy(), values.copy()))


@pytest.mark.parametrize("stripes", [1, 3])
def test_destination_gets_every_verified_chunk_anew_for_each_try(connect, stripes):
    made = []

    def make(layout):
        made.append(Recorder(layout))
        return made[-1]

    torn = []

    def tear_once(events):
        if not torn:
            torn.append(True)
            return events[:-1]
        return events

    with FakeServer(fault=tear_once) as server, connect(server.address, retry=FAST) as client:
        result = client.prefill_into(make, IDS, start_token=8, stripes=stripes, timeout=20)
    assert len(made) == 2
    assert result.layout == made[1].layout and not hasattr(result, "keys")
    for layer in range(LAYERS):
        k, v = make_kv(layer, len(IDS), kv_pb2.KV_DTYPE_BFLOAT16)
        chunks = [c for c in made[1].chunks if c[0] == layer]
        assert [c[1] for c in chunks] == [8, 24]
        np.testing.assert_array_equal(np.concatenate([c[2] for c in chunks], axis=1), k[:, 8:])
        np.testing.assert_array_equal(np.concatenate([c[3] for c in chunks], axis=1), v[:, 8:])


@pytest.mark.parametrize("stripes", [1, 3])
def test_an_exception_of_the_destination_ends_the_call(connect, stripes):
    class Full:
        def write(self, *_):
            raise MemoryError("no room")

    with FakeServer(never_end=True) as server, connect(server.address, retry=FAST) as client:
        with pytest.raises(MemoryError, match="no room"):
            client.prefill_into(lambda layout: Full(), IDS, stripes=stripes, timeout=20)
        assert server.cancelled.wait(5)
    assert len(server.requests) == 1


def test_metadata_goes_with_every_call(connect):
    with FakeServer() as server, connect(server.address, metadata=[("authorization", "Bearer x")]) as client:
        client.prefill(IDS)
    assert server.metadata[0]["authorization"] == "Bearer x"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=prefill.test", "-addext", "subjectAltName=DNS:prefill.test",
                    "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(connect, certificate, mutual):
    cert, key = (certificate / "cert.pem"), (certificate / "key.pem")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())],
                                              cert.read_bytes() if mutual else None, mutual)
    own = {"certificate_chain": cert, "private_key": key} if mutual else {}
    with FakeServer(tls=credentials) as server:
        tls = vsprefill.TlsOptions(root_certificates=cert, server_name="prefill.test", **own)
        with connect(server.address, tls=tls) as client:
            assert client.prefill(IDS, stripes=2, timeout=20).first_token == FIRST_TOKEN
        # Another name than the certificate's, no trust, no client certificate: refused.
        refused = [vsprefill.TlsOptions(root_certificates=cert, server_name="other.test", **own),
                   vsprefill.TlsOptions(server_name="prefill.test", **own), None]
        if mutual:
            refused.append(vsprefill.TlsOptions(root_certificates=cert, server_name="prefill.test"))
        for options in refused:
            with connect(server.address, tls=options, retry=vsprefill.NO_RETRY) as client:
                with pytest.raises(vsprefill.ServerUnavailableError):
                    client.prefill(IDS, timeout=5)
    assert len(server.requests) == 1


def test_wrong_tls_options(certificate, tmp_path):
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(ValueError, match="empty.pem is no PEM file"):
        vsprefill.TlsOptions(root_certificates=tmp_path / "empty.pem").credentials()
    with pytest.raises(ValueError, match="go together"):
        vsprefill.TlsOptions(private_key=certificate / "key.pem").credentials()
    with pytest.raises(FileNotFoundError):
        vsprefill.TlsOptions(root_certificates=tmp_path / "none.pem").credentials()

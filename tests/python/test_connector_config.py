"""Settings of the connector, fingerprints, breaker and the choice of an endpoint. No engine, no sockets."""

import json
import re
import time

import grpc
import pytest
from conftest import ROOT
from fake_server import FakeServer
from vsprefill import errors, identity
from vsprefill.connector.breaker import CircuitBreaker
from vsprefill.connector.config import Attention, ConfigError, ConnectorConfig, RequestOptions
from vsprefill.connector.endpoints import EndpointPool
from vsprefill.connector.fingerprint import Fingerprint
from vsprefill.v1 import kv_pb2, options_pb2, prefill_pb2

ENDPOINTS = ["a:1", "b:2"]


@pytest.mark.parametrize("extra,message", [
    ({}, "endpoints"), ({"endpoints": []}, "at least one"), ({"endpoints": "a:1"}, "list of HOST:PORT"),
    ({"endpoints": ["a"]}, "HOST:PORT"), ({"endpoints": ["a:1", "a:1"]}, "twice"),
    ({"endpoints": ENDPOINTS, "stripez": 1}, "unknown 'stripez'; known are"),
    ({"endpoints": ENDPOINTS, "stripes": 0}, r"stripes 0 is not an integer in \[1, 64\]"),
    ({"endpoints": ENDPOINTS, "stripes": True}, "stripes True"),
    ({"endpoints": ENDPOINTS, "deadline_seconds": "5"}, "deadline_seconds '5' is not a number"),
    ({"endpoints": ENDPOINTS, "deadline_seconds": float("nan")}, "deadline_seconds nan"),
    ({"endpoints": ENDPOINTS, "default_on": 1}, "default_on 1 is not true or false"),
    ({"endpoints": ENDPOINTS, "attention": "dense"}, "attention 'dense' is not an object"),
    ({"endpoints": ENDPOINTS, "attention": {"parameters": {"threshold": "x"}}}, "threshold 'x' is not a number"),
    ({"endpoints": ENDPOINTS, "presets": {"fast": {"methode": "x"}}}, "preset fast: unknown 'methode'"),
    ({"endpoints": ENDPOINTS, "attention": {"preset": "slow"}}, "attention: preset 'slow' is not one of safe"),
    ({"endpoints": ENDPOINTS, "attention": {"preset": "fast", "method": "dense"}}, "attention: give either preset"),
    ({"endpoints": ENDPOINTS, "tls": {"ca": "x"}}, "tls: unknown 'ca'"),
    ({"endpoints": ENDPOINTS, "tls": {"root_certificates": "/nowhere/ca.pem"}}, "tls: .*/nowhere/ca.pem"),
    ({"endpoints": ENDPOINTS, "tls": {"root_certificates": 7}}, "tls: root_certificates 7 is not a string"),
    ({"endpoints": ENDPOINTS, "tls": {"private_key": "k.pem"}}, "tls: .*go together"),
])
def test_wrong_settings_are_named(extra, message):
    with pytest.raises(ConfigError, match=message):
        ConnectorConfig.parse(extra)


CONFIG = ConnectorConfig.parse({
    "endpoints": ENDPOINTS, "deadline_seconds": 9,
    "presets": {"fast": {"method": "vsprefill", "parameters": {"threshold": 2}}}})


def test_request_options():
    assert CONFIG.attention == Attention("dense") and CONFIG.attention.exact
    default = CONFIG.for_request(None)
    assert (default.attention, default.deadline_seconds, default.endpoint, default.asked) == (
        Attention("dense"), 9, None, False)
    fast = CONFIG.for_request({"preset": "fast", "endpoint": "b:2", "deadline_seconds": 2})
    assert fast.attention == Attention("vsprefill", {"threshold": 2})
    assert (fast.endpoint, fast.deadline_seconds, fast.asked) == ("b:2", 2, True)
    # What is not configured here is the server's.
    assert CONFIG.for_request({"preset": "safe"}).attention == Attention(preset="safe")
    assert CONFIG.for_request({"method": "vsprefill"}).attention == Attention("vsprefill")
    assert CONFIG.for_request({"enabled": False}) is None
    off = ConnectorConfig.parse({"endpoints": ENDPOINTS, "default_on": False})
    assert off.for_request(None) is None
    assert off.for_request({}).asked


@pytest.mark.parametrize("params,message", [
    ("x", "not an object"), ({"endpoint": "evil:80"}, "'evil:80' is not one of a:1, b:2"),
    ({"preset": "slow"}, "'slow' is not one of balanced, fast, safe"),
    ({"preset": "fast", "method": "dense"}, "not both"),
    ({"deadline_seconds": 0}, "deadline_seconds 0"), ({"deadline": 5}, "unknown 'deadline'"),
    ({"preset": {}}, "preset {} is not a string"), ({7: 1, "a": 2}, "unknown"), ({"method": 3}, "method 3"),
    ({"parameters": {"threshold": []}}, "threshold"), ({"enabled": "no"}, "enabled 'no'"),
    ({"parameters": 5}, "parameters 5"), ({"endpoint": ["a:1"]}, "not one of"),
])
def test_wrong_request_options_are_named(params, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.for_request(params)


def test_salts_tell_kinds_of_sparse_kv_apart():
    kinds = [Attention(""), Attention("vsprefill"), Attention("vsprefill", {"threshold": 2.0}),
             Attention(preset="safe"), Attention(preset="fast"), Attention(preset="fast", parameters={"threshold": 9}),
             Attention("vsprefill", {"threshold": 2.5}), Attention("vsprefill", {"threshold": 2.0, "chunk": 1.0})]
    assert not any(kind.exact for kind in kinds)
    assert len({kind.salt for kind in kinds}) == len(kinds)
    assert Attention("v", {"a": 1, "b": 2}).salt == Attention("v", {"b": 2, "a": 1}).salt


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_breaker():
    clock = Clock()
    breaker = CircuitBreaker(2, 10, clock)
    breaker.fail()
    breaker.succeed()
    breaker.fail()
    assert breaker.allows() and breaker.state == "closed"  # not in a row
    breaker.fail()
    assert not breaker.allows() and breaker.state == "open"
    clock.now += 9.9
    assert not breaker.allows()
    clock.now += 0.2
    assert breaker.allows() and breaker.state == "half-open"
    breaker.begin()
    assert not breaker.allows()  # one at a time
    breaker.forget()
    assert breaker.allows()
    breaker.begin()
    breaker.fail()
    assert breaker.state == "open"  # again for the whole time
    clock.now += 10
    breaker.begin()
    breaker.succeed()
    assert breaker.state == "closed" and breaker.allows()


OURS = Fingerprint("k" * 64, "w" * 64, 4, 2, 8, "bfloat16")


def model_info(**changes):
    layout = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": kv_pb2.KV_DTYPE_BFLOAT16, "kv_id": "k" * 64}
    top = {"weights_id": "w" * 64, "max_prompt_tokens": 1000}
    for key, value in changes.items():
        (layout if key in layout else top)[key] = value
    return prefill_pb2.ModelInfo(layout=kv_pb2.KvLayout(**layout), **top)


@pytest.mark.parametrize("changes,message", [
    ({"num_layers": 5, "kv_id": "x"}, "layers 5 there, 4 here"),
    ({"num_kv_heads": 1, "kv_id": "x"}, "KV heads 1 there, 2 here"),
    ({"head_dim": 16, "kv_id": "x"}, "head_dim 16 there, 8 here"),
    ({"dtype": kv_pb2.KV_DTYPE_FLOAT32, "kv_id": "x"}, "KV dtype float32 there, bfloat16 here"),
    ({"weights_id": "v" * 64, "kv_id": "x"}, "weights vvvvvvvvvvvv there, wwwwwwwwwwww here"),
    ({"kv_id": "x" * 64}, "rope: kv_id xxxxxxxxxxxx there, kkkkkkkkkkkk here"),
    ({"kv_id": ""}, "rope: kv_id none there"),
])
def test_fingerprint_names_what_differs(changes, message):
    difference = OURS.difference(model_info(**changes))
    assert message in difference and "\n" not in difference
    assert OURS.difference(model_info()) is None


def test_fingerprint_of_a_model_is_its_kv_id(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    known = json.loads((ROOT / "tests/golden/identities.json").read_text())["models"]["SmolLM2-135M-Instruct"]
    for dtype in ("bfloat16", "float32"):
        ours = Fingerprint.of_model(model_dir, config, dtype)
        assert (ours.kv_id, ours.weights_id) == (known[f"kv_id_{dtype}"], known["weights_id"])
        assert (ours.num_layers, ours.num_kv_heads, ours.head_dim, ours.dtype) == (30, 3, 64, dtype)
    scaled = {**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None}
    assert Fingerprint.of_model(model_dir, scaled, "float32").kv_id != ours.kv_id
    assert Fingerprint.of_model("/nowhere", config, "float32", kv_id="given").kv_id == "given"
    with pytest.raises(identity.IdentityError):
        Fingerprint.of_model(model_dir, config, "float16")


ANY = RequestOptions(Attention("dense"), 9)


def only(address):
    return RequestOptions(Attention("dense"), 9, address)


class Server:
    """A prefill server as the pool sees it."""

    def __init__(self):
        self.info, self.answer, self.error, self.handshakes = model_info(), prefill_pb2.Load(), None, 0

    def _maybe_fail(self):
        if self.error:
            raise errors.VsprefillError("lost", self.error)

    def model_info(self, timeout=0):
        self._maybe_fail()
        self.handshakes += 1
        return self.info

    def load(self, timeout=0):
        self._maybe_fail()
        return self.answer

    def close(self):
        pass


@pytest.fixture
def pool():
    clock = Clock()
    servers = {address: Server() for address in ENDPOINTS}
    config = ConnectorConfig.parse({"endpoints": ENDPOINTS, "breaker_failures": 2, "breaker_seconds": 10})
    made = EndpointPool(config, OURS, servers.__getitem__, clock)
    made.clock, made.servers = clock, servers

    def poll():
        for address in ENDPOINTS:
            made.poll(address)

    made.poll_all = poll
    return made


def test_pool_takes_nobody_before_the_handshake(pool):
    assert pool.ranked(10, ANY) == []
    assert pool.why_none(10, ANY) == "a:1: not asked yet; b:2: not asked yet"
    pool.poll_all()
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS
    assert pool.ranked(10, only("b:2")) == ["b:2"]


def test_pool_prefers_who_is_done_first(pool):
    pool.servers["a:1"].answer = prefill_pb2.Load(waiting_tokens=1000, tokens_per_second=100)  # 10 s
    pool.servers["b:2"].answer = prefill_pb2.Load(waiting_tokens=4000, tokens_per_second=1000)  # 4 s
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2", "a:1"]
    pool.begin("b:2", 20000)  # 20 s of our own, which the server may not have counted yet
    assert pool.ranked(10, ANY) == ["a:1", "b:2"]
    pool.end("b:2", 20000)
    assert pool.ranked(10, ANY) == ["b:2", "a:1"]


@pytest.mark.parametrize("load,message", [
    ({"draining": True}, "draining"),
    ({"requests_waiting": 4, "max_waiting_requests": 4}, "queue full"),
    ({"waiting_tokens": 95, "max_waiting_tokens": 100}, "queue full"),
])
def test_pool_leaves_out_who_would_refuse(pool, load, message):
    pool.servers["a:1"].answer = prefill_pb2.Load(**load)
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"]
    assert message in pool.why_none(10, only("a:1"))


def test_pool_minds_the_longest_prompt(pool):
    pool.servers["a:1"].info = model_info(max_prompt_tokens=100)
    pool.poll_all()
    assert sorted(pool.ranked(100, ANY)) == ENDPOINTS
    assert pool.ranked(101, ANY) == ["b:2"]


@pytest.mark.parametrize("attention,message", [
    (Attention("vsprefill", {"threshold": 2.0}), None), (Attention(""), None), (Attention("dense"), None),
    (Attention("magic"), "method 'magic' is not one of dense, vsprefill"),
    (Attention("vsprefill", {"treshold": 2.0}), "vsprefill has no parameter 'treshold', only threshold"),
    (Attention("dense", {"threshold": 2.0}), "dense has no parameter 'threshold', only none"),
    (Attention("vsprefill", {"threshold": 9.0}), r"threshold 9 is not in \[0, 8\]")])
def test_pool_knows_what_a_server_would_refuse(pool, attention, message):
    threshold = options_pb2.MethodParameter(name="threshold", min=0, max=8)
    for server in pool.servers.values():
        server.info.methods.add(name="dense")
        server.info.methods.add(name="vsprefill", parameters=[threshold])
    pool.poll_all()
    options = RequestOptions(attention, 9)
    assert bool(pool.ranked(10, options)) == (message is None)
    if message:
        assert re.search(message, pool.why_none(10, options))


def test_pool_refuses_another_model_in_one_line(pool, caplog):
    pool.servers["a:1"].info = model_info(head_dim=16)
    pool.poll_all()
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"]
    lines = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert lines == ["prefill server a:1 refused, another model: head_dim 16 there, 8 here"]


def test_pool_drops_the_lost_and_shakes_hands_again(pool):
    pool.poll_all()
    server = pool.servers["a:1"]
    server.error = grpc.StatusCode.UNAVAILABLE
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"]
    server.error, server.info = None, model_info(num_layers=5)  # somebody else at the same address
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"] and "layers 5" in pool.why_none(10, ANY)
    server.info = model_info()
    pool.clock.now += 1000  # it is asked again after a while
    pool.poll_all()
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS
    server.error = grpc.StatusCode.DEADLINE_EXCEEDED  # stopped: a busy machine may miss one poll, not two
    pool.poll_all()
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"]


def test_pool_breaks_the_circuit_on_failed_loads_only_of_the_servers_making(pool):
    pool.poll_all()
    for _ in range(5):
        pool.record("a:1", "queue full", blame=False)
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS
    for _ in range(2):
        pool.record("a:1", "torn", blame=True)
    assert pool.ranked(10, ANY) == ["b:2"]
    pool.poll_all()
    assert pool.ranked(10, ANY) == ["b:2"]  # answering polls is not delivering caches
    pool.clock.now += 10
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS
    pool.begin("a:1", 10)
    assert pool.ranked(10, ANY) == ["b:2"]  # one probe at a time
    pool.record("a:1", None, blame=True)
    assert sorted(pool.ranked(10, ANY)) == ENDPOINTS


@pytest.mark.long
def test_pool_finds_a_server_that_was_away_for_a_while():
    """gRPC's own backoff would look for it after 16 seconds, and later every two minutes."""
    with FakeServer() as server:
        address = server.address
    pool = EndpointPool(ConnectorConfig.parse({"endpoints": [address], "poll_seconds": 0.1}), OURS)
    pool.start()
    try:
        time.sleep(10)
        assert "not reachable" in pool.why_none(10, ANY)
        with FakeServer(address=address) as server:
            server.model_info = model_info()
            until = time.monotonic() + 4
            while not pool.ranked(10, ANY):
                assert time.monotonic() < until, pool.why_none(10, ANY)
                time.sleep(0.05)
    finally:
        pool.close()

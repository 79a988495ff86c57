"""Loads in threads against a fake server, and the worker half on top: each load ends once, whatever happens."""

import os
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_server import HEAD_DIM, HEADS, LAYERS, FakeServer, make_kv
from test_connector_cache import fake_op as shaped_op
from vsprefill.connector.config import ConnectorConfig
from vsprefill.connector.fingerprint import Fingerprint
from vsprefill.connector.layouts import LayoutError
from vsprefill.connector.loads import LoadSpec
from vsprefill.connector.scheduler import LoadMetadata
from vsprefill.connector.worker import WorkerHalf, in_layer_order
from vsprefill.v1 import kv_pb2

BLOCKS, BLOCK = 12, 16
IDS = tuple(range(40))
BLOCK_IDS = (7, 3, 9)
OURS = Fingerprint("id", "", LAYERS, HEADS, HEAD_DIM, "bfloat16")


def row_op(key, value, key_cache, value_cache, slot_mapping, isa):
    """Both row-major, so that the test can read the cache back by its shape."""
    assert isa == "rows"
    for i, slot in enumerate(slot_mapping.tolist()):
        b, o = divmod(slot, BLOCK)
        key_cache[b, :, o] = key[i]
        value_cache[b, :, o] = value[i]


class Engine:
    """A worker half with caches, stepped as an engine would."""

    def __init__(self, *addresses, **settings):
        config = ConnectorConfig.parse({"endpoints": list(addresses), "unpin_io": False, **settings})
        self.worker = WorkerHalf(config, OURS, blocks=BLOCKS, block_size=BLOCK, cpu_op=row_op,
                                 isa_of=lambda name: "rows")
        self.caches = {f"model.layers.{i}.self_attn.attn":
                       torch.full((BLOCKS, HEADS, BLOCK, 2 * HEAD_DIM), float("nan"), dtype=torch.bfloat16)
                       for i in range(LAYERS)}
        self.worker.register(self.caches)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.worker.close()

    def start(self, request_id, *endpoints, start=0, deadline=20.0, method="dense", preset=""):
        self.worker.step(LoadMetadata([LoadSpec(request_id, IDS, start, BLOCK_IDS, endpoints, method, {}, deadline,
                                                "id", preset)]))

    def wait(self, *wanted, timeout=20):
        """Results of these requests; each must come once."""
        results = {}
        end = time.monotonic() + timeout
        while set(results) < set(wanted):
            assert time.monotonic() < end, f"only {set(results)} of {wanted} ended"
            ids, failed = self.worker.finished()
            new = {r.request_id: r for r in self.worker.take_results()}
            assert set(new) == ids and not ids & set(results)
            assert failed == {i for i, r in new.items() if r.outcome == "failed"}
            results.update(new)
            time.sleep(0.005)
        return [results[w] for w in wanted]

    def content(self, layer):
        """(K, V) of the prompt, [heads, tokens, dim], as the blocks hold it."""
        cache = list(self.caches.values())[layer]
        tokens = torch.cat([cache.view(BLOCKS, HEADS, 2, BLOCK, HEAD_DIM)[b] for b in BLOCK_IDS], dim=2)
        return tokens[:, 0, :len(IDS)], tokens[:, 1, :len(IDS)]


def check_content(engine, start=0):
    for layer in range(LAYERS):
        expected = make_kv(layer, len(IDS), kv_pb2.KV_DTYPE_BFLOAT16)
        for got, want in zip(engine.content(layer), expected, strict=True):
            bits = got.contiguous().view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(bits[:, start:], want[:, start:])


@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("start", [0, 16])
def test_a_load_fills_the_blocks(stripes, start):
    with FakeServer() as server, Engine(server.address, stripes=stripes) as engine:
        engine.start("r", server.address, start=start)
        (result,) = engine.wait("r")
        assert engine.worker.bad_blocks() == set()
    assert (result.outcome, result.tokens, result.method, result.density) == ("loaded", 40 - start, "dense", 0.25)
    assert [(t.endpoint, t.failure, t.code) for t in result.tries] == [(server.address, None, "OK")]
    request = server.requests[0]
    assert (request.expected_kv_id, request.start_token, request.method.name) == ("id", start, "dense")
    assert request.request_id != "r"  # an engine's ids may repeat between engines
    check_content(engine, start)


def test_a_preset_is_the_servers_to_resolve():
    with FakeServer() as server, Engine(server.address) as engine:
        engine.start("r", server.address, method="", preset="fast")
        (result,) = engine.wait("r")
    assert result.outcome == "loaded"
    assert (server.requests[0].method.preset, server.requests[0].method.name) == ("fast", "")


def test_a_failed_server_is_followed_by_the_next():
    with FakeServer(error=(grpc.StatusCode.UNAVAILABLE, "draining", None)) as bad, FakeServer() as good:
        with Engine(bad.address, good.address) as engine:
            engine.start("r", bad.address, good.address)
            (result,) = engine.wait("r")
    assert result.outcome == "loaded"
    assert [(t.endpoint, t.code, t.blame) for t in result.tries] == [
        (bad.address, "UNAVAILABLE", True), (good.address, "OK", True)]
    assert [bad.requests[0].attempt, good.requests[0].attempt] == [0, 1]
    check_content(engine)


def flip(events):
    chunk = next(e for e in events if e.HasField("kv")).kv
    chunk.payload = chunk.payload[:-1] + bytes([chunk.payload[-1] ^ 1])
    return events


def nan(events):
    import xxhash

    chunk = next(e for e in events if e.HasField("kv")).kv
    chunk.payload = b"\xc0\x7f" + chunk.payload[2:]
    chunk.checksum = xxhash.xxh3_64_intdigest(chunk.payload)
    return events


def other_model(events):
    events[0].accepted.layout.kv_id = "other"
    return events


def other_method(events):
    events[0].accepted.method = "vsprefill"
    return events


@pytest.mark.parametrize("fault,reason", [
    (flip, "checksum"), (nan, "NaN or infinity"), (lambda events: events[:-1], "before its done"),
    (other_model, "kv_id other"), (other_method, "method 'vsprefill', asked for 'dense'")])
def test_torn_caches_fail_and_name_their_blocks(fault, reason):
    with FakeServer(fault=fault) as server, Engine(server.address) as engine:
        engine.start("r", server.address, start=16)
        (result,) = engine.wait("r")
        assert engine.worker.bad_blocks() == {3, 9}  # not block 7: a local hit
        assert engine.worker.bad_blocks() == set()
        # Nothing that could spread: what is in the blocks is finite or was there before.
        assert len(server.requests) == 2
    assert result.outcome == "failed" and reason in result.reason and all(t.blame for t in result.tries)


@pytest.mark.parametrize("code,blame,tries", [
    (grpc.StatusCode.RESOURCE_EXHAUSTED, False, 2), (grpc.StatusCode.INVALID_ARGUMENT, False, 1),
    (grpc.StatusCode.FAILED_PRECONDITION, True, 1), (grpc.StatusCode.INTERNAL, True, 1)])
def test_whose_fault_a_failure_is(code, blame, tries):
    with FakeServer(error=(code, "no", None)) as server, Engine(server.address) as engine:
        engine.start("r", server.address)
        (result,) = engine.wait("r")
    assert (result.outcome, len(result.tries), {t.blame for t in result.tries}) == ("failed", tries, {blame})


def test_absent_server():
    with FakeServer() as server:
        address = server.address
    with Engine(address) as engine:
        engine.start("r", address)
        (result,) = engine.wait("r")
        assert engine.worker.bad_blocks() == {7, 3, 9}
    assert result.outcome == "failed" and result.tries[0].code == "UNAVAILABLE"


def test_deadline_covers_waiting_and_every_try():
    with FakeServer(never_end=True) as server, Engine(server.address, max_loads=1) as engine:
        begin = time.monotonic()
        engine.start("a", server.address, deadline=0.6)
        engine.start("b", server.address, deadline=0.3)  # waits for the only thread
        a, b = engine.wait("a", "b")
        assert time.monotonic() - begin < 5
    assert (a.outcome, a.tries[0].code) == ("failed", "DEADLINE_EXCEEDED")
    assert b.outcome == "failed" and b.tries == [] and "deadline of 0.3 s" in b.reason


def test_cancelled_loads_end_once_and_say_so():
    with FakeServer(never_end=True) as server, Engine(server.address, max_loads=1) as engine:
        engine.start("running", server.address)
        while not server.requests:
            time.sleep(0.005)
        engine.start("waiting", server.address)
        engine.worker.step(LoadMetadata(cancels=["waiting", "unknown", "running", "running"]))
        running, waiting = engine.wait("running", "waiting")
        assert server.cancelled.wait(5)
        engine.worker.step(LoadMetadata(cancels=["running"]))  # after its end: the fail policy does that
        time.sleep(0.1)
        assert engine.worker.finished() == (set(), set())
        assert engine.worker.bad_blocks() == set()
    assert [running.outcome, waiting.outcome] == ["cancelled", "cancelled"]
    assert not any(t.blame for t in running.tries)


def test_an_idle_step_waits_for_news_and_no_longer():
    with FakeServer(never_end=True) as server, Engine(server.address, idle_wait_seconds=0.2) as engine:
        begin = time.monotonic()
        engine.worker.step(LoadMetadata(), idle=True)
        assert time.monotonic() - begin < 0.15  # nothing is under way
        engine.start("r", server.address)
        begin = time.monotonic()
        engine.worker.step(LoadMetadata(), idle=True)
        assert time.monotonic() - begin > 0.15
        begin = time.monotonic()
        engine.worker.step(LoadMetadata())
        assert time.monotonic() - begin < 0.15  # the engine has work
        engine.worker._config = ConnectorConfig.parse({"endpoints": ["a:1"], "idle_wait_seconds": 1.0})
        begin = time.monotonic()
        engine.worker.step(LoadMetadata(cancels=["r"]), idle=True)
        assert time.monotonic() - begin < 0.9  # woken by its end
        assert engine.worker.finished()[0] == {"r"}


def test_many_loads_at_once():
    with FakeServer() as server, Engine(server.address, max_loads=3) as engine:
        names = [f"r{i}" for i in range(12)]
        for name in names:
            engine.start(name, server.address)
        assert {r.outcome for r in engine.wait(*names)} == {"loaded"}
        data = engine.worker.take_stats()
        assert data["outcomes"] == {"loaded": 12} and len(data["loads"]) == 12
        assert data["tries"] == {f"{server.address} OK": 12}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to be pinned to")
@pytest.mark.parametrize("unpin", [True, False])
def test_threads_leave_the_core_of_a_pinned_worker_only_for_its_parents(unpin):
    """The worker's main thread is pinned, as vLLM does; its parent is not."""
    code = f"""
import os, time
from vsprefill.connector.loads import Loader
wanted = len(os.sched_getaffinity(0)) if {unpin} else 1
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
loader = Loader(None, block_size=16, max_loads=1, max_attempts=1, stripes=1, unpin={unpin})
cores, until = [], time.monotonic() + 10
while len(cores) != wanted and time.monotonic() < until:  # the thread may not have got so far
    cores = sorted(os.sched_getaffinity(loader._threads[0].native_id))
print(cores)
loader.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "client/python")})
    mine = sorted(os.sched_getaffinity(0))
    assert done.stdout.strip() == str(mine if unpin else mine[:1]), done.stderr


def test_a_bug_ends_the_load_too(monkeypatch):
    with FakeServer() as server, Engine(server.address) as engine:
        monkeypatch.setattr(engine.worker._loader, "_try", lambda *_: 1 / 0)
        engine.start("r", server.address)
        (result,) = engine.wait("r")
        assert engine.worker.bad_blocks() == {7, 3, 9}
    assert result.outcome == "failed" and "ZeroDivisionError" in result.reason


def test_closing_cancels_what_runs():
    with FakeServer(never_end=True) as server:
        engine = Engine(server.address)
        engine.start("r", server.address)
        while not server.requests:
            time.sleep(0.005)
        begin = time.monotonic()
        engine.worker.close()
        assert time.monotonic() - begin < 3
        assert server.cancelled.wait(5)


def test_layers_are_taken_by_their_number():
    names = [f"model.layers.{i}.self_attn.attn" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert in_layer_order(names, 11) == [f"model.layers.{i}.self_attn.attn" for i in range(11)]
    for bad, message in ((names[:-1], "10 layers for a model of 11"),
                         ([*names, "draft.layers.11.attn"], "12 layers for a model of 11"),
                         ([*names, "mtp.layers.0.attn"], "'mtp.layers.0.attn'"),
                         ([*names[:-1], "model.attn"], "'model.attn'")):
        with pytest.raises(LayoutError, match=message):
            in_layer_order(bad, 11)


def test_caches_that_do_not_fit_are_refused():
    config = ConnectorConfig.parse({"endpoints": ["a:1"]})
    caches = {f"l.{i}.attn": torch.zeros(BLOCKS, HEADS, BLOCK, 2 * HEAD_DIM) for i in range(LAYERS)}
    worker = WorkerHalf(config, OURS, blocks=BLOCKS, block_size=BLOCK, cpu_op=shaped_op, isa_of=lambda n: "vec")
    with pytest.raises(LayoutError, match="torch.float32, prefill servers send bfloat16"):
        worker.register(caches)
    no_op = WorkerHalf(config, OURS, blocks=BLOCKS, block_size=BLOCK)
    with pytest.raises(LayoutError, match="no cpu_attn_reshape_and_cache"):
        no_op.register({name: cache.to(torch.bfloat16) for name, cache in caches.items()})

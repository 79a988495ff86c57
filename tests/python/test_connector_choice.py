"""The connector's choice between two real prefill servers: load, broken streams, death. All of it but vLLM."""

import json
import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import fault_proxy
import pytest
import torch
import vsprefill
from servers import start_server
from vllm_engine import free_port
from vsprefill.connector.config import Attention, ConnectorConfig, RequestOptions
from vsprefill.connector.endpoints import EndpointPool
from vsprefill.connector.fingerprint import Fingerprint
from vsprefill.connector.scheduler import SchedulerHalf
from vsprefill.connector.worker import WorkerHalf

pytestmark = [pytest.mark.long]
BLOCK, TOKENS = 128, 200
BLOCKS_EACH = -(-TOKENS // BLOCK)
DENSE = ("--dtype", "fp32", "--method", "dense", "--chunk_tokens", "512")
ANY = RequestOptions(Attention("dense"), 300)


def plain_op(key, value, key_cache, value_cache, slot_mapping, isa):
    """In place of vLLM's packing op: tokens row by row, so that the test can read them back."""
    block, offset = slot_mapping // BLOCK, slot_mapping % BLOCK
    key_cache[block, :, offset] = key
    value_cache[block, :, offset] = value


class Connector:
    """Both halves and the pool, stepped like an engine; every request has blocks of its own."""

    def __init__(self, model_config, model_dir, endpoints, **settings):
        config = ConnectorConfig.parse({"endpoints": endpoints, "min_prompt_tokens": 1, "unpin_io": False,
                                        "poll_seconds": 0.1, "deadline_seconds": 300, **settings})
        fingerprint = Fingerprint.of_model(model_dir, model_config, "float32")
        self.layers, heads, dim = fingerprint.num_layers, fingerprint.num_kv_heads, fingerprint.head_dim
        self.cache = torch.full((self.layers, 32, heads, BLOCK, 2 * dim), float("nan"))
        self.pool = EndpointPool(config, fingerprint)
        self.scheduler = SchedulerHalf(config, self.pool, fingerprint.kv_id)
        self.worker = WorkerHalf(config, fingerprint, blocks=32, block_size=BLOCK, cpu_op=plain_op,
                                 isa_of=lambda name: "rows")
        self.worker.register({f"model.layers.{i}.self_attn.attn": self.cache[i] for i in range(self.layers)})
        self._requests, self._outcomes, self._number = {}, {}, 0

    def __enter__(self):
        self.pool.start(wait_seconds=60)
        return self

    def __exit__(self, *_):
        self.worker.close()
        self.pool.close()

    def begin(self, seed=1):
        """Begins a load; returns its number."""
        number, self._number = self._number, self._number + 1
        request = SimpleNamespace(
            request_id=str(number), prompt_token_ids=make_ids(seed), num_prompt_tokens=TOKENS, cache_salt=None,
            kv_transfer_params={"vsprefill": {}}, block_hashes=[])
        self.scheduler.add(request)
        tokens = self.scheduler.matched(request, 0)
        assert tokens == TOKENS, self.pool.why_none(TOKENS, ANY)
        self.scheduler.allocated(request, self.blocks(number), tokens)
        self._requests[request.request_id] = request
        self.worker.step(self.scheduler.take_metadata())
        return number

    def blocks(self, number):
        first = number * BLOCKS_EACH % 32
        return list(range(first, first + BLOCKS_EACH))

    def end(self, number, seconds=300):
        """Steps until this load has ended; returns what its caller is told, and the tries."""
        until = time.monotonic() + seconds
        while str(number) not in self._outcomes:
            assert time.monotonic() < until, f"load {number} still runs after {seconds} s"
            self.worker.step(self.scheduler.take_metadata(), idle=True)
            self.worker.finished()
            results = self.worker.take_results()
            self.scheduler.ended(results)
            for result in results:
                told = self.scheduler.finished(self._requests.pop(result.request_id))["vsprefill"]
                self._outcomes[result.request_id] = told, [t.endpoint for t in result.tries]
        return self._outcomes.pop(str(number))

    def load(self, **options):
        return self.end(self.begin(**options))

    def content(self, number):
        """(K, V) of a load's prompt, [layers, heads, tokens, dim]."""
        blocks = self.cache[:, self.blocks(number)]  # [layers, blocks, heads, BLOCK, 2 * dim]
        keys, values = blocks.unflatten(-1, (2, -1)).flatten(3, 4).unflatten(3, (2, BLOCK)).unbind(3)
        return tuple(half.transpose(1, 2).flatten(2, 3)[:, :, :TOKENS] for half in (keys, values))

    def ranked(self):
        return self.pool.ranked(TOKENS, ANY)

    def await_ranked(self, wanted, seconds=60):
        until = time.monotonic() + seconds
        while self.ranked() != wanted:
            assert time.monotonic() < until, f"{self.ranked()} instead of {wanted} after {seconds} s"
            time.sleep(0.05)


def reported_speed(address):
    with vsprefill.PrefillClient(address) as client:
        return client.load().tokens_per_second


def make_ids(seed):
    return [(i * 7919 + seed * 104729) % 40000 for i in range(TOKENS)]


@pytest.fixture(scope="module")
def servers(model_dir):
    with start_server(model_dir, *DENSE) as first, start_server(model_dir, *DENSE) as second:
        yield first, second


@pytest.fixture(scope="module")
def model_config(model_dir):
    return json.loads((model_dir / "config.json").read_text())


class Busy:
    """Keeps a server busy from outside, with prompts that this connector did not send, until it is left."""

    def __init__(self, address, prompts):
        self._client = vsprefill.PrefillClient(address, retry=vsprefill.RetryPolicy(max_attempts=1))
        self._streams = [self._client.stream([5] * 8000, method="dense") for _ in range(prompts)]
        self._threads = [threading.Thread(target=self._read, args=(stream,)) for stream in self._streams]

    @staticmethod
    def _read(stream):
        try:
            for _ in stream.completed_layers():
                pass
        except vsprefill.VsprefillError:
            pass

    def __enter__(self):
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_):
        for stream in self._streams:
            stream.cancel()
        for thread in self._threads:
            thread.join()
        self._client.close()


@pytest.mark.parametrize("prompts", [1, 3])  # one that runs; one that runs and two that wait
def test_the_server_with_less_to_do_is_taken(servers, model_config, model_dir, prompts):
    addresses = [s.address for s in servers]
    with Connector(model_config, model_dir, addresses) as connector:
        assert connector.load()[0]["endpoint"] == addresses[0]  # equal: the first
        for busy, other in (addresses, addresses[::-1]):
            with Busy(busy, prompts):
                connector.await_ranked([other, busy])
                number = connector.begin()
                told, tries = connector.end(number)
                assert (told["source"], told["endpoint"], tries) == ("remote", other, [other])
        with vsprefill.PrefillClient(addresses[0]) as client:
            cache = client.prefill(make_ids(1), method="dense")
        keys, values = connector.content(number)
        for layer in range(connector.layers):
            assert torch.equal(keys[layer], torch.from_numpy(cache.keys[layer]))
            assert torch.equal(values[layer], torch.from_numpy(cache.values[layer]))


def test_loads_that_begin_together_are_shared_out(servers, model_config, model_dir):
    addresses = [s.address for s in servers]
    with Connector(model_config, model_dir, addresses) as connector:
        # Both are at work, so that no load ends before the last begins.
        with Busy(addresses[0], 1), Busy(addresses[1], 1):
            connector.await_ranked(addresses)
            numbers = [connector.begin(seed=i) for i in range(6)]
            speeds = [reported_speed(address) for address in addresses]
            taken = [connector.end(number)[0]["endpoint"] for number in numbers]
        # By the speeds that the servers report: nobody has more than one load's time more to do than the other.
        usual = max(speeds) or 1.0
        times = [taken.count(a) / (speed or usual) for a, speed in zip(addresses, speeds, strict=True)]
        assert abs(times[0] - times[1]) <= max(1 / (speed or usual) for speed in speeds) * 1.001, (taken, speeds)
        assert set(taken) == set(addresses)


def test_a_server_that_answers_polls_and_breaks_streams_is_left_alone_for_a_while(servers, model_config, model_dir,
                                                                                  caplog):
    caplog.set_level(logging.INFO)
    with fault_proxy.FaultProxy(servers[0].address) as proxy:
        bad, good = proxy.address, servers[1].address
        with Connector(model_config, model_dir, [bad, good], breaker_failures=2, breaker_seconds=3) as connector:
            proxy.fault = fault_proxy.cut
            for _ in range(2):
                connector.await_ranked([bad, good])
                told, tries = connector.load()
                assert (told["source"], told["endpoint"], tries) == ("remote", good, [bad, good])
            opened = time.monotonic()
            assert connector.ranked() == [good]
            assert connector.load()[1] == [good]  # not asked
            # Half-open: one load tries it, fails, and it is left alone again.
            connector.await_ranked([bad, good])
            assert time.monotonic() - opened > 2
            assert connector.load()[1] == [bad, good]
            assert connector.ranked() == [good]
            proxy.fault = None
            connector.await_ranked([bad, good])
            assert connector.load()[1] == [bad]
            connector.await_ranked([bad, good])  # once a poll has seen that the load is over
        lines = [r.message for r in caplog.records if f"prefill server {bad} is" in r.message]
        kinds = ["fit for use", "out of use", "in use again"]
        assert [next((k for k in kinds if k in line), line) for line in lines] == kinds


def test_a_killed_server_is_passed_by_and_taken_again_when_it_is_back(servers, model_config, model_dir):
    address, good = f"127.0.0.1:{free_port()}", servers[1].address
    mortal = start_server(model_dir, *DENSE, "--listen", address)
    try:
        with Connector(model_config, model_dir, [address, good]) as connector, vsprefill.PrefillClient(
                address) as client:
            with Busy(good, 3), Busy(address, 1):
                connector.await_ranked([address, good])
                number = connector.begin(seed=9)
                while not client.load().requests_waiting:
                    time.sleep(0.02)
                os.kill(mortal.pid, signal.SIGKILL)
            told, tries = connector.end(number)
            assert (told["source"], told["endpoint"], tries) == ("remote", good, [address, good])
            assert not any(half.isnan().any() for half in connector.content(number))
            connector.await_ranked([good])
            assert connector.load()[1] == [good]
            mortal.stop()
            mortal = start_server(model_dir, *DENSE, "--listen", address)
            connector.await_ranked([address, good])
            assert connector.load()[1] == [address]
    finally:
        mortal.stop()

"""The deciding half, with requests like vLLM's and a pool that does what the test says."""

import hashlib
import time

import pytest
from vsprefill.connector.config import ConnectorConfig
from vsprefill.connector.loads import LoadResult, Try
from vsprefill.connector.scheduler import SchedulerHalf

BLOCK = 16
CONFIG = {"endpoints": ["a:1", "b:2"], "min_prompt_tokens": 32, "deadline_seconds": 9,
          "presets": {"fast": {"method": "vsprefill", "parameters": {"threshold": 2}}}}


class Request:
    """What the half looks at, with vLLM's way of hashing blocks: a chain that begins with the salt."""

    def __init__(self, tokens=100, params=None, salt=None, request_id="r", **changes):
        self.request_id = request_id
        self.prompt_token_ids = list(range(tokens))
        self.num_prompt_tokens = tokens
        self.kv_transfer_params = params
        self.cache_salt = salt
        self.pooling_params = self.prompt_embeds = self.lora_request = None
        self.mm_features, self.skip_reading_prefix_cache, self.resumable = [], False, False
        self.block_hashes = []
        vars(self).update(changes)
        self.update_block_hashes()

    def update_block_hashes(self):
        for i in range(len(self.block_hashes), self.num_prompt_tokens // BLOCK):
            before = self.block_hashes[-1] if i else str(self.cache_salt)
            self.block_hashes.append(hashlib.sha256(f"{before} {i}".encode()).hexdigest())


class Pool:
    def __init__(self):
        self.fit, self.calls = ["a:1", "b:2"], []

    def ranked(self, prompt_tokens, options):
        return [a for a in self.fit if options.endpoint in (None, a)]

    def why_none(self, prompt_tokens, options):
        return "a:1: draining"

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


@pytest.fixture
def pool():
    return Pool()


@pytest.fixture
def half(pool):
    return SchedulerHalf(ConnectorConfig.parse(CONFIG), pool, "id")


def ask(half, request, computed=0):
    half.add(request)
    return half.matched(request, computed)


def begin(half, request, computed=0):
    tokens = ask(half, request, computed)
    half.allocated(request, range(50, 57), tokens)
    (spec,) = half.take_metadata().loads
    return spec


def loaded(request_id="r", **changes):
    values = {"tokens": 100, "seconds": 0.5, "bytes": 64, "method": "dense", "density": 1.0,
              "tries": [Try("a:1", None, "OK", True)]}
    return LoadResult(request_id, "loaded", **{**values, **changes})


def failed(code="UNAVAILABLE", blame=True):
    return LoadResult("r", "failed", 100, 0.5, reason="gone", tries=[Try("a:1", "gone", code, blame)], bad_blocks=[50])


def test_a_prompt_is_promised_whole_and_asking_changes_nothing(half, pool):
    request = Request()
    assert [ask(half, request)] + [half.matched(request, 0) for _ in range(5)] == [100] * 6
    assert half.take_metadata().loads == [] and pool.calls == []


def test_the_load_says_everything(half, pool):
    spec = begin(half, Request(params={"vsprefill": {"preset": "fast", "deadline_seconds": 3}}))
    assert (spec.request_id, spec.token_ids, spec.start_token) == ("r", tuple(range(100)), 0)
    assert spec.block_ids == tuple(range(50, 57)) and spec.endpoints == ("a:1", "b:2")
    assert (spec.method, spec.parameters, spec.deadline_seconds) == ("vsprefill", {"threshold": 2}, 3)
    assert spec.expected_kv_id == "id"
    assert pool.calls == [("begin", "a:1", 100)]
    assert half.take_metadata().loads == []


def test_a_local_hit_moves_the_start(half):
    spec = begin(half, Request(), computed=48)
    assert (spec.start_token, len(spec.token_ids)) == (48, 100)


def test_an_engine_that_takes_less_than_promised_gets_that(half):
    request = Request()
    ask(half, request, 16)
    half.allocated(request, range(50, 57), 64)
    (spec,) = half.take_metadata().loads
    assert (spec.start_token, spec.token_ids) == (16, tuple(range(80)))


@pytest.mark.parametrize("request_,computed,label", [
    (Request(31), 0, "short"), (Request(100), 69, "short"), (Request(100, lora_request=object()), 0, "unsuitable"),
    (Request(100, mm_features=[1]), 0, "unsuitable"), (Request(100, skip_reading_prefix_cache=True), 0, "unsuitable"),
    (Request(100, pooling_params=object()), 0, "unsuitable"), (Request(100, resumable=True), 0, "unsuitable"),
    (Request(100, prompt_embeds=object()), 0, "unsuitable"),
    (Request(100, params={"vsprefill": {"enabled": False}}), 0, "off"),
    (Request(100, params={"vsprefill": {"endpoint": "evil:1"}}), 0, "parameters"),
    (Request(100, params={"vsprefill": 7}), 0, "parameters"), (Request(100, params=7), 0, "parameters"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_computed_here(half, request_, computed, label):
    assert ask(half, request_, computed) == 0
    half.finished(request_)
    assert half.take_stats()["local"] == {label: 1}


def test_parameters_that_blow_up_do_not_end_the_engine(half):
    class Hostile(dict):
        def get(self, *_):
            raise RuntimeError("boom")

    request = Request(params=Hostile(vsprefill={}))
    assert ask(half, request) == 0
    assert half.finished(request)["vsprefill"]["source"] == "local"


def test_no_endpoint_is_a_local_prefill_that_says_why(half, pool):
    pool.fit = []
    request = Request(params={"vsprefill": {}})
    assert ask(half, request) == 0
    assert half.finished(request) == {"vsprefill": {"source": "local", "reason": "a:1: draining"}}
    assert half.take_stats()["local"] == {"endpoint": 1}


def test_a_named_endpoint_is_the_only_one(half, pool):
    assert begin(half, Request(params={"vsprefill": {"endpoint": "b:2"}})).endpoints == ("b:2",)
    pool.fit = ["a:1"]
    assert ask(half, Request(params={"vsprefill": {"endpoint": "b:2"}}, request_id="s")) == 0


def test_an_endpoint_lost_between_promise_and_room(half, pool):
    request = Request()
    tokens = ask(half, request)
    pool.fit = []
    half.allocated(request, range(50, 57), tokens)
    assert half.take_metadata().loads[0].endpoints == ("a:1",)  # it will fail there, and blocks are reported


def test_one_load_per_request_then_the_engine_computes(half):
    request = Request()
    begin(half, request)
    half.allocated(request, range(50, 57), 0)  # vLLM's second call
    half.ended([failed()])
    assert half.matched(request, 0) == 0  # recompute, or a preemption
    half.allocated(request, range(60, 67), 100)
    assert half.take_metadata().loads == []


def test_outcomes_reach_the_pool_once(half, pool):
    request = Request()
    begin(half, request)
    half.ended([LoadResult("r", "loaded", 100, 1.0, tries=[Try("a:1", "torn", "DATA_LOSS", True),
                                                           Try("b:2", None, "OK", True)])])
    half.ended([loaded()])
    assert pool.calls == [("begin", "a:1", 100), ("end", "a:1", 100), ("record", "a:1", "torn", True),
                          ("record", "b:2", None, True)]


@pytest.mark.parametrize("deadline,blame", [(9, True), (2, False)])
def test_a_short_deadline_of_the_caller_is_not_the_servers_fault(half, pool, deadline, blame):
    begin(half, Request(params={"vsprefill": {"deadline_seconds": deadline}}))
    half.ended([failed("DEADLINE_EXCEEDED")])
    assert pool.calls[-1] == ("record", "a:1", "gone", blame)


def test_a_load_that_was_never_tried_frees_the_probe(half, pool):
    begin(half, Request())
    half.ended([LoadResult("r", "cancelled", 100, 0.1)])
    assert pool.calls[-1] == ("record", "a:1", "not tried", False)


def test_abort_cancels_once(half, pool):
    request = Request()
    begin(half, request)
    half.finished(request)
    assert half.take_metadata().cancels == ["r"]
    assert half.take_metadata().cancels == []
    half.ended([LoadResult("r", "cancelled", 100, 0.1, tries=[Try("a:1", "cancelled", "CANCELLED", False)])])
    assert ("end", "a:1", 100) in pool.calls
    assert half.take_metadata().cancels == []


def test_a_request_that_ends_before_its_load_was_sent(half):
    request = Request()
    half.allocated(request, range(50, 57), ask(half, request))
    half.finished(request)
    metadata = half.take_metadata()
    assert [s.request_id for s in metadata.loads] == metadata.cancels == ["r"]


def test_callers_who_asked_hear_what_came_of_it(half):
    request = Request(params={"vsprefill": {}})
    begin(half, request)
    half.ended([loaded(seconds=0.25, last_chunk_at=time.monotonic() - 1.5)])
    told = half.finished(request)["vsprefill"]
    assert 1.5 <= told.pop("handover_seconds") < 5
    assert told == {
        "source": "remote", "endpoint": "a:1", "method": "dense", "start_token": 0, "tokens": 100, "bytes": 64,
        "seconds": 0.25, "server_seconds": 0.0, "density": 1.0, "salted": False}
    request = Request(params={"vsprefill": {}})
    begin(half, request)
    half.ended([failed()])
    assert half.finished(request)["vsprefill"] == {"source": "local", "reason": "load failed: gone"}
    for params in (None, {"other": 1}):
        request = Request(params=params)
        begin(half, request)
        half.ended([loaded()])
        assert half.finished(request) is None
    assert len(half.take_stats()["handovers"]) == 3  # of those that were loaded


def test_unknown_requests_are_ignored(half):
    request = Request()
    assert half.matched(request, 0) == 0
    half.allocated(request, range(7), 100)
    assert half.finished(request) is None
    half.ended([loaded("nobody")])
    assert half.take_metadata().loads == []


SPARSE = {"vsprefill": {"method": "vsprefill"}}


def test_sparse_kv_is_salted_before_anyone_looks_into_the_prefix_cache(half):
    plain, sparse, same = Request(), Request(params=SPARSE), Request(params=SPARSE)
    tuned = Request(params={"vsprefill": {"preset": "fast"}})
    of_user = Request(params=SPARSE, salt="user")
    for request in (plain, sparse, same, tuned, of_user):
        half.add(request)
    assert plain.cache_salt is None and plain.block_hashes == Request().block_hashes
    assert sparse.block_hashes == same.block_hashes
    firsts = [r.block_hashes[0] for r in (plain, sparse, tuned, of_user, Request(salt="user"))]
    assert len(set(firsts)) == 5
    assert of_user.cache_salt == "user|vsprefill:vsprefill"
    assert len(sparse.block_hashes) == 100 // BLOCK


def test_the_servers_default_method_counts_as_sparse(pool):
    half = SchedulerHalf(ConnectorConfig.parse({**CONFIG, "attention": {}}), pool, "id")
    request = Request()
    half.add(request)
    assert request.cache_salt == "vsprefill:default"


def test_a_prompt_computed_here_from_the_start_is_not_salted(half):
    for request in (Request(31, params=SPARSE), Request(params={"vsprefill": {"method": "vsprefill",
                                                                              "enabled": False}})):
        half.add(request)
        assert request.cache_salt is None


class Unsaltable(Request):
    def update_block_hashes(self):
        self.block_hashes[:] = ["fixed"] * (self.num_prompt_tokens // BLOCK)


def test_an_engine_that_cannot_be_salted_computes_sparse_prompts_itself(half):
    request = Unsaltable(params=SPARSE)
    assert ask(half, request) == 0
    assert request.cache_salt is None and request.block_hashes == ["fixed"] * 6
    assert "cannot be salted" in half.finished(request)["vsprefill"]["reason"]
    no_salt = Request(params=SPARSE)
    del no_salt.cache_salt
    assert ask(half, no_salt) == 0
    assert ask(half, Unsaltable()) == 100  # dense KV needs no salt


def test_no_prefix_cache_needs_no_salt(half):
    request = Request(params=SPARSE)
    request.block_hashes = []
    assert ask(half, request) == 100

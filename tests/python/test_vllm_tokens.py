"""vLLM decodes a remote prefill: the same tokens as its own, and sparse KV stays with those who asked for it.

fp32, so that tokens must be equal; one engine and one prefill server for the whole file.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import needles
import pytest
import vllm_engine
from servers import start_server
from vllm_engine import Engine, cached_tokens, outcome, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.long]
LOCAL = {"enabled": False}
BLOCK = 128
NAMES = ["one token", "two tokens", "capital", "list", "text 129", "text 600", "text 1500", "text 3000",
         "document and question", "text 7000"]


@pytest.fixture(scope="module")
def server(model_dir):
    vllm_engine.require()
    with start_server(model_dir, "--dtype", "fp32", "--method", "dense", "--chunk_tokens", "1024") as running:
        yield running


@pytest.fixture(scope="module")
def engine(server):
    with Engine({"endpoints": [server.address], "min_prompt_tokens": 1, "deadline_seconds": 300}) as running:
        yield running
        assert running.alive()


@pytest.mark.parametrize("name", [*NAMES[:-1], pytest.param(NAMES[-1], marks=pytest.mark.vllm_rest)])
def test_tokens_equal_vllms_own(engine, expected, name):
    prompt = expected[name]
    local = engine.complete(prompt["ids"], vsprefill=LOCAL)
    remote = engine.complete(prompt["ids"], vsprefill={})
    assert outcome(local) == {"source": "local", "reason": "switched off for this request"}
    assert outcome(remote)["source"] == "remote"
    assert (outcome(remote)["start_token"], outcome(remote)["tokens"]) == (0, len(prompt["ids"]))
    assert tokens(remote) == tokens(local)
    assert tokens(remote) == prompt["tokens"]  # and both equal transformers'


def test_eight_at_once(engine, expected):
    chosen = [expected[n] for n in ("capital", "text 600", "list", "text 1500", "text 129", "text 3000", "text 600",
                                    "two tokens")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: engine.complete(p["ids"], vsprefill={}), chosen))
    for prompt, answer in zip(chosen, answers, strict=True):
        assert outcome(answer)["source"] == "remote"
        assert tokens(answer) == prompt["tokens"]
    engine.await_idle()


def test_local_prefix_hits_move_the_start(engine, expected):
    prompt = expected["text 3000"]
    engine.complete(prompt["ids"][:1300], vsprefill=LOCAL, salt="shared", max_tokens=1)
    answer = engine.complete(prompt["ids"], vsprefill={}, salt="shared")
    assert outcome(answer)["start_token"] == 1300 // BLOCK * BLOCK
    assert outcome(answer)["tokens"] == 3000 - 1300 // BLOCK * BLOCK
    assert tokens(answer) == prompt["tokens"]
    # The loaded blocks serve the next one: only the rest behind them is asked for.
    again = engine.complete(prompt["ids"], vsprefill={}, salt="shared")
    assert outcome(again)["start_token"] == 3000 // BLOCK * BLOCK
    assert tokens(again) == prompt["tokens"]
    # Eight at once over one prefix.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: engine.complete(prompt["ids"][:n], vsprefill={}, salt="shared", max_tokens=8),
                                range(1500, 1508)))
    assert all(outcome(a)["start_token"] == 1500 // BLOCK * BLOCK for a in answers)
    local = engine.complete(prompt["ids"][:1507], vsprefill=LOCAL, max_tokens=8)
    assert tokens(answers[7]) == tokens(local)


def test_what_the_caller_may_not_say_is_a_local_prefill_with_a_reason(engine, expected):
    prompt = expected["text 600"]
    for params, reason in (({"endpoint": "127.0.0.1:1"}, "is not one of"), ({"preset": "x"}, "preset 'x'"),
                           ({"deadline": 1}, "unknown 'deadline'")):
        answer = engine.complete(prompt["ids"], vsprefill=params)
        assert outcome(answer)["source"] == "local" and reason in outcome(answer)["reason"]
        assert tokens(answer) == prompt["tokens"]


def test_prompt_logprobs_need_every_position(engine, expected):
    answer = engine.complete(expected["text 129"]["ids"], vsprefill={}, max_tokens=1, prompt_logprobs=1)
    assert outcome(answer)["source"] == "local" and "log-probabilities" in outcome(answer)["reason"]
    assert len(answer["choices"][0]["prompt_logprobs"]) == 129


def test_sparse_kv_never_serves_a_request_without_its_salt(engine, expected):
    prompt = expected["text 3000"]
    for salt in ("", "user"):
        sparse = engine.complete(prompt["ids"], vsprefill={"method": "vsprefill"}, salt=salt)
        assert outcome(sparse)["salted"] and outcome(sparse)["density"] < 1
        plain = engine.complete(prompt["ids"], vsprefill=LOCAL, salt=salt)
        assert cached_tokens(plain) == 0  # not one block of the sparse prefill
        assert tokens(plain) == prompt["tokens"]
        dense = engine.complete(prompt["ids"], vsprefill={"method": "dense"}, salt=salt)
        assert cached_tokens(dense) >= 3000 // BLOCK * BLOCK  # those of the plain one: dense KV is shared
        assert tokens(dense) == prompt["tokens"]
        other = engine.complete(prompt["ids"], vsprefill={"method": "vsprefill", "parameters": {"threshold": 4.0}},
                                salt=salt)
        assert outcome(other)["start_token"] == 0  # other parameters are another kind of KV
        again = engine.complete(prompt["ids"], vsprefill={"method": "vsprefill"}, salt=salt)
        assert outcome(again)["start_token"] == 3000 // BLOCK * BLOCK  # its own blocks serve the same kind
        assert tokens(again) == tokens(sparse)


@pytest.mark.parametrize("length", [*needles.LENGTHS[:2], *(pytest.param(n, marks=pytest.mark.vllm_rest)
                                                            for n in needles.LENGTHS[2:])])
def test_needles_are_found_as_dense_finds_them(engine, model_dir, length):
    ids, number, tokenizer = needles.make(model_dir, length)
    assert length - 200 < len(ids) <= length

    def answer(method):
        reply = engine.complete(ids, vsprefill={"method": method}, max_tokens=24)
        assert outcome(reply)["source"] == "remote" and outcome(reply)["method"] == method
        return tokenizer.decode(tokens(reply)), outcome(reply)["density"]

    dense, full = answer("dense")
    sparse, density = answer("vsprefill")
    assert full == 1
    assert number in dense, f"dense does not find {number}: {dense!r}"
    assert number in sparse, f"vsprefill at density {density:.2f} does not find {number}: {sparse!r}"


def test_metrics_tell_what_was_loaded(engine, server, expected):
    def read():
        return {
            "loaded": engine.metric("vllm:vsprefill_loads_total", outcome="loaded"),
            "seconds": engine.metric("vllm:vsprefill_load_seconds_count"),
            "server": engine.metric("vllm:vsprefill_server_seconds_count"),
            "bytes": engine.metric("vllm:vsprefill_load_bytes_sum"),
            "tries": engine.metric("vllm:vsprefill_tries_total", endpoint=server.address, code="OK"),
            "tokens": engine.metric("vllm:vsprefill_loaded_tokens_total"),
            "off": engine.metric("vllm:vsprefill_local_prefills_total", reason="off"),
            "parameters": engine.metric("vllm:vsprefill_local_prefills_total", reason="parameters")}

    before = read()
    ids = expected["text 600"]["ids"]
    engine.complete(ids, vsprefill={}, max_tokens=1)
    engine.complete(ids[:9], vsprefill=LOCAL, max_tokens=4)
    engine.complete(ids[:9], vsprefill={"preset": "none"}, max_tokens=4)
    token_bytes = 30 * 2 * 3 * 64 * 4  # layers, K and V, KV heads, head_dim, fp32
    end = time.monotonic() + 30
    while True:
        # Counts travel with the engine's steps: those of a request's end need another request's step.
        engine.complete(ids[:2], vsprefill={}, max_tokens=2)
        change = {name: value - before[name] for name, value in read().items()}
        if change["off"] and change["parameters"] and change["loaded"]:
            break
        assert time.monotonic() < end, change
    assert (change["off"], change["parameters"]) == (1, 1)
    assert change["loaded"] == change["seconds"] == change["server"] == change["tries"]
    assert change["tokens"] >= 600 and change["bytes"] == change["tokens"] * token_bytes
    assert engine.metric("vllm:vsprefill_loads_total", outcome="failed") == 0

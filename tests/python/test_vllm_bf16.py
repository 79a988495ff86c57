"""bf16: a remote prefill's tokens may differ from vLLM's own at near-ties only, and each difference is printed."""

import near_ties
import pytest
import vllm_engine
from servers import start_server
from vllm_engine import Engine, outcome, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.vllm_rest, pytest.mark.long]


@pytest.fixture(scope="module")
def engine(model_dir):
    vllm_engine.require()
    with start_server(model_dir, "--dtype", "bf16", "--method", "dense") as server:
        with Engine({"endpoints": [server.address], "min_prompt_tokens": 1, "deadline_seconds": 300},
                    dtype="bfloat16") as running:
            yield running


@pytest.mark.parametrize("name", ["one token", "capital", "list", "text 129", "text 600", "text 1500", "text 3000",
                                  "document and question"])
def test_differences_are_near_ties(engine, expected, name, capsys):
    ids = expected[name]["ids"]
    local = engine.complete(ids, vsprefill={"enabled": False}, logprobs=2)
    remote = engine.complete(ids, vsprefill={})
    assert outcome(remote)["source"] == "remote"

    def gap(i):
        best = sorted(local["choices"][0]["logprobs"]["top_logprobs"][i].values(), reverse=True)
        return best[0] - best[1]

    line = near_ties.check(name, tokens(remote), tokens(local), gap)
    with capsys.disabled():
        print(f"\n  bf16 through vLLM: {line}", end="")

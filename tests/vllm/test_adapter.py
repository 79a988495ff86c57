"""The module that vLLM loads, against the installed vLLM but without an engine. Runs inside .venv-vllm:
tests/python/test_vllm_adapter.py starts it there.
"""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from vllm import SamplingParams, _custom_ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.utils.hashing import sha256
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.request import Request
from vsprefill import vllm_connector
from vsprefill.connector import stats
from vsprefill.connector.cache_writer import CpuPackedWriter
from vsprefill.connector.config import ConfigError, ConnectorConfig
from vsprefill.connector.layouts import probe
from vsprefill.connector.loads import LoadResult, LoadSpec, Try
from vsprefill.connector.scheduler import LoadMetadata, SchedulerHalf
from vsprefill.vllm_metrics import VSPrefillPromMetrics, VSPrefillStats

MODEL = Path(os.environ["VSP_MODEL"])


def vllm_config(**changes):
    """The attributes that the connector reads."""
    from transformers import AutoConfig

    values = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1,
              "cache_dtype": "auto", "dtype": torch.bfloat16, "quantization": None, "use_mla": False, **changes}
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(MODEL), revision=None, dtype=values["dtype"],
                                     quantization=values["quantization"], use_mla=values["use_mla"],
                                     hf_config=values.get("hf_config") or AutoConfig.from_pretrained(MODEL)),
        parallel_config=SimpleNamespace(**{k: v for k, v in values.items() if k.endswith("_size")}),
        cache_config=SimpleNamespace(cache_dtype=values["cache_dtype"]))


@pytest.mark.parametrize("changes,message", [
    ({"tensor_parallel_size": 2}, "tensor_parallel_size 2: VSPrefillConnector supports 1 only"),
    ({"pipeline_parallel_size": 4}, "pipeline_parallel_size 4"),
    ({"decode_context_parallel_size": 2}, "decode_context_parallel_size 2"),
    ({"cache_dtype": "fp8_e5m2"}, "kv_cache_dtype fp8_e5m2: VSPrefillConnector supports auto only, here bfloat16"),
    ({"dtype": torch.float16}, "dtype float16"), ({"quantization": "fp8"}, "quantization fp8"),
    ({"use_mla": True}, "latent attention"),
])
def test_engines_that_do_not_work_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        vllm_connector.model_fingerprint(vllm_config(**changes), "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_vllms_view_of_the_model_has_the_servers_identity(dtype):
    from vsprefill import identity

    ours = vllm_connector.model_fingerprint(vllm_config(dtype=getattr(torch, dtype)), "")
    assert ours.kv_id == identity.kv_id(MODEL, dtype)


def test_an_override_of_rope_is_another_model():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    plain, other = (vllm_connector.model_fingerprint(vllm_config(**c), "") for c in ({}, {"hf_config": config}))
    assert plain.kv_id != other.kv_id and plain.weights_id == other.weights_id


def groups(*specs):
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])


def test_hybrid_models_are_refused():
    shape = {"block_size": 128, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    full = FullAttentionSpec(**shape)
    assert vllm_connector.check_cache_groups(groups(full)) == 128
    window = SlidingWindowSpec(**shape, sliding_window=64)
    state = MambaSpec(block_size=128, shapes=((1,),), dtypes=(torch.float32,))
    for kinds in ((full, window), (window,), (full, state), (FullAttentionSpec(**shape, sliding_window=64),)):
        with pytest.raises(ConfigError, match="full attention"):
            vllm_connector.check_cache_groups(groups(*kinds))


def test_nothing_abstract_is_left_and_every_hook_exists():
    assert not vllm_connector.VSPrefillConnector.__abstractmethods__
    ours = vars(vllm_connector.VSPrefillConnector)
    own = {name for name, value in ours.items() if callable(value) and not name.startswith("_")}
    assert own <= set(dir(KVConnectorBase_V1)), own - set(dir(KVConnectorBase_V1))  # a renamed hook is never called


def make_request(salt=None, params=None):
    init_none_hash(sha256)
    return Request("r", list(range(400)), SamplingParams(max_tokens=4, extra_args={"kv_transfer_params": params}), None,
                   cache_salt=salt, block_hasher=get_request_block_hasher(128, sha256))


class Pool:
    def ranked(self, *_):
        return ["a:1"]

    def __getattr__(self, _):
        return lambda *_args, **_kwargs: None


@pytest.mark.parametrize("own", [None, "user"])
def test_salting_gives_the_hashes_of_a_request_that_came_with_the_salt(own):
    half = SchedulerHalf(ConnectorConfig.parse({"endpoints": ["a:1"]}), Pool(), "id")
    plain = make_request(own)
    half.add(plain)
    assert plain.cache_salt == own and half.matched(plain, 0) == 400
    sparse = make_request(own, {"vsprefill": {"method": "vsprefill"}})
    half.add(sparse)
    assert half.matched(sparse, 0) == 400
    expected = "vsprefill:vsprefill" if own is None else "user|vsprefill:vsprefill"
    assert list(sparse.block_hashes) == list(make_request(expected).block_hashes)
    assert len(sparse.block_hashes) == 3 and not set(sparse.block_hashes) & set(plain.block_hashes)


def test_messages_between_processes_survive_pickling():
    spec = LoadSpec("r", (1, 2), 0, (5,), ("a:1",), "dense", {}, 9.0, "id")
    step = vllm_connector.VSPrefillMetadata(LoadMetadata([spec], ["x"]))
    assert pickle.loads(pickle.dumps(step)) == step
    result = LoadResult("r", "failed", 2, 0.1, tries=[Try("a:1", "gone", "UNAVAILABLE", True)], bad_blocks=[5])
    back = vllm_connector.VSPrefillWorkerMetadata([result])
    assert pickle.loads(pickle.dumps(back)) == back
    assert back.aggregate(back).results == [result, result]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vllms_own_op_packs_what_we_write(dtype):
    """isa "vec": K of a block column-major, V row-major. Others have packings of their own."""
    blocks, heads, block, dim = 4, 3, 128, 64
    isa = _get_attn_isa(dtype, block, dim)
    if isa != "vec":
        pytest.skip(f"this machine's packing is {isa!r}; only 'vec' is known to this test")
    cache = torch.zeros(blocks, heads, block, 2 * dim, dtype=dtype)
    layout = probe(tuple(cache.shape), blocks=blocks, block_size=block, heads=heads, dim=dim)
    writer = CpuPackedWriter(cache, layout, _custom_ops.cpu_attn_reshape_and_cache, isa)
    slots = torch.tensor([2 * block + 5, 2 * block + 6, 127])
    keys, values = torch.randn(2, heads, 3, dim).to(dtype)
    writer.write(keys, values, slots)
    for i, slot in enumerate(slots.tolist()):
        b, o = divmod(slot, block)
        for head in range(heads):
            k, v = cache[b, head].flatten().chunk(2)
            assert torch.equal(k.view(dim, block)[:, o], keys[head, i])
            assert torch.equal(v.view(block, dim)[o], values[head, i])


def test_stats_reach_prometheus():
    registry = CollectorRegistry()
    types = {kind: lambda *args, _kind=kind, **kwargs: _kind(*args, registry=registry, **kwargs)
             for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = VSPrefillPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"]})
    collected = VSPrefillStats()
    stats.record(collected.data, LoadResult("r", "loaded", 100, 0.5, bytes=2000, server_seconds=0.25, tries=[
        Try("a:1", "gone", "UNAVAILABLE", True), Try("b:2", None, "OK", True)]))
    more = VSPrefillStats()
    stats.record(more.data, LoadResult("r", "failed", 100, 0.5))
    stats.count(more.data, "local", "short")
    more.data["handovers"].append(0.03)
    assert not collected.is_empty() and VSPrefillStats().is_empty()
    both = collected.aggregate(more)
    rebuilt = vllm_connector.VSPrefillConnector.build_kv_connector_stats(both.to_dict())
    assert rebuilt.reduce()["Loaded caches"] == 1 and rebuilt.reduce()["Failed loads"] == 1
    metrics.observe(rebuilt.data, 0)
    text = generate_latest(registry).decode()
    for line in ('vllm:vsprefill_load_seconds_sum{engine="0",model_name="m"} 0.5',
                 'vllm:vsprefill_server_seconds_sum{engine="0",model_name="m"} 0.25',
                 'vllm:vsprefill_handover_seconds_sum{engine="0",model_name="m"} 0.03',
                 'vllm:vsprefill_load_bytes_sum{engine="0",model_name="m"} 2000.0',
                 'vllm:vsprefill_loaded_tokens_total{engine="0",model_name="m"} 100.0',
                 'vllm:vsprefill_loads_total{engine="0",model_name="m",outcome="loaded"} 1.0',
                 'vllm:vsprefill_loads_total{engine="0",model_name="m",outcome="failed"} 1.0',
                 'vllm:vsprefill_tries_total{code="UNAVAILABLE",endpoint="a:1",engine="0",model_name="m"} 1.0',
                 'vllm:vsprefill_local_prefills_total{engine="0",model_name="m",reason="short"} 1.0'):
        assert line in text, text
    collected.reset()
    assert collected.is_empty()

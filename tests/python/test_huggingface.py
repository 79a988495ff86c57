"""What is handed to transformers.generate: shapes that do not fit are refused, never filled in."""

import numpy as np
import pytest
import vsprefill
from fake_server import FIRST_TOKEN, HEAD_DIM, HEADS, LAYERS, FakeServer, make_kv
from vsprefill import huggingface
from vsprefill.v1 import kv_pb2

IDS = list(range(40))


def config(**changes):
    from transformers import LlamaConfig

    values = {"num_hidden_layers": LAYERS, "num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS,
              "head_dim": HEAD_DIM, "hidden_size": 2 * HEADS * HEAD_DIM, "intermediate_size": 16, "vocab_size": 64}
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def kv():
    with FakeServer() as server, vsprefill.PrefillClient(server.address) as client:
        yield client.prefill(IDS, kv_dtype="float32")


def test_cache_holds_the_layers_in_order(kv):
    cache = kv.to_dynamic_cache(config())
    assert cache.get_seq_length() == len(IDS)
    for layer in range(LAYERS):
        k, v = make_kv(layer, len(IDS), kv_pb2.KV_DTYPE_FLOAT32)
        np.testing.assert_array_equal(cache.layers[layer].keys[0], k)
        np.testing.assert_array_equal(cache.layers[layer].values[0], v)


def test_inputs_are_always_longer_than_the_cache(kv):
    """An exact-length cache makes transformers feed the whole prompt again, silently."""
    for first_token, ids in ((True, [*IDS, FIRST_TOKEN]), (False, IDS)):
        inputs = kv.generate_inputs(config(), first_token=first_token)
        assert inputs["input_ids"].tolist() == [ids]
        assert inputs["attention_mask"].tolist() == [[1] * len(ids)]
        assert inputs["past_key_values"].get_seq_length() == len(ids) - 1


@pytest.mark.parametrize("changes,message", [
    ({"num_hidden_layers": LAYERS + 1}, "layers 5, the cache 4"),
    ({"num_key_value_heads": 1}, "KV heads 1, the cache 2"),
    ({"head_dim": 16}, "head_dim 16, the cache 8"),
])
def test_another_model_is_refused(kv, changes, message):
    with pytest.raises(ValueError, match=message):
        kv.to_dynamic_cache(config(**changes))


def test_sliding_windows_are_refused(kv):
    mixed = config()
    mixed.layer_types = ["full_attention", "sliding_attention"] * (LAYERS // 2)
    with pytest.raises(ValueError, match="sliding_attention"):
        kv.to_dynamic_cache(mixed)


def test_a_tail_is_no_cache():
    with FakeServer() as server, vsprefill.PrefillClient(server.address) as client:
        tail = client.prefill(IDS, start_token=8)
        one = client.prefill([1], kv_dtype="float32")
    with pytest.raises(ValueError, match="before 8 are missing"):
        tail.generate_inputs(config())
    with pytest.raises(ValueError, match="one token"):
        one.generate_inputs(config(), first_token=False)
    assert one.generate_inputs(config())["past_key_values"].get_seq_length() == 1


class Model:
    """Counts how generate() is called."""

    device, dtype = "cpu", None

    def __init__(self, eos):
        self.config = config()
        self.generation_config = type("G", (), {"eos_token_id": eos})
        self.calls = []

    def generate(self, input_ids, max_new_tokens, do_sample, **_):
        import torch

        self.calls.append((input_ids.shape[1], max_new_tokens, do_sample))
        return torch.cat([input_ids, torch.full((1, max_new_tokens), 9)], dim=1)


def test_generate_counts_the_servers_first_token(kv):
    model = Model(eos=3)
    assert huggingface.generate(model, kv, max_new_tokens=4) == [FIRST_TOKEN, 9, 9, 9]
    assert model.calls == [(len(IDS) + 1, 3, False)]
    assert huggingface.generate(model, kv, max_new_tokens=1) == [FIRST_TOKEN]
    assert len(model.calls) == 1
    assert huggingface.generate(model, kv, max_new_tokens=2, do_sample=True) == [9, 9]
    assert model.calls[1] == (len(IDS), 2, True)
    for eos in (FIRST_TOKEN, [3, FIRST_TOKEN]):
        ended = Model(eos=eos)
        assert huggingface.generate(ended, kv, max_new_tokens=4) == [FIRST_TOKEN]
        assert ended.calls == []
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        huggingface.generate(model, kv, max_new_tokens=0)

"""Examples in the guides do what they say."""

import re

import numpy as np
import vsprefill
from conftest import ROOT
from fake_server import FIRST_TOKEN, HEAD_DIM, HEADS, LAYERS, FakeServer, make_kv
from vsprefill.v1 import kv_pb2


def test_writing_a_connector():
    text = (ROOT / "docs/writing_a_connector.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    array = np.zeros((LAYERS, 2, HEADS, 64, HEAD_DIM), np.uint16)
    told = {}

    class Engine:
        def decode_from(self, array, position, token):
            told.update(position=position, token=token)

    with FakeServer() as server, vsprefill.PrefillClient(server.address) as client:
        exec(example, {"client": client, "array": array, "ids": list(range(40)), "kv_id": "id", "engine": Engine()})
    assert told == {"position": 40, "token": FIRST_TOKEN}
    for layer in range(LAYERS):
        np.testing.assert_array_equal(array[layer, :, :, :40], make_kv(layer, 40, kv_pb2.KV_DTYPE_BFLOAT16))


def test_vllm_guide_names_every_setting():
    from dataclasses import fields

    from vsprefill.connector.config import ConnectorConfig

    text = (ROOT / "docs/decode_with_vllm.md").read_text()
    settings = text.split("## Settings")[1].split("## One request")[0]
    for field in fields(ConnectorConfig):
        assert f"`{field.name}`" in settings, field.name


def test_vllm_guide_names_every_metric():
    source = (ROOT / "client/python/vsprefill/vllm_metrics.py").read_text()
    text = (ROOT / "docs/decode_with_vllm.md").read_text()
    names = re.findall(r'(histogram|counter)\(\s*"(\w+)"', source)
    assert len(names) == 8
    for kind, name in names:
        assert f"`vllm:vsprefill_{name}{'_total' if kind == 'counter' else ''}`" in text


def test_adding_a_method_shows_the_real_one():
    text = (ROOT / "docs/adding_a_method.md").read_text()
    source = (ROOT / "server/attention/streaming_llm.cc").read_text()
    (example,) = re.findall(r"```cpp\n(.*?)```", text, re.S)
    for part in re.split(r"\n\n(?=MethodSpec)", example.strip()):
        assert part in source
    assert "VSP_METHOD(StreamingLlmSpec)" in (ROOT / "server/attention/methods.inc").read_text()


def test_methods_page_names_every_method_and_parameter():
    page = (ROOT / "docs/methods.md").read_text() + (ROOT / "docs/vsprefill.md").read_text()
    for path in (ROOT / "server/attention").glob("*.cc"):
        source = path.read_text()
        for name in re.findall(r'spec\.name = "(\w+)"', source) + re.findall(r'\{"(\w+)",', source):
            assert f"`{name}`" in page, f"{path.name}: {name}"

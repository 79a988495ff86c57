"""transformers decodes a remote prefill: bf16 near-ties, needles with sparse KV, and the guide's example.

That fp32 gives the same tokens for ten prompts is in test_end_to_end.py.
"""

import re
import subprocess
import sys

import near_ties
import needles
import pytest
import vsprefill
from conftest import ROOT
from servers import start_server
from vsprefill import huggingface

pytestmark = [pytest.mark.long]


@pytest.fixture(scope="module")
def server(model_dir):
    with start_server(model_dir, "--dtype", "bf16", "--method", "dense") as running:
        yield running


@pytest.fixture(scope="module")
def model(model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("name", ["one token", "capital", "list", "text 129", "text 600", "text 1500"])
def test_bf16_differs_at_near_ties_only(server, model, expected, name, capsys):
    import torch

    ids = expected[name]["ids"]
    inputs = torch.tensor([ids])
    local = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=64, do_sample=False,
                           output_logits=True, return_dict_in_generate=True)
    with vsprefill.PrefillClient(server.address) as client:
        kv = client.prefill(ids, method="dense", timeout=600)
    remote = huggingface.generate(model, kv, max_new_tokens=64)

    def gap(i):
        best = local.logits[i][0].float().topk(2).values
        return float(best[0] - best[1])

    line = near_ties.check(name, remote, local.sequences[0, len(ids):].tolist(), gap)
    with capsys.disabled():
        print(f"\n  bf16 through transformers: {line}", end="")


@pytest.mark.parametrize("length", needles.LENGTHS)
def test_needles_are_found_as_dense_finds_them(server, model, model_dir, length):
    ids, number, tokenizer = needles.make(model_dir, length)
    with vsprefill.PrefillClient(server.address) as client:
        answers = {method: tokenizer.decode(huggingface.generate(
            model, client.prefill(ids, method=method, timeout=600), max_new_tokens=24))
            for method in ("dense", "vsprefill")}
    assert number in answers["dense"], answers
    assert number in answers["vsprefill"], answers


def test_the_guides_example(model_dir, tmp_path):
    """docs/decode_with_transformers.md: its first block of Python, as it stands, with this server's address."""
    text = (ROOT / "docs/decode_with_transformers.md").read_text()
    (example, *_) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(example.strip().splitlines()) <= 10
    script = tmp_path / "example.py"
    # float32: in bfloat16 the answer's first token is a near-tie (test above).
    with start_server(model_dir, "--dtype", "fp32", "--method", "dense") as server:
        script.write_text(example.replace("127.0.0.1:8470", server.address))
        environment = {"PYTHONPATH": str(ROOT / "client/python"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"}
        done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env=environment)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout

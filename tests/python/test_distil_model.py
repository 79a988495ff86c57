"""training/distil_model.py: what it refuses, how it reads the programs' output, and once from text to report."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from servers import binary

sys.path.insert(0, str(ROOT / "training"))

import distil_model


def run(*arguments, timeout=600):
    return subprocess.run([sys.executable, ROOT / "training/distil_model.py", *map(str, arguments)],
                          capture_output=True, text=True, timeout=timeout)


def test_what_cannot_be_distilled_is_one_line(tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("")
    model = tmp_path / "model"
    model.mkdir()

    def refusal(*more):
        done = run("--model", model, "--documents", documents, "--out", tmp_path / "out", *more)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        return done.stderr

    assert "has no config.json" in refusal()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    (model / "tokenizer.json").write_text("{}")
    assert "has no *.safetensors" in refusal()
    (model / "model.safetensors").write_bytes(b"")
    assert "a text of 8192 tokens was asked for, the model takes 4096" in refusal()
    assert "is missing: deploy/local/build.sh" in refusal("--lengths", "512", "--program", tmp_path / "nothing")
    documents.unlink()
    assert "documents.jsonl is missing" in refusal("--lengths", "512", "--program", sys.executable)


def test_the_loss_curve_is_that_of_the_last_training(tmp_path):
    line = "[##..] {}/60 10 %  KL vertical {} slash {}  recall@10% 0.712  9 tokens  elapsed 1s  left 2s"
    log = tmp_path / "log"
    log.write_text("\n".join(["$ vsprefill-distill --steps 1", line.format(1, 9, 9), "$ vsprefill-distill", "corpus: x",
                              line.format(6, 0.5, 0.25), "[##..] 1/3 33 %  fitting the scale  elapsed 1s  left 1s",
                              line.format(60, 0.125, 0.0625)]))
    assert distil_model.losses(log) == [(6, 0.5, 0.25), (60, 0.125, 0.0625)]


@pytest.mark.parametrize("seconds,text", [(4.4, "4 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert distil_model.duration(seconds) == text


@pytest.mark.long
def test_from_text_to_report(tmp_path):
    pytest.importorskip("matplotlib")
    program = binary("vsprefill-distill")
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    documents = tmp_path / "documents.jsonl"
    with documents.open("w") as file:
        for i in range(0, len(text), 1500):
            file.write(json.dumps({"name": f"docs/{i}", "text": text[i:i + 1500], "source": "docs", "genre": "manual",
                                   "licence": "Apache-2.0"}) + "\n")
    model, out = tmp_path / "model", tmp_path / "out"
    shape = "--layers 2 --hidden 64 --heads 2 --kv_heads 1 --head_dim 32 --vocabulary 512 --steps 3 --window 64"
    subprocess.run([sys.executable, ROOT / "training/make_small_model.py", "--family", "qwen2",
                    "--documents", documents, "--out", model, *shape.split()], check=True, timeout=300)
    flags = ["--model", model, "--documents", documents, "--out", out, "--device", "cpu", "--program", program,
             "--lengths", "256,512", "--steps", "4", "--texts_per_step", "1", "--hidden", "16", "--scale_texts", "1",
             "--evaluate_texts", "1", "--densities", "0.4,0.8"]
    done = run(*flags, "--estimate_only")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("estimate:") == 1 and "host memory" in done.stdout
    estimate = json.loads((out / "estimate.json").read_text())
    assert estimate["peak_host_bytes"] > 1 << 20 and set(estimate["seconds_per_text"]) == {"256", "512"}
    assert not (out / "indexer.safetensors").exists()

    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert "tokenizing" not in done.stdout  # the corpus is kept
    report = (out / "report.md").read_text()
    assert "## 512 tokens: 1 held-out texts" in report and "| VSPrefill, as served |" in report
    for picture in ("loss.png", "recall_512.png", "recall_layers_512.png"):
        assert picture in report and (out / picture).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "report.json").read_text())["reports"][0]["results"]
    everything = next(r for r in figures if r["method"] == "vsprefill" and r["wanted_density"] == 0.8)
    assert len(everything["by_layer"]) == 2 and 0.5 < everything["mean"] <= 1
    # Equal but for the header, which names steps and losses.
    assert abs((out / "indexer.safetensors").stat().st_size - estimate["indexer_bytes"]) < 512

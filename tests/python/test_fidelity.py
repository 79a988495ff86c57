"""The fidelity harness (bench/eval): tasks, scores, bootstrap, texts; and the whole of it with a tiny model."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench/eval"))
import bootstrap
import fidelity
import report
import tasks
import texts


def by_words(sample):
    """A tokenizer for tests: one token per word."""
    return (sample.message + " " + sample.prefix).split()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_task_is_fixed_by_its_seed_and_holds_its_answers(task):
    sample, ids = tasks.make(task, 7, 600, by_words)
    again, _ = tasks.make(task, 7, 600, by_words)
    other, _ = tasks.make(task, 8, 600, by_words)
    assert sample == again
    assert sample.message != other.message
    assert 400 < len(ids) <= 600
    assert sample.answers
    for answer in sample.answers:
        assert answer in sample.message
        assert answer not in sample.prefix
    assert tasks.score(sample.answers, "The answer: " + ", ".join(sample.answers)) == 1


@pytest.mark.parametrize("task", ["single", "question_first", "multikey", "multivalue", "variables"])
def test_needles_stand_where_they_were_drawn_at_every_size(task):
    for size in (40, 400):
        sample = tasks.TASKS[task](random.Random("x"), size)
        text = sample.message
        begin = text.index(tasks.NOISE[0])
        length = text.rindex(tasks.NOISE[(size - 1) % 5]) - begin
        values = [needle for needle in sample.answers if needle in text[begin:]]
        at = (text.index(values[0], begin) - begin) / length
        drawn = min(sample.positions, key=lambda p: abs(p - at))
        assert abs(at - drawn) < 0.2 if size == 40 else abs(at - drawn) < 0.05


def test_question_first_has_no_question_behind_the_text():
    sample = tasks.TASKS["question_first"](random.Random(1), 50)
    key = sample.message.split("registration number of the ")[1].split("?")[0]
    assert sample.message.index(key) < sample.message.index(tasks.NOISE[0])
    assert sample.message.rstrip().endswith((tasks.NOISE[4], f"{sample.answers[0]}."))
    assert key not in sample.prefix


def test_common_words_are_the_most_common():
    sample = tasks.TASKS["common_words"](random.Random(3), 500)
    counts = Counter(sample.message.split("\n")[1].split())
    assert {word for word, _ in counts.most_common(5)} == set(sample.answers)
    assert min(counts[w] for w in sample.answers) >= 5 * max(n for w, n in counts.items() if w not in sample.answers)


def test_task_that_cannot_be_small_enough_says_so():
    with pytest.raises(ValueError, match="no prompt of at most 5 tokens"):
        tasks.make("single", 1, 5, by_words)


def test_score_is_the_share_of_answers_found():
    assert tasks.score(["Alpha beta", "7"], "alpha\n BETA and 8") == 0.5
    assert tasks.score(["x"], "") == 0


def test_bootstrap_pairs_and_groups():
    rng = np.random.default_rng(5)
    base = rng.normal(0, 10, 60)
    low, high = bootstrap.difference_interval(base + 1 + rng.normal(0, 0.1, 60), base)
    assert 0.9 < low < 1 < high < 1.1  # the shared spread cancels out
    low, high = bootstrap.mean_interval(base)
    assert high - low == pytest.approx(2 * 1.96 * base.std() / 60 ** 0.5, rel=0.1)
    drawn = bootstrap.draws(["a", "b", "a"], resamples=50)
    assert (drawn[:, 1] == 1).all()
    assert set(np.unique(drawn[:, [0, 2]])) == {0, 2}
    assert bootstrap.mean_interval([1, 2, 4]) == bootstrap.mean_interval([1, 2, 4])
    low, high = bootstrap.ratio_interval([1, 1, 0, 0], [1, 1, 1, 1], ["a", "a", "b", "b"])
    assert low == high == 0.5
    with pytest.raises(ValueError, match="same ones"):
        bootstrap.difference_interval([1, 2], [1])


def test_windows_take_documents_before_second_windows_and_sources_in_turn():
    documents = [("code", "a/1", "x" * 25), ("code", "a/2", "y" * 10), ("code", "b/1", "z" * 10),
                 ("prose", "c/1", "w" * 9)]
    chosen = texts.windows(documents, list, 10, 3)
    assert [name for _, name, _ in chosen] == ["code/a/1/0", "code/b/1/0", "code/a/2/0"]
    assert all(len(ids) == 10 for _, _, ids in chosen)


def test_documents_of_a_source_are_joined_until_they_are_long_enough():
    documents = [("code", "a/1", "x" * 6), ("prose", "b/1", "y" * 9), ("code", "a/2", "z" * 6), ("code", "a/3", "w")]
    assert texts.joined(documents, list, 10) == [("code", "a/1", "x" * 6 + "\n\n" + "z" * 6)]


def test_scaled_model_stretches_the_positions(tmp_path, fixtures_dir):
    made = fidelity.scaled_model(fixtures_dir / "llama", 2, tmp_path)
    plain = json.loads((fixtures_dir / "llama/config.json").read_text(encoding="utf-8"))
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 2 * plain["max_position_embeddings"]
    scaling = config["rope_parameters"] if "rope_parameters" in plain else config["rope_scaling"]
    assert scaling["original_max_position_embeddings"] == plain["max_position_embeddings"]
    assert scaling["rope_type"] == "yarn"
    assert (made / "model.safetensors").exists()


def test_verdict_wants_intervals_apart():
    assert report.verdict({"difference_interval": (-2, -1)}, better=True) == "ahead"
    assert report.verdict({"difference_interval": (-2, -1)}, better=False) == "behind"
    assert report.verdict({"difference_interval": (-1, 1)}, better=True) == "even"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, fixtures_dir):
    """A folder with a plan and items for the tiny Llama: one text, calibration and two prompts; and its results."""
    out = tmp_path_factory.mktemp("fidelity")
    methods = json.loads((ROOT / "bench/eval/methods.json").read_text(encoding="utf-8"))
    plan = {"methods": methods, "densities": [0.5, 0.9], "rows": 40, "kl_stride": 3, "decode_batch": 3}
    rng = random.Random(2)
    vocab = json.loads((fixtures_dir / "llama/config.json").read_text(encoding="utf-8"))["vocab_size"]

    def ids(count):
        return [rng.randrange(vocab) for _ in range(count)]
    items = [{"id": "text/prose/a/0", "kind": "text", "ids": ids(300), "timed": True},
             {"id": "calibration/single@260/1000", "kind": "calibration", "ids": ids(280), "knobs": "single@260"}]
    items += [{"id": f"task/single@260/{seed}", "kind": "task", "ids": ids(260 + seed), "knobs": "single@260",
               "max_new_tokens": 5} for seed in range(2)]
    samples = {f"task/single@260/{seed}": {"task": "single", "length": 260, "seed": seed, "tokens": 260,
                                           "answers": ["7"], "positions": []} for seed in range(2)}
    facts = {"model": "tiny", "preset": "test", "text_tokens": 300,
             "texts": {"text/prose/a/0": {"kind": "prose", "tokens": 300}}, "samples": samples}
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (out / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return out


def evaluate(out, fixtures_dir, *arguments, model="llama"):
    return subprocess.run([ROOT / "build/bin/vsprefill-eval", "--model", fixtures_dir / model, "--plan",
                           out / "plan.json", "--items", out / "items.jsonl", "--results", out / "results.all.jsonl",
                           *arguments], capture_output=True, text=True, timeout=300)


def test_tiny_model_end_to_end(tiny, fixtures_dir):
    done = evaluate(tiny, fixtures_dir)
    assert done.returncode == 0, done.stderr
    first = (tiny / "results.all.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in first.splitlines()]
    names = {line["method"] for line in lines} - {"device", "dense"}
    left_out = {line.split(": ")[1] for line in done.stderr.splitlines() if line.startswith("left out")}
    listed = {method["name"] for method in json.loads((tiny / "plan.json").read_text())["methods"]}
    assert names | left_out == listed
    assert "streaming_llm" in names and "minference" in names
    served = names - {"oracle"}
    assert len(lines) == 1 + 3 + 2 * (len(names) + 3 * len(served))
    for line in lines:
        if "mass" in line:
            # All that a selection reads, it covers: more pairs, more mass; everything, all of it.
            assert 0 < line["mass"]["row_minimum"] <= line["mass"]["mass_mean"] <= 1.001
            assert line["mass"]["density"] <= line["mass"]["cost_ratio"]
            assert len(line["mass"]["mass_by_layer"]) == len(line["mass"]["density_by_layer"])
        if "logits" in line and line["method"] != "dense":
            assert line["logits"]["kl"] >= -1e-5
    assert [len(line["answer"]) for line in lines if "answer" in line] == [5] * (2 + 4 * len(served))

    # Nothing is left to do; a line that was cut off is done again, alone.
    assert evaluate(tiny, fixtures_dir).returncode == 0
    assert (tiny / "results.all.jsonl").read_text(encoding="utf-8") == first
    (tiny / "results.all.jsonl").write_text(first[:-20], encoding="utf-8")
    assert evaluate(tiny, fixtures_dir).returncode == 0
    again = [json.loads(line) for line in (tiny / "results.all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {key: again[-1][key] for key in ("item", "method", "wanted", "answer")} == {
        key: lines[-1][key] for key in ("item", "method", "wanted", "answer")}
    assert len(again) == len(lines)


def test_dense_as_a_method_loses_nothing(tiny, fixtures_dir, tmp_path):
    plan = {"methods": [{"name": "all", "method": "streaming_llm", "settings": [
        {"parameters": {"sink_tokens": 4}, "knob": {"sets": {"window_tokens": 1}, "sparse": 100, "dense": 400}}]}],
        "densities": [1.0], "rows": 40, "kl_stride": 1, "tolerance": 0}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    items = (tiny / "items.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "items.jsonl").write_text(items + "\n", encoding="utf-8")
    done = evaluate(tmp_path, fixtures_dir, "--dtype", "float32", model="llama-f32")
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "results.all.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert line["mass"]["density"] == 1
    assert line["mass"]["row_minimum"] == pytest.approx(1, abs=1e-5)
    assert line["mass"]["error"] < 1e-5
    assert line["logits"]["kl"] == pytest.approx(0, abs=1e-6)
    assert line["logits"]["same_top"] == 1


@pytest.mark.parametrize("plan, items, message", [
    ({"methods": [], "densities": [0]}, "", "density 0 is not in (0, 1]"),
    ({"methods": [{"name": "x", "settings": []}], "densities": [0.1]}, "", "method x has no setting"),
    ({"methods": [], "densities": [0.1]}, '{"id":"a","kind":"song","ids":[1,2]}', 'kind "song" is not text'),
    ({"methods": [], "densities": [0.1]}, '{"id":"a","kind":"task","ids":[1,2]}', 'no "knobs"'),
])
def test_bad_plans_and_items_are_refused(tmp_path, fixtures_dir, plan, items, message):
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "items.jsonl").write_text(items, encoding="utf-8")
    done = evaluate(tmp_path, fixtures_dir)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("flags, message", [
    (["--device", "gpu"], "--device is 'gpu', expected cpu or cuda"),
    (["--dtype", "bf16"], "--dtype is 'bf16', expected bfloat16 or float32"),
    (["--threads", "-1"], "--threads is -1, expected 0"),
])
def test_bad_flags_are_refused(tiny, fixtures_dir, tmp_path, flags, message):
    for name in ("plan.json", "items.jsonl"):
        (tmp_path / name).write_text((tiny / name).read_text(encoding="utf-8"), encoding="utf-8")
    done = evaluate(tmp_path, fixtures_dir, *flags)
    assert done.returncode == 1
    assert message in done.stderr


def test_report_of_the_tiny_model(tiny, fixtures_dir):
    pytest.importorskip("matplotlib")
    if not (tiny / "results.all.jsonl").exists():
        evaluate(tiny, fixtures_dir)
    report.write(tiny, lambda ids: " ".join(map(str, ids)))
    summary = json.loads((tiny / "report.json").read_text(encoding="utf-8"))
    rows = {(r["measure"], r["wanted"], r["method"]): r for r in summary["text"]}
    assert rows["mass_mean", 0.5, "streaming_llm"]["texts"] == 1
    text = (tiny / "report.md").read_text(encoding="utf-8")
    assert "## Goals" in text and "## Cost" in text
    assert (tiny / "mass.png").stat().st_size > 1000


def test_expected_lines_are_what_is_written(tiny, fixtures_dir):
    if not (tiny / "results.all.jsonl").exists():
        evaluate(tiny, fixtures_dir)
    written = report.read_lines(tiny / "results.all.jsonl")
    plan = json.loads((tiny / "plan.json").read_text(encoding="utf-8"))
    present = {line["method"] for line in written}
    plan["methods"] = [method for method in plan["methods"] if method["name"] in present]
    items = [json.loads(line) for line in (tiny / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert fidelity.expected_lines(plan, items) == len(written)


def test_a_task_is_asked_at_the_longest_length_that_dense_can_do(tmp_path):
    samples, items, results = {}, [], []
    for length, right in ((100, "yes"), (200, "yes"), (400, "no")):
        for kind in ("probe", "task"):
            name = f"{kind}/single@{length}/0"
            samples[name] = {"task": "single", "length": length, "answers": ["yes"]}
        items.append({"id": f"task/single@{length}/0", "kind": "task", "ids": [1, 2], "knobs": f"single@{length}"})
        results.append({"item": f"probe/single@{length}/0", "method": "dense", "wanted": 0, "answer": right})
    (tmp_path / "facts.json").write_text(json.dumps({"samples": samples}), encoding="utf-8")
    (tmp_path / "items.candidates.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")
    (tmp_path / "results.probe.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
    fidelity.choose(tmp_path, lambda answer: answer)
    assert json.loads((tmp_path / "chosen.json").read_text())["chosen"] == {"single": 200}
    assert "single@200" in (tmp_path / "items.tasks.jsonl").read_text()
    assert "single@400" not in (tmp_path / "items.tasks.jsonl").read_text()

"""How faithful are the attention methods? One command: prepares texts and tasks, runs vsprefill-eval, writes a report.

  fidelity.py --quick                 within five minutes on two cores: 1,280 tokens, one density, three short tasks
  fidelity.py                         within an hour on two cores: 3,072 tokens, five densities, tasks at 10 and 20 %
  fidelity.py --full [--device cuda]  what the goals are judged on: 8,192 tokens, all held-out texts, all tasks

Interrupted runs go on where they were (same --out, --gpus and --shards). The stages can run on different machines:
--stage prepare and --stage report need the model's tokenizer and the corpus, --stage run vsprefill-eval and
tokenizer.json.
Text comes from training/corpus/fetch_corpus.sh (Debian packages; fetched once into build/corpus unless --documents
names its documents.jsonl); only documents that the indexer's training held out are used. Method list: methods.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import report
import tasks
import texts
import tqdm
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
USER_MARK = "VSPREFILLTEXT"
CALIBRATION_SEED = 1000  # task seeds from here on are for calibration, below for measuring

# Prompt lengths (answer included) per task, longest first: a task is asked at the longest one at which dense attention
# scores at least PROBE_LEAST, and left out where there is none.
PROBE_LEAST = 0.3
PROBE_SEED = 2000
ALL_DENSITIES = [0.05, 0.10, 0.15, 0.20, 0.30]


@dataclass
class Preset:
    text_tokens: int
    densities: list
    texts_per_kind: int
    rows: int               # query rows per text whose attention mass is looked at
    kl_stride: int
    timed: int              # texts that are also timed: the first ones
    tasks: list
    task_lengths: list
    task_samples: int
    task_densities: list
    calibrations: int       # prompts per task that the knobs are set on
    probes: int             # prompts per task and length that dense is tried on
    tolerance: float        # of a reached density, relative
    max_measurements: int   # that a knob's setting may take


PRESETS = {
    "quick": Preset(1280, [0.3], 1, 32, 16, 1, ["single", "question_first", "multikey"], [1024], 2, [0.3], 1, 2,
                    0.04, 3),
    "default": Preset(3072, ALL_DENSITIES, 1, 48, 8, 1,
                      ["single", "question_first", "multikey", "multivalue", "variables"], [2048, 1024], 4, [0.1, 0.2],
                      1, 4, 0.02, 5),
    "full": Preset(8192, ALL_DENSITIES, 12, 256, 4, 10, list(tasks.TASKS), [8192, 4096, 2048], 40, ALL_DENSITIES, 3, 12,
                   0.01, 8),
}


class Decoder:
    """Token ids to text."""

    def __init__(self, model_dir):
        self.tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))

    def __call__(self, ids):
        return self.tokenizer.decode(ids)


class Encoder:
    """The model's tokenizer and chat template."""

    def __init__(self, model_dir):
        self.tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
        self.before, self.after = self._template(model_dir)

    @staticmethod
    def _template(model_dir):
        config = json.loads((Path(model_dir) / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
        if not template:
            return "", "\n"
        import transformers
        rendered = transformers.AutoTokenizer.from_pretrained(model_dir).apply_chat_template(
            [{"role": "user", "content": USER_MARK}], tokenize=False, add_generation_prompt=True)
        return rendered.split(USER_MARK)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, sample):
        """Token ids of a task's sample: the user's message in the chat template, then the start of the answer."""
        return self.encode(self.before + sample.message + self.after + sample.prefix)


def corpus_path(args):
    """documents.jsonl, fetched where it is not there yet."""
    if args.documents:
        return Path(args.documents)
    path = ROOT / "build/corpus/documents.jsonl"
    if not path.exists():
        print("fetching the corpus (Debian packages, once)", file=sys.stderr)
        subprocess.run([str(ROOT / "training/corpus/fetch_corpus.sh"), str(path.parent)], check=True)
    return path


MAX_NEW_TOKENS = 32
DOCUMENT_TOKENS = 8192  # what one document is sure to hold; for longer texts, documents of a source are joined


def write_items(path, items):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(item, separators=(",", ":")) + "\n" for item in items)


def text_items(args, preset, encoder):
    """(items, facts by item id) of the held-out texts, kinds in turn so that a cut-off run has some of each."""
    items, facts, ranks = [], {}, {}
    documents = texts.held_out(corpus_path(args))
    if preset.text_tokens > DOCUMENT_TOKENS:
        documents = texts.joined(documents, encoder.encode, preset.text_tokens)
    for kind, name, ids in texts.windows(documents, encoder.encode, preset.text_tokens, preset.texts_per_kind):
        rank = ranks[kind] = ranks.get(kind, 0) + 1
        items.append({"id": f"text/{name}", "kind": "text", "ids": ids})
        facts[f"text/{name}"] = {"kind": kind, "tokens": len(ids), "rank": rank}
    items.sort(key=lambda item: facts[item["id"]]["rank"])
    for item in items[:preset.timed]:
        item["timed"] = True
    return items, facts


def task_items(preset, encoder):
    """(probes, items, facts by item id) of all tasks at all lengths, seeds in turn."""
    newline = encoder.encode("\n")
    probes, items, facts = [], [], {}

    def add(to, kind, task, tokens, seed, size):
        sample, ids = tasks.make(task, seed, tokens - MAX_NEW_TOKENS, encoder.prompt, size)
        group = f"{task}@{tokens}"
        name = f"{kind}/{group}/{seed}"
        to.append({"id": name, "kind": kind, "ids": ids, "knobs": group, "max_new_tokens": MAX_NEW_TOKENS,
                   "stop_ids": newline if len(newline) == 1 else [], "densities": preset.task_densities})
        facts[name] = {"task": task, "length": tokens, "seed": seed, "tokens": len(ids), "answers": sample.answers,
                       "positions": [round(position, 4) for position in sample.positions]}
    pairs = [(task, tokens) for task in preset.tasks for tokens in preset.task_lengths]
    for task, tokens in tqdm.tqdm(pairs, desc="making prompts", unit="task"):
        size = tasks.largest(task, PROBE_SEED, tokens - MAX_NEW_TOKENS, encoder.prompt)
        for seed in range(preset.probes):
            add(probes, "task", task, tokens, PROBE_SEED + seed, size)
        for seed in range(preset.calibrations):
            add(items, "calibration", task, tokens, CALIBRATION_SEED + seed, size)
        for seed in range(preset.task_samples):
            add(items, "task", task, tokens, seed, size)
    items.sort(key=lambda item: (item["kind"] != "calibration", facts[item["id"]]["seed"]))
    return probes, items, facts


def prepare(args, preset, out):
    """Writes plan.json, the items of each stage and facts.json."""
    encoder = Encoder(args.model)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"model": Path(args.model).name, "preset": args.preset, "text_tokens": preset.text_tokens, "texts": {},
             "samples": {}}
    text, probes, task = [], [], []
    if not args.no_texts:
        text, facts["texts"] = text_items(args, preset, encoder)
    if not args.no_tasks:
        probes, task, facts["samples"] = task_items(preset, encoder)
    methods = json.loads((Path(__file__).parent / "methods.json").read_text(encoding="utf-8"))
    if args.methods is not None:
        methods = [method for method in methods if method["name"] in args.methods]
    plan = {"methods": methods, "densities": preset.densities, "rows": preset.rows, "kl_stride": preset.kl_stride,
            "tolerance": preset.tolerance, "max_measurements": preset.max_measurements}
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    (out / "plan.dense.json").write_text(json.dumps(plan | {"methods": []}) + "\n", encoding="utf-8")
    (out / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    write_items(out / "items.texts.jsonl", text)
    write_items(out / "items.probe.jsonl", probes)
    write_items(out / "items.candidates.jsonl", task)
    print(f"{out}: {len(text)} texts of {preset.text_tokens} tokens, {len(preset.tasks)} tasks", file=sys.stderr)


def choose(out, decode):
    """Each task at the longest length that dense can do: items.tasks.jsonl and chosen.json (all dense scores)."""
    samples = json.loads((out / "facts.json").read_text(encoding="utf-8"))["samples"]
    scores = {}
    for line in (line for path in out.glob("results.probe*.jsonl") for line in report.read_lines(path)):
        if "answer" in line:
            sample = samples[line["item"]]
            group = scores.setdefault((sample["task"], sample["length"]), [])
            group.append(tasks.score(sample["answers"], decode(line["answer"])))
    means = {key: sum(found) / len(found) for key, found in scores.items()}
    chosen = {}
    for (task, tokens), mean in means.items():
        if mean >= PROBE_LEAST and tokens > chosen.get(task, 0):
            chosen[task] = tokens
    groups = {f"{task}@{tokens}" for task, tokens in chosen.items()}
    with open(out / "items.candidates.jsonl", encoding="utf-8") as f:
        lines = [line for line in f if json.loads(line)["knobs"] in groups]
    (out / "items.tasks.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "chosen.json").write_text(json.dumps({
        "least": PROBE_LEAST, "chosen": chosen,
        "dense": {f"{task}@{tokens}": round(mean, 3) for (task, tokens), mean in means.items()}}, indent=1) + "\n",
        encoding="utf-8")
    print("tasks: " + (", ".join(sorted(groups)) or "none that dense can do"), file=sys.stderr)


def scaled_model(model_dir, factor, out):
    """A directory that is the model with YaRN positions for `factor` times its trained length; weights are links."""
    source, made = Path(model_dir).resolve(), out / "model"
    made.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    trained = config["max_position_embeddings"]
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    if "rope_parameters" in config:
        config["rope_parameters"] |= scaling
    else:
        config["rope_scaling"] = scaling
    config["max_position_embeddings"] = int(trained * factor)
    (made / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.name != "config.json" and not (made / path.name).exists():
            (made / path.name).symlink_to(path)
    return made


def expected_lines(plan, items):
    """How many results a stage gives where this binary has all methods."""
    served = sum(not method.get("true_sums", False) for method in plan["methods"])
    total = 1
    for item in items:
        methods = len(plan["methods"]) if item["kind"] == "text" else served
        total += methods * len(item.get("densities") or plan["densities"]) + (item["kind"] != "calibration")
    return total


def count_lines(paths):
    total = 0
    for path in paths:
        if path.exists():
            with open(path, "rb") as f:
                total += sum(chunk.count(b"\n") for chunk in iter(lambda: f.read(1 << 20), b""))
    return total


def environment(gpu):
    """This process's, for a child that sees the gpu-th of the GPUs seen here."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": (visible_gpus() or [str(g) for g in range(gpu + 1)])[gpu]}


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES names; empty: it does not restrict."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def run_stage(args, out, name, plan_name, shards):
    """vsprefill-eval on items.NAME.jsonl, in `shards` processes, with a progress bar over the lines they write."""
    with open(out / f"items.{name}.jsonl", encoding="utf-8") as f:
        items = [json.loads(line) for line in f]
    if not items:
        return
    plan = json.loads((out / plan_name).read_text(encoding="utf-8"))
    results = [out / (f"results.{name}.jsonl" if shards == 1 else f"results.{name}.{k}.jsonl") for k in range(shards)]
    log = out / "run.log"
    # Each process would take all cores for what runs on the CPU; OpenMP threads that outnumber them mostly wait.
    threads = max(1, len(os.sched_getaffinity(0)) // shards)
    with open(log, "a", encoding="utf-8") as f:
        processes = [subprocess.Popen(
            [str(args.program), "--model", str(args.model), "--device", args.device, "--plan", str(out / plan_name),
             "--items", str(out / f"items.{name}.jsonl"), "--results", str(path), "--shard", f"{k}/{shards}",
             "--threads", str(threads), "--max_seconds", str(args.max_seconds),
             *(["--indexer", args.indexer] if args.indexer else [])],
            stdout=f, stderr=f, env=environment(k % args.gpus) if args.device == "cuda" else None)
            for k, path in enumerate(results)]
    total = expected_lines(plan, items) + shards - 1
    try:
        with tqdm.tqdm(total=total, initial=count_lines(results), desc=name, unit="result", smoothing=0.1) as bar:
            while any(process.poll() is None for process in processes):
                time.sleep(0.2)
                bar.update(count_lines(results) - bar.n)
            bar.update(count_lines(results) - bar.n)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if any(process.returncode for process in processes):
        tail = " | ".join(log.read_text(encoding="utf-8").splitlines()[-3:])
        sys.exit(f"error: vsprefill-eval: {tail} (run again to go on)")


def run(args, out, decode):
    if not Path(args.program).exists():
        sys.exit(f"error: {args.program} is not there; build it: deploy/local/build.sh vsprefill-eval")
    run_stage(args, out, "texts", "plan.json", args.gpus)  # one process each: some are timed
    run_stage(args, out, "probe", "plan.dense.json", args.shards)
    if not (out / "chosen.json").exists() and list(out.glob("results.probe*.jsonl")):
        choose(out, decode)
    if (out / "items.tasks.jsonl").exists():
        run_stage(args, out, "tasks", "plan.json", args.shards)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="preset", action="store_const", const="quick")
    size.add_argument("--full", dest="preset", action="store_const", const="full")
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--indexer", help="indexer file; default: the model directory's")
    parser.add_argument("--yarn", type=float, help="YaRN factor, for texts longer than the model was trained on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--documents", help="documents.jsonl of training/corpus/fetch_corpus.sh")
    parser.add_argument("--out", type=Path, help="default: build/fidelity/PRESET")
    parser.add_argument("--stage", choices=("all", "prepare", "run", "report"), default="all")
    parser.add_argument("--methods", nargs="*", help="names in methods.json; none: dense only")
    parser.add_argument("--tasks", nargs="*", choices=list(tasks.TASKS), help="instead of the preset's")
    parser.add_argument("--task_lengths", nargs="*", type=int, help="in tokens, instead of the preset's")
    parser.add_argument("--tokens", type=int, help="length of the texts instead of the preset's")
    parser.add_argument("--texts_per_kind", type=int)
    parser.add_argument("--samples", type=int, help="prompts per task")
    parser.add_argument("--no_texts", action="store_true")
    parser.add_argument("--no_tasks", action="store_true")
    parser.add_argument("--program", default=str(ROOT / "build/bin/vsprefill-eval"))
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the work (--device cuda)")
    parser.add_argument("--shards", type=int, help="processes for the tasks (default: --gpus; on a GPU more pay)")
    parser.add_argument("--max_seconds", type=float, default=0, help="each stage begins no text or prompt after these")
    args = parser.parse_args()
    args.preset = args.preset or "default"
    args.shards = args.shards or args.gpus
    if args.device == "cpu" and args.gpus != 1:
        parser.error("--gpus is for --device cuda")
    if visible_gpus() and args.gpus > len(visible_gpus()):
        parser.error(f"--gpus {args.gpus}: CUDA_VISIBLE_DEVICES names {len(visible_gpus())}")
    preset = PRESETS[args.preset]
    preset.tasks = args.tasks if args.tasks is not None else preset.tasks
    preset.task_lengths = args.task_lengths or preset.task_lengths
    preset.text_tokens = args.tokens or preset.text_tokens
    preset.texts_per_kind = args.texts_per_kind or preset.texts_per_kind
    preset.task_samples = args.samples or preset.task_samples
    out = args.out or ROOT / "build/fidelity" / args.preset
    begin = time.monotonic()
    if args.stage == "prepare" or (args.stage == "all" and not (out / "items.texts.jsonl").exists()):
        prepare(args, preset, out)
    decode = Decoder(args.model)
    if args.yarn:
        args.model = scaled_model(args.model, args.yarn, out)
    if args.stage in ("all", "run"):
        run(args, out, decode)
    if args.stage in ("all", "report"):
        report.write(out, decode)
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

#!/usr/bin/env python3
"""Distils a VSIndexer for a Hugging Face model directory: checks it, makes the corpus for its tokenizer, says how much
time and memory the rest will take, trains, fits the scale of the thresholds, evaluates, and writes a report.

  training/corpus/fetch_corpus.sh WORK                      # once: the text (any documents.jsonl of that form will do)
  training/distil_model.py --model DIR --documents WORK/documents.jsonl --out OUT
  training/distil_model.py ... --estimate_only              # stops after the estimate

OUT gets indexer.safetensors, report.md with plots, report.json (evaluation), estimate.json, train.log and the corpus.
Run again after an interruption it goes on from the last checkpoint. docs/distil_your_model.md explains the result.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """One line for the user."""


@dataclass
class Outcome:
    seconds: float
    peak_bytes: int  # of host memory


def run(command, log, may_fail=False):
    """Runs a command, its output appended to `log`. Raises Failed with the last line unless it may fail."""
    with open(log, "a", encoding="utf-8") as file:
        file.write("$ " + " ".join(map(str, command)) + "\n")
        file.flush()
        start = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 and not may_fail:
        lines = Path(log).read_text(encoding="utf-8").strip().splitlines()
        raise Failed(f"{lines[-1]} (exit code {process.returncode}; all of it: {log})")
    return Outcome(time.monotonic() - start, usage.ru_maxrss * 1024)


def check_model(model):
    """What can be said before anything runs; the family is judged by vsprefill-distill itself."""
    for name in ("config.json", "tokenizer.json"):
        if not (model / name).is_file():
            raise Failed(f"{model} has no {name}: --model takes a Hugging Face model directory")
    if not any(model.glob("*.safetensors")):
        raise Failed(f"{model} has no *.safetensors: weights in other formats are not read")
    config = json.loads((model / "config.json").read_text())
    return {key: config.get(key) for key in ("model_type", "num_hidden_layers", "num_attention_heads",
                                             "num_key_value_heads", "hidden_size", "max_position_embeddings")}


def make_corpus(args, log):
    """Token files of the model's tokenizer; kept where text, tokenizer and settings are those of the last run."""
    out = args.out / "corpus"
    stat = args.documents.stat()
    longest = max(args.lengths + [args.scale_length] + args.evaluate_lengths)
    stamp = json.dumps({"tokenizer": hashlib.sha256((args.model / "tokenizer.json").read_bytes()).hexdigest(),
                        "documents": [str(args.documents), stat.st_size, stat.st_mtime_ns], "longest": longest})
    done = out / "made_from.json"
    if not (done.exists() and done.read_text() == stamp):
        print("corpus: tokenizing (once per tokenizer)", flush=True)
        run([sys.executable, ROOT / "training/corpus/make_corpus.py", "--documents", args.documents, "--model",
             args.model, "--out-dir", out, "--max-tokens", max(1500, longest)], log)
        done.write_text(stamp)
    return out / "corpus_train.safetensors", out / "corpus_heldout.safetensors"


class Distill:
    """The program with what all its runs have in common."""

    def __init__(self, args, train, heldout):
        self.args, self.train, self.heldout = args, train, heldout

    def __call__(self, log, *flags, may_fail=False):
        args = self.args
        return run([args.program, "--model", args.model, "--device", args.device, "--dtype", args.dtype, "--threads",
                    args.threads, "--hidden", args.hidden, *flags], log, may_fail)

    def training(self, out, steps, texts_per_step, lengths):
        return ["--corpus", self.train, "--out", out, "--steps", steps, "--texts_per_step", texts_per_step,
                "--lengths", joined(lengths)]

    def evaluation(self, indexer, texts, lengths):
        return ["--evaluate", "--heldout", self.heldout, "--evaluate_texts", texts, "--evaluate_lengths",
                joined(lengths), "--densities", joined(self.args.densities),
                "--evaluate_tiles", self.args.evaluate_tiles, *(["--indexer", indexer] if indexer else [])]


def joined(values):
    return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


LEAST_DIFFERENCE = 3.0  # seconds between a trial of one step and one of more steps
MOST_TRIAL_STEPS = 48


def estimate(distill, log):
    """Times of a few texts at the shortest and the longest length, carried over to the whole run."""
    args, trial = distill.args, distill.args.out / "trial.safetensors"
    lengths = sorted({min(args.lengths), max(args.lengths)})
    # Ends once the model is loaded: there is no such indexer.
    load = distill(log, *distill.evaluation(args.out / "none.safetensors", 1, lengths), may_fail=True).seconds
    per_text, peak, fixed = {}, 0, 0.0

    def train(steps, length):
        nonlocal peak
        outcome = distill(log, *distill.training(trial, steps, 1, [length]), "--scale_texts", 0)
        peak = max(peak, outcome.peak_bytes)
        return outcome.seconds

    for length in lengths:
        one, steps = train(1, length), 3
        more = train(steps, length)
        # On a GPU two texts take less than loading varies by.
        while more - one < LEAST_DIFFERENCE and steps < MOST_TRIAL_STEPS:
            steps *= 4
            more = train(steps, length)
        per_text[length] = max(1e-3, (more - one) / (steps - 1))
        fixed = one - per_text[length]  # loading, and the features of four texts
    short, long = lengths[0], lengths[-1]
    # Time of a text = a n + b n^2: linear layers and attention.
    b = 0.0
    if long > short:
        b = max(0.0, (per_text[long] / long - per_text[short] / short) / (long - short))
    a = max(0.0, per_text[long] / long - b * long)
    mean = sum(a * n + b * n * n for n in args.lengths) / len(args.lengths)

    def each(outcome):
        nonlocal peak
        peak = max(peak, outcome.peak_bytes)
        return max(0.0, outcome.seconds - load)

    scale = each(distill(log, "--scale_only", "--indexer", trial, "--corpus", distill.train, "--scale_texts", 1,
                         "--scale_length", args.scale_length, "--out", trial))
    evaluation = sum(each(distill(log, *distill.evaluation(trial, 1, [n]))) for n in args.evaluate_lengths)
    size = trial.stat().st_size
    trial.unlink()
    seconds = {"training": fixed + args.steps * args.texts_per_step * mean, "scale": args.scale_texts * scale,
               "evaluation": args.evaluate_texts * evaluation}
    return {"seconds": seconds, "total_seconds": sum(seconds.values()), "seconds_per_text": per_text,
            "peak_host_bytes": peak, "indexer_bytes": size}


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_estimate(found, args):
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found["seconds"].items())
    print(f"estimate: {duration(found['total_seconds'])} in all ({parts})\n"
          f"          host memory at most {found['peak_host_bytes'] / 2**30:.1f} GiB, "
          f"indexer file {found['indexer_bytes'] / 1e6:.1f} MB\n"
          f"          from texts of {' and '.join(map(str, found['seconds_per_text']))} tokens, timed on this machine "
          f"as busy as it is now; {args.steps} steps of {args.texts_per_step} texts", flush=True)
    if args.device != "cpu":
        print("          memory of a GPU is not measured: --slab_mib of vsprefill-distill bounds most of it")


def losses(log):
    """(step, vertical, slash) of the progress lines of the last training in the log."""
    points = []
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        if line.startswith("$ "):
            points = []
        words = line.split()
        if "KL" in words and "slash" in words and line.startswith("["):
            points.append((int(words[1].split("/")[0]), float(words[words.index("vertical") + 1]),
                           float(words[words.index("slash") + 1])))
    return points


SHOWN = {"vsprefill": "VSPrefill, as served", "oracle (true sums)": "the same rule on the true sums",
         "last 64 queries": "last 64 queries", "mean-pooled blocks of 64": "mean-pooled blocks of 64",
         "sinks + window": "sinks + window"}


def plot(report, points, out):
    """Three PNG files; their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = []

    def save(figure, name):
        figure.tight_layout()
        figure.savefig(out / name, dpi=110)
        plt.close(figure)
        names.append(name)

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for column, label in ((1, "columns (vertical)"), (2, "diagonals (slash)")):
        axes.plot([p[0] for p in points], [p[column] for p in points], label=label)
    axes.set(xlabel="step", ylabel="KL, nats", yscale="log", title="Training loss (smoothed)")
    axes.legend()
    save(figure, "loss.png")

    for part in report["reports"]:
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for method, label in SHOWN.items():
            rows = [r for r in part["results"] if r["method"] == method]
            for panel, key in zip(panels, ("mean", "lowest_tenth"), strict=True):
                panel.plot([r["density"] for r in rows], [r[key] for r in rows], marker="o", markersize=3, label=label)
        panels[0].set(xlabel="density", ylabel="attention mass read", title="mean over heads")
        panels[1].set(xlabel="density", title="lowest tenth of the heads")
        panels[0].legend(fontsize=8)
        figure.suptitle(f"{part['texts']} held-out texts of {part['length']} tokens")
        save(figure, f"recall_{part['length']}.png")

        rows = [r for r in part["results"] if r["method"] == "vsprefill"]
        layers = len(rows[0]["by_layer"])
        figure, axes = plt.subplots(figsize=(6.4, 4))
        for layer in range(layers):
            axes.plot([r["density"] for r in rows], [r["by_layer"][layer] for r in rows],
                      color=plt.cm.viridis(layer / max(1, layers - 1)), label=f"layer {layer}")
        axes.set(xlabel="density of the model", ylabel="attention mass read",
                 title=f"VSPrefill, each layer, {part['length']} tokens")
        if layers <= 12:
            axes.legend(fontsize=8)
        else:
            scale = plt.cm.ScalarMappable(plt.Normalize(0, layers - 1), "viridis")
            figure.colorbar(scale, ax=axes, label="layer")
        save(figure, f"recall_layers_{part['length']}.png")
    return names


def table(part):
    """Markdown of the densities that VSPrefill can reach: its forced parts may be more than the lowest ones."""
    reached = [r["wanted_density"] for r in part["results"]
               if r["method"] == "vsprefill" and r["density"] <= 1.05 * r["wanted_density"]]
    lines = ["| selection | " + " | ".join(f"{d:g}" for d in reached) + " |", "|---|" + "---|" * len(reached)]
    for method, label in SHOWN.items():
        rows = [r for r in part["results"] if r["method"] == method and r["wanted_density"] in reached]
        lines.append(f"| {label} | " + " | ".join(f"{r['mean']:.3f} / {r['lowest_tenth']:.3f} / {r['minimum']:.3f}"
                                                  for r in rows) + " |")
    return "\n".join(lines)


def write_report(args, facts, report, found, outcome, points):
    names = plot(report, points, args.out)
    lines = [f"# VSIndexer of {args.model.resolve().name}", "",
             ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None) + ".", "",
             f"Trained: {', '.join(f'{k} {v}' for k, v in sorted(report['facts'].items()))}; "
             f"hidden width {report['hidden']}; weights_id {report['weights_id']}.", "",
             "| | estimated | measured |", "|---|---|---|",
             f"| time, training to evaluation | {duration(found['total_seconds'])} | {duration(outcome.seconds)} |",
             f"| peak host memory, GiB | {found['peak_host_bytes'] / 2**30:.1f} | {outcome.peak_bytes / 2**30:.1f} |",
             "", "![loss](loss.png)", ""]
    for part in report["reports"]:
        lines += [f"## {part['length']} tokens: {part['texts']} held-out texts, {part['tiles']} row tiles of each", "",
                  "Share of the true attention mass in the keys read, mean / lowest tenth / worst of the heads, at "
                  "equal density:", "", table(part), ""]
        served = [r for r in part["results"] if r["method"] == "the served default, whole prompt"]
        lines += [f"The server's default parameters read {r['density']:.3f} of the pairs and {r['mean']:.3f} of the "
                  f"mass (lowest tenth {r['lowest_tenth']:.3f})." for r in served]
        least = min(r["density"] for r in part["results"] if r["method"] == "vsprefill")
        lines += ["", f"VSPrefill reads {least:.3f} at least: first tokens and local band are always read."]
        lines += ["", f"![recall](recall_{part['length']}.png)", "",
                  f"![recall by layer](recall_layers_{part['length']}.png)", ""]
    lines += ["## Use", "", "```",
              f"vsprefill-server --model {args.model} --indexer {args.out / 'indexer.safetensors'}", "```", ""]
    (args.out / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"report: {args.out / 'report.md'} ({', '.join(names)})")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind):
        return lambda text: [kind(x) for x in text.split(",")]

    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--documents", type=Path, required=True, help="documents.jsonl of corpus/fetch_corpus.sh")
    parser.add_argument("--out", type=Path, required=True, help="folder for indexer and report")
    parser.add_argument("--estimate_only", action="store_true", help="stop after the estimate")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the backbone")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--hidden", type=int, default=512, help="hidden width of the indexer")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--texts_per_step", type=int, default=4)
    parser.add_argument("--lengths", type=numbers(int), default=[8192],
                        help="of the training texts; the longest that you serve, alone, teaches best")
    parser.add_argument("--scale_texts", type=int, default=12, help="texts that the thresholds' scale is fitted on")
    parser.add_argument("--scale_length", type=int, help="default: the longest of --lengths")
    parser.add_argument("--evaluate_texts", type=int, default=6)
    parser.add_argument("--evaluate_lengths", type=numbers(int), help="default: the longest of --lengths")
    parser.add_argument("--evaluate_tiles", type=int, default=0, help="row tiles of a text; 0: all on CUDA, 12 on CPUs")
    parser.add_argument("--densities", type=numbers(float), default=[0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
    parser.add_argument("--program", type=Path, default=ROOT / "build/bin/vsprefill-distill")
    args = parser.parse_args()
    args.scale_length = args.scale_length or max(args.lengths)
    args.evaluate_lengths = args.evaluate_lengths or [max(args.lengths)]
    return args


def main():
    args = parse()
    facts = check_model(args.model)
    limit = facts["max_position_embeddings"]
    longest = max(args.lengths + [args.scale_length] + args.evaluate_lengths)
    if limit is not None and longest > limit:
        raise Failed(f"a text of {longest} tokens was asked for, the model takes {limit}: give shorter --lengths")
    if not args.program.exists():
        raise Failed(f"{args.program} is missing: deploy/local/build.sh vsprefill-distill")
    if not args.documents.is_file():
        raise Failed(f"{args.documents} is missing: training/corpus/fetch_corpus.sh {args.documents.parent}")
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "train.log"
    distill = Distill(args, *make_corpus(args, log))
    found = estimate(distill, log)
    (args.out / "estimate.json").write_text(json.dumps(found, indent=1) + "\n")
    print_estimate(found, args)
    if args.estimate_only:
        return
    indexer = args.out / "indexer.safetensors"
    outcome = distill(log, *distill.training(indexer, args.steps, args.texts_per_step, args.lengths),
                      "--checkpoint", args.out / "distill.ckpt", "--resume", "--scale_texts", args.scale_texts,
                      "--scale_length", args.scale_length,
                      *distill.evaluation(None, args.evaluate_texts, args.evaluate_lengths),
                      "--report", args.out / "report.json")
    write_report(args, facts, json.loads((args.out / "report.json").read_text()), found, outcome, losses(log))


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"distil_model: {error}")

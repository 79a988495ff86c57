#!/usr/bin/env python3
"""What the presets of vsprefill cost on held-out text: the figures of server/attention/preset_table.h.

  preset_losses.py [--device cuda] [--json FILE]

The whole model, sparse in every layer, at each preset's threshold and the server's other defaults; perplexity of
what follows the first quarter of each text, against dense. Texts as in fidelity.py --full. Goes on where it was
interrupted.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

import fidelity
import report

TABLE = fidelity.ROOT / "server/attention/preset_table.h"
THRESHOLDS = {name: float(threshold)
              for name, threshold in re.findall(r'\{"(\w+)", ([0-9.]+),', TABLE.read_text(encoding="utf-8"))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(fidelity.ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--indexer", help="indexer file; default: the model directory's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--documents", help="documents.jsonl of training/corpus/fetch_corpus.sh")
    parser.add_argument("--out", type=Path, default=fidelity.ROOT / "build/fidelity/presets")
    parser.add_argument("--program", default=str(fidelity.ROOT / "build/bin/vsprefill-eval"))
    parser.add_argument("--max_seconds", type=float, default=0, help="begins no text after these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "items.texts.jsonl").exists():
        items, _ = fidelity.text_items(args, fidelity.PRESETS["full"], fidelity.Encoder(args.model))
        fidelity.write_items(out / "items.texts.jsonl", [item | {"mass": False, "timed": False} for item in items])
    # A knob has two ends: these are one value to any use.
    methods = [{"name": name, "method": "vsprefill", "settings": [
        {"parameters": {"dense_fallback": 0},
         "knob": {"sets": {"threshold": 1}, "sparse": threshold * (1 + 1e-9), "dense": threshold}}]}
        for name, threshold in THRESHOLDS.items()]
    (out / "plan.json").write_text(json.dumps({"methods": methods, "densities": [0.1], "max_measurements": 1}) + "\n")
    fidelity.run_stage(args, out, "texts", "plan.json", args.gpus)
    lines = [line for path in out.glob("results.texts*.jsonl") for line in report.read_lines(path)]
    dense = {line["item"]: line["logits"]["nll"] for line in lines if line["method"] == "dense"}
    rows = []
    for name, threshold in THRESHOLDS.items():
        found = {line["item"]: line["logits"] for line in lines if line["method"] == name}
        losses = {item: 100 * math.expm1(score["nll"] - dense[item]) for item, score in found.items()}
        if not losses:
            sys.exit("error: no text was measured yet")
        worst = max(losses, key=losses.get)
        rows.append({"preset": name, "threshold": threshold, "texts": len(losses),
                     "density": statistics.mean(score["density"] for score in found.values()),
                     "loss_mean": statistics.mean(losses.values()), "loss_median": statistics.median(losses.values()),
                     "loss_worst": losses[worst], "worst": worst, "losses": losses})
        print(f"{name:9} threshold {threshold}: density {rows[-1]['density']:.3f}, perplexity "
              f"{rows[-1]['loss_mean']:+.1f} % (median {rows[-1]['loss_median']:+.1f} %, worst "
              f"{losses[worst]:+.1f} %: {worst}), {len(losses)} texts")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

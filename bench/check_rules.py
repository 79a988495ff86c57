#!/usr/bin/env python3
"""Checks what a server on a GPU did with some prompts (bench/gpu_service.sh, part rules): dense attention below the
crossover of server/attention/crossover.h, VSPrefill above it, and a recall probe of each sparse request.

  check_rules.py MODEL METRICS_ADDRESS REPLY...      model directory; replies of `vsprefill prefill --json`
"""

import argparse
import json
import re
import sys
import urllib.request
from pathlib import Path

CROSSOVER = Path(__file__).resolve().parents[1] / "server/attention/crossover.h"
SAMPLE = re.compile(r"vsprefill_attention_mass_recall_ratio_(sum|count)\{.*\} (\S+)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("metrics")
    parser.add_argument("replies", nargs="+")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    width = heads * config.get("head_dim", config["hidden_size"] // heads)
    work = float(re.search(r"kCudaMinDenseWork = ([0-9.e]+);", CROSSOVER.read_text(encoding="utf-8"))[1])
    failures = []
    for path in args.replies:
        with open(path, encoding="utf-8") as f:
            reply = json.load(f)
        tokens = reply["prompt_tokens"]
        dense = reply["dense_fallback_layers"]
        print(f"{tokens} tokens: {dense} of {layers} layers fell back, density {reply['density']:.3f}, first token "
              f"after {1e3 * reply['ttft_seconds']:.1f} ms")
        if width * tokens**2 < work:
            if dense != layers or reply["density"] != 1:
                failures.append(f"{path}: not all of its layers were computed densely")
        elif dense or not 0.05 < reply["density"] < 0.5:
            failures.append(f"{path}: not computed sparsely")
    with urllib.request.urlopen(f"http://{args.metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    sums = {"sum": 0.0, "count": 0.0}
    for kind, value in SAMPLE.findall(text):
        sums[kind] += float(value)
    if sums["count"] == 0:
        failures.append("no recall was observed")
    else:
        recall = sums["sum"] / sums["count"]
        print(f"recall probe: {sums['count']:.0f} observations (one per query head), mean {recall:.3f}")
        if not 0.5 < recall <= 1:
            failures.append(f"a mean recall of {recall:.3f}")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

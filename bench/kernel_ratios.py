#!/usr/bin/env python3
"""The whole VSPrefill operator against cuDNN's dense attention, from one run of both programs.

Reads the JSON of kernel_bench ("whole op" figures) and of torch_reference.py (cuDNN), taken in the
same call on the same machine; prints a table, and writes the rows with --json.
"""

import argparse
import json
import re
import sys

NAME = re.compile(r"whole op ([0-9.]+) (\S+) n=(\d+)")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel_bench", help="JSON of kernel_bench")
    parser.add_argument("torch_reference", help="JSON of torch_reference.py")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    with open(args.kernel_bench) as file:
        figures = json.load(file)
    with open(args.torch_reference) as file:
        dense = {f["name"]: f["ms"] for f in json.load(file)}
    rows = []
    for figure in figures:
        match = NAME.fullmatch(figure["name"])
        if match is None:
            continue
        target, model, tokens = match.groups()
        cudnn_ms = dense.get(f"torch cudnn dense {model} n={tokens}")
        if cudnn_ms is None:
            print(f"no cuDNN figure for {model} n={tokens}", file=sys.stderr)
            continue
        rows.append(
            {
                "gpu": figure["gpu"],
                "model": model,
                "tokens": int(tokens),
                "wanted_density": float(target),
                "density": figure["density"],
                "hidden": figure["hidden"],
                "index_ms": figure["index_ms"],
                "attention_ms": figure["attention_ms"],
                "whole_ms": figure["ms"],
                "cudnn_dense_ms": cudnn_ms,
                "speedup": cudnn_ms / figure["ms"],
                "index_share": figure["index_share"],
            }
        )
    rows.sort(key=lambda r: (r["model"], r["tokens"], r["wanted_density"]))
    print(
        f"{'model':14s} {'tokens':>7s} {'density':>7s} {'index':>9s} {'attention':>9s} {'whole':>9s}"
        f" {'cuDNN':>9s} {'faster':>7s} {'index share':>11s}"
    )
    for r in rows:
        print(
            f"{r['model']:14s} {r['tokens']:7d} {r['density']:7.3f} {r['index_ms']:9.4f}"
            f" {r['attention_ms']:9.4f} {r['whole_ms']:9.4f} {r['cudnn_dense_ms']:9.4f}"
            f" {r['speedup']:6.2f}x {r['index_share']:10.1%}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

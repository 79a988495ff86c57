#!/usr/bin/env python3
"""VSPrefill's attention against cuDNN's dense attention, from one run of both programs.

Reads the JSON of kernel_bench and of torch_reference.py (cuDNN), taken in the same call on the same
machine. Prints, as far as the figures are there: the whole operator ("whole op"), written with --json;
how its time grows with the length at a fixed budget of columns per row; and sparse attention alone,
TFLOP/s per visited pair divided by cuDNN's at the same length.
"""

import argparse
import json
import math
import re
import sys

NAME = re.compile(r"whole op ([0-9.]+) (\S+) n=(\d+)")
SPARSE = re.compile(r"attention (bands|1024 verticals|sparse|blocks|blocks per head) ([0-9.]+) (\S+) n=(\d+)")


def print_growth(rows):
    """Exponent between the shortest and the longest text with (nearly) the same density * tokens."""
    budgets = {}
    for r in rows:
        if abs(r["density"] / r["wanted_density"] - 1) < 0.02:
            budgets.setdefault((r["model"], round(r["wanted_density"] * r["tokens"])), []).append(r)
    for (model, budget), group in sorted(budgets.items()):
        first, last = group[0], group[-1]
        if last["tokens"] >= 4 * first["tokens"]:
            exponent = math.log(last["whole_ms"] / first["whole_ms"]) / math.log(last["tokens"] / first["tokens"])
            print(f"{model}, {budget} tokens * density: {first['tokens']} to {last['tokens']} tokens, time grows with "
                  f"exponent {exponent:.2f}")


def print_per_pair(figures, dense):
    """A line per kind, shape and length: ratios at rising density."""
    lines = {}
    for figure in figures:
        match = SPARSE.fullmatch(figure["name"])
        reference = match and dense.get(f"torch cudnn dense {match[3]} n={match[4]}")
        if reference:
            key = (match[3], int(match[4]), match[1])
            ratio = figure["visited_tflops"] / reference["useful_tflops"]
            lines.setdefault(key, []).append(f"{float(match[2]):.0%} {ratio:.2f}")
    for (model, tokens, kind), ratios in sorted(lines.items()):
        print(f"{model:14s} {tokens:7d} {kind:16s} per visited pair / cuDNN: {', '.join(ratios)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel_bench", help="JSON of kernel_bench")
    parser.add_argument("torch_reference", help="JSON of torch_reference.py")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    with open(args.kernel_bench) as file:
        figures = json.load(file)
    with open(args.torch_reference) as file:
        dense = {f["name"]: f for f in json.load(file)}
    rows = []
    for figure in figures:
        match = NAME.fullmatch(figure["name"])
        if match is None:
            continue
        target, model, tokens = match.groups()
        reference = dense.get(f"torch cudnn dense {model} n={tokens}")
        if reference is None:
            print(f"no cuDNN figure for {model} n={tokens}", file=sys.stderr)
            continue
        cudnn_ms = reference["ms"]
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
    if rows:
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
    print_growth(rows)
    print_per_pair(figures, dense)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

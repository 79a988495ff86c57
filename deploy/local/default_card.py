#!/usr/bin/env python3
"""What the shipped default of VSPrefill was measured to do: default_card.json, and the lines that programs print of it.

Density, time, needle score and perplexity change belong together: a density says nothing without what it costs.
The card is measured, never written by hand:

  bench/cpu_speed.py --json /tmp/speed.json
  bench/eval/needle_test.py --json /tmp/needles.json
  deploy/local/default_card.py write --speed /tmp/speed.json --needles /tmp/needles.json
"""

import argparse
import json
from pathlib import Path

CARD = Path(__file__).resolve().with_name("default_card.json")


def load():
    return json.loads(CARD.read_text())


def lines(tokens=None):
    """Lines for people: the lengths of the card, or the one nearest to `tokens`, and the needle score."""
    card = load()
    rows = card["lengths"]
    if tokens is not None:
        rows = [min(rows, key=lambda row: abs(row["tokens"] - tokens))]
    text = [f"{row['tokens']:,} tokens: density {row['density']:.3f}, {row['ttft_seconds']:.2f} s to the first token "
            f"(dense {row['dense_ttft_seconds']:.2f} s), perplexity {100 * row['perplexity_change']:+.1f} %"
            for row in rows]
    needles = card["needles"]
    return [*text,
            f"needle prompts of {needles['shortest']:,} to {needles['longest']:,} tokens: {needles['right']} right of "
            f"the {needles['dense_right']} that dense answers right",
            f"({card['processor']}, {card['date']}, commit {card['commit']})"]


def write(args):
    speed, needles = json.loads(args.speed.read_text()), json.loads(args.needles.read_text())
    lengths = []
    for row in speed["rows"]:
        dense, sparse = row["bench"]["runs"]
        lengths.append({
            "tokens": row["tokens"], "density": round(sparse["density"], 4),
            "cost_ratio": round(sparse["cost_ratio"], 4),
            "ttft_seconds": round(sparse["ttft_seconds"], 3), "dense_ttft_seconds": round(dense["ttft_seconds"], 3),
            "transformers_seconds": round(row["transformers"], 3),
            "perplexity_change": round(sparse["perplexity"] / dense["perplexity"] - 1, 4)})
    counts = {key: needles[key] for key in ("right", "dense_right", "prompts", "shortest", "longest")}
    card = {"parameters": needles["parameters"], "lengths": lengths, "needles": counts,
            "processor": speed["processor"], "date": speed["date"], "commit": speed["commit"]}
    CARD.write_text(json.dumps(card, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["show", "write"])
    parser.add_argument("--speed", type=Path, help="JSON of bench/cpu_speed.py")
    parser.add_argument("--needles", type=Path, help="JSON of bench/eval/needle_test.py")
    args = parser.parse_args()
    if args.command == "write":
        if not args.speed or not args.needles:
            parser.error("write needs --speed and --needles")
        write(args)
    print("\n".join(lines()))


if __name__ == "__main__":
    main()

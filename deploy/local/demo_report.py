#!/usr/bin/env python3
"""Last part of demo.sh: waits for the decode worker's answers, checks them and prints the report.

Each --run is the JSON of `vsprefill prefill --push`. An answer counts only if the worker reported tokens for
that very request, the worker verified every byte of the cache, and its first token is the server's.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from pathlib import Path

import default_card
from prompt import load_tokenizer

WAIT_SECONDS = 600


def answer(args, request_id):
    """The worker's JSON line of a request."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        for line in Path(args.decode_output).read_text().splitlines():
            if line.startswith("{"):
                value = json.loads(line)
                if value["request_id"] == request_id:
                    return value
        try:
            os.kill(args.decode_pid, 0)
        except ProcessLookupError:
            sys.exit("demo: the decode worker ended before it answered")
        time.sleep(0.1)
    sys.exit(f"demo: no answer of the decode worker within {WAIT_SECONDS} s")


def check(run, tokens, receiver):
    """Ends the demo unless the tokens came from the streamed cache."""
    expected = (run["prompt_tokens"] - run["start_token"]) * run["layout"]["bytes_per_token"]
    targets = {t["target"]: t for t in run.get("targets", [])}
    target = targets.get(receiver)
    if target is None or target["code"] != 0:
        sys.exit(f"demo: the cache did not reach the decode worker: {target}")
    if target["bytes"] != expected:
        sys.exit(f"demo: the worker verified {target['bytes']} bytes of KV, the prompt has {expected}")
    if not tokens or tokens[0] != run["first_token"]:
        sys.exit(f"demo: the worker's tokens {tokens[:1]} do not begin with the server's {run['first_token']}")


def seconds(value):
    return f"{value:.3f} s"


def print_run(run, text):
    quarters = "  ".join(f"{d:.3f}" for d in run["layer_group_density"])
    parameters = " ".join(f"{k}={v:g}" for k, v in sorted(run.get("parameters", {}).items()))
    print(f"\n--- answer ({run['method']}) ---\n{text}\n---")
    for name, value in [
            ("method", f"{run['method']} {parameters}".strip()),
            ("prompt", f"{run['prompt_tokens']} tokens"),
            ("time to first token", seconds(run["ttft_seconds"])),
            ("  queue", seconds(run["queue_seconds"])),
            ("  compute", seconds(run["compute_seconds"])),
            ("exposed transfer", seconds(run["exposed_transfer_seconds"])),
            ("density", f"{run['density']:.3f} (cost ratio {run['cost_ratio']:.3f})"),
            ("  by layer quarter", quarters),
            ("KV streamed", f"{run['bytes']} bytes, verified by the decode worker")]:
        print(f"{name:22}{value}")
    if run.get("parameters") == default_card.load()["parameters"]:
        for i, line in enumerate(default_card.lines(run["prompt_tokens"])):
            print(f"{'' if i else 'default, measured':22}{line}")


def print_table(runs):
    print(f"\n{'method':12}{'TTFT s':>9}{'compute s':>11}{'exposed s':>11}{'density':>9}{'cost':>7}")
    for run in runs:
        print(f"{run['method']:12}{run['ttft_seconds']:9.3f}{run['compute_seconds']:11.3f}"
              f"{run['exposed_transfer_seconds']:11.3f}{run['density']:9.3f}{run['cost_ratio']:7.3f}")


def print_metrics(url, everything):
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("vsprefill_")]
    if not lines:
        sys.exit(f"demo: {url} has no vsprefill metrics")
    shown = [line for line in lines if everything or "_bucket{" not in line]
    print("\n--- /metrics ---")
    print("\n".join(shown))
    if len(shown) < len(lines):
        print(f"({len(lines) - len(shown)} histogram buckets left out; --all-metrics shows them)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--decode-output", required=True)
    parser.add_argument("--decode-pid", type=int, required=True)
    parser.add_argument("--receiver", required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--all-metrics", action="store_true")
    parser.add_argument("--run", action="append", required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    runs = [json.loads(Path(path).read_text()) for path in args.run]
    for run in runs:
        tokens = answer(args, run["request_id"])["tokens"]
        check(run, tokens, args.receiver)
        print_run(run, tokenizer.decode(tokens, skip_special_tokens=True).strip())
    if len(runs) > 1:
        print_table(runs)
    print_metrics(args.metrics, args.all_metrics)


if __name__ == "__main__":
    main()

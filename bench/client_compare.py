#!/usr/bin/env python3
"""Throughput of the Python client against the C++ one's, both checking every checksum and the manifest.

  bench/client_compare.py [--tokens 3000,7000] [--stripes 1] [--runs 10] [--json FILE]

Starts replay-server (a vsprefill-server that computes nothing), so only the transfer is timed: from the call to the
verified cache, on connections that stay, into fresh memory. Runs alternate; each pair gives a ratio, of which the
median is printed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "client/python"))
import vsprefill


class Cpp:
    """bench/client_bench: one prefill for each line it is sent."""

    def __init__(self, binary, address, tokens, stripes):
        self._process = subprocess.Popen([binary, address, str(tokens), str(stripes)], text=True, bufsize=1,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self):
        """(seconds, bytes)"""
        self._process.stdin.write("\n")
        seconds, size = self._process.stdout.readline().split()
        return float(seconds), int(size)

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def python_run(client, ids, stripes):
    begin = time.perf_counter()
    cache = client.prefill(ids, stripes=stripes, timeout=600)
    return time.perf_counter() - begin, cache.received_bytes


def compare(args, address, tokens, stripes):
    ids = [i % 1000 for i in range(tokens)]
    cpp = Cpp(args.bin / "client_bench", address, tokens, stripes)
    runs = []
    try:
        with vsprefill.PrefillClient(address) as client:
            for i in range(args.runs + 1):  # the first connects and touches the server's memory
                pair = cpp.run(), python_run(client, ids, stripes)
                assert pair[0][1] == pair[1][1] > 0, f"different sizes: {pair}"
                if i:
                    runs.append({"cpp_seconds": pair[0][0], "python_seconds": pair[1][0]})
    finally:
        cpp.close()
    size = pair[0][1]
    ratios = [r["cpp_seconds"] / r["python_seconds"] for r in runs]
    rates = [size / statistics.median(r[k] for r in runs) / 1e9 for k in ("cpp_seconds", "python_seconds")]
    print(f"{tokens:>6} tokens  {size / 1e6:7.1f} MB  {stripes} stripes  C++ {rates[0]:6.3f} GB/s  Python "
          f"{rates[1]:6.3f} GB/s  ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to "
          f"{max(ratios):.3f})", flush=True)
    return {"tokens": tokens, "bytes": size, "stripes": stripes, "ratio_median": statistics.median(ratios),
            "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="3000,7000")
    parser.add_argument("--stripes", default="1")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--dtype", default="bf16", help="the server's")
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--bin", type=Path, default=ROOT / "build/bin", help="folder of the programs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    server = subprocess.Popen([args.bin / "replay-server", "--model", args.model, "--dtype", args.dtype, "--listen",
                               "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    try:
        address = next(m[1] for line in server.stdout if (m := re.match(r"listening on (\S+)", line)))
        load = os.getloadavg()[0]
        rows = [compare(args, address, int(tokens), int(stripes)) for tokens in args.tokens.split(",")
                for stripes in args.stripes.split(",")]
    finally:
        server.terminate()
        server.wait()
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        args.json.write_text(json.dumps({
            "command": " ".join(["bench/client_compare.py", *sys.argv[1:]]), "commit": commit.stdout.strip(),
            "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "load_before": load, "rows": rows}, indent=1)
            + "\n")


if __name__ == "__main__":
    main()

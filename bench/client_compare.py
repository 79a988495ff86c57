#!/usr/bin/env python3
"""Throughput of the Python client against the C++ one's, both checking every byte, from one server.

  client_compare.py --server ADDR --tokens N [--runs 10] [--stripes 1] [--bin build/bin]

Runs are interleaved and the median of the ratio per pair is printed. The figure says something about the clients
only where the server has nothing to compute: give it one that replays a cache.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "client/python"))
import vsprefill


def cpp(args, ids_file):
    """Bytes per second of one call, from call to verified cache, as the client itself saw it."""
    done = subprocess.run([args.bin / "vsprefill", "prefill", "--server", args.server, "--ids", ids_file,
                           "--stripes", str(args.stripes), "--json"], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"error: vsprefill: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    return report["received_bytes"] / report["client_total_seconds"]


def python(client, ids, stripes):
    begin = time.perf_counter()
    cache = client.prefill(ids, stripes=stripes, timeout=600)
    return cache.received_bytes / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--stripes", type=int, default=1)
    parser.add_argument("--bin", type=Path, default=ROOT / "build/bin")
    args = parser.parse_args()
    ids = [i % 1000 for i in range(args.tokens)]
    pairs = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, vsprefill.PrefillClient(args.server) as client:
        json.dump(ids, file)
        file.flush()
        python(client, ids, args.stripes)  # connects, and the server's first touches of memory
        for _ in range(args.runs):
            pairs.append((cpp(args, file.name), python(client, ids, args.stripes)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    print(f"{platform.node()}, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}, {args.tokens} tokens, "
          f"{args.stripes} stripes, {args.runs} interleaved runs")
    for name, values in zip(("C++", "Python"), zip(*pairs, strict=True), strict=True):
        print(f"{name:7} median {statistics.median(values) / 1e9:.3f} GB/s, from {min(values) / 1e9:.3f} to "
              f"{max(values) / 1e9:.3f}")
    print(f"ratio Python / C++: median {statistics.median(p / c for c, p in pairs):.3f}")


if __name__ == "__main__":
    main()

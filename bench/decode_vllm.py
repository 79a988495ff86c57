#!/usr/bin/env python3
"""vLLM alone against vLLM with remote prefill, on two cores: what a prompt waits for, and what others notice of it.

  bench/decode_vllm.py [--placement shared,split] [--lengths 1024,2048,4096,8000] [--repeats 3] [--vllm_nice 5]
                       [--json FILE]
  bench/decode_vllm.py --handover [--repeats 10] [--json FILE]

Needs .venv-vllm (deploy/local/setup_vllm.sh) and the built programs. bf16, SmolLM2-135M-Instruct.

Placements: `shared` leaves both cores to both servers; in `split` vLLM has core 0 and vsprefill-server core 1. Ways of
prefilling, alternating: `local` (vLLM's own, the connector switched off for the request), `dense` and `vsprefill`
(remote). For each length it prints medians over --repeats of

  ttft     seconds from a streamed request to its first token
  gap      the longest pause between two tokens of another request, which decodes meanwhile
  tokens   that the other one got per second meanwhile (`idle`: while nobody prefills)

--handover: the 69 MB cache of 3,000 tokens from replay-server, which computes nothing. Prints the milliseconds from the
last chunk until the scheduler could run the request, and what the connector's checking and packing adds to the load.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/python")]
import vsprefill
from servers import start_server
from vllm_engine import Engine, outcome

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
WAYS = {"local": {"enabled": False}, "dense": {"method": "dense"}, "vsprefill": {"method": "vsprefill"}}
CORES = {"shared": ("0,1", "0,1"), "split": ("0", "1")}  # of vLLM, of vsprefill-server


def stream(engine, ids, **options):
    """(time, JSON) of each event of a streamed completion."""
    connection = engine.begin(ids, stream=True, timeout=600, **options)
    try:
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])
    finally:
        connection.close()


class Decoding:
    """Another request, which decodes from the start of the block to its end; `times` of its tokens."""

    def __init__(self, engine):
        self.times = []
        self._engine, self._stop, self._running = engine, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self):
        for at, _ in stream(self._engine, list(range(1000, 1032)), vsprefill=WAYS["local"], max_tokens=8000,
                            ignore_eos=True):
            self.times.append(at)
            if len(self.times) == 5:
                self._running.set()
            if self._stop.is_set():
                return

    def __enter__(self):
        self._thread.start()
        if not self._running.wait(300):
            raise RuntimeError("the other request does not decode")
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def of_others(times, begin, end):
    """(longest pause, tokens per second) between begin and end, the pauses at both edges included."""
    inside = [t for t in times if begin < t < end]
    edges = [max((t for t in times if t <= begin), default=begin), *inside,
             min((t for t in times if t >= end), default=end)]
    return max(b - a for a, b in zip(edges, edges[1:], strict=False)), len(inside) / (end - begin)


def measure(engine, ids, way):
    with Decoding(engine) as other:
        time.sleep(1)
        idle_begin = other.times[0]
        begin = time.perf_counter()
        idle = of_others(other.times, idle_begin, begin)
        events = list(stream(engine, ids, vsprefill=WAYS[way], max_tokens=2, ignore_eos=True))
        first = events[0][0]
        while other.times[-1] < first:
            time.sleep(0.005)
    gap, rate = of_others(other.times, begin, first)
    return {"ttft": first - begin, "gap": gap, "tokens_per_second": rate, "idle_gap": idle[0],
            "idle_tokens_per_second": idle[1]}


def median(runs, key):
    return statistics.median(r[key] for r in runs)


def text_ids(length):
    from transformers import AutoTokenizer

    text = (ROOT / "deploy/local/prompts/document.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]
    return (ids * (length // len(ids) + 1))[:length]


def run_placement(placement, lengths, repeats, nice):
    engine_cores, server_cores = CORES[placement]
    threads = str(len(server_cores.split(",")))
    rows = []
    with start_server(MODEL, "--dtype", "bf16", "--method", "dense", "--cpu_threads", threads,
                      cores=server_cores) as server:
        with Engine({"endpoints": [server.address], "deadline_seconds": 600}, dtype="bfloat16", policy="recompute",
                    cores=engine_cores, nice=nice,
                    environment={"VLLM_CPU_OMP_THREADS_BIND": engine_cores.replace(",", "-")}) as engine:
            for way in WAYS:  # warm up
                measure(engine, text_ids(1024), way)
            for length in lengths:
                ids = text_ids(length)
                runs = {way: [] for way in WAYS}
                for _ in range(repeats):
                    for way in WAYS:
                        runs[way].append({**measure(engine, ids, way), "load": os.getloadavg()[0]})
                for way, found in runs.items():
                    ratio = statistics.median(ours["ttft"] / own["ttft"]
                                              for ours, own in zip(found, runs["local"], strict=True))
                    values = {key: median(found, key) for key in found[0]}
                    print("{:7} {:5} {:10} ttft {ttft:6.2f} s ({:4.2f} of local)  gap {gap:6.2f} s (idle "
                          "{idle_gap:.2f})  tokens {tokens_per_second:4.1f}/s (idle "
                          "{idle_tokens_per_second:.1f})".format(placement, length, way, ratio, **values), flush=True)
                    rows.append({"placement": placement, "tokens": length, "way": way, "runs": found})
    return rows


class Nowhere:
    """A destination that throws everything away."""

    def __init__(self, layout):
        pass

    def write(self, layer, token_begin, keys, values):
        pass


def run_handover(repeats):
    ids = text_ids(3000)
    runs = []
    with start_server(MODEL, "--dtype", "bf16", program="replay-server") as server, vsprefill.PrefillClient(
            server.address) as client:
        with Engine({"endpoints": [server.address]}, dtype="bfloat16") as engine:
            for i in range(repeats + 1):  # the first one connects
                begin = time.perf_counter()
                client.prefill_into(Nowhere, ids)
                transfer = time.perf_counter() - begin
                told = outcome(engine.complete(ids, vsprefill={}, max_tokens=1))
                if i:
                    runs.append({"transfer": transfer, "load": told["seconds"], "handover": told["handover_seconds"],
                                 "bytes": told["bytes"], "load_average": os.getloadavg()[0]})
    for name, values in (("last chunk to schedulable", [r["handover"] for r in runs]),
                         ("load less a transfer to nowhere", [r["load"] - r["transfer"] for r in runs])):
        print(f"{name}: median {1e3 * statistics.median(values):.1f} ms, from {1e3 * min(values):.1f} to "
              f"{1e3 * max(values):.1f}, {runs[0]['bytes'] / 1e6:.1f} MB, {len(runs)} loads")
    return runs


def machine():
    info = Path("/proc/cpuinfo").read_text()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {"cpu": re.search(r"model name\s*: (.*)", info)[1], "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(),
            "command": " ".join(["bench/decode_vllm.py", *sys.argv[1:]])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placement", default="shared,split")
    parser.add_argument("--lengths", default="1024,2048,4096,8000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm_nice", type=int, default=5, help="of vLLM, as the guide advises; the server's is 0")
    parser.add_argument("--handover", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.handover:
        rows = run_handover(args.repeats)
    else:
        rows = [row for placement in args.placement.split(",")
                for row in run_placement(placement, [int(n) for n in args.lengths.split(",")], args.repeats,
                                         args.vllm_nice)]
    if args.json:
        args.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Times prefill through the whole service: starts vsprefill-server and calls it with vsprefill, on loopback.

For every length, method and number of stripes: one warm-up, then the median of --repeats calls. Prints a
table; --json writes every call's figures. A method is a name, or name:parameter=value:parameter=value.

  bench/service_bench.py --model models/SmolLM2-135M-Instruct --lengths 1024,8000 --methods dense,vsprefill
  bench/service_bench.py --model DIR --lengths 131072 --stripes 1,4 -- --device cuda --kv_pool_bytes 32GiB

What follows `--` goes to the server. Ids come from --ids (a JSON array, repeated to the length) or are
pseudo-random, which is right for a model with random weights only.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start_server(binary, model, arguments, log):
    process = subprocess.Popen(
        [binary, "--model", model, "--listen", "127.0.0.1:0", "--metrics_listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    for line in process.stdout:
        match = re.match(r"listening on (\S+)", line)
        if match:
            return process, match.group(1)
    sys.exit(f"service_bench: the server ended with {process.wait()}; its messages are in {log.name}")


def call(binary, address, ids, method, stripes):
    name, *settings = method.split(":")
    command = [binary, "prefill", "--server", address, "--ids", ids, "--method", name]
    command += ["--stripes", str(stripes), "--json"]
    for setting in settings:
        command += ["--set", setting]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"service_bench: {' '.join(command)}: {result.stderr.strip()}")
    return json.loads(result.stdout)


def print_row(length, method, stripes, calls):
    def median(key):
        return statistics.median(c[key] for c in calls)

    compute, exposed = median("compute_seconds"), median("exposed_transfer_seconds")
    rate = median("bytes") / (compute + exposed) / 1e9
    print(
        f"{length:<8} {method:36} {stripes:>7} {median('ttft_seconds'):7.3f} {compute:10.3f}"
        f" {exposed * 1e3:11.2f} {rate:6.2f} {median('density'):8.4f} {median('cost_ratio'):7.4f}",
        flush=True,
    )


def peak_rss_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "build/bin", help="folder of the programs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--lengths", default="1024,2048,4096,8000")
    parser.add_argument("--methods", default="dense,vsprefill")
    parser.add_argument("--stripes", default="1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    log_path = Path(tempfile.gettempdir()) / "service_bench_server.log"
    parser.add_argument("--server_log", type=Path, default=log_path)
    parser.add_argument("server", nargs="*", help="flags of vsprefill-server, after --")
    arguments = parser.parse_args()

    vocab = json.loads((Path(arguments.model) / "config.json").read_text())["vocab_size"]
    if arguments.ids:
        source = json.loads(arguments.ids.read_text())
    else:
        source = random.Random(1).choices(range(vocab), k=1 << 17)
    rows = []
    with open(arguments.server_log, "w") as log, tempfile.TemporaryDirectory() as folder:
        server, address = start_server(arguments.bin / "vsprefill-server", arguments.model, arguments.server, log)
        try:
            print(f"{'tokens':<8} {'method':36} stripes  ttft s  compute s  exposed ms  GB/s*  density    cost")
            for length in map(int, arguments.lengths.split(",")):
                ids = Path(folder) / f"{length}.json"
                ids.write_text(json.dumps((source * (length // len(source) + 1))[:length]))
                for method in arguments.methods.split(","):
                    for stripes in map(int, arguments.stripes.split(",")):
                        client = arguments.bin / "vsprefill"
                        calls = [call(client, address, ids, method, stripes) for _ in range(arguments.repeats + 1)][1:]
                        print_row(length, method, stripes, calls)
                        rows.append(dict(tokens=length, method=method, stripes=stripes, calls=calls))
            rss = peak_rss_mib(server.pid)
            print(f"peak resident memory of the server: {rss:.0f} MiB")
            print("* bytes / (compute + exposed transfer): what the receiver saw, not the limit of the link")
        finally:
            server.terminate()
            server.wait()
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(server=arguments.server, peak_rss_mib=rss, rows=rows), indent=1))


if __name__ == "__main__":
    main()

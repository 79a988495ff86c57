#!/usr/bin/env python3
"""Speed on the CPU, one table from one run: transformers (sdpa) against dense and VSPrefill prefill.

Seconds to the logits of the last token, same ids, same number of threads, bf16 unless --dtype says otherwise.
The programs take turns at each length, so that a busy machine slows all of them; the best of --repeats counts.
Prints Markdown; --json writes all figures. vLLM's CPU build takes part where --vllm_python names a Python that
has it.

  bench/cpu_speed.py --lengths 1024,2048,4096,8000
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy/local"))
import default_card  # noqa: E402

# A program of its own: vLLM starts workers that import the main module again.
VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams


def main():
    model, ids_file, lengths, repeats = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    ids = json.load(open(ids_file))
    llm = LLM(model=model, dtype=sys.argv[5], max_model_len=8192, enable_prefix_caching=False, disable_log_stats=True,
              max_num_batched_tokens=8192)
    one = SamplingParams(max_tokens=1, temperature=0)
    for length in lengths:
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            llm.generate({"prompt_token_ids": ids[:length]}, one, use_tqdm=False)
            times.append(time.perf_counter() - begin)
        print("RESULT", json.dumps([length, min(times[1:])]), flush=True)


if __name__ == "__main__":
    main()
"""


def text_ids(model, count):
    """Real text without repetition: the demo's document, then the project's own documentation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    texts = [ROOT / "deploy/local/prompts/document.txt", *sorted((ROOT / "docs").glob("*.md"))]
    ids = []
    for text in texts:
        ids += tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    return ids[:count]


def time_transformers(model, ids, repeats, dtype, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            network(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - begin)
    return min(times[1:])


def run(command, what, environment=None):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if result.returncode != 0:
        sys.exit(f"cpu_speed: {what} failed: {result.stderr[-2000:]}")
    return result.stdout


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--bin", type=Path, default=ROOT / "build/bin")
    parser.add_argument("--lengths", default="1024,2048,4096,8000")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", default="2048", help="tokens per forward pass of ours; 0: whole prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm_python", help="Python with vllm; its figures come last, not in turns")
    parser.add_argument("--transformers_only", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.transformers_only:
        ids = json.loads(Path(arguments.transformers_only).read_text())
        seconds = time_transformers(arguments.model, ids, arguments.repeats, arguments.dtype, arguments.threads)
        print(json.dumps(seconds))
        return

    lengths = [int(n) for n in arguments.lengths.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ids_file = Path(folder) / "ids.json"
        all_ids = text_ids(arguments.model, max(lengths))
        if len(all_ids) < max(lengths):
            sys.exit(f"cpu_speed: only {len(all_ids)} tokens of text, {max(lengths)} wanted")
        commit = run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], "git").strip()
        machine = f"{processor()}, {arguments.threads} threads"
        print(f"{machine}, {arguments.dtype}, commit {commit}, {time.strftime('%F')}\n")
        print("| tokens | transformers s | dense s | ratio | VSPrefill s | ratio | density | cost_ratio | perplexity |")
        print("|---|---|---|---|---|---|---|---|---|")
        for length in lengths:
            ids_file.write_text(json.dumps(all_ids[:length]))
            shared = ["--model", arguments.model, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
            shared += ["--repeats", str(arguments.repeats)]
            turn = [sys.executable, __file__, *shared, "--transformers_only", ids_file]
            seconds = json.loads(run(turn, "transformers"))
            bench_json = Path(folder) / "bench.json"
            turn = [arguments.bin / "prefill_bench", *shared, "--ids", ids_file, "--lengths", str(length), "--scores"]
            turn += ["--methods", "dense,vsprefill", "--chunks", arguments.chunk, "--json", bench_json]
            run(turn, "prefill_bench")
            bench = json.loads(bench_json.read_text())
            bench["model"] = Path(arguments.model).name
            rows.append(dict(tokens=length, transformers=seconds, bench=bench))
            print_row(rows[-1])
        if arguments.json:
            write_json(arguments.json, commit, rows)
        if arguments.vllm_python:
            ids_file.write_text(json.dumps(all_ids))
            settings = [json.dumps(lengths), str(arguments.repeats), arguments.dtype]
            program = Path(folder) / "vllm_times.py"
            program.write_text(VLLM)
            # vLLM reads every safetensors file of a model directory, the indexer too.
            plain = Path(folder) / "model"
            plain.mkdir()
            for file in Path(arguments.model).resolve().iterdir():
                if file.name not in ("indexer.safetensors", "seer_gate.safetensors"):
                    (plain / file.name).symlink_to(file)
            # Without the binding vLLM keeps a core free for others and computes on one.
            environment = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{arguments.threads - 1}", "HF_HUB_OFFLINE": "1",
                           "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
            output = run([arguments.vllm_python, program, plain, ids_file, *settings], "vllm", environment)
            print("\nvLLM CPU, seconds: ", end="")
            results = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT")]
            print(", ".join(f"{length}: {seconds:.2f}" for length, seconds in results))
            for row, (_, seconds) in zip(rows, results):
                row["vllm"] = seconds
            if arguments.json:
                write_json(arguments.json, commit, rows)
    print("\nThe default's card (deploy/local/default_card.json):")
    print("\n".join(f"- {line}" for line in default_card.lines()))


def write_json(path, commit, rows):
    facts = dict(processor=processor(), commit=commit, date=time.strftime("%F"))
    path.write_text(json.dumps(dict(**facts, rows=rows), indent=1))


def print_row(row):
    dense, sparse = row["bench"]["runs"]
    base = row["transformers"]
    print(
        f"| {row['tokens']} | {base:.2f} | {dense['ttft_seconds']:.2f} | {base / dense['ttft_seconds']:.2f}×"
        f" | {sparse['ttft_seconds']:.2f} | {base / sparse['ttft_seconds']:.2f}× | {sparse['density']:.3f}"
        f" | {sparse['cost_ratio']:.3f} | {100 * (sparse['perplexity'] / dense['perplexity'] - 1):+.1f} % |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Needle prompts through the real service: does a sparse prefill answer right where a dense one does?

  needle_test.py [--method vsprefill] [--set NAME=VALUE …] [--lengths 1024 2048 …]

A seven-digit number stands somewhere in filler sentences or in the demo's document; the question comes at the end,
in the chat template. vsprefill-server computes the cache and pushes it to vsprefill-decode, which decodes greedily.
Right: the answer holds the number. Exit status 1 if an answer is wrong where the dense one is right.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy/local"), str(ROOT / "tests/python"), str(ROOT / "training/corpus")]
import default_card
import make_corpus
import prompt
from servers import BIN, Program, start_server


def make_prompt(args, rng, tokens, depth, document):
    """(ids, number): a prompt of at most `tokens` tokens with the needle at `depth` of the text."""
    tokenizer = prompt.load_tokenizer(args.model)
    key = f"{rng.choice(make_corpus.ADJECTIVES)}-{rng.choice(make_corpus.NOUNS)}"
    number = str(rng.randrange(10**6, 10**7))
    sentences = (document if document else make_corpus.FILLER * (tokens // 10)).split(". ")

    def ids(count):
        text = sentences[:count]
        text.insert(int(count * depth), f"One of the special magic numbers for {key} is: {number}")
        return prompt.chat_ids(args.model, "A special magic number is hidden within the following text. Memorize it; I "
                               "will ask you about it afterwards.\n" + ". ".join(text) + ".\nWhat is the special magic "
                               f"number for {key} mentioned in the provided text?")
    low, high = 1, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(ids(middle)) <= tokens else (low, middle - 1)
    return ids(low), number, tokenizer


def run(args, server, worker, ids, name, method, settings):
    """Prefills with `method`, decodes in the worker: (report of the prefill, tokens)."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump(ids, f)
        f.flush()
        command = [str(BIN / "vsprefill"), "prefill", "--server", server.address, "--ids", f.name, "--method", method,
                   "--push", worker.address, "--request_id", name, "--json"]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        sys.exit(f"error: prefill of {name} failed: {done.stderr.strip()}")
    start = '{"request_id":"' + name + '"'
    return json.loads(done.stdout), json.loads(start + worker.line(start, 600))["tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--method", default="vsprefill")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--lengths", nargs="*", type=int, default=[1024, 2048, 3072, 4096, 6144, 7800])
    parser.add_argument("--document_lengths", nargs="*", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--depths", nargs="*", type=float, default=[0.15, 0.5, 0.85])
    parser.add_argument("--chunk_tokens", type=int, default=0, help="0: the server's default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="file for counts and every prompt's outcome")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    document = (ROOT / "deploy/local/prompts/document.txt").read_text(encoding="utf-8")
    cases = [(n, depth, kind) for kind, lengths in (("filler", args.lengths), ("document", args.document_lengths))
             for n in lengths for depth in args.depths]
    lost = right = dense_right = 0
    outcomes = []
    with Program(str(BIN / "vsprefill-decode"), "--model", args.model, "--listen", "127.0.0.1:0",
                 "--max_new_tokens", "32") as worker:
        worker.address = worker.line("listening on ")
        chunk = ["--chunk_tokens", str(args.chunk_tokens)] if args.chunk_tokens else []
        with start_server(args.model, "--push_allow", worker.address, *chunk) as server:
            for i, (tokens, depth, kind) in enumerate(cases):
                ids, number, tokenizer = make_prompt(args, rng, tokens, depth, document if kind == "document" else "")
                found = {}
                for method, settings in (("dense", []), (args.method, args.set)):
                    report, answer = run(args, server, worker, ids, f"needle-{os.getpid()}-{i}-{method}", method,
                                         settings)
                    found[method] = number in tokenizer.decode(answer)
                dense_right += found["dense"]
                right += found["dense"] and found[args.method]
                lost += found["dense"] and not found[args.method]
                outcomes.append({"kind": kind, "tokens": len(ids), "depth": depth, "dense": found["dense"],
                                 "sparse": found[args.method], "density": report["density"]})
                word = {method: "right" if answered else "wrong" for method, answered in found.items()}
                print(f"{kind:9}{len(ids):6} tokens, depth {depth:.2f}: dense {word['dense']}, "
                      f"{args.method} {word[args.method]} (density {report['density']:.3f}, "
                      f"TTFT {report['ttft_seconds']:.2f} s)", flush=True)
    print(f"{args.method}: {right} of the {dense_right} that dense answers right ({len(cases)} prompts)")
    if args.json:
        lengths = [outcome["tokens"] for outcome in outcomes]
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"method": args.method, "parameters": report["parameters"], "right": right,
                       "dense_right": dense_right, "prompts": len(cases), "shortest": min(lengths),
                       "longest": max(lengths), "outcomes": outcomes}, f, indent=1)
    if args.method == "vsprefill" and report["parameters"] == default_card.load()["parameters"]:
        print("The default's card:\n" + "\n".join(f"  {line}" for line in default_card.lines()))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()

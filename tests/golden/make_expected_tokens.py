#!/usr/bin/env python3
"""Greedy tokens of transformers.generate (float32, CPU) on ten real prompts of 1 to 7,000 tokens.

Writes models/expected_tokens.json: {"key", "prompts": [{"name", "ids", "tokens"}]}, where tokens ends after
64 of them or with EOS. The key covers the model, the prompts and the versions, so a second run does
nothing. Takes about two minutes on two cores, most of it for the long prompts.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "deploy/local")]

from prompt import DEFAULT_DOCUMENT, DEFAULT_QUESTION, chat_ids
from vsprefill import identity

NEW_TOKENS = 64
VERSION = 1


def make_prompts(model_dir):
    """(name, ids) of the prompts, shortest first."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    document = DEFAULT_DOCUMENT.read_text(encoding="utf-8").strip()
    text = tokenizer.encode(document + "\n\n" + (ROOT / "LICENSE").read_text(encoding="utf-8")).ids
    start = text.index(tokenizer.encode("\n").ids[0])
    chat = lambda question: chat_ids(model_dir, question)
    return [
        ("one token", tokenizer.encode("The").ids[:1]),
        ("two tokens", tokenizer.encode("Once upon").ids[:2]),
        ("capital", chat("What is the capital of France?")),
        ("list", chat("List the months of the year that have 31 days.")),
        ("text 129", text[start:start + 129]),
        ("text 600", text[:600]),
        ("text 1500", text[200:1700]),
        ("text 3000", text[1000:4000]),
        ("document and question", chat(f"{document}\n\n{DEFAULT_QUESTION}")),
        ("text 7000", text[:7000]),
    ]


def make_key(model_dir, prompts):
    parts = [VERSION, identity.weights_id(model_dir), prompts, transformers.__version__, torch.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "models/expected_tokens.json")
    args = parser.parse_args()
    prompts = make_prompts(args.model)
    key = make_key(args.model, prompts)
    if args.out.exists() and json.loads(args.out.read_text())["key"] == key:
        print(f"make_expected_tokens: {args.out} is there")
        return
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    results = []
    for name, ids in prompts:
        begin = time.monotonic()
        inputs = torch.tensor([ids])
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False)
        results.append({"name": name, "ids": ids, "tokens": out[0, len(ids):].tolist()})
        print(f"make_expected_tokens: {name}: {len(ids)} tokens, {time.monotonic() - begin:.1f} s", flush=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "prompts": results}))
    temporary.replace(args.out)


if __name__ == "__main__":
    main()

"""Prompts with a seven-digit number hidden in them, and the question for it at the end (bench/eval/needle_test.py)."""

import random
import sys
from types import SimpleNamespace

from conftest import ROOT

sys.path[:0] = [str(ROOT / folder) for folder in ("bench/eval", "deploy/local", "training/corpus")]

LENGTHS = (1024, 2048, 4096, 7800)


def make(model_dir, tokens, seed=7):
    """(ids, number, tokenizer)"""
    from needle_test import make_prompt

    rng = random.Random(seed * 10007 + tokens)
    return make_prompt(SimpleNamespace(model=model_dir), rng, tokens, depth=0.5, document="")

#!/usr/bin/env python3
"""Compares two KV dumps of `vsprefill prefill --dump`: cosine similarity and largest difference per layer.

  bench/compare_kv.py A.safetensors B.safetensors [--min_cosine 0.999]

Exit status 1 where a layer's K or V is below --min_cosine or the dumps differ in shape.
"""

import argparse
import sys

import torch
from safetensors.torch import load_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--min_cosine", type=float, default=0.999)
    arguments = parser.parse_args()
    a, b = load_file(arguments.a), load_file(arguments.b)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        sys.exit("compare_kv: the dumps differ in names or shapes")
    cosines, largest = {}, 0.0
    for name in a:
        x, y = a[name].double().flatten(), b[name].double().flatten()
        cosines[name] = torch.nn.functional.cosine_similarity(x, y, dim=0).item()
        largest = max(largest, (x - y).abs().max().item())
    worst = min(cosines, key=cosines.get)
    print(f"{len(a)} tensors: lowest cosine {cosines[worst]:.6f} ({worst}), largest difference {largest:.4g}")
    return int(not cosines[worst] >= arguments.min_cosine)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What torch does on this GPU: the yardstick beside kernel_bench (same shapes, same timing rules).

Prints bf16 GEMM, cuDNN and FlashAttention-2 causal attention, and writes JSON with --json.
"""

import argparse
import json
import sys

SHAPES = [
    ("SmolLM2-135M", 9, 3, 64, [1024, 2048, 4096, 8192, 16384, 32768]),
    ("Llama-3.1-8B", 32, 8, 128, [2048, 4096, 8192, 16384, 32768, 131072, 262144]),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="")
    parser.add_argument("--max_tokens", type=int, default=131072)
    parser.add_argument("--min_tokens", type=int, default=0)
    parser.add_argument("--backends", default="cudnn,flash2", help="which attentions to time")
    args = parser.parse_args()
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        print("SKIPPED: torch sees no CUDA device")
        return 77
    gpu = torch.cuda.get_device_name()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    figures = []

    def timed(name, flops, call):
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        times = []
        while len(times) < 5 or (sum(times) < 400 and len(times) < 300):
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        times.sort()
        ms = times[len(times) // 2]
        figures.append({"gpu": gpu, "name": name, "ms": ms, "useful_tflops": flops / ms * 1e-9})
        print(f"{name:44s} {ms:9.4f} ms  {flops / ms * 1e-9:.4g} TFLOP/s", flush=True)

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed("torch gemm 8192^3", 2 * 8192**3, lambda: a @ b)
    del a, b
    for model, q_heads, kv_heads, head_dim, lengths in SHAPES:
        for n in lengths:
            if not args.min_tokens <= n <= args.max_tokens:
                continue
            q = torch.randn(1, q_heads, n, head_dim, device="cuda", dtype=torch.bfloat16)
            k, v = (
                torch.randn(1, kv_heads, n, head_dim, device="cuda", dtype=torch.bfloat16)
                for _ in range(2)
            )
            flops = 4 * head_dim * q_heads * n * (n + 1) / 2
            for label, backend in (
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("flash2", SDPBackend.FLASH_ATTENTION),
            ):
                if label not in args.backends.split(","):
                    continue
                with sdpa_kernel(backend):
                    try:
                        timed(
                            f"torch {label} dense {model} n={n}",
                            flops,
                            lambda: torch.nn.functional.scaled_dot_product_attention(
                                q, k, v, is_causal=True, enable_gqa=True
                            ),
                        )
                    except RuntimeError as error:
                        print(f"torch {label} dense {model} n={n}: not run: {str(error)[:120]}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Checks who may include whom (docs/architecture.md says why). Prints each violation; exit status 1 if any.

check_includes.py [FILE...]     default: all tracked C++ and CUDA files
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".h", ".cc", ".cu", ".cuh"}

# Folder -> what it may include of ours: folders, or single headers. A folder may always include itself.
LAYERS = {
    "kernels": [],
    "server/base": ["kernels"],
    "server/kv": ["kernels", "server/base"],
    "server/attention": ["kernels", "server/base", "server/kv/kv_layout.h"],
    "server/model": ["server/attention", "server/kv", "kernels", "server/base"],
    "server/metrics": ["server/base"],
    "server/config": ["server/base", "server/attention", "kernels"],
    "server/engine": ["server/model", "server/attention", "server/kv", "server/metrics", "server/base",
                      "kernels/tensor_view.h", "kernels/attention.h"],
    "server/rpc": ["server/engine", "server/kv", "server/metrics", "server/config", "server/base",
                   # method names and parameters are converted to and from protobuf here
                   "server/attention/attention_method.h", "server/attention/presets.h"],
    "server": ["server", "kernels"],  # main.cc
    "client/cc": ["server/base", "server/kv/kv_layout.h", "kernels/tensor_view.h"],
    # dumps are safetensors files
    # --help shows what presets are expected to cost
    "client/cli": ["client/cc", "server/attention/preset_table.h", "server/base",
                   "server/kv/kv_layout.h", "server/model/safetensors.h",
                   "kernels/tensor_view.h"],
    "client/decode": ["client/cc", "client/cli", "server/base", "server/kv", "server/model",
                      "server/attention", "kernels"],
    "training": ["server/model", "server/attention", "server/kv", "kernels", "server/base"],
    "bench": ["kernels", "server", "client", "training", "tests"],
    "tests": ["kernels", "server", "client", "training", "bench"],
}
OURS = ("kernels/", "server/", "client/", "training/", "bench/", "tests/")

# Header pattern -> patterns of the files that may include it.
LIBRARIES = [
    (r"(torch|ATen|c10)/", [r"server/model/[^/]+\.cc$", r"server/model/torch_[^/]+\.h$", r"training/",
                            r"client/decode/", r"bench/", r"tests/"]),
    (r"(grpc|grpcpp)/|.*\.pb\.h$", [r"server/rpc/", r"client/", r"tests/", r"bench/"]),
    (r"prometheus/", [r"server/metrics/", r"tests/"]),
    (r"(cuda|cublas|curand|nvtx3/|cute/|cutlass/|mma\.h)", [r"kernels/cuda/", r"server/base/[^/]*_cuda\.(cc|h)$",
                                                            r"server/kv/[^/]*_cuda\.(cc|h)$", r"tests/", r"bench/"]),
]

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def folder_of(path):
    """The longest key of LAYERS that holds the path."""
    return max((k for k in LAYERS if path.startswith(k + "/")), key=len, default=None)


def may_include(path, header):
    folder = folder_of(path)
    if folder is None:
        return True
    if folder_of(header) == folder:
        return True
    # A folder's entry for itself must not let it into its sub-folders, unless it is listed.
    allowed = LAYERS[folder]
    return any(header == entry or header.startswith(entry + "/") for entry in allowed)


def check(path, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        header = match.group(2)
        if header.startswith(OURS):
            if not may_include(path, header):
                yield f"{path}:{number}: {folder_of(path)} must not include {header}"
            continue
        for pattern, places in LIBRARIES:
            if re.match(pattern, header) and not any(re.match(place, path) for place in places):
                yield f"{path}:{number}: {header} is not allowed here"


def main():
    files = sys.argv[1:] or subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True,
                                           text=True).stdout.splitlines()
    files = [f for f in files if Path(f).suffix in SUFFIXES and (ROOT / f).exists()]
    problems = [p for f in files for p in check(f, (ROOT / f).read_text(encoding="utf-8"))]
    print("\n".join(problems or [f"includes: {len(files)} files, all as they should be"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

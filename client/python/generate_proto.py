#!/usr/bin/env python3
"""Generates vsprefill/v1/*_pb2.py, their types and *_pb2_grpc.py from proto/ with grpcio-tools.

Run by deploy/local/setup.sh and when a wheel is built; does nothing while the sources are unchanged.
In a source distribution the .proto files lie beside this script in proto/.
"""

import hashlib
import os
import sys
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent


def proto_root():
    for root in (HERE.parents[1] / "proto", HERE / "proto"):
        if (root / "vsprefill/v1").is_dir():
            return root
    sys.exit("generate_proto: no folder proto/vsprefill/v1 found")


def generate(out=HERE):
    root = proto_root()
    sources = sorted((root / "vsprefill/v1").glob("*.proto"))
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        digest.update(source.read_bytes())
    stamp = out / "vsprefill/v1/.generated"
    expected = [out / f"vsprefill/v1/{s.stem}{end}" for s in sources for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    if stamp.exists() and stamp.read_text() == digest.hexdigest() and all(f.exists() for f in expected):
        return
    from grpc_tools import protoc

    package = out / "vsprefill/v1"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    well_known = str(resources.files("grpc_tools") / "_proto")
    arguments = ["protoc", f"-I{root}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}",
                 f"--grpc_python_out={out}"]
    if protoc.main(arguments + [os.fspath(s) for s in sources]) != 0:
        sys.exit("generate_proto: protoc failed")
    stamp.write_text(digest.hexdigest())
    print(f"generate_proto: wrote {len(expected)} files to {package}")


if __name__ == "__main__":
    generate()

"""The package as people get it: a wheel, installed into an environment of its own, away from this tree."""

import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import grpc
import numpy
import pytest
import xxhash
from conftest import ROOT
from fake_server import FIRST_TOKEN, FakeServer

USE = """
import asyncio, sys
import vsprefill
assert not {prefix!r} in vsprefill.__file__, vsprefill.__file__
with vsprefill.PrefillClient(sys.argv[1]) as client:
    print(client.prefill(range(40), stripes=2).first_token)
async def main():
    async with vsprefill.AsyncPrefillClient(sys.argv[1]) as client:
        print((await client.prefill(range(40))).first_token)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools builds in the tree, and what an earlier build left there would get into the wheel.
    for part in ("client/python", "proto"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--no-build-isolation", "--wheel-dir", folder, folder / "client/python"], check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_code_types_and_generated_modules(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        requires = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    source = ROOT / "client/python/vsprefill"
    for path in source.rglob("*.py"):
        assert str(path.relative_to(source.parent)) in names
    assert {"vsprefill/py.typed", "vsprefill/v1/kv_pb2.pyi", "vsprefill/v1/prefill_pb2_grpc.py"} <= names
    plain = {r.split(">")[0] for r in requires if "extra ==" not in r}
    assert plain == {"grpcio", "protobuf", "numpy", "xxhash"}
    extras = {r.split("extra == ")[1].strip("\"'") for r in requires if "extra ==" in r}
    assert {"transformers", "vllm"} <= extras


def test_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
                    "--disable-pip-version-check", wheel], check=True, timeout=120)
    # The four dependencies come from this environment: the test needs no network.
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join({str(Path(m.__file__).parents[1]) for m in (grpc, numpy, xxhash)}))
    with FakeServer() as server:
        done = subprocess.run([python, "-c", USE.format(prefix=str(ROOT)), server.address], cwd=tmp_path,
                              capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(FIRST_TOKEN)] * 2

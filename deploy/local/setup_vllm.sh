#!/usr/bin/env bash
# Makes .venv-vllm: vLLM 0.32 for CPUs with this tree's vsprefill package, and models/vllm, the default model's
# directory as vLLM wants it. About 2.5 GB of downloads and 5.5 GB of disk; some minutes once, then seconds.
#
#   deploy/local/setup_vllm.sh
#
# Needs what deploy/local/setup.sh makes. Environment: VSP_PYTHON (default python3, 3.11 to 3.13) makes .venv-vllm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case ${1:-} in
  "") ;;
  -h | --help) sed -n '2,7p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
  *) echo "setup_vllm: unknown option $1 (see --help)" >&2; exit 2 ;;
esac
step() { echo "setup_vllm: [$(date +%H:%M:%S)] $1"; }

model=models/SmolLM2-135M-Instruct
if [ ! -f $model/model.safetensors ]; then
  echo "setup_vllm: $model is missing; run deploy/local/setup.sh first" >&2
  exit 1
fi

python=${VSP_PYTHON:-python3}
if [ ! -x .venv-vllm/bin/python ]; then
  step "Python environment .venv-vllm"
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and f"Python {sys.version.split()[0]}, 3.11 to 3.13 is needed (VSP_PYTHON)")'
  "$python" -m venv .venv-vllm
fi
pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check --no-input)
stamp=.venv-vllm/.requirements
if ! cmp -s deploy/local/requirements-vllm.txt "$stamp"; then
  step "Python packages with torch and vLLM (some minutes)"
  "${pip[@]}" install --no-deps --progress-bar off --quiet --no-compile --root-user-action ignore \
    -r deploy/local/requirements-vllm.txt
  cp deploy/local/requirements-vllm.txt "$stamp"
fi

# The tree itself, so that a change needs no new installation: vLLM imports the connector by name in each process.
.venv-vllm/bin/python - "$PWD/client/python" <<'PY'
import sys
import sysconfig
from pathlib import Path

(Path(sysconfig.get_paths()["purelib"]) / "vsprefill.pth").write_text(sys.argv[1] + "\n")
PY
if [ ! -f client/python/vsprefill/v1/.generated ]; then
  step "generated code"
  .venv/bin/python client/python/generate_proto.py
fi

# vLLM loads every *.safetensors of a model's directory, so indexer and gate must not be there.
links=models/vllm/$(basename $model)
mkdir -p "$links"
find "$links" -type l -delete
for file in "$model"/*; do
  case $(basename "$file") in
    indexer.safetensors | seer_gate.safetensors) ;;
    *) ln -s "$(realpath "$file")" "$links/" ;;
  esac
done

# Three processes import all of this at each start of vLLM, so the compiled files are kept whatever the environment says.
step "check"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# torch's remarks on a missing triton and GPU are shown only where the check fails.
PYTHONDONTWRITEBYTECODE='' .venv-vllm/bin/python - 2>"$log" <<'PY' || { cat "$log" >&2; exit 1; }
import vllm
import vllm.entrypoints.openai.api_server
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker
from vsprefill.vllm_connector import VSPrefillConnector

missing = VSPrefillConnector.__abstractmethods__
assert not missing, f"this vLLM wants more of a connector: {sorted(missing)}"
print(f"setup_vllm: vLLM {vllm.__version__} with {VSPrefillConnector.__name__}")
PY
step "done; models/vllm/$(basename $model) is the model for vLLM"

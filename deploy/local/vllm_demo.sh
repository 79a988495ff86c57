#!/usr/bin/env bash
# vLLM's OpenAI server decodes prompts that vsprefill-server computed, on one machine without a GPU: starts both on
# loopback, sends a real document and a question with one curl, prints the answer, where its KV came from, and the
# metrics of both.
#
#   deploy/local/vllm_demo.sh [--method dense|vsprefill] [--no-setup]
#
#   --method M    attention of the prefill (default vsprefill)
#   --no-setup    take .venv, build/ and .venv-vllm as they are
#
# Exit status 0 only if the answer was decoded from a loaded cache.
# Environment: VSP_BIN is a folder with vsprefill-server (default build/bin).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

method=vsprefill
setup=1
while [ $# -gt 0 ]; do
  case $1 in
    --method) method=${2:?--method needs a value}; shift ;;
    --no-setup) setup=0 ;;
    -h | --help) sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
    *) echo "vllm_demo: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done

if [ $setup = 1 ]; then
  deploy/local/setup.sh
  deploy/local/build.sh vsprefill-server
  deploy/local/setup_vllm.sh
fi
command -v curl >/dev/null || { echo "vllm_demo: curl is missing (apt-get install curl)" >&2; exit 1; }

# shellcheck source=deploy/local/processes.sh
source deploy/local/processes.sh
work=$(mktemp -d)
clean() {
  local rc=$?
  trap - EXIT INT TERM
  end_processes
  if [ $rc != 0 ]; then
    echo "vllm_demo: failed with status $rc; last words of the servers:" >&2
    tail -n 5 "$work"/*.log >&2 || true
  fi
  rm -rf "$work"
  exit $rc
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# await PID SECONDS COMMAND...: until the command succeeds; fails when the process has ended or time is up.
await() {
  local pid=$1 tries=$(($2 * 5))
  shift 2
  while [ $tries -gt 0 ]; do
    if "$@"; then return 0; fi
    kill -0 "$pid" 2>/dev/null || return 1
    sleep 0.2
    tries=$((tries - 1))
  done
  return 1
}

model=SmolLM2-135M-Instruct
"${VSP_BIN:-build/bin}/vsprefill-server" --model models/$model --listen 127.0.0.1:0 --metrics_listen 127.0.0.1:0 \
  >"$work/prefill.log" 2>&1 &
pids+=($!)
await "${pids[0]}" 120 grep -q "^metrics on " "$work/prefill.log"
prefill=$(sed -n 's/^listening on //p' "$work/prefill.log")
metrics=$(sed -n 's/^metrics on //p' "$work/prefill.log")

port=$(.venv-vllm/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# nice: its processes poll while a prompt waits for its KV, and the prefill server should get the cores then.
VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 \
  nice -n 5 .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model models/vllm/$model --served-model-name $model \
  --host 127.0.0.1 --port "$port" --dtype bfloat16 --max-model-len 8192 --enforce-eager \
  --kv-transfer-config "{\"kv_connector\": \"VSPrefillConnector\", \"kv_role\": \"kv_consumer\",
    \"kv_connector_module_path\": \"vsprefill.vllm_connector\", \"kv_load_failure_policy\": \"recompute\",
    \"kv_connector_extra_config\": {\"endpoints\": [\"$prefill\"]}}" >"$work/vllm.log" 2>&1 &
pids+=($!)
echo "vllm_demo: vsprefill-server at $prefill (process ${pids[0]}), vLLM starts at 127.0.0.1:$port (process ${pids[1]}), which takes a while"
await "${pids[1]}" 300 curl -sf "http://127.0.0.1:$port/health" -o "$work/health"

.venv-vllm/bin/python - "$method" >"$work/request.json" <<'PY'
import json
import sys
from pathlib import Path

folder = Path("deploy/local/prompts")
text = "\n\n".join((folder / name).read_text(encoding="utf-8").strip() for name in ("document.txt", "question.txt"))
print(json.dumps({"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": text}],
                  "max_tokens": 64, "temperature": 0,
                  "kv_transfer_params": {"vsprefill": {"method": sys.argv[1]}}}))
PY
echo "vllm_demo: curl http://127.0.0.1:$port/v1/chat/completions -d @request.json (the document, the question and"
echo "vllm_demo:   \"kv_transfer_params\": {\"vsprefill\": {\"method\": \"$method\"}})"
curl -sS --fail-with-body --max-time 600 -H 'Content-Type: application/json' -d "@$work/request.json" \
  "http://127.0.0.1:$port/v1/chat/completions" >"$work/answer.json"
.venv-vllm/bin/python - "$work/answer.json" <<'PY'
import json
import sys

answer = json.load(open(sys.argv[1], encoding="utf-8"))
outcome = answer["kv_transfer_params"]["vsprefill"]
print(f"question: {open('deploy/local/prompts/question.txt', encoding='utf-8').read().strip()}")
print(f"answer:   {answer['choices'][0]['message']['content'].strip()}")
if outcome["source"] != "remote":
    sys.exit(f"error: the prompt was computed by vLLM: {outcome['reason']}")
print("KV:       {tokens} tokens, {megabytes:.0f} MB from {endpoint} by {method} at density {density:.2f} in {seconds:.1f} s, "
      "of which the server's {server_seconds:.1f} s".format(megabytes=outcome["bytes"] / 1e6, **outcome))
PY
# vLLM reports a step's counts a moment after its answer.
loaded() { curl -s "http://127.0.0.1:$port/metrics" | grep -q '^vllm:vsprefill_loads_total{.*outcome="loaded"'; }
await "${pids[1]}" 20 loaded
# Series that have counted something, without the labels that are the same for all.
show() {
  curl -s "$1" | grep -E "^($2)" | grep -v ' 0\(\.0\)\?$' |
    sed -E 's/(engine|model_name)="[^"]*",?//g; s/,\}/}/; s/\{\}//; s/^/  /'
}
echo "metrics of vLLM (http://127.0.0.1:$port/metrics):"
show "http://127.0.0.1:$port/metrics" 'vllm:(vsprefill_[a-z_]*(_total|_sum|_count)|prompt_tokens_by_source_total)'
echo "metrics of vsprefill-server (http://$metrics/metrics):"
show "http://$metrics/metrics" 'vsprefill_(prompt_tokens_total|kv_bytes_sent_total|time_to_first_token_seconds_(sum|count)|request_success_total|attention_density_ratio_(sum|count))'

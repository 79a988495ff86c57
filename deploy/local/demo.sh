#!/usr/bin/env bash
# One command from a fresh Debian 12 to generated text: sets up and builds what is missing, starts
# vsprefill-server and a vsprefill-decode worker as two processes on loopback, prefills a question about a
# real document of about 7,000 tokens, has the KV cache streamed layer by layer into the worker, prints the
# text that the worker generates from it, where the time went, and the server's metrics.
#
#   deploy/local/demo.sh [--method dense|vsprefill] [--device auto|cpu|cuda] [--prompt FILE]
#                        [--max-new-tokens N] [--compare] [--all-metrics] [--no-build]
#
#   --method M          attention method of the prefill (default: the server's, vsprefill)
#   --device D          auto takes a usable NVIDIA GPU, else the CPU, and says why (default auto)
#   --prompt FILE       a text file as the user's whole message instead of the shipped document and question
#   --max-new-tokens N  length of the answer (default 64)
#   --compare           dense and vsprefill one after the other, and a small table
#   --all-metrics       histogram buckets too
#   --no-build          take .venv and build/ as they are
#
# Exit status 0 only if the printed tokens were decoded from the streamed cache, verified on arrival.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

method=
device=auto
prompt=
new_tokens=64
compare=0
build=1
report_arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --method) method=${2:?--method needs a value}; shift ;;
    --device) device=${2:?--device needs a value}; shift ;;
    --prompt) prompt=$(realpath "${2:?--prompt needs a value}"); shift ;;
    --max-new-tokens) new_tokens=${2:?--max-new-tokens needs a value}; shift ;;
    --compare) compare=1 ;;
    --all-metrics) report_arguments+=(--all-metrics) ;;
    --no-build) build=0 ;;
    -h | --help) sed -n '2,19p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
    *) echo "demo: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
if [ $compare = 1 ] && [ -n "$method" ]; then echo "demo: --compare runs both methods; leave --method out" >&2; exit 2; fi
case $device in auto | cpu | cuda) ;; *) echo "demo: --device $device not in auto, cpu, cuda" >&2; exit 2 ;; esac
if [ -n "$prompt" ] && [ ! -r "$prompt" ]; then echo "demo: cannot read $prompt" >&2; exit 2; fi

# shellcheck source=deploy/local/processes.sh
source deploy/local/processes.sh
work=$(mktemp -d)
clean() {
  local rc=$?
  trap - EXIT INT TERM
  end_processes
  rm -rf "$work"
  if [ $rc != 0 ]; then echo "demo: failed with status $rc" >&2; fi
  exit $rc
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ $build = 1 ]; then
  deploy/local/setup.sh
  deploy/local/build.sh vsprefill-server vsprefill-decode vsprefill
fi
model=models/SmolLM2-135M-Instruct
encode=(.venv/bin/python deploy/local/prompt.py encode --model "$model" --out "$work/ids.json")
if [ -n "$prompt" ]; then encode+=(--prompt "$prompt"); fi
tokens=$("${encode[@]}")
echo "demo: prompt of $tokens tokens: ${prompt:-deploy/local/prompts/document.txt and the question \"$(cat deploy/local/prompts/question.txt)\"}"

# start NAME PROGRAM ARGUMENT...: in the background, output in $work/NAME.{out,err}
start() {
  local name=$1
  shift
  "$@" >"$work/$name.out" 2>"$work/$name.err" &
  pids+=($!)
}
# await NAME PATTERN SECONDS: waits until a line of NAME's output matches and prints what follows it there.
await() {
  local name=$1 pattern=$2 tries=$(($3 * 10)) pid line
  pid=${pids[-1]}
  while [ $tries -gt 0 ]; do
    line=$(grep -m 1 -o "$pattern.*" "$work/$name.out" || true)
    if [ -n "$line" ]; then echo "${line#"$pattern"}"; return 0; fi
    if ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.1
    tries=$((tries - 1))
  done
  echo "demo: $name is not ready; its last words:" >&2
  tail -n 5 "$work/$name.out" "$work/$name.err" >&2
  return 1
}

start decode build/bin/vsprefill-decode --model "$model" --listen 127.0.0.1:0 \
  --max_new_tokens "$new_tokens" --device "$device"
receiver=$(await decode "listening on " 120)
start server build/bin/vsprefill-server --model "$model" --listen 127.0.0.1:0 --metrics_listen 127.0.0.1:0 \
  --device "$device" --push_allow "$receiver"
address=$(await server "listening on " 120)
metrics=$(await server "metrics on " 10)
grep -h "^device: " "$work/server.out" | sed 's/^/demo: /' || true
echo "demo: vsprefill-server at $address (process ${pids[1]}), vsprefill-decode at $receiver (process ${pids[0]})"

# prefill METHOD: one request; its figures in $work/METHOD.json, the worker's answer in its output.
prefill() {
  local name=${1:-default} call
  call=(build/bin/vsprefill prefill --server "$address" --ids "$work/ids.json" --push "$receiver"
    --request_id "demo-$name" --deadline 600 --json)
  if [ "$name" != default ]; then call+=(--method "$name"); fi
  "${call[@]}" >"$work/$name.json"
  report_arguments+=(--run "$work/$name.json")
}
if [ $compare = 1 ]; then
  # The first request on a fresh process pays for first touches of memory; both methods get a short one.
  echo "[1, 2, 3]" >"$work/warm.json"
  for name in dense vsprefill; do
    build/bin/vsprefill prefill --server "$address" --ids "$work/warm.json" --method "$name" --json >"$work/warm.out"
  done
  prefill dense
  prefill vsprefill
else
  prefill "$method"
fi
.venv/bin/python deploy/local/demo_report.py --model "$model" --decode-output "$work/decode.out" \
  --decode-pid "${pids[0]}" --receiver "$receiver" --metrics "http://$metrics/metrics" "${report_arguments[@]}"

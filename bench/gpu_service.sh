#!/usr/bin/env bash
# The service on a GPU: the same prompt on GPU and CPU must give the same KV and tokens; then the figures of
# SmolLM2 and of a Llama-3.1-8B-shaped random model. Logs and JSON go to $OUT (default gpu_out).
#
#   bench/gpu_service.sh DIR [MODEL IDS]    DIR: bin/ and lib/ from bench/pack_gpu.sh, or a build folder;
#                                           MODEL: SmolLM2 directory with its indexer; IDS: a real prompt's ids,
#                                           8,000 or more for `rules`
#
# PARTS="smoke check rules smollm2 llama8b whole8b" picks parts. `smoke` (a tiny random model) and the 8B-shaped parts make
# their own model and need no MODEL. RANDOM_MODEL is where the 8B-shaped one is or will be (17 GB).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
dir=$1 model=${2:-} ids=${3:-}
out=${OUT:-gpu_out}
python=${PYTHON:-python3}
parts=${PARTS:-smoke ${model:+check rules smollm2 }llama8b whole8b}
random_model=${RANDOM_MODEL:-/tmp/llama-3.1-8b-random}
mkdir -p "$out"
if [ -z "$model" ] && [[ " $parts " =~ \ (check|rules|smollm2)\  ]]; then
  echo "gpu_service.sh: the parts check, rules and smollm2 need MODEL and IDS" >&2
  exit 2
fi
torch=$("$python" -c 'import torch; print(torch.__path__[0])') || exit 1
libraries=$dir/lib:$torch/lib
for folder in "$(dirname "$torch")"/nvidia/*/lib; do libraries+=:$folder; done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
failed=0

# with_server FLAGS... -- COMMAND...: COMMAND with $server and $metrics, the addresses of a server of its own.
with_server() {
  local flags=()
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  shift
  "$dir/bin/vsprefill-server" --listen 127.0.0.1:0 --metrics_listen 127.0.0.1:0 "${flags[@]}" >"$out/server.out" 2>>"$out/server.log" &
  local pid=$!
  for _ in $(seq 300); do
    server=$(sed -n 's/^listening on //p' "$out/server.out")
    metrics=$(sed -n 's/^metrics on //p' "$out/server.out")
    if [ -n "$server" ] || ! kill -0 $pid 2>/dev/null; then break; fi
    sleep 0.2
  done
  "$@" || failed=1
  kill $pid
  wait $pid
}

# What is compared runs as it selects, also where dense would be faster (docs/methods.md, "Dense fallback").
sparse=(--set dense_fallback=0)

# shellcheck disable=SC2329  # called through with_server
dumps() {
  for method in dense vsprefill; do
    "$dir/bin/vsprefill" prefill --server "$server" --ids "$ids" --method "$method" --stripes 2 \
      --dump "$out/$1.$method.safetensors" || return 1
  done
}

# shellcheck disable=SC2329  # called through with_server
decode() {
  for method in dense vsprefill; do
    "$dir/bin/vsprefill-decode" --model "$model" --prefill "$server" --ids "$ids" --method "$method" --max_new_tokens 48 \
      --device "$1" --dtype "$2" || return 1
  done
}

# compare DTYPE: $model on GPU and CPU: KV dumps against each other, tokens printed beside each other.
compare() {
  for device in cuda cpu; do
    echo "== $device, $1, 1,000-token chunks"
    with_server --model "$model" --device $device --dtype "$1" --chunk_tokens 1000 "${sparse[@]}" -- dumps $device
    echo "== $device, $1, 2,048-token chunks: tokens"
    with_server --model "$model" --device $device --dtype "$1" "${sparse[@]}" -- decode $device "$1"
  done
  for method in dense vsprefill; do
    echo "== $method: KV of the GPU against the CPU's"
    "$python" bench/compare_kv.py "$out/cuda.$method.safetensors" "$out/cpu.$method.safetensors" --min_cosine 0.99 || failed=1
  done
  rm -f "$out"/*.safetensors
}

# rules: the fall-back to dense attention by length, and the recall probe: what a request's summary and the metrics say.
# shellcheck disable=SC2329  # called through with_server
rules() {
  for tokens in 4000 6000 8000; do
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[:int(sys.argv[2])])' "$ids" "$tokens" |
      "$dir/bin/vsprefill" prefill --server "$server" --ids - --preset balanced --json >"$out/rules.$tokens.json" || return 1
  done
  sleep 1 # the probe comes after its request
  "$python" bench/check_rules.py "$model" "$metrics" "$out"/rules.*.json
}

# make_random_model SHAPE DIR: makes it unless it is there.
make_random_model() {
  if [ ! -f "$2/indexer.safetensors" ]; then
    "$python" bench/make_random_model.py --shape "$1" --out "$2" || exit 1
  fi
}

if [[ " $parts " == *" smoke "* ]]; then
  tiny=$(mktemp -d)
  make_random_model tiny "$tiny"
  "$python" -c 'import json, random; print(json.dumps(random.Random(1).choices(range(1000), k=3000)))' >"$tiny/ids.json"
  for dtype in fp32 bf16; do
    model=$tiny ids=$tiny/ids.json compare $dtype
  done
  rm -rf "$tiny"
fi
if [[ " $parts " == *" check "* ]]; then compare bf16; fi
if [[ " $parts " == *" rules "* ]]; then
  echo "== SmolLM2-135M, bf16, GPU: fall-back to dense attention, recall probe"
  with_server --model "$model" --device cuda --recall_probe_every 1 -- rules
fi
if [[ " $parts " == *" smollm2 "* ]]; then
  echo "== SmolLM2-135M, bf16, GPU"
  "$python" bench/service_bench.py --bin "$dir/bin" --model "$model" --ids "$ids" --methods dense,vsprefill \
    --json "$out/service_smollm2.json" -- --device cuda "${sparse[@]}" || failed=1
fi
# The budget of VSPrefill is forced to 5 % density: random weights give the indexer nothing to find.
forced=vsprefill:threshold=0:max_density=0.05
# llama8b NAME LENGTHS STRIPES CHUNK_TOKENS
llama8b() {
  make_random_model llama-3.1-8b "$random_model"
  echo "== Llama-3.1-8B shape, random weights, bf16, GPU, chunks of $4 tokens; VSPrefill's budget forced to 5 % density"
  "$python" bench/service_bench.py --bin "$dir/bin" --model "$random_model" --lengths "$2" --stripes "$3" --repeats 1 \
    --methods "dense,$forced" --json "$out/service_$1.json" --server_log "$out/service_$1.log" \
    -- --device cuda --kv_pool_bytes 24GiB --chunk_tokens "$4" "${sparse[@]}" || failed=1
}
if [[ " $parts " == *" llama8b "* ]]; then llama8b llama8b 8192,32768,131072 1,4 8192; fi
# Whole prompts: the library's fastest dense attention (cuDNN) serves only those.
if [[ " $parts " == *" whole8b "* ]]; then llama8b whole8b 131072 4 131072; fi
exit $failed

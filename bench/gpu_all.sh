#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the CUDA tests, compute-sanitizer on a reduced set of
# them, and the kernel benchmark. Prints a short table last; logs go to $OUT (default gpu_out).
#
#   bench/gpu_all.sh [DIR [MODEL IDS]]     DIR: bin/ and lib/ from bench/pack_gpu.sh, or a build folder;
#                                          MODEL, IDS: a model with indexer and a prompt, for bench/gpu_service.sh
#
# Libraries of torch and CUDA are those of the python3 (or $PYTHON) that can import torch.
# STEPS="tests base memcheck racecheck synccheck bench torch ratios service" picks steps. Exit code 0: all that ran passed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
dir=${1:-.carry}
out=${OUT:-gpu_out}
python=${PYTHON:-python3}
steps=${STEPS:-tests base memcheck racecheck synccheck bench torch ratios service}
mkdir -p "$out"

torch=$("$python" -c 'import torch; print(torch.__path__[0])') || {
  echo "gpu_all.sh: $python cannot import torch" >&2
  exit 1
}
libraries=$dir/lib:$torch/lib
for folder in "$(dirname "$torch")"/nvidia/*/lib; do libraries+=:$folder; done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

find_program_in() {
  for folder in bin tests; do
    if [[ -x $dir/$folder/$1 ]]; then
      echo "$dir/$folder/$1"
      return
    fi
  done
}
tests=$(find_program_in cuda_kernels_test)
base=$(find_program_in base_cuda_test)
bench=$(find_program_in kernel_bench)
sanitizer=$(command -v compute-sanitizer)
for candidate in /usr/local/cuda*/bin/compute-sanitizer; do
  if [[ -z $sanitizer && -x $candidate ]]; then sanitizer=$candidate; fi
done

rows=()
failed=0
# step NAME PROGRAM COMMAND...: runs one step with its own log.
step() {
  local name=$1 program=$2
  shift 2
  if [[ " $steps " != *" $name "* ]]; then return; fi
  if [[ -z $program ]]; then
    rows+=("$name|NOT RUN|no such program here")
    return
  fi
  local begin=$SECONDS code=0
  timeout 560 "$@" >"$out/$name.log" 2>&1 || code=$?
  local note
  note=$(grep -E "^\[  (PASSED|FAILED)  \] [0-9]+ tests?|ERROR SUMMARY|RACECHECK SUMMARY|SKIPPED" \
    "$out/$name.log" | tr '\n' ' ')
  case $code in
    0) rows+=("$name|passed|$((SECONDS - begin)) s $note") ;;
    77) rows+=("$name|SKIPPED|$note") ;;
    *)
      failed=1
      rows+=("$name|FAILED ($code)|$((SECONDS - begin)) s $note")
      grep -E "Failure|^\[  FAILED  \]|error|Error|Invalid|hazard" "$out/$name.log" | head -40
      ;;
  esac
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader || true
step tests "$tests" "$tests" --gtest_brief=1
step base "$base" "$base" --gtest_brief=1
small=(--gtest_filter='*Small*' --gtest_brief=1)
step memcheck "${tests:+$sanitizer}" "$sanitizer" --tool memcheck --error-exitcode 9 "$tests" "${small[@]}"
step racecheck "${tests:+$sanitizer}" "$sanitizer" --tool racecheck --error-exitcode 9 "$tests" "${small[@]}"
step synccheck "${tests:+$sanitizer}" "$sanitizer" --tool synccheck --error-exitcode 9 "$tests" "${small[@]}"
step bench "$bench" "$bench" --json "$out/kernel_bench.json"
step torch "$python" "$python" bench/torch_reference.py --json "$out/torch_reference.json"
step ratios "$python" "$python" bench/kernel_ratios.py "$out/kernel_bench.json" "$out/torch_reference.json" \
  --json "$out/kernel_ratios.json"
step service "$(find_program_in vsprefill-server)" env OUT="$out" bench/gpu_service.sh "$dir" "${@:2}"
for log in bench torch ratios service; do
  if [[ " $steps " == *" $log "* && -f $out/$log.log ]]; then cat "$out/$log.log"; fi
done

echo
printf '%-10s %-12s %s\n' step result notes
for row in "${rows[@]}"; do
  IFS='|' read -r name result note <<<"$row"
  printf '%-10s %-12s %s\n' "$name" "$result" "$note"
done
exit $failed

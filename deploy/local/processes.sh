# shellcheck shell=bash
# Sourced by the demos: the processes that a script has started, and their end.
pids=()

# Ends what stands in `pids`, last words included, and waits for it.
end_processes() {
  local pid
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
}

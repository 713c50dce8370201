#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes and without a network:
#
#   benchmarks/gpu_check.sh RESULTS_DIR ["build tests bench sanitizer"]
#
# The stages together may need more than that. The sanitizer's is best called last and alone, on the
# same machine, where it finds the Triton kernels compiled. A stage that fails or runs out of time is
# reported and does not stop the others; the exit status is then 1. `build` installs into
# build/gpu_site, where later calls with other stages find it.
# PYTHON names the interpreter (python3): one with torch, triton, pytest, scipy, hypothesis,
# setuptools, pybind11 and ninja.
set -uo pipefail

results=$(mkdir -p "${1:?usage: gpu_check.sh RESULTS_DIR [STAGES]}" && cd "$1" && pwd)
stages=${2:-build tests bench sanitizer}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1
root=$PWD
site=$root/build/gpu_site
limit=570 # seconds for everything
export PYTHONUNBUFFERED=1 PYTHONPATH=$site OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
failed=()
summary=$results/summary.txt
: >"$summary"

# step NAME SECONDS LOG COMMAND...: runs it, appends its words to the log, shows the end of them.
step() {
  local name=$1 seconds=$2 log=$results/$3 start=$SECONDS status
  shift 3
  local left=$((limit - SECONDS))
  ((seconds = seconds < left ? seconds : left))
  if ((seconds < 5)); then
    status="no time left"
  else
    printf '\n==== %s: %s\n' "$name" "$*" | tee -a "$log"
    # Interrupted, pytest still prints the failures it has seen.
    timeout --signal=INT --kill-after=15 "$seconds" "$@" >"$results/part" 2>&1
    status=$?
    tail -c 2000000 "$results/part" >>"$log"
    tail -n 25 "$results/part"
    rm -f "$results/part"
  fi
  case $status in
    0) status=passed ;;
    124 | 137) status="ran longer than $seconds s" ;;
    [0-9]*) status="failed ($status)" ;;
  esac
  [[ $status == passed ]] || failed+=("$name")
  printf '%-28s %s, %d s\n' "$name" "$status" $((SECONDS - start)) >>"$summary"
}

wanted() { [[ " $stages " == *" $1 "* ]]; }

environment() {
  nvidia-smi
  nvcc --version | tail -n 2
  nproc
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pybind11|ninja|setuptools|pytest)[ -]'
}

# Both GPU backends must be able to run, or tests would be skipped without a word.
both_run() {
  cd "$root/tests" && "$python" -m rbm_kernels | tee "$results/part.info" &&
    grep -q '^  cuda: can run$' "$results/part.info" &&
    grep -q '^  triton: can run$' "$results/part.info"
}

build() {
  # The architecture of this GPU alone: half the time to compile.
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
  rm -rf "$site"
  RBM_KERNELS_CPU=1 RBM_KERNELS_CUDA=1 RBM_KERNELS_CUDA_ARCHS=$arch \
    "$python" -m pip install --verbose --no-index --no-build-isolation --no-deps --target "$site" .
}

# From tests/, so that the package that was installed is what is imported.
# A kernel that fails for good fails every test after it, hence --maxfail; a hang shows its place.
run_pytest() {
  cd "$root/tests" && "$python" -m pytest -q -rs -p no:cacheprovider --tb=short --maxfail=25 \
    -o faulthandler_timeout=90 "$@"
}

sanitize() {
  local tool=$1 backend=$2 options=()
  # Libraries probe the driver with calls that fail; those that matter raise in Python.
  [[ $tool == memcheck ]] && options=(--report-api-errors no)
  cd "$root/tests" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
    "${options[@]}" --error-exitcode 9 \
    "$python" "$root/benchmarks/gpu_small_cases.py" "$backend"
}

bench() { cd "$root/tests" && "$python" "$root/benchmarks/bench_gpu.py" "$results"; }

export -f environment both_run build run_pytest sanitize bench
export python root site results

step environment 30 environment.txt bash -c environment
if wanted build; then
  step build 200 build.log bash -c build
fi
step "both backends can run" 60 environment.txt bash -c both_run
rm -f "$results/part.info"
if wanted tests; then
  # First, as its processes compile Triton kernels side by side and leave them in Triton's cache.
  parallel=()
  "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
  step "tests of the operations" 180 tests.log env OMP_NUM_THREADS=2 \
    bash -c 'run_pytest "$@"' tests ops backends/test_bitwise.py -k "cuda or triton" "${parallel[@]}"
  step "tests of the GPU" 330 tests.log \
    bash -c 'run_pytest "$@"' tests backends/test_gpu.py backends/test_select.py backends/test_cuda.py --durations=10
fi
if wanted bench; then
  step bench 400 bench.log bash -c bench
fi
if wanted sanitizer; then
  # Racecheck watches shared memory, which in Triton's kernels is the compiler's affair.
  for check in "memcheck cuda" "racecheck cuda" "memcheck triton"; do
    read -r tool backend <<<"$check"
    step "$tool of $backend" 180 sanitizer.log bash -c 'sanitize "$@"' sanitize "$tool" "$backend"
  done
fi

printf '\n'
cat "$summary"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[*]}"
  exit 1
fi

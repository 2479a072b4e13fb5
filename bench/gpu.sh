#!/usr/bin/env bash
# Turns a machine with a CUDA device into evidence, without a network, in eight minutes with the build: builds in place, runs the
# GPU tests, the benches, compute-sanitizer on small inputs and Nsight Compute; leaves a CSV and logs, and ends its output with
# every goal, what was measured and the verdict.
#
#   bench/gpu.sh [--dry-run] [--quick] [--only STAGE] [--output DIR] [--seconds N]
#
#   --dry-run     for machines without a GPU: compiles the CUDA core (where nvcc is), lists what would be tested and timed
#   --quick       without inputs beyond 2^31 elements, torch.compile's baselines, and with fewer rounds
#   --only STAGE  build, tests, bench, sanitizer or profile; may be given more than once
#   --output DIR  where the CSV and the logs go (default: $OUT, else bench/data for the CSV and build/gpu for the logs)
#   --seconds N   time for everything (default 470). The build takes up to 180 s of it whatever N is, and a build that fails ends
#                 the run; the other stages share what is left, and one that fails stops no other
#
# Needs nvcc, a C++17 compiler, and a Python (PYTHON, .venv's or python3) with torch, Triton, pybind11, CMake, Ninja, pytest,
# hypothesis, mpmath, rich. FASTPOST_COMMIT names the commit in the CSV where git cannot. Exit status: how many stages failed.
# shellcheck disable=SC2329  # stages are called by their names
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
begun=$SECONDS

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() { echo "gpu.sh: $1" >&2; exit 2; }

dry='' quick='' only='' output=${OUT:-} total=470
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --quick) quick=1 ;;
    --only | --output | --seconds)
      [[ -n ${2:-} ]] || die "$1 needs a value"
      case $1 in
        --only) [[ $2 =~ ^(build|tests|bench|sanitizer|profile)$ ]] || die "--only: build, tests, bench, sanitizer or profile, not $2"
          only+=" $2 " ;;
        --output) output=$2 ;;
        --seconds) [[ $2 =~ ^[0-9]+$ ]] || die "--seconds: a whole number, not $2"
          total=$2 ;;
      esac
      shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $1; --help shows all" ;;
  esac
  shift
done

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=$(command -v python3 || true)
  [[ -x .venv/bin/python ]] && python=$root/.venv/bin/python
fi
[[ -n $python ]] || die "no Python found; set PYTHON"
PATH="$(dirname "$python"):$PATH:/usr/local/cuda/bin"
unset FASTPOST_BACKEND FASTPOST_GPU_TESTS TRITON_INTERPRET

scratch=''
if [[ -n $dry ]]; then
  work=$(mktemp -d) && scratch=$work
  export TMPDIR=$work # torch leaves a folder there
  trap 'rm -rf "$scratch"' EXIT
else
  work=$root/build/gpu
fi
logs=${output:-$work} data=${output:-$root/bench/data}
mkdir -p "$work" "$logs"
touch "$work/begun"
tests=(tests/test_gpu_*.py)

# The package as an editable install would lay it out, for a Python in which it is not installed: bench/ and triton_kernels/ lie
# outside fastpost/. Another tree's installation must not stand in for it.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$work/triton # what one stage has compiled, the next ones find
here="import fastpost.bench as b, fastpost.triton_kernels as t
assert [*b.__path__, *t.__path__] == ['$root/bench', '$root/triton_kernels']"
if ! (cd / && "$python" -c "$here") 2>/dev/null; then
  mkdir -p "$work/site"
  cat >"$work/site/sitecustomize.py" <<PY
import importlib.util, pathlib, sys


class Outside:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, folder = name.partition(".")
        if package == "fastpost" and folder in ("bench", "triton_kernels"):
            here = pathlib.Path(r"$root") / folder
            return importlib.util.spec_from_file_location(
                name, here / "__init__.py", submodule_search_locations=[str(here)]
            )


sys.meta_path.insert(0, Outside)
PY
  PYTHONPATH="$work/site:$PYTHONPATH"
  (cd / && "$python" -c "$here") || die "fastpost's own bench/ and triton_kernels/ cannot be imported"
fi

# What nvidia-smi says of the first GPU, or nothing.
gpu_query() { { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null || true; } | head -n 1; }

# -- stages, called by their names ------------------------------------------------------------------------------------------

build() {
  local archs version target=install
  archs=$(gpu_query compute_cap | tr -d .)
  archs=${FASTPOST_CUDA_ARCHS:-${archs:-90}-real}
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
  if [[ -n $dry ]]; then
    target=fastpost_cuda
    if ! command -v nvcc >/dev/null; then
      echo "no nvcc here; on a GPU machine this would compile csrc/ for $archs"
      return 0
    fi
  fi
  cmake -G Ninja -S "$root" -B "$work/cmake" -DCMAKE_INSTALL_PREFIX="$root/fastpost" -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DFASTPOST_VERSION="$version" -DFASTPOST_CUDA=1 \
    -DFASTPOST_CUDA_ARCHS="$archs"
  cmake --build "$work/cmake" --target "$target"
  [[ -n $dry ]] && return 0
  "$python" - <<'PY'
import sys
import fastpost, torch
found = fastpost.backends()
for name, status in found.items():
    print(f"{name}: {'available' if status.available else 'MISSING'}: {status.reason}")
sys.exit(0 if torch.cuda.is_available() and found["cuda"].available and found["triton"].available else "a backend is missing")
PY
}

has() { "$python" -c "import $1" 2>/dev/null; }

tests() {
  local options=(-o addopts= -q -rfEs --tb=short --durations=15 -p no:cacheprovider)
  [[ -n $quick ]] && options+=(-k 'not 32_bits')
  if [[ -n $dry ]]; then
    "$python" -m pytest --collect-only "${options[@]}" "${tests[@]}" |
      awk -F:: '/::/ {n[$1]++} END {for (f in n) print f ": " n[f] " tests"}' | sort
    return
  fi
  "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch sees no CUDA device")'
  has pytest_timeout && options+=(--timeout=150)
  if has xdist; then
    local workers
    workers=$(nproc)
    options+=(-n "$((workers > 8 ? 8 : workers))" --dist worksteal)
  fi
  OMP_NUM_THREADS=2 "$python" -m pytest "${options[@]}" "${tests[@]}"
}

# One line per run: a tool, what it runs, the exit status expected. Planted defects must be found.
checks=('memcheck cuda 0' 'memcheck triton 0' 'racecheck cuda 0' 'initcheck cuda 0' 'synccheck cuda 0'
  'memcheck overrun 86' 'initcheck unwritten 86')

check() {
  local tool=$1 what=$2 expected=$3 help options status=0
  help=$(compute-sanitizer --help)
  options=(--tool "$tool" --error-exitcode 86 --print-limit "$([[ $tool == initcheck ]] && echo 20000 || echo 20)")
  [[ $tool == memcheck ]] && options+=(--report-api-errors no)
  # The other tools look at our own kernels only: torch's are slow to instrument and not the matter here.
  if [[ $tool != memcheck ]]; then
    if grep -q -- '--kernel-name ' <<<"$help"; then
      options+=(--kernel-name kernel_substring=fastpost)
    elif grep -q -- '--kernel-regex ' <<<"$help"; then
      options+=(--kernel-regex kns=fastpost)
    fi
  fi
  # Inputs are begun for half of the time; the last one and the tool's own work have the other half.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 \
    timeout -k 5 "$((limit > 16 ? limit - 8 : 8))" compute-sanitizer "${options[@]}" "$python" -m tests.gpu_sanitize "$what" \
    "$((limit / 2))" >"$work/$tool-$what.log" 2>&1 || status=$?
  if [[ $tool == initcheck ]] && ((status == 0 || status == 86)); then
    "$python" -m tests.gpu_sanitize judge "$work/$tool-$what.log" >"$work/$tool-$what.verdict" && status=0 || status=$?
    cat "$work/$tool-$what.verdict" >>"$work/$tool-$what.log"
  fi
  if ((status == expected)); then
    echo "ok      $tool on $what$( ((expected)) && echo ' (a planted defect, found)')"
  else
    echo "FAILED  $tool on $what: exit status $status, expected $expected"
  fi
}

sanitizer() {
  local entry
  if [[ -n $dry ]]; then
    for entry in "${checks[@]}"; do
      read -r tool what expected <<<"$entry"
      echo "compute-sanitizer --tool $tool: python -m tests.gpu_sanitize $what, expected exit status $expected"
    done
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer was not found" && return 1; }
  for entry in "${checks[@]}"; do
    # shellcheck disable=SC2086
    check $entry &
  done | tee "$work/checks.txt"
  wait
  for entry in "${checks[@]}"; do
    read -r tool what _ <<<"$entry"
    printf '\n== %s on %s\n' "$tool" "$what"
    cat "$work/$tool-$what.log"
  done
  ! grep -q FAILED "$work/checks.txt" && (($(wc -l <"$work/checks.txt") == ${#checks[@]}))
}

csv_file() { echo "$data/$(tr '[:upper:] ' '[:lower:]-' <<<"$gpu").csv"; }

bench() {
  local names=() options=(--device cuda)
  if [[ -n $quick ]]; then
    options+=(--repeats 7)
    mapfile -t names < <("$python" -m fastpost bench --list --device cuda | awk '!/compiled/ && !/cases, about/ {print $1}')
  fi
  if [[ -n $dry ]]; then
    "$python" -m fastpost bench --list "${options[@]}" "${names[@]}"
    return
  fi
  COLUMNS=140 "$python" -m fastpost bench "${options[@]}" --seconds "$((limit > 40 ? limit - 25 : 15))" --output "$(csv_file)" \
    "${names[@]}"
}

# What Nsight Compute says of our kernels at the sizes of the bench: time alone, share of the memory's peak, instructions.
profiled=(kl_train_128256_float32 kl_train_128256_bfloat16 linear_r3f_gpt2 sam_llama_bfloat16 perturb_flat_bfloat16
  restore_adamw_bfloat16 add_noise_bfloat16 distillation_rows_128256_forward_kl distillation_rows_128256_js top_k_rows_bfloat16
  masters)
metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,smsp__inst_executed.sum
metrics+=,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active

profile() {
  if [[ -n $dry ]]; then
    echo "ncu --metrics $metrics: python -m fastpost.bench.profiled ${profiled[*]}"
    return
  fi
  command -v ncu >/dev/null || { echo "ncu was not found" && return 1; }
  # The clocks belong to the machine: they are measured as they are found.
  ncu --clock-control none --csv --page raw --metrics "$metrics" --profile-from-start off --kernel-name-base demangled --kernel-name regex:fastpost \
    --log-file "$logs/profile.csv" "$python" -m fastpost.bench.profiled "${profiled[@]}" || return
  grep -c fastpost "$logs/profile.csv"
}

# -- running them -------------------------------------------------------------------------------------------------------------

failed=0 table='' spent=''

# stage NAME CAP SHARE: runs it in a process group of its own, for at most CAP seconds and SHARE percent of what is left.
stage() {
  local name=$1 cap=$2 share=$3 status=0 start=$SECONDS verdict
  [[ -z $only || $only == *" $name "* ]] || return 0
  limit=$(((total - (SECONDS - begun)) * share / 100))
  if [[ $name == build ]]; then
    limit=$cap
  elif [[ -n $spent ]] || ((limit < 2)); then
    failed=$((failed + 1))
    table+=$(printf '%-10s %-24s %4d s  %s' "$name" "not run: ${spent:-no time left}" 0 -)$'\n'
    return 0
  fi
  ((limit > cap)) && limit=$cap
  echo "== $name (at most $limit s)"
  set -m
  ("$name") >"$logs/$name.log" 2>&1 &
  local job=$!
  set +m
  while kill -0 "$job" 2>/dev/null && ((SECONDS - start < limit)); do sleep 0.2; done
  if kill -0 "$job" 2>/dev/null; then
    kill -TERM -- "-$job" 2>/dev/null || true
    sleep 3
    kill -KILL -- "-$job" 2>/dev/null || true
    wait "$job" 2>/dev/null || true
    status=124 verdict="TIMED OUT after $limit s"
  else
    wait "$job" || status=$?
    verdict=$( ((status)) && echo "FAILED with status $status" || echo ok)
  fi
  if [[ -n $dry ]]; then
    cat "$logs/$name.log"
  else
    show "$name" "$status"
  fi
  ((status)) && failed=$((failed + 1))
  [[ $name == build && $status != 0 ]] && spent='the build failed'
  table+=$(printf '%-10s %-24s %4d s  %s' "$name" "$verdict" "$((SECONDS - start))" "$logs/$name.log")$'\n'
}

# What of a log belongs in the output: all of a short one's end, more where something went wrong.
show() {
  case $1 in
    sanitizer) grep -E '^(ok|FAILED) ' "$logs/$1.log" || tail -n 5 "$logs/$1.log" ;;
    profile) tail -n 8 "$logs/$1.log" | cut -c -200 ;;
    tests) tail -n "$(($2 ? 40 : 6))" "$logs/$1.log" | cut -c -200 ;;
    bench) grep -E '^(hit|MISS) |goals hit|^Cases|failed:|skipped:|not run' "$logs/$1.log" || tail -n 20 "$logs/$1.log" ;;
    *) tail -n "$(($2 ? 30 : 5))" "$logs/$1.log" | cut -c -200 ;;
  esac
}

gpu=$(gpu_query name)
echo "fastpost on ${gpu:-no GPU}, driver $(gpu_query driver_version), $("$python" -c \
  'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')"
stage build 180 100
stage tests 130 40
stage bench 300 72
stage sanitizer 90 70
stage profile 90 95
echo
{
  if [[ -z $dry ]]; then
    measured=$(csv_file)
    [[ $measured -nt $work/begun ]] || measured='' # another run's
    "$python" -m fastpost.bench.goals ${measured:+"$measured"} || true
    echo
  fi
  echo "$table"
} | tee "$logs/summary.txt"
if [[ -n $dry ]]; then
  echo "A dry run: nothing ran on a GPU, nothing was installed. On a GPU machine all this takes at most $total s."
else
  echo "$failed stages failed. CSV in $data, logs in $logs."
fi
exit "$failed"

#!/usr/bin/env bash
# Tests and benchmarks for a machine with a GPU, the most important first.
#
#   benchmarks/gpu.sh FOLDER [SECONDS [OPTION ...]]
#
# Everything ends within SECONDS (400). FOLDER gets tests.txt, the output of each group of parts, and results.tar with
# the JSON files; each is there as soon as its group ends. The table of all figures is printed last. Options are those of
# `python -m benchmarks.gpu`: `--device cpu --small` tries the whole script without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
out=$(realpath "$1"); total=${2:-400}; shift; shift || true
results=$(mktemp -d); python=${PYTHON:-python3}
export PYTHONPATH="${PYTHONPATH:-src}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
[[ " $* " == *" cpu "* ]] && export OPENBLIP_TEST_DEVICE=cpu

# limited SECONDS COMMAND...: never beyond the whole time, less five seconds for the table.
limited() {
  local left=$((total - SECONDS - 5)) limit=$1
  shift
  ((left < limit)) && limit=$left
  ((limit < 10)) && { echo "no time is left for: $*"; return; }
  timeout "$limit" "$@"
}

# parts NAME SECONDS PART...: one process, whose output is NAME.txt.
parts() {
  local name=$1 limit=$2
  shift 2
  limited "$limit" "$python" -m benchmarks.gpu "$@" --results "$results" "${options[@]}" >"$out/$name.txt" 2>&1
  tar cf "$out/results.tar" -C "$results" .
  grep -E "^(===|SKIPPED|FAILED|no time)" "$out/$name.txt"
  echo "$name ended after $SECONDS s"
}
options=("$@")

# The models that the benchmarks read are written meanwhile.
"$python" -c "from benchmarks import blip_base; blip_base.captioner_folder(), blip_base.filter_folder()" &
OMP_NUM_THREADS=1 limited 80 "$python" -m pytest -n "${TEST_PROCESSES:-8}" -p no:cacheprovider tests/cuda \
  --tb=short --durations=8 >"$out/tests.txt" 2>&1
grep -E "^(FAILED|ERROR)|passed|failed|no time" "$out/tests.txt" | cut -c1-200 | tail -25
echo "tests ended after $SECONDS s"
wait

parts inference 120 greedy encoder nucleus gaps
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True parts training 110 training training-large
parts commands 75 commands
parts rest 180 stage1 beam matching encoding blip2 compiled
"$python" -m benchmarks.gpu --table --results "$results" 2>&1 | cut -c1-400 | tee "$out/table.txt"

#!/usr/bin/env bash
# What only a GPU can show, the most telling first: parity and speed in eight minutes, then training.
# Each result is in runs/results/gpu as soon as it is there, and is not made again: after a cut the script goes on.
#
#     bash runs/gpu.sh                    # on a machine with one GPU
#     bash runs/gpu.sh --device cpu       # a rehearsal in a few minutes, with tiny sizes
#     ... --out FOLDER                    # elsewhere
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda out=runs/results/gpu
while [ $# -gt 1 ]; do
  case $1 in --device) device=$2 ;; --out) out=$2 ;; *) break ;; esac
  shift 2
done
[ $# -eq 0 ] || { echo "runs/gpu.sh: what is $1? See its first lines" >&2; exit 2; }
mkdir -p "$out"
export TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) # a cache of its own: a compiler that is cut off leaves half a file
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT

keep() { # SECONDS NAME COMMAND...: what the command prints, as NAME.txt; of one that fails or takes longer as NAME.failed
  local limit=$1 file=$out/$2
  shift 2
  [ -e "$file.txt" ] && return
  echo "$(date +%T)  $*"
  timeout "$limit" "$@" > "$file.failed" 2>&1 && mv "$file.failed" "$file.txt"
}

if [ "$device" = cuda ]; then # speeds of training are those between the last two evaluations of eval.csv
  steps=(--learning-starts 3000 --eval-every 3000 --total-timesteps 6000)
  few=(--learning-starts 1000 --eval-every 1000 --total-timesteps 2000)
  task=mamujoco_ant_2x4 speed=(--turns 5) tests=(-m "slow or not slow" -k "not rehearsal") training=(gpu --jobs 4)
  keep 20 machine nvidia-smi
else
  steps=(--learning-starts 800 --eval-every 800 --total-timesteps 1600) few=("${steps[@]}")
  task=mpe_simple speed=(--turns 1 --tables update --device cpu) tests=(-k graphed) training=(smoke --jobs 2 --seeds 1)
fi
train=(python omad.py --env-id $task --device "$device" --eval-episodes 1)
keep 220 parity python -m pytest -q tests/test_gpu.py "${tests[@]}"
table() { # NAME FLAGS...
  keep 80 "speed_$1" python runs/speed.py "${@:2}" --output "$out/speed_$1.csv" "${speed[@]}"
}
table omad --programs omad --env-id $task
table dom2_spread --programs dom2 --dataset omar_simple_spread-medium
table dom2_halfcheetah_2x3 --programs dom2 --dataset omar_halfcheetah_2x3-medium
keep 60 graph "${train[@]}" "${steps[@]}" --run-dir "$out/graph"
for seed in 1 2 3 4; do # side by side
  keep 120 four_$seed "${train[@]}" "${steps[@]}" --run-dir "$out/four" --seed $seed &
done
wait
keep 300 compiled "${train[@]}" "${steps[@]}" --run-dir "$out/compiled" --compile
keep 120 eager "${train[@]}" "${few[@]}" --run-dir "$out/eager" --no-cuda-graph
keep 86400 training python runs/campaign.py "${training[@]}" --results "$out/training"
! ls "$out"/*.failed 2> /dev/null

#!/usr/bin/env bash
# The results on mpe_simple_spread shown in README.md: three and a half hours of one core; on two, run parts side by side.
#   bash runs/simple_spread.sh default     three seeds of the default command, and the Gaussian ablation beside them
#   bash runs/simple_spread.sh ablations   at batch 128: target networks, two of the paper's values, what they compare with
#   bash runs/simple_spread.sh long        the longer run
#   bash runs/simple_spread.sh fresh       every run's final policy on 1000 episodes with start states it never saw
# Then: python runs/summary.py
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
run() { python omad.py --env-id mpe_simple_spread --run-dir "runs/results/$1" "${@:2}"; }
smaller() { run "$1" --batch-size 128 --total-timesteps 120000 "${@:2}"; }
case "${1:-}" in
  default) for seed in 1 2 3; do run omad --seed $seed; run omad_gaussian --seed $seed --policy gaussian; done ;;
  ablations)
    for seed in 1 2; do smaller omad_target_networks --seed $seed --target-networks; done
    smaller omad_lr_3e-4 --policy-lr 3e-4 --q-lr 3e-4
    smaller omad_alpha_1 --alpha 1.0
    for seed in 1 2 3; do smaller omad_batch_128 --seed $seed; done
    for seed in 1 2 3; do smaller omad_gaussian_batch_128 --seed $seed --policy gaussian; done
    run omad_batch_128_long --batch-size 128 --total-timesteps 900000 --eval-every 30000 ;;
  long) run omad_long --total-timesteps 700000 --eval-every 50000 --eval-episodes 400 ;;
  fresh)
    for policy in runs/results/omad*/*/policy.pt; do
      python omad.py --evaluate "$(dirname "$policy")" --seed 1000 --eval-episodes 1000 > "$policy.txt"
      mv "$policy.txt" "$(dirname "$policy")/fresh.txt"
    done ;;
  *) sed -n 2,7p runs/simple_spread.sh; exit 2 ;;
esac

#!/usr/bin/env bash
# The results on Multi-Agent MuJoCo shown in README.md: the small variant, one core per run; on two, two parts side by side.
#   bash runs/mamujoco.sh halfcheetah      OMAD on HalfCheetah 2x3, seeds 1 and 2, and the Gaussian ablation (2.5 hours)
#   bash runs/mamujoco.sh ant              the same on Ant 2x4 (4 hours)
#   bash runs/mamujoco.sh walker2d         the same on Walker2d 2x3 (4 hours)
#   bash runs/mamujoco.sh fresh            every run's final policy on 50 episodes with start states it never saw in training
# Then: python runs/summary.py; python runs/coverage.py runs/results/ant_2x4_*/*
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
small="--policy-hidden 128 --critic-hidden 256 --updates-per-step 1 --policy-lr 1e-3 --q-lr 1e-3 --alpha 0.1 --eval-every 5000"
both() {  # task, steps, more flags
  for seed in 1 2; do
    for policy in diffusion gaussian; do
      name=${1}_omad$([ $policy = diffusion ] || echo _gaussian)
      python omad.py --env-id "mamujoco_$1" $small --total-timesteps "$2" --seed $seed --policy $policy \
        --run-dir "runs/results/$name" "${@:3}"
    done
  done
}
again() { python omad.py --evaluate "$1" --seed 1000 --eval-episodes 50 "${@:2}"; }
case "${1:-}" in
  halfcheetah) both halfcheetah_2x3 90000 --v-min -1000 --v-max 1000 ;;  # enough for the returns it reaches on a CPU
  ant) both ant_2x4 120000 ;;
  walker2d) both walker2d_2x3 135000 ;;
  fresh)
    for policy in runs/results/{halfcheetah,ant,walker2d}_*/*/policy.pt; do
      again "$(dirname "$policy")" > "$policy.txt"
      mv "$policy.txt" "$(dirname "$policy")/fresh.txt"
    done
    for policy in runs/results/halfcheetah_2x3_omad/*/policy.pt; do  # the same with fewer denoising steps than trained
      for steps in 8 4 2 1; do again "$(dirname "$policy")" --denoising-steps $steps; done > "$policy.txt"
      mv "$policy.txt" "$(dirname "$policy")/steps.txt"
    done ;;
  *) sed -n 2,7p runs/mamujoco.sh; exit 2 ;;
esac

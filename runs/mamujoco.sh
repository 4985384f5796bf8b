#!/usr/bin/env bash
# The results on Multi-Agent MuJoCo shown in README.md: the small variant, one core per run; on two, run two parts side by side.
#   bash runs/mamujoco.sh halfcheetah      OMAD on HalfCheetah 2x3, seeds 1 and 2, and the Gaussian ablation beside them (2.5 hours)
#   bash runs/mamujoco.sh ant              the same on Ant 2x4 (4 hours)
#   bash runs/mamujoco.sh walker2d         the same on Walker2d 2x3 (4 hours)
#   bash runs/mamujoco.sh fresh            every run's final policy on 50 episodes with start states it never saw in training
# Then: python runs/summary.py; python runs/coverage.py runs/results/ant_2x4_*/*
set -euo pipefail
cd "$(dirname "$0")/.."
both() {
  small=$(python -c "import omad; print(omad.SMALL_HALFCHEETAH if '$1'.startswith('halfcheetah') else omad.SMALL)")
  for seed in 1 2; do
    for policy in diffusion gaussian; do
      python omad.py --env-id "mamujoco_$1" $small --total-timesteps "$2" --seed $seed --policy $policy \
        --run-dir "runs/results/$1_omad$([ $policy = gaussian ] && echo _gaussian || true)"
    done
  done
}
case "${1:-}" in
  halfcheetah) both halfcheetah_2x3 90000 ;;
  ant) both ant_2x4 120000 ;;
  walker2d) both walker2d_2x3 135000 ;;
  fresh)
    shopt -s nullglob
    for checkpoint in runs/results/{halfcheetah,ant,walker2d}_*/*/checkpoint.pt; do
      folder=$(dirname "$checkpoint")
      python omad.py --evaluate "$folder" --seed 1000 --eval-episodes 50 > "$folder/fresh.txt.tmp"
      mv "$folder/fresh.txt.tmp" "$folder/fresh.txt"
    done
    for config in runs/results/halfcheetah_2x3_omad/*/config.json; do  # the same with fewer denoising steps than trained
      folder=$(dirname "$config")
      for steps in 8 4 2 1; do python omad.py --evaluate "$folder" --seed 1000 --eval-episodes 50 --denoising-steps $steps; done > "$folder/steps.txt.tmp"
      mv "$folder/steps.txt.tmp" "$folder/steps.txt"
    done ;;
  *) sed -n 2,7p runs/mamujoco.sh; exit 2 ;;
esac

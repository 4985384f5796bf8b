#!/usr/bin/env bash
# Trains the behaviour policies of datasets/policies/ anew, on one CPU core each, one after the other:
#   bash datasets/policies.sh spread | tag | world | halfcheetah
# A medium policy is the expert's run, ended earlier; on HalfCheetah it is another one, because with ten copies the run stays at 2100.
set -euo pipefail
cd "$(dirname "$0")/.."
keep() {  # task, level, steps, more flags
  folder=$(mktemp -d runs/behaviour.XXXX)
  python omad.py --env-id "omar_$1" --seed 1 --total-timesteps "$3" --run-dir "$folder" "${@:4}"
  python datasets/behaviour.py "$folder"/* --level "$2" ${EPISODES:+--episodes "$EPISODES"}
}
CHAIN="--policy dime --denoising-steps 8 --random-critics"  # the published one
SMALL="$CHAIN --learning-starts 4000"
WIDE="--policy gaussian --random-critics --policy-hidden 128 --critic-hidden 256 --updates-per-step 0.125"
WIDE="$WIDE --target-entropy-scale 8 --learning-starts 4000 --eval-every 40000"
case "${1:-}" in
  spread) keep simple_spread medium 44000 $SMALL; keep simple_spread expert 80000 $SMALL ;;
  tag) keep simple_tag medium 192000 $WIDE; keep simple_tag expert 800000 $WIDE ;;
  world) keep simple_world medium 240000 $WIDE; keep simple_world expert 480000 $WIDE ;;
  halfcheetah)
    EPISODES=200
    keep halfcheetah_2x3 medium 230000 $CHAIN
    keep halfcheetah_2x3 expert 37000 $CHAIN --num-envs 1 --updates-per-step 1 --eval-every 2000 --learning-starts 5000 ;;
  *) sed -n 2,3p datasets/policies.sh; exit 2 ;;
esac

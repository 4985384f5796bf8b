"""Is `common/omar.py` OMAR's environment? Random teams should score what they score there.

    python datasets/port.py --prey-tag simple_tag.pt --prey-world simple_world.pt     # OMAR's pretrained_adv_model.pt

Rows go to runs/results/omar_port.csv. `apart_se`: how far we are from what was measured there, in standard errors of a
difference between two means of 400 episodes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]
from campaign import RESULTS, record
from common.envs import BadInput, make_env
from controllers import play
from scripts import PURSUIT, uniform

THERE = {  # returns of random teams, mean and standard deviation: of OMAR's 40,000 random episodes; measured there
    "omar_simple_spread": (160.0, 60.0, 156.0, 58.0),
    "omar_simple_tag": (-4.1, 10.8, -5.3, 8.8),
    "omar_simple_world": (-6.8, 5.7, -7.1, 5.1),
}
EPISODES, EPISODES_THERE = 40_000, 400


@dataclass(frozen=True)
class Options:
    """Compares random teams with OMAR's environment."""

    prey_tag: str = ""  # OMAR's pretrained_adv_model.pt of simple_tag; without it that task is not compared
    prey_world: str = ""  # that of simple_world


def check(env_id: str, file: str) -> None:
    """Rows of a task."""
    for prey in dict.fromkeys([file, ""]):  # the project's own too, with which nothing there compares
        returns = play(env_id, uniform, EPISODES, 2024, prey=prey)
        mean, std = returns.mean(), returns.std()
        numbers = dict(here_mean=mean, here_std=std)
        if prey or env_id not in PURSUIT:
            numbers |= dict(zip(("data_mean", "data_std", "there_mean", "there_std"), THERE[env_id]))
            there, there_std = THERE[env_id][2:]
            numbers |= dict(apart_se=(mean - there) / np.hypot(std, there_std) * EPISODES_THERE**0.5)
        whose = "omar" if prey else "own" if env_id in PURSUIT else "none"
        record(RESULTS / "omar_port.csv", dict(task=env_id, prey=whose), **numbers)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    options = tyro.cli(Options, args=argv)
    files = {"omar_simple_spread": "", "omar_simple_tag": options.prey_tag, "omar_simple_world": options.prey_world}
    try:
        for env_id, file in files.items():
            make_env(env_id, prey=file)  # says now what is wrong with it
    except BadInput as error:
        print(f"port.py: error: {error}", file=sys.stderr)
        return 2
    for env_id, file in files.items():
        check(env_id, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

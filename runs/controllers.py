"""Returns of controllers that learn nothing: what the returns of policies are held against.

    python runs/controllers.py                                  # all tasks: a minute
    python runs/controllers.py --only mpe_simple_spread         # one

    random          uniform actions; standing still: zeros
    scripted        spread: each agent steers for a landmark of its own, so that their ways are now shortest in total,
                    or always for the same one (fixed assignment). tag, world: for a place of its own around the prey
    straight        tag, world: at the prey, at full force
    ... each        doors_blind: each agent draws among windows of its own
    ... way         omar_simple_spread_6: by the assignment with the shortest way
                    in total, or by one of the ten shortest: the same for all, or each agent draws its own

Scripts see what agents see, but decide for all of them (on omar_simple_spread_6 they know which landmarks are gone).
Start states are those of `--evaluate RUN --seed 1000`. Rows go to runs/results/controllers.csv.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
from campaign import RESULTS, record
from common.envs import evaluate, make_vec, mix_seed
from scripts import BEST, PURSUIT, pursuit, spread, still, uniform, walk, windows

BOTH = {"random": uniform, "standing still": still}
CONTROLLERS = {
    **dict.fromkeys(("mpe_simple_spread", "mpe_simple_spread_n4"), BOTH | {"scripted": spread}),
    "mpe_simple_adversary": BOTH,
    "doors_blind": BOTH | {"one window each": partial(windows, count=1), "two windows each": partial(windows, count=2)},
    **{f"mamujoco_{robot}": BOTH for robot in ("halfcheetah_2x3", "ant_2x4", "walker2d_2x3", "swimmer_2x1")},
    **{task: dict(random=uniform, straight=partial(pursuit, count=n), scripted=partial(pursuit, count=n, constants=c))
       for task, (n, c) in PURSUIT.items()},
    "omar_simple_spread": {"random": uniform, "fixed assignment": partial(spread, gain=16.0, fixed=True),
                           "best assignment": partial(spread, gain=16.0)},
    "omar_simple_spread_6": {"shortest way": partial(walk, best=1), "some good way": partial(walk, best=BEST),
                             "own good way": partial(walk, best=BEST, alone=True)},
}  # fmt: skip


def play(env_id: str, controller, episodes: int, seed: int, **options: str) -> np.ndarray:
    """Team returns [episodes]; `options` are those of `make_env`."""
    envs = make_vec(env_id, episodes, **options)
    act = controller(envs, envs.reset(seed=seed)[0], np.random.default_rng(5))
    returns = evaluate(act, envs, seed)  # begins in the same states
    envs.close()
    return returns


def main(only: tuple[Literal[tuple(CONTROLLERS)], ...] = tuple(CONTROLLERS)) -> None:
    """Returns of controllers that learn nothing, on these tasks."""
    for env_id in only:
        episodes = 20 if env_id.startswith("mamujoco_") else 1000
        for shift in ("", "fewer") if env_id == "omar_simple_spread_6" else ("",):
            for name, controller in CONTROLLERS[env_id].items():
                returns = play(env_id, controller, episodes, mix_seed(1000, 1), shift=shift)
                key = dict(task=env_id, setting=shift or "usual", controller=name)
                numbers = dict(return_mean=returns.mean(), return_std=returns.std(), episodes=episodes)
                record(RESULTS / "controllers.csv", key, **numbers)


if __name__ == "__main__":
    tyro.cli(main)

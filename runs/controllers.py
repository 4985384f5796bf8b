"""Returns of controllers that learn nothing: what the returns of policies are held against.

    python runs/controllers.py                                  # all tasks: a minute
    python runs/controllers.py --only mpe_simple_spread         # one
    python runs/controllers.py --port --prey-tag simple_tag.pt --prey-world simple_world.pt

    random          uniform actions; standing still: zeros
    scripted        spread: each agent steers for a landmark of its own, so that their ways are now shortest in total,
                    or always for the same one (fixed assignment). tag, world: for a place of its own around the prey
    straight        tag, world: at the prey, at full force
    ... way         omar_simple_spread_6: by the assignment with the shortest way
                    in total, or by one of the ten shortest: the same for all, or each agent draws its own

Scripts see what agents see, but decide for all of them (on omar_simple_spread_6 they know which landmarks are gone).
Start states are those of `--evaluate RUN --seed 1000`. Rows go to controllers.csv or omar_port.csv in runs/results/.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "datasets")]
from campaign import RESULTS, record
from common.envs import BadInput, evaluate, make_env, make_vec, mix_seed
from scripts import BEST, PURSUIT, pursuit, spread, still, uniform, walk

BOTH = {"random": uniform, "standing still": still}
CONTROLLERS = {
    **dict.fromkeys(("mpe_simple_spread", "mpe_simple_spread_n4"), BOTH | {"scripted": spread}),
    **dict.fromkeys(("doors_blind", "mamujoco_halfcheetah_2x3", "mamujoco_ant_2x4", "mamujoco_walker2d_2x3"), BOTH),
    **{task: dict(random=uniform, straight=partial(pursuit, count=n), scripted=partial(pursuit, count=n, constants=c))
       for task, (n, c) in PURSUIT.items()},
    "omar_simple_spread": {"random": uniform, "fixed assignment": partial(spread, gain=16.0, fixed=True),
                           "best assignment": partial(spread, gain=16.0)},
    "omar_simple_spread_6": {"shortest way": partial(walk, best=1), "some good way": partial(walk, best=BEST),
                             "own good way": partial(walk, best=BEST, alone=True)},
}  # fmt: skip
THERE = {  # returns of random teams, mean and standard deviation: of OMAR's 40,000 random episodes; measured there
    "omar_simple_spread": (160.0, 60.0, 156.0, 58.0),
    "omar_simple_tag": (-4.1, 10.8, -5.3, 8.8),
    "omar_simple_world": (-6.8, 5.7, -7.1, 5.1),
}
PORT_EPISODES, BLOCK = 40_000, 400


@dataclass(frozen=True)
class Options:
    """Returns of controllers that learn nothing."""

    only: tuple[Literal[tuple(CONTROLLERS)], ...] = tuple(CONTROLLERS)  # these tasks
    port: bool = False  # instead: compare random teams with OMAR's environment
    prey_tag: str = ""  # with --port: OMAR's pretrained_adv_model.pt of simple_tag; else that is not compared
    prey_world: str = ""  # with --port: that of simple_world


def play(env_id: str, controller, episodes: int, seed: int, **options: str) -> np.ndarray:
    """Team returns [episodes]; `options` are those of `make_env`."""
    envs = make_vec(env_id, episodes, **options)
    act = controller(envs, envs.reset(seed=seed)[0], np.random.default_rng(5))
    returns = evaluate(act, envs, seed)  # begins in the same states
    envs.close()
    return returns


def measure(env_id: str) -> None:
    """Rows of controllers.csv."""
    episodes = 20 if env_id.startswith("mamujoco_") else 1000
    for shift in ("", "fewer") if env_id == "omar_simple_spread_6" else ("",):
        for name, controller in CONTROLLERS[env_id].items():
            returns = play(env_id, controller, episodes, mix_seed(1000, 1), shift=shift)
            key = dict(task=env_id, setting=shift or "usual", controller=name)
            numbers = dict(return_mean=returns.mean(), return_std=returns.std(), episodes=episodes)
            record(RESULTS / "controllers.csv", key, **numbers)


def check_port(env_id: str, file: str) -> None:
    """Rows of omar_port.csv: is `common/omar.py` OMAR's environment? Random teams should score what they score there.

    `apart_se`: how far we are from what was measured there, in standard errors of a difference between two means of 400
    episodes. `blocks_near`: in how many blocks of 400 the mean is within two of its own standard errors of it.
    """
    for prey in dict.fromkeys([file, ""]):  # the project's own too, with which nothing there compares
        returns = play(env_id, uniform, PORT_EPISODES, 2024, prey=prey)
        mean, std, blocks = returns.mean(), returns.std(), returns.reshape(-1, BLOCK)
        numbers = dict(here_mean=mean, here_std=std, here_se=std / PORT_EPISODES**0.5)
        if prey or env_id not in PURSUIT:
            numbers |= dict(zip(("data_mean", "data_std", "there_mean", "there_std"), THERE[env_id]))
            there, there_std = THERE[env_id][2:]
            apart = (mean - there) / np.hypot(std, there_std) * BLOCK**0.5
            near = np.abs(blocks.mean(1) - there) < 2 * blocks.std(1) / BLOCK**0.5
            numbers |= dict(apart_se=apart, blocks_near=near.sum(), blocks=len(near))
        whose = "omar" if prey else "own" if env_id in PURSUIT else "none"
        record(RESULTS / "omar_port.csv", dict(task=env_id, prey=whose), **numbers)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    options = tyro.cli(Options, args=argv)
    files = {"omar_simple_spread": "", "omar_simple_tag": options.prey_tag, "omar_simple_world": options.prey_world}
    try:
        if any(files.values()) and not options.port:
            raise BadInput("--prey-tag and --prey-world go with --port")
        for env_id, file in files.items():
            make_env(env_id, prey=file)  # says now what is wrong with it
    except BadInput as error:
        print(f"controllers.py: error: {error}", file=sys.stderr)
        return 2
    for env_id in files if options.port else options.only:
        check_port(env_id, files[env_id]) if options.port else measure(env_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())

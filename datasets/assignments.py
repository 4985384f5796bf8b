"""Data with several good assignments: three agents, six landmarks.

    python datasets/assignments.py      # twenty seconds; dom2.py --dataset FOLDER --env-id omar_simple_spread_6 learns

The motivating example of DOM2's paper, as far as we know it. The data are episodes of a script on omar_simple_spread_6:
at the start of each it draws one of the 10 assignments (of 120) of agents to landmarks with the shortest way in total,
and walks there, a little noisily. So an agent that stands still at the start has several good ways to go, and their
mean is none.
"""

import sys
from pathlib import Path

import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from common.datasets import DATA
from common.envs import make_vec
from scripts import BEST, choose, landmarks, noisy, script
from writer import save_arrays

TASK, FOLDER = "omar_simple_spread_6", DATA / "simple_spread_6" / "assignments" / "seed_0_data"
EPISODES = 20_000
NOISE, KICKS = 0.1, 0.1  # standard deviation that is added to actions; share of actions that are uniform instead


def make_data() -> None:
    """Makes the data of the assignments: one file per agent and quantity, in OMAR's layout, unless they are there."""
    if FOLDER.is_dir():
        return print(f"data      {FOLDER}: there already; delete it to have it made anew")
    rng, envs = np.random.default_rng(0), make_vec(TASK, EPISODES)
    obs, _ = envs.reset(seed=1)
    goal = choose(obs, *landmarks(envs), rng, BEST)
    act = noisy(lambda obs: script(obs, goal), rng, NOISE, KICKS)
    rows = {name: [] for name in ("obs", "acs", "rews", "next_obs", "dones")}
    for _ in range(25):
        action = act(obs)
        next_obs, _, terminated, _, info = envs.step(action)
        values = (obs, action, info["agent_rewards"], next_obs, np.repeat(terminated[:, None], 3, 1))
        for name, value in zip(rows, values):
            rows[name].append(value)
        obs = next_obs
    whole = {name: np.stack(steps, 1, dtype=np.float32) for name, steps in rows.items()}  # [episodes, 25, 3, ...]
    save_arrays(FOLDER, {name: values.reshape(EPISODES * 25, *values.shape[2:]) for name, values in whole.items()})
    print(f"data      {FOLDER}: return {info['episode']['r'].mean():.1f} ± {info['episode']['r'].std():.1f}")


if __name__ == "__main__":
    tyro.cli(make_data)

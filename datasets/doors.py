"""Data with several narrow modes: blind doors, with all four windows open.

    python datasets/doors.py      # a second; DOM2 learns from them with dom2.py --dataset FOLDER --env-id doors_blind

At each try an agent draws one of two windows of its own, and nearly always hits it. As all are open, the team is
through at once: no window is better than another. Where one window, unseen, is open, agents that keep both of their
ways earn nearly all that can be had, and agents that settle on one of them half.
"""

import sys
from pathlib import Path

import numpy as np
import tyro

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from common.datasets import DATA
from common.doors import WALL, WINDOWS, place
from scripts import windows
from writer import save_arrays

FOLDER, EPISODES = DATA / "doors_blind" / "pairs" / "seed_0_data", 100_000


def make_data() -> None:
    """Makes them, in OMAR's layout, unless they are there: episodes of one step, which ends them."""
    if FOLDER.is_dir():
        return print(f"data      {FOLDER}: there already; delete it to have it made anew")
    ones = np.ones((EPISODES, 2, 1), np.float32)
    action = windows(None, ones, np.random.default_rng(0), 2)(ones).astype(np.float32)  # [episodes, 2, 1]
    missed = place(action[..., 0]) == len(WINDOWS)  # [episodes, 2]
    through = ~missed.all(1, keepdims=True)  # [episodes, 1]
    reward = through - WALL * missed
    done = np.ones_like(reward)
    # Every step ends its episode, so nothing comes next; the same observation again would look like a shifted mark.
    save_arrays(FOLDER, dict(obs=ones, acs=action, rews=reward, next_obs=0 * ones, dones=done))
    print(f"data      {FOLDER}: return {reward.mean():.3f}")


if __name__ == "__main__":
    tyro.cli(make_data)

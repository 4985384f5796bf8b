"""Reference levels on simple_spread that need no learning: uniformly random actions, and a scripted controller.

    python runs/baselines.py
    python runs/baselines.py --run-seed 1 --episodes 100      # how easy the start states are on which seed 1 evaluates

The controller gives every agent one landmark, so that the summed distance is smallest, and steers it there with a PD
law. It sees what the agents see, but decides for all of them together. Team return (mean over agents of mpe2's own
reward, summed over 25 steps), mean ± std over episodes.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.envs import make_env, mix_seed


@dataclass(frozen=True)
class Options:
    """Random and scripted play on simple_spread."""

    env_id: str = "mpe_simple_spread"  # mpe_simple_spread or mpe_simple_spread_n4
    episodes: int = 1000  # episodes of each
    run_seed: int = 1000  # the start states on which a run of this seed evaluates; 1000 gives those of the fresh return


def assign(obs: np.ndarray) -> tuple[int, ...]:
    """The landmark of each agent. obs [N, O] starts with velocity, position, then the landmarks' relative positions."""
    n = len(obs)
    distance = (obs[:, 4 : 4 + 2 * n].reshape(n, n, 2) ** 2).sum(-1) ** 0.5  # [agent, landmark]
    return min(itertools.permutations(range(n)), key=lambda order: sum(distance[i, j] for i, j in enumerate(order)))


def pd_control(obs: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Force towards the agent's landmark, damped by its velocity: [N, 2] in [-1, 1]."""
    target = np.stack([obs[i, 4 + 2 * j : 6 + 2 * j] for i, j in enumerate(order)])
    return np.clip(8.0 * target - 2.0 * obs[:, :2], -1, 1)


def main() -> None:
    options = tyro.cli(Options)
    env, rng = make_env(options.env_id), np.random.default_rng(options.run_seed)
    for name in ("random", "scripted"):
        returns = []
        for episode in range(options.episodes):
            obs, _ = env.reset(seed=mix_seed(options.run_seed, 1) + episode)
            order, total, done = assign(obs), 0.0, False
            while not done:
                action = rng.uniform(-1, 1, env.action_space.shape) if name == "random" else pd_control(obs, order)
                obs, reward, terminated, truncated, _ = env.step(action)
                total, done = total + reward, terminated or truncated
            returns.append(total)
        result = f"{np.mean(returns):7.2f} ± {np.std(returns):.2f} over {len(returns)} episodes"
        print(f"{options.env_id} {name:9s} {result} (standard error {np.std(returns) / np.sqrt(len(returns)):.2f})")


if __name__ == "__main__":
    main()

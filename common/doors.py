"""Blind doors: a task of this project in which a policy with one mode cannot be good, with its exact values.

Two agents who see and remember nothing stand before a wall with four windows. One window is open, the same for a whole
episode. At each step an agent tries a place in [-1, 1]:

    at the open window     both agents are through: 1 for each, and the episode ends
    at another window      nothing
    at the wall            -0.1 for that agent

Else the episode goes on, or ends with probability 0.1. So the mean return of the team is what a discount of 0.9 gives,
and depends on nothing but the chances of each place: `exact_value`. An agent who always tries the same window is
through at once or never; who cannot remember must mix. The joint state, which critics see and agents do not, is the
open window.
"""

import gymnasium as gym
import numpy as np
from pettingzoo import ParallelEnv

WINDOWS, HALF_WIDTH, WALL, END = np.array([-0.6, -0.2, 0.2, 0.6]), 0.05, 0.1, 0.1


def place(action: np.ndarray) -> np.ndarray:
    """Places [...] in [-1, 1] -> the number of the window there, or 4 for the wall [...]."""
    distance = np.abs(np.asarray(action)[..., None] - WINDOWS)  # [..., windows]
    return np.where(distance.min(-1) <= HALF_WIDTH, distance.argmin(-1), len(WINDOWS))


def chances(actions: np.ndarray) -> np.ndarray:
    """Actions [samples, N] -> how often each agent is at each window and at the wall [N, 5]."""
    return np.stack([np.bincount(found, minlength=5) / len(found) for found in place(actions).T])


def exact_value(chances: np.ndarray) -> np.ndarray:
    """Mean team return [...] of two agents that mix places with these chances [..., 2, 5], without a limit of steps."""
    through = 1 - np.prod(1 - chances[..., :4], axis=-2)  # at each step, by open window [..., 4]
    reward = through - WALL * chances[..., 4].mean(-1, keepdims=True)
    return (reward / (1 - (1 - END) * (1 - through))).mean(-1)


class BlindDoors(ParallelEnv):
    """The task as an environment; see the module."""

    metadata = {"name": "blind_doors", "render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None):
        self.possible_agents, self.render_mode = ["agent_0", "agent_1"], render_mode
        self.agents, self.generator, self.open, self.steps, self.tried = [], np.random.default_rng(), 0, 0, np.zeros(2)

    def observation_space(self, agent):
        return gym.spaces.Box(1.0, 1.0, (1,), np.float32)

    def action_space(self, agent):
        return gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        self.agents, self.steps, self.open = self.possible_agents[:], 0, int(self.generator.integers(len(WINDOWS)))
        return self.everyone(np.ones(1, np.float32)), self.everyone({})

    def step(self, actions: dict[str, np.ndarray]):
        self.tried, self.steps = np.array([actions[agent][0] for agent in self.agents]), self.steps + 1
        found = place(self.tried)  # [2]
        through = bool((found == self.open).any())
        rewards = {agent: through - WALL * float(at == len(WINDOWS)) for agent, at in zip(self.agents, found)}
        ended = self.everyone(through or bool(self.generator.random() < END))
        cut = self.everyone(self.steps >= 100)
        return self.everyone(np.ones(1, np.float32)), rewards, ended, cut, self.everyone({})

    def everyone(self, value) -> dict:
        return dict.fromkeys(self.agents, value)

    def state(self) -> np.ndarray:
        return np.eye(len(WINDOWS), dtype=np.float32)[self.open]

    def render(self) -> np.ndarray:
        """The wall from above, white where it is open, and what the agents tried: [64, 256, 3]."""
        image = np.full((64, 256, 3), 90, np.uint8)
        for window, colour in [*((w, 150) for w in WINDOWS), (WINDOWS[self.open], 255)]:
            left, right = (128 + 127 * (window + HALF_WIDTH * np.array([-1, 1]))).astype(int)
            image[:, left : right + 1] = colour
        for agent, (at, colour) in enumerate(zip(self.tried, ((220, 60, 40), (40, 90, 220)))):
            column = int(128 + 127 * at)
            image[16 + 24 * agent : 32 + 24 * agent, max(column - 2, 0) : column + 3] = colour
        return image

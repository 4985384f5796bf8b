"""Multi-agent tasks as ordinary gymnasium environments.

`TeamEnv` turns a PettingZoo parallel environment into a `gymnasium.Env` with one observation array, one action array and one
reward, so that gymnasium's own vector environments, episode statistics and video wrappers work on it unchanged. `TASKS` lists
what `make_env` opens.

Definitions, used everywhere in this project:
    team reward = mean over the team's agents of the environment's own reward
    return      = sum of the team reward over one episode

Shape letters: N agents, O observation size (of the largest agent), A action size (likewise), S joint state size.
"""

import difflib
import os
from dataclasses import dataclass
from typing import Any, Callable

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # the banner would come before our own first line

import gymnasium as gym
import numpy as np
from mpe2 import simple_reference_v3, simple_speaker_listener_v4, simple_spread_v3
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import aec_to_parallel


class UnknownTask(ValueError):
    """The task is not in `TASKS`; the message names the near misses."""


@dataclass(frozen=True)
class Task:
    """How one task is made, and what stands for it in listings."""

    make: Callable[..., ParallelEnv]  # called as make(render_mode=...)
    description: str
    horizon: int = 25  # steps of the longest episode


def _mpe(module, **kwargs) -> Callable[..., ParallelEnv]:
    """An MPE scenario: 25 steps, continuous actions. `raw_env` leaves out PettingZoo's call-order checks, a third of the time."""
    return lambda render_mode=None: aec_to_parallel(
        module.raw_env(continuous_actions=True, max_cycles=25, render_mode=render_mode, **kwargs)
    )


TASKS: dict[str, Task] = {
    "mpe_simple_spread": Task(_mpe(simple_spread_v3, N=3, local_ratio=0.5), "three agents cover three landmarks without colliding"),
    "mpe_simple_spread_n4": Task(
        _mpe(simple_spread_v3, N=4, local_ratio=0.5), "four agents cover four landmarks without colliding"
    ),
    "mpe_simple_reference": Task(_mpe(simple_reference_v3, local_ratio=0.5), "two agents tell each other where to go"),
    "mpe_simple_speaker_listener": Task(
        _mpe(simple_speaker_listener_v4), "one agent sees the goal, the other can move: unequal agents"
    ),
}


def check_task(env_id: str) -> None:
    """Raises `UnknownTask`, with the closest names, unless `env_id` is one of `TASKS`."""
    if env_id not in TASKS:
        near = difflib.get_close_matches(env_id, TASKS, n=3, cutoff=0.5) or sorted(TASKS)
        raise UnknownTask(f"unknown task '{env_id}'; did you mean {' or '.join(near)}?")


def make_env(env_id: str, render_mode: str | None = None) -> "TeamEnv":
    """Opens one task. Raises `UnknownTask` for a name that is not in `TASKS`."""
    check_task(env_id)
    return TeamEnv(TASKS[env_id].make(render_mode=render_mode))


def make_vec(env_id: str, num_envs: int) -> gym.vector.SyncVectorEnv:
    """`num_envs` copies in gymnasium's `SyncVectorEnv`, each with episode statistics in `info["episode"]`.

    Autoreset is off: `step` returns the true final observation and state at the end of an episode, and the caller restarts
    the finished copies with `reset(options={"reset_mask": done})`. Nothing is hidden, no step is spent on a reset.
    """
    env_fn = lambda: gym.wrappers.RecordEpisodeStatistics(make_env(env_id))
    return gym.vector.SyncVectorEnv([env_fn] * num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


class TeamEnv(gym.Env):
    """A team of N agents behind the interface of a single-agent environment.

    observation  [N, O] float32; agent i's own numbers first, then zeros (`obs_mask` marks the real ones)
    action       [N, A] in [-1, 1]; entries outside `action_mask` are ignored, values beyond the box are clipped
    reward       the team reward (module docstring)
    info         "state" [S]: the joint state, here every agent's observation one after the other, without padding;
                 "agent_rewards" [N]: what the environment gave each agent (zeros on reset)

    Attributes: `num_agents` N, `obs_sizes` and `action_sizes` per agent, `obs_mask` [N, O], `action_mask` [N, A], `state_size` S.
    The final observation and state of an episode are returned by `step` like any other.
    """

    def __init__(self, env: ParallelEnv):
        self.env = env
        self.agents = list(env.possible_agents)
        self.num_agents = len(self.agents)
        self.render_mode = env.render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": env.metadata.get("render_fps", 10)}
        self._converters = [_action_converter(env, agent) for agent in self.agents]
        self.obs_sizes = [env.observation_space(agent).shape[0] for agent in self.agents]
        self.action_sizes = [size for size, _ in self._converters]
        self.obs_mask = np.arange(max(self.obs_sizes)) < np.array(self.obs_sizes)[:, None]  # [N, O]
        self.action_mask = np.arange(max(self.action_sizes)) < np.array(self.action_sizes)[:, None]  # [N, A]
        self.state_size = sum(self.obs_sizes)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.obs_mask.shape, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_mask.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        observations, _ = self.env.reset(seed=seed)
        return self._gather(observations, np.zeros(self.num_agents, np.float32))

    def step(self, action: np.ndarray):
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        moves = {agent: convert(own) for agent, (_, convert), own in zip(self.agents, self._converters, action)}
        observations, rewards, terminations, truncations, _ = self.env.step(moves)
        terminated = all(terminations.values())
        truncated = not terminated and all(terminations[agent] or truncations[agent] for agent in self.agents)
        obs, info = self._gather(observations, np.array([rewards[agent] for agent in self.agents], np.float32))
        return obs, float(info["agent_rewards"].mean()), terminated, truncated, info

    def _gather(self, observations: dict[str, np.ndarray], agent_rewards: np.ndarray):
        state = np.concatenate([observations[agent] for agent in self.agents], dtype=np.float32)  # [S]
        obs = np.zeros(self.obs_mask.shape, np.float32)  # [N, O]
        obs[self.obs_mask] = state  # row by row: agent after agent, padding stays zero
        return obs, {"state": state, "agent_rewards": agent_rewards}

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


def _action_converter(env: ParallelEnv, agent: str) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Size of an agent's action in [-1, 1], and the function that turns it into the environment's own (float32).

    In general [-1, 1] is stretched onto the action space. MPE moves an agent by the force [a2 - a1, a4 - a3], four numbers for
    two: the exact two-number form puts each sign in its own slot. Communication numbers follow, from [-1, 1] onto [0, 1].
    """
    space = env.action_space(agent)
    size, low, width = space.shape[0], space.low, space.high - space.low

    def stretch(action: np.ndarray) -> np.ndarray:
        return low + (action[:size] + 1) / 2 * width

    def force(action: np.ndarray) -> np.ndarray:
        fx, fy, *message = action[: size - 3].tolist()
        own = [0.0, max(-fx, 0.0), max(fx, 0.0), max(-fy, 0.0), max(fy, 0.0), *((m + 1) / 2 for m in message)]
        return np.array(own, np.float32)

    bodies = getattr(getattr(env.unwrapped, "world", None), "agents", None)  # MPE only
    movable = bodies is not None and bodies[env.possible_agents.index(agent)].movable
    return (size - 3, force) if movable else (size, stretch)

"""Scripts that play: what they earn is measured by runs/controllers.py, their data by assignments.py and collect.py.

A controller is a function of environments, what they show at the start [E, N, O], and a generator; it makes what acts,
a function of observations. Scripts see what agents see, but decide for all of them. E environments, N agents, O
observation.
"""

import itertools

import gymnasium as gym
import numpy as np

from common.doors import WINDOWS
from common.envs import Act

uniform = lambda envs, start, rng: lambda obs: rng.uniform(-1, 1, envs.action_space.shape)
still = lambda envs, start, rng: lambda obs: np.zeros(envs.action_space.shape)


def spread(envs, start: np.ndarray, rng: np.random.Generator, gain: float = 8.0, fixed=False) -> Act:
    """Each to a landmark of its own, so that their ways are now shortest in total, or always to the same (`fixed`).

    An observation begins with velocity, position, and the N landmarks' relative positions. OMAR's physics want a gain
    of 16."""

    def act(obs: np.ndarray) -> np.ndarray:
        n = obs.shape[1]
        orders = np.array(list(itertools.permutations(range(n))))  # [N!, N] landmark of each agent
        places = obs[..., 4 : 4 + 2 * n].reshape(len(obs), n, n, 2)  # [E, agent, landmark, xy]
        far = np.linalg.norm(places, axis=-1)[:, np.arange(n), orders].sum(-1)  # [E, N!]
        order = np.arange(n)[None, ::-1] if fixed else orders[far.argmin(1)]  # [E or 1, N]
        goal = places[np.arange(len(obs))[:, None], np.arange(n), order]  # [E, N, xy]
        return np.clip(gain * goal - 2.0 * obs[..., :2], -1, 1)

    return act


def noisy(act: Act, rng: np.random.Generator, noise: float, kicks: float = 0.0) -> Act:
    """`act`, with normal noise of that standard deviation on its actions, and a share `kicks` of them uniform."""

    def blurred(obs: np.ndarray) -> np.ndarray:
        action = act(obs)
        action = np.clip(action + noise * rng.standard_normal(action.shape), -1, 1)
        kicked = rng.random((*action.shape[:2], 1)) < kicks
        return np.where(kicked, rng.uniform(-1, 1, action.shape), action).astype(np.float32)

    return blurred


def pursuit(envs, start: np.ndarray, rng: np.random.Generator, count: int, constants=()) -> Act:
    """Of tag and world, with `count` landmarks. Without the four constants of `PURSUIT`: straight at the prey."""
    first, thirds = 4 + 2 * count + 4, np.arange(3) * 2 * np.pi / 3  # the prey comes behind two team mates

    def act(obs: np.ndarray) -> np.ndarray:
        prey, prey_velocity = obs[..., first : first + 2], obs[..., first + 2 : first + 4]  # [E, 3, xy]
        if not len(constants):
            return prey / np.linalg.norm(prey, axis=-1, keepdims=True)
        hold, gain, damping, lead = constants
        angle = np.arctan2(-prey[..., 1], -prey[..., 0])  # of each predator, seen from the prey [E, 3]
        order = np.argsort(angle, 1)
        turn = np.angle(np.exp(1j * (np.take_along_axis(angle, order, 1) - thirds)).mean(1))  # [E]
        place = np.empty_like(angle)
        np.put_along_axis(place, order, turn[:, None] + thirds, 1)
        goal = prey + hold * np.stack([np.cos(place), np.sin(place)], -1) + lead * prey_velocity
        return np.clip(gain * goal + damping * (prey_velocity - obs[..., :2]), -1, 1)

    return act


def windows(envs, start: np.ndarray, rng: np.random.Generator, count: int) -> Act:
    """Of doors_blind: at every step each agent draws one of the first `count` of its own two windows, and tries it."""
    own = WINDOWS.reshape(2, 2)  # agent 0 has those on the left
    draw = lambda e: own[np.arange(2), rng.integers(count, size=(e, 2))] + 0.02 * rng.standard_normal((e, 2))
    return lambda obs: draw(len(obs))[..., None]


BEST = 10  # how many of the assignments on omar_simple_spread_6 are good ways
ORDERS = np.array(list(itertools.permutations(range(6), 3)))  # [120, 3] landmark of each agent


def landmarks(envs: gym.vector.VectorEnv) -> tuple[np.ndarray, np.ndarray]:
    """Where they are [E, 6, 2], and which of them are gone [E, 6]."""
    all_six = envs.unwrapped.world.landmarks
    gone = [np.broadcast_to(x.counts == 0, envs.num_envs) for x in all_six]
    return np.stack([x.state.p_pos.T for x in all_six], 1), np.stack(gone, 1)


def choose(obs: np.ndarray, places: np.ndarray, gone: np.ndarray, rng: np.random.Generator, best: int) -> np.ndarray:
    """obs [E, 3, O] -> where each agent goes [E, 3, 2]: to its landmark in one of the `best` assignments in total."""
    far = np.linalg.norm(places[:, None] - obs[:, :, None, 2:4], axis=-1) + 100.0 * gone[:, None]  # [E, 3, 6]
    total = far[:, np.arange(3), ORDERS].sum(-1)  # [E, 120]
    rank = np.argsort(total, 1)[np.arange(len(obs)), rng.integers(best, size=len(obs))]
    return places[np.arange(len(obs))[:, None], ORDERS[rank]]


def script(obs: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """obs [E, 3, O], goals [E, 3, 2] -> forces [E, 3, 2]: straight there, slower near it."""
    wanted = 2.0 * (goal - obs[..., 2:4])
    wanted *= np.minimum(1.0, 0.8 / np.maximum(np.linalg.norm(wanted, axis=-1, keepdims=True), 1e-9))
    # A force of 1 adds 0.5 to the velocity, of which a quarter is lost.
    return np.clip((wanted - 0.75 * obs[..., :2]) / 0.5, -1.0, 1.0)


def walk(envs, start: np.ndarray, rng: np.random.Generator, best: int, alone=False) -> Act:
    """Of omar_simple_spread_6, by one of the `best` assignments: the same for all agents, or one for each `alone`."""
    places, gone = landmarks(envs)
    decide = lambda: choose(start, places, gone, rng, min(best, 6) if gone.any() else best)  # 3 landmarks: 6 ways
    goal = np.stack([decide()[:, i] for i in range(3)], 1) if alone else decide()  # [E, 3, xy]
    return lambda obs: script(obs, goal)


# Landmarks; then distance from the prey, gain, damping, how far ahead of it to aim: found by the cross-entropy method.
PURSUIT = {
    "omar_simple_tag": (2, (0.0895, 5.76, 0.846, 0.0829)),
    "omar_simple_world": (5, (0.0789, 4.57, 0.779, 0.0922)),
}

"""How good can a team be in OMAR's tag and world against the project's prey? A scripted team, as a yardstick.

    python runs/pursuit.py > runs/results/pursuit.txt        # searches its constants too: ten minutes

Each predator steers, with a PD law, for a place of its own close to the prey: three places around it, a third of a
circle apart, turned so that nobody has to go round. It sees what the predators see, but decides for all three
together. Its four constants (distance from the prey, gain, damping, how far ahead of the prey to aim) are found by
the cross-entropy method. Mean ± std of the team return, over episodes that the search did not see.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.envs import make_vec

LANDMARKS = {"omar_simple_tag": 2, "omar_simple_world": 5}  # in front of the other agents in an observation
THIRDS = np.arange(3) * 2 * np.pi / 3


def steer(obs: np.ndarray, landmarks: int, constants: np.ndarray | None) -> np.ndarray:
    """obs [E, 3, O] -> forces [E, 3, 2] in [-1, 1]. Without constants: straight at the prey, at full force."""
    first = 4 + 2 * landmarks + 4  # behind two team mates
    prey, prey_velocity = obs[..., first : first + 2], obs[..., first + 2 : first + 4]
    if constants is None:
        return prey / np.sqrt((prey**2).sum(-1, keepdims=True))
    hold, gain, damping, lead = constants
    angle = np.arctan2(-prey[..., 1], -prey[..., 0])  # of each predator, seen from the prey [E, 3]
    order = np.argsort(angle, 1)
    turn = np.angle(np.exp(1j * (np.take_along_axis(angle, order, 1) - THIRDS)).mean(1))  # [E]
    place = np.empty_like(angle)
    np.put_along_axis(place, order, turn[:, None] + THIRDS, 1)
    goal = prey + hold * np.stack([np.cos(place), np.sin(place)], -1) + lead * prey_velocity
    return np.clip(gain * goal + damping * (prey_velocity - obs[..., :2]), -1, 1)


def play(env_id: str, constants: np.ndarray | None, episodes: int, seed: int) -> np.ndarray:
    """Team returns [episodes]."""
    envs = make_vec(env_id, episodes)
    obs, _ = envs.reset(seed=seed)
    for _ in range(25):
        obs, _, _, _, info = envs.step(steer(obs, LANDMARKS[env_id], constants))
    return info["episode"]["r"]


def search(env_id: str) -> np.ndarray:
    """The four constants: 15 rounds of 40 candidates with 200 episodes each; the best 8 decide where to look next."""
    rng, mean, std = np.random.default_rng(0), np.array([0.08, 12.0, 1.0, 0.1]), np.array([0.05, 8.0, 1.0, 0.1])
    for turn in range(15):
        candidates = mean + std * rng.normal(size=(40, 4))
        scores = [play(env_id, constants, 200, 1000 * turn).mean() for constants in candidates]
        best = candidates[np.argsort(scores)[-8:]]
        mean, std = best.mean(0), best.std(0) + 0.005
    return mean


def main() -> None:
    for env_id in LANDMARKS:
        straight = play(env_id, None, 2000, 10**6)
        told = lambda returns: f"{returns.mean():.1f} ± {returns.std():.1f} over 2000 episodes"
        print(f"{env_id} straight at the prey: {told(straight)}", flush=True)
        constants = search(env_id)
        found = " ".join(f"{value:.3g}" for value in constants)
        print(f"{env_id} scripted: {told(play(env_id, constants, 2000, 10**6))}, distance, gain, damping, lead {found}")


if __name__ == "__main__":
    main()

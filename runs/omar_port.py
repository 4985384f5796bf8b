"""Is `common/omar.py` OMAR's environment? Uniformly random teams should score what they score there.

    python runs/omar_port.py --prey-tag simple_tag.pt --prey-world simple_world.pt > runs/results/omar_port.txt

The two files are OMAR's `pretrained_adv_model.pt` of simple_tag and simple_world. Without them, only spread is
compared.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.envs import BadInput, make_env
from common.omar import HORIZON, ParticleVec

# Mean and standard deviation of the return of uniformly random teams: measured in OMAR's environment over a few hundred
# episodes, and of OMAR's random data, 40,000 episodes.
MEASURED = {"simple_spread": (156.0, 58.0), "simple_tag": (-5.3, 8.8), "simple_world": (-7.1, 5.1)}
DATA = {"simple_spread": (160.0, 60.0), "simple_tag": (-4.1, 10.8), "simple_world": (-6.8, 5.7)}
EPISODES, BLOCK = 40_000, 400


@dataclass(frozen=True)
class Options:
    """Random play in OMAR's tasks."""

    prey_tag: str = ""  # OMAR's prey of simple_tag
    prey_world: str = ""  # OMAR's prey of simple_world


def play(scenario: str, prey: str, episodes: int) -> np.ndarray:
    """Team returns of uniformly random actions."""
    envs, generator, returns = ParticleVec(scenario, episodes, prey), np.random.default_rng(5), np.zeros(episodes)
    envs.reset(seed=2024)
    for _ in range(HORIZON):
        returns += envs.step(generator.uniform(-1, 1, envs.action_space.shape))[1]
    return returns


def main() -> int:
    options = tyro.cli(Options)
    files = {"simple_spread": "", "simple_tag": options.prey_tag, "simple_world": options.prey_world}
    try:
        for scenario, file in files.items():
            make_env(f"omar_{scenario}", prey=file)
    except BadInput as error:
        print(f"omar_port.py: error: {error}", file=sys.stderr)
        return 2
    there = "OMAR's random data | measured in OMAR's environment | difference from that | blocks"
    print(f"| task | prey | here, 40,000 episodes | {there} |\n|" + "---|" * 7)
    for scenario, file in files.items():
        for prey in dict.fromkeys([file, ""]):
            returns = play(scenario, prey, EPISODES)
            blocks = returns.reshape(-1, BLOCK)
            there, spread = MEASURED[scenario]
            near = abs(blocks.mean(1) - there) < 2 * blocks.std(1) / BLOCK**0.5  # the block's own standard errors
            # In standard errors of a difference between two means of 400 episodes each.
            apart = (returns.mean() - there) / np.hypot(returns.std(), spread) * BLOCK**0.5
            theirs = scenario == "simple_spread" or prey
            figures = [f"{mean:g} ± {std:g}" for mean, std in (DATA[scenario], MEASURED[scenario])]
            cells = [
                f"`omar_{scenario}`", "–" if scenario == "simple_spread" else "OMAR's" if prey else "the project's own",
                f"{returns.mean():.2f} ± {returns.std():.2f} (± {returns.std() / EPISODES**0.5:.2f})",
                *([*figures, f"{apart:+.1f} s.e.", f"{near.sum()} of {len(near)}"] if theirs else "––––"),
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |".replace(" -", " −"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

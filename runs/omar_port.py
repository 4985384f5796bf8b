"""Is `common/omar.py` OMAR's environment? Uniformly random teams should score what they score there.

    python runs/omar_port.py --prey-tag simple_tag.pt --prey-world simple_world.pt > runs/results/omar_port.txt

The two files are OMAR's `pretrained_adv_model.pt` of simple_tag and simple_world. Without them, only spread is compared.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.envs import find_prey
from common.omar import HORIZON, ParticleVec

PUBLISHED = {  # mean and standard deviation over episodes of uniformly random teams, and how many episodes
    "measured in OMAR's environment": {"simple_spread": (156.0, 58.0), "simple_tag": (-5.3, 8.8), "simple_world": (-7.1, 5.1)},
    "OMAR's random data": {"simple_spread": (160.0, 60.0), "simple_tag": (-4.1, 10.8), "simple_world": (-6.8, 5.7)},
}
EPISODES = {
    "measured in OMAR's environment": 400,
    "OMAR's random data": 40_000,
}  # compared over as many here; the first were "a few hundred"


@dataclass(frozen=True)
class Options:
    """Random play in OMAR's tasks."""

    prey_tag: str = ""
    """OMAR's prey of simple_tag"""
    prey_world: str = ""
    """OMAR's prey of simple_world"""


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
            if file:
                find_prey(f"omar_{scenario}", file)
    except ValueError as error:
        print(f"omar_port.py: error: {error}", file=sys.stderr)
        return 2
    print("| task | prey | compared with | there | here: mean ± std | episodes here | difference, in standard errors of here |")
    print("|---|---|---|---|---|---|---|")
    for source, figures in PUBLISHED.items():
        for scenario, (mean, std) in figures.items():
            if scenario != "simple_spread" and not files[scenario]:
                continue
            returns = play(scenario, files[scenario], EPISODES[source])
            error = returns.std() / len(returns) ** 0.5
            cells = [
                f"`omar_{scenario}`", "OMAR's" if files[scenario] else "–", source, f"{mean:g} ± {std:g}",
                f"{returns.mean():.2f} ± {returns.std():.2f}", f"{len(returns):,}", f"{(returns.mean() - mean) / error:+.1f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |".replace("| -", "| −"))
    for scenario in ("simple_tag", "simple_world"):
        returns = play(scenario, "", EPISODES["OMAR's random data"])
        print(
            f"| `omar_{scenario}` | the project's own | – | – | {returns.mean():.2f} ± {returns.std():.2f} | {len(returns):,} | – |".replace(
                "| -", "| −"
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

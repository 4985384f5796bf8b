"""What the critics believe against what the policies earn: where a run of runs/offline.py falls short, is it the critics or the policies?

    python runs/belief.py --datasets omar_halfcheetah_2x3-random        # of runs that are there with their checkpoint.pt

A table, and a row of runs/results/belief.csv per run. All numbers are means over agents and over the steps of fresh episodes that the
run's last policies play: `believed`, the smaller of the two critics' values of what they do; `earned`, the discounted rewards that did
follow, and behind the end of the episode once more the critics' belief; `data`, what the critics believe of the actions in the data;
`action`, the mean size of an action's components, and `at the edge`, the share of them beyond 0.99.
"""

import csv
from dataclasses import dataclass

import numpy as np
import offline
import torch
import tyro

from common.envs import make_vec

dom2 = offline.dom2
RESULT = offline.ROOT / "runs" / "results" / "belief.csv"


@dataclass(frozen=True)
class Options:
    """Which runs to look at."""

    datasets: tuple[str, ...]
    """names of data sets"""
    methods: tuple[str, ...] = ("dom2", "deterministic")
    """of dom2 and deterministic; imitation has no critics"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of training"""


@torch.no_grad()
def believe(agent: dom2.DOM2, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The smaller of the two averaged critics' values: obs [E, N, O], action [E, N, A] -> [E, N]."""
    obs = ((torch.from_numpy(obs) - agent.obs_mean) / agent.obs_std).transpose(0, 1)
    return agent.slow_critic(obs, torch.from_numpy(action).transpose(0, 1)).amin(0).T.numpy()


def to_go(rewards: np.ndarray, gamma: float, end: np.ndarray) -> np.ndarray:
    """Discounted sums of what follows: rewards [T, ...] and the value behind the last of them -> [T, ...]."""
    result, following = np.zeros_like(rewards), end
    for t in reversed(range(len(rewards))):
        result[t] = following = rewards[t] + gamma * following
    return result


def look(dataset: str, method: str, seed: int) -> dict | None:
    """The row of a finished run."""
    run = offline.find_run(dataset, method, 1.0, seed)
    if not run or not (run / "checkpoint.pt").exists():
        return None
    agent, env_id = offline.trained(run)
    envs = make_vec(env_id, 10 if "cheetah" in env_id else 200)
    generator = torch.Generator().manual_seed(offline.FRESH)
    obs, _ = envs.reset(seed=offline.FRESH)
    believed, rewards, actions, over = [], [], [], False
    while not over:
        actions.append(agent.act(obs, generator))
        believed.append(believe(agent, obs, actions[-1]))
        obs, _, terminated, truncated, info = envs.step(actions[-1])
        rewards.append(info["agent_rewards"].astype(np.float64))
        over = (terminated | truncated).all()  # tasks of offline data end by their time limit only
    earned = to_go(np.array(rewards), agent.args.gamma, believe(agent, obs, agent.act(obs, generator)))
    data = dom2.open_data(dom2.preset(dataset))
    rows = np.random.default_rng(0).choice(len(data.obs), 10_000, replace=False)
    rows.sort()
    of_data = believe(agent, np.asarray(data.obs[rows], np.float32), np.clip(data.actions[rows], -1, 1).astype(np.float32))
    size = np.abs(actions)
    return dict(
        dataset=dataset, method=method, seed=seed, return_mean=round(float(np.sum(rewards, 0).mean()), 2), believed=round(np.mean(believed), 2),
        earned=round(earned.mean(), 2), data=round(of_data.mean(), 2), action=round(size.mean(), 3), at_the_edge=round((size > 0.99).mean(), 3),
    )  # fmt: skip


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    rows = list(csv.DictReader(RESULT.open())) if RESULT.exists() else []
    for dataset in options.datasets:
        for method in options.methods:
            for seed in options.seeds:
                if row := look(dataset, method, seed):
                    same = lambda old: all(str(old[name]) == str(row[name]) for name in ("dataset", "method", "seed"))
                    rows = [old for old in rows if not same(old)] + [row]
    with RESULT.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    RESULT.with_suffix(".tmp").rename(RESULT)
    if rows:
        print("| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()

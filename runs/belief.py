"""What critics believe against what policies earn: where a run of runs/offline.py falls short, which of the two is it?

    python runs/belief.py --datasets omar_halfcheetah_2x3-random      # of runs that are there with their checkpoint.pt

A table, and a row of runs/results/belief.csv per run. A critic's belief is the smaller of the two averaged critics'
values. Means over agents and over the steps of fresh episodes that the run's last policies play: `believed` of what
they do there, and what they `earned`, the discounted rewards that did follow; behind the end of an episode that is
the critics' belief once more, with a mean weight of `end`. `action` is the mean size of an action's components,
`edge` the share of them beyond 0.99. Means over 10,000 rows of the data: what the critics believe of the actions in
them (`data`) and of the policies' own instead (`own`).
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import offline
import torch
import tyro

from common.datasets import Dataset, open_dataset
from common.envs import make_env, make_vec

dom2 = offline.dom2
RESULT = offline.ROOT / "runs" / "results" / "belief.csv"


@dataclass(frozen=True)
class Options:
    """Which runs to look at; those without a checkpoint.pt are left out."""

    datasets: tuple[str, ...]  # names of data sets
    methods: tuple[Literal["dom2", "deterministic"], ...] = ("dom2", "deterministic")  # imitation has no critics
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of training


@torch.no_grad()
def believe(agent: dom2.DOM2, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """obs [E, N, O], action [E, N, A] -> [E, N]."""
    policy = agent.slow_policy
    obs = ((torch.from_numpy(obs) - policy.obs_mean) / policy.obs_std).transpose(0, 1)
    return agent.slow_critic(obs, torch.from_numpy(action).transpose(0, 1)).amin(0).T.numpy()


def trained(run: Path) -> tuple[dom2.DOM2, str]:
    """The last policies and critics of a run, and its task."""
    saved = dom2.load_policy(run)[1]
    agent = dom2.DOM2(make_env(saved["env_id"]), dom2.Args(**saved["args"]), torch.device("cpu"))
    agent.load_state_dict(torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["agent"])
    return agent, saved["env_id"]


def to_go(rewards: np.ndarray, gamma: float, end: np.ndarray) -> np.ndarray:
    """Discounted sums of what follows: rewards [T, ...] and the value behind the last of them -> [T, ...]."""
    result, following = np.zeros_like(rewards), end
    for t in reversed(range(len(rewards))):
        result[t] = following = rewards[t] + gamma * following
    return result


def look(run: Path, data: Dataset) -> dict[str, float]:
    """The numbers of a finished run."""
    agent, env_id = trained(run)
    envs, gamma = make_vec(env_id, 10 if "cheetah" in env_id else 200), agent.args.gamma
    act = dom2.make_act(agent.slow_policy)
    torch.manual_seed(offline.FRESH)
    obs, _ = envs.reset(seed=offline.FRESH)
    believed, rewards, actions, over = [], [], [], False
    while not over:
        actions.append(act(obs))
        believed.append(believe(agent, obs, actions[-1]))
        obs, _, terminated, truncated, info = envs.step(actions[-1])
        rewards.append(info["agent_rewards"].astype(np.float64))
        over = (terminated | truncated).all()  # the tasks of offline data end by their time limit only, all at once
    earned = to_go(np.array(rewards), gamma, believe(agent, obs, act(obs)))
    weight = to_go(np.zeros(len(rewards)), gamma, 1.0)
    rows = np.sort(np.random.default_rng(0).choice(len(data.obs), min(10_000, len(data.obs)), replace=False))
    seen, done = np.asarray(data.obs[rows], np.float32), np.clip(data.actions[rows], -1, 1).astype(np.float32)
    size = np.abs(actions)
    found = dict(
        return_mean=np.sum(rewards, 0).mean(), believed=np.mean(believed), earned=earned.mean(), end=np.mean(weight),
        data=believe(agent, seen, done).mean(), own=believe(agent, seen, act(seen)).mean(),
        action=size.mean(), edge=(size > 0.99).mean(),
    )  # fmt: skip
    return {name: round(float(value), 3) for name, value in found.items()}


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    rows = list(csv.DictReader(RESULT.open())) if RESULT.exists() else []
    for dataset in options.datasets:
        found = [(m, s, offline.find_run(dataset, m, 1.0, s)) for m in options.methods for s in options.seeds]
        found = [known for known in found if known[2] and (known[2] / "checkpoint.pt").exists()]
        if not found:
            print(f"{dataset}: no finished run with its checkpoint.pt; runs/offline.py makes some")
            continue
        data = open_dataset(dataset)
        offline.note_data(dataset, data.returns)  # which stops if the runs had other data
        for method, seed, run in found:
            key = dict(dataset=dataset, method=method, seed=str(seed))
            rows = [row for row in rows if not key.items() <= row.items()] + [key | look(run, data)]
            offline.write_rows(RESULT, rows)
    for i, row in enumerate(rows):
        offline.head(*row) if not i else None
        offline.line(*row.values())


if __name__ == "__main__":
    main()

"""A closer look at runs that still have their checkpoint.pt and policy.pt, in fresh episodes.

    python runs/look.py RUN_DIR RUN_DIR ...

Of dom2.py, a row of results/belief.csv: where it falls short, is it critics or policies? Means over steps of what the
critics (the smaller of the two averaged ones) `believed` of what policies did, and what they `earned`, the discounted
rewards that followed, with the critics' belief behind the end; the share of an action's entries beyond 0.99 (`edge`).
Of omad.py, a row of entropy.csv: means over an episode's states of the `bound` on the joint entropy that training
counts, and of the `entropy` from samples, in nats; the `squares` of 1 m² that a robot's torso was in while it trained.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.signal import lfilter
from scipy.spatial import KDTree
from scipy.special import digamma, gammaln

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dom2
import omad
from campaign import RESULTS, record
from common.envs import BadInput, find_task, make_env, make_vec

FRESH = 10**6  # seed of episodes that no run evaluates on


@torch.no_grad()
def believe(agent: dom2.DOM2, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """obs [E, N, O], action [E, N, A] -> [E, N]."""
    policy = agent.slow_policy
    obs = ((torch.from_numpy(obs) - policy.obs_mean) / policy.obs_std).transpose(0, 1)
    return agent.slow_critic(obs, torch.from_numpy(action).transpose(0, 1)).amin(0).T.numpy()


def to_go(rewards: np.ndarray, gamma: float, end: np.ndarray | float) -> np.ndarray:
    """Discounted sums of what follows: rewards [T, ...] and the value behind the last of them -> [T, ...]."""
    behind = np.broadcast_to(gamma * end, rewards[:1].shape)
    return lfilter([1], [1, -gamma], rewards[::-1], axis=0, zi=behind)[0][::-1]


def belief(run: Path) -> tuple[dict, dict]:
    """The key and the numbers of a run of dom2.py. Raises `BadInput`."""
    config, saved = dom2.load(run / "config.json"), dom2.load(run / "checkpoint.pt")
    args, task = dom2.Args(**config["args"]), find_task(config["env_id"])
    if not args.q_weight or task.terminates:
        raise BadInput(f"{run}: give runs with critics (a --q-weight) and in tasks in which nobody falls")
    inside = dict(observation=args.observation, prey=args.prey)
    agent = dom2.DOM2(make_env(config["env_id"], **inside), args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    envs = make_vec(config["env_id"], 10 if task.own_state else 200, **inside)
    act = dom2.make_act(agent.slow_policy, args)
    torch.manual_seed(FRESH)
    obs, _ = envs.reset(seed=FRESH)
    believed, rewards, actions = [], [], []
    for _ in range(task.horizon):
        actions.append(act(obs))
        believed.append(believe(agent, obs, actions[-1]))
        obs, _, _, _, info = envs.step(actions[-1])
        rewards.append(info["agent_rewards"].astype(np.float64))
    earned = to_go(np.array(rewards), args.gamma, believe(agent, obs, act(obs)))
    numbers = dict(return_mean=np.sum(rewards, 0).mean(), believed=np.mean(believed), earned=earned.mean())
    numbers |= dict(edge=(np.abs(actions) > 0.99).mean())
    return dict(dataset="-".join(Path(args.dataset).parts[-3:]), policy=args.policy, seed=args.seed), numbers


def estimate(x: np.ndarray, k: int = 5) -> float:
    """Differential entropy of what the samples x [M, D] were drawn from."""
    count, d = x.shape
    distance = KDTree(x).query(x, k + 1)[0][:, -1]  # to the k-th neighbour; the first one is the sample itself
    ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    return digamma(count) - digamma(k) + ball + d * np.log(distance).mean()


@torch.no_grad()
def noise(run: Path, states: int = 20, samples: int = 4000) -> tuple[dict, dict]:
    """The key and the numbers of a run of omad.py."""
    policy, saved = omad.load_policy(run)
    args, act, seen, done = omad.Args(**saved["args"]), omad.make_act(policy), [], False
    envs = make_vec(args.env_id, 1, args.observation, prey=args.prey)
    torch.manual_seed(FRESH)
    obs, _ = envs.reset(seed=FRESH)
    while not done:
        seen.append(obs[0])
        obs, _, terminated, truncated, _ = envs.step(act(obs))
        done = terminated | truncated
    policy, bounds, entropies = policy.double(), [], []
    for one in torch.from_numpy(np.array(seen[:: -(-len(seen) // states)])).double():
        action, cost = policy(one.expand(samples, -1, -1), policy.noise(samples).double())  # [M, N, A], [M, N]
        x = torch.atanh(action.clamp(-1 + 1e-15, 1 - 1e-15))
        parts = [estimate(x[:, i, :size].numpy()) for i, size in enumerate(saved["action_sizes"])]
        bounds.append(-cost.sum(1).mean())
        entropies.append(sum(parts) + torch.log1p(-(action**2) + 1e-15).sum((1, 2)).mean())
    key = {name: vars(args)[name] for name in "env_id observation policy denoising_steps total_timesteps seed".split()}
    numbers, places = dict(bound=np.mean(bounds), entropy=np.mean(entropies)), run / "torso_xy.npy"
    return key, numbers | ({"squares": len(np.unique(np.floor(np.load(places)), axis=0))} if places.exists() else {})


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> int:
    """Looks at these directories of runs. Returns the exit code: 0 done, 2 bad input."""
    torch.set_num_threads(1)
    try:
        for run in runs:
            online = (run / "config.json").exists() and '"omad-' in (run / "config.json").read_text()
            key, numbers = noise(run) if online else belief(run)
            record(RESULTS / ("entropy.csv" if online else "belief.csv"), key, **numbers)
    except BadInput as error:
        print(f"look.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))

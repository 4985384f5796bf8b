"""DOM2: offline multi-agent reinforcement learning with diffusion policies, in one file.

    python dom2.py                                         # makes its data if need be, then learns, on a laptop CPU within minutes
    python dom2.py --dataset omar_simple_tag-expert        # another data set of this project; datasets/README.md lists them
    python dom2.py --dataset FOLDER                        # data on disk, OMAR's or converted
    python dom2.py --evaluate runs/<run>                   # mean and std of the return of a saved run
    python dom2.py --evaluate runs/<run> --shift speed     # the same in an environment that differs from that of the data
    python dom2.py --resume runs/<run>                     # goes on after a crash; on the CPU as if it had not happened
    tensorboard --logdir runs                              # watch it

Method: "Improving Generalization and Data Efficiency with Diffusion in Offline Multi-agent RL", arXiv 2307.01472. Its code is not
public. Labels in brackets, [DOM2 ...], are ours: README.md has the equation behind each, and says how sure we are of it. Where we
depart, the code says [deviation En], and README.md lists it with its reason.

In five sentences. Every agent learns alone from its own observations, actions and rewards, and acts alone. Its policy turns Gaussian
noise into an action by a few steps of a fast ODE solver (DPM-Solver). It is trained to imitate the data (a diffusion loss) and, at the
same time, to raise its own critic, by the gradient through all solver steps. The twin critics are pessimistic about actions that are
not in the data (CQL). Trajectories with a high return are sampled more often.

Shape letters: B batch, N agents, O observation, A action, K solver steps, Q critics of an agent, M actions in the CQL term, H hidden,
T transitions, E environments. Agents are a tensor dimension everywhere: nothing loops over them, and nothing mixes them. Sizes O and A
are those of the largest agent; smaller ones are padded, and masks keep the padding out of every sum.
"""

import contextlib
import copy
import dataclasses
import difflib
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from common.datasets import Dataset, check_sizes, find_env_id, is_folder, normalize, open_dataset
from common.envs import (
    BadInput, TeamEnv, check_options, find_task, make_env, make_vec, mix_seed, record_video, sha256, versions,
)  # fmt: skip

# ============================================================================================================================
# 1. Arguments
# ============================================================================================================================

RunDir = Annotated[str, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    """DOM2: offline multi-agent RL with diffusion policies. Defaults are those of the chosen data set."""

    # --- the run ---
    dataset: str = "omar_simple_spread-medium"
    """<task>-<split>, made if it is not there yet (datasets/README.md lists them), or the path of a folder"""
    env_id: str = ""
    """the task of a folder whose path and card do not say it"""
    data_seed: int = 0
    """of a data set made here: the seed it was made with"""
    data_fraction: float = 1.0
    """share of its episodes to learn from, drawn with --seed"""
    observation: str = ""
    """what each agent sees in evaluations, as in omad.py; must be what the data hold"""
    prey: str = ""
    """omar_simple_tag and omar_simple_world: a file with the prey's network for evaluations; else the project's own"""
    seed: int = 1
    """seed of everything random: networks, batches, noise, evaluations"""
    total_updates: int = 4_000
    """gradient steps"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and data live; auto: cuda if there is one"""
    torch_threads: int = 1
    """CPU threads for torch; 0 leaves torch's own choice"""
    cuda_graph: bool = True
    """on a GPU, capture the update as a CUDA graph, if it passes a check against the plain update at the start"""
    compile: bool = False
    """compile the losses with torch.compile, which takes a minute or two at the start"""
    eval_every: int = 500
    """updates between evaluations; each also writes the checkpoint"""
    eval_episodes: int = 100
    """episodes per evaluation, one environment each"""
    run_dir: str = "runs"
    """folder in which the run's own directory is made"""
    resume: RunDir = ""
    """go on with the run in this directory; its hyper-parameters stay, its length, device and threads may change"""
    evaluate: RunDir = ""
    """only evaluate the run in this directory"""
    shift: str = ""
    """with --evaluate: in an environment that differs from that of the data: speed (particle tasks), random or extreme (HalfCheetah),
    fewer (six landmarks)"""
    capture_video: bool = False
    """write a video of the final policy (at the end of training, or with --evaluate) to RUN_DIR/videos"""

    # --- learning ---
    batch_size: int = 256
    """transitions per update and agent"""
    gamma: float = 0.95
    """discount factor"""
    tau: float = 0.01
    """averaging rate of the target policies and critics; the averaged policies act"""
    policy_lr: float = 1e-3
    """learning rate of the policies"""
    q_lr: float = 3e-3
    """learning rate of the critics"""
    lr_decay: bool = True
    """let both rates fall to zero along half a cosine, so that a run ends quietly"""
    grad_clip: float = 10.0
    """bound on the norm of each agent's gradient"""

    # --- policies ---
    policy: Literal["diffusion", "deterministic"] = "diffusion"
    """diffusion: the method; deterministic: no imitation, no noise, same critics and data (the baseline, MA-CQL)"""
    network: Literal["unet", "mlp"] = "unet"
    """noise prediction: a residual U-Net with skips, or three layers"""
    policy_hidden: int = 32
    """width H of each agent's network; what it sees goes through layers of 128 first, or H if that is more, as do deterministic policies"""
    solver_steps: int = 5
    """K, steps from noise to action"""
    q_weight: float = 1.0
    """eta, weight of the critic's gradient against imitation; 0: imitation only, no critics. Deterministic policies have 1"""
    q_scale: Literal["spread", "mean"] = "spread"
    """what eta is measured in: how much Q varies over actions, or the mean of |Q| as in the paper, whose imitation loss weighs less (E6)"""

    # --- critic ---
    critic_hidden: int = 64
    """width of each critic"""
    cql_weight: float = 1.0
    """zeta, weight of the pessimism about actions outside the data"""
    cql_actions: int = 10
    """M, uniform actions per state in the CQL term"""
    cql_own: bool = False
    """the policies' own actions beside them, which most critics of robots and of chases need"""

    # --- speed ---
    q_rows: float = 0.5
    """share of the batch on which the policies are asked for actions for the critic's gradient"""
    cql_rows: float = 0.25
    """share of the batch in the CQL term"""

    # --- reweighting ---
    reweight: bool = True
    """sample good trajectories more often"""
    thresholds: int = 3
    """how many return thresholds: a trajectory counts once, and once more for each that its return reaches"""
    top_quantile: float = 0.98
    """quantile of the returns at the highest threshold; the others are evenly spaced from the mean on"""


MANY, BIG = 10**12, 10**6
LIMITS = {  # smallest and largest value allowed
    "data_seed": (0, 10**6), "data_fraction": (1e-9, 1.0), "seed": (0, 2**31 - 1), "total_updates": (1, MANY), "torch_threads": (0, 4096),
    "eval_every": (1, MANY), "eval_episodes": (1, 4096), "batch_size": (1, BIG), "gamma": (0.0, 1.0), "tau": (0.0, 1.0),
    "policy_lr": (1e-12, 1e12), "q_lr": (1e-12, 1e12), "grad_clip": (1e-12, math.inf), "policy_hidden": (4, BIG), "solver_steps": (1, 1000),
    "q_weight": (0.0, 1e9), "critic_hidden": (1, BIG), "cql_weight": (0.0, 1e9), "cql_actions": (2, 10_000), "q_rows": (1e-9, 1.0),
    "cql_rows": (1e-9, 1.0), "thresholds": (0, 1000), "top_quantile": (0.0, 1.0),
}  # fmt: skip
# Presets: per task, and per split of its data. README.md says where they come from.
ROBOT = dict(
    gamma=0.99, tau=0.005, q_lr=1e-3, total_updates=3_000, eval_episodes=10, cql_own=True, cql_weight=8.0,
    policy_hidden=64, critic_hidden=64,
)  # fmt: skip
CHASE = dict(gamma=0.95, policy_lr=1e-2, cql_weight=16.0, cql_own=True)
TASKS = {"omar_simple_spread": dict(gamma=0.9), "omar_simple_tag": CHASE, "omar_simple_world": CHASE}
SPLIT_PRESETS = {
    "omar_simple_spread": {
        "random": dict(q_weight=480.0, cql_weight=0.5, total_updates=16_000, eval_every=2_000),
        "random-medium": dict(q_weight=10.0, cql_weight=0.25),
        "medium-replay": dict(q_weight=10.0),
        "medium": dict(q_weight=8.0),
        "medium-expert": dict(q_weight=2.0, cql_weight=2.0),
        "expert": dict(q_weight=1.0, cql_weight=2.0),
    },
    "omar_simple_tag": {
        "random": dict(policy_lr=3e-3, q_weight=4.0, cql_weight=1.0, total_updates=8_000),
        "random-medium": dict(q_weight=0.4, thresholds=8),
        "medium-replay": dict(q_weight=0.4, thresholds=8),
        "medium": dict(q_weight=0.2),
        "medium-expert": dict(q_weight=0.0125),
        "expert": dict(q_weight=0.0125),
    },
    "omar_simple_world": {
        "random": dict(policy_lr=3e-3, q_weight=4.0, cql_weight=0.25, cql_own=False, total_updates=8_000),
        "random-medium": dict(q_weight=0.4),
        "medium-replay": dict(q_weight=0.4, thresholds=8),
        "medium": dict(q_weight=0.8),
        "medium-expert": dict(q_weight=0.0125),
        "expert": dict(q_weight=0.0125),
    },
    "omar_halfcheetah_2x3": {
        "random": dict(q_weight=128.0, cql_weight=32.0),
        "random-medium": dict(q_weight=4.0, cql_weight=32.0),
        "medium-replay": dict(q_weight=4.0, cql_weight=2.0),
        "medium": dict(thresholds=8),
        "expert": dict(q_weight=2.0),
    },
}


def preset(dataset: str, env_id: str = "") -> Args:
    """The defaults of a data set, by its task and, if it is one of this project's by name, its split."""
    with contextlib.suppress(BadInput):
        env_id = find_env_id(dataset, env_id)
    values = ROBOT if env_id.startswith(("mamujoco_", "omar_halfcheetah")) else TASKS.get(env_id, {})
    split = dataset.partition("-")[2] if dataset.startswith(env_id) else ""
    return Args(dataset=dataset, **values | SPLIT_PRESETS.get(env_id, {}).get(split, {}))


# ============================================================================================================================
# 2. Policy
# ============================================================================================================================


class ParallelLinear(nn.Module):
    """N independent linear layers, one per agent (or critic), as one batched product: x [N, B, in] -> [N, B, out].

    `fan_in` [N], default `in`: how many inputs are real, for LeCun-normal initialisation when agents are padded to one size.
    """

    def __init__(self, n: int, n_in: int, n_out: int, fan_in: Tensor | None = None):
        super().__init__()
        std = (torch.full([n], n_in) if fan_in is None else fan_in).float().rsqrt()
        self.weight = nn.Parameter(torch.randn(n, n_in, n_out) * std[:, None, None])
        self.bias = nn.Parameter(torch.zeros(n, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # an addition of its own, which a compiler can merge with what follows
            return torch.bmm(x, self.weight) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class UNet(nn.Module):
    """Residual U-Net on vectors: x [N, B, A] -> [N, B, A], told a condition [N, B, sum of `widths`] [DOM2 network].

    Widths H, H/2, H/4 on the way down, H/2 and H on the way up, where what went down at the same width comes in again (the skips).
    """

    def __init__(self, n: int, a: int, hidden: int):
        super().__init__()
        wide, middle, narrow = hidden, hidden // 2, hidden // 4
        self.widths = [wide, middle, narrow, narrow, middle, wide]  # of the condition of each block
        self.down1, self.down2, self.down3 = Block(n, a, wide), Block(n, wide, middle), Block(n, middle, narrow)
        self.middle = Block(n, narrow, narrow)
        self.up1, self.up2 = Block(n, 2 * narrow, middle), Block(n, 2 * middle, wide)
        self.out = ParallelLinear(n, wide, a)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = condition.split(self.widths, -1)
        down1 = self.down1(x, parts[0])
        down2 = self.down2(down1, parts[1])
        down3 = self.down3(down2, parts[2])
        up1 = self.up1(torch.cat([self.middle(down3, parts[3]), down3], -1), parts[4])
        return self.out(self.up2(torch.cat([up1, down2], -1), parts[5]) + down1)


class Block(nn.Module):
    """x + f(x): two layers, the condition added between them. Where the width changes, a linear map of x, computed with the first."""

    def __init__(self, n: int, n_in: int, n_out: int):
        super().__init__()
        self.changes = n_in != n_out
        self.layer1, self.layer2 = ParallelLinear(n, n_in, n_out * (1 + self.changes)), ParallelLinear(n, n_out, n_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h, skip = self.layer1(x).chunk(2, -1) if self.changes else (self.layer1(x), x)
        return skip + self.layer2(F.silu(h + condition))


class MLP(nn.Module):
    """Three layers of H on x and the condition: x [N, B, A], condition [N, B, H] -> [N, B, A]."""

    def __init__(self, n: int, a: int, hidden: int):
        super().__init__()
        self.widths = [hidden]
        self.hidden0, self.hidden1, self.hidden2, self.out = (
            ParallelLinear(n, n_in, n_out) for n_in, n_out in ((a, hidden), (hidden, hidden), (hidden, hidden), (hidden, a))
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.silu(self.hidden1(F.silu(self.hidden0(x) + condition)))
        return self.out(F.silu(self.hidden2(h)))


class DiffusionPolicy(nn.Module):
    """N independent diffusion policies pi_j(a_j | o_j): a noise prediction eps_j(x, o_j, t), sampled with a DPM-Solver.

    The forward process is a variance-preserving SDE, x_t ~ N(alpha_t a, sigma_t^2 I) for t from 0 to 1 [DOM2 SDE]. Sampling goes back
    from x_1 ~ N(0, I) to t = 0.001 in K first-order steps [DOM2 solver].
    """

    BETA, END = (0.1, 20.0), 1e-3

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, args: Args):
        super().__init__()
        n, o = obs_mask.shape
        a, hidden, waves = action_mask.shape[1], args.policy_hidden, 32
        wide, joined = max(128, hidden), max(64, hidden // 4)  # widths of the layers for observations, and of where time joins them
        self.register_buffer("obs_mask", obs_mask.float()[:, None], persistent=False)  # [N, 1, O]
        self.register_buffer("action_mask", action_mask.float()[:, None], persistent=False)  # [N, 1, A]
        self.register_buffer("frequency", torch.randn(waves // 2) * 16, persistent=True)
        self.obs1, self.obs2 = ParallelLinear(n, o, wide, obs_mask.sum(1)), ParallelLinear(n, wide, wide)
        self.time = ParallelLinear(n, waves, waves)
        self.join_obs, self.join_time = ParallelLinear(n, wide, joined), ParallelLinear(n, waves, joined)
        self.network = (UNet if args.network == "unet" else MLP)(n, a, hidden)
        self.tell = ParallelLinear(n, joined, sum(self.network.widths))
        self.set_steps(args.solver_steps)

    def set_steps(self, steps: int) -> None:
        """K and its grid of times, finer towards the end [deviation E1]: uniform steps end far from the data's spread."""
        times = torch.linspace(1.0, self.END ** (1 / 3), steps + 1, dtype=torch.float64) ** 3  # [K + 1]
        self.alpha, self.sigma = (scale.tolist() for scale in self.scales(times))
        self.register_buffer("times", times.float().to(self.obs_mask.device), persistent=False)
        self.steps = steps

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t."""
        low, high = self.BETA
        log_alpha = -(high - low) * t**2 / 4 - low * t / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def noise(self, batch: int, generator: torch.Generator) -> Tensor:
        """Where one chain starts: [N, B, A] standard normal numbers. The solver itself is deterministic."""
        n, _, a = self.action_mask.shape
        return torch.randn(n, batch, a, generator=generator, device=generator.device)

    def condition(self, obs: Tensor, t: Tensor) -> Tensor:
        """What the network is told at the times t [K, B or 1]: obs [N, B, O] -> [N, K, B, C]. It does not depend on x, so that a
        chain needs it only once, for all its steps."""
        (n, b, _), k = obs.shape, len(t)
        angle = 2 * math.pi * t[..., None] * self.frequency  # [K, B or 1, 16]
        wave = torch.cat([angle.sin(), angle.cos()], -1).flatten(0, 1).expand(n, -1, -1)  # [N, K * (B or 1), 32]
        time = self.join_time(F.silu(self.time(wave))).unflatten(1, (k, -1))  # [N, K, B or 1, joined]
        seen = self.join_obs(F.silu(self.obs2(F.silu(self.obs1(obs * self.obs_mask)))))  # [N, B, joined]
        both = F.silu(seen[:, None] + time).flatten(1, 2)  # [N, K * B, joined]
        return self.tell(both).view(n, k, b, -1)

    def predict(self, x: Tensor, condition: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """The noise in x [N, B, A] at the time of `alpha`, `sigma` and `condition` [N, B, C].

        eps = sigma_t x + alpha_t network(x, o, t) [deviation E6]: nearly all of x is noise at t = 1, and an error of the network there,
        where the solver divides by alpha = 0.007, must not count 150 times. An error e of the network changes the implied action by sigma_t e.
        """
        return (sigma * x + alpha * self.network(x, condition)) * self.action_mask

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Samples: obs [N, B, O], noise from `noise` -> action [N, B, A] in [-1, 1].

        One first-order step from s to t: x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(lambda_t - lambda_s) - 1) eps, lambda = log(alpha /
        sigma). The same in other words: estimate the action as a = (x_s - sigma_s eps) / alpha_s, then x_t = alpha_t a + sigma_t eps
        [DOM2 solver]. In these words the estimate can be kept in the box [deviation E2].
        """
        x, conditions = noise * self.action_mask, self.condition(obs, self.times[:-1, None]).unbind(1)
        for k, (condition, alpha, sigma) in enumerate(zip(conditions, self.alpha, self.sigma)):
            action = ((x - sigma * self.predict(x, condition, alpha, sigma)) / alpha).clamp(-1.0, 1.0)
            eps = (x - alpha * action) / sigma
            x = self.alpha[k + 1] * action + self.sigma[k + 1] * eps
        return x.clamp(-1.0, 1.0)


class DeterministicPolicy(nn.Module):
    """N independent policies a_j = tanh(f_j(o_j)) behind the interface of `DiffusionPolicy`: the baseline, MA-CQL: the
    deterministic policy gradient with twin critics and CQL, without TD3's noise on target actions and its delayed updates."""

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, args: Args):
        super().__init__()
        n, o = obs_mask.shape
        a, hidden = action_mask.shape[1], max(128, args.policy_hidden)  # as the other's layers for observations
        self.register_buffer("obs_mask", obs_mask.float(), persistent=False)
        self.register_buffer("action_mask", action_mask.float()[:, None], persistent=False)  # [N, 1, A]
        self.layer1, self.layer2 = ParallelLinear(n, o, hidden, obs_mask.sum(1)), ParallelLinear(n, hidden, hidden)
        self.out = ParallelLinear(n, hidden, a)

    def noise(self, batch: int, generator: torch.Generator) -> None:
        """None is needed."""

    def forward(self, obs: Tensor, noise: None = None) -> Tensor:
        """obs [N, B, O] -> action [N, B, A]."""
        h = F.relu(self.layer2(F.relu(self.layer1(obs * self.obs_mask[:, None]))))
        return torch.tanh(self.out(h)) * self.action_mask


# ============================================================================================================================
# 3. Critic
# ============================================================================================================================


class Critic(nn.Module):
    """Twin critics of every agent, on what it sees and does alone: (obs [N, B, O], action [N, M * B, A]) -> [Q, N, M * B], for M
    actions per observation.

    Q = shift + scale * network, with numbers that fit the rewards in the data [deviation E7]: a network that starts at 0 needs
    thousands of updates to climb to values around 150, and the policies follow it meanwhile.
    """

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, args: Args):
        super().__init__()
        n, o = obs_mask.shape
        a, hidden = action_mask.shape[1], args.critic_hidden
        self.register_buffer("obs_mask", obs_mask.float()[:, None], persistent=False)  # [N, 1, O]
        self.register_buffer("action_mask", action_mask.float()[:, None], persistent=False)  # [N, 1, A]
        fan_in = (obs_mask.sum(1) + action_mask.sum(1)).repeat_interleave(2)
        self.register_buffer("shift", torch.zeros(n, 1))
        self.register_buffer("scale", torch.ones(n, 1))
        self.in_obs, self.in_action = ParallelLinear(2 * n, o, hidden, fan_in), ParallelLinear(2 * n, a, hidden, fan_in)
        self.hidden1, self.out = ParallelLinear(2 * n, hidden, hidden), ParallelLinear(2 * n, hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        (n, b, _), rows = obs.shape, action.shape[1]
        twice = lambda x: x[:, None].expand(-1, 2, -1, -1).flatten(0, 1)  # the two critics of an agent stand side by side
        seen = self.in_obs(twice(obs * self.obs_mask))[:, None]  # [N * Q, 1, B, H]
        done = self.in_action(twice(action * self.action_mask)).unflatten(1, (-1, b))  # [N * Q, M, B, H]
        h = F.relu(seen + done).flatten(1, 2)
        return self.shift + self.scale * self.out(F.relu(self.hidden1(h))).view(n, 2, rows).transpose(0, 1)

    def set_units(self, reward: Tensor, gamma: float) -> None:
        """From the rewards in the data [N, T]: what a policy with their mean is worth, and their spread in one step."""
        std, mean = torch.std_mean(reward, 1, keepdim=True)
        self.shift.copy_(mean / max(1 - gamma, 1e-3))
        self.scale.copy_(std.clamp(min=1e-3))


# ============================================================================================================================
# 4. Losses
# ============================================================================================================================

Logs = dict[str, Tensor]


def critic_loss(critic: Critic, target: Critic, target_policy: nn.Module, batch: dict[str, Tensor], noise: Tensor | None,
                uniform: Tensor, args: Args) -> tuple[Tensor, Logs, Tensor]:  # fmt: skip
    """sum_k E[(Q_k(o, a) - y)^2] + zeta E[logsumexp_M Q_k(o, a~) - Q_k(o, a)] [DOM2 critic], summed over agents.

    y = r + gamma (1 - terminated) min_k Q'_k(o', b'), b' from the averaged policy; a truncated step is not terminated. a~ are the
    M uniform actions [M, N, rows, A] on the first `rows` of the batch [deviation E3], with `cql_own` one of the averaged policy too.
    Also returns how much Q varies over the uniform ones [N], which the policies' loss may need.
    """
    m, n, rows, a = uniform.shape
    others = uniform.transpose(0, 1).reshape(n, m * rows, a)
    with torch.no_grad():
        next_action = target_policy(batch["next_obs"], noise)  # [N, B, A]
        if args.cql_own:
            # The same noise as above: the two terms are only added.
            own = target_policy(batch["obs"][:, :rows], None if noise is None else noise[:, :rows])
            others = torch.cat([others, own], 1)
        next_value = target(batch["next_obs"], next_action).amin(0)  # [N, B]
        goal = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
    value = critic(batch["obs"], batch["action"])  # [Q, N, B]
    td = ((value - goal) ** 2).mean(-1).sum(0)  # [N]
    other = critic(batch["obs"][:, :rows], others).unflatten(2, (-1, rows))  # [Q, N, M or M + 1, rows]
    gap = (other.logsumexp(2) - value[:, :, :rows]).mean(-1).sum(0)  # [N]
    loss = (td + args.cql_weight * gap).sum()
    with torch.no_grad():
        spread = other[0, :, :m].std(1).mean(-1)  # [N]
        logs = {
            "losses/critic": loss.detach(), "losses/td": td.mean(), "losses/cql": gap.mean(), "diag/value": value.mean(),
            "diag/critic_disagreement": (value[0] - value[1]).abs().mean(), "diag/value_spread": spread.mean(),
        }  # fmt: skip
    return loss, logs, spread


def imitation_loss(policy: DiffusionPolicy, batch: dict[str, Tensor], t: Tensor, eps: Tensor) -> tuple[Tensor, Logs]:
    """E || (eps - eps_theta(alpha_t a + sigma_t eps, o, t)) / alpha_t ||^2, summed over agents [DOM2 imitation]. t [1, B], eps [N, B, A].

    Divided by alpha_t [deviation E6], so that the network's errors count alike at all times (known as v-prediction). Otherwise those times
    hardly count at which little of the action is left in x, and it has to be inferred from the observation.
    """
    alpha, sigma = policy.scales(t[..., None])  # [1, B, 1]
    eps = eps * policy.action_mask
    condition = policy.condition(batch["obs"], t).squeeze(1)  # [N, B, C]
    predicted = policy.predict(alpha * batch["action"] + sigma * eps, condition, alpha, sigma)
    loss = (((eps - predicted) / alpha) ** 2).sum(-1).mean(1).sum()
    return loss, {"losses/imitation": loss.detach()}


def value_loss(policy: nn.Module, critic: Critic, batch: dict[str, Tensor], noise: Tensor | None, spread: Tensor,
               args: Args) -> tuple[Tensor, Logs]:  # fmt: skip
    """-eta E[min_k Q_k(o, b)] / scale, b from the policy, summed over agents [DOM2 value]. The gradient runs through all solver steps.

    scale, of each agent and without gradient, is E|Q(o, a)| in the paper's form; by default how much Q varies over actions
    [deviation E4], because where returns are large and actions matter little, the paper's makes every eta too small.
    """
    rows = max(1, round(args.q_rows * batch["obs"].shape[1]))
    obs = batch["obs"][:, :rows]
    action = policy(obs, noise)
    value = critic(obs, action).amin(0)  # [N, rows]
    scale = spread
    if args.q_scale == "mean":
        with torch.no_grad():
            scale = critic(obs, batch["action"][:, :rows]).amin(0).abs().mean(-1)
    eta = args.q_weight if args.policy == "diffusion" else 1.0  # another weight would only mean another bound on the gradient
    loss = -(eta * value.mean(-1) / scale.clamp(min=1e-6)).sum()
    logs = {
        "losses/value": loss.detach(),
        "diag/policy_value": value.detach().mean(),
        "diag/action_saturation": (action.detach().abs() > 0.99).float().mean(),
    }
    return loss, logs


# ============================================================================================================================
# 5. Training loop
# ============================================================================================================================


def trajectory_weights(returns: np.ndarray, count: int, top: float) -> np.ndarray:
    """1 + how many of the thresholds a trajectory's return reaches [K] [DOM2 reweighting]; 0 thresholds: 1 throughout."""
    thresholds = np.linspace(returns.mean(), max(np.quantile(returns, top), returns.mean()), count)
    return 1 + (returns[:, None] >= thresholds).sum(1)


class Data:
    """A data set on the device: one row per transition and agent, of which a batch holds views by name. Observations are
    counted from their mean, and those that vary by more than 1 in units of their standard deviation [deviation E8]: a robot's velocities.

    Each agent draws its own rows, by its own returns: row t of agent j is as likely as the weight of its trajectory, the step from
    `upto`[j, t - 1] to `upto`[j, t].
    """

    def __init__(self, data: Dataset, env: TeamEnv, args: Args, device: torch.device):
        n, o, a = env.num_agents, env.obs_mask.shape[1], env.action_mask.shape[1]
        self.widths = dict(obs=o, next_obs=o, action=a, reward=1, terminated=1)
        self.table = torch.empty(len(data.obs), n, sum(self.widths.values()), device=device)
        for start in range(0, len(data.obs), 1 << 16):
            part = slice(start, start + (1 << 16))
            ended = np.broadcast_to(data.terminations[part, None, None], (*data.rewards[part].shape, 1))
            columns = [
                data.obs[part],
                data.next_obs[part],
                np.clip(data.actions[part], -1, 1),
                data.rewards[part][..., None],
                ended,
            ]
            self.table[part] = torch.from_numpy(np.concatenate(columns, -1, dtype=np.float32)).to(device)
        obs, next_obs = self.table[..., :o], self.table[..., o : 2 * o]
        std, self.obs_mean = torch.std_mean(obs, 0)  # [N, O]
        self.obs_std = std.clamp(min=1.0)  # nothing is magnified: what varies little in the data may vary more where a policy goes
        for part in (obs, next_obs):
            part.sub_(self.obs_mean).div_(self.obs_std)
        self.reward = self.table[..., 2 * o + a].T  # [N, T]
        returns = np.add.reduceat(np.asarray(data.rewards, np.float64), data.episodes[:, 0])  # [trajectories, N]
        count = args.thresholds if args.reweight else 0
        weights = np.stack([trajectory_weights(own, count, args.top_quantile) for own in returns.T])  # [N, trajectories]
        weights = np.repeat(weights, np.diff(data.episodes, axis=1)[:, 0], axis=1) * data.next_known  # [N, T]
        self.upto = torch.from_numpy(weights.cumsum(1)).to(device)
        self.agents = torch.arange(n, device=device)[:, None]
        self.checksum = hashlib.sha256(data.episodes.tobytes() + data.returns.tobytes()).hexdigest()  # tells other data apart

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Rows [N, B]."""
        share = torch.rand(len(self.upto), batch, generator=generator, device=self.upto.device, dtype=torch.float64)
        return torch.searchsorted(self.upto, (share * self.upto[:, -1:]).long(), right=True)

    def sample(self, index: Tensor) -> dict[str, Tensor]:
        """Batch by name: obs [N, B, O], next_obs, action [N, B, A], reward [N, B], terminated [N, B]."""
        parts = self.table[index, self.agents].split(list(self.widths.values()), -1)
        return {name: part.squeeze(-1) if name in ("reward", "terminated") else part for name, part in zip(self.widths, parts)}


class Captured:
    """A function of tensors. On a GPU, once `enabled`, it is captured as a CUDA graph (one for each set of input shapes) and
    replayed: one launch instead of hundreds. Otherwise, or if capturing fails (then `error` says why), it is just the function.

    The function must not make the host wait, must draw no random numbers and must keep what it remembers in the tensors of
    `state`, which it changes in place. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable, state: Callable[[], list[Tensor]] = list):
        self.function, self.state, self.enabled, self.error = function, state, False, ""
        self.graphs: dict = {}  # input shapes -> graph, places of its inputs, its result

    def __call__(self, *inputs: Tensor):
        shapes = tuple(x.shape for x in inputs)
        if self.enabled and shapes not in self.graphs:
            try:
                self.graphs[shapes] = self._capture([x.clone() for x in inputs])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.enabled, self.error = False, _first_line(error)
                print(f"note      no CUDA graph: {self.error}", flush=True)
                self.graphs.clear()
        if not self.enabled:
            return self.function(*inputs)
        graph, places, result = self.graphs[shapes]
        for place, x in zip(places, inputs):
            place.copy_(x)
        graph.replay()
        return result

    def _capture(self, places: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], object]:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.collect()
        gc.disable()  # if an older graph were collected during the capture, the capture would fail
        try:
            with unchanged(self.state()):
                aside.wait_stream(here)
                with torch.cuda.stream(aside):
                    for _ in range(3):  # so that libraries and compilers have set themselves up
                        self.function(*places)
                here.wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside):
                result = self.function(*places)
        finally:
            torch.cuda.set_stream(here)  # a capture that fails may not do it
            if collects:
                gc.enable()
        return graph, places, result


@contextlib.contextmanager
def unchanged(tensors: list[Tensor]):
    """Gives the tensors their values back, in place, when the block is left."""
    before = [x.clone() for x in tensors]
    try:
        yield
    finally:
        for x, value in zip(tensors, before):
            x.copy_(value)


class DOM2(nn.Module):
    """Policies, critics, their averages and their optimisers: everything that learns."""

    def __init__(self, env: TeamEnv, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        masks = torch.from_numpy(env.obs_mask), torch.from_numpy(env.action_mask)
        kind = DiffusionPolicy if args.policy == "diffusion" else DeterministicPolicy
        self.policy, self.critic = kind(*masks, args).to(device), Critic(*masks, args).to(device)
        self.slow_policy, self.slow_critic = (
            copy.deepcopy(self.policy).requires_grad_(False),
            copy.deepcopy(self.critic).requires_grad_(False),
        )
        # What an observation of 0 and of 1 means to the networks.
        self.register_buffer("obs_mean", torch.zeros(masks[0].shape, device=device))  # [N, O]
        self.register_buffer("obs_std", torch.ones(masks[0].shape, device=device))
        # The learning rates are tensors because a captured graph reads them from their place.
        rate = lambda lr: torch.tensor(lr, device=device)
        adam = lambda module, lr: torch.optim.Adam(module.parameters(), rate(lr), fused=True, capturable=device.type == "cuda")
        self.optimizers = {"policy": adam(self.policy, args.policy_lr), "critic": adam(self.critic, args.q_lr)}
        for optimizer in self.optimizers.values():  # its state must exist before a graph is captured
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            for state in optimizer.state.values():
                state["step"].zero_()
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.imitation_loss, self.value_loss = map(compiled, (critic_loss, imitation_loss, value_loss))
        self.chain = Captured(compiled(lambda obs, *noise: self.slow_policy(obs, *noise)))

    def set_units(self, data: Data) -> None:
        """Inputs and outputs of the networks count in the units of the data."""
        self.obs_mean.copy_(data.obs_mean)
        self.obs_std.copy_(data.obs_std)
        for critic in (self.critic, self.slow_critic):
            critic.set_units(data.reward, self.args.gamma)

    def tensors(self) -> list[Tensor]:
        """Everything that an update changes."""
        optimizers = [x for optimizer in self.optimizers.values() for state in optimizer.state.values() for x in state.values()]
        return [*self.state_dict().values(), *optimizers]

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Decentralised execution of the averaged policies, sampled: obs [E, N, O] -> action [E, N, A]."""
        obs = ((torch.from_numpy(obs).to(self.device) - self.obs_mean) / self.obs_std).transpose(0, 1)  # [N, E, O]
        noise = self.policy.noise(obs.shape[1], generator)
        return self.chain(obs, *([] if noise is None else [noise])).transpose(0, 1).cpu().numpy()

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """All the randomness of one update but the batch: noise of the next action, uniform actions, times, eps, noise for the critic."""
        args, (n, _, a), b = self.args, self.policy.action_mask.shape, self.args.batch_size
        rand = lambda *shape: torch.rand(shape, generator=generator, device=self.device)
        uniform = rand(args.cql_actions, n, max(1, round(args.cql_rows * b)), a) * 2 - 1
        if args.policy == "deterministic":
            return [uniform]
        end = DiffusionPolicy.END
        eps = torch.randn(n, b, a, generator=generator, device=self.device)
        return [
            uniform,
            self.policy.noise(b, generator),
            end + (1 - end) * rand(1, b),
            eps,
            self.policy.noise(max(1, round(args.q_rows * b)), generator),
        ]

    def update(self, batch: dict[str, Tensor], uniform: Tensor, next_noise=None, t=None, eps=None, noise=None) -> Logs:
        """One update of critics, if anybody asks them, policies and averages."""
        args = self.args
        guided = args.q_weight or args.policy == "deterministic"  # imitation alone asks no critic, and trains none
        loss, logs = 0.0, {}
        if guided:
            td_and_cql, logs, spread = self.critic_loss(
                self.critic, self.slow_critic, self.slow_policy, batch, next_noise, uniform, args
            )
            self._step("critic", self.critic, td_and_cql)
        if eps is not None:
            loss, more = self.imitation_loss(self.policy, batch, t, eps)
            logs |= more
        if guided:
            value, more = self.value_loss(self.policy, self.critic, batch, noise, spread, args)
            loss, logs = loss + value, logs | more
        self._step("policy", self.policy, loss)
        with torch.no_grad():
            for slow, fast in ((self.slow_policy, self.policy), (self.slow_critic, self.critic)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), args.tau)
        return logs

    def set_rates(self, policy: float, critic: float) -> None:
        for name, rate in (("policy", policy), ("critic", critic)):
            self.optimizers[name].param_groups[0]["lr"].fill_(rate)

    def _step(self, name: str, module: nn.Module, loss: Tensor) -> None:
        """A step of one optimiser; the norm of the gradient is bounded for each agent by itself."""
        parameters = list(module.parameters())
        self.optimizers[name].zero_grad()
        loss.backward(inputs=parameters)
        n = len(self.policy.action_mask)
        grads = [p.grad.view(n, -1) for p in parameters]  # [N, ...]: an agent's two critics stand side by side
        scale = (self.args.grad_clip / (torch.cat(grads, 1).norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)  # [N, 1]
        for grad in grads:
            grad.mul_(scale)
        self.optimizers[name].step()


class Learner:
    """Updates from the data: draws what is random, and hands it to `DOM2.update`, on a GPU captured as a CUDA graph."""

    CHECKED, WINDOW, TOLERANCE = 200, 10, 1e-2  # the check before a graph is trusted, see `capture`

    def __init__(self, agent: DOM2, data: Data, args: Args):
        self.agent, self.data, self.args = agent, data, args
        self.update = Captured(lambda index, *drawn: agent.update(data.sample(index), *drawn), agent.tensors)
        self.to_check = args.cuda_graph and agent.device.type == "cuda"

    def step(self, generator: torch.Generator, done: float = 0.0) -> Logs:
        """One update of critics, policies and averages, when the share `done` of the training is over [deviation E5]."""
        if self.to_check:
            self.to_check = False
            print(f"{self.capture():<100}", flush=True)
        decay = (1 + math.cos(math.pi * done)) / 2 if self.args.lr_decay else 1.0
        self.agent.set_rates(self.args.policy_lr * decay, self.args.q_lr * decay)
        return self.update(self.data.draw(self.args.batch_size, generator), *self.agent.draw(generator))

    def capture(self) -> str:
        """Turns graphs on, for acting too, if 200 captured updates have the losses of plain ones. Says what it found.

        Plain and captured updates start from the same state, with the same draws, every 10 updates: the order of some sums on a
        GPU is not fixed, and left alone for longer two correct runs drift apart. Losses may differ by 1 % of the largest of
        their kind. The agent is left as it was.
        """

        def losses(captured: bool, seed: int) -> Tensor:
            self.update.enabled, trace = captured, []
            generator = torch.Generator(self.agent.device).manual_seed(seed)
            for _ in range(self.WINDOW):
                trace += [value.clone() for name, value in self.step(generator).items() if name.startswith("losses/")]
                if captured and not self.update.enabled:
                    raise RuntimeError(self.update.error)
            return torch.stack(trace)

        try:
            plain, captured = [], []
            with unchanged(self.agent.tensors()):
                for seed in range(self.CHECKED // self.WINDOW):
                    with unchanged(self.agent.tensors()):
                        plain.append(losses(False, seed))
                    captured.append(losses(True, seed))
            plain, captured = torch.stack(plain), torch.stack(captured)  # [windows, losses of a window in order]
            error = ((captured - plain).abs().amax(0) / plain.abs().amax(0).clamp(min=1e-6)).max().item()
            self.update.enabled = self.agent.chain.enabled = error <= self.TOLERANCE
            reason = f"losses of {self.CHECKED} updates differ by at most {error:.1e} from eager ones, relatively"
        except RuntimeError as failure:
            self.update.enabled = self.agent.chain.enabled = False
            reason = _first_line(failure)
        if not self.update.enabled:
            self.update.graphs.clear()
        return f"graphs    {'on' if self.update.enabled else 'off'}: {reason}"


def pick_device(name: str) -> torch.device:
    """The one place that decides where tensors live; they are float32 everywhere, a GPU multiplies them as TF32."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no CUDA device here; use --device cpu")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def evaluate(agent: DOM2, envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """Team return of one sampled episode in each of `envs`; start states and noise depend on `seed` only.

    Raises `FloatingPointError` for an action that is not finite.
    """
    generator = torch.Generator(agent.device).manual_seed(seed)
    obs, _ = envs.reset(seed=seed)
    returns, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    while not finished.all():
        action = agent.act(obs, generator)
        if not np.isfinite(action).all():
            raise FloatingPointError("action in evaluation is not finite")
        obs, _, terminated, truncated, info = envs.step(action)
        done = terminated | truncated
        if done.any():
            first = done & ~finished  # an environment that is done early runs on; only its first episode counts
            returns[first] = info["episode"]["r"][first]
            finished |= done
            obs, _ = envs.reset(options={"reset_mask": done})
    return returns


def train(args: Args, saved: dict | None) -> None:
    """The whole of training, from the start or from the checkpoint `saved`."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    source = open_data(args)
    env = make_env(source.env_id, args.observation, prey=args.prey)
    check_sizes(source, env)
    eval_envs = make_vec(source.env_id, args.eval_episodes, args.observation, prey=args.prey)
    try:
        agent, data = DOM2(env, args, device), Data(source, env, args, device)
        agent.set_units(data)
        learner = Learner(agent, data, args)
        seconds = estimate_seconds(learner, eval_envs, find_task(source.env_id).horizon)
    except (MemoryError, RuntimeError) as error:
        raise BadInput(f"networks, batches or data of these sizes cannot be made: {_first_line(error)}") from error
    generator = torch.Generator(device).manual_seed(args.seed)
    run = Run(args, learner, generator, source.env_id, saved)
    run.announce(source, env, seconds)
    if not run.rows:
        run.evaluate_and_save(eval_envs)
    while run.step < args.total_updates:
        run.log(learner.step(generator, run.step / args.total_updates))
        run.step += 1
        run.progress()
        if run.step % args.eval_every == 0 or run.step >= args.total_updates:
            run.evaluate_and_save(eval_envs)
    run.finish()


# ============================================================================================================================
# 6. Main: data, run directory, checkpoints, command line
# ============================================================================================================================

FORMAT = "dom2-5"  # of checkpoint.pt; raise it when a change makes older files unreadable
COLUMNS = ("step", "wall_time_s", "return_mean", "return_std", "episodes", "normalized_score")  # of eval.csv; a step is an update


class FailedRun(RuntimeError):
    """A run that cannot go on: one line on stderr, exit code 3."""


def open_data(args: Args) -> Dataset:
    """The data set, which is made first if it is one of this project's and not there yet. Raises `BadInput`."""
    return open_dataset(args.dataset, args.data_fraction, args.seed, args.env_id, args.data_seed)


class Run:
    """One run: its counters, what it prints, and what it writes to its directory."""

    def __init__(self, args: Args, learner: Learner, generator: torch.Generator, env_id: str, saved: dict | None):
        self.args, self.agent, self.learner, self.generator, self.env_id = args, learner.agent, learner, generator, env_id
        self.path = Path(args.resume) if args.resume else make_run_dir(args)
        self.step, self.rows, self.seconds_before = 0, [], 0.0
        self.prey = checksum(args.prey)
        if saved:
            self.restore(saved)
        if args.resume:  # some flags may have changed
            try:
                write_config(self.path, args)
            except FailedRun as error:
                raise BadInput(str(error)) from error
        self.pending: list[tuple[int, tuple[str, ...], Tensor]] = []  # scalars still on the device: (step, names, values)
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1 if saved else 0)
        self.started = self.reported = time.time()
        self.reported_step = self.step

    def announce(self, data: Dataset, env: TeamEnv, seconds: float) -> None:
        args, agent = self.args, self.agent
        count = lambda module: f"{sum(p.numel() for p in module.parameters()):,} parameters"
        seconds *= 1 - self.step / args.total_updates
        print(f"task      {data.env_id}: {find_task(data.env_id).description}")
        if args.prey:
            print(f"prey      {args.prey}")
        if data.card and data.card.get("prey") not in (None, self.prey or "the project's own"):
            print("note      the data are of another prey than the one of the evaluations")
        print(f"data      {data}")
        print(f"sizes     {env.num_agents} agents; observations {env.obs_sizes}, actions {env.action_sizes}")
        print(f"device    {agent.device}, {torch.get_num_threads()} CPU thread(s)")
        print(f"networks  {args.policy} policies {count(agent.policy)}, critics {count(agent.critic)}")
        print(f"expected  about {_duration(seconds)} from update {self.step:,} to {args.total_updates:,}")
        print(f"logs      {self.path}    (watch: tensorboard --logdir {self.path.parent})", flush=True)

    @property
    def seconds(self) -> float:
        """Wall time of training so far, over all resumed parts."""
        return self.seconds_before + time.time() - self.started

    def log(self, scalars: Logs) -> None:
        """Keeps scalars on the device until the next report, so that an update never waits for a copy."""
        self.pending.append((self.step, tuple(scalars), torch.stack(tuple(scalars.values()))))

    def flush(self) -> None:
        """Copies the pending scalars to the host, writes their means to TensorBoard, stops the run if one is not finite."""
        if not self.pending:
            return
        values = iter(torch.cat([values for _, _, values in self.pending]).tolist())
        series: dict[str, list[float]] = {}
        bad = []
        for step, names, _ in self.pending:
            for name, value in zip(names, values):
                series.setdefault(name, []).append(value)
                if not math.isfinite(value):
                    bad.append((step, name, value))
        for name, numbers in series.items():
            self.writer.add_scalar(name, np.mean(numbers), self.step)
        self.pending.clear()
        self.writer.flush()
        if bad:
            step, name, value = bad[0]
            self.fail(f"{name} is {value}", step)

    def fail(self, what: str, step: int) -> None:
        try:
            write(self.path / "failed.pt", lambda file: torch.save(self.checkpoint(), file))
            saved = f"state saved to {self.path / 'failed.pt'}"
        except FailedRun as error:
            saved = str(error)
        good = self.path / "checkpoint.pt"
        raise FailedRun(f"update {step}: {what}; {saved}" + (f"; the last good state is in {good}" if good.exists() else ""))

    def progress(self) -> None:
        """The progress line: rewritten in place on a terminal, a new line every 30 s elsewhere."""
        now, terminal = time.time(), sys.stdout.isatty()
        if now - self.reported < (2 if terminal else 30):
            return
        rate, total = (self.step - self.reported_step) / (now - self.reported), self.args.total_updates
        line = f"update {self.step:,}/{total:,} | {rate:,.0f} updates/s | last return {self.rows[-1]['return_mean']:.1f}"
        line += f" | {_duration((total - self.step) / rate)} left"
        print(f"{line:<100}", end="\r" if terminal else "\n", flush=True)
        self.writer.add_scalar("charts/updates_per_second", rate, self.step)
        self.flush()
        self.reported, self.reported_step = now, self.step

    def evaluate_and_save(self, envs: gym.vector.VectorEnv) -> None:
        self.flush()
        try:
            returns = evaluate(self.agent, envs, evaluation_seed(self.args.seed))
        except FloatingPointError as error:
            self.fail(str(error), self.step)
        if not all(value.isfinite().all() for value in self.agent.state_dict().values()):
            self.fail("a parameter or statistic of the networks is not finite", self.step)  # before it replaces the good one
        mean, std, score = float(returns.mean()), float(returns.std()), normalized(self.env_id, returns.mean())
        self.rows.append(dict(zip(COLUMNS, (self.step, round(self.seconds, 1), mean, std, len(returns), score))))
        line = f"eval at update {self.step:,} after {_duration(self.seconds)}: {summary(self.env_id, returns)}"
        print(f"{line:<100}", flush=True)
        for name in COLUMNS[2:4] + COLUMNS[5:]:
            self.writer.add_scalar(f"eval/{name}", self.rows[-1][name], self.step)
        lines = [",".join(COLUMNS), *(",".join(map(str, row.values())) for row in self.rows)]
        write(self.path / "eval.csv", lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
        write(self.path / "checkpoint.pt", lambda file: torch.save(self.checkpoint(), file))
        self.reported, self.reported_step = time.time(), self.step

    def finish(self) -> None:
        self.writer.close()
        try:
            draw_curve(self.path / "curve.png", self.args, self.rows)
        except ImportError as error:  # a machine with less than requirements.txt: not worth failing a finished run
            print(f"note      no curve.png: {error}")
        if self.args.capture_video:
            save_video(self.agent, self.args, self.env_id, self.path / "videos")
        print(f"done in {_duration(self.seconds)}: {self.path}")

    def checkpoint(self) -> dict:
        """Everything a resumed run needs but the data."""
        return {
            "format": FORMAT, "args": dataclasses.asdict(self.args), "step": self.step, "env_id": self.env_id,
            "agent": self.agent.state_dict(), "generator": self.generator.get_state(), "rows": self.rows, "seconds": self.seconds,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.agent.optimizers.items()},
            "device": self.agent.device.type, "prey": self.prey, "data": self.learner.data.checksum,
        }  # fmt: skip

    def restore(self, saved: dict) -> None:
        with _must_fit(self.path / "checkpoint.pt"):
            if saved["data"] != self.learner.data.checksum:
                raise BadInput(f"trained on other data than --dataset {self.args.dataset} holds now")
            self.agent.load_state_dict(saved["agent"])
            for name, optimizer in self.agent.optimizers.items():
                settings = optimizer.state_dict()["param_groups"]  # learning rates and the like are the arguments'
                optimizer.load_state_dict({"state": saved["optimizers"][name]["state"], "param_groups": settings})
                for parameter, state in optimizer.state.items():  # torch does not check shapes, and fused Adam trusts them
                    shapes = {key: tuple(value.shape) for key, value in state.items()}
                    if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                        raise ValueError(f"optimizer state of the {name} has shapes {shapes}")
            self.step, self.seconds_before = int(saved["step"]), float(saved["seconds"])
            self.rows = [{key: row[key] + 0 for key in COLUMNS} for row in saved["rows"]]
            if saved["device"] == self.agent.device.type:
                self.generator.set_state(saved["generator"])
            else:  # a CUDA generator's state means nothing to the CPU's, or the other way round
                self.generator.manual_seed(mix_seed(self.args.seed, self.step))
                print(f"note      the run was on {saved['device']}: its random numbers go on differently here")


def normalized(env_id: str, score: float) -> float:
    """On the scale of the task's published scores, 0 random and 100 expert; NaN if there are none."""
    return float(normalize(env_id, score))


def summary(env_id: str, returns: np.ndarray) -> str:
    score = normalized(env_id, returns.mean())
    text = f"return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes"
    return text if math.isnan(score) else f"{text}, normalised {score:.1f}"


@contextlib.contextmanager
def _must_fit(path: Path):
    """A file of a run whose parts are missing or of other kinds or sizes is bad input, not a bug."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"{path}: cut short, or not written by this dom2.py: {reason[:200]}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write(path: Path, dump: Callable[[BinaryIO], object]) -> None:
    """Writes under a temporary name, then renames: after a crash or on a full disk the old file is still there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            dump(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        kept = "; the file from before is kept" if path.exists() else ""
        raise FailedRun(f"cannot write {path}: {_first_line(cause)}{kept}") from error


def write_config(path: Path, args: Args) -> None:
    config = {"args": dataclasses.asdict(args), **versions()}
    write(path / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))


def checksum(path: str) -> str:
    """Of a file that a run depends on; "" for none."""
    return sha256(Path(path)) if path else ""


def make_run_dir(args: Args) -> Path:
    """A new run directory. It gets its name when config.json is inside, so that a run can be resumed from its first moment."""
    name = "-".join(Path(args.dataset).resolve().parts[-3:]) if is_folder(args.dataset) else args.dataset
    path = Path(args.run_dir) / f"{name}__dom2__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_config(temporary, args)
        path = next(p for p in (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 10_000))) if not p.exists())
        return temporary.rename(path)
    except (OSError, FailedRun) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BadInput(f"--run-dir {args.run_dir}: cannot be written: {error}") from error


def load(run_dir: str) -> tuple[Args, dict | None]:
    """Arguments and checkpoint of a run; no checkpoint if it was killed before the first. Nothing in the files is executed."""
    config, path = Path(run_dir) / "config.json", Path(run_dir) / "checkpoint.pt"
    if not config.is_file() and not path.is_file():
        raise BadInput(f"{run_dir}: no run there; give the directory that a run printed behind 'logs'")
    saved = None
    with _must_fit(path if path.is_file() else config):
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if (
                not isinstance(saved, dict)
                or saved.get("format") != FORMAT
                or not isinstance(saved.get("step"), int)
                or saved["step"] < 0
            ):
                raise BadInput(f"not a checkpoint of this version of dom2.py (format {FORMAT})")
        args = Args(**(saved["args"] if saved else json.loads(config.read_bytes())["args"]))
        args = dataclasses.replace(args, resume="", evaluate="")
        # Data and prey may have moved: the command line can say where to.
        validate(dataclasses.replace(args, prey="", evaluate=run_dir))
    return args, saved


def draw_curve(path: Path, args: Args, rows: list[dict]) -> None:
    """Return against updates, from the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, mean, std = (np.array([row[key] for row in rows]) for key in ("step", "return_mean", "return_std"))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, mean, marker=".")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.2, label="± one standard deviation over episodes")
    axis.set(xlabel="updates", ylabel="team return", title=f"DOM2 ({args.policy} policy), {args.dataset}, seed {args.seed}")
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)


def save_video(agent: DOM2, args: Args, env_id: str, folder: Path) -> None:
    generator, seed = torch.Generator(agent.device).manual_seed(args.seed), evaluation_seed(args.seed)
    record_video(lambda obs: agent.act(obs, generator), env_id, folder, seed, args.observation, args.prey, args.shift)


def estimate_seconds(learner: Learner, envs: gym.vector.VectorEnv, horizon: int) -> float:
    """Expected seconds of the whole run, from a few updates and steps on this machine; the agent is left as it was."""
    agent, args = learner.agent, learner.args
    generator = torch.Generator(agent.device).manual_seed(0)
    index, drawn = learner.data.draw(args.batch_size, generator), agent.draw(generator)
    obs = envs.reset(seed=0)[0]

    def seconds(function, repeats):
        function()  # the first call is slower
        start, count = time.perf_counter(), 0
        while count < repeats and time.perf_counter() - start < 2:
            function()
            count += 1
            next(agent.parameters())[0].sum().item()  # wait for the device
        return (time.perf_counter() - start) / count

    with unchanged(agent.tensors()):
        update = seconds(lambda: learner.update(index, *drawn), 8)
    step = seconds(lambda: envs.step(agent.act(obs, generator)), 5)
    return args.total_updates * (update + horizon * step / args.eval_every)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def evaluation_seed(seed: int) -> int:
    """Of the start states and the noise of every evaluation in a run with this seed."""
    return mix_seed(seed, 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def validate(args: Args) -> None:
    """Raises `BadInput` for a value of the wrong kind, a number out of range, or a data set or task that is not one."""
    for field in dataclasses.fields(Args):  # the command line sees to the kinds, a file from outside may not
        value = getattr(args, field.name)
        if type(value) is not type(field.default) or get_origin(field.type) is Literal and value not in get_args(field.type):
            raise BadInput(f"{_flag(field.name)} cannot be {value!r}")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            raise BadInput(f"{_flag(name)} {getattr(args, name)} is out of range: it must be at least {low} and at most {high}")
    if args.policy == "deterministic" and not args.q_weight:
        raise BadInput("--policy deterministic with --q-weight 0: it does not imitate, and would have nothing to learn from")
    if not args.evaluate:  # which needs no data
        try:
            env_id = find_env_id(args.dataset, args.env_id)
        except BadInput as error:
            raise BadInput(
                f"--dataset {error}" + "; if the run's data have moved, --dataset says where they are now" * bool(args.resume)
            ) from error
        if args.env_id and args.env_id != env_id and not is_folder(args.dataset):
            raise BadInput(f"--env-id {args.env_id}: {args.dataset} is of {env_id}")
        if args.data_seed and is_folder(args.dataset):
            raise BadInput("--data-seed goes with the name of a data set, not with a folder")
        check_task(args, env_id)
    if args.shift and not args.evaluate:
        raise BadInput("--shift goes with --evaluate: training is on data only")
    if not args.run_dir:
        raise BadInput("--run-dir needs a value")
    if args.capture_video and not importlib.util.find_spec("moviepy"):
        raise BadInput("--capture-video needs the package moviepy, see requirements.txt")


def check_task(args: Args, env_id: str) -> None:
    """Raises `BadInput` for an observation setting or a prey that the task does not have."""
    try:
        check_options(env_id, args.observation, args.prey, "")
    except BadInput as error:
        moved = args.prey and (args.resume or args.evaluate)
        raise BadInput(f"{error}" + "; if it has moved, --prey says where it is now" * bool(moved)) from error


def read_flags(kind, argv: list[str], default=None, prog: str = ""):
    """The command line as an instance of the dataclass `kind` (or of one of several). Raises `BadInput` in place of tyro's boxes."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            default = {} if default is None else {"default": default}
            args, unknown = tyro.cli(kind, args=argv, **default, return_unknown_args=True, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue(), end="")  # --help
            raise
        reason = re.split(r"\s-{9,}\s", err.getvalue())  # tyro's message stands between two rules
        raise BadInput(" ".join(reason[min(1, len(reason) - 1)].split())) from None
    if unknown:
        near = difflib.get_close_matches(unknown[0], [_flag(field.name) for field in dataclasses.fields(args)])
        raise BadInput(
            f"unknown argument '{unknown[0]}'; " + (f"did you mean {' or '.join(near)}?" if near else "--help lists the flags")
        )
    return args


def parse(argv: list[str]) -> tuple[Args, dict | None]:
    """Command line -> arguments, and the checkpoint if a run is continued or evaluated. Raises `BadInput`."""
    # These decide the other flags' defaults.
    first = {"--dataset": Args.dataset, "--env-id": None, "--resume": None, "--evaluate": None}
    for part, following in zip(argv, [*argv[1:], ""]):
        flag, equals, value = part.partition("=")
        if flag.replace("_", "-") in first:
            first[flag.replace("_", "-")] = value if equals else following
    for flag, value in first.items():
        if value == "" or str(value).startswith("--"):
            raise BadInput(f"{flag} needs a value")
    if first["--resume"] and first["--evaluate"]:
        raise BadInput("--resume and --evaluate exclude each other")
    old, saved = first["--resume"] or first["--evaluate"], None
    if old:
        default, saved = load(old)
        if first["--evaluate"]:  # a video is wanted only if this command asks for one; a resumed run still wants its own
            default = dataclasses.replace(default, capture_video=False)
    else:
        default = preset(first["--dataset"], first["--env-id"] or "")

    args = read_flags(Args, argv, default, "dom2.py")
    if old:
        if args.evaluate and not saved:
            raise BadInput(f"{old}: no checkpoint.pt there yet; python dom2.py --resume {old} goes on with the run")
        if saved and not args.evaluate and args.total_updates < min(saved["step"], default.total_updates):
            raise BadInput(f"--total-updates {args.total_updates}: the run in {old} is at update {saved['step']} already")
        free = {"resume", "evaluate", "device", "torch_threads", "cuda_graph", "compile", "capture_video", "prey"}
        free |= {"seed", "eval_episodes", "shift"} if args.evaluate else {"total_updates", "dataset"}
        free |= {"solver_steps"} if args.evaluate and args.policy == "diffusion" else set()
        for name, value in dataclasses.asdict(default).items():
            if getattr(args, name) != value and name not in free:
                raise BadInput(f"{_flag(name)} cannot be changed for the run in {old}, which has {value}")
    validate(args)
    if saved and args.evaluate:
        check_task(args, saved["env_id"])
        check_options(saved["env_id"], args.observation, args.prey, args.shift)
    if saved and checksum(args.prey) != saved["prey"]:
        if args.resume:
            raise BadInput(
                f"{args.prey or 'the prey of the project'} is not the prey that the run in {old} was evaluated against: --prey FILE"
            )
        print(f"note      not the prey that the run in {old} was evaluated against", file=sys.stderr)
    return args, saved


def evaluate_run(args: Args, saved: dict) -> None:
    """--evaluate: the return of a saved run. With the run's own seed and episodes it repeats the last row of its eval.csv."""
    device, env_id = pick_device(args.device), saved["env_id"]
    trained = dataclasses.replace(args, solver_steps=Args(**saved["args"]).solver_steps)
    envs = make_vec(env_id, args.eval_episodes, args.observation, prey=args.prey, shift=args.shift)
    with _must_fit(Path(args.evaluate) / "checkpoint.pt"):
        agent = DOM2(make_env(env_id, args.observation, prey=args.prey), trained, device)
        agent.load_state_dict(saved["agent"])
        if args.solver_steps != trained.solver_steps:
            agent.slow_policy.set_steps(args.solver_steps)
    returns = evaluate(agent, envs, evaluation_seed(args.seed))
    policy = args.policy + (f" policy, {args.solver_steps} solver steps" if args.policy == "diffusion" else " policy")
    against = (f", prey of {args.prey}" if args.prey else "") + (f", shifted: {args.shift}" if args.shift else "")
    print(f"{env_id}{against}, {policy}, update {saved['step']:,}: {summary(env_id, returns)}")
    if args.capture_video:
        save_video(agent, args, env_id, Path(args.evaluate) / "videos")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 a failed run, 130 interrupted."""
    # TensorBoard writes in a thread of its own. If the disk is full, its error reaches us with the next scalar: no traceback.
    threading.excepthook = lambda hook: None if issubclass(hook.exc_type, OSError) else threading.__excepthook__(hook)
    try:
        args, saved = parse(sys.argv[1:] if argv is None else argv)
        if args.torch_threads:
            torch.set_num_threads(args.torch_threads)
        if args.evaluate:
            evaluate_run(args, saved)
        else:
            train(args, saved)
        return 0
    except BadInput as error:
        print(f"dom2.py: error: {error}", file=sys.stderr)
        return 2
    except (FailedRun, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"dom2.py: failed: {_first_line(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("dom2.py: interrupted; a training run goes on with --resume and the directory behind 'logs'", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""OMAD: online multi-agent reinforcement learning with diffusion policies, in one file.

    python omad.py --env-id mpe_simple_spread              # learns on a laptop CPU within minutes
    python omad.py --evaluate runs/<run>                   # mean and std of the return of a saved run
    python omad.py --resume runs/<run>                     # goes on after a crash; on the CPU as if it had not happened
    tensorboard --logdir runs                              # watch it

Method: "Diffusing to Coordinate: Efficient Online Multi-Agent Diffusion Policies", arXiv 2602.18291. Where that paper leaves a
choice open, the single-agent method it extends decides: "DIME: Diffusion-Based Maximum Entropy Reinforcement Learning", arXiv
2502.02316. Labels in brackets, [OMAD ...] and [DIME ...], are ours: README.md has the equation behind each. Where we depart from
both, the code says [deviation Dn], and README.md lists it with its reason.

In five sentences. Every agent turns Gaussian noise into an action by a few denoising steps that see only its own observation.
The likelihood of such an action is intractable, so the joint entropy is replaced by a lower bound, a sum over agents of path
costs C_i. One centralised distributional critic learns the return plus that entropy bonus. All agents are updated at once, by
the gradient of that critic through all denoising steps. The weight of the bonus, the temperature alpha, tunes itself.

Shape letters: B batch, N agents, O observation, A action, S joint state, K denoising steps, Q critics, Z atoms, H hidden,
E environments. Agents are a tensor dimension everywhere: nothing loops over them. Sizes O and A are those of the largest
agent; smaller ones are padded, and masks keep the padding out of every sum.
"""

import contextlib
import dataclasses
import difflib
import gc
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

from common.envs import (
    BadInput, TeamEnv, check_options, find_task, make_env, make_vec, mix_seed, record_video, sha256, task_table, versions,
)  # fmt: skip

# ============================================================================================================================
# 1. Arguments
# ============================================================================================================================

RunDir = Annotated[str, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    """OMAD: online multi-agent RL with diffusion policies. Defaults are those of the chosen task."""

    # --- the run ---
    env_id: str = "mpe_simple_spread"
    """the task; --list-tasks prints them"""
    observation: str = "own"
    """what each agent sees: own (MPE, OMAR); in MaMuJoCo full (the whole state and an agent id) or k0, k1, ... (joints at most k away)"""
    prey: str = ""
    """omar_simple_tag and omar_simple_world: a file with the prey's network (OMAR's pretrained_adv_model.pt); else the project's own"""
    seed: int = 1
    """seed of everything random: networks, environments, noise, replay"""
    total_timesteps: int = 3_000_000
    """environment steps, all environments together"""
    num_envs: int = 1
    """environments stepped side by side"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay live; auto: cuda if there is one"""
    torch_threads: int = 1
    """CPU threads for torch; one is fastest at the widths of the MPE presets, 0 leaves torch's own choice"""
    cuda_graph: bool = True
    """on a GPU, capture the update and acting as CUDA graphs, if they pass a check against the plain update at the start"""
    compile: bool = False
    """compile the losses and the denoising chain with torch.compile, which takes a minute or two at the start"""
    eval_every: int = 50_000
    """environment steps between evaluations; each also writes the checkpoint and restarts the training environments"""
    eval_episodes: int = 10
    """episodes per evaluation, one environment each"""
    run_dir: str = "runs"
    """folder in which the run's own directory is made"""
    resume: RunDir = ""
    """go on with the run in this directory; its hyper-parameters stay, its length, device and threads may change"""
    evaluate: RunDir = ""
    """only evaluate the run in this directory"""
    list_tasks: bool = False
    """print the tasks and their sizes, and stop"""
    capture_video: bool = False
    """write a video of the final policy (at the end of training, or with --evaluate) to RUN_DIR/videos"""

    # --- off-policy learning ---
    learning_starts: int = 5_000
    """environment steps with uniformly random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions kept for replay"""
    batch_size: int = 256
    """transitions per update"""
    gamma: float = 0.99
    """discount factor"""
    updates_per_step: float = 2.0
    """critic updates per environment step (update-to-data ratio)"""
    policy_frequency: int = 3
    """critic updates per update of the policies and the temperature"""
    policy_lr: float = 3e-4
    """learning rate of the policies"""
    q_lr: float = 3e-4
    """learning rate of the critics"""
    adam_beta1: float = 0.5
    """beta_1 of Adam, for policies and critics"""

    # --- policies ---
    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """diffusion: the method; gaussian: a squashed Gaussian with exact entropy, all else equal (the ablation)"""
    denoising_steps: int = 8
    """K, steps from noise to action"""
    policy_hidden: int = 256
    """width H of each agent's network"""
    policy_grad_clip: float = 1.0
    """element-wise bound on the policies' gradients"""

    # --- critic ---
    critic_hidden: int = 2048
    """width of each critic"""
    n_atoms: int = 100
    """Z, atoms of the return distribution"""
    v_min: float = -1000.0
    """smallest representable return"""
    v_max: float = 1000.0
    """largest representable return; must exceed the largest discounted return with entropy bonus"""
    critic_entropy_coef: float = 0.005
    """weight of the bonus on the entropy of the predicted return distribution"""
    bn_momentum: float = 0.99
    """momentum of the batch renormalisation's running statistics"""
    bn_warmup: int = 100_000
    """critic updates with plain batch normalisation before renormalisation sets in"""
    target_networks: bool = False
    """slowly averaged target critics instead of the joint forward pass without them"""
    tau: float = 0.005
    """averaging rate of the target critics (with --target-networks)"""

    # --- temperature ---
    alpha: float = 1.0
    """start value of the temperature; its fixed value with --no-autotune"""
    autotune: bool = True
    """tune the temperature automatically"""
    alpha_lr: float = 1e-3
    """learning rate of log alpha"""
    target_entropy_scale: float = 4.0
    """the entropy target is this times the joint action dimension, compared with the running cost [OMAD temperature]"""


MANY, BIG = 10**12, 10**6
LIMITS = {  # smallest and largest value allowed
    "seed": (0, 2**31 - 1), "total_timesteps": (1, MANY), "num_envs": (1, 4096), "torch_threads": (0, 4096),
    "eval_every": (1, MANY), "eval_episodes": (1, 4096), "learning_starts": (0, MANY), "buffer_size": (1, MANY),
    "batch_size": (2, BIG), "gamma": (0.0, 1.0), "updates_per_step": (1e-4, 1e3), "policy_frequency": (1, BIG),
    "policy_lr": (1e-12, 1e12), "q_lr": (1e-12, 1e12), "adam_beta1": (0.0, 0.9999), "denoising_steps": (1, 1000),
    "policy_hidden": (1, BIG), "policy_grad_clip": (1e-12, math.inf), "critic_hidden": (1, BIG), "n_atoms": (2, BIG),
    "v_min": (-1e9, 1e9), "v_max": (-1e9, 1e9), "critic_entropy_coef": (0.0, 1e3), "bn_momentum": (0.0, 1.0),
    "bn_warmup": (0, MANY), "tau": (0.0, 1.0), "alpha": (1e-12, 1e6), "alpha_lr": (1e-12, 1e12),
    "target_entropy_scale": (-1e3, 1e3),
}  # fmt: skip

# [deviation D1] MPE presets suit a laptop CPU: smaller networks, fewer updates per step, a support and a discount for 25-step
# episodes. The README gives the reason for every value.
MPE = dict(
    total_timesteps=100_000, num_envs=8, eval_every=10_000, eval_episodes=100, learning_starts=2_000, gamma=0.95,
    updates_per_step=0.25, policy_lr=1e-3, q_lr=1e-3, policy_hidden=64, critic_hidden=128, v_min=-30.0, v_max=10.0,
    bn_warmup=5_000, alpha=0.005,
)  # fmt: skip
# Multi-Agent MuJoCo has the sizes of the paper and of DIME, which want a GPU. The support is symmetric: one whose middle is far
# from zero starts with a far too high or too low value everywhere, and has to unlearn it first.
MAMUJOCO = dict(observation="full", v_min=-1000.0, v_max=1000.0)
# OMAR's tasks are there to make offline data on a CPU. Steps of many copies of a particle world cost almost nothing.
OMAR = MPE | dict(num_envs=32, updates_per_step=0.0625, eval_every=4_000, learning_starts=4_000, alpha=0.1)
OMAR_HALFCHEETAH = dict(
    total_timesteps=500_000, num_envs=10, updates_per_step=0.1, eval_every=10_000, learning_starts=10_000, policy_lr=1e-3, q_lr=1e-3,
    policy_hidden=128, critic_hidden=256, v_min=-500.0, v_max=500.0, alpha=0.1,
)  # fmt: skip
PRESETS: dict[str, dict] = {  # by task or, for all partitions of a robot, by robot; others have their suite's
    "mpe": MPE,
    "mpe_simple": MPE | dict(v_min=-90.0),
    "mpe_simple_spread_n4": MPE | dict(v_min=-60.0),
    "mpe_simple_reference": MPE | dict(v_min=-60.0),
    "mpe_simple_speaker_listener": MPE | dict(v_min=-90.0),
    "mpe_simple_adversary": MPE | dict(v_min=-30.0, v_max=30.0),
    "mpe_collect_treasure": MPE | dict(v_min=-60.0, v_max=60.0),
    "omar_simple_spread": OMAR | dict(v_min=-600.0, v_max=600.0),
    "omar_simple_tag": OMAR | dict(v_min=-300.0, v_max=300.0, total_timesteps=400_000),
    "omar_simple_world": OMAR | dict(v_min=-200.0, v_max=200.0, total_timesteps=400_000),
    "omar_halfcheetah": OMAR_HALFCHEETAH,
    "mamujoco": MAMUJOCO,
    "mamujoco_halfcheetah": MAMUJOCO | dict(v_min=-2000.0, v_max=2000.0),
    "mamujoco_swimmer": MAMUJOCO | dict(v_min=-50.0, v_max=50.0, alpha=0.1),
    "mamujoco_manysegmentswimmer": MAMUJOCO | dict(v_min=-100.0, v_max=100.0, alpha=0.01),
    "mamujoco_humanoid": MAMUJOCO | dict(v_min=-1500.0, v_max=1500.0),
    "mamujoco_humanoidstandup": MAMUJOCO | dict(v_min=-30000.0, v_max=30000.0),
    "mamujoco_reacher": MAMUJOCO | dict(v_min=-50.0, v_max=50.0, alpha=0.1, eval_every=10_000, total_timesteps=300_000),
    "mamujoco_pusher": MAMUJOCO | dict(v_min=-200.0, v_max=200.0, alpha=0.1, eval_every=10_000, total_timesteps=300_000),
}
# What makes a MuJoCo task small enough for a CPU; measured in README.md.
SMALL = (
    "--policy-hidden 128 --critic-hidden 256 --updates-per-step 1 --policy-lr 1e-3 --q-lr 1e-3 --alpha 0.1 "
    "--eval-every 5000 --total-timesteps 100000"
)
SMALL_HALFCHEETAH = f"{SMALL} --v-min -1000 --v-max 1000"  # enough for the returns it reaches on a CPU


def preset(env_id: str) -> Args:
    """The defaults of a task."""
    names = (env_id, env_id.rpartition("_")[0], env_id.partition("_")[0])  # the task, its robot, its suite
    return Args(env_id=env_id, **next(PRESETS[name] for name in names if name in PRESETS))


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


class DiffusionPolicy(nn.Module):
    """N independent diffusion policies pi_i(a_i | o_i), each a learned stochastic differential equation [OMAD chain].

    Each agent starts from x_0 ~ N(0, 2.5^2 I) and takes K Euler-Maruyama steps towards its action a = tanh(x_K), with its own
    score network u, step size and per-dimension friction, all learned.

    Args:
        obs_mask: [N, O] bool, which observation entries are real.
        action_mask: [N, A] bool, which action entries are real.
        hidden: width H of the score networks.
        steps: K.
    """

    INIT_STD = 2.5  # standard deviation of x_0 [DIME]

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, hidden: int, steps: int):
        super().__init__()
        n, o = obs_mask.shape
        a = action_mask.shape[1]
        self.register_buffer("obs_mask", obs_mask.float(), persistent=False)
        self.register_buffer("action_mask", action_mask.float()[:, None], persistent=False)  # [N, 1, A]
        self.trained_steps = steps
        self.set_steps(steps)
        self.rho_dt = nn.Parameter(torch.full([n, 1, 1], _inverse_softplus(0.1)))
        self.rho_friction = nn.Parameter(torch.full([n, 1, a], _inverse_softplus(1.0)))
        # Time embedding of the integer step: H Fourier features [deviation D3] with a learned phase, then a small network.
        self.register_buffer("frequency", torch.linspace(0.1, 100.0, hidden)[None, None], persistent=False)
        self.phase = nn.Parameter(torch.zeros(n, 1, hidden))
        self.time1, self.time2 = ParallelLinear(n, 2 * hidden, hidden), ParallelLinear(n, hidden, hidden)
        # The first layer acts on [x, o, time]. It is kept as three blocks of one matrix, because the observation's share is the
        # same at every step and the time's share the same for every row: both are computed once per chain. Each block has a
        # bias of its own, so that the first layer's is a sum of three [deviation D5].
        fan_in = action_mask.sum(1) + obs_mask.sum(1) + hidden
        self.in_x, self.in_obs, self.in_time = (ParallelLinear(n, size, hidden, fan_in) for size in (a, o, hidden))
        self.hidden1, self.hidden2, self.out = (ParallelLinear(n, hidden, size) for size in (hidden, hidden, a))
        nn.init.normal_(self.out.weight, std=1e-4)  # near zero [DIME]: the chain starts as noise

    def set_steps(self, steps: int) -> None:
        """Walks the same stretch of time in another number of steps than trained: fewer are longer, and see the embedding between."""
        t = (steps - torch.arange(steps)) / steps
        schedule = 0.999 * torch.cos(math.pi / 2 * (1.008 - t) / 1.008) ** 2 + 0.001  # large first, tiny last [DIME schedule]
        stretch, device = self.trained_steps / steps, self.obs_mask.device
        index = stretch * torch.arange(steps)  # in steps of training, which the time embedding knows
        self.steps = steps
        self.register_buffer("schedule", (stretch * schedule)[:, None, None, None].to(device), persistent=False)  # [K, 1, 1, 1]
        self.register_buffer("index", index[:, None].to(device), persistent=False)  # [K, 1]

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """All the randomness of one chain: [K + 1, B, N, A] standard normal numbers."""
        n, _, a = self.action_mask.shape
        return torch.randn(self.steps + 1, batch, n, a, generator=generator, device=self.action_mask.device)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One chain for every agent. obs [B, N, O], noise from `noise` -> action [B, N, A], run [B, N], term [B, N].

        C_i = run_i + term_i is the path cost: E[C_i] >= -H(pi_i), so -E[C_i] is the entropy bound [OMAD entropy bound].
        """
        obs = (obs * self.obs_mask).transpose(0, 1)  # [B, N, O] -> [N, B, O]
        noise = noise.transpose(1, 2) * self.action_mask  # [K + 1, N, B, A]
        eta = F.softplus(self.rho_dt) * self.schedule / F.softplus(self.rho_friction)  # [K, N, 1, A]
        angle = self.frequency * self.index + self.phase  # [N, K, H]
        time = self.time2(F.gelu(self.time1(torch.cat([angle.sin(), angle.cos()], -1))))  # [N, K, H]
        from_time = self.in_time(time).transpose(0, 1).unsqueeze(2)  # [K, N, 1, H]
        from_obs = self.in_obs(obs)  # [N, B, H]

        # x_{n+1} = mu_n + sqrt(2 eta_n) noise with mu_n = x_n + eta_n (-x_n / 2.5^2 + u(x_n, o, n))  [OMAD chain]
        decay = 1 - eta / self.INIT_STD**2  # [K, N, 1, A]
        kick = (2 * eta).sqrt() * noise[1:]  # [K, N, B, A]
        x = self.INIT_STD * noise[0]  # [N, B, A]
        chain = [x]
        for time_n, decay_n, eta_n, kick_n in zip(
            from_time.unbind(), decay.unbind(), (eta * self.action_mask).unbind(), kick.unbind()
        ):
            h = F.gelu(self.in_x(x) + from_obs + time_n)  # exact, not the tanh approximation [deviation D2]
            u = self.out(F.gelu(self.hidden2(F.gelu(self.hidden1(h)))))
            x = torch.addcmul(torch.addcmul(kick_n, decay_n, x), eta_n, u)
            chain.append(x)

        # log w = sum_n log N(x_n; nu_n, 2 eta_n) - log N(x_{n+1}; mu_n, 2 eta_n). The normalisers cancel, and x_{n+1} - mu_n is
        # sqrt(2 eta_n) times the noise, so the second term is -noise^2 / 2 exactly.
        x_n, x_next = torch.stack(chain[:-1]), torch.stack(chain[1:])  # [K, N, B, A]
        nu = x_next * decay
        log_w = (noise[1:] ** 2 / 2 - (x_n - nu) ** 2 / (4 * eta)).sum(0)  # [N, B, A]
        run = -(log_w + _log_tanh_derivative(x))  # [OMAD run]; zero on padding, where x never leaves zero
        term = (-(noise[0] ** 2) / 2 - math.log(self.INIT_STD) - 0.5 * math.log(2 * math.pi)) * self.action_mask  # [OMAD term]
        return torch.tanh(x).transpose(0, 1), run.sum(-1).T, term.sum(-1).T


class GaussianPolicy(nn.Module):
    """N independent squashed Gaussian policies behind the interface of `DiffusionPolicy`: the ablation.

    C_i = log pi_i(a_i | o_i) is exact. It is split into run + term with term = E[log N(x_0; 0, 2.5^2 I)], the constant that the
    diffusion policy's term has on average, so that the temperature's target on `run` asks both for the same E[C]. That is the
    true entropy here and only a bound on it there; and this policy starts as a narrow Gaussian, the other one as wide noise.
    """

    LOG_STD = (-5.0, 2.0)  # bounds, as in common SAC implementations

    def __init__(self, obs_mask: Tensor, action_mask: Tensor, hidden: int, steps: int = 0):
        super().__init__()
        n, o = obs_mask.shape
        a = action_mask.shape[1]
        self.register_buffer("obs_mask", obs_mask.float(), persistent=False)
        self.register_buffer("action_mask", action_mask.float()[:, None], persistent=False)  # [N, 1, A]
        self.in_obs = ParallelLinear(n, o, hidden, obs_mask.sum(1))
        self.hidden1, self.hidden2, self.out = (ParallelLinear(n, hidden, size) for size in (hidden, hidden, 2 * a))
        nn.init.normal_(self.out.weight, std=1e-4)

    def noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """[B, N, A] standard normal numbers."""
        n, _, a = self.action_mask.shape
        return torch.randn(batch, n, a, generator=generator, device=self.action_mask.device)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """obs [B, N, O], noise [B, N, A] -> action [B, N, A], run [B, N], term [B, N]; run + term = log pi."""
        obs, noise = (obs * self.obs_mask).transpose(0, 1), noise.transpose(0, 1)  # [N, B, ...]
        h = F.gelu(self.hidden2(F.gelu(self.hidden1(F.gelu(self.in_obs(obs))))))
        mean, log_std = self.out(h).chunk(2, -1)  # [N, B, A]
        low, high = self.LOG_STD
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
        x = (mean + log_std.exp() * noise) * self.action_mask
        log_pi = -(noise**2) / 2 - log_std - 0.5 * math.log(2 * math.pi) - _log_tanh_derivative(x)  # [N, B, A]
        term = -0.5 - math.log(DiffusionPolicy.INIT_STD) - 0.5 * math.log(2 * math.pi)
        run = ((log_pi - term) * self.action_mask).sum(-1)
        return torch.tanh(x).transpose(0, 1), run.T, (term * self.action_mask.sum(-1)).expand_as(run).T


def make_policy(obs_sizes: list[int], action_sizes: list[int], args: Args) -> DiffusionPolicy | GaussianPolicy:
    """Untrained policies of agents with these sizes."""
    kind = DiffusionPolicy if args.policy == "diffusion" else GaussianPolicy
    masks = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None] for sizes in (obs_sizes, action_sizes))
    return kind(*masks, args.policy_hidden, args.denoising_steps)


def load_policy(path: Path) -> tuple[DiffusionPolicy | GaussianPolicy, dict]:
    """The policy that a run keeps in policy.pt; and its arguments, step and score."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    args = Args(**saved["args"])
    env = make_env(args.env_id, args.observation)
    policy = make_policy(env.obs_sizes, env.action_sizes, args)
    policy.load_state_dict(saved["policy"])
    return policy, saved


def _inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


def _log_tanh_derivative(x: Tensor) -> Tensor:
    """log(1 - tanh(x)^2), in the form that does not overflow."""
    return 2 * (math.log(2) - x - F.softplus(-2 * x))


# ============================================================================================================================
# 3. Critic
# ============================================================================================================================


class BatchRenorm(nn.Module):
    """Batch renormalisation of x [Q, B, D] over B, with statistics for each of the Q networks (arXiv 1702.03275; CrossQ).

    In training mode it normalises with the batch's statistics, corrected (without gradient) towards the running ones; during
    the first `warmup` calls it is plain batch normalisation. In evaluation mode it uses the running statistics.
    """

    R_MAX, D_MAX, EPS = 3.0, 5.0, 1e-3

    def __init__(self, critics: int, size: int, momentum: float, warmup: int):
        super().__init__()
        self.momentum, self.warmup = momentum, warmup
        self.scale = nn.Parameter(torch.ones(critics, 1, size))
        self.shift = nn.Parameter(torch.zeros(critics, 1, size))
        self.register_buffer("mean", torch.zeros(critics, 1, size))
        self.register_buffer("var", torch.ones(critics, 1, size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        running_std = (self.var + self.EPS).sqrt()
        if not self.training:
            return torch.addcmul(self.shift - self.mean * self.scale / running_std, x, self.scale / running_std)
        mean = x.mean(dim=1, keepdim=True)  # [Q, 1, D]
        centred = x - mean
        var = (centred**2).mean(dim=1, keepdim=True)
        std = (var + self.EPS).sqrt()
        with torch.no_grad():
            warm = self.calls >= self.warmup
            r = torch.where(warm, (std / running_std).clamp(1 / self.R_MAX, self.R_MAX), 1.0)
            d = torch.where(warm, ((mean - self.mean) / running_std).clamp(-self.D_MAX, self.D_MAX), 0.0)
            self.mean.lerp_(mean, 1 - self.momentum)
            self.var.lerp_(var, 1 - self.momentum)
            self.calls += 1
        return torch.addcmul(self.shift + self.scale * d, centred, self.scale * r / std)


class Critic(nn.Module):
    """Two centralised distributional critics Z_k(s, a_1..a_N): (state [B, S], action [B, N, A]) -> logits [Q, B, Z].

    The networks are a tensor dimension too. Batch renormalisation stands before the first layer and after each activation.
    """

    def __init__(self, state_size: int, action_mask: Tensor, args: Args):
        super().__init__()
        self.register_buffer("real", action_mask.flatten().nonzero().flatten(), persistent=False)  # real entries of [N * A]
        n_in = state_size + len(self.real)
        norm = lambda size: BatchRenorm(2, size, args.bn_momentum, args.bn_warmup)
        self.norm0, self.layer1 = norm(n_in), ParallelLinear(2, n_in, args.critic_hidden)
        self.norm1, self.layer2 = norm(args.critic_hidden), ParallelLinear(2, args.critic_hidden, args.critic_hidden)
        self.norm2, self.out = norm(args.critic_hidden), ParallelLinear(2, args.critic_hidden, args.n_atoms)
        self.register_buffer("atoms", torch.linspace(args.v_min, args.v_max, args.n_atoms), persistent=False)  # [Z]

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([state, action.flatten(1).index_select(1, self.real)], -1).expand(2, -1, -1)  # [Q, B, S + actions]
        x = self.norm1(F.relu(self.layer1(self.norm0(x))))
        x = self.norm2(F.relu(self.layer2(x)))
        return self.out(x)

    def value(self, logits: Tensor) -> Tensor:
        """Expected return: logits [Q, B, Z] -> [Q, B]."""
        return F.softmax(logits, -1) @ self.atoms


# ============================================================================================================================
# 4. Losses
# ============================================================================================================================

Logs = dict[str, Tensor]


def project(probs: Tensor, shifted: Tensor, atoms: Tensor) -> Tensor:
    """Moves the mass `probs` [B, Z] at places `shifted` [B, Z] onto the evenly spaced `atoms` [Z], keeping the mass [C51].

    Places outside the support are clipped to its ends; inside it the mean is kept too.
    """
    step = (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    place = (shifted.clamp(atoms[0], atoms[-1]) - atoms[0]) / step  # in units of atoms, 0 .. Z - 1
    lower = place.floor().clamp(max=len(atoms) - 2)
    share = place - lower  # of the upper neighbour
    index = lower.long().clamp(min=0)  # a NaN must end in the loss, where it is reported, not as a wild index
    return torch.zeros_like(probs).scatter_add_(-1, index, probs * (1 - share)).scatter_add_(-1, index + 1, probs * share)


def critic_loss(critic: Critic, target: Critic | None, policy: nn.Module, alpha: Tensor, batch: dict[str, Tensor],
                noise: Tensor, args: Args) -> tuple[Tensor, Logs]:  # fmt: skip
    """Cross-entropy to the entropy-regularised distributional target [OMAD critic].

    target distribution: r + gamma (1 - terminated) (z_j - alpha sum_i C_i(o'_i)), projected, averaged over the two critics.
    A truncated step is not terminated: its target bootstraps from the true final observation.
    Without a target network, (s, a) and (s', a') pass through the critic as one batch, so that the batch statistics are those
    of both [CrossQ].
    """
    with torch.no_grad():
        next_action, run, term = policy(batch["next_obs"], noise)
        path_cost = (run + term).sum(1, keepdim=True)  # sum_i C_i [B, 1]
    if target is None:
        state = torch.cat([batch["state"], batch["next_state"]])
        logits, next_logits = critic(state, torch.cat([batch["action"], next_action])).chunk(2, dim=1)  # [Q, B, Z] each
    else:
        logits = critic(batch["state"], batch["action"])
        with torch.no_grad():
            next_logits = target(batch["next_state"], next_action)
    with torch.no_grad():
        discount = args.gamma * (1 - batch["terminated"])[:, None]  # [B, 1]
        shifted = batch["reward"][:, None] + discount * (critic.atoms - alpha * path_cost)  # [B, Z]
        goal = project(F.softmax(next_logits, -1).mean(0), shifted, critic.atoms)  # the mean commutes with the projection
    log_probs = F.log_softmax(logits, -1)
    probs = log_probs.exp()
    cross_entropy = -(goal * log_probs).sum(-1).mean(-1)  # [Q]
    negative_entropy = (probs * log_probs).sum(-1).mean(-1)  # [Q]
    loss = (cross_entropy + args.critic_entropy_coef * negative_entropy).sum()
    with torch.no_grad():
        value = probs @ critic.atoms  # [Q, B]
        logs = {
            "losses/critic": loss.detach(),
            "diag/value": value.mean(),
            "diag/critic_disagreement": (value[0] - value[1]).abs().mean(),
            "diag/target_mass_at_ends": (goal[:, 0] + goal[:, -1]).mean(),
        }
    return loss, logs


def policy_loss(
    critic: Critic, policy: nn.Module, alpha: Tensor, batch: dict[str, Tensor], noise: Tensor
) -> tuple[Tensor, Logs, Tensor]:
    """One simultaneous step for all agents: E[-mean_k E[Z_k(s, a_1..a_N)] + alpha sum_i C_i] [OMAD policies].

    The gradient runs through the critic (in evaluation mode, held fixed) and the whole denoising chain. Also returns
    sum_i run_i [B], which the temperature needs.
    """
    action, run, term = policy(batch["obs"], noise)
    value = critic.value(critic(batch["state"], action)).mean(0)  # [B]
    path_cost = (run + term).sum(1)  # [B]
    loss = (alpha * path_cost - value).mean()
    with torch.no_grad():
        logs = {
            "losses/policy": loss.detach(),
            "diag/entropy_bound": -path_cost.mean(),
            "diag/action_saturation": (action.abs() > 0.99).float().mean(),
        }
    return loss, logs, run.detach().sum(1)


def temperature_loss(log_alpha: Tensor, run: Tensor, target: float) -> tuple[Tensor, Logs]:
    """-alpha (E[sum_i run_i] - target), target = 4 dim(A): too little noise (a large run) raises alpha [OMAD temperature]."""
    loss = -log_alpha.exp() * (run.mean() - target)
    return loss, {"losses/temperature": loss.detach(), "diag/run": run.mean(), "diag/alpha": log_alpha.detach().exp()}


# ============================================================================================================================
# 5. Training loop
# ============================================================================================================================


class Replay:
    """A ring of the last `capacity` transitions on the device: one row each, of which `data` holds views by name."""

    def __init__(self, env: TeamEnv, capacity: int, device: torch.device):
        obs, action = env.obs_mask.shape, env.action_mask.shape
        self.shapes = dict(
            obs=obs, next_obs=obs, state=(env.state_size,), next_state=(env.state_size,), action=action, reward=(), terminated=()
        )
        self.rows = torch.zeros(capacity, sum(math.prod(shape) for shape in self.shapes.values()), device=device)
        self.data = self.named(self.rows)
        self.capacity, self.added = capacity, 0

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of rows [B, row] as the tensors [B, ...] of a batch."""
        parts = rows.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.view(len(rows), *shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def add(self, **transitions: np.ndarray) -> None:
        """Appends E transitions, given as arrays [E, ...] under the names of `data`."""
        count = len(transitions["reward"])
        rows = np.concatenate([transitions[name].reshape(count, -1) for name in self.shapes], 1, dtype=np.float32)
        start = self.added % self.capacity
        first = min(count, self.capacity - start)  # the rest goes round to the beginning
        self.rows[start : start + first].copy_(torch.from_numpy(rows[:first]), non_blocking=True)
        self.rows[: count - first].copy_(torch.from_numpy(rows[first:]), non_blocking=True)
        self.added += count

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Indices [B] of uniformly drawn transitions. Apart from `sample`, because their range grows: no captured graph can."""
        return torch.randint(min(self.added, self.capacity), (batch,), generator=generator, device=self.rows.device)

    def sample(self, index: Tensor) -> dict[str, Tensor]:
        return self.named(self.rows[index])

    def state_dict(self) -> dict:
        return {"added": self.added, "data": self.named(self.rows[: self.added].to("cpu", copy=True))}

    def load_state_dict(self, state: dict) -> None:
        self.added = int(state["added"])
        count = min(self.added, self.capacity)
        for name, shape in self.shapes.items():
            if state["data"][name].shape != (count, *shape):
                raise ValueError(f"replay: {name} of shape {list(state['data'][name].shape)} for {self.added} transitions")
        rows = [state["data"][name].reshape(count, math.prod(shape)) for name, shape in self.shapes.items()]
        self.rows[:count] = torch.cat(rows, 1).to(self.rows.device)


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


class OMAD(nn.Module):
    """Policies, critics, temperature and their optimisers: everything that learns."""

    def __init__(self, env: TeamEnv, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        action_mask = torch.from_numpy(env.action_mask)
        self.policy = make_policy(env.obs_sizes, env.action_sizes, args).to(device)
        self.critic = Critic(env.state_size, action_mask, args).to(device)
        self.target = None
        if args.target_networks:
            self.target = Critic(env.state_size, action_mask, args).to(device).eval().requires_grad_(False)
            self.target.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
        self.entropy_target = args.target_entropy_scale * float(env.action_mask.sum())
        adam = lambda params, lr, beta1: torch.optim.Adam(
            params, lr, betas=(beta1, 0.999), fused=True, capturable=device.type == "cuda"
        )
        self.optimizers = {
            "policy": adam(self.policy.parameters(), args.policy_lr, args.adam_beta1),
            "critic": adam(self.critic.parameters(), args.q_lr, args.adam_beta1),
            "alpha": adam([self.log_alpha], args.alpha_lr, 0.9),
        }

        for optimizer in self.optimizers.values():  # its state must exist before a graph is captured
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
            for state in optimizer.state.values():
                state["step"].zero_()
        compiled = torch.compile if args.compile else lambda function: function
        self.critic_loss, self.policy_loss = compiled(critic_loss), compiled(policy_loss)
        self.chain = Captured(compiled(lambda obs, noise: self.policy(obs, noise)[0]))

    def tensors(self) -> list[Tensor]:
        """Everything that an update changes."""
        optimizers = [x for optimizer in self.optimizers.values() for state in optimizer.state.values() for x in state.values()]
        return [*self.state_dict().values(), *optimizers]

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Decentralised execution, sampled: obs [E, N, O] -> action [E, N, A]."""
        obs = torch.from_numpy(obs).to(self.device, non_blocking=True)
        return self.chain(obs, self.policy.noise(len(obs), generator)).cpu().numpy()

    def record_video(self, args: Args, folder: Path) -> None:
        generator, seed = torch.Generator(self.device).manual_seed(args.seed), evaluation_seed(args.seed)
        act = lambda obs: self.act(obs, generator)
        record_video(act, args.env_id, folder, seed, args.observation, args.prey)

    def update(self, batch: dict[str, Tensor], critic_noise: Tensor, policy_noise: Tensor | None = None) -> Logs:
        """One update of the critics and, if there is noise for it, one of the policies and the temperature, on the same batch."""
        logs = self.update_critic(batch, critic_noise)
        return logs if policy_noise is None else logs | self.update_policies(batch, policy_noise)

    def update_critic(self, batch: dict[str, Tensor], noise: Tensor) -> Logs:
        loss, logs = self.critic_loss(
            self.critic.train(), self.target, self.policy, self.log_alpha.detach().exp(), batch, noise, self.args
        )
        self.optimizers["critic"].zero_grad()
        loss.backward()
        self.optimizers["critic"].step()
        if self.target is not None:
            with torch.no_grad():
                for slow, fast in zip(self.target.state_dict().values(), self.critic.state_dict().values()):
                    slow.lerp_(fast, self.args.tau) if slow.is_floating_point() else slow.copy_(fast)
        return logs

    def update_policies(self, batch: dict[str, Tensor], noise: Tensor) -> Logs:
        loss, logs, run = self.policy_loss(self.critic.eval(), self.policy, self.log_alpha.detach().exp(), batch, noise)
        self.optimizers["policy"].zero_grad()
        loss.backward(inputs=list(self.policy.parameters()))
        nn.utils.clip_grad_value_(self.policy.parameters(), self.args.policy_grad_clip)
        self.optimizers["policy"].step()
        loss, alpha_logs = temperature_loss(self.log_alpha, run, self.entropy_target)
        if self.args.autotune:
            self.optimizers["alpha"].zero_grad()
            loss.backward()
            self.optimizers["alpha"].step()
        return logs | alpha_logs


class Learner:
    """Updates from replay: draws what is random, and hands it to `OMAD.update`, on a GPU captured as a CUDA graph."""

    CHECKED, WINDOW, TOLERANCE = 200, 10, 1e-2  # the check before a graph is trusted, see `capture`

    def __init__(self, agent: OMAD, replay: Replay, args: Args):
        self.agent, self.replay, self.args, self.updates = agent, replay, args, 0
        self.update = Captured(lambda index, *noise: agent.update(replay.sample(index), *noise), agent.tensors)
        self.to_check = args.cuda_graph and agent.device.type == "cuda"
        # Learn while the environments step, without the newest transition [deviation D6].
        self.overlap = agent.device.type == "cuda"

    def step(self, generator: torch.Generator) -> Logs:
        """One critic update, every `policy_frequency`-th with one of the policies and the temperature."""
        if self.to_check:
            self.to_check = False
            print(f"{self.capture():<100}", flush=True)
        self.updates += 1
        chains = 2 if self.updates % self.args.policy_frequency == 0 else 1
        index = self.replay.draw(self.args.batch_size, generator)
        return self.update(index, *(self.agent.policy.noise(self.args.batch_size, generator) for _ in range(chains)))

    def capture(self) -> str:
        """Turns graphs on, for acting too, if 200 captured updates have the losses of plain ones. Says what it found.

        Plain and captured updates start from the same state, with the same draws, every 10 updates: the order of some sums on a
        GPU is not fixed, and left alone for longer two correct runs drift apart. Losses may differ by 1 % of the largest of
        their kind. The agent is left as it was.
        """

        def losses(captured: bool, seed: int) -> Tensor:
            self.update.enabled, self.updates, trace = captured, 0, []
            generator = torch.Generator(self.agent.device).manual_seed(seed)
            for _ in range(self.WINDOW):
                trace += [value.clone() for name, value in self.step(generator).items() if name.startswith("losses/")]
                if captured and not self.update.enabled:
                    raise RuntimeError(self.update.error)
            return torch.stack(trace)

        updates = self.updates
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
        self.updates = updates
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


def evaluate(agent: OMAD, envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
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


def train(args: Args, envs: gym.vector.VectorEnv | None = None) -> None:
    """The whole of training, from the start or from a checkpoint; in `envs`, if the caller wants to look on."""
    saved = load(args.resume)[1] if args.resume else None
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    envs = envs or make_vec(args.env_id, args.num_envs, args.observation, prey=args.prey)
    eval_envs = make_vec(args.env_id, args.eval_episodes, args.observation, prey=args.prey)
    env = make_env(args.env_id, args.observation, prey=args.prey)
    try:
        agent, replay = OMAD(env, args, device), Replay(env, min(args.buffer_size, args.total_timesteps + args.num_envs), device)
        learner = Learner(agent, replay, args)
        seconds = estimate_seconds(env, args, device)
    except (MemoryError, RuntimeError) as error:
        raise BadInput(f"networks, batches or replay of these sizes cannot be made: {_first_line(error)}") from error
    generator = torch.Generator(device).manual_seed(args.seed)
    run = Run(args, learner, generator, saved)
    run.announce(env, seconds)
    if not run.rows:
        run.evaluate_and_save(eval_envs)
    # After every checkpoint, resumed or not, the environments start again from a seed that the step determines [deviation D4].
    restart = lambda: envs.reset(seed=mix_seed(args.seed, run.step))
    obs, info = restart()
    state = info["state"]

    def learn() -> None:
        if run.step > args.learning_starts:
            for _ in range(round(args.updates_per_step * args.num_envs)):
                run.log(learner.step(generator))

    while run.step < args.total_timesteps:
        # Act.
        if run.step < args.learning_starts:
            action = torch.rand(envs.action_space.shape, generator=generator, device=device).cpu().numpy() * 2 - 1
        else:
            action = agent.act(obs, generator)
        run.check_finite("action", action)
        if learner.overlap:
            learn()
        next_obs, reward, terminated, truncated, info = envs.step(action)
        run.check_finite("reward or observation", np.append(reward, next_obs))
        replay.add(
            obs=obs, next_obs=next_obs, state=state, next_state=info["state"], action=action, reward=reward, terminated=terminated
        )
        if "torso_xy" in info:
            run.record_path(info["torso_xy"])
        obs, state = next_obs, info["state"]
        done = terminated | truncated
        if done.any():
            run.episodes(info["episode"]["r"][done], info["episode"]["l"][done])
            obs, info = envs.reset(options={"reset_mask": done})
            state = np.where(done[:, None], info["state"], state)
        run.step += args.num_envs

        # Learn.
        if not learner.overlap:
            learn()

        # Report.
        run.progress()
        if run.step % args.eval_every < args.num_envs or run.step >= args.total_timesteps:
            run.evaluate_and_save(eval_envs)
            obs, info = restart()
            state = info["state"]
    run.finish()


# ============================================================================================================================
# 6. Main: run directory, checkpoints, command line
# ============================================================================================================================

FORMAT = "omad-2"  # of checkpoint.pt; raise it when a change makes older files unreadable
COLUMNS = ("step", "wall_time_s", "return_mean", "return_std", "episodes")  # of eval.csv


class FailedRun(RuntimeError):
    """A run that cannot go on: one line on stderr, exit code 3."""


class Run:
    """One run: its counters, what it prints, and what it writes to its directory."""

    def __init__(self, args: Args, learner: Learner, generator: torch.Generator, saved: dict | None):
        self.args, self.agent, self.learner, self.generator = args, learner.agent, learner, generator
        self.path = Path(args.resume) if args.resume else make_run_dir(args)
        self.step, self.last_return, self.rows, self.seconds_before = 0, math.nan, [], 0.0
        self.prey = checksum(args.prey)
        if saved:
            self.restore(saved)
        self.torso_xy = None  # [at least `step`, 2] metres, of robots that walk in a plane
        if (self.path / "torso_xy.npy").exists():
            with _must_fit(self.path / "torso_xy.npy"):
                self.record_path(np.load(self.path / "torso_xy.npy", allow_pickle=False)[: self.step], 0)
        if args.resume:  # some flags may have changed
            try:
                write_config(self.path, args)
            except FailedRun as error:
                raise BadInput(str(error)) from error
        self.pending: list[tuple[int, tuple[str, ...], Tensor]] = []  # scalars still on the device: (step, names, values)
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1 if saved else 0)
        self.started = self.reported = time.time()
        self.reported_step = self.step

    def announce(self, env: TeamEnv, seconds: float) -> None:
        args, agent = self.args, self.agent
        count = lambda module: f"{sum(p.numel() for p in module.parameters()):,} parameters"
        seconds *= 1 - self.step / args.total_timesteps
        print(f"task      {args.env_id}: {find_task(args.env_id).description}")
        if args.prey:
            print(f"prey      {args.prey}")
        print(
            f"sizes     {env.num_agents} agents; observations {env.obs_sizes}, actions {env.action_sizes}, joint state {env.state_size}"
        )
        print(f"device    {agent.device}, {torch.get_num_threads()} CPU thread(s)")
        print(f"networks  {args.policy} policies {count(agent.policy)}, critics {count(agent.critic)}")
        print(f"expected  about {_duration(seconds)} from step {self.step:,} to {args.total_timesteps:,}")
        if agent.device.type == "cpu" and args.env_id.startswith("mamujoco_") and args.critic_hidden >= 1024:
            small = SMALL_HALFCHEETAH if args.env_id.startswith("mamujoco_halfcheetah") else SMALL
            print(f"small     the paper's sizes want a GPU. On a CPU, add: {small}")
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

    def check_finite(self, quantity: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            self.flush()  # fails itself if a loss went first, which is the better diagnosis
            self.fail(f"{quantity} is not finite", self.step)

    def fail(self, what: str, step: int) -> None:
        try:
            write(self.path / "failed.pt", lambda file: torch.save(self.checkpoint(), file))
            saved = f"state saved to {self.path / 'failed.pt'}"
        except FailedRun as error:
            saved = str(error)
        good = self.path / "checkpoint.pt"
        raise FailedRun(f"step {step}: {what}; {saved}" + (f"; the last good state is in {good}" if good.exists() else ""))

    def episodes(self, returns: np.ndarray, lengths: np.ndarray) -> None:
        self.last_return = float(returns.mean())
        self.writer.add_scalar("charts/episodic_return", self.last_return, self.step)
        self.writer.add_scalar("charts/episodic_length", lengths.mean(), self.step)

    def record_path(self, xy: np.ndarray, step: int | None = None) -> None:
        """Keeps where the robots of all environments are after this step, [E, 2]; NaN where a step was not recorded."""
        start = self.step if step is None else step
        if self.torso_xy is None or start + len(xy) > len(self.torso_xy):
            longer = np.full((max(100_000, 2 * (start + len(xy))), 2), np.nan, np.float32)
            if self.torso_xy is not None:
                longer[: len(self.torso_xy)] = self.torso_xy
            self.torso_xy = longer
        self.torso_xy[start : start + len(xy)] = xy

    def progress(self) -> None:
        """The progress line: rewritten in place on a terminal, a new line every 30 s elsewhere."""
        now, terminal = time.time(), sys.stdout.isatty()
        if now - self.reported < (2 if terminal else 30):
            return
        rate, total = (self.step - self.reported_step) / (now - self.reported), self.args.total_timesteps
        line = f"step {self.step:,}/{total:,} | {rate:,.0f} steps/s | last return {self.last_return:.1f}"
        line += f" | alpha {self.agent.log_alpha.exp().item():.4f} | {_duration((total - self.step) / rate)} left"
        print(f"{line:<100}", end="\r" if terminal else "\n", flush=True)
        self.writer.add_scalar("charts/steps_per_second", rate, self.step)
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
        mean, std = float(returns.mean()), float(returns.std())
        self.rows.append(dict(zip(COLUMNS, (self.step, round(self.seconds, 1), mean, std, len(returns)))))
        line = f"eval at step {self.step:,} after {_duration(self.seconds)}: return {mean:.2f} ± {std:.2f} over {len(returns)} episodes"
        print(f"{line:<100}", flush=True)
        self.writer.add_scalar("eval/return_mean", mean, self.step)
        self.writer.add_scalar("eval/return_std", std, self.step)
        lines = [",".join(COLUMNS), *(",".join(map(str, row.values())) for row in self.rows)]
        write(self.path / "eval.csv", lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
        if self.torso_xy is not None:
            write(self.path / "torso_xy.npy", lambda file: np.save(file, self.torso_xy[: self.step]))
        write(self.path / "checkpoint.pt", lambda file: torch.save(self.checkpoint(), file))
        kept = {"args": dataclasses.asdict(self.args), "policy": self.agent.policy.state_dict(), **self.rows[-1]}
        write(self.path / "policy.pt", lambda file: torch.save(kept, file))
        self.reported, self.reported_step = time.time(), self.step

    def finish(self) -> None:
        self.writer.close()
        try:
            draw_curve(self.path / "curve.png", self.args, self.rows)
        except ImportError as error:  # a machine with less than requirements.txt: not worth failing a finished run
            print(f"note      no curve.png: {error}")
        if self.args.capture_video:
            self.agent.record_video(self.args, self.path / "videos")
        print(f"done in {_duration(self.seconds)}: {self.path}")

    def checkpoint(self) -> dict:
        """Everything a resumed run needs. Environments are not in it: they restart from a seed at every checkpoint."""
        return {
            "format": FORMAT, "args": dataclasses.asdict(self.args), "step": self.step, "updates": self.learner.updates,
            "agent": self.agent.state_dict(), "replay": self.learner.replay.state_dict(), "generator": self.generator.get_state(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.agent.optimizers.items()},
            "device": self.agent.device.type, "last_return": self.last_return, "rows": self.rows, "seconds": self.seconds,
            "prey": self.prey,
        }  # fmt: skip

    def restore(self, saved: dict) -> None:
        with _must_fit(self.path / "checkpoint.pt"):
            self.agent.load_state_dict(saved["agent"])
            self.learner.replay.load_state_dict(saved["replay"])
            for name, optimizer in self.agent.optimizers.items():
                settings = optimizer.state_dict()["param_groups"]  # learning rates and the like are the arguments'
                optimizer.load_state_dict({"state": saved["optimizers"][name]["state"], "param_groups": settings})
                for parameter, state in optimizer.state.items():  # torch does not check shapes, and fused Adam trusts them
                    shapes = {key: tuple(value.shape) for key, value in state.items()}
                    if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                        raise ValueError(f"optimizer state of the {name} has shapes {shapes}")
            self.step, self.learner.updates = int(saved["step"]), int(saved["updates"])
            self.last_return, self.seconds_before = float(saved["last_return"]), float(saved["seconds"])
            self.rows = [{key: row[key] + 0 for key in COLUMNS} for row in saved["rows"]]
            if saved["device"] == self.agent.device.type:
                self.generator.set_state(saved["generator"])
            else:  # a CUDA generator's state means nothing to the CPU's, or the other way round
                self.generator.manual_seed(mix_seed(self.args.seed, self.step))
                print(f"note      the run was on {saved['device']}: its random numbers go on differently here")


@contextlib.contextmanager
def _must_fit(path: Path):
    """A file of a run whose parts are missing or of other kinds or sizes is bad input, not a bug."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(f"{path}: cut short, or not written by this omad.py: {reason[:200]}") from error


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
    path = Path(args.run_dir) / f"{args.env_id}__omad__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
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
                raise BadInput(f"not a checkpoint of this version of omad.py (format {FORMAT})")
        args = Args(**(saved["args"] if saved else json.loads(config.read_bytes())["args"]))
        args = dataclasses.replace(args, resume="", evaluate="")
        validate(dataclasses.replace(args, prey=""))  # a prey's file may have moved: the command line can say where to
    return args, saved


def draw_curve(path: Path, args: Args, rows: list[dict]) -> None:
    """Return against environment steps, from the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, mean, std = (np.array([row[key] for row in rows]) for key in ("step", "return_mean", "return_std"))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, mean, marker=".")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.2, label="± one standard deviation over episodes")
    axis.set(
        xlabel="environment steps", ylabel="team return", title=f"OMAD ({args.policy} policy), {args.env_id}, seed {args.seed}"
    )
    axis.legend(loc="lower right")
    axis.grid(alpha=0.3)
    write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    plt.close(figure)


def estimate_seconds(env: TeamEnv, args: Args, device: torch.device) -> float:
    """Expected seconds of the whole run, from a few updates and steps of a throwaway agent on this machine."""
    with torch.random.fork_rng(devices=[]):  # networks are initialised on the CPU
        agent, replay, generator = OMAD(env, args, device), Replay(env, 1, device), torch.Generator(device).manual_seed(0)
    replay.added = 1  # one empty transition
    update = Learner(agent, replay, args).update
    update.enabled = agent.chain.enabled = args.cuda_graph and device.type == "cuda"
    index, noise = replay.draw(args.batch_size, generator), agent.policy.noise(args.batch_size, generator)
    obs = np.zeros((args.num_envs, *env.obs_mask.shape), np.float32)
    horizon = find_task(args.env_id).horizon
    copies = args.num_envs if horizon <= 100 else 1  # one robot is enough to know how fast it is
    envs = make_vec(args.env_id, copies, args.observation, processes=False, prey=args.prey)
    envs.reset(seed=0)

    def seconds(function, repeats):
        function()  # the first call is slower
        start, count = time.perf_counter(), 0
        while count < repeats and time.perf_counter() - start < 2:
            function()
            count += 1
            agent.log_alpha.item()  # wait for the device
        return (time.perf_counter() - start) / count

    def one_step():
        done = np.logical_or(*envs.step(np.zeros(envs.action_space.shape))[2:4])
        if done.any():
            envs.reset(options={"reset_mask": done})

    critic, both = seconds(lambda: update(index, noise), 8), seconds(lambda: update(index, noise, noise), 8)
    act = seconds(lambda: agent.act(obs, generator), 8) / args.num_envs
    step = seconds(one_step, 20) / copies
    evaluation = args.eval_episodes * horizon / args.eval_every  # its steps per training step
    update.graphs.clear(), agent.chain.graphs.clear()  # their memory; the rest goes with the function
    return args.total_timesteps * (
        act + step * (1 + evaluation) + args.updates_per_step * (critic + (both - critic) / args.policy_frequency)
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def evaluation_seed(seed: int) -> int:
    """Of the start states and the noise of every evaluation in a run with this seed."""
    return mix_seed(seed, 1)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def validate(args: Args) -> None:
    """Raises `BadInput` for a value of the wrong kind, a number out of range, or numbers that contradict each other."""
    for field in dataclasses.fields(Args):  # the command line sees to the kinds, a file from outside may not
        value = getattr(args, field.name)
        if type(value) is not type(field.default) or get_origin(field.type) is Literal and value not in get_args(field.type):
            raise BadInput(f"{_flag(field.name)} cannot be {value!r}")
    horizon = find_task(args.env_id).horizon
    if not args.observation:
        raise BadInput("--observation needs a value")
    check_task(args, args.env_id)
    if not args.run_dir:
        raise BadInput("--run-dir needs a value")
    if args.capture_video and not importlib.util.find_spec("moviepy"):
        raise BadInput("--capture-video needs the package moviepy, see requirements.txt")
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            raise BadInput(f"{_flag(name)} {getattr(args, name)} is out of range: it must be at least {low} and at most {high}")
    per_iteration = args.updates_per_step * args.num_envs
    if round(per_iteration) < 1 or abs(per_iteration - round(per_iteration)) > 1e-6:
        raise BadInput(
            f"--updates-per-step {args.updates_per_step} times --num-envs {args.num_envs} must be a whole number of updates, at least 1"
        )
    for low, high in (("v_min", "v_max"), ("learning_starts", "total_timesteps")):
        if getattr(args, low) >= getattr(args, high):
            raise BadInput(f"{_flag(low)} {getattr(args, low)} must be below {_flag(high)} {getattr(args, high)}")
    if args.buffer_size < args.num_envs:
        raise BadInput(f"--buffer-size {args.buffer_size} must be at least --num-envs {args.num_envs}")
    whole = args.num_envs * horizon
    if args.eval_every < whole:
        raise BadInput(
            f"--eval-every {args.eval_every} must be at least {whole}, one episode in each environment: they restart at evaluations"
        )


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
    first = {"--env-id": Args.env_id, "--resume": None, "--evaluate": None}  # these decide the other flags' defaults
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
        find_task(first["--env-id"])
        default = preset(first["--env-id"])

    args = read_flags(Args, argv, default, "omad.py")
    if args.list_tasks:
        print(task_table())
        raise SystemExit(0)
    if old:
        if args.evaluate and not saved:
            raise BadInput(f"{old}: no checkpoint.pt there yet; python omad.py --resume {old} goes on with the run")
        if saved and not args.evaluate and args.total_timesteps < min(saved["step"], default.total_timesteps):
            raise BadInput(f"--total-timesteps {args.total_timesteps}: the run in {old} is at step {saved['step']} already")
        free = {"resume", "evaluate", "device", "torch_threads", "cuda_graph", "compile", "capture_video"}
        free |= {"prey"} | ({"seed", "eval_episodes"} if args.evaluate else {"total_timesteps"})
        free |= {"denoising_steps"} if args.evaluate and args.policy == "diffusion" else set()
        for name, value in dataclasses.asdict(default).items():
            if getattr(args, name) != value and name not in free:
                raise BadInput(f"{_flag(name)} cannot be changed for the run in {old}, which has {value}")
    validate(args)
    if saved and (checksum(args.prey) != saved["prey"] if "prey" in saved else args.prey != default.prey):
        if args.resume:
            raise BadInput(
                f"{args.prey or 'the prey of the project'} is not the prey that the run in {old} was trained against: --prey FILE"
            )
        print(f"note      not the prey that the run in {old} was trained against", file=sys.stderr)
    return args, saved


def evaluate_run(args: Args, saved: dict) -> None:
    """--evaluate: the return of a saved run. With the run's own seed and episodes it repeats the last row of its eval.csv."""
    device = pick_device(args.device)
    trained = dataclasses.replace(args, denoising_steps=Args(**saved["args"]).denoising_steps)
    envs = make_vec(args.env_id, args.eval_episodes, args.observation, prey=args.prey)
    with _must_fit(Path(args.evaluate) / "checkpoint.pt"):
        agent = OMAD(make_env(args.env_id, args.observation, prey=args.prey), trained, device)
        agent.load_state_dict(saved["agent"])
        if args.denoising_steps != trained.denoising_steps:
            agent.policy.set_steps(args.denoising_steps)
    returns = evaluate(agent, envs, evaluation_seed(args.seed))
    result = f"return {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes"
    policy = args.policy + (f" policy, {args.denoising_steps} denoising steps" if args.policy == "diffusion" else " policy")
    against = f", prey of {args.prey}" if args.prey else ""
    print(f"{args.env_id}{against}, {policy}, step {saved['step']:,}: {result}")
    if args.capture_video:
        agent.record_video(args, Path(args.evaluate) / "videos")


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
            train(args)
        return 0
    except BadInput as error:
        print(f"omad.py: error: {error}", file=sys.stderr)
        return 2
    except (FailedRun, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"omad.py: failed: {_first_line(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("omad.py: interrupted; a training run goes on with --resume and the directory behind 'logs'", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

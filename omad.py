"""OMAD: online multi-agent reinforcement learning with diffusion policies, in one file to read from top to bottom.

    python omad.py --env-id mpe_simple_spread     # learns on a laptop CPU within minutes; --list-tasks shows all tasks
    python omad.py --evaluate runs/<run>          # return of a saved policy: a run's directory, or a policy.pt alone
    python omad.py --resume runs/<run>            # goes on after a crash; on the CPU as if it had not happened

Method: "Diffusing to Coordinate: Efficient Online Multi-Agent Diffusion Policies", arXiv 2602.18291 [OMAD] and, where
that leaves a choice open, the method it extends, "DIME: Diffusion-Based Maximum Entropy Reinforcement Learning", arXiv
2502.02316 [DIME]. What is neither's is marked [deviation Dn]; runs/omad.md has the reasons.
Every agent turns Gaussian noise into an action by a few denoising steps that see only its own observation. The joint
entropy of such policies is intractable: minus the sum over agents of path costs C_i, a lower bound, stands for it. A
centralised distributional critic, two networks, learns the return plus that bonus. All agents are updated at once, by
the gradient of that critic through all denoising steps. The weight of the bonus, the temperature alpha, tunes itself.

Shape letters: B batch, N agents, O observation, A action, S joint state, K denoising steps, Q critics, Z atoms,
H hidden, E environments. O and A are those of the largest agent: others are padded with zeros, and masked in sums.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.envs import BadInput, RecordPositions, TeamEnv, check_video, demonstrate, draw_curve, evaluate, find_task
from common.envs import make_env, make_vec, mix_seed, record_video, task_table, versions


# 1. Arguments =========================================================================================================
@dataclass(frozen=True)
class Args:
    """OMAD: online multi-agent RL with diffusion policies. Defaults are those of the chosen task."""

    env_id: str = "mpe_simple_spread"  # the task; --list-tasks prints them
    observation: str = "own"  # what an agent sees: own; MaMuJoCo: full, motion (of the joints), k0, k1, ... joints away
    prey: str = ""  # omar_simple_tag, _world: file of the prey's network (OMAR's pretrained_adv_model.pt), else our own
    seed: int = 1  # seed of everything random: networks, environments, noise, replay
    total_timesteps: int = 3_000_000  # environment steps, all environments together
    num_envs: int = 1  # environments stepped side by side
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and replay live; auto: cuda if there is one
    torch_threads: int = 1  # CPU threads of torch; one is fastest at the MPE presets' widths, 0 is torch's own choice
    cuda_graph: bool = True  # on a GPU, capture updates and acting as CUDA graphs
    compile: bool = False  # compile losses and acting with torch.compile, which takes a minute or two at the start
    eval_every: int = 50_000  # environment steps between evaluations; each also saves and restarts the environments
    eval_episodes: int = 10  # episodes per evaluation, one environment each
    run_dir: str = "runs"  # folder in which the run's own directory is made
    resume: str = ""  # go on with the run in this directory; length, device, speed flags, prey and video may change
    evaluate: str = ""  # only evaluate the policy of the run in this directory, or a policy.pt
    list_tasks: bool = False  # print the tasks and their sizes, and stop
    capture_video: bool = False  # write a video of the final (or the evaluated) policy to a folder videos beside it
    learning_starts: int = 5_000  # environment steps with uniformly random actions before the first update
    buffer_size: int = 1_000_000  # transitions kept for replay
    batch_size: int = 256  # B, transitions per update
    gamma: float = 0.99  # discount factor
    updates_per_step: float = 2.0  # critic updates per environment step (update-to-data ratio)
    policy_frequency: int = 3  # critic updates per update of the policies and the temperature
    policy_lr: float = 3e-4  # learning rate of the policies
    q_lr: float = 3e-4  # learning rate of the critics
    lr_decay: bool = False  # let policy_lr and q_lr fall to zero along half a cosine [deviation D8]
    policy: Literal["diffusion", "dime", "gaussian"] = "diffusion"  # dime: DIME's chain, made for K = 16; or Gaussians
    denoising_steps: int = 8  # K, steps from noise to action; Gaussians have none
    last_noise: bool = True  # actions with the noise of the last step; --no-last-noise is meant for --evaluate
    policy_hidden: int = 256  # H, width of each agent's network
    time_power: float = 1.0  # step k is at time 1 - (1 - k / K)^power: above 1, less noise in the last steps
    x_scale: float = 1.0  # factor on the first layer's initial weights of x: above 1 for many modes
    critic_hidden: int = 2048  # width of each critic
    n_atoms: int = 100  # Z, atoms of the return distribution
    v_min: float = -1000.0  # smallest representable return
    v_max: float = 1000.0  # largest; must exceed the largest discounted return with entropy bonus
    random_critics: bool = False  # start the critics' last layers at random; else at zero [deviation D6]
    lower_critic: bool = False  # bootstrap from the critic with the lower value [deviation D7]; else from the mean
    bn_warmup: int = 100_000  # critic updates with plain batch normalisation before renormalisation sets in
    tau: float = 0.0  # averaging rate of slow target critics; 0: none, but a joint forward pass
    alpha: float = 1.0  # start value of the temperature
    alpha_lr: float = 1e-3  # learning rate of log alpha; 0: the temperature stays as it is
    target_entropy_scale: float = 4.0  # path costs should be this - 2.335 for each action entry: more is less noise


# [deviation D1] MPE presets suit a laptop CPU: small networks, fewer updates, support and discount of 25-step episodes.
MPE = dict(
    total_timesteps=200_000, num_envs=32, eval_every=10_000, eval_episodes=100, learning_starts=2_000, gamma=0.95,
    updates_per_step=0.0625, policy_lr=5e-3, q_lr=5e-3, denoising_steps=4, policy_hidden=64, critic_hidden=128,
    v_min=-30.0, v_max=10.0, bn_warmup=5_000, alpha=0.005,
)  # fmt: skip
# OMAR's tasks, which make offline data, and doors [deviation D1]: larger rewards, and slower rates.
OMAR = MPE | dict(total_timesteps=100_000, eval_every=4_000, policy_lr=1e-3, q_lr=1e-3, alpha=0.1)
SUITES = {"mpe": MPE, "mamujoco": dict(observation="full"), "omar": OMAR, "doors": OMAR}  # mamujoco: as Args, for a GPU
OWN = {  # what else a task has [deviation D1]; in MaMuJoCo a robot, with all its partitions
    "mpe_simple": dict(v_min=-90.0), "mpe_simple_speaker_listener": dict(v_min=-90.0),
    "mpe_simple_reference": dict(v_min=-60.0), "mpe_collect_treasure": dict(v_min=-60.0, v_max=60.0),
    "mpe_simple_adversary": dict(v_max=30.0), "mpe_simple_spread_n4": dict(
        total_timesteps=1_250_000, num_envs=64, updates_per_step=0.03125, eval_every=50_000, buffer_size=300_000,
        v_min=-60.0),
    "doors_blind": dict(
        total_timesteps=256_000, updates_per_step=0.125, gamma=1.0, v_min=-2.0, v_max=4.0, alpha=0.02, policy_lr=3e-4,
        denoising_steps=8, time_power=1.5, x_scale=8.0, critic_hidden=256, target_entropy_scale=6.0),
    **dict.fromkeys(("omar_simple_spread", "omar_simple_spread_6"), dict(v_min=-600.0, v_max=600.0)),
    "omar_simple_tag": dict(v_min=-300.0, v_max=300.0, total_timesteps=400_000),
    "omar_simple_world": dict(v_min=-200.0, v_max=200.0, total_timesteps=400_000),
    "omar_halfcheetah_2x3": dict(
        v_min=-500.0, v_max=500.0, total_timesteps=500_000, num_envs=10, updates_per_step=0.1, eval_every=10_000,
        eval_episodes=10, learning_starts=10_000, gamma=0.99, policy_hidden=128, critic_hidden=256, bn_warmup=100_000),
    "mamujoco_halfcheetah": dict(v_min=-2000.0, v_max=2000.0), "mamujoco_humanoidstandup": dict(v_min=-3e4, v_max=3e4),
    **dict.fromkeys(("mamujoco_ant", "mamujoco_manysegmentant"), dict(observation="motion")),  # [deviation D9]
    "mamujoco_humanoid": dict(v_min=-1.5e3, v_max=1.5e3),
    "mamujoco_swimmer": dict(gamma=0.998, v_min=-200.0, v_max=200.0, alpha=0.1),
    "mamujoco_manysegmentswimmer": dict(v_min=-100.0, v_max=100.0, alpha=0.01),
    "mamujoco_reacher": dict(v_min=-50.0, v_max=50.0, alpha=0.1, eval_every=10_000, total_timesteps=300_000),
    "mamujoco_pusher": dict(v_min=-200.0, v_max=200.0, alpha=0.1, eval_every=10_000, total_timesteps=300_000),
}  # fmt: skip


def preset(env_id: str) -> Args:
    """The defaults of a task. Raises `BadInput` if there is no such task."""
    name = env_id.rpartition("_")[0] if env_id.startswith("mamujoco_") else env_id
    falls = (task := find_task(env_id)).robot and task.terminates  # a robot that can [deviations D7, D8]
    return Args(env_id=env_id, lower_critic=falls, lr_decay=falls, **SUITES[env_id.split("_")[0]] | OWN.get(name, {}))


# 2. Policy ============================================================================================================
class ParallelLinear(nn.Module):
    """N linear layers side by side, one per agent or critic, as one batched product: x [N, B, in] -> [N, B, out]."""

    def __init__(self, n: int, n_in: int, n_out: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n_in, n_out) * scale / math.sqrt(n_in))
        self.bias = nn.Parameter(torch.zeros(n, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class DiffusionPolicy(nn.Module):
    """N independent diffusion policies: K steps with a learned u, from noise to x_K, and the action a = tanh(x_K).

    x_0 ~ N(0, 2.5^2 I),   x_{k+1} ~ N(keep_k x_k + gain_k u(x_k, o, k), var_k)
    The bound on the entropy compares it with noise added on the way back: x_k ~ N(back_k x_{k+1}, back_var_k)"""

    def __init__(self, obs_sizes: list[int], action_sizes: list[int], args: Args, steps: int = 0):
        super().__init__()
        n, o, a, hidden = len(obs_sizes), max(obs_sizes), max(action_sizes), args.policy_hidden
        real = torch.arange(a) < torch.tensor(action_sizes)[:, None]  # [N, A]
        self.register_buffer("action_mask", real.float()[:, None], persistent=False)  # [N, 1, A]
        # First layer, of [x, o, H entries for the step]: o's part once a chain, the step's a bias [deviation D3].
        self.in_x = ParallelLinear(n, a, hidden, args.x_scale * math.sqrt(a / (a + o + hidden)))
        self.in_obs = ParallelLinear(n, o, hidden, math.sqrt(o / (a + o + hidden)))
        self.in_step = nn.Parameter(0.5 * torch.randn(n, args.denoising_steps, hidden))
        self.hidden1, self.hidden2 = ParallelLinear(n, hidden, hidden), ParallelLinear(n, hidden, hidden)
        self.out = ParallelLinear(n, hidden, a, scale=1e-3)  # near zero [DIME]
        self.steps, self.dime = steps or args.denoising_steps, args.policy == "dime"  # another K divides the same time
        t = torch.arange(self.steps + 1)[:, None, None, None] / self.steps  # [K + 1, 1, 1, 1], from 0 to 1 for any K
        self.register_buffer("index", torch.arange(self.steps) * args.denoising_steps // self.steps, persistent=False)
        if self.dime:
            self.rho_dt = nn.Parameter(torch.full([n, 1, 1], math.log(math.expm1(0.1))))  # its softplus is 0.1
            self.rho_friction = nn.Parameter(torch.full([n, 1, a], math.log(math.expm1(1.0))))
            schedule = 0.999 * torch.cos(math.pi / 2 * (0.008 + t[:-1]) / 1.008) ** 2 + 0.001  # tiny last [DIME]
            self.register_buffer("schedule", args.denoising_steps / self.steps * schedule, persistent=False)
        else:
            self.log_s = nn.Parameter(torch.full([n, 1, a], math.log(0.2) / 5))  # log(s) / 5: so Adam moves s faster
            self.register_buffer("signal", torch.cos(0.485 * math.pi * (1 - t) ** args.time_power), persistent=False)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """keep, gain, var, back, back_var, like [K, N, 1, A]. DDPM's [deviation D5]: u predicts x_K. If x_K ~ N(u,
        s^2), s learned, K additions of noise lead to x_k ~ N(signal_k u, total_k); a step undoes one, by Bayes' rule.

        [DIME chain], `--policy dime`: u is a drift, with learned step sizes, and variance 2 eta_k both ways,
            eta_k = softplus(rho_dt) schedule_k / softplus(rho_friction),   mean x_k + eta_k (-x_k / 2.5^2 + u)"""
        if self.dime:
            eta = F.softplus(self.rho_dt) * self.schedule / F.softplus(self.rho_friction)
            keep = 1 - eta / 2.5**2
            return keep, eta, 2 * eta, keep, 2 * eta
        before, after = self.signal[:-1], self.signal[1:]
        total = (1 - self.signal**2) * 2.5**2 + (self.signal * (5 * self.log_s).exp()) ** 2  # [K + 1, N, 1, A]
        back, ratio = before / after, total[1:] / total[:-1]
        back_var = (1 - back**2) * 2.5**2
        return back * ratio, after - back * ratio * before, back_var * ratio, back, back_var

    def noise(self, batch: int) -> Tensor:
        """All the randomness of one chain: [K + 1, B, N, A] standard normal numbers."""
        return torch.randn(self.steps + 1, batch, *self.action_mask.shape[::2], device=self.action_mask.device)

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, N, O], noise [K + 1, B, N, A] -> action [B, N, A], path cost C_i [B, N].

        E[C_i] >= -H(pi_i): -E[C_i] is a lower bound on the entropy [OMAD bound].
            C     = log N(x_0; 0, 2.5^2 I) - log w - sum_d log(1 - tanh(x_K)^2)
            log w = sum_k [log N(x_k; back_k x_{k+1}, back_var_k) - log N(x_{k+1}; keep_k x_k + gain_k u, var_k)]"""
        noise = noise.transpose(1, 2) * self.action_mask  # [K + 1, N, B, A]
        keep, gain, var, back, back_var = self.coefficients()
        # u = h w + b of `out`, so x_{k+1} = keep x_k + h (gain w) + (gain b + sqrt(var) noise). First what needs no x.
        gain = gain * self.action_mask
        bias0 = self.in_obs(obs.transpose(0, 1)) + self.in_x.bias + self.in_step[:, self.index, None].transpose(0, 1)
        out_ws = gain * self.out.weight  # [K, N, H, A]
        out_bs = torch.addcmul(gain * self.out.bias, var.sqrt(), noise[1:])  # [K, N, B, A]
        weights = (self.in_x.weight, *self.hidden1.parameters(), *self.hidden2.parameters())
        weights = (p.expand(self.steps, *p.shape) for p in weights)  # so that their gradients are added up in one go
        chain = [2.5 * noise[0]]  # x_0 [N, B, A]
        for b0, out_w, out_b, keep_k, w0, w1, b1, w2, b2 in zip(bias0, out_ws, out_bs, keep, *weights):
            h = F.gelu(torch.baddbmm(b0, chain[-1], w0))  # exact, not the tanh approximation [deviation D2]
            h = F.gelu(torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, h, w1)), w2))
            chain.append(torch.baddbmm(torch.addcmul(out_b, keep_k, chain[-1]), h, out_w))
        # x_{k+1} less its mean is sqrt(var_k) noise, so that of its log density only -noise^2 / 2 and log var_k vary.
        x, xs = chain[-1], torch.stack(chain)  # [N, B, A], [K + 1, N, B, A]
        behind = torch.addcmul(xs[:-1], xs[1:], back, value=-1)  # x_k - back_k x_{k+1} [K, N, B, A]
        cost = (behind**2 / (2 * back_var)).sum(0) - (noise**2 / 2).sum(0) + 2 * (x + F.softplus(-2 * x))  # [N, B, A]
        constant = (back_var / var).log().sum(0) / 2 - math.log(4 * 2.5 * math.sqrt(2 * math.pi))  # [N, 1, A]
        return torch.tanh(x).transpose(0, 1), ((cost + constant) * self.action_mask).sum(-1).T


class GaussianPolicy(nn.Module):
    """The ablation: N independent squashed Gaussians with exact C_i = log pi_i(a_i | o_i)."""

    def __init__(self, obs_sizes: list[int], action_sizes: list[int], args: Args, steps: int = 0):
        super().__init__()
        n, o, a, hidden = len(obs_sizes), max(obs_sizes), max(action_sizes), args.policy_hidden
        real = torch.arange(a) < torch.tensor(action_sizes)[:, None]  # [N, A]
        self.register_buffer("action_mask", real.float()[:, None], persistent=False)  # [N, 1, A]
        self.in_obs, self.steps = ParallelLinear(n, o, hidden), 0
        self.hidden1, self.hidden2 = ParallelLinear(n, hidden, hidden), ParallelLinear(n, hidden, hidden)
        self.out = ParallelLinear(n, hidden, 2 * a, scale=1e-3)

    noise = DiffusionPolicy.noise  # [1, B, N, A]

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs [B, N, O], noise [1, B, N, A] -> action [B, N, A], C_i [B, N]."""
        obs, noise = obs.transpose(0, 1), noise[0].transpose(0, 1)  # [N, B, ...]
        h = F.gelu(self.hidden2(F.gelu(self.hidden1(F.gelu(self.in_obs(obs))))))
        mean, log_std = self.out(h).chunk(2, -1)  # [N, B, A]
        log_std = -5.0 + 3.5 * (torch.tanh(log_std) + 1)  # in [-5, 2], as in common SAC implementations
        x = (mean + log_std.exp() * noise) * self.action_mask
        log_tanh = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
        log_pi = -(noise**2) / 2 - log_std - 0.5 * math.log(2 * math.pi) - log_tanh  # [N, B, A]
        return torch.tanh(x).transpose(0, 1), (log_pi * self.action_mask).sum(-1).T


# 3. Critic ============================================================================================================
class BatchRenorm(nn.Module):
    """Batch renormalisation of x [Q, B, D] over B, with statistics of each of the Q networks (arXiv 1702.03275).
    In training by those of the batch, after `warmup` calls corrected towards running ones; in evaluation by these."""

    def __init__(self, critics: int, size: int, warmup: int):
        super().__init__()
        self.warmup = warmup
        self.scale = nn.Parameter(torch.ones(critics, 1, size))
        self.shift = nn.Parameter(torch.zeros(critics, 1, size))
        self.register_buffer("mean", torch.zeros(critics, 1, size))
        self.register_buffer("var", torch.ones(critics, 1, size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        running_std = (self.var + 1e-3).sqrt()
        if not self.training:
            ratio = self.scale / running_std
            return torch.addcmul(self.shift - self.mean * ratio, x, ratio)
        mean = x.mean(dim=1, keepdim=True)  # [Q, 1, D]
        centred = x - mean
        var = (centred**2).mean(dim=1, keepdim=True)
        std = (var + 1e-3).sqrt()
        with torch.no_grad():
            warm = self.calls >= self.warmup  # before, the batch is its own reference: r = 1, d = 0
            r = (std / torch.where(warm, running_std, std)).clamp(1 / 3, 3)
            d = ((mean - torch.where(warm, self.mean, mean)) / running_std).clamp(-5, 5)
            torch._foreach_lerp_([self.mean, self.var], [mean, var], 0.01)
            self.calls += 1
        return torch.addcmul(torch.addcmul(self.shift, self.scale, d), centred, self.scale * (r / std))


class Critic(nn.Module):
    """Two centralised distributional critics Z_q(s, a_1..a_N): state [B, S], action [B, N, A] -> logits [Q, B, Z]."""

    def __init__(self, state_size: int, action_sizes: list[int], args: Args):
        super().__init__()
        n_in, hidden = state_size + len(action_sizes) * max(action_sizes), args.critic_hidden
        norm = lambda size: BatchRenorm(2, size, args.bn_warmup)
        self.norm0, self.layer1 = norm(n_in), ParallelLinear(2, n_in, hidden)
        self.norm1, self.layer2 = norm(hidden), ParallelLinear(2, hidden, hidden)
        self.norm2, self.out = norm(hidden), ParallelLinear(2, hidden, args.n_atoms, scale=float(args.random_critics))
        self.register_buffer("atoms", torch.linspace(args.v_min, args.v_max, args.n_atoms), persistent=False)  # [Z]

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([state, action.flatten(1)], -1)  # [B, S + N A]
        x = self.norm1(F.relu(self.layer1(self.norm0(x.expand(2, -1, -1)))))  # [Q, B, H]
        return self.out(self.norm2(F.relu(self.layer2(x))))


# 4. Losses and updates ================================================================================================
POLICIES = {"diffusion": DiffusionPolicy, "dime": DiffusionPolicy, "gaussian": GaussianPolicy}


def project(probs: Tensor, places: Tensor, atoms: Tensor) -> Tensor:
    """Moves the mass `probs` [B, Z] at `places` [B, Z], clipped to the support, to the even grid `atoms` [Z] [C51]."""
    place = (places.clamp(atoms[0], atoms[-1]) - atoms[0]) / (atoms[1] - atoms[0])  # in units of atoms, 0 .. Z - 1
    lower = place.floor().clamp(max=len(atoms) - 2)
    share = place - lower  # of the upper neighbour
    index = lower.long().clamp(min=0)  # a NaN must end in the loss, where it is reported, not as a wild index
    low = torch.zeros_like(probs).scatter_add_(-1, index, probs * (1 - share))
    return low.scatter_add_(-1, index + 1, probs * share)


class OMAD(nn.Module):
    """Policies, critics, temperature, their losses and optimisers: everything that learns."""

    def __init__(self, env: TeamEnv, args: Args, device: torch.device):
        super().__init__()
        self.args, self.policy = args, POLICIES[args.policy](env.obs_sizes, env.action_sizes, args).to(device)
        self.critic = Critic(env.state_size, env.action_sizes, args).to(device)
        self.slow_critic = copy.deepcopy(self.critic).eval().requires_grad_(False) if args.tau else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))
        start = -0.5 - math.log(2.5 * math.sqrt(2 * math.pi))  # E[log N(x_0; 0, 2.5^2)], in C but not in DIME's cost
        self.target_cost = (args.target_entropy_scale + start) * sum(env.action_sizes)
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")  # a graph reads rates as tensors
        rate = partial(torch.tensor, device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
        self.policy_adam = adam(self.policy.parameters(), rate(args.policy_lr), betas=(0.5, 0.999))
        self.critic_adam = adam(self.critic.parameters(), rate(args.q_lr), betas=(0.5, 0.999))
        self.alpha_adam = adam([self.log_alpha], args.alpha_lr)
        self.adams = (self.policy_adam, self.critic_adam, self.alpha_adam)
        if args.compile:
            self.critic_loss, self.policy_loss = torch.compile(self.critic_loss), torch.compile(self.policy_loss)

    def critic_loss(self, batch: dict, noise: Tensor) -> tuple[Tensor, dict]:
        """Cross-entropy to the entropy-regularised distributional target [OMAD critic], with p_q the masses of Z_q:

            L = sum_q E[-sum_j target_j log p_qj(s, a) + 0.005 sum_j p_qj log p_qj]
            target: mass mean_q p_qj(s', a') at the places r + gamma (1 - terminated) (z_j - alpha sum_i C_i), projected
            with `lower_critic` the mass is p_qj(s', a') of that q which values (s', a') lower [deviation D7]

        A truncated step is not terminated: its target bootstraps from the true final observation. Without slow critics
        (s, a) and (s', a') pass through the critics as one batch, so that its statistics are those of both [CrossQ]."""
        critic, alpha = self.critic.train(), self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, path_cost = self.policy(batch["next_obs"], noise)  # [B, N, A], [B, N]
        if self.slow_critic is None:
            states = torch.cat([batch["state"], batch["next_state"]])
            logits, next_logits = critic(states, torch.cat([batch["action"], next_action])).chunk(2, dim=1)  # [Q, B, Z]
        else:
            logits = critic(batch["state"], batch["action"])
            next_logits = self.slow_critic(batch["next_state"], next_action)
        with torch.no_grad():
            discount = self.args.gamma * (1 - batch["terminated"])[:, None]  # [B, 1]
            places = batch["reward"][:, None] + discount * (critic.atoms - alpha * path_cost.sum(1, True))  # [B, Z]
            first, second = F.softmax(next_logits, -1)  # [B, Z] each
            mass = (first + second) / 2
            if self.args.lower_critic:
                mass = torch.where(((first - second) @ critic.atoms < 0)[:, None], first, second)
            target = project(mass, places, critic.atoms)  # [B, Z]
        probs = (log_probs := F.log_softmax(logits, -1)).exp()
        loss = ((0.005 * probs - target) * log_probs).sum() / len(target)  # [Q, B, Z] -> []
        value = probs.detach() @ critic.atoms  # [Q, B]
        logs = {"losses/critic": loss.detach(), "diag/value": value.mean()}
        logs["diag/critic_disagreement"] = (value[0] - value[1]).abs().mean()
        return loss, logs | {"diag/target_mass_at_ends": (target[:, 0] + target[:, -1]).mean()}

    def policy_loss(self, batch: dict, noise: Tensor) -> tuple[Tensor, dict, Tensor]:
        """One step for all agents at once: L = E[-mean_q E[Z_q(s, a_1..a_N)] + alpha sum_i C_i] [OMAD policies].

        Its gradient runs through the critics, held fixed, and the whole chain. Also returns E[sum_i C_i]."""
        critic, alpha = self.critic.eval(), self.log_alpha.detach().exp()
        action, path_cost = self.policy(batch["obs"], noise)
        value = F.softmax(critic(batch["state"], action), -1) @ critic.atoms  # [Q, B]
        cost = path_cost.sum(1).mean()  # []
        loss = alpha * cost - value.mean()
        logs = {"losses/policy": loss.detach(), "diag/entropy_bound": -cost.detach()}
        return loss, logs | {"diag/action_saturation": (action.abs() > 0.99).float().mean()}, cost.detach()

    def temperature_loss(self, cost: Tensor) -> tuple[Tensor, dict]:
        """L = alpha (target_cost - E[sum_i C_i]): little noise, a high cost, raises alpha [OMAD alpha]."""
        loss = self.log_alpha.exp() * (self.target_cost - cost)
        return loss, {"losses/temperature": loss.detach(), "diag/alpha": self.log_alpha.detach().exp()}

    def update(self, batch: dict, next_noise: Tensor, policy_noise: Tensor | None = None) -> dict:
        """One update of the critics and, if there is noise for it, of policies and temperature, on the same batch."""
        self.zero_grad()
        loss, logs = self.critic_loss(batch, next_noise)
        loss.backward()
        self.critic_adam.step()
        if self.slow_critic is not None:
            for slow, fast in zip(self.slow_critic.state_dict().values(), self.critic.state_dict().values()):
                slow.lerp_(fast, self.args.tau) if slow.is_floating_point() else slow.copy_(fast)
        if policy_noise is None:
            return logs
        loss, policy_logs, cost = self.policy_loss(batch, policy_noise)
        loss.backward(inputs=list(self.policy.parameters()))
        nn.utils.clip_grad_value_(self.policy.parameters(), 1.0)
        self.policy_adam.step()
        loss, alpha_logs = self.temperature_loss(cost)
        loss.backward()
        self.alpha_adam.step()
        return logs | policy_logs | alpha_logs


def graphed(function: Callable, enabled: bool) -> Callable:
    """Captures a function of tensors, if `enabled`, as a CUDA graph for each set of shapes, after three plain calls.
    The function must neither wait for the device nor draw random numbers; the next call overwrites its result."""
    calls, graphs = {}, {}

    def call(*inputs: Tensor):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] = calls.get(shapes, 0) + 1
        if calls[shapes] <= 3:
            return function(*inputs)
        if shapes not in graphs:
            graph, places = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                graphs[shapes] = graph, places, function(*places)
        graph, places, result = graphs[shapes]
        torch._foreach_copy_(places, inputs)
        graph.replay()
        return result

    return call if enabled else function


# 5. Replay and training ===============================================================================================
class Replay:
    """A ring of the last `capacity` transitions on the device: one row each, of which a batch holds views by name."""

    def __init__(self, env: TeamEnv, capacity: int, device: torch.device):
        o, a, s = env.obs_mask.shape, env.action_mask.shape, (env.state_size,)
        self.shapes = dict(obs=o, next_obs=o, state=s, next_state=s, action=a, reward=(), terminated=())
        self.widths = [math.prod(shape) for shape in self.shapes.values()]
        self.table, self.added = torch.zeros(capacity, sum(self.widths), device=device), 0

    def add(self, **transitions: np.ndarray) -> None:
        """Appends E transitions, given as arrays [E, ...] by name."""
        count = len(transitions["reward"])
        rows = np.concatenate([transitions[name].reshape(count, -1) for name in self.shapes], 1, dtype=np.float32)
        places = torch.arange(self.added, self.added + count) % len(self.table)
        self.table[places.to(self.table.device)] = torch.from_numpy(rows).to(self.table.device)
        self.added += count

    def sample(self, rows: Tensor) -> dict:
        """obs and next_obs [B, N, O], state and next_state [B, S], action [B, N, A], reward and terminated [B]."""
        parts = self.table[rows].split(self.widths, 1)
        return {name: part.view(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts)}


def pick_device(name: str) -> torch.device:
    """The one place that decides where tensors live; they are float32 everywhere, a GPU multiplies them as TF32."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_stream(torch.cuda.Stream())  # `graphed` cannot capture on the default one
    return device


def make_act(policy: nn.Module, args: Args = Args()) -> Callable[[np.ndarray], np.ndarray]:
    """Decentralised execution, sampled: observations [E, N, O] to actions [E, N, A]. On a GPU: after `pick_device`."""
    device, chain = policy.action_mask.device, lambda obs, noise: policy(obs, noise)[0]
    chain = graphed(torch.compile(chain) if args.compile else chain, args.cuda_graph and device.type == "cuda")

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        noise = policy.noise(len(obs))
        noise[-1] *= args.last_noise
        action = chain(torch.from_numpy(obs).to(device), noise).cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError("an action is not finite: the networks have diverged")
        return action

    return act


def train(args: Args, envs: gym.vector.VectorEnv | None = None) -> None:
    """The whole of training or, with `args.resume`, the rest of it; in `envs`, if the caller wants to watch them."""
    task = dict(observation=args.observation, prey=args.prey)
    env, eval_envs = make_env(args.env_id, **task), make_vec(args.env_id, args.eval_episodes, **task)
    name = f"{args.env_id}__omad__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06d}"
    run = Path(args.resume or Path(args.run_dir, name))
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    (lock := FileLock(run / ".lock")).acquire(timeout=0)  # keeps other processes out until `train` returns
    begun = (run / "checkpoint.pt").exists() or (run / "eval.csv").exists()  # else killed before it had saved
    saved = load(run / "checkpoint.pt") if begun else dict(step=0, updates=0, seconds=0.0, evaluations=[], positions=())
    config = dict(format=FORMAT, obs_sizes=env.obs_sizes, action_sizes=env.action_sizes) | versions()
    config |= dict(args=vars(args) | {"resume": ""})
    write(run / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    # Build.
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    envs = RecordPositions(envs or make_vec(args.env_id, args.num_envs, **task), saved["positions"])
    agent, random = OMAD(env, args, device), torch.cuda if device.type == "cuda" else torch
    replay = Replay(env, min(args.buffer_size, args.total_timesteps + args.num_envs), device)
    learn = lambda rows, *noise: agent.update(replay.sample(rows), *noise)
    learn, act = graphed(learn, args.cuda_graph and device.type == "cuda"), make_act(agent.policy, args)
    # Start, or go on from the checkpoint.
    torch.manual_seed(args.seed)  # again: what follows does not depend on how much building drew
    step, updates, seconds, evaluations = (saved[key] for key in ("step", "updates", "seconds", "evaluations"))
    if begun:
        agent.load_state_dict(saved["agent"])
        for adam, moments in zip(agent.adams, saved["adams"]):
            adam.load_state_dict(adam.state_dict() | {"state": moments})
        replay.added, replay.table[: saved["added"]] = saved["added"], saved.pop("replay")  # popped: freed
        if len(saved["random"]) == len(random.get_rng_state()):  # not so if that was on another kind of device
            random.set_rng_state(saved["random"])
    print(f"task      {args.env_id}: {find_task(args.env_id).description}; on {device}")
    print(f"logs      {run.resolve()}    (watch: tensorboard --logdir {run.parent})", flush=True)
    writer, logs, obs, started = SummaryWriter(str(run), purge_step=step + 1), {}, None, time.time() - seconds
    bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", mininterval=2, file=sys.stdout)
    uniform = lambda: (torch.rand(envs.action_space.shape, device=device).cpu().numpy() * 2 - 1) * env.action_mask
    while True:
        # Evaluate and save: at the start, every `eval_every` steps and at the end. A resumed run begins here too.
        if obs is None or step % args.eval_every < args.num_envs or step >= args.total_timesteps:
            if not evaluations or evaluations[-1]["step"] < step:
                returns, seconds = evaluate(act, eval_envs, mix_seed(args.seed, 1)), round(time.time() - started, 1)
                mean, std, count = float(returns.mean()), float(returns.std()), len(returns)
                evaluations += [dict(step=step, wall_time_s=seconds, return_mean=mean, return_std=std, episodes=count)]
                writer.add_scalar("eval/return_mean", mean, step), writer.add_scalar("eval/return_std", std, step)
                writer.flush(), bar.write(f"eval at step {step:,}: return {mean:.2f} ± {std:.2f}")
            if not all(value.isfinite().all() for value in agent.state_dict().values()):
                raise FloatingPointError(f"step {step}: the networks have diverged")  # the last good checkpoint stays
            policy = config | dict(policy=agent.policy.state_dict()) | evaluations[-1]
            write(run / "policy.pt", partial(torch.save, policy))
            write(run / "checkpoint.pt", partial(torch.save, dict(
                format=FORMAT, step=step, updates=updates, seconds=seconds, evaluations=evaluations,
                agent=agent.state_dict(), adams=[adam.state_dict()["state"] for adam in agent.adams],
                added=replay.added, replay=replay.table[: replay.added].clone(), random=random.get_rng_state(),
                positions=torch.tensor(envs.positions),
            )))  # fmt: skip
            if len(envs.positions):
                write(run / "torso_xy.npy", lambda path: np.save(path, envs.positions))
            table = [",".join(evaluations[0]), *(",".join(map(str, row.values())) for row in evaluations)]
            write(run / "eval.csv", lambda path: path.write_text("\n".join([*table, ""])))
            if step >= args.total_timesteps:
                break
            obs, info = envs.reset(seed=mix_seed(args.seed, step))  # so that a resumed run is the same [deviation D4]
            state = info["state"]
        # Act.
        action = act(obs) if step >= args.learning_starts else uniform()
        # Learn from what is stored by now: a GPU does it while the environments step.
        if step > args.learning_starts:  # not at 0, when nothing is stored
            if args.lr_decay:  # [deviation D8]
                for adam, rate in zip(agent.adams, (args.policy_lr, args.q_lr)):
                    adam.param_groups[0]["lr"].fill_(rate * (1 + math.cos(math.pi * step / args.total_timesteps)) / 2)
            for _ in range(round(args.updates_per_step * args.num_envs)):
                updates += 1
                index = torch.randint(min(replay.added, len(replay.table)), (args.batch_size,), device=device)
                chains = 2 if updates % args.policy_frequency == 0 else 1  # a second one if policies learn too
                logs |= learn(index, *(agent.policy.noise(args.batch_size) for _ in range(chains)))
        next_obs, reward, terminated, truncated, info = envs.step(action)
        seen = dict(obs=obs, next_obs=next_obs, state=state, next_state=info["state"])
        replay.add(**seen, action=action, reward=reward, terminated=terminated)
        obs, state, done = next_obs, info["state"], terminated | truncated
        if done.any():
            logs["charts/episodic_return"] = info["episode"]["r"][done].mean()
            logs["charts/episodic_length"] = info["episode"]["l"][done].mean()
            obs, info = envs.reset(options={"reset_mask": done})
            state = np.where(done[:, None], info["state"], state)  # info may hold zeros for copies that go on
        step += args.num_envs
        bar.update(args.num_envs)
        if step % 1000 < args.num_envs or step >= args.total_timesteps:  # the scalars of the last update
            for name, value in (logs | {"charts/steps_per_second": step / (time.time() - started)}).items():
                writer.add_scalar(name, float(value), step)
    bar.close(), writer.close()
    write(run / "curve.png", partial(draw_curve, evaluations, "environment steps"))
    if args.capture_video:
        record_video(act, args.env_id, run / "videos", mix_seed(args.seed, 1), **task)
    print(f"done in {seconds:.0f} s: {run}")


# 6. Files and command line ============================================================================================
FORMAT = "omad-4"  # of policy.pt and checkpoint.pt; raise it when a change makes older files unreadable
WITH_RESUME = {*"resume total_timesteps prey device torch_threads cuda_graph compile capture_video".split()}
WITH_EVALUATE = {*"evaluate seed eval_episodes denoising_steps last_noise".split()} | WITH_RESUME - {"total_timesteps"}


def write(path: Path, dump: Callable[[Path], object]) -> None:
    """Under another name, then renamed: an interruption or a full disk leaves the file from before."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        dump(unfinished)
    except RuntimeError as error:  # torch.save's word for a full disk
        raise OSError(f"{path} cannot be written, the file from before is kept: {error}") from error
    unfinished.replace(path)


def load(path: Path) -> dict:
    """A policy.pt (or its run), checkpoint.pt or config.json. Nothing in it is executed. Raises `BadInput`."""
    path = path / "policy.pt" if path.is_dir() else path
    try:
        saved = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, "cpu", weights_only=True)
        assert saved["format"] == FORMAT, f"its format is {saved['format']}, not {FORMAT}"
        return saved
    except Exception as error:  # a damaged file can raise anything
        raise BadInput(f"{path}: missing, damaged, or not of this program and version: {error}") from error


def load_policy(path: str | Path, steps: int = 0) -> tuple[DiffusionPolicy | GaussianPolicy, dict]:
    """The policies in a policy.pt or in a run's directory, and what else the file says: args, step, return_mean, ..."""
    saved = load(Path(path))
    policy = POLICIES[saved["args"]["policy"]](saved["obs_sizes"], saved["action_sizes"], Args(**saved["args"]), steps)
    policy.load_state_dict(saved["policy"])
    return policy, saved


def parse(argv: list[str]) -> Args:
    """The command line, over the defaults of its task or over the arguments of the run or policy that it names."""
    words = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = dict(zip((word.replace("_", "-") for word in words), words[1:]))
    if words and words[0][:1] != "-":
        raise BadInput(f"{words[0]!r} stands without a flag: --env-id {words[0]}?")
    for flag in ("--resume", "--evaluate"):
        if (flag, "") in zip(words, words[1:]):
            raise BadInput(f"{flag} needs a value")
    if run := given.get("--resume"):
        default, free = Args(**load(Path(run, "config.json"))["args"]), WITH_RESUME
    elif path := given.get("--evaluate"):
        default, free = Args(**load(Path(path))["args"] | {"capture_video": False}), WITH_EVALUATE
    else:
        default, free = preset(given.get("--env-id", Args.env_id)), vars(Args())
    args = tyro.cli(Args, args=argv, default=default, prog="omad.py")
    changed = [name for name, value in vars(default).items() if getattr(args, name) != value and name not in free]
    ranges = (
        (0, 2**31 - 1, "seed torch_threads learning_starts bn_warmup"),
        (1, 10**9, "total_timesteps num_envs eval_episodes buffer_size policy_frequency denoising_steps"),
        (2, 10**6, "batch_size n_atoms policy_hidden critic_hidden"),
        (0.0, 1.0, "gamma tau alpha_lr"),
        (1e-12, 1e15, "policy_lr q_lr alpha updates_per_step time_power x_scale"),
        (-1e9, 1e9, "v_min v_max target_entropy_scale"),
    )
    for low, high, names in ranges:
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}")
    check_video(args.capture_video)
    updates, episodes = args.updates_per_step * args.num_envs, args.num_envs * find_task(args.env_id).horizon
    for holds, rule in (
        (not changed, f"--{' --'.join(changed).replace('_', '-')} cannot be changed for what is there already"),
        (args.total_timesteps >= default.total_timesteps * bool(args.resume), "--total-timesteps can only grow"),
        (args.device != "cuda" or torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here"),
        (abs(updates - (round(updates) or 1)) < 1e-6, "--updates-per-step times --num-envs must be whole, at least 1"),
        (args.v_min < args.v_max, "--v-min must be below --v-max"),
        (args.learning_starts < args.total_timesteps, "--learning-starts must be below --total-timesteps"),
        (args.num_envs <= args.buffer_size, "--buffer-size must be at least --num-envs"),
        (args.eval_every >= episodes, f"--eval-every must be at least {episodes}, an episode in each environment"),
    ):
        if not holds:
            raise BadInput(rule)
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 a failed run, 130 interrupted."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.torch_threads or torch.get_num_threads())
        if args.list_tasks:
            print(task_table())
        elif args.evaluate:
            act = make_act(load_policy(args.evaluate, args.denoising_steps)[0].to(pick_device(args.device)), args)
            task = dict(film=args.evaluate if args.capture_video else "", observation=args.observation, prey=args.prey)
            demonstrate(act, args.env_id, args.eval_episodes, mix_seed(args.seed, 1), **task)
        else:
            train(args)
        return 0
    except (BadInput, Timeout, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        code, text = 2, f"error: {error}"
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, text = 3, f"failed: {error}"
    except KeyboardInterrupt:
        code, text = 130, "interrupted; --resume with a run's directory goes on with its training"
    print(f"omad.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

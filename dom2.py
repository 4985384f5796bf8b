"""DOM2: offline multi-agent reinforcement learning with diffusion policies, in one file to read from top to bottom.

    python dom2.py --dataset omar_simple_spread-medium   # makes the data if need be, learns on a laptop within minutes
    python dom2.py --evaluate runs/<run>          # return of a saved policy: a run's directory, or a policy.pt alone
    python dom2.py --resume runs/<run>            # goes on after a crash; on the CPU as if it had not happened

Method: "Improving Generalization and Data Efficiency with Diffusion in Offline Multi-agent RL", arXiv 2307.01472
[DOM2], whose code is not public. What differs from it, sizes and rates aside, is marked [deviation En]; reasons, and
choices that it leaves open, are in runs/dom2.md. [DOM2 critic] and the like stand where the paper's formula is.
Every agent learns alone from its own observations, actions and rewards, and acts alone. Its policy turns Gaussian noise
into an action by a few steps of a fast ODE solver. It learns to imitate the data (a diffusion loss) and, at the same
time, to raise its own critic, by the gradient through all solver steps. The twin critics are pessimistic about actions
outside the data (CQL). Trajectories with a high return are sampled more often.

Shape letters: B batch, N agents, O observation, A action, K solver steps, Q critics of an agent, M actions in the CQL
term, H hidden, C condition, T transitions, E environments. N comes first, but after Q, M, T; nothing mixes agents. O
and A are the sizes of the largest agent; smaller ones are padded with zeros. Greek letters are not those of omad.py.
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

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.datasets import SPLITS, Dataset, check_sizes, find_env_id, is_folder, normalize, open_dataset, stack_rows
from common.envs import BadInput, TeamEnv, check_video, demonstrate, draw_curve, evaluate, find_task, make_env
from common.envs import make_vec, mix_seed, record_video, versions


# 1. Arguments =========================================================================================================
@dataclass(frozen=True)
class Args:
    """DOM2: offline multi-agent RL with diffusion policies. Defaults are those of the chosen data set."""

    dataset: str = "omar_simple_spread-medium"  # <task>-<split>, made if it is not there yet, or the path of a folder
    env_id: str = ""  # the task of a folder whose path and card do not say it
    data_seed: int = 0  # of a data set made here: the seed it was made with
    data_fraction: float = 1.0  # share of its episodes to learn from, drawn with --seed
    observation: str = ""  # what an agent sees in evaluations, as in the data; see omad.py. "": own, MaMuJoCo full
    prey: str = ""  # omar_simple_tag, _world: file of the prey's network in evaluations, else our own
    seed: int = 1  # seed of everything random: networks, batches, noise, evaluations
    total_updates: int = 4_000  # gradient steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks and data live; auto: cuda if there is one
    torch_threads: int = 1  # CPU threads of torch; 0 is torch's own choice
    cuda_graph: bool = True  # on a GPU, capture updates and acting as CUDA graphs
    compile: bool = False  # compile losses and acting with torch.compile, which takes a minute or two at the start
    eval_every: int = 500  # updates between evaluations; each also saves
    eval_episodes: int = 100  # episodes per evaluation, one environment each
    run_dir: str = "runs"  # folder in which the run's own directory is made
    resume: str = ""  # go on with the run in this directory; length, device, speed flags, prey, data, video may change
    evaluate: str = ""  # only evaluate the policy of the run in this directory, or a policy.pt
    shift: str = ""  # with --evaluate: speed (particle tasks), fewer (six landmarks), random or extreme (HalfCheetah)
    capture_video: bool = False  # write a video of the final (or the evaluated) policy to a folder videos beside it
    batch_size: int = 256  # B, transitions per update and agent
    gamma: float = 0.95  # discount factor
    tau: float = 0.01  # averaging rate of the target policies and critics; the averaged policies act
    policy_lr: float = 1e-3  # learning rate of the policies
    q_lr: float = 3e-3  # learning rate of the critics
    lr_decay: bool = True  # let both rates fall to zero along half a cosine, so that a run ends quietly
    grad_clip: float = 10.0  # bound on the norm of each agent's gradient
    policy: Literal["diffusion", "deterministic"] = "diffusion"  # the method; or the baseline MA-CQL, same critics
    policy_hidden: int = 32  # H, width of each agent's network; layers that see the observation have 128 or more
    solver_steps: int = 5  # K, steps from noise to action
    time_power: float = 1.0  # p: in training noise times are 0.001 + 0.999 u^p, u uniform; above 1: more near the data
    act_noise: float = 1.0  # standard deviation of the noise from which policies act; they learn from 1
    q_weight: float = 1.0  # eta, weight of the critic's gradient against imitation; 0: imitation only, no critics
    critic_hidden: int = 64  # width of each critic
    cql_weight: float = 1.0  # zeta, weight of the pessimism about actions outside the data
    cql_actions: int = 10  # M, uniform actions per state in the CQL term
    cql_own: bool = False  # an action of the averaged policies too, which most critics of robots and chases need
    q_rows: float = 0.5  # share of the batch in the value loss
    cql_rows: float = 0.25  # share of the batch in the CQL term
    reweight: bool = True  # sample good trajectories more often
    thresholds: int = 3  # a trajectory counts once, and once more for each of these returns that it reaches
    top_quantile: float = 0.98  # quantile of the returns at the highest threshold; the lowest is their mean
    without: str = ""  # deviations to undo, of E1,E2,E4,E6,E7,E8; E3, E5, E9 and E10 are flags

    def has(self, deviation: str) -> bool:
        return deviation not in self.without.split(",")


# Presets by task, for data from elsewhere; data sets with a name have more below. From a search: runs/dom2.md.
NAVIGATION = dict(gamma=0.9, policy_lr=3e-3, q_lr=1e-2, q_weight=8.0, cql_weight=0.25, time_power=2.0, act_noise=0.5)
CHASE = dict(policy_lr=1e-2, cql_weight=16.0, cql_own=True)
ROBOT = dict(gamma=0.99, tau=0.005, q_lr=1e-3, cql_own=True, cql_weight=8.0, policy_hidden=64)
ROBOT |= dict(total_updates=3_000, eval_episodes=10)
SPREAD, TAG, WORLD, CHEETAH = "omar_simple_spread", "omar_simple_tag", "omar_simple_world", "omar_halfcheetah_2x3"
TASKS = {SPREAD: NAVIGATION, TAG: CHASE, WORLD: CHASE, CHEETAH: ROBOT}
WEIGHTS = {  # eta and zeta, for random, random-medium, medium-replay, medium, medium-expert and expert data
    TAG: ((4.0, 1.0), (0.4, 16.0), (0.4, 16.0), (0.2, 16.0), (0.0125, 16.0), (0.0125, 16.0)),
    WORLD: ((4.0, 0.25), (0.4, 16.0), (0.4, 16.0), (0.8, 16.0), (0.0125, 16.0), (0.0125, 16.0)),
    CHEETAH: ((128.0, 32.0), (4.0, 32.0), (4.0, 2.0), (1.0, 8.0), (1.0, 8.0), (0.05, 8.0)),
}
CROWDED = dict(policy_lr=1e-3, q_lr=3e-3, q_weight=480.0, cql_weight=0.5, time_power=1.0, act_noise=1.0)
OTHERS = {
    f"{SPREAD}-random": CROWDED | dict(total_updates=16_000, eval_every=2_000),
    f"{TAG}-random": dict(policy_lr=3e-3, total_updates=8_000),
    f"{WORLD}-random": dict(policy_lr=3e-3, total_updates=8_000, cql_own=False),
    **dict.fromkeys((f"{TAG}-random-medium", f"{TAG}-medium-replay", f"{CHEETAH}-medium"), dict(thresholds=8)),
    f"{WORLD}-medium-replay": dict(thresholds=8),
    f"{CHEETAH}-expert": dict(act_noise=0.5),
}  # fmt: skip


def preset(dataset: str, env_id: str = "") -> Args:
    """The defaults of a data set: by its task and, if it has a name, by its split. Raises `BadInput`."""
    env_id, split = find_env_id(dataset, env_id), dataset.partition("-")[2]
    values = ROBOT if env_id.startswith("mamujoco_") else TASKS.get(env_id, {})
    if env_id in WEIGHTS and not is_folder(dataset):
        values = values | dict(zip(("q_weight", "cql_weight"), WEIGHTS[env_id][SPLITS.index(split)]))
    return Args(dataset=dataset, **values | OTHERS.get(dataset, {}))


# 2. Policy ============================================================================================================
class ParallelLinear(nn.Module):
    """N linear layers side by side, one per agent or critic, as one batched product: x [N, B, in] -> [N, B, out]."""

    def __init__(self, n: int, n_in: int, n_out: int, fan_in: Tensor | None = None):
        super().__init__()
        std = (torch.full([n], n_in) if fan_in is None else fan_in).float().rsqrt()  # by the real inputs of each [N]
        self.weight = nn.Parameter(torch.randn(n, n_in, n_out) * std[:, None, None])
        self.bias = nn.Parameter(torch.zeros(n, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Block(nn.Module):
    """x + f(x): two layers, the condition added between them. If the width changes, a linear map of x stands for x."""

    def __init__(self, n: int, n_in: int, n_out: int):
        super().__init__()
        self.changes = n_in != n_out  # then the first layer computes that map too
        self.layer1, self.layer2 = ParallelLinear(n, n_in, n_out * (1 + self.changes)), ParallelLinear(n, n_out, n_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h, skip = self.layer1(x).chunk(2, -1) if self.changes else (self.layer1(x), x)
        return skip + self.layer2(F.silu(h + condition))


class UNet(nn.Module):
    """Residual U-Net on vectors: x [N, B, A] -> [N, B, A], told a condition [N, B, sum of `widths`] [DOM2 network]."""

    def __init__(self, n: int, a: int, hidden: int):
        super().__init__()
        wide, middle, narrow = hidden, hidden // 2, hidden // 4
        self.widths = [wide, middle, narrow, narrow, middle, wide]  # of the condition of each block
        self.down1, self.down2, self.down3 = Block(n, a, wide), Block(n, wide, middle), Block(n, middle, narrow)
        self.middle, self.up1 = Block(n, narrow, narrow), Block(n, 2 * narrow, middle)
        self.up2, self.out = Block(n, 2 * middle, wide), ParallelLinear(n, wide, a)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = condition.split(self.widths, -1)
        down1 = self.down1(x, parts[0])
        down2 = self.down2(down1, parts[1])
        down3 = self.down3(down2, parts[2])
        up1 = self.up1(torch.cat([self.middle(down3, parts[3]), down3], -1), parts[4])
        return self.out(self.up2(torch.cat([up1, down2], -1), parts[5]) + down1)


class DiffusionPolicy(nn.Module):
    """N independent diffusion policies pi_j(a_j | o_j): a noise prediction eps_j(x, o_j, t), sampled with a DPM-Solver.

    Forward process [DOM2 SDE]: x_t ~ N(alpha_t a, sigma_t^2 I) for t from 0 to 1, alpha_t^2 + sigma_t^2 = 1 and
    log alpha_t = -(20 - 0.1) t^2 / 4 - 0.1 t / 2. Sampling goes back from x_1 ~ N(0, I) in K steps."""

    def __init__(self, obs_sizes: list[int], action_sizes: list[int], args: Args, steps: int = 0):
        super().__init__()
        n, o, a, hidden = len(obs_sizes), max(obs_sizes), max(action_sizes), args.policy_hidden
        wide, joined = max(128, hidden), max(64, hidden // 4)  # widths of the observation's layers, where time joins
        real = torch.arange(a) < torch.tensor(action_sizes)[:, None]  # [N, A]
        self.register_buffer("action_mask", real.float()[:, None], persistent=False)  # [N, 1, A]
        self.register_buffer("obs_mean", torch.zeros(n, o))  # of the data; callers pass (obs - mean) / std: `make_act`
        self.register_buffer("obs_std", torch.ones(n, o))
        self.register_buffer("frequency", torch.randn(16) * 16)  # random Fourier features of time
        self.obs1, self.obs2 = ParallelLinear(n, o, wide, torch.tensor(obs_sizes)), ParallelLinear(n, wide, wide)
        self.time, self.join_obs = ParallelLinear(n, 32, 32), ParallelLinear(n, wide, joined)
        self.join_time = ParallelLinear(n, 32, joined)
        self.network = UNet(n, a, hidden)
        self.tell = ParallelLinear(n, joined, sum(self.network.widths))
        # Times [K + 1] from 1 to 0.001, finer towards the end [deviation E1]: with equal steps samples are too narrow.
        end, power = (0.1, 3) if args.has("E1") else (0.001, 1)
        times = torch.linspace(1.0, end, (steps or args.solver_steps) + 1, dtype=torch.float64) ** power
        self.alpha, self.sigma = (scale.tolist() for scale in self.scales(times))
        self.register_buffer("times", times.float(), persistent=False)
        self.clip, self.predicts_v = F.hardtanh if args.has("E2") else nn.Identity(), args.has("E6")

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t."""
        log_alpha = -(20.0 - 0.1) * t**2 / 4 - 0.1 * t / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def noise(self, batch: int) -> Tensor:
        """Where one chain starts: [N, B, A] standard normal numbers. The solver itself is deterministic."""
        return torch.randn(self.action_mask.expand(-1, batch, -1).shape, device=self.action_mask.device)

    def condition(self, obs: Tensor, t: Tensor) -> Tensor:
        """What the network is told at times t [K, B or 1]: obs [N, B, O] -> [N, K, B, C], once for a whole chain."""
        angle = 2 * math.pi * t[..., None] * self.frequency  # [K, B or 1, 16]
        wave = torch.cat([angle.sin(), angle.cos()], -1).flatten(0, 1).expand(len(obs), -1, -1)  # [N, K * (B or 1), 32]
        clock = self.join_time(F.silu(self.time(wave))).unflatten(1, (len(t), -1))  # [N, K, B or 1, joined]
        seen = self.join_obs(F.silu(self.obs2(F.silu(self.obs1(obs)))))  # [N, B, joined]
        return self.tell(F.silu(seen[:, None] + clock).flatten(1, 2)).unflatten(1, (len(t), -1))

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs [N, B, O], noise [N, B, A] -> action [N, B, A] in [-1, 1]. A first-order step from s to t [DOM2 solver]:

            x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(lambda_t - lambda_s) - 1) eps,   lambda = log(alpha / sigma)

        It is x_t = alpha_t a + sigma_t eps. The a that eps implies is kept in the box, and eps follows [deviation E2].
        The network predicts v = alpha_s eps - sigma_s a instead [deviation E6], and a = alpha_s x_s - sigma_s v."""
        x, conditions = noise * self.action_mask, self.condition(obs, self.times[:-1, None]).unbind(1)
        for k, (condition, alpha, sigma) in enumerate(zip(conditions, self.alpha[:-1], self.sigma[:-1], strict=True)):
            output = self.network(x, condition) * self.action_mask  # v, or without E6 eps
            implied = alpha * x - sigma * output if self.predicts_v else (x - sigma * output) / alpha
            action = self.clip(implied)  # where it clips, this step's network has no gradient
            ratio = self.sigma[k + 1] / sigma  # eps is (x - alpha a) / sigma
            x = ratio * x + (self.alpha[k + 1] - ratio * alpha) * action
        return F.hardtanh(x)


class DeterministicPolicy(nn.Module):
    """The baseline, MA-CQL (without TD3's noise and delay): a_j = tanh(f_j(o_j)), used as `DiffusionPolicy` is."""

    def __init__(self, obs_sizes: list[int], action_sizes: list[int], args: Args, steps: int = 0):
        super().__init__()
        n, o, a, hidden = len(obs_sizes), max(obs_sizes), max(action_sizes), max(128, args.policy_hidden)
        real = torch.arange(a) < torch.tensor(action_sizes)[:, None]  # [N, A]
        self.register_buffer("action_mask", real.float()[:, None], persistent=False)  # [N, 1, A]
        self.register_buffer("obs_mean", torch.zeros(n, o))
        self.register_buffer("obs_std", torch.ones(n, o))
        self.layer1 = ParallelLinear(n, o, hidden, torch.tensor(obs_sizes))
        self.layer2, self.out = ParallelLinear(n, hidden, hidden), ParallelLinear(n, hidden, a)

    def noise(self, batch: int) -> Tensor:
        return torch.zeros(len(self.action_mask), batch, 0, device=self.action_mask.device)  # none is needed

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs [N, B, O] -> action [N, B, A]."""
        return torch.tanh(self.out(F.relu(self.layer2(F.relu(self.layer1(obs)))))) * self.action_mask


# 3. Critic ============================================================================================================
class Critic(nn.Module):
    """Twin critics of every agent: obs [N, B, O], action [N, M * B, A], all B for each of M in turn -> [Q, N, M * B].

    Q = shift + scale * network, in units of the data's rewards [deviation E7]: else it takes thousands of updates to
    climb to values around 150, and the policies follow it meanwhile."""

    def __init__(self, obs_sizes: list[int], action_sizes: list[int], args: Args):
        super().__init__()
        n, hidden = len(obs_sizes), args.critic_hidden
        fan_in = (torch.tensor(obs_sizes) + torch.tensor(action_sizes)).repeat_interleave(2)
        self.register_buffer("shift", torch.zeros(n, 1))
        self.register_buffer("scale", torch.ones(n, 1))
        self.in_obs = ParallelLinear(2 * n, max(obs_sizes), hidden, fan_in)
        self.in_action = ParallelLinear(2 * n, max(action_sizes), hidden, fan_in)
        self.hidden1, self.out = ParallelLinear(2 * n, hidden, hidden), ParallelLinear(2 * n, hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        twice = lambda x: x[:, None].expand(-1, 2, -1, -1).flatten(0, 1)  # an agent's two critics stand side by side
        from_obs = self.in_obs(twice(obs))[:, None]  # [N * Q, 1, B, H]
        from_action = self.in_action(twice(action)).unflatten(1, (-1, obs.shape[1]))  # [N * Q, M, B, H]
        h = F.relu(from_obs + from_action).flatten(1, 2)
        value = self.out(F.relu(self.hidden1(h))).view(len(obs), 2, -1)  # [N, Q, M * B]
        return self.shift + self.scale * value.transpose(0, 1)


# 4. Losses and updates ================================================================================================
POLICIES = {"diffusion": DiffusionPolicy, "deterministic": DeterministicPolicy}


class DOM2(nn.Module):
    """Policies, critics, their averages, losses and optimisers: everything that learns."""

    def __init__(self, env: TeamEnv, args: Args, device: torch.device):
        super().__init__()
        self.args, sizes = args, (env.obs_sizes, env.action_sizes)
        self.policy, self.critic = POLICIES[args.policy](*sizes, args).to(device), Critic(*sizes, args).to(device)
        self.slow_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.q_rows, self.cql_rows = (max(1, round(share * args.batch_size)) for share in (args.q_rows, args.cql_rows))
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")  # a graph reads rates as tensors
        self.policy_adam = adam(self.policy.parameters(), torch.tensor(args.policy_lr, device=device))
        self.critic_adam = adam(self.critic.parameters(), torch.tensor(args.q_lr, device=device))
        self.adams = (self.policy_adam, self.critic_adam)
        for name in ("critic_loss", "imitation_loss", "value_loss") if args.compile else ():
            setattr(self, name, torch.compile(getattr(self, name)))

    def critic_loss(self, batch: dict, uniform: Tensor, noise: Tensor) -> tuple[Tensor, dict, Tensor]:
        """Bellman error, and pessimism about actions outside the data, summed over agents [DOM2 critic]:

            L = sum_q {E[(Q_q(o, a) - y)^2] + zeta E[logsumexp_M Q_q(o, a~) - Q_q(o, a)]}
            y = r + gamma (1 - terminated) min_q Q'_q(o', b'),   b' and Q' of the averages

        a~ are M uniform actions [M, N, rows, A] on the first `rows` of the batch [deviation E3], with `cql_own` one of
        the averaged policy too. A truncated step is not terminated. Also returns Q_1's std over uniform a~ [N]."""
        (m, n, rows, a), args = uniform.shape, self.args
        others = uniform.transpose(0, 1).reshape(n, m * rows, a)
        with torch.no_grad():
            next_action = self.slow_policy(batch["next_obs"], noise)  # [N, B, A]
            if args.cql_own:  # with the same noise as above, which biases neither term
                others = torch.cat([others, self.slow_policy(batch["obs"][:, :rows], noise[:, :rows])], 1)
            next_value = self.slow_critic(batch["next_obs"], next_action).amin(0)  # [N, B]
            target = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_value
        value = self.critic(batch["obs"], batch["action"])  # [Q, N, B]
        td = ((value - target) ** 2).mean(-1).sum()
        other = self.critic(batch["obs"][:, :rows], others).unflatten(2, (-1, rows))  # [Q, N, M or M + 1, rows]
        gap = (other.logsumexp(2) - value[:, :, :rows]).mean(-1).sum()
        loss = td + args.cql_weight * gap
        q_std = other[0, :, :m].detach().std(1).mean(-1)  # of Q_1 over uniform actions [N]
        logs = {"losses/critic": loss, "losses/td": td, "losses/cql": gap, "diag/value": value.mean()}
        logs |= {"diag/critic_disagreement": (value[0] - value[1]).abs().mean(), "diag/q_std": q_std.mean()}
        return loss, {name: x.detach() for name, x in logs.items()}, q_std

    def imitation_loss(self, batch: dict, t: Tensor, eps: Tensor) -> tuple[Tensor, dict]:
        """L = E || alpha_t eps - sigma_t a - v_theta(alpha_t a + sigma_t eps, o, t) ||^2, over agents [DOM2 imitation].

        t [1, B], the same for all agents; eps [N, B, A]. It is the paper's || eps - eps_theta ||^2 over alpha_t^2
        [deviation E6]: else errors hardly count near t = 1, where the observation has to tell the action."""
        alpha, sigma = self.policy.scales(t[..., None])  # [1, B, 1]
        eps, action, condition = eps * self.policy.action_mask, batch["action"], self.policy.condition(batch["obs"], t)
        output = self.policy.network(alpha * action + sigma * eps, condition.squeeze(1)) * self.policy.action_mask
        target = alpha * eps - sigma * action if self.policy.predicts_v else eps
        loss = ((target - output) ** 2).sum(-1).mean(1).sum()
        return loss, {"losses/imitation": loss.detach()}

    def value_loss(self, batch: dict, noise: Tensor, q_std: Tensor) -> tuple[Tensor, dict]:
        """L = -eta E[min_q Q_q(o, b)] / scale, b from the policy by all solver steps, summed over agents [DOM2 value].

        On part of the batch [deviation E3]. scale is E|Q(o, a)| in the paper, here how much Q varies over actions
        [deviation E4]: where returns are large and actions matter little, every eta would be too small otherwise."""
        obs = batch["obs"][:, : self.q_rows]
        action = self.policy(obs, noise)
        value, scale = self.critic(obs, action).amin(0), q_std  # [N, rows], [N]
        if not self.args.has("E4"):
            scale = self.critic(obs, batch["action"][:, : self.q_rows]).amin(0).abs().mean(-1).detach()
        eta = self.args.q_weight if self.args.policy == "diffusion" else 1.0  # the only loss: Adam hardly sees a factor
        loss = -(eta * value.mean(-1) / scale.clamp(min=1e-6)).sum()
        logs = {"losses/value": loss.detach(), "diag/policy_value": value.detach().mean()}
        return loss, logs | {"diag/action_saturation": (action.detach().abs() > 0.99).float().mean()}

    def draw(self) -> list[Tensor]:
        """The randomness of one update but the batch: uniform actions, noise of the next action, t, eps, noise."""
        args, mask, b, device = self.args, self.policy.action_mask, self.args.batch_size, self.critic.shift.device
        shape = (args.cql_actions, *mask.expand(-1, self.cql_rows, -1).shape)
        uniform = (torch.rand(shape, device=device) * 2 - 1) * mask
        if args.policy == "deterministic":
            return [uniform, *(self.policy.noise(b) for _ in range(4))]
        eps, noise = self.policy.noise(b), self.policy.noise(b)
        t = 1e-3 + 0.999 * torch.rand(1, b, device=device) ** args.time_power  # uniform in the paper [deviation E9]
        return [uniform, noise, t, eps, self.policy.noise(self.q_rows)]

    def update(self, batch: dict, uniform: Tensor, next_noise: Tensor, t: Tensor, eps: Tensor, noise: Tensor) -> dict:
        """One update of critics (unless eta is 0), policies and averages."""
        loss, logs = self.imitation_loss(batch, t, eps) if self.args.policy == "diffusion" else (0.0, {})
        if self.args.q_weight > 0:  # imitation alone asks no critic, and trains none
            critic_loss, critic_logs, q_std = self.critic_loss(batch, uniform, next_noise)
            self.descend(self.critic_adam, critic_loss)
            value_loss, value_logs = self.value_loss(batch, noise, q_std)
            loss, logs = loss + value_loss, logs | critic_logs | value_logs
        self.descend(self.policy_adam, loss)
        with torch.no_grad():
            for slow, fast in ((self.slow_policy, self.policy), (self.slow_critic, self.critic)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), self.args.tau)
        return logs

    def descend(self, adam: torch.optim.Adam, loss: Tensor) -> None:
        """One step of Adam; the norm of the gradient is bounded for each agent by itself."""
        parameters, n = adam.param_groups[0]["params"], len(self.policy.action_mask)
        adam.zero_grad()
        loss.backward(inputs=parameters)
        grads = [p.grad.view(n, -1) for p in parameters]  # [N, ...]: an agent's two critics stand side by side
        norm = torch.cat(grads, 1).norm(dim=1, keepdim=True)  # [N, 1]
        shrink = (self.args.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, [shrink] * len(grads))
        adam.step()


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


# 5. Data and training =================================================================================================
def trajectory_weights(returns: np.ndarray, count: int, top: float) -> np.ndarray:
    """1 + how many of `count` thresholds a trajectory's return reaches, [trajectories, N] [DOM2 reweighting]."""
    mean, high = returns.mean(0), np.quantile(returns, top, 0)
    return 1 + (returns >= np.linspace(mean, np.maximum(mean, high), count)[:, None]).sum(0)


class Data:
    """A data set on the device: one row per transition and agent, which a batch splits by name.

    Observations are centred, and divided by their standard deviation where that is above 1 [deviation E8]. Each agent
    draws its own rows, row i with weight `cumsum`[i] - `cumsum`[i - 1]: its trajectory's, or 0 if its next observation
    is not known."""

    def __init__(self, data: Dataset, env: TeamEnv, args: Args, device: torch.device):
        n, o, a = env.num_agents, env.obs_mask.shape[1], env.action_mask.shape[1]
        self.widths = dict(obs=o, next_obs=o, action=a, reward=1, terminated=1)
        self.table = torch.empty(len(data.obs), n, sum(self.widths.values()), device=device)  # [T, N, ...]
        for start in range(0, len(data.obs), 1 << 16):  # so that little more than the table is in memory
            part = slice(start, start + (1 << 16))
            self.table[part] = torch.from_numpy(stack_rows(data, part)).to(device)
        std, mean = torch.std_mean(self.table[..., :o], 0)  # [N, O]
        units = mean, std.clamp(min=1.0)  # nothing is magnified: what varies little in the data may vary more later
        self.obs_mean, self.obs_std = units if args.has("E8") else (torch.zeros_like(mean), torch.ones_like(std))
        for part in (self.table[..., :o], self.table[..., o : 2 * o]):
            part.sub_(self.obs_mean).div_(self.obs_std)
        returns = np.add.reduceat(np.asarray(data.rewards, np.float64), data.episodes[:, 0])  # [trajectories, N]
        weights = trajectory_weights(returns, args.thresholds if args.reweight else 0, args.top_quantile).T
        weights = np.repeat(weights, np.diff(data.episodes, axis=1)[:, 0], axis=1) * data.next_known  # [N, T]
        self.cumsum = torch.from_numpy(weights.cumsum(1)).to(device)
        self.agents = torch.arange(n, device=device)[:, None]

    def draw(self, batch: int) -> Tensor:
        """Rows [N, B]."""
        share = torch.rand(len(self.cumsum), batch, device=self.cumsum.device, dtype=torch.float64)
        return torch.searchsorted(self.cumsum, (share * self.cumsum[:, -1:]).long(), right=True)

    def sample(self, rows: Tensor) -> dict:
        """obs [N, B, O], next_obs, action [N, B, A], reward [N, B], terminated [N, B]."""
        named = dict(zip(self.widths, self.table[rows, self.agents].split(list(self.widths.values()), -1)))
        return named | {name: named[name].squeeze(-1) for name in ("reward", "terminated")}

    def set_units(self, agent: DOM2, args: Args) -> None:
        """Gives policies the mean and std of observations; critics start at V = r + gamma (1 - p) V, with the mean
        reward r and the share p of transitions that terminate."""
        std, mean = torch.std_mean(self.table[..., -2].T, 1, keepdim=True)  # of the rewards [N, 1]
        fade = (1 - args.gamma) + args.gamma * self.table[..., -1].T.mean(1, keepdim=True)  # 1 - gamma (1 - p) [N, 1]
        for policy, critic in ((agent.policy, agent.critic), (agent.slow_policy, agent.slow_critic)):
            policy.obs_mean.copy_(self.obs_mean), policy.obs_std.copy_(self.obs_std)
            if args.has("E7"):
                critic.shift.copy_(mean / fade.clamp(min=1e-3)), critic.scale.copy_(std.clamp(min=1e-3))


def pick_device(name: str) -> torch.device:
    """The one place that decides where tensors live; they are float32 everywhere, a GPU multiplies them as TF32."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_stream(torch.cuda.Stream())  # `graphed` cannot capture on the default one
    return device


def make_act(policy: nn.Module, args: Args) -> Callable[[np.ndarray], np.ndarray]:
    """Decentralised execution, sampled: observations [E, N, O] to actions [E, N, A]. On a GPU: after `pick_device`."""
    device, chain = policy.action_mask.device, lambda obs, noise: policy(obs, noise)
    chain = graphed(torch.compile(chain) if args.compile else chain, args.cuda_graph and device.type == "cuda")

    @torch.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        seen = ((torch.from_numpy(obs).to(device) - policy.obs_mean) / policy.obs_std).transpose(0, 1)  # [N, E, O]
        action = chain(seen, args.act_noise * policy.noise(len(obs))).transpose(0, 1).cpu().numpy()  # [deviation E10]
        if not np.isfinite(action).all():
            raise FloatingPointError("an action is not finite: the networks have diverged")
        return action

    return act


def train(args: Args) -> None:
    """The whole of training or, with `args.resume`, the rest of it."""
    source = open_dataset(args.dataset, args.data_fraction, args.seed, args.env_id, args.data_seed)
    env_id, task = source.env_id, dict(observation=args.observation, prey=args.prey)
    env, eval_envs = make_env(env_id, **task), make_vec(env_id, args.eval_episodes, **task)
    check_sizes(source, env)
    name = "-".join(Path(args.dataset).resolve().parts[-3:]) if is_folder(args.dataset) else args.dataset
    name = f"{name}__dom2__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06d}"
    run = Path(args.resume or Path(args.run_dir, name))
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    (lock := FileLock(run / ".lock")).acquire(timeout=0)  # keeps other processes out until `train` returns
    begun = (run / "checkpoint.pt").exists() or (run / "eval.csv").exists()  # else killed before it had saved
    saved = load(run / "checkpoint.pt") if begun else dict(step=0, seconds=0.0, evaluations=[], data=source.checksum)
    if saved["data"] != source.checksum:
        raise BadInput(f"{run}: trained on other data than --dataset {args.dataset} holds now")
    config = dict(format=FORMAT, env_id=env_id, obs_sizes=env.obs_sizes, action_sizes=env.action_sizes) | versions()
    config |= dict(args=vars(args) | {"resume": "", "env_id": env_id}, data_return=float(source.returns.mean()))
    write(run / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    # Build.
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    agent, data = DOM2(env, args, device), Data(source, env, args, device)
    random = torch.cuda if device.type == "cuda" else torch
    data.set_units(agent, args)
    learn = lambda rows, *drawn: agent.update(data.sample(rows), *drawn)
    learn, act = graphed(learn, args.cuda_graph and device.type == "cuda"), make_act(agent.slow_policy, args)
    # Start, or go on from the checkpoint.
    torch.manual_seed(args.seed)  # again: what follows does not depend on how much building drew
    first, seconds, evaluations = (saved[key] for key in ("step", "seconds", "evaluations"))
    if begun:
        agent.load_state_dict(saved["agent"])
        for adam, moments in zip(agent.adams, saved["adams"]):
            adam.load_state_dict(adam.state_dict() | {"state": moments})
        if len(saved["random"]) == len(random.get_rng_state()):  # not so if that was on another kind of device
            random.set_rng_state(saved["random"])
    print(f"task      {env_id}: {find_task(env_id).description}; on {device}\ndata      {source}")
    print(f"logs      {run.resolve()}    (watch: tensorboard --logdir {run.parent})", flush=True)
    writer, logs, started = SummaryWriter(str(run), purge_step=first + 1), {}, time.time() - seconds
    step, bar = first, tqdm(total=args.total_updates, initial=first, unit=" updates", mininterval=2, file=sys.stdout)
    while True:
        # Evaluate and save: at the start, every `eval_every` updates and at the end. A resumed run begins here too.
        if step == first or step % args.eval_every == 0 or step >= args.total_updates:
            if not evaluations or evaluations[-1]["step"] < step:
                returns, seconds = evaluate(act, eval_envs, mix_seed(args.seed, 1)), round(time.time() - started, 1)
                mean, std, count = float(returns.mean()), float(returns.std()), len(returns)
                row = dict(step=step, wall_time_s=seconds, return_mean=mean, return_std=std, episodes=count)
                evaluations += [row | dict(normalized_score=(score := normalize(env_id, mean)))]
                for name in ("return_mean", "return_std", "normalized_score"):
                    writer.add_scalar(f"eval/{name}", evaluations[-1][name], step)
                scored = f", normalised {score:.1f}" if math.isfinite(score) else ""
                writer.flush(), bar.write(f"eval at update {step:,}: return {mean:.2f} ± {std:.2f}{scored}")
            if not all(value.isfinite().all() for value in agent.state_dict().values()):
                raise FloatingPointError(f"update {step}: the networks have diverged")  # the last good checkpoint stays
            policy = config | dict(policy=agent.slow_policy.state_dict()) | evaluations[-1]
            write(run / "policy.pt", partial(torch.save, policy))
            write(run / "checkpoint.pt", partial(torch.save, dict(
                format=FORMAT, step=step, seconds=seconds, evaluations=evaluations, agent=agent.state_dict(),
                adams=[adam.state_dict()["state"] for adam in agent.adams],
                random=random.get_rng_state(), data=source.checksum,
            )))  # fmt: skip
            table = [",".join(evaluations[0]), *(",".join(map(str, row.values())) for row in evaluations)]
            write(run / "eval.csv", lambda path: path.write_text("\n".join([*table, ""])))
            if step >= args.total_updates:
                break
        # Learn.
        if args.lr_decay:  # [deviation E5]
            for adam, rate in zip(agent.adams, (args.policy_lr, args.q_lr)):
                adam.param_groups[0]["lr"].fill_(rate * (1 + math.cos(math.pi * step / args.total_updates)) / 2)
        logs |= learn(data.draw(args.batch_size), *agent.draw())
        step += 1
        bar.update()
        if step % 100 == 0 or step >= args.total_updates:  # the scalars of the last update
            for name, value in (logs | {"charts/updates_per_second": step / (time.time() - started)}).items():
                writer.add_scalar(name, float(value), step)
    bar.close(), writer.close()
    write(run / "curve.png", partial(draw_curve, evaluations, "updates"))
    if args.capture_video:
        record_video(act, env_id, run / "videos", mix_seed(args.seed, 1), **task)
    print(f"done in {seconds:.0f} s: {run}")


# 6. Files and command line ============================================================================================
FORMAT = "dom2-7"  # of policy.pt and checkpoint.pt; raise it when a change makes older files unreadable
ALWAYS = "prey device torch_threads cuda_graph compile capture_video"
WITH_RESUME = {*f"resume dataset data_seed total_updates {ALWAYS}".split()}
WITH_EVALUATE = {*f"evaluate seed eval_episodes solver_steps act_noise shift {ALWAYS}".split()}


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


def load_policy(path: str | Path, steps: int = 0) -> tuple[DiffusionPolicy | DeterministicPolicy, dict]:
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
        raise BadInput(f"{words[0]!r} stands without a flag: --dataset {words[0]}?")
    for flag in ("--resume", "--evaluate"):
        if (flag, "") in zip(words, words[1:]):
            raise BadInput(f"{flag} needs a value")
    if run := given.get("--resume"):
        default, free = Args(**load(Path(run, "config.json"))["args"]), WITH_RESUME
    elif path := given.get("--evaluate"):
        default, free = Args(**load(Path(path))["args"] | {"capture_video": False}), WITH_EVALUATE
    else:
        default, free = preset(given.get("--dataset", Args.dataset), given.get("--env-id", "")), vars(Args())
    args = tyro.cli(Args, args=argv, default=default, prog="dom2.py")
    changed = [name for name, value in vars(default).items() if getattr(args, name) != value and name not in free]
    ranges = (
        (0, 2**31 - 1, "seed data_seed torch_threads thresholds q_weight cql_weight act_noise"),
        (1, 10**9, "total_updates eval_every eval_episodes batch_size solver_steps time_power"),
        (4, 10**6, "policy_hidden critic_hidden cql_actions"),
        (0.0, 1.0, "gamma tau top_quantile"),
        (1e-9, 1.0, "data_fraction q_rows cql_rows"),
        (1e-12, 1e15, "policy_lr q_lr grad_clip"),
    )
    for low, high, names in ranges:
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}")
    check_video(args.capture_video)
    for holds, rule in (
        (not changed, f"--{' --'.join(changed).replace('_', '-')} cannot be changed for what is there already"),
        (args.total_updates >= default.total_updates * bool(args.resume), "--total-updates can only grow"),
        (args.device != "cuda" or torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here"),
        (args.policy == "diffusion" or args.q_weight, "--policy deterministic needs a --q-weight: it does not imitate"),
        (not args.shift or args.evaluate, "--shift goes with --evaluate: training is on data only"),
        (set(args.without.split(",")) <= set(",E1,E2,E4,E6,E7,E8".split(",")), "--without: of E1,E2,E4,E6,E7,E8"),
    ):
        if not holds:
            raise BadInput(rule)
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input, 3 a failed run, 130 interrupted."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.torch_threads or torch.get_num_threads())
        if args.evaluate:
            act = make_act(load_policy(args.evaluate, args.solver_steps)[0].to(pick_device(args.device)), args)
            task = dict(film=args.evaluate if args.capture_video else "", observation=args.observation, prey=args.prey)
            mean = demonstrate(act, args.env_id, args.eval_episodes, mix_seed(args.seed, 1), **task, shift=args.shift)
            if math.isfinite(score := normalize(args.env_id, mean)):
                print(f"normalised {score:.1f}")
        else:
            train(args)
        return 0
    except (BadInput, Timeout, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        code, text = 2, f"error: {error}"
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        code, text = 3, f"failed: {error}"
    except KeyboardInterrupt:
        code, text = 130, "interrupted; --resume with a run's directory goes on with its training"
    print(f"dom2.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

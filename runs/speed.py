"""How fast an update is, and what it buys to keep the agents in a tensor dimension.

    python runs/speed.py                                   # the whole table, about ten minutes on one CPU core
    python runs/speed.py --agents 3 8 --widths 64 --steps 8

For every number of agents N, width H and number of denoising steps K: milliseconds per critic update, per policy update and
per acting step, beside the same step with one network per agent and a Python loop over them. The two are timed in turns,
within one process, and the ratio (loop / batched: above 1 means batched is faster) is the median over the turns, so it means
something on a noisy machine where the milliseconds do not. Peak memory is that of the batched version alone, above the
process's own: each row runs in a fresh process.
"""

import csv
import dataclasses
import multiprocessing
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import omad


@dataclass(frozen=True)
class Options:
    """Speed of OMAD's updates, batched over agents and with a loop over agents."""

    agents: tuple[int, ...] = (2, 3, 8, 24)
    """numbers of agents N"""
    widths: tuple[int, ...] = (64, 256)
    """widths H of the policies; the critics have twice that"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """denoising steps K"""
    batch_size: int = 256
    """transitions per update"""
    num_envs: int = 8
    """environments per acting step"""
    turns: int = 9
    """timings of each version, taken in turns; the median counts"""
    device: str = "auto"
    """auto, cpu or cuda"""
    torch_threads: int = 1
    """CPU threads"""
    output: str = ""
    """CSV file for the table"""


class LoopPolicy(nn.Module):
    """The same policies as separate modules of one agent each, called one after the other."""

    def __init__(self, obs_mask: torch.Tensor, action_mask: torch.Tensor, hidden: int, steps: int):
        super().__init__()
        one = lambda i: omad.DiffusionPolicy(obs_mask[i : i + 1], action_mask[i : i + 1], hidden, steps)
        self.agents = nn.ModuleList(one(i) for i in range(len(obs_mask)))

    def noise(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        return torch.cat([agent.noise(batch, generator) for agent in self.agents], 2)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor):
        parts = [agent(obs[:, i : i + 1], noise[:, :, i : i + 1]) for i, agent in enumerate(self.agents)]
        return tuple(torch.cat(part, 1) for part in zip(*parts))


def make_agent(options: Options, agents: int, width: int, steps: int, policy_class: type) -> tuple[omad.OMAD, dict, np.ndarray]:
    """An agent of MPE-like sizes (18 observations, 2 actions each), a batch of random transitions, and observations to act on."""
    env = SimpleNamespace(obs_mask=np.ones((agents, 18), bool), action_mask=np.ones((agents, 2), bool), state_size=18 * agents)
    args = omad.Args(
        **omad.MPE | dict(policy_hidden=width, critic_hidden=2 * width, denoising_steps=steps, batch_size=options.batch_size)
    )
    device = omad.pick_device(options.device)
    agent = omad.OMAD(env, args, device)
    agent.policy = policy_class(torch.ones(agents, 18).bool(), torch.ones(agents, 2).bool(), width, steps).to(device)
    agent.optimizers["policy"] = torch.optim.Adam(agent.policy.parameters(), args.policy_lr, fused=True)
    batch = {
        name: torch.randn(options.batch_size, *x.shape[1:], device=device) for name, x in omad.Replay(env, 1, device).data.items()
    }
    batch["terminated"].zero_()
    batch["action"].tanh_()
    return agent, batch, np.zeros((options.num_envs, agents, 18), np.float32)


def row(options: Options, agents: int, width: int, steps: int) -> dict:
    torch.set_num_threads(options.torch_threads)
    cuda = omad.pick_device(options.device).type == "cuda"
    before = peak_memory(cuda)
    result = dict(agents=agents, width=width, steps=steps)
    times: dict[tuple[str, str], list[float]] = {}
    versions = {}
    for name, policy_class in (("batched", omad.DiffusionPolicy), ("loop", LoopPolicy)):
        agent, batch, obs = make_agent(options, agents, width, steps, policy_class)
        generator = torch.Generator(agent.device).manual_seed(0)
        versions[name] = {
            "critic": lambda a=agent, b=batch, g=generator: a.update_critic(b, g),
            "policy": lambda a=agent, b=batch, g=generator: a.update_policies(b, g),
            "act": lambda a=agent, o=obs, g=generator: a.act(o, g),
        }
        for function in versions[name].values():  # warm up
            function(), function()
        if name == "batched":
            result["peak_mib"] = round((peak_memory(cuda) - before) / 2**20)
    for kind in ("critic", "policy", "act"):
        for _ in range(options.turns):
            for name in versions:
                repeats = 5 if kind == "act" else 2
                start = time.perf_counter()
                for _ in range(repeats):
                    versions[name][kind]()
                if cuda:
                    torch.cuda.synchronize()
                times.setdefault((kind, name), []).append((time.perf_counter() - start) / repeats)
        batched, loop = times[kind, "batched"], times[kind, "loop"]
        result[f"{kind}_ms"] = round(1e3 * statistics.median(batched), 2)
        result[f"{kind}_loop_ms"] = round(1e3 * statistics.median(loop), 2)
        result[f"{kind}_ratio"] = round(statistics.median(b / a for a, b in zip(batched, loop)), 2)
    return result


def peak_memory(cuda: bool) -> float:
    """Bytes at the highest point of this process (CPU) or of this process's CUDA tensors."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    options = tyro.cli(Options)
    where = (
        torch.cuda.get_device_name()
        if omad.pick_device(options.device).type == "cuda"
        else f"{platform.processor() or platform.machine()} CPU"
    )
    print(
        f"{where}, {options.torch_threads} thread(s), torch {torch.__version__}, batch {options.batch_size}, acting in {options.num_envs} environments"
    )
    print("  N    H  K | critic ms  ratio | policy ms  ratio | act ms  ratio | peak MiB")
    rows = []
    for width in options.widths:
        for agents in options.agents:
            for steps in options.steps:
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    r = fresh.apply(row, (options, agents, width, steps))
                rows.append(r)
                print(
                    f"{agents:3d} {width:4d} {steps:2d} | {r['critic_ms']:9.2f} {r['critic_ratio']:5.2f}x | {r['policy_ms']:9.2f} {r['policy_ratio']:5.2f}x"
                    f" | {r['act_ms']:6.2f} {r['act_ratio']:5.2f}x | {r['peak_mib']:8d}",
                    flush=True,
                )
    if options.output:
        with open(options.output, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        print(f"written to {options.output}; options: {dataclasses.asdict(options)}")


if __name__ == "__main__":
    main()

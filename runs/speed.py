"""How fast OMAD and DOM2 are here, and how near that is to what the machine can do.

Commands are in speed.md. Versions of a step are timed in turns, in one process: eager; on a GPU also as a CUDA graph
and as a graph of compiled networks. An update has all that training does for it. Columns:

    operations   that torch dispatches, without views: exact on any machine, and what a small network's time is made of
    ms           the median over the turns
    ratio        time of the first version / time of this one, median over the turns: holds on a noisy machine
    share        floor / time. The floor is the time of the matrix products at the rate of one large product, or of the
                 traffic that weights, optimisers and batch need at that of one large copy, whichever is longer
    gib          of GPU memory that this version took
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import dom2
import omad
from common.datasets import find_env_id
from common.envs import make_env


@dataclass(frozen=True)
class Options:
    """Speed of the updates and decisions of OMAD and of DOM2."""

    programs: tuple[Literal["omad", "dom2"], ...] = ("omad", "dom2")  # which
    tables: tuple[Literal["update", "acting", "growth"], ...] = ("update", "acting", "growth")  # by K; by N
    env_id: str = "mpe_simple_spread"  # OMAD's task, at its preset
    dataset: str = "omar_simple_spread-medium"  # whose preset and sizes DOM2 has; the data themselves are random
    turns: int = 9  # timings of each version
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = ""  # CSV file


class Operations(TorchDispatchMode):
    """Counts what torch dispatches. Views, allocations and marks for the profiler do no work."""

    IDLE = ("empty", "new_empty", "_unsafe_view", "_record_function")  # beginnings of names
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view and not operation.overloadpacket.__name__.startswith(self.IDLE)
        return operation(*args, **kwargs or {})


def count_operations(function: Callable[[], object]) -> int:
    """Operations that do work in one call, forward and backward, after a first one in which optimisers set up."""
    function()
    with Operations() as operations:
        function()
    return operations.count


class Step(NamedTuple):
    run: Callable[[], object]
    traffic: float  # compulsory bytes
    count: int = 1  # how many times `run` does it


weights = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
COLUMNS = ("label", "what", "version", "operations", "ms", "ratio", "share", "gib")


class Bench:
    """The rates of this machine, and the table as far as it has been measured."""

    def __init__(self, options: Options):
        self.device, self.turns, self.output = omad.pick_device(options.device), options.turns, options.output
        self.rows, self.cuda = [COLUMNS], self.device.type == "cuda"
        size, length = (8192, 2**28) if self.cuda else (1024, 2**24)
        a, b, out = torch.randn(3, size, size, device=self.device)
        x, y = torch.zeros(2, length, device=self.device)
        times = self.in_turns({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)})
        self.rates = 2 * size**3 / min(times["product"]), 8 * length / min(times["copy"])
        name = torch.cuda.get_device_name() if self.cuda else "CPU, one thread"
        print(f"{name}, torch {torch.__version__}: {self.rates[0] / 1e12:.2f} TFLOP/s, {self.rates[1] / 1e9:.0f} GB/s")
        print(f"{'':60s}" + "".join(f"{name:>11s}" for name in COLUMNS[3:]))

    def in_turns(self, versions: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds per call of each version, one version after the other in every turn, a twentieth of a second each."""
        wait = torch.cuda.synchronize if self.cuda else lambda: None

        def clock(function: Callable, repeats: int) -> float:
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            wait()
            return (time.perf_counter() - start) / repeats

        repeats = {name: max(1, min(100, round(0.05 / clock(function, 1)))) for name, function in versions.items()}
        turn = lambda: {name: clock(function, repeats[name]) for name, function in versions.items()}
        return {name: list(times) for name, times in zip(versions, zip(*(turn().values() for _ in range(self.turns))))}

    def compare(self, label: str, builds: dict[str, Callable[[], dict[str, Step]]]) -> None:
        """Builds every version, and times their steps against each other."""
        torch.compiler.reset()
        built, gib = {}, {}
        for version, build in builds.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats() if self.cuda else None
            held, built[version] = torch.cuda.memory_reserved(), build()
            for step in [*built[version].values()] * 5:  # a graph is captured in the fourth call
                step.run()
            gib[version] = (torch.cuda.max_memory_reserved() - held) / 2**30 if self.cuda else None
        for what in next(iter(built.values())):
            steps, flops = {version: parts[what] for version, parts in built.items()}, None
            times = self.in_turns({version: step.run for version, step in steps.items()})
            for version, (run, traffic, count) in steps.items():
                if version.startswith("eager"):  # others do the same, unseen
                    with FlopCounterMode(display=False) as counter:
                        run()
                    flops = counter.get_total_flops() / count
                ratio = statistics.median(a / b for a, b in zip(next(iter(times.values())), times[version]))
                seconds = statistics.median(times[version]) / count
                share = None if flops is None else max(flops / self.rates[0], traffic / self.rates[1]) / seconds
                numbers = (count_operations(run) / count, 1e3 * seconds, ratio, share, gib[version])  # as in COLUMNS
                cells = ["" if number is None else f"{number:.4g}" for number in numbers]
                self.rows.append((label, what, version, *cells))
                print(f"{f'{label}: {what}, {version}':60s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)
        if self.output:
            np.savetxt(self.output, self.rows, "%s", ",")


def acting(module, args, env, policy: torch.nn.Module) -> dict[str, Step]:
    """A decision of all agents, one and 256 at once, from observations on the host to actions on the host."""
    act = lambda n: partial(module.make_act(policy, args), np.zeros((n, *env.obs_mask.shape), np.float32))
    return {f"act in {n}": Step(act(n), 4 * weights(policy)) for n in (1, 256)}


def omad_steps(env, args: omad.Args, device: torch.device) -> dict[str, Step]:
    """Updates on a replay of random transitions, and acting."""
    agent, replay, f = omad.OMAD(env, args, device), omad.Replay(env, 10_000, device), args.policy_frequency
    replay.table.normal_()[:, -1] = 0  # nothing terminates
    learn = lambda rows, *noise: agent.update(replay.sample(rows), *noise)
    learn = omad.graphed(learn, args.cuda_graph and device.type == "cuda")
    rows = lambda: torch.randint(len(replay.table), (args.batch_size,), device=device)
    update = lambda chains: learn(rows(), *(agent.policy.noise(args.batch_size) for _ in range(chains)))
    few = 4 * (weights(agent.policy) + 9 * weights(agent.critic) + 2 * args.batch_size * replay.table.shape[1])
    more = 32 * weights(agent.policy)
    return {
        "critic update": Step(lambda: update(1), few),
        "full update": Step(lambda: update(2), few + more),
        "mean update": Step(lambda: [update(1 + (i == 0)) for i in range(f)], few + more / f, f),
        **acting(omad, args, env, agent.policy),
    }


def dom2_steps(env, args: dom2.Args, device: torch.device) -> dict[str, Step]:
    """Updates on random transitions in the place of data, and acting."""
    (n, o), a, count, rng = env.obs_mask.shape, env.action_mask.shape[1], 10_000, np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((count, n, *shape), np.float32)
    known = dict(episodes=np.array([[0, count]]), terminations=np.zeros(count, bool), next_known=np.ones(count, bool))
    source = SimpleNamespace(obs=normal(o), next_obs=normal(o), actions=np.tanh(normal(a)), rewards=normal(), **known)
    agent, data = dom2.DOM2(env, args, device), dom2.Data(source, env, args, device)
    learn = lambda rows, *drawn: agent.update(data.sample(rows), *drawn)
    learn = dom2.graphed(learn, args.cuda_graph and device.type == "cuda")
    traffic = 4 * (11 * weights(agent.policy, agent.critic) + 2 * args.batch_size * data.table[0].numel())
    update = Step(lambda: learn(data.draw(args.batch_size), *agent.draw()), traffic)
    return {"update": update, **acting(dom2, args, env, agent.slow_policy)}


ONLINE = {"gaussian": dict(policy="gaussian"), "diffusion": {}}
OFFLINE = {"deterministic": dict(policy="deterministic"), "unet": {}}
PROGRAMS = {  # what makes their steps, how a task is chosen, what K is called, and their networks, the cheapest first
    "omad": (omad, omad_steps, "env_id", "denoising_steps", ONLINE),
    "dom2": (dom2, dom2_steps, "dataset", "solver_steps", OFFLINE),
}


def measure(bench: Bench, options: Options, program: str) -> None:
    """The tables of one program."""
    module, steps, chosen, length, kinds = PROGRAMS[program]
    task, device, modes = getattr(options, chosen), bench.device, {"eager": dict(cuda_graph=False)}
    modes |= {"graph": {}, "graph+compiled": dict(compile=True)} if bench.cuda else {}
    args = module.preset(task)
    env = make_env(task if program == "omad" else find_env_id(task), args.observation)
    if "update" in options.tables:
        for kind, own in kinds.items():
            builds = {name: partial(steps, env, replace(args, **mode, **own), device) for name, mode in modes.items()}
            bench.compare(f"{program} {task} {kind}", builds)
    for mode in ("eager", "graph")[: 1 + bench.cuda]:
        if "acting" in options.tables:
            own = dict([*kinds.items()][:1]) | {f"K = {k}": {length: k} for k in (1, 2, 4, 8)}
            own = {f"{mode} {name}": replace(args, **changes, **modes[mode]) for name, changes in own.items()}
            policy = lambda args: module.POLICIES[args.policy](env.obs_sizes, env.action_sizes, args).to(device)
            build = lambda args: acting(module, args, env, policy(args))
            bench.compare(f"{program} {task}", {name: partial(build, new) for name, new in own.items()})
        if "growth" in options.tables:
            build = partial(steps, args=replace(args, **modes[mode]), device=device)
            bench.compare(f"{program} growth", {f"{mode} N = {n}": partial(build, team(n)) for n in (3, 24)})


def team(n: int) -> SimpleNamespace:
    """N agents with 18 observations and 2 actions each."""
    masks = dict(obs_mask=np.ones((n, 18), bool), action_mask=np.ones((n, 2), bool))
    return SimpleNamespace(**masks, obs_sizes=[18] * n, action_sizes=[2] * n, state_size=18 * n, num_agents=n)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    torch.set_num_threads(1)
    bench = Bench(options)
    for program in options.programs:
        measure(bench, options, program)


if __name__ == "__main__":
    main()

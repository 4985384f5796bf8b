"""How fast OMAD and DOM2 are here, and how near that is to what the machine can do.

    python runs/speed.py                                       # both programs at their presets: updates, acting, growth
    python runs/speed.py --programs omad --env-id mamujoco_ant_2x4 --tables update --end-to-end 10000

Versions of the same step are timed in turns, within one process: eager; on a GPU also as a CUDA graph and as a graph of
compiled networks; on a CPU, with --compile, compiled. An update is one with everything that training does for it: draw,
sample, losses, optimisers. A line (and a row of --output) has

    operations   that torch dispatches, without views: exact on any machine, and what a small network's time is made of
    ms, per_s    the median over the turns
    ratio        time of the first version / time of this one, median over the turns: holds on a noisy machine
    share        floor / time. The floor is the time of the matrix products at the rate of one large product, or of the
                 compulsory memory traffic at the rate of one large copy, whichever is longer; both are measured here.
                 Compulsory are one reading of every weight, the traffic of Adam (weight, gradient and two moments, read
                 and written), that of averaged weights, and the rows of the batch
    gib          of GPU memory that this version took
"""

import csv
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
    tables: tuple[Literal["update", "acting", "growth"], ...] = (
        "update",
        "acting",
        "growth",
    )  # growth: with the agents
    env_id: str = "mpe_simple_spread"  # OMAD's task, at its preset
    dataset: str = "omar_simple_spread-medium"  # whose preset and sizes DOM2 has; the data themselves are random
    end_to_end: int = 0  # environment steps (updates of DOM2) of real training, per version, to time too; at least 2000
    agents: tuple[int, ...] = (3, 24)  # in growth
    steps: tuple[int, ...] = (1, 2, 4, 8)  # K, in acting
    compile: bool = False  # also time compiled networks on a CPU; on a GPU they always are
    turns: int = 9  # timings of each version
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where
    torch_threads: int = 1  # CPU threads
    output: str = ""  # CSV file


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, by name. Views, allocations and marks for the profiler do no work."""

    IDLE = {"_unsafe_view", "_record_function_enter_new", "_record_function_exit"}
    IDLE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.names[name] += not operation.is_view and name not in self.IDLE
        return operation(*args, **kwargs or {})


def count_operations(function: Callable[[], object]) -> int:
    """Operations that do work in one call, forward and backward, after a first one in which optimisers set up."""
    function()
    with Operations() as operations:
        function()
    return operations.names.total()


class Step(NamedTuple):
    """Something to time: `run` does it `count` times over, each with that many compulsory bytes."""

    run: Callable[[], object]
    traffic: float
    count: int = 1


Steps = dict[str, Step]
COLUMNS = ("label", "what", "version", "operations", "ms", "per_s", "ratio", "share", "gflop", "mb", "gib")


class Bench:
    """The rates of this machine, and the table as far as it has been measured."""

    def __init__(self, options: Options):
        self.options, self.device, self.rows = options, omad.pick_device(options.device), []
        self.cuda = self.device.type == "cuda"
        size, length = (8192, 2**28) if self.cuda else (1024, 2**24)
        a, b, out = torch.randn(3, size, size, device=self.device)
        x, y = torch.zeros(2, length, device=self.device)
        times = self.in_turns({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)})
        self.rates = 2 * size**3 / min(times["product"]), 8 * length / min(times["copy"])
        name = torch.cuda.get_device_name() if self.cuda else f"CPU, {options.torch_threads} thread(s)"
        print(f"{name}, torch {torch.__version__}: {self.rates[0] / 1e12:.2f} TFLOP/s, {self.rates[1] / 1e9:.0f} GB/s")
        print(f"{'':55s}" + "".join(f"{name:>11s}" for name in COLUMNS[3:]))

    def in_turns(self, versions: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds per call of each version, one version after the other in every turn, the first to warm up."""
        wait, repeats = torch.cuda.synchronize if self.cuda else lambda: None, dict.fromkeys(versions, 1)
        times = {name: [] for name in versions}
        for turn in range(self.options.turns + 1):
            for name, function in versions.items():
                wait()
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    function()
                wait()
                times[name].append((time.perf_counter() - start) / repeats[name])
                if not turn:  # from now on as many at a time as take a twentieth of a second
                    repeats[name] = max(1, min(100, round(0.05 / times[name].pop())))
        return times

    def compare(self, label: str, builds: dict[str, Callable[[], Steps]]) -> None:
        """Builds every version, and times their steps against each other."""
        torch.compiler.reset()
        built, gib = {}, {}
        for version, build in builds.items():
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            held, built[version] = torch.cuda.memory_reserved() if self.cuda else 0, build()
            for step in [*built[version].values()] * 5:  # a graph is captured in the fourth call
                step.run()
            gib[version] = (torch.cuda.max_memory_reserved() - held) / 2**30 if self.cuda else None
        for what in next(iter(built.values())):
            steps, flops = {version: parts[what] for version, parts in built.items()}, None
            times = self.in_turns({version: step.run for version, step in steps.items()})
            times = {version: [t / steps[version].count for t in values] for version, values in times.items()}
            for version, step in steps.items():
                eager = "graph" not in version and "compiled" not in version
                if eager:
                    with FlopCounterMode(display=False) as counter:
                        step.run()
                    flops = counter.get_total_flops() / step.count
                operations = count_operations(step.run) / step.count if version != "compiled" else None
                seconds = statistics.median(times[version])
                ratio = statistics.median(a / b for a, b in zip(next(iter(times.values())), times[version]))
                row = dict(
                    operations=operations, ms=1e3 * seconds, ratio=ratio, mb=step.traffic / 1e6, gib=gib[version]
                )
                if flops is not None:
                    floor = max(flops / self.rates[0], step.traffic / self.rates[1])
                    row |= dict(gflop=flops / 1e9, share=floor / seconds)
                self.tell(label, what, version, per_s=1 / seconds, **row)

    def tell(self, label: str, what: str, version: str, **numbers: float | None) -> None:
        cells = ["" if numbers.get(name) is None else f"{numbers[name]:.4g}" for name in COLUMNS[3:]]
        self.rows.append([label, what, version, *cells])
        print(f"{f'{label}: {what}, {version}':55s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)

    def versions(self, build: Callable[[bool, bool], Steps]) -> dict[str, Callable[[], Steps]]:
        """Of what `build` makes, captured and compiled or not: those that make sense here."""
        names = {"eager": (False, False)}
        if self.cuda:
            names |= {"graph": (True, False), "graph, compiled": (True, True)}
        elif self.options.compile:
            names["compiled"] = (False, True)
        return {name: lambda how=how: build(*how) for name, how in names.items()}


def weights(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def omad_steps(env, args: omad.Args, device: torch.device) -> Steps:
    """Updates on a replay of random transitions, and acting in the preset's environments."""
    torch.manual_seed(0)
    agent, replay, f, graph = (
        omad.OMAD(env, args, device),
        omad.Replay(env, 10_000, device),
        args.policy_frequency,
        args.cuda_graph,
    )
    replay.table.normal_()[:, -1] = 0  # nothing terminates
    learn = omad.graphed(
        lambda rows, *noise: agent.update(replay.sample(rows), *noise), graph and device.type == "cuda"
    )
    rows = lambda: torch.randint(len(replay.table), (args.batch_size,), device=device)
    update = lambda chains: learn(rows(), *(agent.policy.noise(args.batch_size) for _ in range(chains)))
    act, obs = omad.make_act(agent.policy, args), np.zeros((args.num_envs, *env.obs_mask.shape), np.float32)
    few = 4 * (weights(agent.policy) + 9 * weights(agent.critic) + 2 * args.batch_size * replay.table.shape[1])
    more = 32 * weights(agent.policy)
    return {
        "critic update": Step(lambda: update(1), few),
        "full update": Step(lambda: update(2), few + more),
        "mean update": Step(lambda: [update(1 + (i == 0)) for i in range(f)], few + more / f, f),
        f"act in {len(obs)}": Step(lambda: act(obs), 4 * weights(agent.policy)),
    }


def dom2_steps(env, args: dom2.Args, device: torch.device) -> Steps:
    """Updates on random transitions in the place of data, and acting in the environments of an evaluation."""
    torch.manual_seed(0)
    (n, o), a, count, rng = env.obs_mask.shape, env.action_mask.shape[1], 10_000, np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((count, n, *shape), np.float32)
    known = dict(episodes=np.array([[0, count]]), terminations=np.zeros(count, bool), next_known=np.ones(count, bool))
    source = SimpleNamespace(obs=normal(o), next_obs=normal(o), actions=np.tanh(normal(a)), rewards=normal(), **known)
    agent, data = dom2.DOM2(env, args, device), dom2.Data(source, env, args, device)
    learn = lambda rows, *drawn: agent.update(data.sample(rows), *drawn)
    learn = dom2.graphed(learn, args.cuda_graph and device.type == "cuda")
    act, obs = dom2.make_act(agent.slow_policy, args), np.zeros((args.eval_episodes, n, o), np.float32)
    traffic = 4 * (11 * weights(agent.policy, agent.critic) + 2 * args.batch_size * data.table[0].numel())
    return {
        "update": Step(lambda: learn(data.draw(args.batch_size), *agent.draw()), traffic),
        f"act in {len(obs)}": Step(lambda: act(obs), 4 * weights(agent.policy)),
    }


def team(n: int) -> SimpleNamespace:
    """N agents with 18 observations and 2 actions each."""
    masks = dict(obs_mask=np.ones((n, 18), bool), action_mask=np.ones((n, 2), bool))
    return SimpleNamespace(**masks, obs_sizes=[18] * n, action_sizes=[2] * n, state_size=18 * n, num_agents=n)


def measure(bench: Bench, program: str) -> None:
    """The tables of one program."""
    options, device = bench.options, bench.device
    if program == "omad":
        module, steps, task, args, length = (
            omad,
            omad_steps,
            options.env_id,
            omad.preset(options.env_id),
            "denoising_steps",
        )
        env, kinds = make_env(task, args.observation), {"gaussian": dict(policy="gaussian"), "diffusion": {}}
    else:
        module, steps, task, args, length = (
            dom2,
            dom2_steps,
            options.dataset,
            dom2.preset(options.dataset),
            "solver_steps",
        )
        kinds = {"deterministic": dict(policy="deterministic"), "mlp": dict(network="mlp"), "unet": {}}
        env = make_env(find_env_id(task))
    changed = lambda graph, **own: dataclasses.replace(args, cuda_graph=graph, **own)
    if "update" in options.tables:
        for kind, own in kinds.items():
            build = lambda graph, compiled: steps(env, changed(graph, compile=compiled, **own), device)
            bench.compare(f"{program} {kind} {task}", bench.versions(build))
    if options.end_to_end:
        end_to_end(bench, program, task)

    def acting(args) -> Steps:
        """A decision of all agents, from observations on the host to actions on the host."""
        policy = module.POLICIES[args.policy](env.obs_sizes, env.action_sizes, args).to(device)
        some = {n: (module.make_act(policy, args), np.zeros((n, *env.obs_mask.shape), np.float32)) for n in (1, 256)}
        return {
            f"act in {n}": Step(lambda act=act, obs=obs: act(obs), 4 * weights(policy))
            for n, (act, obs) in some.items()
        }

    for graph, prefix in [(False, ""), (True, "graph, ")][: 1 + bench.cuda]:
        policies = dict([next(iter(kinds.items()))]) | {f"K = {k}": {length: k} for k in options.steps}
        if "acting" in options.tables:
            builds = {prefix + name: lambda own=own: acting(changed(graph, **own)) for name, own in policies.items()}
            bench.compare(f"{program} {task}", builds)
        if "growth" in options.tables:
            builds = {f"{prefix}N = {n}": lambda n=n: steps(team(n), changed(graph), device) for n in options.agents}
            bench.compare(f"{program} of 18, 2", builds)


def end_to_end(bench: Bench, program: str, task: str) -> None:
    """Steps per second of the program itself, between its last two evaluations (of one episode, whose time is counted)."""
    options, first = bench.options, None
    length = f"--total-timesteps {2 * options.end_to_end} --learning-starts 1000" if program == "omad" else ""
    length = length or f"--total-updates {2 * options.end_to_end}"
    flags = f"{'--env-id' if program == 'omad' else '--dataset'} {task} {length} --eval-every {options.end_to_end} --eval-episodes 1"
    flags += f" --device {options.device} --torch-threads {options.torch_threads}"
    for version in bench.versions(None):
        own = " --no-cuda-graph" * ("graph" not in version) + " --compile" * ("compiled" in version)
        with tempfile.TemporaryDirectory() as folder:  # a process with memory and compiler of its own
            command = [sys.executable, str(ROOT / f"{program}.py"), *(flags + own).split(), "--run-dir", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            a, b = list(csv.DictReader(next(Path(folder).glob("*/eval.csv")).open()))[-2:]
        took = (float(b["wall_time_s"]) - float(a["wall_time_s"])) / (int(b["step"]) - int(a["step"]))
        first = first or took
        bench.tell(f"{program} {task}", "end to end", version, ms=1e3 * took, per_s=1 / took, ratio=first / took)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    torch.set_num_threads(options.torch_threads)
    bench = Bench(options)
    for program in options.programs:
        measure(bench, program)
    if options.output:
        with open(options.output, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *bench.rows])


if __name__ == "__main__":
    main()

"""How fast OMAD and DOM2 are here, and how near that is to what the machine can do.

    python runs/speed.py                                   # the update, acting and the whole loop, at the preset of Ant 2x4
    python runs/speed.py --inference                       # a joint decision with K = 1, 2, 4, 8 denoising steps, and a Gaussian one
    python runs/speed.py --envs                            # steps of 2 to 16 environments, in one process and in one process each
    python runs/speed.py --loop                            # agents as a tensor dimension against a Python loop over agents
    python runs/speed.py --dom2                            # DOM2: its update, on the sizes of OMAR's tasks, and against a loop over agents

Versions of the same step are timed in turns, within one process. A ratio is the median over the turns, so it means something on a
noisy machine where the milliseconds do not. On a machine with a GPU, the first two tables have rows for plain (eager) execution,
for CUDA graphs and for graphs of compiled networks; on one without, for eager execution and, with --compile, compiled networks.

The floor of an update is the time its matrix products would take at the rate of one large product, or its compulsory memory
traffic at the rate of one large copy, whichever is longer; both rates are measured here, in the same process. Compulsory are one
reading of every weight and, for each trained weight, the traffic of Adam (weight, gradient and two moments, read and written),
and the rows of the batch; activations could stay in caches. The share is floor / measured.
"""

import csv
import dataclasses
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dom2
import omad
from common.envs import cores, make_env, make_vec


@dataclass(frozen=True)
class Options:
    """Speed of the updates and decisions of OMAD and of DOM2."""

    inference: bool = False
    """the latency of a decision instead"""
    envs: bool = False
    """the speed of the environments alone instead"""
    loop: bool = False
    """batched against looped agents instead, a table of about ten minutes on one CPU core"""
    dom2: bool = False
    """DOM2 instead"""
    env_id: str = "mamujoco_ant_2x4"
    """the task whose preset and sizes are used (not with --loop; with --dom2 one of OMAR's, else two of them)"""
    compile: bool = False
    """also time compiled networks on the CPU; on a GPU they always are"""
    many: tuple[int, ...] = (3, 24)
    """numbers of agents between which the growth of the update time is shown"""
    end_to_end: int = -1
    """environment steps of real training per version (1000 of eager execution), 0 for none; by default 10,000 on a GPU and none on a CPU"""
    turns: int = 9
    """timings of each version, taken in turns; the median counts"""
    device: str = "auto"
    """auto, cpu or cuda; --inference shows both"""
    torch_threads: int = 1
    """CPU threads"""
    output: str = ""
    """CSV file for the table"""

    agents: tuple[int, ...] = (2, 3, 8, 24)
    """with --loop: numbers of agents N"""
    widths: tuple[int, ...] = (64, 256)
    """with --loop: widths H of the policies; the critics have twice that"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """with --loop and --inference: denoising steps K"""
    batch_size: int = 256
    """with --loop: transitions per update"""
    num_envs: int = 8
    """with --loop: environments per acting step"""


def describe(device: torch.device, options: Options) -> str:
    cpu = f"{platform.processor() or platform.machine()} CPU, {options.torch_threads} thread(s)"
    return f"{torch.cuda.get_device_name() if device.type == 'cuda' else cpu}, torch {torch.__version__}"


def in_turns(versions: dict[str, Callable], turns: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per call of each version, `turns` times, one version after the other in every turn."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for function in versions.values():  # warm up
        function(), function()
    times: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(turns):
        for name, function in versions.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            wait()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


# --- the update, acting, and the whole loop ---


def make_learner(env, args: omad.Args, device: torch.device, captured: bool) -> omad.Learner:
    """An agent and a replay of random transitions."""
    torch.manual_seed(0)
    replay = omad.Replay(env, args.buffer_size, device)
    replay.added = min(10_000, args.buffer_size)
    replay.rows[: replay.added].normal_()
    replay.data["terminated"][: replay.added] = 0
    learner = omad.Learner(omad.OMAD(env, args, device), replay, args)
    learner.to_check = False  # speed is what is measured here; the check is a test's and the training's
    learner.update.enabled = learner.agent.chain.enabled = captured
    return learner


def peaks(device: torch.device) -> tuple[float, float]:
    """Floating-point operations per second of one large matrix product, bytes per second of one large copy."""
    size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b, x, y = (
        torch.randn(size, size, device=device),
        torch.randn(size, size, device=device),
        *torch.zeros(2, length, device=device),
    )
    out = torch.empty_like(a)
    times = in_turns({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)}, 5, 2)
    flops_rate, bytes_rate = 2 * size**3 / min(times["product"]), 8 * length / min(times["copy"])
    print(f"one large product: {flops_rate / 1e12:.2f} TFLOP/s; one large copy: {bytes_rate / 1e9:.0f} GB/s")
    return flops_rate, bytes_rate


def work(learner: omad.Learner, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Floating-point operations of the matrix products, and compulsory bytes, of one update with these inputs."""
    agent = learner.agent
    with FlopCounterMode(display=False) as counter:
        learner.update.function(*inputs)
    weights = lambda module: sum(p.numel() for p in module.parameters())
    trained = weights(agent.critic) + (weights(agent.policy) if len(inputs) == 3 else 0)
    rows = len(inputs[0]) * learner.replay.rows.shape[1]
    return counter.get_total_flops(), 4 * (weights(agent.policy) + weights(agent.critic) + 8 * trained + 2 * rows)


def versions_here(options: Options, cuda: bool) -> dict[str, tuple[bool, bool]]:
    """What is timed against each other: name -> whether captured as a graph, whether compiled."""
    versions = {"eager": (False, False)}
    if cuda:
        versions |= {"graph": (True, False), "graph, compiled": (True, True)}
    elif options.compile:
        versions["compiled"] = (False, True)
    return versions


def update_table(options: Options) -> list[dict]:
    device = omad.pick_device(options.device)
    cuda = device.type == "cuda"
    args, env = omad.preset(options.env_id), make_env(options.env_id)
    print(f"{describe(device, options)}\n{options.env_id} at its preset: {args.updates_per_step:g} updates per environment step")
    flops_rate, bytes_rate = peaks(device)
    versions = versions_here(options, cuda)
    critic, both, act, learners, result = {}, {}, {}, {}, []
    generator, obs = torch.Generator(device).manual_seed(0), np.zeros((args.num_envs, *env.obs_mask.shape), np.float32)
    for name, (captured, compiled) in versions.items():
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_reserved() if cuda else 0
        learners[name] = learner = make_learner(env, dataclasses.replace(args, compile=compiled), device, captured)
        index = learner.replay.draw(args.batch_size, generator)
        noise = [learner.agent.policy.noise(args.batch_size, generator) for _ in range(2)]
        critic[name] = lambda learner=learner: learner.update(index, noise[0])
        both[name] = lambda learner=learner: learner.update(index, *noise)
        act[name] = lambda learner=learner: learner.agent.act(obs, generator)
        critic[name](), both[name](), act[name]()
        memory = f"{(torch.cuda.max_memory_reserved() - held) / 2**30:.2f}" if cuda else ""
        result.append(dict(version=name, gpu_gib=memory))
        if name == "eager":
            (few, less), (many, more) = work(learner, (index, noise[0])), work(learner, (index, *noise))
    repeats = 20 if cuda else 2
    critic, both, act = (in_turns(functions, options.turns, repeats) for functions in (critic, both, act))
    share, steps = 1 / args.policy_frequency, options.end_to_end if options.end_to_end >= 0 else 10_000 * cuda
    mean = {name: [a + (b - a) * share for a, b in zip(critic[name], both[name])] for name in versions}
    flops, traffic = few + (many - few) * share, less + (more - less) * share
    floor = max(flops / flops_rate, traffic / bytes_rate)
    print(f"an update on average: {flops / 1e9:.2f} GFLOP, {traffic / 1e6:.1f} MB; floor {1e3 * floor:.3f} ms")
    print("version         | critic ms | +policies ms | mean ms | eager / this | share of floor | act ms | steps/s | GPU GiB")
    for row in result:
        name = row["version"]
        middle = lambda times: 1e3 * statistics.median(times[name])
        row |= dict(critic_ms=round(middle(critic), 3), both_ms=round(middle(both), 3), mean_ms=round(middle(mean), 3))
        row |= dict(ratio=round(statistics.median(a / b for a, b in zip(mean["eager"], mean[name])), 2))
        row |= dict(share=round(1e3 * floor / row["mean_ms"], 3), act_ms=round(middle(act), 3))
        row |= dict(gflop=round(flops / 1e9, 2), mb=round(traffic / 1e6, 1), floor_ms=round(1e3 * floor, 3))
        row["steps_per_s"] = round(end_to_end(options, name, min(steps, 1000) if name == "eager" else steps)) if steps else ""
        print(
            f"{name:15s} | {row['critic_ms']:9.3f} | {row['both_ms']:12.3f} | {row['mean_ms']:7.3f} | {row['ratio']:11.2f}x | {row['share']:14.1%} | "
            f"{row['act_ms']:6.3f} | {row['steps_per_s']!s:>7} | {row['gpu_gib']:>7}",
            flush=True,
        )
        if steps:
            whole_run(options, args, learners[name], row["steps_per_s"])
    growth(options, args, device, versions)
    return result


def whole_run(options: Options, args: omad.Args, learner: omad.Learner, rate: float) -> None:
    """What the task's whole run takes at this rate, with its evaluations and its checkpoints, whose time is measured here."""
    start = time.perf_counter()
    envs = make_vec(options.env_id, args.eval_episodes)
    omad.evaluate(learner.agent, envs, 0)
    evaluation = time.perf_counter() - start
    envs.close()
    learner.replay.added = learner.replay.capacity
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        torch.save({"agent": learner.agent.state_dict(), "replay": learner.replay.state_dict()}, file)
        checkpoint = time.perf_counter() - start
    count, filled = args.total_timesteps / args.eval_every, 1 - args.buffer_size / (2 * args.total_timesteps)  # on average
    minutes = [x / 60 for x in (args.total_timesteps / rate, count * evaluation, count * filled * checkpoint)]
    print(
        f"{args.total_timesteps:,} steps would take {sum(minutes):.0f} min: training {minutes[0]:.0f}, {count:.0f} evaluations {minutes[1]:.1f}, "
        f"as many checkpoints {minutes[2]:.1f}"
    )


def growth(options: Options, args: omad.Args, device: torch.device, versions: dict[str, tuple[bool, bool]]) -> None:
    """How the mean update time grows with the number of agents, each with 18 observations and 2 actions (compiled ones left out)."""
    args = dataclasses.replace(args, buffer_size=10_000)
    for name, (captured, _) in [item for item in versions.items() if not item[1][1]]:
        functions = {}
        for n in options.many:
            env = SimpleNamespace(obs_mask=np.ones((n, 18), bool), action_mask=np.ones((n, 2), bool), state_size=18 * n)
            learner, generator = make_learner(env, args, device, captured), torch.Generator(device).manual_seed(0)
            index = learner.replay.draw(args.batch_size, generator)
            noise = [learner.agent.policy.noise(args.batch_size, generator) for _ in range(2)]
            functions[n, 1] = lambda u=learner.update, i=index, x=noise: u(i, x[0])
            functions[n, 2] = lambda u=learner.update, i=index, x=noise: u(i, *x)
        times = {
            key: statistics.median(value)
            for key, value in in_turns(functions, options.turns, 5 if device.type == "cuda" else 1).items()
        }
        mean = {n: 1e3 * (times[n, 1] + (times[n, 2] - times[n, 1]) / args.policy_frequency) for n in options.many}
        text = ", ".join(f"{n} agents {mean[n]:.2f} ms ({mean[n] / mean[options.many[0]]:.2f}x)" for n in options.many)
        print(f"growth with agents, {name}: {text}")


def end_to_end(options: Options, version: str, steps: int) -> float:
    """Environment steps per second of `omad.py` itself between two evaluations (of one episode, whose time is counted)."""
    if steps < 1000:
        raise SystemExit("speed.py: error: --end-to-end must be at least 1000 steps, an episode of most tasks")
    flags = f"--env-id {options.env_id} --device {options.device} --learning-starts 1000 --eval-episodes 1 --total-timesteps {2 * steps}"
    flags += f" --eval-every {steps} --torch-threads {options.torch_threads}"
    flags += " --no-cuda-graph" * ("graph" not in version) + " --compile" * ("compiled" in version)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, omad.__file__, *flags.split(), "--run-dir", folder], check=True
        )  # memory and compiler of its own
        rows = list(csv.DictReader(next(Path(folder).glob("*/eval.csv")).open()))
    return steps / (float(rows[-1]["wall_time_s"]) - float(rows[-2]["wall_time_s"]))


# --- the latency of a decision ---


def inference_table(options: Options) -> list[dict]:
    """Milliseconds from observations on the host to actions on the host: one joint decision, and 256 at once."""
    env, result = make_env(options.env_id), []
    for device in [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available():
        omad.pick_device(device.type)
        print(
            f"{describe(device, options)}; {options.env_id} at its preset; median of {options.turns} turns, ms per call (ratio to Gaussian)"
        )
        for captured in [False, True][: 1 + (device.type == "cuda")]:
            acts = {}
            for kind in ("gaussian", *options.steps):
                changes = dict(policy="gaussian") if kind == "gaussian" else dict(denoising_steps=kind)
                agent = omad.OMAD(env, dataclasses.replace(omad.preset(options.env_id), **changes), device)
                agent.chain.enabled = captured
                acts[kind] = agent.act
            generator = torch.Generator(device).manual_seed(0)
            for batch in (1, 256):
                obs = np.random.default_rng(0).standard_normal((batch, *env.obs_mask.shape), np.float32)
                functions = {kind: lambda act=act: act(obs, generator) for kind, act in acts.items()}
                times = in_turns(functions, options.turns, 50 if batch == 1 else 10)
                cells = []
                for kind, seconds in times.items():
                    ms = 1e3 * statistics.median(seconds)
                    ratio = statistics.median(a / b for a, b in zip(seconds, times["gaussian"]))
                    result.append(
                        dict(
                            device=device.type,
                            graph=captured,
                            batch=batch,
                            policy=str(kind),
                            ms=round(ms, 3),
                            ratio=round(ratio, 2),
                        )
                    )
                    cells.append(f"{'' if kind == 'gaussian' else 'K='}{kind} {ms:.3f} ({ratio:.2f}x)")
                print(f"{device.type}{' graph' if captured else ''}, batch {batch}: " + " | ".join(cells), flush=True)
    return result


# --- environments alone ---


def envs_table(options: Options) -> list[dict]:
    """Environment steps per second of E copies: one after the other in this process, and in a process each."""
    print(f"{options.env_id}, random actions, {cores()} cores; ratio: above 1 means that processes are faster")
    result = []
    for count in (2, 4, 8, 16):
        versions = {name: make_vec(options.env_id, count, processes=name == "processes") for name in ("one process", "processes")}
        rng = np.random.default_rng(0)
        functions = {name: lambda envs=envs: walk(envs, rng) for name, envs in versions.items()}
        times = in_turns(functions, options.turns, 1)
        rate = {name: round(count * STEPS / statistics.median(value)) for name, value in times.items()}
        ratio = round(statistics.median(a / b for a, b in zip(times["one process"], times["processes"])), 2)
        result.append(dict(envs=count, one_process=rate["one process"], processes=rate["processes"], ratio=ratio))
        print(
            f"{count:3d} copies: {rate['one process']:6,d} steps/s in one process, {rate['processes']:6,d} in {count} ({ratio:.2f}x)",
            flush=True,
        )
        for envs in versions.values():
            envs.close()
    return result


STEPS = 100  # of each copy in one timing


def walk(envs: gym.vector.VectorEnv, rng: np.random.Generator) -> None:
    envs.reset(seed=0)
    for _ in range(STEPS):
        *_, terminated, truncated, _ = envs.step(rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32))
        if (terminated | truncated).any():
            envs.reset(options={"reset_mask": terminated | truncated})


# --- agents as a tensor dimension against a loop over agents ---


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


def loop_row(options: Options, agents: int, width: int, steps: int) -> dict:
    torch.set_num_threads(options.torch_threads)
    cuda = omad.pick_device(options.device).type == "cuda"
    before = peak_memory(cuda)
    result = dict(agents=agents, width=width, steps=steps)
    versions = {}
    for name, policy_class in (("batched", omad.DiffusionPolicy), ("loop", LoopPolicy)):
        agent, batch, obs = make_agent(options, agents, width, steps, policy_class)
        generator = torch.Generator(agent.device).manual_seed(0)
        noise = agent.policy.noise(options.batch_size, generator)
        versions[name] = {
            "critic": lambda a=agent, b=batch, n=noise: a.update_critic(b, n),
            "policy": lambda a=agent, b=batch, n=noise: a.update_policies(b, n),
            "act": lambda a=agent, o=obs, g=generator: a.act(o, g),
        }
        for function in versions[name].values():
            function()
        if name == "batched":
            result["peak_mib"] = round((peak_memory(cuda) - before) / 2**20)
    for kind in ("critic", "policy", "act"):
        times = in_turns({name: functions[kind] for name, functions in versions.items()}, options.turns, 5 if kind == "act" else 2)
        batched, loop = times["batched"], times["loop"]
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


def loop_table(options: Options) -> list[dict]:
    """Each row runs in a fresh process: peak memory is that of the batched version alone, above the process's own."""
    print(
        f"{describe(omad.pick_device(options.device), options)}, batch {options.batch_size}, acting in {options.num_envs} environments"
    )
    print("ratio = loop / batched: above 1 means that batched is faster")
    print("  N    H  K | critic ms  ratio | policy ms  ratio | act ms  ratio | peak MiB")
    rows = []
    for width in options.widths:
        for agents in options.agents:
            for steps in options.steps:
                with multiprocessing.get_context("spawn").Pool(1) as fresh:
                    r = fresh.apply(loop_row, (options, agents, width, steps))
                rows.append(r)
                print(
                    f"{agents:3d} {width:4d} {steps:2d} | {r['critic_ms']:9.2f} {r['critic_ratio']:5.2f}x | {r['policy_ms']:9.2f} {r['policy_ratio']:5.2f}x"
                    f" | {r['act_ms']:6.2f} {r['act_ratio']:5.2f}x | {r['peak_mib']:8d}",
                    flush=True,
                )
    return rows


# --- DOM2 ---


def make_offline_learner(env, args: dom2.Args, device: torch.device, captured: bool = False) -> dom2.Learner:
    """An agent, and 10,000 random transitions in the place of data."""
    torch.manual_seed(0)
    (n, o), a, count, rng = env.obs_mask.shape, env.action_mask.shape[1], 10_000, np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((count, n, *shape), np.float32)
    source = SimpleNamespace(
        obs=normal(o), next_obs=normal(o), actions=np.tanh(normal(a)), rewards=normal(), terminations=np.zeros(count, bool),
        next_known=np.ones(count, bool), episodes=np.array([[0, count]]), returns=np.zeros(1),
    )  # fmt: skip
    learner = dom2.Learner(dom2.DOM2(env, args, device), dom2.Data(source, env, args, device), args)
    learner.to_check = False
    learner.update.enabled = learner.agent.chain.enabled = captured
    return learner


def offline_bytes(learner: dom2.Learner) -> float:
    """Compulsory bytes of an update: every weight and average read, Adam's traffic, the averages written, the rows of the batch."""
    weights = sum(p.numel() for module in (learner.agent.policy, learner.agent.critic) for p in module.parameters())
    return 4 * (weights * (1 + 8 + 2) + 2 * learner.args.batch_size * learner.data.table[0].numel())


def dom2_table(options: Options) -> list[dict]:
    """A whole update (drawing, critics, policies, averages) of both networks and the baseline, and the loop over agents."""
    device = dom2.pick_device(options.device)
    cuda = device.type == "cuda"
    print(describe(device, options))
    flops_rate, bytes_rate = peaks(device)
    versions = versions_here(options, cuda)
    result = []
    print(
        "task                 | networks      | version         | update ms | updates/s | eager / this | share of floor | GFLOP |  MB | act ms | GPU GiB"
    )
    for env_id in [options.env_id] if options.env_id in DATA_SET else DATA_SET:
        env = make_env(env_id)
        for label, changes in (("U-Net", {}), ("MLP", dict(network="mlp")), ("deterministic", dict(policy="deterministic"))):
            functions, acts, rows = {}, {}, []
            for name, (captured, compiled) in versions.items():
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_reserved() if cuda else 0
                args = dataclasses.replace(dom2.preset(DATA_SET[env_id]), compile=compiled, **changes)
                learner, generator = make_offline_learner(env, args, device, captured), torch.Generator(device).manual_seed(0)
                functions[name] = lambda learner=learner, generator=generator: learner.step(generator)
                obs = np.zeros((args.eval_episodes, *env.obs_mask.shape), np.float32)
                acts[name] = lambda learner=learner, generator=generator, obs=obs: learner.agent.act(obs, generator)
                functions[name](), acts[name]()
                rows.append(dict(env_id=env_id, networks=label, version=name))
                rows[-1]["gpu_gib"] = f"{(torch.cuda.max_memory_reserved() - held) / 2**30:.2f}" if cuda else ""
                if name == "eager":
                    with FlopCounterMode(display=False) as counter:
                        functions[name]()
                    flops, traffic = counter.get_total_flops(), offline_bytes(learner)
            floor = max(flops / flops_rate, traffic / bytes_rate)
            updates, decisions = (in_turns(kind, options.turns, 10 if cuda else 5) for kind in (functions, acts))
            for row in rows:
                name, middle = row["version"], lambda times: 1e3 * statistics.median(times[row["version"]])
                row |= dict(update_ms=round(middle(updates), 3), updates_per_s=round(1e3 / middle(updates)))
                row |= dict(ratio=round(statistics.median(a / b for a, b in zip(updates["eager"], updates[name])), 2))
                row |= dict(share=round(1e3 * floor / middle(updates), 3), act_ms=round(middle(decisions), 3))
                row |= dict(gflop=round(flops / 1e9, 3), mb=round(traffic / 1e6, 1), floor_ms=round(1e3 * floor, 4))
                print(
                    f"{env_id:20s} | {label:13s} | {name:15s} | {row['update_ms']:9.3f} | {row['updates_per_s']:9,d} | {row['ratio']:11.2f}x | "
                    f"{row['share']:14.1%} | {row['gflop']:5.2f} | {row['mb']:3.0f} | {row['act_ms']:6.3f} | {row['gpu_gib']:>7}",
                    flush=True,
                )
            result += rows
    loop_of_learners(options, device)
    return result


DATA_SET = {"omar_simple_spread": "omar_simple_spread-medium", "omar_halfcheetah_2x3": "omar_halfcheetah_2x3-medium"}


def loop_of_learners(options: Options, device: torch.device) -> None:
    """N agents in one learner against N learners of one agent: agents learn alone, so both do the same updates."""
    cuda = device.type == "cuda"
    for n in options.agents:
        space = lambda n: SimpleNamespace(obs_mask=np.ones((n, 18), bool), action_mask=np.ones((n, 2), bool), num_agents=n)
        for captured in [False, True][: 1 + cuda]:
            learners = {
                "batched": [make_offline_learner(space(n), dom2.Args(), device, captured)],
                "loop": [make_offline_learner(space(1), dom2.Args(), device, captured) for _ in range(n)],
            }
            generator = torch.Generator(device).manual_seed(0)
            functions = {
                name: lambda parts=parts: [learner.step(generator) for learner in parts] for name, parts in learners.items()
            }
            times = in_turns(functions, options.turns, 10 if cuda else 2)
            batched, loop = (1e3 * statistics.median(times[name]) for name in ("batched", "loop"))
            ratio = statistics.median(a / b for a, b in zip(times["loop"], times["batched"]))
            print(
                f"{n:3d} agents, MPE sizes{', graphs' * captured}: batched {batched:.2f} ms an update, loop {loop:.2f} ms; loop / batched {ratio:.2f}x",
                flush=True,
            )


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.torch_threads)
    tables = {options.envs: envs_table, options.loop: loop_table, options.inference: inference_table, options.dom2: dom2_table}
    table = tables.get(True, update_table)
    rows = table(options)
    if options.output:
        with open(options.output, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()

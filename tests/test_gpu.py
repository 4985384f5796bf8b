"""Updates and actions as CUDA graphs: on a GPU, if there is one, and everywhere with a stand-in that repeats operators.

The stand-in does on the CPU what a CUDA graph does: what runs while it captures has no effect, and a replay repeats the
same operators on the same memory, without any Python. So what Python did, and what lies elsewhere, is not repeated.
"""

import csv
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dom2
import omad
from conftest import ROOT, caller

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs are NOT tested on this machine"
)
CPU = torch.device("cpu")
VARIANTS = {
    "omad": (omad, dict()),
    "omad gaussian": (omad, dict(policy="gaussian")),
    "omad dime": (omad, dict(policy="dime")),
    "omad target networks": (omad, dict(tau=0.005)),
    "omad fixed temperature": (omad, dict(alpha_lr=0.0)),
    "dom2": (dom2, dict()),
    "dom2 deterministic": (dom2, dict(policy="deterministic")),
    "dom2 imitation": (dom2, dict(q_weight=0.0)),
    "dom2 as the paper": (dom2, dict(without="E1,E2,E4,E6,E7,E8", time_power=2.0)),
    "dom2 own actions": (dom2, dict(cql_own=True)),
}
variants = pytest.mark.parametrize("program, changes", VARIANTS.values(), ids=VARIANTS)
programs = pytest.mark.parametrize("program", [omad, dom2], ids=["omad", "dom2"])
ENV = SimpleNamespace(
    num_agents=2, obs_sizes=[5, 3], action_sizes=[2, 3], state_size=4,
    obs_mask=np.arange(5) < [[5], [3]], action_mask=np.arange(3) < [[2], [3]],
)  # fmt: skip


def random_data():
    """500 transitions, of which every third ends by a fall: for `dom2.Data`, and for `omad.Replay`."""
    rng = np.random.default_rng(0)
    obs, next_obs = (rng.standard_normal((500, 2, 5)) * ENV.obs_mask for _ in range(2))
    action, falls = np.tanh(rng.standard_normal((500, 2, 3))) * ENV.action_mask, np.arange(500) % 3 == 0
    offline = SimpleNamespace(
        obs=obs, next_obs=next_obs, actions=action, rewards=rng.standard_normal((500, 2)), terminations=falls,
        next_known=np.ones(500, bool), episodes=np.stack([np.arange(0, 500, 25), np.arange(25, 501, 25)], 1),
    )  # fmt: skip
    state, next_state = rng.standard_normal((2, 500, 4))
    online = dict(obs=obs, next_obs=next_obs, state=state, next_state=next_state, action=action, terminated=falls)
    return offline, online | dict(reward=rng.standard_normal(500))


class Learner:
    """What `train` has in hand: an agent, its data, and the function that it captures; always the same weights."""

    def __init__(self, program, changes, device=CPU, captured=False):
        small = dict(policy_hidden=16, critic_hidden=24, batch_size=24)
        own = {omad: dict(n_atoms=21, v_min=-9.0, v_max=9.0, alpha=0.1, denoising_steps=3, bn_warmup=10), dom2: {}}[
            program
        ]
        self.args, self.device, self.program = program.Args(**small | own | changes), device, program
        torch.manual_seed(0)
        self.agent, (offline, online) = (
            {omad: omad.OMAD, dom2: dom2.DOM2}[program](ENV, self.args, device),
            random_data(),
        )
        if program is omad:
            self.data = omad.Replay(ENV, 600, device)
            self.data.add(**online)
        else:
            self.data = dom2.Data(offline, ENV, self.args, device)
            self.data.set_units(self.agent, self.args)
        self.runs, self.calls, self.learn = 0, 0, program.graphed(self._learn, captured)

    def _learn(self, rows, *drawn):
        self.runs += 1
        return self.agent.update(self.data.sample(rows), *drawn)

    def draw(self, chains=2):
        if self.program is dom2:
            return self.data.draw(self.args.batch_size), *self.agent.draw()
        noise = [self.agent.policy.noise(self.args.batch_size) for _ in range(chains)]
        return torch.randint(500, (self.args.batch_size,), device=self.device), *noise

    def step(self):
        """One update as in training: omad's policies learn in every second."""
        self.calls += 1
        return self.learn(*self.draw(1 + self.calls % 2))

    def tensors(self):
        """Everything that an update may change, by name."""
        found = dict(self.agent.state_dict())
        for i, adam in enumerate(self.agent.adams):
            for j, p in enumerate(adam.param_groups[0]["params"]):
                found |= {f"adam {i}, {j}: {name}": x for name, x in adam.state[p].items()}
        return found


# --- what a graph needs of an update, and `graphed` with a stand-in for CUDA ---


class Watch(TorchDispatchMode):
    """Operators that make the host wait for a value, read its memory or draw: a CUDA graph can hold none of them."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "lift_fresh")
    DRAW = ("rand", "normal", "bernoulli", "dropout", "multinomial", "uniform", "exponential")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        bool_index = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name.startswith(self.WAIT + self.DRAW) or bool_index:
            self.found.append(name)
        return function(*args, **kwargs or {})


@variants
def test_an_update_neither_waits_nor_draws(program, changes):
    learner = Learner(program, changes)
    drawn, noise, obs = learner.draw(), learner.agent.policy.noise(2), torch.zeros(2, 2, 5)
    with Watch() as watch:
        learner.learn(*drawn), learner.agent.policy(obs, noise)
    assert watch.found == []
    with Watch() as watch:
        torch.ones(2).sum().item(), torch.randn(2), torch.ones(2)[torch.ones(2) > 0], torch.tensor(1.0)
    assert {"_local_scalar_dense", "randn", "index", "lift_fresh"} <= set(watch.found)  # the watch does see them


@variants
def test_an_update_changes_its_tensors_in_place(program, changes):
    """A graph replays on fixed addresses. The first update makes the optimisers' states."""
    learner = Learner(program, changes)
    learner.step()
    before = {name: (x.data_ptr(), x.clone()) for name, x in learner.tensors().items()}
    for _ in range(4):
        learner.step()
    after = learner.tensors()
    assert after.keys() == before.keys()
    assert [name for name, x in after.items() if x.data_ptr() != before[name][0]] == []
    assert sum(not torch.equal(x, before[name][1]) for name, x in after.items()) > 0.6 * len(after)


class FakeGraph(TorchDispatchMode):
    """Stands for a CUDA graph, see above."""

    def __init__(self):
        super().__init__()
        self.operators, self.undo = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = dict(zip((argument.name for argument in function._schema.arguments), args)) | (kwargs or {})
        for argument in function._schema.arguments:
            if argument.alias_info and argument.alias_info.is_write:
                self.undo += [(x, x.clone()) for x in tree_leaves(given.get(argument.name)) if torch.is_tensor(x)]
        result = function(*args, **kwargs or {})
        self.operators.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for x, before in reversed(self.undo):
            x.copy_(before)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operators:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    """Where `graphed` captures: in real graphs on a GPU, or in fakes on the CPU."""
    if request.param == "cuda":
        before = torch.get_float32_matmul_precision()
        yield omad.pick_device("cuda")
        torch.set_float32_matmul_precision(before)
        return
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    yield CPU


def capture_everywhere(monkeypatch):
    """`graphed` captures on the CPU too. Returns a list that grows with each function that it gets."""
    got = []
    for program in (omad, dom2):
        captured = functools.partial(program.graphed, enabled=True)
        monkeypatch.setattr(
            program, "graphed", lambda function, _, captured=captured: got.append(1) or captured(function)
        )
    return got


@programs
def test_graphed(program, device):
    """Three plain calls, then a graph for each set of shapes, with places of its own for what comes in and goes out."""
    total, seen = torch.zeros(2, device=device), []

    def function(x, y):
        seen.append(x)
        total.add_(x.sum(0))
        return {"sum": total + y.sum(0), "twice": 2 * x}

    assert program.graphed(function, False) is function
    call, want, given, results = program.graphed(function, True), torch.zeros(2), [], []
    for i in range(6):
        x, y = torch.full((3, 2), float(i + 1)), torch.rand(4, 2)
        given.append((x.to(device), y.to(device)))
        got, want = call(*given[-1]), want + 3 * (i + 1)
        torch.testing.assert_close(got["sum"].cpu(), want + y.sum(0))
        torch.testing.assert_close(got["twice"].cpu(), 2 * x)
        torch.testing.assert_close(total.cpu(), want)  # also in the call that captures, once
        results.append(got)
    assert all((x == i + 1).all() for i, (x, _) in enumerate(given))  # what came in is as it was
    assert len(seen) == 4 and results[3] is results[4] is results[5] is not results[2]
    x = torch.ones(5, 2, device=device)
    for i in range(5):  # other shapes, another graph
        assert call(x, x)["twice"].shape == (5, 2) and len(seen) == min(5 + i, 8)
    torch.testing.assert_close(total.cpu(), want + 25)
    call(torch.ones(3, 2, device=device), torch.ones(4, 2, device=device))  # the first is still there
    assert len(seen) == 8 and results[5]["twice"].eq(2).all()
    torch.testing.assert_close(total.cpu(), want + 28)


@variants
def test_captured_updates_equal_eager_ones(program, changes, device):
    """Losses and all that learns; on a GPU but for rounding, which grows from update to update."""
    logs, ends, exact = [], [], device == CPU
    start = Learner(program, changes, device).agent.state_dict()
    for captured in (False, True):
        learner = Learner(program, changes, device, captured)
        torch.manual_seed(1)
        logs.append([{name: x.item() for name, x in learner.step().items()} for _ in range(12)])
        ends.append(learner.tensors())
        assert learner.runs == (12 if not captured else 8 if program is omad else 4)
    for want, got in zip(*logs):
        losses = {name: x for name, x in want.items() if exact or name.startswith("losses/")}
        close = dict(rel=1e-6, abs=1e-6) if exact else dict(rel=2e-3, abs=2e-3)
        assert want.keys() == got.keys() and {name: got[name] for name in losses} == pytest.approx(losses, **close)
    for name, x in ends[0].items() if exact else ():
        torch.testing.assert_close(ends[1][name], x, rtol=1e-6, atol=1e-6, msg=name)
    flat = lambda tensors: torch.cat([tensors[name].flatten().double() for name in start])
    assert (flat(ends[1]) - flat(ends[0])).norm() < 0.1 * (flat(ends[0]) - flat(start)).norm()


@pytest.mark.parametrize("program", [omad, dom2])
def test_a_captured_update_reads_the_learning_rates_of_the_moment(program, device):
    """A graph into which the first rate was burnt would go on at full speed at the end of the training."""
    learner = Learner(program, {}, device, captured=True)
    for _ in range(12):
        learner.step()
    for network, adam in zip((learner.agent.policy, learner.agent.critic), learner.agent.adams):
        usual, moved = adam.param_groups[0]["lr"].item(), []
        for share in (1.0, 0.01, 0.0):
            adam.param_groups[0]["lr"].fill_(share * usual)
            before = [p.clone() for p in network.parameters()]
            for _ in range(3):  # OMAD's policies learn in every third update
                learner.step()
            moved.append(max((p - q).abs().max().item() for p, q in zip(network.parameters(), before)))
        assert moved[0] > 10 * moved[1] > 0 and moved[2] == 0
        assert learner.runs == (8 if program is omad else 4)


@variants
def test_captured_actions_equal_eager_ones(program, changes, device, monkeypatch):
    learner, rng = Learner(program, changes, device), np.random.default_rng(0)
    learner.step()
    policy, args = learner.agent.policy, learner.args
    eager = program.make_act(policy, dataclasses.replace(args, cuda_graph=False))
    got = capture_everywhere(monkeypatch) if device == CPU else None
    captured = program.make_act(policy, args)
    assert got is None or len(got) == 1
    for i in range(10):
        obs = (rng.standard_normal((3 + i % 2, 2, 5)) * ENV.obs_mask).astype(np.float32)
        torch.manual_seed(i)
        want = eager(obs)
        torch.manual_seed(i)
        np.testing.assert_allclose(captured(obs), want, atol=1e-6 if device == CPU else 1e-3)
        assert want.shape == (3 + i % 2, 2, 3)


FLAGS = "--policy-hidden 16 --critic-hidden 16 --batch-size 16 --eval-episodes 3 --device cpu".split()
ONLINE = "--total-timesteps 200 --num-envs 4 --eval-every 100 --learning-starts 80 --updates-per-step 0.25".split()
OFFLINE = "--total-updates 10 --eval-every 5 --solver-steps 3".split()


@pytest.fixture
def call(program, tmp_path, capsys, data):
    """A short run of a program on the CPU, with more flags -> its directory, (exit code, stdout, stderr)."""
    main, flags = caller(program.main, tmp_path, capsys), ["--dataset", data, *OFFLINE] if program is dom2 else ONLINE

    def run(*more):
        there = set(tmp_path.glob("*__*"))
        done = main(*FLAGS, *flags, *more)
        return next(iter(set(tmp_path.glob("*__*")) - there)), done

    run.resume = lambda path, *more: main("--resume", path, *more, run_dir=False)
    return run


def curve(run):
    return [{k: v for k, v in row.items() if k != "wall_time_s"} for row in csv.DictReader((run / "eval.csv").open())]


@programs
def test_a_whole_run_in_graphs_is_the_same_as_one_without(call, program, monkeypatch, device):
    if device != CPU:
        pytest.skip("only the stand-in rounds alike")
    plain, (code, _, err) = call()
    assert code == 0, err
    got = capture_everywhere(monkeypatch)
    captured, (code, _, err) = call()
    assert code == 0 and len(got) == 2, err  # the update, and acting
    assert curve(captured) == curve(plain) and len(curve(plain)) == 3


@programs
def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(call, program, tmp_path, monkeypatch):
    """Its random numbers do not fit there (16 bytes, not 5056), and its optimisers were made for graphs."""
    run, (code, _, err) = call()
    assert code == 0, err
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["random"] = torch.arange(16, dtype=torch.uint8)
    for state in saved["adams"]:
        for group in state.get("param_groups", []):
            group["capturable"] = True
    torch.save(saved, run / "checkpoint.pt")
    step, seen = torch.optim.Adam.step, set()
    spy = lambda adam, *args: seen.update(group["capturable"] for group in adam.param_groups) or step(adam, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    total = ["--total-timesteps", 300] if program is omad else ["--total-updates", 15]
    code, _, err = call.resume(run, *total)
    assert code == 0 and len(curve(run)) == 4, err
    assert seen == {False}  # as this device needs it; on a GPU a graph refuses to capture Adam with False


@pytest.mark.parametrize("program", [omad])
def test_learning_comes_after_acting_and_before_the_environments_step(call, program, monkeypatch):
    """So a GPU learns while they do; an update knows all transitions but the newest."""
    order, (sample, step, make_act) = [], (omad.Replay.sample, omad.RecordPositions.step, omad.make_act)
    latest = []  # row of each batch, beside how many there are

    def spy_act(*args):
        act = make_act(*args)
        return lambda obs: order.append("act") or act(obs)

    monkeypatch.setattr(omad, "make_act", spy_act)

    def spy_sample(self, rows):
        order.append(self.added), latest.append((rows.max().item(), self.added))
        return sample(self, rows)

    monkeypatch.setattr(omad.Replay, "sample", spy_sample)
    monkeypatch.setattr(omad.RecordPositions, "step", lambda self, x: order.append("step") or step(self, x))
    _, (code, _, err) = call()
    assert code == 0 and [x for x in order if isinstance(x, int)] == list(range(84, 200, 4)), err
    assert {tuple(order[i - 1 : i + 2 : 2]) for i, x in enumerate(order) if isinstance(x, int)} == {("act", "step")}
    assert all(row < added for row, added in latest) and max(row / added for row, added in latest) > 0.95


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch):
    before, streams = torch.get_float32_matmul_precision(), []
    assert omad.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream of its own")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    try:
        for there in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
            assert omad.pick_device("auto").type == ("cuda" if there else "cpu") and len(streams) == there
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# --- on a GPU only ---


@gpu
@programs
def test_an_update_on_a_gpu_never_waits(program):
    for captured in (False, True):
        learner = Learner(program, {}, omad.pick_device("cuda"), captured)
        for _ in range(8):
            learner.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                learner.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@variants
def test_gpu_equals_cpu(program, changes):
    """The same updates from the same weights, with the same random numbers, in full float32, on both devices."""
    before = torch.get_float32_matmul_precision()
    here, there = Learner(program, changes), Learner(program, changes, omad.pick_device("cuda"))
    torch.set_float32_matmul_precision("highest")
    try:
        for _ in range(3):
            drawn = here.draw()
            want, got = here.learn(*drawn), there.learn(*(x.cuda() for x in drawn))
            for name in (name for name in want if name.startswith("losses/")):
                assert got[name].item() == pytest.approx(want[name].item(), rel=2e-3, abs=2e-3), name
    finally:
        torch.set_float32_matmul_precision(before)


@gpu
@pytest.mark.slow
@programs
def test_compiled_losses_in_graphs(program):
    torch.compiler.reset()
    logs = []
    for compile in (False, True):
        learner = Learner(program, dict(compile=compile), omad.pick_device("cuda"), captured=True)
        torch.manual_seed(1)
        logs.append([{name: x.item() for name, x in learner.step().items()} for _ in range(10)])
    for want, got in zip(*logs):
        losses = {name: x for name, x in want.items() if name.startswith("losses/")}
        assert {name: got[name] for name in losses} == pytest.approx(losses, rel=5e-3, abs=5e-3)


@gpu
@programs
def test_a_killed_run_on_a_gpu_and_its_checkpoint_elsewhere(call, program, tmp_path, monkeypatch):
    evaluations, evaluate = [], program.evaluate

    def stop(*args):
        evaluations.append(1)
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(program, "evaluate", stop)
    run, (code, _, err) = call("--device", "cuda")
    assert code == 130 and len(curve(run)) == 2, err
    assert call.resume(run)[0] == 0 and len(curve(run)) == 3
    flag, totals = ("--total-timesteps", (300, 400)) if program is omad else ("--total-updates", (15, 20))
    for total, device, count in zip(totals, ("cpu", "cuda"), (4, 5)):
        code, _, err = call.resume(run, flag, total, "--device", device)
        assert code == 0 and len(curve(run)) == count, err


@pytest.mark.slow
def test_rehearsal_of_the_script_for_a_gpu(tmp_path):
    """It makes what is missing, and only that; what fails is kept, named, and made again."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def rehearse(*flags):
        command = ["bash", str(ROOT / "runs" / "gpu.sh"), "--device", "cpu", "--out", str(tmp_path), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout.splitlines()

    code, said = rehearse()
    assert code == 0, said
    made = {path.stem for path in tmp_path.glob("*.txt")}
    assert made >= {"parity", "speed_omad", "speed_dom2_spread", "graph", "four_1", "four_4", "compiled", "training"}
    assert len(said) == len(made) and len([*tmp_path.glob("four/*/eval.csv")]) == 4
    assert len([*tmp_path.glob("training/**/fresh.csv")]) == 2 and (tmp_path / "speed_omad.csv").exists()
    (tmp_path / "eager.txt").unlink()
    (tmp_path / "eager").rename(tmp_path / "before")
    (tmp_path / "eager").touch()  # no folder of runs can be made there
    code, said = rehearse()
    assert code == 1 and said[1:] == [str(tmp_path / "eager.failed")] and "--no-cuda-graph" in said[0]
    (tmp_path / "eager").unlink()
    assert rehearse()[0] == 0 and not [*tmp_path.glob("*.failed")] and rehearse("--what")[0] == 2


# --- compiling ---


@programs
def test_compiled_losses_equal_plain_ones(program, monkeypatch):
    """Traced and differentiated as for a compiler, but run by torch's operators: generating code takes minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    acts, logs = [], []
    obs = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32) * ENV.obs_mask
    for compile in (False, True):
        steps = dict(denoising_steps=2) if program is omad else dict(solver_steps=2)  # little to trace
        learner = Learner(program, dict(compile=compile) | steps)
        torch.manual_seed(1)
        logs.append([{name: x.item() for name, x in learner.step().items()} for _ in range(4)])
        acts.append(program.make_act(learner.agent.policy, learner.args)(obs))
    for want, got in zip(*logs):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(acts[1], acts[0], atol=1e-3)

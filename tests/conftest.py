"""Shared by all tests: one torch thread, so that runs are repeatable and two test processes do not slow each other."""

import contextlib
import csv
import functools
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pytest
import torch

import dom2
import omad

torch.set_num_threads(1)
# tyro reads the programs' source text for its help in every call: half of all the time of the tests of command lines.
_lines, _cached_lines = inspect.getsourcelines, functools.cache(inspect.getsourcelines)
inspect.getsourcelines = lambda thing: _cached_lines(thing) if isinstance(thing, type) else _lines(thing)
ROOT = Path(__file__).parent.parent

# A run of a second that still does everything: 80 critic updates, 26 policy updates, 5 evaluations and checkpoints.
SHORT = (
    "--total-timesteps 400 --num-envs 4 --eval-every 100 --eval-episodes 3 --learning-starts 80 --batch-size 32 "
    "--updates-per-step 0.25 --policy-hidden 16 --critic-hidden 16 --denoising-steps 3 --device cpu"
).split()
SHORT_OFFLINE = (
    "--total-updates 40 --eval-every 10 --eval-episodes 4 --batch-size 16 --policy-hidden 16 --critic-hidden 16 "
    "--solver-steps 3 --device cpu"
).split()


# --- the programs in this process ---


def caller(main, tmp_path, capsys):
    """call("--seed", "1") -> (exit code, stdout, stderr) of a program's `main` here. Its runs land in tmp_path."""

    def call(*argv, run_dir=True):
        capsys.readouterr()
        try:
            code = main([*map(str, argv), *(["--run-dir", str(tmp_path)] if run_dir else [])])
        except SystemExit as stop:  # of tyro
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def cli(tmp_path, capsys):
    """Runs omad.main in this process, see `caller`."""
    return caller(omad.main, tmp_path, capsys)


@dataclass
class Program:
    """One of the two programs, for tests of what both have."""

    name: str
    module: ModuleType
    call: Callable  # see `caller`; runs land in `folder`
    flags: list[str]  # of a run of a second
    total: str  # the flag of a run's length
    length: int  # that of `flags`
    every: int  # steps between its evaluations
    steps: str  # the flag K
    folder: Path
    whole: Path  # such a run, finished: not to be changed
    out: str  # what it printed

    def runs(self) -> list[Path]:
        """In the order in which they were begun."""
        return sorted(self.folder.glob(f"*__{self.name}__*"), key=lambda path: path.name.split("__")[-1])

    def copy(self) -> Path:
        """A copy of the finished run."""
        return shutil.copytree(self.whole, self.folder / self.whole.name)


@pytest.fixture(params=["omad", "dom2"])
def program(request, tmp_path, capsys, data, finished):
    whole, out = finished[request.param]
    folder = tmp_path / "runs"
    if request.param == "omad":
        call = caller(omad.main, folder, capsys)
        return Program(
            "omad", omad, call, SHORT, "--total-timesteps", 400, 100, "--denoising-steps", folder, whole, out
        )
    call, flags = caller(dom2.main, folder, capsys), ["--dataset", str(data), *SHORT_OFFLINE]
    return Program("dom2", dom2, call, flags, "--total-updates", 40, 10, "--solver-steps", folder, whole, out)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """What a user types, as a process of its own: program -> (the run's directory, what was printed)."""
    started, result = {}, {}
    for name, flags in (("omad", SHORT), ("dom2", ["--dataset", str(data), *SHORT_OFFLINE])):
        folder, command = tmp_path_factory.mktemp(name), [sys.executable, str(ROOT / f"{name}.py"), *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started[name] = folder, subprocess.Popen(command, cwd=folder, **pipes)
    for name, (folder, process) in started.items():
        out = process.communicate(timeout=120)[0]
        assert process.returncode == 0, out
        (run,) = folder.glob("runs/*__*__*")
        result[name] = run, out
    return result


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small data set of omar_simple_spread, as a folder."""
    import collect

    return collect.collect(collect.Options("omar_simple_spread-random", 2000, out=tmp_path_factory.mktemp("data")))


# --- the programs in a process that dies ---


def at_call(owner, name: str, count: int, action: Callable, counts: Callable = lambda *args: True) -> None:
    """From now on, `action` comes before the `count`-th of those calls of `owner.name` that count."""
    function, calls = getattr(owner, name), []

    def instead(*args, **kwargs):
        if counts(*args):
            calls.append(args)
            if len(calls) == count:
                action(*args)
        return function(*args, **kwargs)

    setattr(owner, name, instead)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(*_) -> None:
    Path("waiting").touch()
    time.sleep(600)


def tear(_, path: Path) -> None:
    """Instead of torch.save: half a file, and death."""
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    die()


def child(name: str, argv: list[str], moment: str, action: Callable, folder: Path) -> None:
    """A program in a process of its own and in `folder`, until something happens to it at a moment:

    "update 10" or "evaluate 1": before that call of it; "write policy.pt 2": before its second version takes its place;
    "save checkpoint.pt 2": when half of that is written; "limit 1000": from the start, files of 1000 bytes at most.
    """
    os.chdir(folder)
    program, agent = {"omad": (omad, omad.OMAD), "dom2": (dom2, dom2.DOM2)}[name]
    what, *file, count = moment.split()
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(count), int(count)))
    elif what == "write":
        at_call(Path, "replace", int(count), action, lambda _, target: target.name == file[0])
    elif what == "save":
        at_call(torch, "save", int(count), tear, lambda _, path: file[0] in path.name)
    else:
        at_call(agent if what == "update" else program, what, int(count), action)
    with Path("out").open("w") as out, Path("err").open("w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program.main(argv)
    sys.exit(code)


@pytest.fixture(scope="session")
def context():
    """Makes processes as forks of a clean one that has imported everything, which takes seconds, once."""
    result = multiprocessing.get_context("forkserver")
    result.set_forkserver_preload(["conftest", "torch._dynamo"])  # the latter for optimisers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 does not hand it on
        multiprocessing.forkserver.ensure_running()
    return result


@pytest.fixture
def start(tmp_path, context):
    """start("omad", ["--seed", "1"], "update 10") -> a process of `child`, which has begun; by default it dies then."""
    processes = []

    def begin(name, argv, moment, action=die):
        folder = tmp_path / f"child{len(processes)}"
        folder.mkdir()
        processes.append(context.Process(target=child, args=(name, [*map(str, argv)], moment, action, folder)))
        processes[-1].start()
        processes[-1].folder = folder
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join()


# --- what a run leaves ---


def the_run(folder: Path) -> Path:
    """The only run of dom2.py in `folder`/runs."""
    (run,) = (folder / "runs").glob("*__dom2__*")
    return run


def rows(run: Path) -> list[dict[str, str]]:
    """eval.csv but for the time."""
    table = csv.DictReader((run / "eval.csv").open())
    return [{name: value for name, value in row.items() if name != "wall_time_s"} for row in table]


def load(path: Path) -> dict:
    """A checkpoint.pt or policy.pt."""
    return torch.load(path, weights_only=True)


def equal(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are the same to the last bit, but for times."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key in ("seconds", "wall_time_s") or equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(result, *words) -> bool:
    """Whether (code, stdout, stderr) is bad input: code 2, no traceback, and every word in what is said."""
    code, out, err = result
    text = " ".join(err.replace("│", " ").split())
    return code == 2 and "Traceback" not in err and all(str(word) in text for word in words) and "eval at" not in out


def one_line(err: str, name: str) -> bool:
    return err.startswith(f"{name}.py: error: ") and len(err.splitlines()) == 1 and len(err) < 400

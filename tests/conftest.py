"""Shared by all tests: one torch thread, so that runs are repeatable and two test processes do not slow each other."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import pytest
import torch

import dom2
import omad

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

# A run of a few seconds that still does everything: 80 critic updates, 26 policy updates, 5 evaluations and checkpoints.
SHORT = (
    "--total-timesteps 400 --num-envs 4 --eval-every 100 --eval-episodes 3 --learning-starts 80 --batch-size 32 "
    "--updates-per-step 0.25 --policy-hidden 16 --critic-hidden 16 --denoising-steps 3 --device cpu"
).split()
SHORT_OFFLINE = (
    "--total-updates 40 --eval-every 10 --eval-episodes 4 --batch-size 16 --policy-hidden 16 --critic-hidden 16 --solver-steps 3 --device cpu"
).split()


def caller(main, tmp_path, capsys):
    """call("--seed", "1") -> (exit code, stdout, stderr) of a program's `main` in this process. Its runs land in tmp_path."""

    def call(*argv, run_dir=True):
        capsys.readouterr()
        code = main([*map(str, argv), *(["--run-dir", str(tmp_path)] if run_dir else [])])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def cli(tmp_path, capsys):
    """Runs omad.main in this process, see `caller`."""
    return caller(omad.main, tmp_path, capsys)


@pytest.fixture
def start():
    """Starts `python omad.py ARGS` as a process of its own and returns the Popen object."""
    processes = []

    def popen(*argv, **kwargs):
        command = [sys.executable, str(ROOT / "omad.py"), *map(str, argv)]
        kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) | kwargs
        processes.append(subprocess.Popen(command, **kwargs))
        return processes[-1]

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(params=["omad", "dom2"])
def program(request, tmp_path, capsys, data):
    """(its call, see `caller`; its name; the flags of a run of seconds)."""
    flags = {"omad": SHORT, "dom2": ["--dataset", str(data), *SHORT_OFFLINE]}[request.param]
    return caller({"omad": omad, "dom2": dom2}[request.param].main, tmp_path / "runs", capsys), request.param, flags


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small data set of omar_simple_spread, as a folder."""
    import collect

    return collect.collect(collect.Options("omar_simple_spread-random", 2000, out=tmp_path_factory.mktemp("data")))


def the_run(tmp_path):
    (run,) = (tmp_path / "runs").glob("*__*__*")
    return run


def one_line(err, name):
    return err.startswith(f"{name}.py: error: ") and len(err.splitlines()) == 1 and len(err) < 400

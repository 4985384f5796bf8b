"""Both programs: what --resume and --evaluate refuse, so that no result is lost."""

import shutil
import subprocess
import sys
import time

import pytest

import dom2
import omad
from conftest import ROOT, caller, one_line, the_run

RESULTS = ROOT / "runs" / "results"


def contents(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}


# --- a run without a checkpoint ---


@pytest.mark.parametrize("path", ["omad_gaussian/*__1__*", "omad_batch_128/*__1__*", "offline/omar_simple_spread-medium/dom2/*__1__*"])
def test_committed_results_are_not_run_over(path, tmp_path, capsys):
    """They have no checkpoint.pt. Today's flags or yesterday's: nothing there is touched, and the reason is said."""
    (committed,) = RESULTS.glob(path)
    run = tmp_path / "runs" / committed.name
    shutil.copytree(committed, run)
    before, name = contents(run), "dom2" if "__dom2__" in run.name else "omad"
    call = caller({"omad": omad, "dom2": dom2}[name].main, tmp_path, capsys)
    for flag in ("--evaluate", "--resume"):
        code, out, err = call(flag, run, run_dir=False)
        assert code == 2 and one_line(err, name) and str(run) in err and "no weights" in err and "--resume" not in err and not out, err
    assert contents(run) == before


def test_a_run_killed_before_its_first_checkpoint_can_be_resumed_though_its_first_evaluation_is_there(program, tmp_path):
    call, name, flags = program
    assert call(*flags)[0] == 0
    run = the_run(tmp_path)
    (run / "checkpoint.pt").unlink()
    whole = (run / "eval.csv").read_text().splitlines()
    code, _, err = call("--resume", run, run_dir=False)
    assert code == 2 and one_line(err, name)
    (run / "eval.csv").write_text("\n".join(whole[:2]) + "\n")  # the head and step 0
    code, out, err = call("--evaluate", run, run_dir=False)
    assert code == 2 and one_line(err, name) and f"--resume {run}" in err
    code, _, err = call("--resume", run, run_dir=False)
    assert code == 0, err
    assert [line.split(",")[0] for line in (run / "eval.csv").read_text().splitlines()] == [line.split(",")[0] for line in whole]


# --- one process at a time ---


def test_a_directory_has_one_trainer_at_a_time(program, tmp_path):
    """Neither a run that still trains nor one that is being resumed can be resumed beside it; a killed one can."""
    call, name, flags = program
    total = {"omad": "--total-timesteps", "dom2": "--total-updates"}[name]
    command, rows_before = [*flags, "--run-dir", str(tmp_path / "runs")], 1
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / f"{name}.py"), *command, total, "6000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            deadline = time.time() + 60
            while time.time() < deadline and process.poll() is None:
                found = list((tmp_path / "runs").glob(f"[!.]*__{name}__*/eval.csv"))
                if found and len(found[0].read_text().splitlines()) > rows_before + 2:
                    break
                time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()
            run = the_run(tmp_path)
            config = (run / "config.json").read_bytes()
            code, out, err = call("--resume", run, run_dir=False)
            assert code == 2 and one_line(err, name) and str(run) in err and not out, err
            assert process.poll() is None and (run / "config.json").read_bytes() == config
            assert call("--evaluate", run, run_dir=False)[0] == 0  # it only reads
        finally:
            process.kill()
            process.communicate()
        rows_before = len((run / "eval.csv").read_text().splitlines())
        command = ["--resume", str(run)]
    step = int((run / "eval.csv").read_text().splitlines()[-1].split(",")[0])
    code, _, err = call("--resume", run, total, step + 100, run_dir=False)
    assert code == 0, err
    assert call("--resume", run, total, step + 200, run_dir=False)[0] == 0  # and again, from the same process

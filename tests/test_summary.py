"""The tables of the committed online results."""

import csv
import re
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "runs"))
import summary

RESULTS = ROOT / "runs" / "results"


def test_there_is_a_table_for_each_task_of_the_committed_runs(tmp_path, capsys):
    """Runs of DOM2 lie among them, and runs from before a flag got its name."""
    summary.main(["--picture", str(tmp_path / "curves.png")])
    out = capsys.readouterr().out
    folders = {path.parent.parent for path in RESULTS.rglob("*__omad__*/eval.csv")}
    tasks = {path.name.partition("__omad__")[0] for folder in folders for path in folder.glob("*__omad__*")}
    assert set(re.findall(r"^m\S+$", out, re.MULTILINE)) == tasks and len(tasks) > 3
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in out.splitlines() if line.startswith("| ")
    }
    assert set(rows) == {folder.name for folder in folders} | {"variant"}
    last = [list(csv.DictReader(path.open()))[-1] for path in sorted((RESULTS / "omad").glob("*/eval.csv"))]
    values = [float(row["return_mean"]) for row in last]
    assert rows["omad"][1:3] == ["1, 2, 3", "100,000"]
    assert rows["omad"][4] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_such_runs_is_named(tmp_path):
    with pytest.raises(SystemExit, match="offline_longer"):
        summary.main([str(RESULTS / "offline_longer"), "--picture", str(tmp_path / "x.png")])

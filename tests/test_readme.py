"""The README says what is true of this commit: files and their lengths, flags, figures that stand in a results file."""
import json
import os
import re

import twosome

ROOT = os.path.dirname(os.path.abspath(twosome.__file__))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()


def test_every_file_named_exists_and_has_the_lines_it_says():
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.MULTILINE)
    assert {"twosome.py", "scoring.py", "envs.py", "prompts.py", "ppo.py", "models.py", "runs.py", "pocket_lm/pretrain.py"} <= {name for name, _ in rows}
    for name, count in rows:
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            assert len(file.readlines()) == int(count), name
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_every_flag_named_is_one(capsys):
    try:
        twosome.main(["--help"])
    except SystemExit:
        pass
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    commands = [line for line in README.splitlines() if "twosome.py" in line and "accelerate" not in line and "torchrun" not in line]
    assert {flag for line in commands for flag in re.findall(r"--[a-z][a-z-]+", line)} <= known


def test_the_learning_table_is_the_measured_one():
    with open(os.path.join(ROOT, "experiments", "results", "learning.json"), encoding="utf-8") as file:
        result = json.load(file)
    for task, row in result["tasks"].items():
        assert f"| {task} | {row['steps']:,} | {', '.join(f'{value:.4f}' for value in row['returns'])} |" in README

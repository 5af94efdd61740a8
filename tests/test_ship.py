"""A run made small still acts alike; the one in examples/ is small and whole."""
import json
import os

import pytest
import torch

import twosome
from engine import runs
from experiments import ship

EXAMPLE = os.path.join(ship.__file__, "..", "..", "examples", "tomato-salad-smollm2")
SHORT = "--steps 128 --num-envs 4 --rollout-steps 16 --episodes 2".split()


def test_a_run_made_small_acts_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert twosome.main([*SHORT, "--out", "run"]) == 0
    assert ship.main(["run", "small"]) == 0
    sizes = [sum(os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(folder)
                 for name in names) for folder in ("run", "small")]
    assert sizes[1] < sizes[0] / 4
    agents = [twosome.load(folder) for folder in ("run", "small")]
    env = agents[0][1]()
    item = agents[0][0].describe(*env.reset(seed=0))
    with torch.no_grad():
        scores = [agent.log_probs([item])[0] for agent, _ in agents]
        values = [agent.values([item]) for agent, _ in agents]
    assert torch.allclose(*scores, atol=1e-3) and torch.allclose(*values, atol=1e-3)
    assert "holds no" not in capsys.readouterr().err


@pytest.mark.parametrize("given, line", [
    ([], "give a run's folder"), (["x", "y"], "no checkpoint")])
def test_what_cannot_be_shipped_is_one_line(given, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=line):
        ship.main(given)


def test_the_shipped_run_is_small_whole_and_of_no_machine():
    folder = os.path.realpath(EXAMPLE)
    runs.find(folder)  # which verifies every checksum
    names = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    assert sum(map(os.path.getsize, names)) < 4_000_000
    for name in names:
        if name.endswith(".json"):
            with open(name) as file:
                assert '"/' not in json.dumps(json.load(file))

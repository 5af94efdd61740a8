"""The attack: a hundred of its cases, and that it sees what it looks for."""
import os
import signal

import pytest

from experiments import attack

CASE = attack.Case("/", ["--eval"], {0, 2})


@pytest.mark.parametrize("code, output, seconds, trace, fault", [
    (2, "Traceback (most recent call last)\n", 1, "", "traceback"),
    (2, "twosome.py: \x1b[31m\n", 1, "", "control"),
    (2, "twosome.py: \u202e\n", 1, "", "control"),
    (2, "x" * 501, 1, "", "long"),
    (-signal.SIGKILL, "", 61, "", "hang"),
    (2, "", 1, "opened model.bin\n", "pickle"),
    (1, "", 1, "", "code"),
    (2, "go on with: python twosome.py --resume a run\n", 1, "", "hint"),
    (2, "go on with: python twosome.py --resume $(nothing)\n", 1, "", "hint")])
def test_each_fault_is_seen(code, output, seconds, trace, fault):
    assert [name for name, _ in attack.judge(CASE, code, output, seconds, trace)] == [fault]


def test_what_is_taken_well_is_no_fault(tmp_path):
    os.mkdir(tmp_path / "a $(run)")
    case = attack.Case(str(tmp_path), [], {2}, world=True)
    output = ("twosome.py: World.step raised ValueError\nTraceback (most recent call last)\n"
              "  File world.py\ngo on with: python twosome.py --resume 'a $(run)'\n")
    assert attack.judge(case, 2, output, 1, "") == []


def test_a_case_follows_from_its_seed_alone(tmp_path):
    made = []
    for name in ("a", "b"):
        os.mkdir(tmp_path / name)
        made.append(attack.worlds(attack.random.Random("7-worlds-3"), str(tmp_path / name), ""))
    worlds = [(tmp_path / name / "world.py").read_text() for name in ("a", "b")]
    assert worlds[0] == worlds[1] and made[0].argv == made[1].argv


def test_a_hundred_cases_are_taken_well():
    results = attack.campaign(100, seed=2)
    faults = [(name, *fault) for name, found, *_ in results for fault in found]
    assert len(results) == 100 and not faults

"""Several processes against one: the same result, one writer, and an end for all when one dies. On CPUs, through gloo."""
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

import ppo
import runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = "--num-envs 4 --rollout-steps 16 --minibatch 32 --epochs 1 --checkpoint-every 1 --seed 7".split()


def start(processes, folder, *flags):
    """Begin a small run in `folder` with so many processes. Returns their Popens."""
    return launch(processes, *SMALL, "--out", str(folder), *flags)


def launch(processes, *flags, program=(os.path.join(ROOT, "twosome.py"),)):
    """Start a program as so many processes, as torchrun starts them: by environment variables. Returns their Popens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        common.update(WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return [subprocess.Popen([sys.executable, *program, "--device", "cpu", *flags],
                             env={**common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(processes)]


def finish(started):
    """Wait for all: [(exit code, standard output, standard error)]."""
    said = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said)]


def await_checkpoint(folder):
    """Wait for a run's first checkpoint, a minute at most."""
    until = time.time() + 60
    while time.time() < until and not (folder / "checkpoint-1").exists():
        time.sleep(0.05)


def pairs_of_weights(*folders):
    """Name and tensors of each adapter and critic weight in the last checkpoints of two runs, which have the same names."""
    for name in ("adapter_model", "critic"):
        one, two = (safetensors.torch.load_file(runs.find(str(folder)) + f"/{name}.safetensors") for folder in folders)
        assert one.keys() == two.keys()
        yield name, [(key, one[key], two[key]) for key in one]


def test_two_processes_give_the_result_of_one(tmp_path):
    """The same environments, minibatches and sums, in another order of addition: equal within float32's rounding."""
    alone, together = start(1, tmp_path / "one", "--steps", "192"), start(2, tmp_path / "two", "--steps", "192")
    (code, out, error), *both = finish(alone + together)
    assert [code, *(code for code, _, _ in both)] == [0, 0, 0], (error, both)
    assert out.count("final evaluation") == both[0][1].count("final evaluation") == 1
    assert both[1][1:] == ("", "")  # the second says nothing
    for name, weights in pairs_of_weights(tmp_path / "one", tmp_path / "two"):
        assert any(one.abs().max() > 1e-4 for key, one, _ in weights if "lora_B" in key or name == "critic")  # it has learnt
        for _, one, two in weights:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)
    rows = [list(csv.DictReader(open(tmp_path / folder / "metrics.csv"))) for folder in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 3
    assert [row["episodes"] for row in rows[0]] == [row["episodes"] for row in rows[1]]
    # And a run of two goes on where it was: the last of its three updates is done again.
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    (code, out, error), _ = finish(launch(2, "--resume", str(tmp_path / "again"), "--from", "checkpoint-2"))
    assert code == 0 and "final evaluation" in out, error
    for _, weights in pairs_of_weights(tmp_path / "two", tmp_path / "again"):
        for _, two, again in weights:
            torch.testing.assert_close(two, again, rtol=1e-4, atol=2e-5)
    assert len(list(csv.DictReader(open(tmp_path / "again" / "metrics.csv")))) == 3


def test_a_killed_process_ends_the_other_in_one_line_with_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "run"
    first, second = started = start(2, folder, "--steps", "64000")
    await_checkpoint(folder)
    second.send_signal(signal.SIGKILL)
    (code, _, error), (killed, _, _) = finish(started)
    line = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("twosome.py:")]
    assert code == 1 and killed == -signal.SIGKILL
    assert len(line) == 1 and "another process has ended" in line[0] and f"--resume {folder}" in line[0] and "Traceback" not in error
    assert json.load(open(os.path.join(runs.find(str(folder)), "state.json")))["trainer"]["updates"] >= 1


def test_every_way_out_ends_both_processes_in_order(tmp_path):
    """Refused: a line, and 2 from the first, 1 from the other, which has lost it. A signal to one stops both after the update."""
    (tmp_path / "letter.txt").write_text("not a run")
    (code, _, error), (other, _, lost) = finish(start(2, tmp_path))
    assert (code, other) == (2, 1) and "is not empty" in error, (error, lost)
    assert "Traceback" not in error + lost and "terminate called" not in error + lost
    folder = tmp_path / "run"
    first, second = started = start(2, folder, "--steps", "64000")
    await_checkpoint(folder)
    second.send_signal(signal.SIGTERM)
    both = finish(started)
    assert [code for code, _, _ in both] == [143, 143], both
    assert f"go on with: python twosome.py --resume {folder}" in both[0][1] and "Traceback" not in both[0][2] + both[1][2]


EACH = """if True:
    import hashlib, sys
    sys.path.insert(0, sys.argv[1])
    import ppo, twosome
    twosome.join_processes()
    config = twosome.arguments(sys.argv[2:])[0]
    agent, make_env = twosome.build(config)
    trainer = ppo.PPO(make_env, agent, config, config.seed)
    for _ in range(4):
        trainer.iterate()
    weights = [*agent.policy_parameters(), *agent.value_parameters()]
    print(hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in weights)).hexdigest(), file=sys.stderr)
    twosome.part()
"""


def test_all_processes_hold_the_same_policy_and_critic_bit_for_bit():
    """Each takes the critic's steps by itself, and a prompt's feature has other last bits in another batch: they must not drift apart."""
    both = finish(launch(2, *SMALL, "--task", "tomato-lettuce-salad", program=["-c", EACH, ROOT]))
    assert [code for code, _, _ in both] == [0, 0], both
    digests = [error.split()[-1] for _, _, error in both]
    assert len(digests[0]) == 64 and digests[0] == digests[1]


def test_processes_that_do_not_divide_the_environments_are_told(monkeypatch):
    monkeypatch.setattr(ppo, "processes", lambda: (0, 3))
    with pytest.raises(ppo.ConfigError, match="4 environments cannot be split over 3 processes; use a multiple, such as --num-envs 6"):
        ppo.Config(num_envs=4).validate()

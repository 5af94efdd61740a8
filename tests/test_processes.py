"""Several processes against one: the same result, one writer, an end for all when one dies.

On CPUs, through gloo. Most processes are forked from a server that has imported torch already, and
are told their place by environment variables as torchrun tells it; one test starts torchrun itself.
"""
import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

import twosome
from engine import command, processes, runs, trainer

ROOT = os.path.dirname(os.path.abspath(twosome.__file__))
SMALL = ("--num-envs 4 --rollout-steps 16 --minibatch 32 --epochs 1 --checkpoint-every 1 --seed 7"
         " --episodes 4 --device cpu").split()
LONG = ["--steps", "64000"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["twosome"])


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def places(world):
    """Return the environment variables of each process, as torchrun sets them."""
    if world == 1:
        return [{}]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def be_one(work, arguments, place, said):
    """Do some work as one of several processes, and end with its exit code."""
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(place)
    torch.set_num_threads(1)
    sys.exit(work(arguments))


class Group:
    """Some processes at work, which say what they say into files of a folder."""

    def __init__(self, folder, flags, work):
        self.texts, self.all = [], []
        for place, arguments in zip(places(len(flags)), flags, strict=True):
            name = f"{len(os.listdir(folder))}-{place.get('RANK', 0)}"
            said = [os.path.join(folder, f"{name}.{kind}") for kind in ("out", "err")]
            for path in said:
                open(path, "x").close()
            self.texts.append(said)
            self.all.append(FORKS.Process(target=be_one, args=(work, arguments, place, said)))
        for process in self.all:
            process.start()

    def finish(self):
        """Wait for all. Returns [(exit code, standard output, standard error)]."""
        until = time.time() + 60
        for process in self.all:
            process.join(max(0, until - time.time()))
        assert all(process.exitcode is not None for process in self.all), "a process hangs"
        codes = [process.exitcode for process in self.all]
        return [(code, *map(read, said)) for code, said in zip(codes, self.texts, strict=True)]

    def await_checkpoint(self, folder):
        """Wait for a run's first checkpoint."""
        while not runs.checkpoints(str(folder)):
            assert all(process.is_alive() for process in self.all), self.finish()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start processes: so many with the same flags, or one for each list of flags."""
    folder, groups = tmp_path_factory.mktemp("said"), []

    def start(flags, world=None, work=twosome.main):
        groups.append(Group(folder, [flags] * world if world else flags, work))
        return groups[-1]

    yield start
    for group in groups:
        for process in group.all:
            process.kill()


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read().replace("\r", "\n")


def lines(text):
    """Return the lines in which the program says what went wrong."""
    return [line for line in text.splitlines() if line.startswith("twosome.py: ")]


def rows(folder):
    with open(os.path.join(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one, two, **tolerances):
    """Compare adapter and critic in the last checkpoints of two runs."""
    for name in ("adapter_model", "critic"):
        pair = [safetensors.torch.load_file(f"{runs.find(str(folder))}/{name}.safetensors")
                for folder in (one, two)]
        assert pair[0].keys() == pair[1].keys()
        learnt = [key for key in pair[0] if "lora_B" in key or name == "critic"]
        assert any(pair[0][key].abs().max() > 1e-4 for key in learnt)
        for key, weight in pair[0].items():
            torch.testing.assert_close(weight, pair[1][key], **tolerances)


ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


# -----------------------------------------------------------------------------
# The same result.


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory):
    """A run of three updates by one process, and the same by two that torchrun started."""
    folder = tmp_path_factory.mktemp("processes")
    flags = [*SMALL, "--steps", "192", "--out"]
    alone = start([*flags, str(folder / "one")], 1)
    both = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(free_port()), os.path.join(ROOT, "twosome.py"), *flags, str(folder / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    (code, out, error), = alone.finish()
    assert (code, both.returncode) == (0, 0), (error, both.stderr)
    return folder, out, both.stdout


def test_two_processes_give_the_result_of_one(pair):
    """The same environments, minibatches and sums, in another order of addition."""
    folder, _, _ = pair
    assert_same_weights(folder / "one", folder / "two", **ROUNDING)
    one, two = rows(folder / "one"), rows(folder / "two")
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two, strict=True):
        for name in ("update", "steps", "primitive_steps", "episodes", "return", "skipped"):
            assert ours[name] == theirs[name], name
        for name in ("entropy", "policy_loss", "value_loss", "explained_variance"):
            expected = pytest.approx(float(ours[name]), rel=1e-3, abs=1e-4, nan_ok=True)
            assert float(theirs[name]) == expected, name


def test_the_first_process_alone_speaks(pair):
    folder, alone, both = pair
    for text in (alone, both):
        begins = [line[:9] for line in text.splitlines()]
        for word in ("memory   ", "untrained", "trained  ", "next: pyt"):
            assert begins.count(word) == 1, word
    assert alone.count("\n") == both.count("\n")
    assert os.path.exists(folder / "two" / "summary.json")


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_of_two_goes_on_with_one_and_with_two(pair, start, tmp_path, world):
    """The last of its three updates is done again."""
    folder = tmp_path / "again"
    shutil.copytree(pair[0] / "two", folder)
    os.remove(folder / "summary.json")
    group = start(["--resume", str(folder), "--from", "checkpoint-2"], world)
    results = group.finish()
    assert [code for code, _, _ in results] == [0] * world, results
    assert_same_weights(pair[0] / "two", folder, **ROUNDING)
    assert (folder / "checkpoint-3.abandoned").exists()
    again, before = rows(folder), rows(pair[0] / "two")
    assert again[:3] == before[:3] and len(again) == 4
    assert again[3]["episodes"] == before[3]["episodes"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 192


def digest_after_training(arguments):
    """Train three updates, and say which bits the weights of this process have."""
    processes.join()
    config, _ = command.parse(arguments)
    agent, make_env = twosome.build(config)
    learner = trainer.Trainer(make_env, agent, config, config.seed)
    for _ in range(3):
        learner.iterate()
    weights = [*agent.policy_parameters(), *agent.value_parameters()]
    data = b"".join(weight.detach().numpy().tobytes() for weight in weights)
    print(hashlib.sha256(data).hexdigest(), flush=True)
    processes.leave()


@pytest.mark.parametrize("parts", ["1", "3"])
def test_all_processes_hold_the_same_weights_bit_for_bit(start, parts):
    """Each takes the critic's steps by itself: they must not drift apart."""
    flags = [*SMALL, "--task", "tomato-lettuce-salad", "--gradient-accumulation", parts]
    both = start(flags, 2, digest_after_training).finish()
    assert [code for code, _, _ in both] == [0, 0], both
    assert both[0][1] == both[1][1] and len(both[0][1].strip()) == 64


def read_in_an_iteration(arguments):
    """Say what is scored to act, what the update still reads, and what the rollout holds."""
    processes.join()
    config, _ = command.parse(arguments)
    agent, make_env = twosome.build(config)
    learner = trainer.Trainer(make_env, agent, config, config.seed)
    scored, read = [], []
    score, last_hidden = agent.log_probs, agent.last_hidden
    agent.log_probs = lambda items: scored.extend(items) or score(items)
    agent.last_hidden = lambda prompts: read.extend(prompts) or last_hidden(prompts)
    rollout = learner.rollout()
    acted, before = [*scored], len(read)  # the update scores again, with gradients
    learner.update(rollout, torch.ones_like(rollout.rewards), rollout.values)
    print(json.dumps([acted, read[before:], sorted({*rollout.items})]), flush=True)
    processes.leave()


def test_what_one_process_has_scored_or_read_no_other_does_again(start):
    both = start([*SMALL, "--task", "tomato-lettuce-salad"], 2, read_in_an_iteration).finish()
    assert [code for code, _, _ in both] == [0, 0], both
    (one, again, met), (other, too, met_there) = (json.loads(said) for _, said, _ in both)
    assert met == met_there and sorted([*one, *other]) == met  # each once
    assert again == too == []
    assert min(len(one), len(other)) > 0.3 * len(met)


# -----------------------------------------------------------------------------
# Ends.


def test_a_killed_process_ends_the_other_in_one_line_with_a_whole_checkpoint(start, tmp_path):
    folder = tmp_path / "my run"
    group = start([*SMALL, *LONG, "--out", str(folder)], 2)
    group.await_checkpoint(folder)
    group.all[1].kill()
    (code, _, error), (killed, _, _) = group.finish()
    assert (code, killed) == (1, -signal.SIGKILL)
    line, = lines(error)
    assert "another process has ended" in line and f"--resume '{folder}'" in line
    assert os.path.basename(runs.find(str(folder))) in line.split("go on with")[0]
    assert "Traceback" not in error


def test_a_killed_first_process_ends_the_others(start, tmp_path):
    folder = tmp_path / "run"
    group = start([*SMALL, *LONG, "--out", str(folder)], 2)
    group.await_checkpoint(folder)
    group.all[0].kill()
    (killed, _, _), (code, _, error) = group.finish()
    assert (killed, code) == (-signal.SIGKILL, 1)
    line, = lines(error)
    assert "process 1" in line and "another process has ended" in line
    assert "Traceback" not in error and runs.find(str(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_both_after_the_same_update(start, tmp_path, number):
    folder = tmp_path / "run"
    group = start([*SMALL, *LONG, "--out", str(folder)], 2)
    group.await_checkpoint(folder)
    os.kill(group.all[1].pid, number)
    both = group.finish()
    assert [code for code, _, _ in both] == [128 + number] * 2, both
    assert f"go on with: python twosome.py --resume {folder}" in both[0][1]
    assert "Traceback" not in both[0][2] + both[1][2] and not both[1][1]
    stopped = int(re.search(r"stopped after update (\d+)", both[0][1])[1])
    assert runs.find(str(folder)).endswith(f"checkpoint-{stopped}")


def test_what_only_one_process_refuses_is_said_by_that_one(start, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not a run")
    for flags, refuser, word in (
            ([[*SMALL, "--out", str(tmp_path / "full")]] * 2, 0, "empty"),
            ([SMALL, [*SMALL, "--stepz", "3"]], 1, "did you mean --steps")):
        results = start(flags).finish()
        code, out, error = results[refuser]
        other, _, lost = results[1 - refuser]
        assert (code, other) == (2, 1), results
        assert word in lines(error)[0] and "another process has ended" in lines(lost)[0]
        assert len(lines(error)) == len(lines(lost)) == 1
        assert "Traceback" not in error + lost and "terminate called" not in error + lost
        assert not out


@pytest.mark.parametrize("other", [["--seed", "8"], ["--policy-lr", "0.5"], ["--steps", "128"]])
def test_processes_with_different_flags_are_refused(start, tmp_path, other):
    folder = tmp_path / "run"
    flags = [*SMALL, "--steps", "64", "--out", str(folder)]
    results = start([flags, [*flags, *other]]).finish()
    for code, out, error in results:
        assert (code, out) == (2, "")
        line, = lines(error)
        assert "different flags" in line
    assert not folder.exists()


def test_processes_that_do_not_divide_the_environments_leave_no_folder(start, tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--num-envs", "5", "--minibatch", "16", "--out", str(folder)]
    results = start(flags, 2).finish()
    for code, _, error in results:
        assert code == 2
        line, = lines(error)
        assert "num_envs must be a multiple of the 2 processes" in line
    assert not folder.exists()


# -----------------------------------------------------------------------------
# Meeting.


@pytest.fixture
def alone(monkeypatch):
    """Nothing of torchrun's in the environment."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("place", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}, {"WORLD_SIZE": "-1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
    {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "many"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
     "LOCAL_RANK": "first"}])
def test_a_place_that_torchrun_would_not_give_is_one_line(alone, place, capfd):
    for name, value in place.items():
        alone.setenv(name, value)
    assert twosome.main(["--tokens", "go"]) == 2
    printed = capfd.readouterr()
    line, = lines(printed.err)
    assert "torchrun" in line and printed.err.count("\n") == 1 and not printed.out


def test_one_process_needs_nobody(alone):
    for place in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}):
        for name, value in place.items():
            alone.setenv(name, value)
        assert processes.join() == 0 and processes.place() == (0, 1)
    assert processes.gather("me") == ["me"]
    processes.agree({"seed": 1})
    processes.leave()


def test_processes_that_never_come_are_waited_for_aloud_and_not_for_ever(alone, capfd):
    timer = processes.threading.Timer
    alone.setattr(processes, "RENDEZVOUS", 2)
    alone.setattr(processes.threading, "Timer", lambda seconds, *rest: timer(seconds / 20, *rest))
    for name, value in places(2)[0].items():
        alone.setenv(name, value)
    begun = time.time()
    assert twosome.main(["--tokens", "go"]) == 1
    assert time.time() - begun < 15
    printed = capfd.readouterr().err
    line, = lines(printed)
    assert "did not meet: waited up to 2 s" in line and "Traceback" not in printed
    assert "waiting up to 2 s for 2 processes at localhost" in printed
    assert processes.place() == (0, 1)

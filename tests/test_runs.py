"""engine/runs.py: killed, signalled, starved and damaged.

Real processes are killed (experiments/kill_campaign.py runs the long campaign). Whatever is wrong
with a folder must be one line, never a traceback, and its advice must hold when it is pasted.
"""
import contextlib
import csv
import dataclasses
import errno
import itertools
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import peft
import pytest
import tiny
import torch

import twosome
from engine import command, models, runs, trainer
from experiments import kill_campaign

QUICK = ["--env", "overcooked", "--num-envs", "2", "--rollout-steps", "8", "--minibatch", "8",
         "--steps", "112", "--checkpoint-every", "2", "--episodes", "2"]
SMALL = trainer.Config(steps=320, num_envs=2, rollout_steps=4, minibatch=8, epochs=1)
FILES = ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "critic.safetensors",
         "metrics.csv", "optimizers.safetensors", "run_config.json", "state.json"]


class Door:
    """Walking through the door three times ends the episode."""

    def reset(self, seed=None):
        self.room = self.visits = 0
        return self.observe()

    def observe(self):
        prompt = f"You see room {self.room} and a door. You should"
        return None, {"prompt": prompt, "actions": ["open the door", "wait"]}

    def step(self, action):
        self.room += action == 0
        self.visits += 1
        obs, info = self.observe()
        return obs, float(self.room == 3), self.room == 3, self.visits == 9, info

    def state_dict(self):
        return {"room": self.room, "visits": self.visits}

    def load_state_dict(self, state):
        self.room, self.visits = state["room"], state["visits"]


def make(seed=0, base=0, rank=8):
    """A fresh agent on a tiny random Llama, and its trainer. base: another model of its shapes."""
    model = tiny.model("llama", max_position_embeddings=1024).requires_grad_(False)
    model.model.embed_tokens.weight.data[5, 5] += base
    torch.manual_seed(seed)
    agent = twosome.Agent(model, tiny.byte_bpe(), lora_rank=rank)
    return agent, trainer.Trainer(Door, agent, SMALL, seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoint-2 and checkpoint-4, and an agent and trainer to load them into."""
    folder = str(tmp_path_factory.mktemp("trained") / "run")
    agent, learner = make()
    run = runs.Run.create(folder, {"some": "settings", "model": "tiny", "steps": 64})
    for update in range(1, 5):
        run.log({**learner.iterate(), "seconds": 1.0})
        run.seconds, run.cpu_seconds = 10.5 * update, 20.5 * update
        if update % 2 == 0:
            run.checkpoint(agent, learner)
    run.close()
    return folder, agent, learner


@pytest.fixture
def copied(trained, tmp_path):
    """The same in a folder of one's own, and with a fresh agent and trainer."""
    folder = str(tmp_path / "run")
    shutil.copytree(trained[0], folder)
    return folder, *make()


@contextlib.contextmanager
def opened(folder):
    run = runs.Run(folder)
    try:
        yield run
    finally:
        run.close()


def restore(folder, agent, learner, which="last"):
    with opened(folder) as run:
        return run.restore(agent, learner, which)


def refusal(call, *arguments):
    """The one line with which a call refuses; any other error gets through and fails the test."""
    with pytest.raises(runs.RunError) as caught:
        call(*arguments)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def pasted(line, folder):
    """The words that a shell would make of the command at the end of a line."""
    starts = [line.rfind(f" {command} ") for command in ("python twosome.py", "cp", "rm")]
    words = shlex.split(line[max(starts):])
    inside = [word for word in words if os.path.abspath(word).startswith(os.path.abspath(folder))]
    assert inside, line
    return words


def content(path):
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def changed(path, data=None):
    """Within it, a file holds other bytes, or is gone."""
    before = content(path)
    os.unlink(path)
    if data is not None:
        runs.write_bytes(path, data)
    yield
    if os.path.isdir(path):
        os.rmdir(path)
    runs.write_bytes(path, before)


def table(folder):
    """metrics.csv as a list of dicts."""
    with open(os.path.join(folder, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


# -----------------------------------------------------------------------------
# Kills and signals: real processes.

def test_killed_at_random_moments_a_run_ends_bit_for_bit_the_same(tmp_path):
    figures = kill_campaign.campaign(QUICK, 4, seed=15, parent=str(tmp_path))
    assert figures["kills"] >= 4 and not kill_campaign.bad(figures), figures


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_update_and_the_run_goes_on_from_there(tmp_path, number, code):
    folder = str(tmp_path / "it's a $(run)")
    endless = [*QUICK, "--steps", "100000", "--checkpoint-every", "1000", "--out", folder]
    process = kill_campaign.Process(endless)
    process.until(lambda: len(kill_campaign.rows(folder)) >= 3)
    if number == signal.SIGINT:  # while it runs, nobody else may
        second = kill_campaign.Process(["--resume", folder])
        assert second.wait() == 2 and "another process" in second.output()
    process.signal(number)
    assert process.wait() == code, process.output()
    assert "Traceback" not in process.output()
    hint, = (line for line in process.output().split("\n") if "go on with" in line)
    assert pasted(hint, folder)[-2:] == ["--resume", folder]
    last, = runs.checkpoints(folder)
    assert last == f"checkpoint-{table(folder)[-1]['update']}"
    runs.verify(os.path.join(folder, last))

    # A disk that is full during the next checkpoint: one line, and the one before stays.
    process = kill_campaign.Process(["--resume", folder], limit=200_000)
    before = len(table(folder))
    process.until(lambda: len(kill_campaign.rows(folder)) > before)
    process.signal(number)
    assert process.wait() == 1, process.output()
    line, = (line for line in process.output().split("\n") if line.startswith("twosome.py: "))
    assert last in line and "Traceback" not in process.output()
    runs.verify(os.path.join(folder, last))


def test_a_second_signal_stops_at_once_and_a_renamed_folder_is_one_line(tmp_path):
    folder = str(tmp_path / "run")
    process = kill_campaign.Process([*QUICK, "--steps", "100000", "--out", folder])
    process.until(lambda: len(runs.checkpoints(folder)) == 2)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGTERM)
    began = time.perf_counter()
    assert process.wait() in (130, 143) and time.perf_counter() - began < 2
    last = runs.checkpoints(folder)[-1]
    runs.verify(os.path.join(folder, last))
    process = kill_campaign.Process(["--resume", folder])
    before = len(table(folder))
    process.until(lambda: len(kill_campaign.rows(folder)) > before)
    os.rename(folder, tmp_path / "moved")
    assert process.wait() == 1, process.output()
    line = process.output().rstrip().split("\n")[-1]
    kept = runs.checkpoints(str(tmp_path / "moved"))[-1]
    assert "renamed" in line and kept in line and "Traceback" not in process.output()


def test_signals_are_noted_in_turn_and_given_back():
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
        number = getattr(signal, name)
        before = signal.signal(number, signal.SIG_DFL)
        try:
            with runs.Signals(quiet=True) as signals:
                assert signals.exit_code == 0
                os.kill(os.getpid(), number)
                assert signals.exit_code == code
            assert signal.getsignal(number) == signal.SIG_DFL
        finally:
            signal.signal(number, before)


def test_nohup_outlives_the_terminal_and_a_closed_terminal_stops_nothing(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reading, writing = os.pipe()
    os.close(reading)
    spoken = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: spoken(writing, data))
    try:
        with runs.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.exit_code == 0
            os.kill(os.getpid(), signal.SIGTERM)  # speaks into a pipe that nobody reads
            assert signals.exit_code == 143
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(writing)


# -----------------------------------------------------------------------------
# Resume, in one process.

def test_resume_continues_bit_for_bit_and_puts_the_metrics_back(copied):
    folder, agent, learner = copied
    other, whole = make()
    expected = [whole.iterate() for _ in range(7)]
    with opened(folder) as run:
        assert run.restore(agent, learner) == 4
        run.log({**expected[4], "seconds": 1.0})  # a row that no checkpoint knows
        with open(run.path("metrics.csv"), "a") as file:
            file.write("6,0.12")  # and half of another one, as a full disk leaves it
    with opened(folder) as run:
        assert run.restore(agent, learner) == 4
        assert (run.seconds, run.cpu_seconds) == (42.0, 82.0)
        assert len(table(folder)) == 4
        for row in expected[4:]:
            found = learner.iterate()
            np.testing.assert_equal(found, row)
            run.log({**found, "seconds": 1.0})
    assert [row["update"] for row in table(folder)] == list("1234567")
    for p, q in zip(agent.policy_parameters(), other.policy_parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(agent.value_parameters(), other.value_parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_third_checkpoint_removes_the_first_and_restarts_leave_the_same_bytes(copied):
    folder, agent, learner = copied
    with opened(folder) as run:
        run.restore(agent, learner)
        run.log({**learner.iterate(), "seconds": 1.0})
        run.checkpoint(agent, learner)
        run.checkpoint(agent, learner)  # is there already
        assert run.hint().startswith("the last checkpoint is checkpoint-5; go on with")
    assert runs.checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]
    assert sorted(os.listdir(os.path.join(folder, "checkpoint-5"))) == FILES
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], capture_output=True,
                           cwd=os.path.join(folder, "checkpoint-5"))
    assert check.returncode == 0


def test_going_on_from_an_older_checkpoint_sets_the_newer_aside(copied):
    folder, agent, learner = copied
    runs.write_bytes(os.path.join(folder, "summary.json"), b"{}")  # of the end that is set aside
    for n in ("", "-2"):
        assert restore(folder, agent, learner, "checkpoint-2") == 2
        assert os.path.isdir(os.path.join(folder, f"checkpoint-4.abandoned{n}"))
        assert not os.path.exists(os.path.join(folder, "summary.json"))
        assert runs.checkpoints(folder) == ["checkpoint-2"] and len(table(folder)) == 2
        with opened(folder) as run:
            run.restore(agent, learner, "2")
            assert "checkpoint-2" in run.hint()
            for _ in range(2):
                run.log({**learner.iterate(), "seconds": 1.0})
            run.checkpoint(agent, learner)
        assert runs.load_agent(folder, agent).endswith("checkpoint-4")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, capfd):
    folder, (agent, learner) = str(tmp_path / "run"), make()
    run = runs.Run.create(folder, {"some": "settings"})
    run.log({"update": 0, "return": float("nan")})
    run.close()
    assert "no checkpoint" in refusal(runs.load_agent, folder, agent)
    with opened(folder) as run:
        assert run.restore(agent, learner) == 0 and "no checkpoint yet" in run.hint()
        run.log({"update": 0, "return": 1.5})
    assert table(folder) == [{"update": "0", "return": "1.5"}]
    assert "beginning again" in capfd.readouterr().err


def test_rows_are_appended_behind_one_header(tmp_path):
    run = runs.Run.create(str(tmp_path / "run"), {})
    run.log({"update": np.int64(1), "return": np.float64(0.1)})
    number = os.stat(run.path("metrics.csv")).st_ino
    run.log({"update": 2, "return": 0.1 + 0.2})
    assert os.stat(run.path("metrics.csv")).st_ino == number
    assert content(run.path("metrics.csv")) == b"update,return\n1,0.1\n2,0.30000000000000004\n"
    run.close()


def test_what_is_written_is_json_without_nan(tmp_path):
    run = runs.Run.create(str(tmp_path / "run"), {"episodes": 3})
    summary = {"a": float("nan"), "b": [np.float32(0.5), -np.inf], "c": np.arange(2)}
    run.write("summary.json", summary)
    assert runs.read_json(run.path("summary.json")) == {"a": None, "b": [0.5, None], "c": [0, 1]}
    run.write("curve.png", b"\x89PNG")
    assert content(run.path("curve.png")) == b"\x89PNG"
    run.close()
    assert runs.read_config(run.folder) == {"episodes": 3}


def test_other_processes_read_and_write_nothing(copied):
    folder, agent, learner = copied
    follower, before = runs.Follower(folder, resumed=True), sorted(os.listdir(folder))
    with opened(folder) as run:  # a follower holds no lock
        assert follower.restore(agent, learner) == run.restore(*make()) == 4
    follower.log({"update": 9})
    follower.write("summary.json", {})
    learner.rank = 1
    learner.updates = 9
    follower.checkpoint(agent, learner)
    follower.close()
    assert sorted(os.listdir(folder)) == before and len(table(folder)) == 4


def test_the_adapter_is_peft_s_own(trained):
    folder, agent, learner = trained
    restore(folder, agent, learner)
    model = tiny.model("llama", max_position_embeddings=1024)
    loaded = peft.PeftModel.from_pretrained(model, os.path.join(folder, "checkpoint-4"))
    weights = dict(loaded.named_parameters())
    assert sum("lora_" in name for name in weights) == 12
    assert all(torch.equal(p, weights[name]) for name, p in agent.model.named_parameters())


def test_other_versions_are_noted_without_control_characters(copied, monkeypatch, capfd):
    folder, agent, learner = copied
    restore(folder, agent, learner)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(torch, "__version__", "1.0\x1b[31m")
    restore(folder, agent, learner)
    note = capfd.readouterr().err
    assert note.count("\n") == 1 and note.rstrip("\n").isprintable() and "last bits" in note


# -----------------------------------------------------------------------------
# A failing machine.

@pytest.mark.parametrize("call, number", [
    ("mkdir", errno.EROFS), ("rename", errno.ENOSPC), ("fsync", errno.EIO),
    ("unlink", errno.EROFS)])
def test_a_failing_disk_leaves_the_last_checkpoint(copied, monkeypatch, call, number):
    folder, agent, learner = copied

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with opened(folder) as run:
        run.restore(agent, learner)
        run.log({**learner.iterate(), "seconds": 1.0})
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, call, fail)
            run.checkpoint(agent, learner)
        assert run.hint().startswith("the last checkpoint is checkpoint-4")
    assert runs.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert restore(folder, agent, learner) == 4 and len(table(folder)) == 4


def test_a_full_disk_is_an_oserror_at_every_size(copied):
    folder, agent, learner = copied
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [0, 1000, 3000, *(4000 * n for n in range(2, 10)), 100_000, 1_000_000]
    with opened(folder) as run:
        run.restore(agent, learner)
        learner.updates = 5
        for size in sizes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                with pytest.raises(OSError):
                    run.checkpoint(agent, learner)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        assert runs.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
        run.checkpoint(agent, learner)
    runs.verify(os.path.join(folder, "checkpoint-5"))


def test_what_is_not_finite_is_not_saved(copied):
    folder, agent, learner = copied
    with opened(folder) as run:
        run.restore(agent, learner)
        learner.updates = 5
        moments = next(iter(learner.value_optimizer.state.values()))["exp_avg"]
        for tensor in (agent.policy_parameters()[0].data, agent.critic[0].weight.data, moments):
            before = tensor[0, 0].item()
            tensor[0, 0] = float("nan")
            with pytest.raises(FloatingPointError):
                run.checkpoint(agent, learner)
            tensor[0, 0] = before
    assert runs.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_that_was_renamed_tells_what_was_written(copied, tmp_path):
    folder, agent, learner = copied
    with opened(folder) as run:
        run.restore(agent, learner)
        os.rename(folder, tmp_path / "moved")
        with pytest.raises(OSError):
            run.log({**learner.iterate(), "seconds": 1.0})
        assert "renamed" in run.hint() and "checkpoint-4" in run.hint()


# -----------------------------------------------------------------------------
# Damage.

def test_damaged_files_are_named_and_the_one_before_is_offered(trained):
    """Truncated, longer, one bit flipped, missing, a link, a folder or a pipe: 104 cases."""
    folder, agent, learner = trained
    last, rng, cases = os.path.join(folder, "checkpoint-4"), random.Random(0), 0
    assert sorted(os.listdir(last)) == FILES
    for name in FILES:
        path = os.path.join(last, name)
        data = content(path)
        contents = [None, b"", data[:rng.randrange(len(data))], data + b"\0"]
        for _ in range(6):
            flipped = bytearray(data)
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            contents.append(bytes(flipped))
        for other in contents:
            with changed(path, other):
                message = refusal(restore, folder, agent, learner)
            assert "checkpoint-4 is damaged" in message
            assert pasted(message, folder)[-2:] == ["--from", "checkpoint-2"]
            cases += 1
        for put in (os.mkfifo, os.mkdir, None):
            with changed(path):
                if put:
                    put(path)
                else:
                    os.symlink(os.path.join(folder, "checkpoint-2", name), path)
                assert "--from checkpoint-2" in refusal(restore, folder, agent, learner)
                refusal(runs.load_agent, folder, agent)
            cases += 1
    assert cases >= 100 and restore(folder, agent, learner) == 4


def test_what_does_not_belong_into_a_checkpoint_is_named(trained, tmp_path):
    folder, agent, _ = trained
    for name in ("pytorch_model.bin", "critic.pt", "new\nline", "\x1b[31m", "\udcff"):
        path = os.path.join(folder, "checkpoint-4", name)
        runs.write_bytes(path, pickle.dumps(Bomb(tmp_path / "ran")))
        message = refusal(runs.load_agent, folder, agent)
        os.unlink(path)
        assert message.isprintable() and repr(name.split("\n")[0]) in message
    assert not (tmp_path / "ran").exists()


def test_every_way_out_of_damage_works_when_it_is_pasted(trained, tmp_path):
    """Both checkpoints are damaged: what the lines say leads to a new beginning, step by step."""
    agent, learner = make()
    folder = str(tmp_path / "it's a $(touch ran) run; ~")
    shutil.copytree(trained[0], folder)
    for name in runs.checkpoints(folder):
        runs.write_bytes(os.path.join(folder, name, "critic.safetensors"), b"torn")
    which, steps = "last", []
    for _ in range(9):
        if not runs.checkpoints(folder):
            break
        words = pasted(refusal(restore, folder, agent, learner, which), folder)
        if words[0] == "rm":
            assert words[1] == "-r" and words[2].startswith(folder) and len(words) == 3
            shutil.rmtree(words[2])
            which = "last"
        else:
            assert words[:4] == ["python", "twosome.py", "--resume", folder]
            which = words[5] if len(words) > 4 else "last"
        steps.append(words[0])
    assert restore(folder, agent, learner) == 0
    assert steps == ["python", "rm", "rm"]


def test_sound_checkpoints_are_never_to_be_removed(copied):
    """Edited settings, another base model, another agent: each line says what to restore."""
    folder, agent, learner = copied
    config = os.path.join(folder, "config.json")
    text = content(config)
    for edited in (text.replace(b"64", b"65"), text.replace(b"some", b"other"),
                   text.replace(b"{", b'{"more": 1,'), b"torn", b"", b"[]", None):
        with changed(config, edited):
            for call in (runs.load_agent, restore):
                message = refusal(call, folder, agent, *([learner] * (call is restore)))
                assert not any(word in message for word in ("rm ", "--from", "damaged")), message
                assert pasted(message, folder)[0] == "cp"
        with changed(config, edited):
            _, source, target = pasted(message, folder)
            shutil.copy(source, target)
            assert restore(folder, agent, learner) == 4
    for other, word in ((make(base=1), "base model"), (make(rank=4), "names or shapes")):
        message = refusal(restore, folder, *other)
        assert word in message and "rm " not in message and "--from" not in message
    assert "'tiny'" in refusal(runs.load_agent, folder, make(base=1)[0])
    assert restore(folder, agent, learner) == 4


def test_settings_that_are_edited_while_it_runs_do_not_spoil_its_checkpoints(copied):
    folder, agent, learner = copied
    sound = content(os.path.join(folder, "config.json"))
    with opened(folder) as run:
        run.restore(agent, learner)
        run.log({**learner.iterate(), "seconds": 1.0})
        runs.write_bytes(run.path("config.json"), b"edited")
        runs.write_bytes(run.path("metrics.csv"), b"edited")
        run.checkpoint(agent, learner)
    assert content(os.path.join(folder, "checkpoint-5", "run_config.json")) == sound
    shutil.copy(os.path.join(folder, "checkpoint-5", "run_config.json"),
                os.path.join(folder, "config.json"))
    assert restore(folder, agent, learner) == 5 and len(table(folder)) == 5


def test_a_run_of_an_earlier_version_is_called_so(trained, tmp_path):
    folder, agent, _ = str(tmp_path / "run"), *trained[1:]
    shutil.copytree(trained[0], folder)
    for config in ({"env": "overcooked", "steps": 12800}, {"format": 1}, {"format": "2"}):
        runs.write_bytes(os.path.join(folder, "config.json"), runs.to_json(config))
        for call in ([runs.Run], [runs.read_config], [runs.load_agent, agent]):
            message = refusal(call[0], folder, *call[1:])
            assert "was written by an earlier version" in message and "damaged" not in message


def test_checkpoints_by_name(trained):
    folder, agent, _ = trained
    assert runs.find(folder) == runs.find(folder, "4") == os.path.join(folder, "checkpoint-4")
    assert runs.find(folder, "checkpoint-2") == os.path.join(folder, "checkpoint-2")
    for which in ("3", "checkpoint-3", "", "../checkpoint-2", "x-2", "checkpoint-02", "\x1b", "-2"):
        message = refusal(runs.load_agent, folder, agent, which)
        assert message.isprintable() and "checkpoint-2" in message


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_links_are_neither_followed_nor_written_through(trained, tmp_path):
    folder, agent, learner = str(tmp_path / "run"), *trained[1:]
    shutil.copytree(trained[0], folder)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    for name in ("metrics.csv", ".tmp-metrics.csv", "config.json", "lock", ".tmp-checkpoint",
                 ".tmp-removed"):
        for target in (outside, tmp_path / "folder"):
            path = os.path.join(folder, name)
            before = content(path) if os.path.exists(path) else None
            if before is not None:
                os.unlink(path)
            os.symlink(target, path)
            # Refused, replaced or left alone, but not followed.
            with contextlib.suppress(runs.RunError, OSError), opened(folder) as run:
                run.restore(agent, learner)
                run.log({**learner.iterate(), "seconds": 1.0})
                run.checkpoint(agent, learner)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if before is not None:
                runs.write_bytes(path, before)
    last = runs.find(folder)
    os.rename(last, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", last)
    assert "a link" in refusal(runs.load_agent, folder, agent)
    assert outside.read_text() == "precious"
    assert [path.read_text() for path in (tmp_path / "folder").iterdir()] == ["precious"]


def test_two_may_not_work_in_one_folder(copied):
    folder, agent, learner = copied
    with opened(folder):
        assert "another process is at work" in refusal(runs.Run, folder)
        assert runs.load_agent(folder, agent).endswith("checkpoint-4")  # looking is allowed
    assert restore(folder, agent, learner) == 4


# -----------------------------------------------------------------------------
# Names and settings.

def test_names_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", "..", "../x", "a/../b", "a/..", "x\0y", "x\ny", "\x1b[31m", "\udcff",
                 "x" * 256, "a\\..\\b", "\u202e", "checkpoint-3", "run/checkpoint-99/", "/"):
        refusal(runs.Run.create, name, {})
        refusal(runs.Run, name)
    names = ["$HOME", "`id`", "~", "a b", "-x", "ü;rm", "%s", "it's", '"', "$(touch ran)", "*"]
    for name in names:
        runs.Run.create(name, {}).close()
        message = refusal(runs.Run.create, name, {})
        assert "holds a run already" in message and pasted(message, name)
        echoed = subprocess.run(["bash", "-c", f"printf %s {runs.quote(name)}"],
                                capture_output=True, text=True).stdout
        assert os.path.normpath(echoed) == name
    assert sorted(os.listdir()) == sorted(names)
    os.mkdir("full")
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert "must be new or empty" in refusal(runs.Run.create, "full", {})
    assert "cannot be made" in refusal(runs.Run.create, "full/thesis.tex/run", {})
    for name in ("full", "none", "full/thesis.tex"):
        assert "no run" in refusal(runs.Run, name)
    assert os.listdir("full") == ["thesis.tex"]
    assert [runs.free_name("", name) for name in ("full", "x")] == ["full-2", "x"]
    # The world named is the stored run's, whatever the new one would be of.
    runs.Run.create("own", {"env": "a.py:World"}).close()
    for other in ("overcooked", "b.py:Other"):
        message = refusal(runs.Run.create, "own", {"env": other})
        assert message.endswith("--resume own --env a.py:World")
    runs.Run.create("ours", {"env": "overcooked"}).close()
    assert refusal(runs.Run.create, "ours", {"env": "b.py:Other"}).endswith("--resume ours")


def test_malformed_configs_are_one_line(tmp_path):
    folder = str(tmp_path / "run")
    good = dataclasses.asdict(command.Config(task="tomato-salad"))
    runs.Run.create(folder, good).close()
    assert dataclasses.asdict(runs.fill(command.Config, runs.read_config(folder))) == good
    good["format"] = runs.FORMAT

    def read(data):
        runs.write_bytes(os.path.join(folder, "config.json"), data)
        with pytest.raises((runs.RunError, command.ppo.PPOError)) as caught:
            command.check(runs.fill(command.Config, runs.read_config(folder)))
        assert "\n" not in str(caught.value)

    contents = [b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe\x00", b"[" * 10 ** 5,
                b'{"a":' * 10 ** 5, b'{"steps": NaN}', b"9" * 10 ** 5, pickle.dumps(good)]
    for name, value in good.items():
        wrong = [None, [], {}, True]
        if isinstance(value, str):
            wrong += [1, 1.5]
        elif name != "format":
            wrong += ["x", "1", -1, 10 ** 400, float("nan"), float("inf")]
        contents += [json.dumps({**good, name: other}).encode() for other in wrong]
        contents.append(json.dumps({key: good[key] for key in good if key != name}).encode())
    for name in ("__class__", "resume", "\udcff", "stepz", ""):
        contents.append(json.dumps({**good, name: 1}).encode())
    for data in contents:
        read(data)
    assert len(contents) >= 150


def test_the_fingerprint_knows_every_change_of_the_base():
    model = tiny.model("llama").requires_grad_(False)
    adapted = models.add_lora(model)
    before = runs.fingerprint(adapted)
    weight = model.model.embed_tokens.weight.data
    changes = itertools.product(range(0, 300, 37), (1e-6, -1.0))
    for row, change in changes:
        kept = weight[row, 3].item()
        weight[row, 3] += change
        if weight[row, 3].item() != kept:
            assert runs.fingerprint(adapted) != before
        weight[row, 3] = kept
    weight[[0, 1]] = weight[[1, 0]]  # the sum stays
    assert runs.fingerprint(adapted) != before
    weight[[0, 1]] = weight[[1, 0]]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    assert runs.fingerprint(adapted) == before

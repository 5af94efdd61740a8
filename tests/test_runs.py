"""runs.py: killed, signalled, starved and lied to. Real processes are killed; every damaged input must be one line, never a traceback.

The processes are forked by one server that has imported everything (experiments/kill_campaign.py, which runs the long campaign).
"""
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import stat
import time

import numpy as np
import pytest
import safetensors.torch
import torch

import envs
import ppo
import runs
import tiny
import scoring
import twosome
from experiments import kill_campaign

QUICK = ["--env", "overcooked", "--num-envs", "2", "--rollout-steps", "16", "--minibatch", "16", "--steps", "256", "--checkpoint-every", "2"]
SMALL = ppo.Config(steps=64, num_envs=2, rollout_steps=4, minibatch=8, epochs=1)
ODD = ["snowman ☃ and 🍅", "right\u202eleft", "nul \0 in it", "tab\tand\nnewline", "\u200b\u200b", "a" * 150, "</s><s> [INST]", "%s %d {0} $HOME `id`",
       "é combining e\u0301", "../../etc/passwd", "\ufeffBOM", "ﷺ 中文 हिन्दी"]


class Door:
    """Two rooms in text; walking through the door twice ends the episode. Odd prompts, so that checkpoints hold them."""

    def reset(self, seed=None):
        self.room = self.visits = 0
        return self.observe()

    def observe(self):
        return None, {"prompt": f"You see {ODD[self.room % len(ODD)]} and a door. You should", "actions": ["open the door", "wait"]}

    def step(self, action):
        self.room, self.visits = self.room + (action == 0), self.visits + 1
        return *((self.observe()[0], float(self.room == 3), self.room == 3, self.visits == 9, self.observe()[1])),

    def state_dict(self):
        return {"room": self.room, "visits": self.visits}

    def load_state_dict(self, state):
        if not all(type(value) is int for value in (state["room"], state["visits"])):
            raise ValueError("rooms and visits are counts")
        self.room, self.visits = state["room"], state["visits"]


def make(seed=0, config=SMALL):
    """A fresh agent on a tiny random Llama, and its trainer."""
    model = tiny.model("llama", max_position_embeddings=1024).requires_grad_(False)
    if seed:  # another model of the same shapes
        model.model.embed_tokens.weight.data[5, 5] += 1
    torch.manual_seed(seed)
    agent = twosome.Agent(model, tiny.byte_bpe())
    return agent, ppo.PPO(Door, agent, config, seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoint-2 and checkpoint-4, and an agent and trainer to load them into."""
    folder = str(tmp_path_factory.mktemp("trained") / "run")
    agent, trainer = make()
    run = runs.Run.create(folder, {"some": "settings"})
    for update in range(1, 5):
        run.log({**trainer.iterate(), "seconds": 1.0})
        if update % 2 == 0:
            run.checkpoint(agent, trainer)
    run.close()
    return folder, agent, trainer


def restore(folder, agent, trainer, which="last"):
    """Open, restore, close."""
    run = runs.Run.open(folder)
    try:
        return run.restore(agent, trainer, which)
    finally:
        run.close()


def refusal(call, *arguments):
    """The one line with which a call refuses; anything but a RunError or ConfigError gets through and fails the test."""
    with pytest.raises((runs.RunError, ppo.ConfigError)) as caught:
        call(*arguments)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def damaged(path, content=None, sums=True):
    """Within it, a checkpoint's file holds other bytes (or is gone); with sums, under right checksums, as a forger would do."""
    folder, (before, after) = os.path.dirname(path), (None, None)
    listed = os.path.join(folder, "SHA256SUMS")
    after = open(listed, "rb").read()
    if os.path.lexists(path):
        before = open(path, "rb").read()
        os.unlink(path)
    if content is not None:
        runs.write_bytes(path, content)
    if sums:
        sums = [f"{hashlib.sha256(open(os.path.join(folder, name), 'rb').read()).hexdigest()}  {name}\n" for name in sorted(os.listdir(folder)) if name != "SHA256SUMS"]
        runs.write_bytes(listed, "".join(sums).encode())
    yield
    if os.path.lexists(path):
        os.unlink(path)
    if before is not None:
        runs.write_bytes(path, before)
    runs.write_bytes(listed, after)


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals: real processes

@pytest.fixture(scope="module")
def runner():
    fork = kill_campaign.Fork()
    yield fork
    fork.close()


def test_killed_at_random_moments_a_run_ends_bit_for_bit_the_same(runner, tmp_path):
    figures = kill_campaign.campaign(runner, QUICK, 5, seed=3, parent=str(tmp_path))
    assert figures["kills"] >= 5
    assert not any(figures[name] for name in ("lost", "differing", "torn_metrics", "tracebacks")), figures


def test_signals_finish_the_update_and_a_second_one_stops_at_once(runner, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = str(tmp_path / f"first{code}")
        process = runner.start([*QUICK, "--steps", "100000", "--checkpoint-every", "1000", "--out", folder])
        kill_campaign.wait_for(lambda: len(kill_campaign.rows(folder)) >= 2, process)
        # While it runs, nobody else may.
        second = runner.start(["--resume", folder])
        assert second.wait() == 2 and "another process" in second.output()
        process.send_signal(number)
        assert process.wait() == code and f"--resume {folder}" in process.output()
        rows = len(kill_campaign.rows(folder))
        assert runs.checkpoints(folder) == [f"checkpoint-{rows}"]
        process = runner.start(["--resume", folder])
        kill_campaign.wait_for(lambda: len(kill_campaign.rows(folder)) >= rows + 2, process)
        os.kill(process.pid, number)
        os.kill(process.pid, number)
        began = time.perf_counter()
        assert process.wait() in (code,) and time.perf_counter() - began < 2
        runs.verify(os.path.join(folder, runs.checkpoints(folder)[-1]))
        assert "Traceback" not in process.output()


def test_a_full_disk_and_a_removed_folder_are_one_line_and_leave_the_last_checkpoint(runner, tmp_path):
    folder = str(tmp_path / "full")
    process = runner.start([*QUICK, "--steps", "64", "--out", folder])
    assert process.wait() == 0
    config = os.path.join(folder, "config.json")
    text = open(config).read()
    for name in runs.checkpoints(folder):  # the same run, with more to do
        for path in (config, os.path.join(folder, name, "run_config.json")):
            runs.write_bytes(path, text.replace('"steps": 64', '"steps": 256').encode())
        runs.write_bytes(os.path.join(folder, name, "SHA256SUMS"), runs.sums(os.path.join(folder, name)).encode())
    process = runner.start(["--resume", folder], limit=200_000)  # the critic alone is larger
    assert process.wait() == 1
    lines = [line for line in process.output().splitlines() if line.startswith("twosome.py: ")]
    assert len(lines) == 1 and "checkpoint-2" in lines[0] and "Traceback" not in process.output()
    runs.verify(os.path.join(folder, "checkpoint-2"))
    process = runner.start([*QUICK, "--steps", "100000", "--out", str(tmp_path / "gone")])
    kill_campaign.wait_for(lambda: len(kill_campaign.rows(str(tmp_path / "gone"))) >= 1, process)
    os.rename(tmp_path / "gone", tmp_path / "moved")
    assert process.wait() == 1 and "Traceback" not in process.output() and "twosome.py: " in process.output()


@pytest.mark.parametrize("call, number", [("mkdir", errno.EROFS), ("rename", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EROFS)])
def test_a_failing_disk_leaves_the_last_checkpoint(trained, monkeypatch, tmp_path, call, number):
    folder, (agent, trainer) = str(tmp_path / "run"), make()
    shutil.copytree(trained[0], folder)
    run = runs.Run.open(folder)
    run.restore(agent, trainer)

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError):
        run.log({**trainer.iterate(), "seconds": 1.0})
        run.checkpoint(agent, trainer)
    monkeypatch.undo()
    run.close()
    assert runs.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
    assert restore(folder, agent, trainer) == 4 and len(kill_campaign.rows(folder)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Resume, in one process

def test_resume_continues_bit_for_bit_and_cuts_the_metrics(trained, tmp_path):
    folder, (agent, trainer) = str(tmp_path / "run"), make()
    shutil.copytree(trained[0], folder)
    whole = [trainer.iterate() for _ in range(7)][4:]
    other, resumed = make()
    run = runs.Run.open(folder)
    run.restore(other, resumed)
    run.log({**whole[0], "seconds": 1.0})  # a row that no checkpoint knows
    run.close()
    assert restore(folder, other, resumed) == 4 and len(kill_campaign.rows(folder)) == 4
    np.testing.assert_equal([resumed.iterate() for _ in range(3)], whole)
    assert all(torch.equal(p, q) for p, q in zip(agent.policy_parameters(), other.policy_parameters()))


def test_going_on_from_an_older_checkpoint_sets_the_newer_aside(trained, tmp_path):
    folder, agent, trainer = str(tmp_path / "run"), *trained[1:]
    shutil.copytree(trained[0], folder)
    assert restore(folder, agent, trainer, "checkpoint-2") == 2
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4.abandoned", "config.json", "lock", "metrics.csv"]
    assert len(kill_campaign.rows(folder)) == 2 and runs.load(folder, agent, "2").endswith("checkpoint-2")


def test_the_adapter_is_peft_s_own(trained):
    import peft
    folder, agent, trainer = trained
    restore(folder, agent, trainer)
    loaded = peft.PeftModel.from_pretrained(tiny.model("llama", max_position_embeddings=1024), os.path.join(folder, "checkpoint-4"))
    assert all(torch.equal(p, dict(loaded.named_parameters())[name]) for name, p in agent.model.named_parameters())


def test_non_finite_logits_are_skipped_counted_and_finally_fatal():
    """Not one step of the policy is taken, however sound the critic is; a checkpoint of what is not finite is refused."""
    agent, trainer = make(config=dataclasses.replace(SMALL, steps=6400, rollout_steps=8))
    sound = agent.log_probs
    before = [p.clone() for p in agent.policy_parameters()]

    def sick(items):
        if torch.is_grad_enabled():
            raise scoring.NonFiniteScores("the model gives log-probabilities that are not finite")
        return sound(items)
    agent.log_probs = sick
    assert [trainer.iterate()["skipped"] for _ in range(2)] == [2, 4]
    with pytest.raises(ppo.NonFiniteError, match="5 policy"):
        trainer.iterate()
    assert all(torch.equal(p, q) for p, q in zip(before, agent.policy_parameters()))


def test_what_is_not_finite_is_not_saved(tmp_path):
    agent, trainer = make()
    run = runs.Run.create(str(tmp_path / "run"), {})
    agent.critic[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ArithmeticError):
        run.checkpoint(agent, trainer)
    assert runs.checkpoints(run.folder) == []
    run.close()


# ---------------------------------------------------------------------------------------------------------------------
# Damage and malice

def test_damaged_files_are_named_and_the_one_before_is_offered(trained):
    """Truncated, one bit flipped, missing, a link or a folder in its place: 100 cases."""
    folder, agent, trainer = trained
    last, rng, cases = os.path.join(folder, "checkpoint-4"), random.Random(0), 0
    for name in sorted(os.listdir(last)):
        path = os.path.join(last, name)
        data = open(path, "rb").read()
        flipped = [bytearray(data) for _ in range(6)]
        for copy in flipped:
            copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        for content in [None, b"", data[:rng.randrange(len(data))], data + b"\0", *flipped]:
            with damaged(path, content, sums=False):
                message = refusal(restore, folder, agent, trainer)
            assert "checkpoint-4" in message and "--from checkpoint-2" in message
            cases += 1
        os.rename(path, path + ".moved")
        for place in (lambda: os.symlink(path + ".moved", path), lambda: os.mkdir(path), lambda: os.mkfifo(path)):
            place()
            refusal(restore, folder, agent, trainer)
            refusal(runs.load, folder, agent)
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
            cases += 1
        os.rename(path + ".moved", path)
    assert cases >= 100 and restore(folder, agent, trainer) == 4


def test_forged_tensors_are_refused_under_right_checksums(trained):
    folder, agent, trainer = trained
    last, cases = os.path.join(folder, "checkpoint-4"), 0
    for name in ("adapter_model", "critic", "features", "optimizers"):
        path = os.path.join(last, f"{name}.safetensors")
        tensors = safetensors.torch.load_file(path)
        key = sorted(tensors)[0]
        cut = {other: tensor for other, tensor in tensors.items() if other != key}
        for forged in (cut, {**tensors, "more": torch.zeros(3)}, {**cut, key: tensors[key].double()}, {**cut, key: tensors[key][..., None]},
                       {**cut, key: torch.full_like(tensors[key], float("nan"))}, {**cut, key: torch.full_like(tensors[key], float("inf"))}):
            with damaged(path, safetensors.torch.save(forged)):
                assert "checkpoint-4" in refusal(restore, folder, agent, trainer)
            cases += 1
        for content in (b"\xff" * 8 + b"{}", (2 ** 62).to_bytes(8, "little") + b"{}", b"{}", pickle.dumps(tensors)):
            with damaged(path, content):
                assert f"{name}.safetensors" in refusal(restore, folder, agent, trainer)
            cases += 1
    assert cases == 40
    assert "another base model" in refusal(runs.load, folder, make(seed=1)[0])


def leaves(value, path=()):
    """The paths of all values in a JSON tree; of long lists the first and the last entry."""
    yield path
    entries = value.items() if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else ()
    for key, part in entries if len(entries) < 8 or isinstance(value, dict) else [entries[0], entries[-1]]:
        yield from leaves(part, (*path, key))


def test_forged_states_are_refused_under_right_checksums(trained):
    """Every value of state.json replaced by one of another type."""
    folder, agent, trainer = trained
    path, rng, cases, accepted = os.path.join(folder, "checkpoint-4", "state.json"), random.Random(0), 0, []
    text = open(path).read()
    for place in leaves(json.loads(text)):
        if place[:1] == ("surroundings",) and len(place) > 1:
            continue  # a note for people
        for value in rng.sample((None, "x", [], {}, -1.5, True, 10 ** 400), 1):
            state = json.loads(text)
            parent = {"": state}
            for key in ("", *place[:-1]):
                parent = parent[key]
            before = parent[place[-1]] if place else state
            number = lambda x: type(x) in (int, float)
            if place == ("random", "python", 2) and value == -1.5:
                continue  # its spare normal number may be there or not
            if not place or type(before) is type(value) or number(before) and type(value) is float or isinstance(before, (list, dict)) and before == value:
                continue
            parent[place[-1]] = value
            with damaged(path, json.dumps(state).encode()):
                try:
                    refusal(restore, folder, agent, trainer)
                except pytest.fail.Exception:
                    accepted.append((place, value))
            cases += 1
    assert cases >= 50 and not accepted, accepted
    for content in (b"[]", b"{", b"\xff\xfe", text.replace("1.0", "NaN", 1).encode(), text.replace("1.0", "1e999", 1).encode(), b"[" * 10 ** 5, b"1" * 10 ** 5):
        with damaged(path, content):
            assert "state.json" in refusal(restore, folder, agent, trainer)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_pickles_links_and_climbing_paths_neither_run_nor_reach_outside(trained, tmp_path):
    folder, agent, trainer = str(tmp_path / "run"), *trained[1:]
    shutil.copytree(trained[0], folder)
    last, outside = os.path.join(folder, "checkpoint-4"), tmp_path / "outside"
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    for name in ("pytorch_model.bin", "adapter_model.bin", "critic.pt", "critic.safetensors", "state.json"):
        with damaged(os.path.join(last, name), bomb):
            assert name in refusal(runs.load, folder, agent)
    for key, value in (("base_model_name_or_path", "../../outside"), ("auto_mapping", {"base_model_class": "os.system"}), ("revision", "../..")):
        path = os.path.join(last, "adapter_config.json")
        with damaged(path, json.dumps({**json.load(open(path)), key: value}).encode()):
            runs.load(folder, agent)  # not followed: accepted, and nothing happens
    with damaged(os.path.join(last, "SHA256SUMS"), b"0" * 64 + b"  ../../outside\n", sums=False):
        assert "checkpoint-4" in refusal(runs.load, folder, agent)
    outside.write_text("precious")
    for name in ("metrics.csv", ".tmp-metrics.csv", ".tmp-removed", "config.json", "lock"):
        path = os.path.join(folder, name)
        before = open(path, "rb").read() if os.path.exists(path) else None
        if before is not None:
            os.unlink(path)
        os.symlink(outside, path)
        with contextlib.suppress(runs.RunError, OSError):  # replaced, removed or refused: never followed
            restore(folder, agent, trainer)
        if os.path.lexists(path):
            os.unlink(path)
        runs.write_bytes(path, before or b"")
    os.rename(last, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", last)
    assert "checkpoint-4" in refusal(runs.load, folder, agent)
    assert outside.read_text() == "precious" and not (tmp_path / "ran").exists()


def test_names_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("", "..", "../x", "a/../b", "a/..", "x\0y", "x\ny", "\x1b[31m", "\udcff", "x" * 256, "a\\..\\b"):
        refusal(runs.Run.create, name, {})
        refusal(runs.Run.open, name)
    for name in ("$HOME", "`id`", "~", "a b", "-x", "ü;rm", "%s"):
        runs.Run.create(name, {}).close()
        assert "holds a run already" in refusal(runs.Run.create, name, {})
    assert sorted(os.listdir()) == sorted(("$HOME", "`id`", "~", "a b", "-x", "ü;rm", "%s"))
    os.mkdir("full")
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    assert "folder of its own" in refusal(runs.Run.create, "full", {})
    for name in ("full", "none", "full/thesis.tex"):
        assert "no run" in refusal(runs.Run.open, name)


def test_malformed_configs_are_one_line(tmp_path):
    folder = str(tmp_path / "run")
    good = dataclasses.asdict(twosome.Config())
    runs.Run.create(folder, good).close()

    def read(content):
        runs.write_bytes(os.path.join(folder, "config.json"), content)
        runs.fill(twosome.Config, runs.read_config(folder)).validate()
    read(json.dumps(good).encode())
    contents = [b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe\x00", b"[" * 10 ** 5, b'{"a":' * 10 ** 5, b'{"steps": NaN}', b"9" * 10 ** 5, pickle.dumps(good)]
    for name in good:
        number = not isinstance(good[name], str)
        for value in (None, [], {}, True, *(("x", "1", -1, 10 ** 400, float("nan"), float("inf")) if number else (1, 1.5))):
            contents.append(json.dumps({**good, name: value}).encode())
        contents.append(json.dumps({key: value for key, value in good.items() if key != name}).encode())
    contents += [json.dumps({**good, name: 1}).encode() for name in ("__class__", "resume", "\udcff", "stepz", "")]
    for content in contents:
        refusal(read, content)
    assert len(contents) >= 150


def test_malformed_command_lines_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = [["--typo"], ["stray"], ["--env"], ["--env", "chess"], ["--task", "soup"], ["--env", "virtualhome", "--task", "tomato-salad"], ["--resume", "nothing"],
             ["--resume", ".."], ["--resume", ""], ["--out", ".."], ["--out", "a/../b"], ["--out", "\0"], ["--out", "x\ny"], ["--preset", "best"], ["--norm", "none"], ["--model", ""],
             ["--model", "no/such/model"], ["--model", "\0"], ["--model", "../../etc"], ["--lora-targets", "nothing", "--out", "t"], ["--dtype", "int8"], ["--device", "abacus", "--out", "d"], ["--eval", "nothing"],
             ["--eval", "../.."], ["--eval", "", "--env", "chess"], ["--episodes", "0"], ["--resume", "nothing", "--from", "../x"], ["--from", "checkpoint-2"]]
    numbers = [field for field in ppo.Config.__dataclass_fields__.values()]
    for field in numbers:
        flag = "--" + field.name.replace("_", "-")
        wrong += [[flag, value] for value in ("x", "", "-1", "nan", "1e999" if field.type is float else "1" + "0" * 400, "0x10", "１２x")]
    wrong += [["--seed", "-1"], ["--seed", "1" + "0" * 30], ["--lora-rank", "0"], ["--lora-rank", "1" + "0" * 9], ["--checkpoint-every", "0"], ["--steps", "1"], ["--num-envs", "1" + "0" * 9]]
    monkeypatch.setattr(twosome, "train", lambda *arguments: pytest.fail(f"accepted {argv}"))
    monkeypatch.setattr(twosome, "evaluate", twosome.train)
    for argv in wrong:
        assert twosome.main(argv) == 2, argv
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("twosome.py: "), (argv, lines)
    assert len(wrong) >= 100


def test_prompts_with_odd_characters_are_scored_or_refused_in_one_line(trained):
    agent = trained[1]
    for text in [*ODD, "", " ", "\n", "\ud800", "x" * 5000]:
        for item in ((f"{text} You should", ("open the door", "wait")), ("You should", (f"open {text}", "wait")), (text, ("wait", "go"))):
            try:
                scores, = agent.log_probs([item])
                assert torch.isfinite(scores).all() and abs(scores.exp().sum().item() - 1) < 1e-4
            except scoring.ScoringError as error:
                assert "\n" not in str(error)

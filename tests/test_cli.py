"""The command line: a run leaves what it promises, presets are published, bad input is one line.

Where nothing else is said, the command runs in this process, through twosome.main.
"""
import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import envs
import ppo
import twosome
from engine import command, models, runs, trainer, worlds

ROOT = os.path.dirname(os.path.abspath(twosome.__file__))
PROGRAM = os.path.join(ROOT, "twosome.py")
SMALL = "--steps 256 --num-envs 2 --rollout-steps 32 --episodes 12".split()
TINY = "--steps 128 --num-envs 2 --rollout-steps 32 --episodes 2 --checkpoint-every 1".split()


def run_program(*flags, **options):
    """Start the program as a user does. Returns its subprocess.CompletedProcess."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, PROGRAM, *flags], capture_output=True, text=True,
                          env=environment, timeout=120, **options)


@pytest.fixture(autouse=True)
def one_thread():
    """Give the number of threads back, which a run may change for its small model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run, made as the README says: (folder, standard output, standard error)."""
    folder = str(tmp_path_factory.mktemp("cli") / "run")
    done = run_program("--env", "overcooked", "--out", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def read_json(*path):
    with open(os.path.join(*path), encoding="utf-8") as file:
        return json.load(file)


def rows(folder, leave_out=("seconds", "cpu_seconds")):
    """Return the rows of a run's metrics.csv, without the columns that tell the time."""
    with open(os.path.join(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in leave_out}
                for row in csv.DictReader(file)]


def lines(text):
    """Return the lines of what was printed, without progress bars."""
    return [line for line in text.splitlines() if line.strip() and "\r" not in line]


# -----------------------------------------------------------------------------
# A run, from the outside.


def test_a_run_leaves_the_files_that_it_promises(finished):
    folder, printed, _ = finished
    names = set(os.listdir(folder))
    assert {"config.json", "metrics.csv", "summary.json", "curve.png", "checkpoint-4"} <= names
    assert not [name for name in names if "tmp" in name]
    with open(os.path.join(folder, "curve.png"), "rb") as file:
        assert file.read(4) == b"\x89PNG"
    for name in ("metrics.csv", "curve.png", "summary.json"):
        assert name in printed
    # Weights are safetensors, and everything else is text: nothing has to be unpickled.
    kinds = {os.path.splitext(name)[1] for name in os.listdir(runs.find(folder))}
    assert kinds <= {".json", ".safetensors", ".csv", ""}


def test_a_run_keeps_its_settings(finished):
    settings = read_json(finished[0], "config.json")
    assert settings.pop("format") == runs.FORMAT
    config = runs.fill(command.Config, settings)
    assert (config.env, config.task, config.steps) == ("overcooked", "tomato-salad", 256)
    assert (config.dtype, config.norm, config.seed) == ("float32", "word", 1)


def test_the_summary_is_the_evaluation_of_the_trained_policy(finished):
    summary = read_json(finished[0], "summary.json")
    assert (summary["episodes"], summary["steps"], summary["seed"]) == (12, 256, 1)
    assert (summary["env"], summary["task"]) == ("overcooked", "tomato-salad")
    assert summary["best"] == pytest.approx(0.9205, abs=1e-4)
    assert summary["seconds"] > 0 and summary["cpu_seconds"] > 0
    agent, make_env = twosome.load(finished[0])
    played = ppo.evaluate(make_env, agent, 12, command.EVALUATION_SEED, 0.99)
    assert summary["return"] == pytest.approx(played["returns"].mean())
    assert summary["success"] == pytest.approx(played["successes"].mean())
    low, high = summary["return_interval"]
    assert low <= summary["return"] <= high


def test_the_metrics_begin_with_the_untrained_policy(finished):
    found = rows(finished[0])
    assert [int(row["update"]) for row in found] == [0, 1, 2, 3, 4]
    assert [int(row["steps"]) for row in found] == [0, 64, 128, 192, 256]
    transformers.set_seed(1)
    agent, make_env = twosome.build(command.parse([])[0])
    played = ppo.evaluate(make_env, agent, 12, command.EVALUATION_SEED, 0.99)
    assert float(found[0]["return"]) == pytest.approx(played["returns"].mean())
    assert float(found[0]["success"]) == pytest.approx(played["successes"].mean())
    assert float(found[0]["episode_steps"]) == pytest.approx(played["steps"].mean())


def test_the_columns_of_the_metrics_are_fixed(finished):
    found = rows(finished[0], leave_out=())
    assert all(tuple(row) == command.COLUMNS for row in found)
    assert all(re.fullmatch(r"-?[\d.e-]+|nan", text) for row in found for text in row.values())
    assert found[0]["policy_loss"] == "nan" and float(found[4]["policy_loss"]) != 0
    seconds = [float(row["seconds"]) for row in found]
    assert seconds == sorted(seconds) and seconds[-1] > seconds[0] > 0


def test_what_a_run_prints(finished):
    folder, printed, error = finished
    first, *others = lines(printed)
    assert "tomato-salad" in first and folder in first and "seed 1" in first
    for word in ("parameters", "memory", "untrained  return", "trained  ", "best 0.9205",
                 f"next: python twosome.py --watch {folder}", f"--eval {folder}"):
        assert any(word in line for line in others), word
    for word in ("Traceback", "Warning", "warning"):
        assert word not in printed + error


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(finished, tmp_path):
    for name, seed in (("same", "1"), ("other", "2")):
        flags = [*SMALL, "--out", str(tmp_path / name), "--seed", seed]
        assert twosome.main(flags) == 0
    assert rows(tmp_path / "same") == rows(finished[0])
    assert rows(tmp_path / "other") != rows(finished[0])


def test_a_run_without_out_gets_a_folder_with_its_name(tmp_path, monkeypatch):
    """Model and normalisation are named where they are not the usual ones."""
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--task", "lettuce-salad", "--norm", "none", "--seed", "5"]
    assert twosome.main(flags) == 0
    assert os.listdir("runs") == ["lettuce-salad-none-seed5"]
    assert read_json("runs", "lettuce-salad-none-seed5", "config.json")["norm"] == "none"


def test_a_removed_current_folder_is_one_line(tmp_path):
    script = os.path.join(os.path.dirname(twosome.__file__), "twosome.py")
    gone = f"cd {shlex.quote(str(tmp_path))} && rmdir . ; rmdir {shlex.quote(str(tmp_path))};"
    done = subprocess.run(["sh", "-c", f"{gone} {sys.executable} {script} --help"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "folder was removed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("given", "taken"), [
    ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(given, taken):
    """OpenMP tells the policy it took: sleeping threads leave the cores to other programs."""
    usual = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True,
                          env={**usual, **given, "OMP_DISPLAY_ENV": "true"})
    assert f"OMP_WAIT_POLICY='{taken}'" in done.stderr.replace(" ", "")


def test_a_folder_that_holds_a_run_is_left_alone(finished, capfd):
    folder = finished[0]
    before = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}
    assert twosome.main([*SMALL, "--out", folder]) == 2
    assert f"--resume {folder}" in capfd.readouterr().err
    after = {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}
    assert after == before


def test_a_finished_run_is_left_alone(finished, capfd):
    before = rows(finished[0], leave_out=()), read_json(finished[0], "summary.json")
    assert twosome.main(["--resume", finished[0]]) == 0
    assert "nothing is left to do" in capfd.readouterr().out
    assert (rows(finished[0], leave_out=()), read_json(finished[0], "summary.json")) == before


def test_a_signal_while_the_untrained_llm_is_measured_stops_before_an_update(
        tmp_path, monkeypatch, capfd):
    folder, measure = str(tmp_path / "run"), command.measure

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("engine.watch.measure", interrupted)
        assert twosome.main(["--env", "overcooked", "--out", folder, *TINY]) == 143
    assert [row["update"] for row in rows(folder)] == ["0"]
    printed = capfd.readouterr()
    assert "stopped after update 0 of 2; go on with: python twosome.py --resume" in printed.out
    assert "no curve.png" not in printed.err
    assert twosome.main(["--resume", folder]) == 0
    assert [row["update"] for row in rows(folder)] == ["0", "1", "2"]


def test_a_finished_run_that_goes_on_from_before_its_end_is_evaluated_again(tmp_path):
    folder = tmp_path / "run"
    assert twosome.main([*SMALL, "--checkpoint-every", "1", "--out", str(folder)]) == 0
    right = read_json(str(folder), "summary.json")
    (folder / "summary.json").write_text("{}")
    earlier = min(int(path.name[11:]) for path in folder.glob("checkpoint-*"))
    assert twosome.main(["--resume", str(folder), "--from", str(earlier)]) == 0
    assert read_json(str(folder), "summary.json")["return"] == right["return"]


# -----------------------------------------------------------------------------
# Interrupted, and gone on with.


def stop_after(updates, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal in the middle of an iteration."""
    iterate = trainer.Trainer.iterate

    def iterate_and_signal(self):
        metrics = iterate(self)
        if self.updates == updates:
            os.kill(os.getpid(), number)
        return metrics

    monkeypatch.setattr(trainer.Trainer, "iterate", iterate_and_signal)


def pasted(text, after):
    """Return the flags of the last command that stands behind these words, as a shell reads it."""
    line = next(line for line in reversed(text.splitlines()) if after in line)
    words = shlex.split(line.split(after)[1])
    assert words[:2] == ["python", "twosome.py"]
    return words[2:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_how_to_go_on_and_its_line_can_be_pasted(
        number, tmp_path, capfd, monkeypatch):
    folder = str(tmp_path / "it's my $(touch hacked); run")
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have left it ignored
    with monkeypatch.context() as patched:
        stop_after(1, patched, number)
        code = twosome.main([*TINY, "--out", folder, "--episodes", "3"])
    printed = capfd.readouterr()
    assert code == 128 + number and "Traceback" not in printed.err
    spent = read_json(runs.find(folder), "state.json")["seconds"]
    flags = pasted(printed.out, "go on with: ")
    assert flags == ["--resume", folder]
    if number != signal.SIGTERM:
        return
    assert twosome.main(flags) == 0
    printed = capfd.readouterr().out
    assert pasted(printed, "next: ") == ["--watch", folder]
    _, evaluate, compare = printed[printed.index("next: "):].splitlines()[:3]
    assert pasted(evaluate, "      ") == ["--eval", folder, "--task", "all"]
    assert pasted(compare, "      ") == ["--compare", folder]
    summary = read_json(folder, "summary.json")
    # The seconds are those of all processes, and --episodes is kept.
    assert summary["episodes"] == 3 and summary["seconds"] > spent + 0.1
    assert [float(row["seconds"]) for row in rows(folder, ())][-1] > spent
    whole = str(tmp_path / "whole")
    assert twosome.main([*TINY, "--out", whole, "--episodes", "3"]) == 0
    assert rows(folder) == rows(whole)
    assert len(os.listdir(tmp_path)) == 2  # nothing was hacked


FAILURES = {
    "numbers": (FloatingPointError("the rewards of a rollout are not finite"), 1, "not finite"),
    "disk": (OSError(28, "No space left on device"), 1, "No space left"),
    "memory": (RuntimeError("can't allocate memory: you tried 9 bytes"), 1, "gradient-accumul"),
    "python's memory": (MemoryError(), 1, "memory"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory"), 1, "--gradient-accumulation"),
    "a key": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_machine_is_one_line_that_names_the_last_checkpoint(
        name, tmp_path, capfd, monkeypatch):
    error, expected, word = FAILURES[name]
    iterate = trainer.Trainer.iterate

    def fail(self):
        if self.updates == 1:
            raise error
        return iterate(self)

    monkeypatch.setattr(trainer.Trainer, "iterate", fail)
    folder = str(tmp_path / "a run")
    assert twosome.main([*TINY, "--out", folder]) == expected
    said = [line for line in capfd.readouterr().err.splitlines() if "twosome.py: " in line]
    line = said[0].split("\r")[-1]
    assert len(said) == 1 and line.startswith("twosome.py: ") and word in line
    assert "checkpoint-1" in line and pasted(line, "go on with: ") == ["--resume", folder]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(self):
        raise TypeError("a bug")

    monkeypatch.setattr(trainer.Trainer, "iterate", fail)
    with pytest.raises(TypeError, match="a bug"):
        twosome.main([*TINY, "--out", str(tmp_path / "run")])


def test_a_key_pressed_during_the_imports_shows_no_traceback():
    started = subprocess.Popen([sys.executable, PROGRAM, "--help"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        started.communicate(timeout=0.4)  # importing torch takes longer
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in error and error.count("\n") <= 1


# -----------------------------------------------------------------------------
# Looking at a run.


def test_an_evaluation_prints_the_untrained_llm_beside_the_run(finished, capfd):
    flags = ["--eval", finished[0], "--task", "cheese", "--episodes", "5"]
    assert twosome.main(flags) == 0
    untrained, trained, *_ = lines(capfd.readouterr().out)
    assert untrained.startswith("cheese, untrained") and trained.startswith("cheese, trained")
    written = read_json(finished[0], "evaluation.json")["virtualhome/cheese"]
    assert set(written) == {"untrained", "trained"} and written["trained"]["episodes"] == 5
    # What is measured later on another task stands beside it.
    assert twosome.main(["--eval", finished[0], "--task", "pizza", "--episodes", "5"]) == 0
    both = read_json(finished[0], "evaluation.json")
    assert both["virtualhome/cheese"] == written and "virtualhome/pizza" in both
    assert written["trained"]["greedy"] is False
    capfd.readouterr()


def test_the_options_of_a_runs_world_are_those_of_its_own_task(tmp_path, capfd):
    """A run with options is evaluated on all tasks, as its last line says."""
    folder = str(tmp_path / "run")
    assert twosome.main([*SMALL, "--env-args", "view=3", "--out", folder]) == 0
    assert command.parse(["--eval", folder])[0].env_args == "view=3"
    assert command.parse(["--eval", folder, "--task", "all"])[0].env_args == ""
    asked = ["--eval", folder, "--task", "cheese", "--env-args", "mask=False", "--episodes", "2"]
    assert command.parse(asked)[0].env_args == "mask=False"
    assert twosome.main(["--eval", folder, "--task", "cheese", "--episodes", "2"]) == 0
    assert twosome.main(["--eval", folder, "--episodes", "2", "--out", str(tmp_path)]) == 2
    assert "it is a folder" in capfd.readouterr().err


def test_an_evaluation_without_a_run_is_the_untrained_llms(capfd, tmp_path):
    out = str(tmp_path / "evaluation.json")
    flags = ["--eval", "--task", "tomato-salad", "--episodes", "5", "--out", out]
    assert twosome.main(flags) == 0
    printed = lines(capfd.readouterr().out)
    assert printed[0].startswith("tomato-salad, untrained") and len(printed) == 2
    transformers.set_seed(1)
    agent, make_env = twosome.build(command.parse([])[0])
    played = ppo.evaluate(make_env, agent, 5, command.EVALUATION_SEED, 0.99)
    found = read_json(out)["overcooked/tomato-salad"]["untrained"]
    assert found["return"] == pytest.approx(played["returns"].mean())
    assert twosome.main([*flags, "--greedy"]) == 0
    assert read_json(out)["overcooked/tomato-salad"]["untrained"]["return"] != found["return"]


def test_an_evaluation_of_a_task_discounts_as_the_task_does(finished, monkeypatch):
    """The home's gamma is 0.95, the kitchen's 0.99, whatever the run has learnt with."""
    gammas = []
    monkeypatch.setattr(command, "measure", lambda make_env, agent, config, greedy: gammas.append(
        (config.gamma, make_env().gamma)) or {"return_interval": (0, 0), "return": 0,
                                              "success_interval": (0, 0), "success": 0})
    monkeypatch.setattr(command, "write_evaluation", lambda *arguments: None)
    for task in ("cheese", "onion-salad"):
        assert twosome.main(["--eval", finished[0], "--task", task]) == 0
    assert gammas == [(0.95, 0.95)] * 2 + [(0.99, 0.99)] * 2
    assert twosome.main(["--eval", "--task", "cheese", "--gamma", "0.9"]) == 0
    assert gammas[4:] == [(0.9, 0.9)]


@pytest.mark.parametrize("flags", [["--eval", "RUN", "--norm", "token"],
                                   ["--resume", "RUN", "--steps", "99999"],
                                   ["--eval", "RUN", "--preset", "paper"],
                                   ["--resume", "RUN", "--episodes", "3"]])
def test_a_run_keeps_its_own_settings(finished, flags, capfd):
    assert twosome.main([finished[0] if flag == "RUN" else flag for flag in flags]) == 2
    assert f"own settings; leave out {flags[2]}" in capfd.readouterr().err


def test_tokens_shows_the_policy_after_its_prompt(capfd):
    phrases, prompt = ["take the cup", "sit down on the sofa"], "You see a cup. You should"
    assert twosome.main(["--tokens", *phrases, "--prompt", prompt]) == 0
    title, header, *table = lines(capfd.readouterr().out)
    assert prompt in title and header.split()[2:] == ["pi:", "sum", "token", "word", "phrase:",
                                                      "its", "tokens"]
    numbers = [[float(text) for text in line.split()[:4]] for line in table]
    base = models.load("pocket_lm")
    for column, name in enumerate(twosome.NORMALIZATIONS, start=1):
        log_pi, = twosome.score_actions_naive(*base, [prompt], [phrases], name)
        expected = log_pi.exp().tolist()
        assert [row[column] for row in numbers] == pytest.approx(expected, abs=1e-3)
    joint, = twosome.score_actions_naive(*base, [prompt], [phrases], "sum")
    difference = (joint[0] - joint[1]).item()
    assert numbers[0][0] - numbers[1][0] == pytest.approx(difference, abs=2e-3)
    for line, phrase in zip(table, phrases, strict=True):
        assert phrase in line and line.count("|") >= len(phrase.split()) - 1


@pytest.mark.parametrize("flags, prompt", [([], "Your next step is to"), (["--prompt", ""], "")])
def test_an_empty_prompt_is_none_of_ours(flags, prompt, capfd):
    assert twosome.main(["--tokens", "go", "wait", *flags]) == 0
    title, _, go, _ = lines(capfd.readouterr().out)
    assert title == f"after {prompt!r}"
    log_pi, = twosome.score_actions_naive(*models.load("pocket_lm"), [prompt], [["go", "wait"]])
    assert float(go.split()[3]) == pytest.approx(log_pi[0].exp().item(), abs=1e-3)


@pytest.mark.parametrize("name", ["none", "sum"])
def test_none_is_what_sum_means(name, finished, capfd):
    flags = ["--eval", "--norm", name, "--episodes", "5"]
    assert twosome.main(flags) == 0
    one = capfd.readouterr().out
    assert twosome.main([*flags[:2], "sum", *flags[3:]]) == 0
    assert capfd.readouterr().out == one
    assert twosome.main([*flags[:2], "word", *flags[3:]]) == 0
    assert capfd.readouterr().out != one


# -----------------------------------------------------------------------------
# Flags and presets.


def test_every_task_is_meant_by_all():
    named = command.tasks_named(None, "all", several=True)
    assert len(named) == 15
    assert ("virtualhome", "laundry") in named and ("overcooked", "onion-salad") in named
    kitchen = [(env, task) for env, task in named if env == "overcooked"]
    assert command.tasks_named("overcooked", "all", several=True) == kitchen


@pytest.mark.parametrize("task, env", [
    ("cheese", "virtualhome"), ("entertainment", "virtualhome"), ("onion-salad", "overcooked")])
def test_a_task_finds_its_environment(task, env):
    config, _ = command.parse(["--task", task])
    assert (config.env, config.task) == (env, task)
    config, options = command.parse(["--eval", "--task", task])
    assert (config.env, config.task) == (env, task) and options.tasks == [(env, task)]


PUBLISHED = {  # published scripts: policy's rate, critic's rate, gamma, steps
    "tomato-salad": (5e-7, 1e-5, 0.99, 500_000),
    "tomato-lettuce-salad": (5e-7, 1e-5, 0.99, 500_000),
    "food-preparation": (1e-6, 5e-5, 0.95, 50_000),
    "entertainment": (1e-6, 5e-5, 0.95, 200_000),
    # The home's other chores borrow what their dynamics are.
    "cheese": (1e-6, 5e-5, 0.95, 50_000), "laundry": (1e-6, 5e-5, 0.95, 50_000),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_papers_preset_is_the_published_table(task):
    config, _ = command.parse(["--preset", "paper", "--task", task])
    rates = config.policy_lr, config.critic_lr, config.gamma, config.steps
    assert rates == PUBLISHED[task]
    sizes = config.num_envs, config.rollout_steps, config.epochs, config.minibatch
    assert sizes == (4, 32, 1, 32) and config.gradient_accumulation == 8
    assert (config.clip, config.entropy, config.critic_minibatch) == (0.2, 0.01, 32)
    assert (config.max_grad_norm, config.gae_lambda, config.target_kl) == (0.5, 0.95, 0.02)
    assert (config.norm, config.lora_rank, config.lora_alpha) == ("word", 8, 16)


@pytest.mark.parametrize("task", [task for tasks in envs.TASKS.values() for task in tasks])
@pytest.mark.parametrize("preset", ("pocket", "smollm2", "hub", "paper"))
def test_every_preset_serves_every_task(preset, task):
    config, _ = command.parse(["--preset", preset, "--task", task])
    assert config.task == task and config.steps >= 5_120
    assert config.gamma == (0.99 if config.env == "overcooked" else 0.95)


def test_the_model_chooses_the_preset():
    assert command.parse([])[0].policy_lr == 4e-3
    assert command.parse(["--model", "smollm2"])[0].policy_lr == 6e-3
    assert command.parse(["--model", "somebody/their-llm"])[0].policy_lr == 6e-3
    assert command.parse(["--model", "smollm2", "--preset", "paper"])[0].policy_lr == 5e-7


def test_a_presets_minibatch_is_at_most_a_rollout():
    assert command.parse(["--num-envs", "2"])[0].minibatch == 64
    assert command.parse(["--model", "smollm2", "--num-envs", "4"])[0].minibatch == 128
    assert command.parse(["--num-envs", "2", "--minibatch", "32"])[0].minibatch == 32
    with pytest.raises(ppo.PPOError, match="rollout_steps = 64$"):
        command.parse(["--num-envs", "2", "--minibatch", "128"])


def test_a_flag_wins_over_its_preset():
    flags = ["--preset", "paper", "--policy-lr", "0.01", "--norm", "token"]
    config, _ = command.parse(flags)
    assert (config.policy_lr, config.norm, config.critic_lr) == (0.01, "token", 1e-5)


def test_a_model_in_a_folder_is_found_again_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert command.parse(["--model", "llm"])[0].model == str(tmp_path / "llm")


def test_every_setting_has_its_flag_its_help_and_its_default():
    fields = {field.name: field for field in dataclasses.fields(command.Config)}
    flags = [name for group in command.FLAGS.values() for name in group]
    assert len(flags) == len(set(flags)) and set(fields) < set(flags)
    shown = " ".join(command.parser().format_help().split())
    for name, field in fields.items():
        flag, default = name.replace("_", "-"), str(field.default)
        text = re.search(rf" --{flag} X (.*?)(?: --[a-z]| -h,)", shown)[1]
        assert len(text.split()) >= 2
        assert text.split(" ")[-1] == f"({default})" or f"({default})" in text or not default


def test_the_flags_of_a_training_are_at_most_32():
    settings = [name for title in ("what to learn", "the model", "PPO", "running")
                for name in command.FLAGS[title]]
    assert len({*settings} - {"resume", "from"}) <= 32  # these set nothing


def test_help_fits_64_lines_of_80_columns(capsys):
    with pytest.raises(SystemExit) as end:
        twosome.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert len(shown) <= 64 and max(map(len, shown)) <= 80
    assert shown[0].startswith("usage: ") and not shown[1].strip()
    titles = [line[:-1] for line in shown if re.fullmatch(r"[a-zA-Z ]+:", line)]
    assert titles == ["what to learn", "the model", "PPO", "running", "looking"]


# -----------------------------------------------------------------------------
# Bad input.

BAD = [
    ("--env undercooked", "overcooked"), ("--env overcoked", "overcooked"),
    ("--task potato-salad", "tomato-salad"), ("--task chese", "did you mean cheese"),
    ("--env virtualhome --task tomato-salad", "food-preparation"),
    ("--norm letter", "word"), ("--norm wrod", "did you mean word"),
    ("--preset best", "paper"), ("--preset papr", "did you mean paper"),
    ("--dtype float8", "float32"), ("--dtype bflaot16", "did you mean bfloat16"),
    ("--load-in 2bit", "4bit"), ("--device abacus", "cpu"), ("--device meta", "cpu"),
    ("--model /no/such/folder", "folder"), ("--model empty", "cannot be used"),
    ("--lora-targets nothing_proj", "q_proj"), ("--lora-rank 0", "between 1 and"),
    ("--lora-rank 100000000", "between 1 and"),
    ("--steps 0", "between 1 and"), ("--num-envs -4", "between 1 and"),
    ("--num-envs 1000000", "between 1 and"), ("--rollout-steps 0", "between 1 and"),
    ("--steps 5", "less than one rollout"), ("--minibatch 48", "divide"),
    ("--steps many", "invalid int"), ("--gamma 1.5", "between 0 and 1"),
    ("--policy-lr nan", "policy_lr"), ("--policy-lr inf", "policy_lr"),
    ("--policy-lr -1", "policy_lr"), ("--clip 1e308", "clip"), ("--seed -1", "seed"),
    ("--episodes 0", "between 1 and"), ("--episodes 1000000000", "between 1 and"),
    ("--stepz 3", "did you mean --steps"), ("--policy_lr 3", "did you mean --policy-lr"),
    ("--step 3", "did you mean --steps"), ("--gradient-checkpointing", "--gradient-accum"),
    ("here", "--help"), ("--seed", "expected one argument"), ("--tokens", "expected at least"),
    ("--eval no/such/run", "no/such/run"), ("--resume no/such/run", "no/such/run"),
    ("--watch no/such/run", "no/such/run"), ("--compare no/such/run", "no/such/run"),
    ("--eval --task flying", "unknown task"), ("--eval --episodes 0", "between 1 and"),
    ("--eval no/such/run --norm sum", "no/such/run"), ("--resume empty", "empty"),
    ("--eval --resume empty", "different commands"), ("--tokens a --watch", "different commands"),
    ("--from last", "--resume"), ("--prompt x", "--tokens"), ("--delay 1", "--watch"),
    ("--tokens a b --task cheese", "--eval"), ("--compare x --task cheese", "--watch"),
    ("--gif x.gif", "--watch"), ("--greedy", "--eval"), ("--watch --delay -1", "between 0 and"),
    ("--tokens ' '", "empty"), ("--tokens 'go on' 'go on'", "same tokens"),
    ("--tokens go --prompt 'to '", "ends in"),
    ("--env-args size", "key=value"), ("--env nowhere:World", "nowhere"),
    ("--env missing.py:World", "missing.py"), ("--env overcooked --env-args colour=3", "colour"),
    ("--out empty/../x", "run"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(flags, word, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert twosome.main(shlex.split(flags)) == 2
    printed = capfd.readouterr()
    line = printed.err
    assert line.count("\n") == 1 and line.startswith("twosome.py: "), line
    assert word in line and len(line) <= 520, line
    assert not printed.out
    # Nothing is left behind, least of all a folder of a run.
    assert os.listdir(tmp_path) == ["empty"] and not os.listdir("empty")


def test_what_is_typed_cannot_command_the_terminal(capfd):
    for flags in (["--task", "a\x1b[31m\u202eb"], ["--\x1b[2J", "3"], ["--model", "/\x07" * 3000]):
        assert twosome.main(flags) == 2
        line = capfd.readouterr().err
        assert line[:-1].isprintable() and len(line) <= 520


def test_a_run_that_an_earlier_version_wrote_says_so(tmp_path, capfd):
    """The folder of the first version: settings without the number of a format."""
    settings = {"env": "overcooked", "task": "tomato-salad", "steps": 12800, "norm": "word"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "checkpoint-5").mkdir()
    for flag in ("--resume", "--eval", "--watch"):
        assert twosome.main([flag, str(tmp_path)]) == 2
        line = capfd.readouterr().err
        assert "earlier version" in line and line.count("\n") == 1
        assert "damaged" not in line


def test_bad_input_from_the_outside(tmp_path):
    """The same through the operating system, once: code, line, and nothing on standard output."""
    done = run_program("--stepz", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("twosome.py: unrecognized arguments: --stepz 3;"
                           " did you mean --steps?\n")


# -----------------------------------------------------------------------------
# Small things that are printed.


def test_intervals_by_hand():
    """Normal for returns, Wilson's for rates: of 8 successes in 10, 49 to 94 %."""
    result = {"returns": np.array([0.0, 1.0] * 5), "successes": np.array([1.0] * 8 + [0.0] * 2),
              "steps": np.full(10, 7.0)}
    found = command.summarize(result)
    half = 1.96 * np.std(result["returns"], ddof=1) / 10**0.5
    assert found["return_interval"] == pytest.approx([0.5 - half, 0.5 + half])
    assert found["success_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert (found["episodes"], found["return"], found["episode_steps"]) == (10, 0.5, 7.0)
    always = {**result, "successes": np.ones(10)}
    low, high = command.summarize(always)["success_interval"]
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)


def test_options_of_a_world_are_literals_or_texts():
    config = dataclasses.replace(command.Config(), env_args="size=4,slippery=True,name=a b")
    assert worlds.read_arguments(config.env_args) == {"size": 4, "slippery": True, "name": "a b"}

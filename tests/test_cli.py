"""The command line: the README's command leaves what it promises, presets hold the published numbers, bad input is one line."""
import csv
import json
import os
import subprocess
import sys

import pytest

import twosome

SMALL = ["--steps", "256", "--num-envs", "2", "--rollout-steps", "32"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run, made by the command itself: (folder, what it printed)."""
    folder = str(tmp_path_factory.mktemp("cli") / "run")
    command = [sys.executable, os.path.join(os.path.dirname(twosome.__file__), "twosome.py"), "--env", "overcooked", "--out", folder, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def rows(folder):
    with open(os.path.join(folder, "metrics.csv")) as file:
        return [{name: value for name, value in row.items() if name not in ("seconds", "steps_per_second")} for row in csv.DictReader(file)]


def test_a_run_leaves_what_it_promises(finished):
    folder, printed = finished
    assert {"config.json", "metrics.csv", "summary.json", "curve.png"} <= set(os.listdir(folder))
    with open(os.path.join(folder, "summary.json")) as file:
        summary = json.load(file)
    assert summary["episodes"] == 100 and summary["steps"] == 256 and summary["task"] == "tomato-salad"
    assert summary["return_interval"][0] <= summary["return"] <= summary["return_interval"][1] and summary["best_return"] == pytest.approx(0.9205, abs=1e-4)
    assert [int(row["steps"]) for row in rows(folder)] == [64, 128, 192, 256]
    assert open(os.path.join(folder, "curve.png"), "rb").read(4) == b"\x89PNG"
    for word in ("return", "success", "best possible", f"--eval {folder}"):
        assert word in printed
    assert "Traceback" not in printed and "Warning" not in printed


def test_same_seed_same_metrics_other_seed_others(finished, tmp_path, capsys):
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert twosome.main([*SMALL, "--out", str(tmp_path / "same")]) == 0
    assert twosome.main([*SMALL, "--out", str(tmp_path / "other"), "--seed", "2"]) == 0
    torch.set_num_threads(threads)
    assert rows(tmp_path / "same") == rows(finished[0]) and rows(tmp_path / "other") != rows(finished[0])


def test_evaluation_prints_the_untrained_llm_beside_the_run(finished, capsys):
    assert twosome.main(["--eval", finished[0], "--task", "cheese", "--episodes", "10"]) == 0
    trained = capsys.readouterr().out
    assert "virtualhome/cheese" in trained and "untrained" in trained
    assert twosome.main(["--eval", "--task", "tomato-salad", "--episodes", "10"]) == 0
    assert "overcooked/tomato-salad" in capsys.readouterr().out


def test_a_run_keeps_its_own_settings(finished, capsys):
    for flags in (["--eval", finished[0], "--norm", "token"], ["--resume", finished[0], "--steps", "99999"]):
        assert twosome.main(flags) == 2
        assert f"own settings; leave out {flags[2]}" in capsys.readouterr().err


def test_every_task_is_meant_by_all():
    named = twosome.tasks_named(None, "all")
    assert ("virtualhome", "laundry") in named and ("overcooked", "onion-salad") in named and len(named) == 15
    assert twosome.tasks_named("overcooked", "all") == [(env, task) for env, task in named if env == "overcooked"]


@pytest.mark.parametrize("env, task, numbers", [
    ("overcooked", "tomato-salad", (5e-7, 1e-5, 0.99, 500_000)), ("overcooked", "tomato-lettuce-salad", (5e-7, 1e-5, 0.99, 500_000)),
    ("virtualhome", "food-preparation", (1e-6, 5e-5, 0.95, 50_000)), ("virtualhome", "entertainment", (1e-6, 5e-5, 0.95, 200_000))])
def test_the_papers_preset_is_the_published_table(env, task, numbers):
    config, *_ = twosome.arguments(["--preset", "paper", "--env", env, "--task", task])
    assert (config.policy_lr, config.critic_lr, config.gamma, config.steps) == numbers
    assert (config.num_envs, config.rollout_steps, config.epochs, config.minibatch, config.gradient_accumulation) == (4, 32, 1, 32, 8)
    assert (config.clip, config.entropy, config.value_coefficient, config.max_grad_norm, config.gae_lambda, config.target_kl) == (0.2, 0.01, 0.5, 0.5, 0.95, 0.02)
    assert (config.norm, config.lora_rank, config.lora_alpha) == ("word", 8, 16)


def test_a_flag_wins_over_its_preset():
    config, *_ = twosome.arguments(["--preset", "paper", "--policy-lr", "0.01", "--norm", "token"])
    assert config.policy_lr == 0.01 and config.norm == "token" and config.critic_lr == 1e-5


def test_every_flag_has_help_and_there_are_fewer_than_thirty_settings():
    import dataclasses
    fields = dataclasses.fields(twosome.Config)
    assert len(fields) < 30 and all(field.metadata["help"] for field in fields)


BAD = [
    (["--env", "undercooked"], "overcooked"), (["--task", "potato-salad"], "tomato-salad"), (["--norm", "letter"], "word"),
    (["--preset", "best"], "paper"), (["--model", "/no/such/folder"], "folder"), (["--model", "tests"], "config.json"),
    (["--steps", "0"], "between 1 and"), (["--num-envs", "-4"], "between 1 and"), (["--rollout-steps", "0"], "between 1 and"),
    (["--minibatch", "48"], "divide"), (["--gradient-accumulation", "5"], "divide"), (["--steps", "many"], "invalid int"),
    (["--stepz", "3"], "unrecognized"), (["--gamma", "1.5"], "between 0 and 1"), (["--policy-lr", "nan"], "positive"), (["--seed", "-1"], "seed"),
    (["--lora-rank", "0"], "between 1 and"), (["--lora-targets", "nothing_proj"], "q_proj"), (["--device", "abacus"], "cpu"),
    (["--dtype", "float8"], "float32"), (["--load-in", "2bit"], "4bit"), (["--eval", "no/such/run"], "no/such/run"),
    (["--resume", "no/such/run"], "no/such/run"), (["--eval", "--task", "flying"], "unknown task"), (["--eval", "--episodes", "0"], "at least 1"),
    (["--eval", "no/such/run", "--norm", "sum"], "no/such/run"), (["--tokens", " "], "empty"), (["--tokens", "go on", "go on"], "same tokens"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(flags, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert twosome.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error, error
    assert not [name for name in os.listdir(tmp_path) if name not in ("tests", "runs")]
    assert not os.path.exists("runs") or not os.listdir("runs")


def test_a_folder_that_holds_a_run_is_left_alone(finished, capsys):
    before = {name: os.path.getmtime(os.path.join(finished[0], name)) for name in os.listdir(finished[0])}
    assert twosome.main([*SMALL, "--out", finished[0]]) == 2
    assert "--resume" in capsys.readouterr().err
    assert {name: os.path.getmtime(os.path.join(finished[0], name)) for name in os.listdir(finished[0])} == before

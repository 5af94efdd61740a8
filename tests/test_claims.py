"""The measurement measures what it says: jobs, stored files, statistics, tables and baselines."""
import csv
import dataclasses
import filecmp
import io
import json
import math
import os
import shutil
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

import envs
import ppo
import prompts
import twosome
from engine import command
from experiments import ability, baselines, claims, jobs, lakes, records, report, retention, tables

EVERY_GROUP = ["--only", *jobs.GROUPS]

# -----------------------------------------------------------------------------
# Statistics, against independent answers.


@pytest.mark.parametrize("freedom", (1, 2, 4, 9, 30, 31, 100))
def test_the_t_quantile_leaves_two_and_a_half_per_cent_above_it(freedom):
    """Integrate Student's density, which NumPy can, up to the quantile."""
    x = np.linspace(0, tables.t_quantile(freedom), 100_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / (freedom * math.pi) ** 0.5
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-4)


def test_an_interval_over_seeds_is_the_textbooks():
    mean, half = tables.across([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert np.isnan(tables.across([0.1])[1])
    assert tables.plus_minus([0.5]) == "0.500"
    assert tables.plus_minus([]) == "-"


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side():
    assert tables.interquartile_mean([np.array([0, 1, 100]), np.array([2, -50, 3, 4, 5])]) == 2.5


def test_the_probability_of_improvement_counts_pairs_and_half_a_tie():
    mine, theirs = [np.array([1, 2]), np.array([5])], [np.array([1, 0]), np.array([6])]
    assert tables.probability_of_improvement(mine, theirs) == pytest.approx((3.5 / 4 + 0) / 2)


def test_the_bootstrap_draws_seeds_within_each_task():
    sample = [np.array([0.0, 1.0, 0.0, 1.0]), np.array([10.0] * 4)]
    low, high = tables.bootstrap(lambda tasks: tasks[0].mean(-1) + tasks[1].mean(-1), sample)
    assert (low, high) == (10, 11)


def test_what_is_drawn_at_once_is_measured_as_one_by_one():
    rng = np.random.default_rng(0)
    mine, theirs = ([rng.integers(0, 4, (7, seeds)) / 1.0 for seeds in (3, 5)] for _ in range(2))
    for measure, samples in ((tables.interquartile_mean, [mine]),
                             (tables.probability_of_improvement, [mine, theirs])):
        one_by_one = [measure(*([task[n] for task in sample] for sample in samples))
                      for n in range(7)]
        assert measure(*samples) == pytest.approx(one_by_one)
        assert len({*one_by_one}) > 1


# -----------------------------------------------------------------------------
# The table of jobs.


def listed(*flags):
    return jobs.table_of_jobs(claims.parse([*EVERY_GROUP, *flags]))


def test_every_job_can_be_done_and_has_a_name_of_its_own():
    options = claims.parse(EVERY_GROUP)
    found = [job for group in jobs.GROUPS.values() for job in group(options)]
    arguments = {}
    for job in found:
        assert job.kind in claims.KINDS
        assert json.loads(json.dumps(job.arguments)) == job.arguments
        assert 0 < job.minutes < 60
        # A job that two groups share is the same job in both.
        assert arguments.setdefault(job.name, job.arguments) == job.arguments
        change = job.arguments.get("change") or ""
        assert not change or change in baselines.VARIANTS
        if job.kind == "untrained" and "variant" in job.arguments:
            assert job.arguments["variant"] in baselines.VARIANTS
    assert {job.kind for job in found} == {*claims.KINDS}
    # The seeds on which anything was chosen are never those that are reported.
    for job in jobs.tuning_jobs(options):
        assert job.arguments["seed"] > 100


def test_every_run_is_a_command_that_the_command_line_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "random_weights", lambda *args: None)
    for job in listed("--models", "pocket_lm", "smollm2", "--seeds", "1"):
        if job.kind in ("learn", "quest"):
            script, *flags = claims.command_of(job.arguments, str(tmp_path / "run"))
            assert os.path.exists(script)
            at = flags.index("--out")
            flags = [flag for flag in flags[:at] if flag.startswith("--")]
            config, _ = command.parse(flags)
            assert config.env == claims.world_of(job.arguments)
            assert config.env_args == job.arguments.get("flags", {}).get("env-args", "")
            assert "task" not in job.arguments or config.task == job.arguments["task"]
            assert config.seed == job.arguments["seed"]


def test_a_run_that_was_begun_is_resumed_and_one_that_cannot_be_begins_again(tmp_path):
    job = jobs.learn_job(claims.parse([]), "pocket_lm", "word", "tomato-salad", 1).arguments
    (tmp_path / "config.json").write_text("{}")
    assert claims.command_of(job, str(tmp_path))[1:] == ["--resume", str(tmp_path)]
    [foreign, *_] = [job.arguments for job in listed("--only", "worlds")]
    named = os.path.join(records.ROOT, "examples", "frozen_lake.py:frozen_lake")
    resume = ["--resume", str(tmp_path), "--env", named]
    assert claims.command_of(foreign, str(tmp_path))[1:] == resume
    changed = {**job, "change": "full-finetune"}
    assert "--resume" not in claims.command_of(changed, str(tmp_path))
    assert not tmp_path.exists()


# -----------------------------------------------------------------------------
# Stored files.


def test_numbers_are_stored_in_five_digits_and_nan_as_null(tmp_path):
    path = str(tmp_path / "x.json")
    records.write_json(path, {"a": [np.float32(0.123456789), 30_720.0, 1_234_567, float("nan")],
                             "b": {"c": np.array([1e-7])}})
    assert records.read_json(path) == {"a": [0.12346, 30_720, 1_234_567, None], "b": {"c": [1e-7]}}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("text, why", (
    ('{"format": 2, "name": "random", "kind"', "torn or no JSON object"),
    ("[]", "torn or no JSON object"),
    ('{"format": 7, "name": "random"}', "another version or foreign"),
    ('{"format": 1, "name": "random"}', "another version or foreign"),
    ('{"format": 2, "name": "elsewhere"}', "another version or foreign"),
    ('{"format": 2, "name": "random", "arguments": {"episodes": 3}}', "with other arguments")))
def test_a_stored_file_that_cannot_be_used_is_one_line(tmp_path, capsys, text, why):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "random.json").write_text(text)
    assert claims.main(["--only", "learning", "--out", str(tmp_path)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert why in line and "random.json" in line and "delete it" in line
    assert (folder / "random.json").read_text() == text  # nothing measured is lost


def test_a_report_without_anything_stored_is_one_line(tmp_path, capsys):
    assert claims.main(["--report", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_quick_look_is_a_part_of_the_whole_that_trains_little():
    whole = {job.name for job in jobs.table_of_jobs(claims.parse([]))}
    quick = jobs.table_of_jobs(claims.parse(["--quick"]))
    assert {job.name for job in quick} <= whole and 50 < len(quick) < 70
    trained = [job for job in quick if job.kind == "learn"]
    assert len(trained) < 20 and {job.arguments["steps"] for job in trained} == {1024}
    assert all(job.minutes <= 0.3 for job in quick)
    asked = jobs.table_of_jobs(claims.parse(["--quick", "--only", "ablations"]))
    assert {"rank-1", "head-alone"} <= {job.arguments["variant"] for job in asked}


# -----------------------------------------------------------------------------
# A campaign, whole.


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A folder in which the smallest campaign has run, and its flags."""
    folder = tmp_path_factory.mktemp("campaign")
    flags = ["--quick", "--only", "learning", "--tasks", "food-preparation", "--episodes", "2",
             "--steps", "256", "--work", str(folder / "work"), "--out", str(folder / "out")]
    assert claims.main(flags) == 0
    return folder, flags


def test_a_finished_run_leaves_one_small_file(campaign):
    folder, _ = campaign
    names = sorted(os.listdir(folder / "out" / "runs"))
    assert names == ["learn-pocket_lm-word-food-preparation-1.json", "random.json",
                     "untrained-pocket_lm-word-food-preparation.json"]
    path = folder / "out" / "runs" / names[0]
    record = records.read_record(str(path))
    assert path.stat().st_size < 20_000
    assert str(folder) not in path.read_text()
    assert record["curve"]["steps"] == [0, 256]
    assert record["summary"]["primitive_steps"] == 256
    assert 100 < record["peak_mib"] < 4000
    assert record["settings"]["policy_lr"] == 3e-3


def test_what_is_stored_is_not_measured_again(campaign):
    """Not even if runs/ was thrown away."""
    folder, flags = campaign
    shutil.rmtree(folder / "work")
    start = time.perf_counter()
    assert claims.main(flags) == 0
    assert time.perf_counter() - start < 1


def test_a_run_of_other_settings_is_not_taken_for_the_jobs_own(campaign, tmp_path, monkeypatch):
    """Neither gone on with nor looked at: what it would tell is not what the job's name says."""
    folder, flags = campaign
    record = records.read_record(str(next((folder / "out" / "runs").glob("learn-*.json"))))
    job, run = record["arguments"], tmp_path / record["name"]
    run.mkdir()
    config, _ = command.parse([f"--{name}={value}" for name, value in claims.flags_of(job).items()])
    stored = {**vars(config), "dtype": "float32", "out": str(run)}
    records.write_json(str(run / "config.json"), stored)
    records.write_json(str(run / "summary.json"), {})
    records.write_json(str(run / "claims.json"), {"peak_mib": 1})
    assert claims.trained(job, str(run)) == {"peak_mib": 1}
    records.write_json(str(run / "config.json"), {**stored, "policy_lr": 0.5})
    with pytest.raises(records.ClaimsError, match="another policy_lr; delete it"):
        claims.trained(job, str(run))


def test_an_agent_plays_every_task_that_it_never_saw_with_draws_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(claims, "run_of", lambda job, folder: "its run")
    monkeypatch.setattr(twosome, "load", lambda folder: (folder, None))
    monkeypatch.setattr(claims, "play", lambda *args: asked.append(args) or {"return": 1.0})
    job = {"task": "cheese", "seed": 3, "episodes": 2}
    facts = claims.transfer(job, "folder")
    assert ("its run", "virtualhome", "laundry", 2, 3) in asked and len(asked) == 14
    assert {*facts["transfer"]} == {*jobs.EVERY} - {"cheese"}
    options = {"model": "pocket_lm", "norm": "word", "seed": 1}
    found = [{"kind": "learn", "arguments": {"task": "cheese", **options},
              "summary": {"return": 1}},
             {"kind": "transfer", "arguments": {"task": "cheese", **options},
              "transfer": {"laundry": {"return": 2}}}]
    assert tables.results_on(found, "pocket_lm", "cheese", "laundry") == [{"return": 2}]
    assert tables.results_on(found, "pocket_lm", "cheese", "cheese") == [{"return": 1}]
    assert tables.results_on(found, "pocket_lm", "pizza", "cheese") == []
    found[1]["agent"] = {"return": 3}  # trained anew, so not the record's run
    second = {"kind": "learn", "arguments": {"task": "cheese", **options, "seed": 2},
              "summary": {"return": 4}}  # never played elsewhere
    assert tables.results_on([*found, second], "pocket_lm", "cheese", "cheese") == [{"return": 3}]


def test_a_record_tells_what_the_agent_looked_at_does_itself(tmp_path, monkeypatch):
    own = {"return": 0.5, "success": 1.0, "cpu_seconds": 9.0}
    (tmp_path / "run").mkdir()
    records.write_json(str(tmp_path / "run" / "summary.json"), {**own, "steps": 8})
    monkeypatch.setitem(claims.KINDS, "transfer", lambda job, folder: {"transfer": {}})
    options = claims.parse(["--out", str(tmp_path), "--work", str(tmp_path)])
    job = {"name": "it", "kind": "transfer", "arguments": {"run": "run"}}
    claims.work(json.dumps(job), options)
    assert records.read_record(str(tmp_path / "runs" / "it.json"))["agent"] == own


def test_a_job_that_fails_is_named_and_the_others_go_on(tmp_path, capfd, monkeypatch):
    bad = jobs.Job("bad", "learn", {"env": "no"}, 1)
    monkeypatch.setattr(claims, "table_of_jobs", lambda options: [bad])
    flags = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert claims.main(flags) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("bad: exit code") and "bad.log" in last
    assert not (tmp_path / "out").exists()


def test_jobs_that_share_a_run_never_run_at_once(monkeypatch, tmp_path):
    """A run has a lock: a job that finds another process at work in it would fail."""
    learned = [jobs.Job(f"learn-{n}", "learn", {}, 1) for n in (1, 2)]
    found = [*learned, *(jobs.of_run(kind, dataclasses.replace(job, arguments={"seed": n}), 1)
                         for n, job in enumerate(learned) for kind in ("transfer", "retention"))]
    now, seen = [], []

    def process(campaign, job):
        now.append(job.arguments.get("run", job.name))
        seen.append([*now])
        time.sleep(0.05)
        now.remove(job.arguments.get("run", job.name))

    monkeypatch.setattr(claims.Campaign, "process", process)
    options = claims.parse(["--jobs", "4", "--work", str(tmp_path)])
    assert claims.Campaign(options).run(found) == 0
    assert len(seen) == 6 and all(len({*runs}) == len(runs) for runs in seen)
    assert max(map(len, seen)) == 2  # different runs go on side by side


# -----------------------------------------------------------------------------
# The report, on invented results.


def invented_run(kind, name, task, seed, rise, **arguments):
    """Return a record whose return rises evenly to the best possible until `rise` steps."""
    best = tables.best_return(task)
    steps = [0, rise, 2 * rise]
    end = {"steps": 2 * rise, "primitive_steps": 2 * rise, "return": best - seed / 1000,
           "success": 1.0, "best": best, "cpu_seconds": 10.0 + seed}
    return {"format": records.FORMAT, "name": f"{name}-{task}-{seed}", "kind": kind,
            "arguments": {"task": task, "seed": seed, **arguments}, "summary": end,
            "peak_mib": 400 + seed,
            "curve": {"update": [0, 1, 2], "steps": steps, "episodes": [100, 100, 200],
                      "primitive_steps": [None, *steps[1:]], "return": [0.0, best, best],
                      "success": [0, 1, 1], "entropy": [None, 1.0, 0.5], "kl": [None, 0.0, 0.0],
                      "cpu_seconds": [0.0, 5.0, 10.0]}}


def invented_transfer(task, seed, value, **more):
    """Return a record of an agent that plays every other task alike."""
    elsewhere = {"return": value, "success": 0.5}
    return {"format": records.FORMAT, "name": f"transfer-{task}-{seed}", "kind": "transfer",
            "arguments": {"model": "pocket_lm", "norm": "word", "task": task, "seed": seed, **more},
            "transfer": {other: elsewhere for other in jobs.EVERY if other != task}}


@pytest.fixture
def invented(tmp_path):
    """A folder of results in which every figure is known."""
    result = {"return": 0.0, "success": 0.0, "return_interval": [0.0, 0.0]}
    found = [{"format": records.FORMAT, "name": "random", "kind": "random", "arguments": {},
              "results": dict.fromkeys(jobs.EVERY, result)}]
    for task in jobs.TASKS:
        for seed in (1, 2, 3):
            found.append(invented_run("learn", "twosome", task, seed, 1000, model="pocket_lm",
                                      norm="word"))
            found.append(invented_transfer(task, seed, 0.1 * seed))
            found.append(invented_run("ppo", "ppo", task, seed, 4000, form="equal"))
    for record in found:
        records.write_json(str(tmp_path / "runs" / f"{record['name']}.json"), record)
    return tmp_path


def rows_of(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_say_what_was_stored(invented):
    assert claims.main(["--report", "--out", str(invented)]) == 0
    first = rows_of(invented, "learning-pocket_lm")[0]
    assert first["task"] == "tomato-salad"
    assert first["return of each seed"] == "0.9195, 0.9185, 0.9175"
    assert first["mean ± 95 %"] == "0.9185 ± 0.0025"  # 4.303 * 0.001 / sqrt(3)
    assert first["random"] == "0.000 (0.0%)"
    assert first["CPU seconds"] == "11 to 13"
    assert first["peak MiB"] == "401 to 403"
    assert rows_of(invented, "transfer-pocket_lm")[1]["trained on tomato-salad"].startswith("0.200")
    steps = {row["method"]: row for row in rows_of(invented, "efficiency-pocket_lm")
             if row["task"] == "tomato-salad"}
    assert steps["TWOSOME, word"]["primitive steps to 90 %"] == "1,000"
    ratio = "times the steps of TWOSOME, word"
    assert steps["PPO, equal"][ratio] == "4.00 (4.00 to 4.00)"
    both = {row["method"]: row for row in rows_of(invented, "aggregate-pocket_lm")}
    better = "chance that TWOSOME, word is better then"
    assert both["PPO, equal"][better] == "1.000 (1.000 to 1.000)"
    judged = {row["claim"]: row for row in rows_of(invented, "claims-pocket_lm")}
    first = judged[next(iter(tables.CLAIMS))]
    assert first["holds in"] == ("4 of 4; not measured everywhere: PPO, published, PPO, tuned,"
                                 " SayCan-style, TWOSOME, random weights, the untrained LLM")
    assert first["holds"] == "yes, so far"
    assert len(rows_of(invented, "learning")) == 24


def test_what_holding_gives_is_told_beside_the_same_agents_without_it(invented):
    found = records.stored(claims.parse(["--report", "--out", str(invented)]))
    for task, env in jobs.EVERY.items():
        found.append({"kind": "untrained", "result": {"return": 0.3, "success": 0.6}, "arguments": {
            "model": "pocket_lm", "norm": "word", "task": task, "env": env}})
    for seed in (1, 2):
        free = {"model": "pocket_lm", "norm": "word", "variant": "not-held"}
        found.append(invented_run("learn", "free", "tomato-salad", seed, 500, **free))
        found.append(invented_transfer("tomato-salad", seed, 0.05, variant="not-held"))
        for change, variant in ((1.0, {}), (8.0, free)):
            facts = {"trained": {"change_percent": change + seed, "kl": 0.01 * change}}
            found.append({"kind": "retention", "own": facts, "arguments": {
                "model": "pocket_lm", "norm": "word", "task": "tomato-salad", "seed": seed,
                **variant}})
    header, rows = tables.holding_table(found, "pocket_lm")
    held, free, other = (dict(zip(header, row, strict=True)) for row in rows)
    # What is measured of an agent is told while the rest is missing.
    assert (other["trained on"], other["perplexity: change in %"]) == ("food-preparation", "-")
    elsewhere = "return on the 14 unseen tasks (untrained LLM)"
    assert (held["policy"], held[elsewhere].split(" ")[0]) == ("held", "0.200")
    assert (free["policy"], free[elsewhere]) == ("not-held", "0.050 ± 0.000 (0.300)")
    assert free["success there (untrained LLM)"] == "0.500 ± 0.000 (0.600)"
    changed = "perplexity: change in %"
    assert held[changed].startswith("2.50 ±") and free[changed].startswith("9.50 ±")


def test_a_seed_that_never_gets_there_counts_with_all_its_steps():
    run = invented_run("learn", "x", "cheese", 1, 1000)
    found = [{"kind": "random", "arguments": {},
              "results": {"cheese": {"return": 0.0}}}]
    assert tables.reached(found, "cheese", run) == (1000, 5.0, True)
    run["curve"]["seconds"] = [0.0, 7.0, 14.0]
    assert tables.reached(found, "cheese", run, ("seconds", "steps")) == (7.0, 1000, True)
    run["curve"]["return"] = [0.0, None, 0.1]
    assert tables.reached(found, "cheese", run) == (2000, 10.0, False)


def test_what_was_measured_alone_is_told_by_the_clock_and_counts_nowhere_else(invented):
    found = records.stored(claims.parse(["--report", "--out", str(invented)]))
    before = {name: make(found, "pocket_lm") for name, make in tables.TABLES.items()}
    free = {"model": "pocket_lm", "norm": "word", "variant": "quiet"}
    for record in (invented_run("learn", "quiet", "tomato-salad", 1, 3000, **free),
                   invented_run("ppo", "quiet-ppo", "tomato-salad", 1, 9000, form="equal",
                                variant="quiet")):
        record["curve"]["seconds"] = [0.0, 6.0, 12.0]
        found.append(record)
    after = {name: make(found, "pocket_lm") for name, make in tables.TABLES.items()}
    assert after.pop("quiet")[1] == [["tomato-salad", "TWOSOME, word", "3,000", "6", "5"],
                                     ["tomato-salad", "PPO, equal", "9,000", "6", "5"]]
    assert before.pop("quiet")[1] == [] and after == before


def test_a_first_perfect_episode_is_not_ninety_per_cent_of_the_way():
    run = invented_run("learn", "x", "cheese", 1, 1000)
    found = [{"kind": "random", "arguments": {}, "results": {"cheese": {"return": 0.0}}}]
    run["curve"]["episodes"] = [100, 1, 200]
    assert tables.reached(found, "cheese", run) == (2000, 10.0, True)
    run["curve"]["episodes"] = [100, 1, 2]  # never a hundred: all its steps count
    assert tables.reached(found, "cheese", run) == (2000, 10.0, False)
    run["curve"]["episodes"] = [100, 1, 200]
    x, mean, _ = tables.curve([run], "steps")
    assert mean[100] == pytest.approx(tables.best_return("cheese") * x[100] / 2000)


def test_a_line_ends_where_its_run_does():
    """Too few episodes for a point: the evaluation after training stands at the end."""
    run = invented_run("learn", "x", "cheese", 1, 1000)
    run["curve"]["episodes"] = [100, 1, 2]
    values, steps = tables.line(run, "steps")
    assert (values[-1], steps[-1]) == (run["summary"]["return"], 2000)
    run["curve"]["episodes"] = [100, 1, 200]
    assert len(tables.line(run, "steps")[0]) == 2


def test_two_seeds_and_a_rival_that_never_got_there_leave_open_what_they_cannot_show():
    def took(*steps, there=True):
        return np.array(steps), None, np.array([there] * len(steps))

    ours = took(9, 10, 11)
    assert tables.sooner(ours, took(30, 31, 32)) is True
    assert tables.sooner(ours, took(30, 31)) is None  # two seeds
    assert tables.sooner(ours, took(3, 4, 5)) is False
    assert tables.sooner(ours, took(3, 4, 5, there=False)) is None
    assert tables.sooner(ours, took(30, 31, 32, there=False)) is True
    assert tables.sooner(took(9, 10, 11, there=False), took(30, 31, 32)) is False


def test_a_verdict_says_what_the_intervals_leave_open():
    assert tables.above(0.1, 0.2) is True and tables.above(-0.2, -0.1) is False
    assert tables.above(-0.1, 0.2) is None
    assert tables.verdict_of([("a", True), ("b", None)]) == ("1 of 2; open b", "open")
    assert tables.verdict_of([("a", np.False_), ("b", None)]) == ("0 of 2; not a; open b", "no")
    assert tables.verdict_of([("a", np.True_)]) == ("1 of 1", "yes")
    assert tables.verdict_of([("a", np.True_)], whole=False) == ("1 of 1", "yes, so far")
    assert tables.difference((1.0, 0.3), (0.5, 0.4)) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize(("interval", "verdict"), [
    ((-1.0, 1.9), "yes, so far"), ((1.9, 2.1), "open, so far"), ((2.1, 2.3), "no, so far"),
    ((-2.1, -1.9), "open, so far"), ((-2.3, -2.1), "no, so far"), ((-3.0, 3.0), "open, so far")])
def test_a_perplexity_is_kept_if_the_interval_of_its_change_says_so(interval, verdict):
    record = {"kind": "retention", "own": {"trained": {"change_interval": interval}},
              "arguments": {"model": "pocket_lm", "norm": "word", "task": "cheese", "seed": 1}}
    assert tables.keeps([record], "pocket_lm")[1] == verdict


def test_an_untrained_rival_is_counted_once():
    played = {"return": 0.5, "success": 0.6}
    asked = {"model": "pocket_lm", "norm": "word", "task": "tomato-salad"}
    results = {f"{norm}, {kind}": played for norm in ("word", "sum")
               for kind in ("admissible, sampled", "admissible, greedy", "value, greedy")}
    found = [{"kind": "untrained", "arguments": asked, "result": played},
             {"kind": "saycan", "arguments": asked, "results": results}]
    assert [*tables.untrained_rivals(found, "pocket_lm", "tomato-salad")] == [
        "the untrained LLM", "SayCan-style (word, admissible, greedy)",
        "SayCan-style (sum, admissible, sampled)", "SayCan-style (sum, admissible, greedy)"]


def test_the_unseen_tests_are_the_papers_eight_and_all_other_pairs():
    assert len(tables.FIGURE_6) == 8 and len(tables.PAIRS) == 4 * 14
    assert {*tables.FIGURE_6} < {*tables.PAIRS}


def test_the_same_results_give_the_same_files(invented, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(invented / "runs", again / "runs")
    for folder in (invented, again):
        assert claims.main(["--report", "--out", str(folder)]) == 0
    names = [name for name in os.listdir(invented) if "." in name]
    assert {"learning.md", "learning.csv", "learning.png", "learning.svg",
            "learning-actions.svg", "claims.md"} <= {*names}
    same, other, errors = filecmp.cmpfiles(invented, again, names, shallow=False)
    assert (sorted(same), other, errors) == (sorted(names), [], [])


def test_the_reasons_of_the_normalisations_are_drawn(invented):
    phrases = {"pick up the tomato": [-3.0, 4, 4], "serve": [-1.0, 1, 1]}
    record = {"format": records.FORMAT, "name": "prior-pocket_lm-tomato-salad", "kind": "prior",
              "arguments": {"model": "pocket_lm", "task": "tomato-salad"}, "prompts": 1,
              "entropies": dict.fromkeys(tables.NORMS, 0.5), "phrases": phrases,
              "nats_a_token": [-0.7, 1.0], "nats_a_word": [-0.7, 1.0],
              "results": {norm: {"return": 0.1, "success": 0.0} for norm in tables.NORMS},
              "state": {"phrases": [*phrases], **dict.fromkeys(tables.NORMS, [0.2, 0.8])}}
    records.write_json(str(invented / "runs" / f"{record['name']}.json"), record)
    assert claims.main(["--report", "--out", str(invented)]) == 0
    for name, told in (("normalisation", "pick up the tomato"), ("lengths", "words of the phrase")):
        assert told in (invented / f"{name}.svg").read_text()
    assert rows_of(invented, "lengths-pocket_lm")[0]["nats a token (R²)"] == "-0.70 (1.00)"


def test_tables_and_claims_can_be_told_from_part_of_the_results(invented):
    """Whichever record is missing, as while a campaign goes on, every table can be made."""
    found = records.stored(claims.parse(["--report", "--out", str(invented)]))
    for missing in ["", "random", *(f"{kind}-tomato-salad-{seed}" for seed in (1, 2, 3)
                                    for kind in ("twosome", "transfer", "ppo"))]:
        some = [record for record in found if record["name"] != missing]
        for make in tables.TABLES.values():
            header, rows = make(some, "pocket_lm")
            assert all(len(row) == len(header) for row in rows)
    # One seed of each side tells nothing of an interval.
    single = [record for record in found if record["arguments"].get("seed", 1) == 1]
    assert tables.efficient(single, "pocket_lm")[1] == "open, so far"


def test_what_is_stored_was_measured_with_the_settings_of_today():
    """A preset that changed would leave results behind that no command makes again."""
    options = claims.parse(["--only", *jobs.GROUPS])
    known = {job.name: job.arguments for job in jobs.table_of_jobs(options)}
    for record in records.stored(options):
        assert record["arguments"] == known.get(record["name"]), record["name"]
        if record["kind"] in ("learn", "quest"):
            assert claims.differing(record["arguments"], record["settings"]) == [], record["name"]
        assert '"/' not in json.dumps(record), f"a path of a machine in {record['name']}"


def test_a_readme_gets_its_tables_and_keeps_the_rest():
    text = ("a\n<!-- learning pocket_lm -->\nold\n<!-- end -->\nb\n"
            "<!-- output -->\n<!-- other thing -->\nkept\n<!-- end -->\n")
    once = report.filled_in(text, {"learning pocket_lm": "| new |\n"})
    assert once == text.replace("old\n", "| new |\n")
    assert report.filled_in(once, {"learning pocket_lm": "| new |\n"}) == once


def test_the_readmes_and_tables_are_what_the_stored_results_say(tmp_path):
    """No figure is written by hand: the report makes the same files again."""
    stored = os.path.join(records.RESULTS, "runs")
    if not os.path.isdir(stored):
        pytest.skip("nothing is stored yet")
    shutil.copytree(stored, tmp_path / "runs")
    options = claims.parse(["--out", str(tmp_path)])
    for folder in ("", "experiments"):
        path = tmp_path / f"README-{folder}.md"
        shutil.copy(os.path.join(records.ROOT, folder, "README.md"), path)
        options.readmes.append(str(path))
    before = [open(path, encoding="utf-8").read() for path in options.readmes]
    report.write(options)
    assert [open(path, encoding="utf-8").read() for path in options.readmes] == before
    for group in tables.TABLES:
        with open(os.path.join(records.RESULTS, f"{group}.md"), encoding="utf-8") as file:
            assert file.read() == (tmp_path / f"{group}.md").read_text()


# -----------------------------------------------------------------------------
# The baselines.


def test_ppo_without_an_llm_keeps_to_the_admissible_actions():
    env = envs.make("virtualhome")
    agent = baselines.Vector(env)
    item = agent.describe(*env.reset())
    row, = agent.log_probs([item])
    assert len(row) == len(item[1]) == 5
    assert row.exp().sum().item() == pytest.approx(1)
    assert agent.values([item, item]).shape == (2,)
    # Each policy of a batch is the softmax over its own item's admissible actions.
    items = [item, (tuple(2 * x + 1 for x in item[0]), (0, 2, 9)), (item[0], (4,))]
    for policy, (features, admissible) in zip(agent.log_probs(items), items, strict=True):
        logits = agent.actor(torch.tensor(features))[list(admissible)]
        assert torch.allclose(policy, logits.log_softmax(-1), atol=1e-6)
    # An empty set means that every action is admissible.
    assert len(agent.describe(np.zeros(11), {"admissible": []})[1]) == 10


def test_the_published_form_learns_from_its_reward_and_is_counted_under_ours():
    """0.1 for the chopped tomato is learnt from, 0.2 is counted; the walk there costs the same."""
    make = envs.make
    twin = baselines.Twin(make("overcooked", view=10, chop_reward=0.1),
                          make("overcooked", view=10))
    twin.reset(seed=0)
    rewards = [twin.step(action)[1] for action in (0, 2, 4)]
    assert twin.told[2] - rewards[2] == pytest.approx(0.1 * 0.99**2)
    facts = baselines.vector({"env": "overcooked", "task": "tomato-salad", "form": "published",
                              "seed": 101, "episodes": 2, "settings": {"steps": 1024}})[1]
    assert facts["settings"]["world"] == {"view": 10, "chop_reward": 0.1}
    assert facts["curve"]["steps"] == [0, 512, 1024]
    assert {*facts["curve"]} == {*claims.CURVE}


def test_the_forms_of_ppo_differ_in_their_conditions():
    published, world = baselines.vector_settings("published", "virtualhome", "entertainment")
    assert (published.gamma, world) == (0.99, {"gamma": 0.99})
    equal, world = baselines.vector_settings("equal", "virtualhome", "entertainment")
    assert (equal.gamma, world) == (0.95, {})
    assert (equal.num_envs, equal.rollout_steps, equal.epochs, equal.minibatch) == (4, 128, 4, 128)
    assert {*jobs.TUNED} == {*jobs.TASKS}
    for task, env in jobs.TASKS.items():
        config, _ = baselines.vector_settings("tuned", env, task, jobs.TUNED[task])
        config.validate()
        assert config.policy_lr == jobs.TUNED[task]["rate"]


def test_affordances_are_what_they_say():
    env = envs.make("virtualhome", task="food-preparation")
    possible = baselines.Afforded(env, "possible")
    _, info = possible.reset()
    assert info["affordance"] == [1.0] * 5
    *_, info = possible.step(4)  # walk to the pancake
    told = dict(zip(info["admissible"], info["affordance"], strict=True))
    assert told[6] == 1.0  # grab it
    free = baselines.Afforded(envs.make("virtualhome", mask=False), "possible")
    _, info = free.reset()
    assert info["affordance"][6] == 0.0  # nothing can be grabbed from afar
    assert info["affordance"][8] == 0.0  # nor opened


def test_a_value_is_a_share_of_the_best_possible_return():
    class Judge:
        def describe(self, obs, info):
            return obs

        def values(self, items):
            return torch.tensor([0.5])

    env = envs.make("virtualhome")
    _, info = baselines.Afforded(env, "value", Judge()).reset()
    assert info["affordance"] == pytest.approx([0.95 * 0.5 / env.best_return] * 5)


def test_saycan_multiplies_scores_and_affordances():
    class Told:
        def describe(self, obs, info):
            return "prompt", ("a", "b", "c")

        def log_probs(self, items):
            return [torch.tensor([0.2, 0.3, 0.5]).log() for _ in items]

    agent = baselines.SayCan(Told())
    row, = agent.log_probs([agent.describe(None, {"affordance": [1.0, 0.5, 0.0]})])
    torch.testing.assert_close(row.exp(), torch.tensor([0.2, 0.15, 0.0]) / 0.35)
    row, = agent.log_probs([agent.describe(None, {"affordance": [0.0, 0.0, 0.0]})])
    torch.testing.assert_close(row.exp(), torch.tensor([0.2, 0.3, 0.5]))


def test_a_temperature_is_found_at_which_entropies_match():
    rows = [torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.4, 0.1]).log()]
    entropy = baselines.mean_entropy(rows, 2.0)
    assert baselines.matching(rows, entropy) == pytest.approx(2.0, rel=1e-4)


def test_the_slope_is_taken_within_each_prompt():
    lengths = [[1, 2, 3], [2, 4]]
    values = [[5 - 2 * n for n in lengths[0]], [70 - 2 * n for n in lengths[1]]]
    assert baselines.slope(values, lengths) == pytest.approx((-2.0, 1.0))
    assert baselines.slope([[1, 2]], [[3, 3]]) == (None, None)


# -----------------------------------------------------------------------------
# TWOSOME with one thing changed.


@pytest.fixture
def told(monkeypatch):
    """A function that tells a task's first state under a variant."""
    usual = twosome.observation_text

    def tell(variant, env="overcooked", task=None, steps=()):
        monkeypatch.setattr(twosome, "observation_text", usual)
        baselines.vary(variant)
        world = envs.make(env, task=task)
        _, info = world.reset()
        for action in steps:
            *_, info = world.step(action)
        return twosome.observation_text(info)

    yield tell
    monkeypatch.setattr(twosome, "observation_text", usual)


@pytest.mark.parametrize("variant, principle", (
    ("no-cue", "cohesion"), ("no-articles", "articles"), ("not-named", "preferred actions"),
    ("one-verb", "our rule, verbs")))
def test_a_broken_principle_is_the_one_that_the_linter_names(told, variant, principle):
    found = set()
    for env in envs.TASKS:
        for task in envs.TASKS[env][:2]:
            assert prompts.lint(*told("", env, task)) == []
            found |= {line.split(":")[0] for line in prompts.lint(*told(variant, env, task))}
    assert found == {principle}


def test_one_phrase_an_action_whatever_it_does(told):
    first = told("one-phrase", "overcooked", "tomato-lettuce-salad")
    later = told("one-phrase", "overcooked", "tomato-lettuce-salad", steps=(0, 4))
    assert first[0] != later[0]
    assert first[1] == later[1]
    assert "get the tomato" in first[1] and len(set(first[1])) == 8
    home = told("one-phrase", "virtualhome", "cheese")[1]
    assert home == ("walk to the living room", "walk to the bathroom", "walk to the bedroom",
                    "walk to the cheese", "walk to the microwave")


@pytest.mark.parametrize("variant", ("uneven", *baselines.OTHER_WORDS))
def test_other_wordings_keep_the_principles_and_differ(told, variant):
    for env, task in (("overcooked", "tomato-lettuce-salad"), ("virtualhome", "entertainment")):
        usual, other = told("", env, task), told(variant, env, task)
        assert usual != other
        assert len(set(other[1])) == len(usual[1])
        assert [line for line in prompts.lint(*other) if "verbs" not in line] == []


@pytest.mark.parametrize("variant", ("critic-adapted", "full-finetune", "head-alone"))
def test_a_variant_trains_what_it_says(variant, monkeypatch):
    monkeypatch.setattr(twosome, "Agent", twosome.Agent)
    baselines.vary(variant)
    flags = "--steps 64 --num-envs 2 --rollout-steps 16 --minibatch 16 --task cheese".split()
    config, _ = command.parse(flags)
    agent, make_env = twosome.build(config)
    before = {name: weight.clone() for name, weight in agent.model.named_parameters()}
    feature = agent.last_hidden(["You see a tomato."])
    learner = twosome.Trainer(make_env, agent, config, 1)
    rollout = learner.rollout()
    learner.update(rollout, torch.randn(16, 2), rollout.values)
    moved = {name for name, weight in agent.model.named_parameters()
             if not torch.equal(weight, before[name])}
    adapted = any("lora_" in name for name in moved)
    assert adapted == (variant == "critic-adapted")
    assert variant != "head-alone" or moved == {"base_model.model.lm_head.weight"}
    assert variant != "full-finetune" or len(moved) > 30
    same = torch.equal(agent.last_hidden(["You see a tomato."]), feature)
    assert same == (variant != "critic-adapted")


def test_the_smaller_changes_do_what_they_say(monkeypatch):
    monkeypatch.setattr(ppo, "normalize_advantages", ppo.normalize_advantages)
    baselines.vary("no-floor")
    noise = torch.tensor([1e-5, -1e-5])
    assert ppo.normalize_advantages(noise).tolist() == pytest.approx([1, -1], rel=1e-2)
    random = baselines.HeadRandom(*twosome.models.load("pocket_lm"))
    assert random.critic[-1].weight.abs().max() > 0


@pytest.mark.parametrize("flags", [["head", "--env", "overcooked"], []])
def test_an_unknown_variant_is_one_line(flags, capfd):
    assert baselines.main(flags) == 2
    name = "".join(flags[:1])
    assert capfd.readouterr().err.startswith(f"unknown variant {name!r}; choose one of no-cue")


# -----------------------------------------------------------------------------
# What the LLM keeps.


def test_the_real_text_is_the_pinned_one_and_it_is_prose():
    text = retention.real_text()
    assert len(text.split()) > 40_000
    assert not set("`*_<>[]{}=\\|") & set(text)


def test_another_text_is_one_line(monkeypatch):
    monkeypatch.setattr(retention, "PACKAGES", {"filelock": "1"})
    with pytest.raises(retention.RetentionError, match="another one than was pinned; install"):
        retention.real_text()
    monkeypatch.setattr(retention, "PACKAGES", {"no-such-package": "1"})
    with pytest.raises(retention.RetentionError, match="no-such-package is missing; pip install"):
        retention.real_text()


def test_what_cannot_be_measured_is_one_line_and_exit_code_2(capfd):
    assert retention.main(["no/such/run"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("retention.py: ") and said.count("\n") == 1
    for module, flags in ((retention, ["run", "--tokens", "1"]), (claims, ["--jobs", "0"])):
        with pytest.raises(SystemExit) as caught:
            module.main(flags)
        assert caught.value.code == 2 and f"{flags[-2]} must be at" in capfd.readouterr().err


def test_the_interval_of_the_perplexity_counts_tokens_as_its_middle_does():
    base, counts = np.array([5.0, 9.0, 30.0]), np.array([2, 4, 20])
    facts = retention.summary({"base": base, "trained": base + 0.1 * counts},
                              {"trained": [0.0]}, counts)
    low, high = facts["trained"]["change_interval"]
    assert low == pytest.approx(high) == pytest.approx(100 * math.expm1(0.1))


def test_a_quick_look_reads_few_lines():
    tokenizer = twosome.models.load("pocket_lm")[1]
    lines = retention.own_lines(count=8)
    rows = retention.whole_lines(tokenizer, lines)
    lengths = np.cumsum([row.numel() for row in rows])
    for tokens, count in ((1, 1), (lengths[0], 1), (lengths[0] + 1, 2), (lengths[-1], 8)):
        few = retention.whole_lines(tokenizer, lines, tokens)
        assert len(few) == count
        assert all(map(torch.equal, few, rows))


def test_perplexity_and_kl_are_the_definitions():
    model, tokenizer = twosome.models.load("pocket_lm")
    agent = twosome.Agent(model, tokenizer)
    rows = retention.whole_lines(tokenizer, retention.own_lines(count=4))
    fresh = retention.compare(agent.model, rows)
    assert fresh["trained"]["change_percent"] == pytest.approx(0, abs=1e-4)
    assert fresh["trained"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 1.5 < fresh["perplexity"]["base"] < 4

    for name, weight in agent.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    moved = retention.compare(agent.model, rows)
    assert moved["trained"]["kl"] > 1e-3
    assert moved["merged"]["kl"] == pytest.approx(moved["trained"]["kl"], rel=1e-3)
    assert moved["perplexity"]["base"] == pytest.approx(fresh["perplexity"]["base"], rel=1e-6)
    # By hand, for the adapter: the model's own loss is the mean of -log P over a line's tokens.
    with torch.no_grad():
        total = sum(agent.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                    for ids in rows)
    tokens = sum(ids.shape[1] - 1 for ids in rows)
    assert moved["perplexity"]["trained"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


# -----------------------------------------------------------------------------
# What the LLM can still do.


@pytest.fixture
def archive(tmp_path):
    """A function that packs tasks, {name: dict}, as the package's archive does."""
    def pack(tasks):
        path = tmp_path / "archive.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            for name, task in tasks.items():
                data = json.dumps(task).encode()
                entry = tarfile.TarInfo(ability.INSIDE.format(name))
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
        return str(path)

    return pack


LEGS = {"examples": [{"input": "How many legs has a horse?",
                      "target_scores": {"two": 0, "four ": 1, "six": 0}}]}


def test_a_question_has_big_benchs_own_words_but_no_choices():
    [question] = ability.questions(LEGS, 5)
    assert question == {"query": "Q: How many legs has a horse?\nA:",
                        "choices": ["two", "four", "six"], "gold": 1}
    other = LEGS | {"task_prefix": "Count.\n\n", "example_input_prefix": "",
                    "example_output_prefix": "\nLegs: "}
    [question] = ability.questions(other, 5)
    assert question["query"] == "Count.\n\nHow many legs has a horse?\nLegs:"


def test_the_same_questions_are_drawn_each_time():
    task = {"examples": [LEGS["examples"][0] | {"input": str(n)} for n in range(50)]}
    drawn = [[question["query"] for question in ability.questions(task, 9)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 9


def test_an_archive_that_cannot_be_asked_is_one_line(archive, tmp_path, monkeypatch, capsys):
    path = archive({"general_knowledge": LEGS})
    names = ["general_knowledge"]
    assert ability.read_tasks(path, names) == {"general_knowledge": LEGS}
    with pytest.raises(ability.AbilityError, match="has no task timedial; take bigbench-1.0.0"):
        ability.read_tasks(path, ["timedial"])
    with pytest.raises(ability.AbilityError, match="there is no .*none; pip download"):
        ability.read_tasks(str(tmp_path / "none"), ["timedial"])
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ability.AbilityError, match="cannot be read .*; fetch it again"):
        ability.read_tasks(path, names)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert ability.main([str(tmp_path)]) == 2
    assert "the harness is missing" in capsys.readouterr().err


def test_choices_score_as_the_definition_says():
    model, tokenizer = twosome.models.load("pocket_lm")
    query = tuple(tokenizer("You see a")["input_ids"])
    choices = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
               for text in ("tomato", "bowl on the counter", "tomato")]
    found = ability.log_probs(model, [(query, choice) for choice in choices])
    for choice, score in zip(choices, found, strict=True):
        ids = torch.tensor([query + choice])
        with torch.no_grad():
            steps = model(input_ids=ids).logits[0, len(query) - 1:-1].log_softmax(-1)
        exact = steps.gather(1, torch.tensor(choice)[:, None]).sum()
        assert score == pytest.approx(exact.item(), abs=1e-4)


def test_only_tasks_that_the_base_can_do_count_and_their_answers_are_paired():
    facts = {"easy": {"chance": 0.5, "base": "1" * 60 + "0" * 40, "trained": "1" * 58 + "0" * 42},
             "hard": {"chance": 0.5, "base": "10" * 50, "trained": "1" * 100}}
    same = {task: each | {"trained": each["base"]} for task, each in facts.items()}
    found = [{"ability": facts}, {"ability": same}]
    assert tables.judged_tasks(found) == {"easy": True, "hard": False}
    # Two questions in a hundred were lost, by one of two seeds.
    mean, half = tables.points_gained(found, ["easy"], "trained")
    assert mean == pytest.approx(-1)
    assert half == pytest.approx(100 * 1.96 * (0.02 * 0.98 / 99) ** 0.5 / 2)
    assert tables.points_gained(found, ["hard"], "trained")[0] == pytest.approx(25)
    assert tables.points_gained(found, ["easy", "hard"], "trained")[0] == pytest.approx(12)

    for record in found:
        record |= {"name": "ability", "kind": "ability",
                   "arguments": {"model": "smollm2", "task": "tomato-salad"}}
        for each in record["ability"].values():
            each["merged"] = each["trained"]
    rows = tables.ability_table(found, "smollm2")[1]
    assert [row[0] for row in rows] == ["easy", "hard", "mean of those that count"]
    assert rows[0][1:6] == ["100", "50.0%", "60.0%", "yes", f"-1.00 ± {half:.2f}"]
    assert rows[2][5] == rows[0][5]
    # A loss within its interval is none, but the average may be two points lower: that is open.
    # Twenty points lost are a loss. Two agents are too few to end it.
    assert half > 1 and tables.answers(found, "smollm2") == (
        "2 of 4; open tomato-salad, trained, on average, tomato-salad, merged, on average",
        "open, so far")
    facts["easy"]["trained"] = same["easy"]["trained"] = "0" * 20 + "1" * 40 + "0" * 40
    assert tables.answers(found, "smollm2")[1] == "no, so far"


def test_a_side_is_the_base_the_agent_or_the_merged_one_and_leaves_nothing_behind():
    model, tokenizer = twosome.models.load("pocket_lm")
    pairs = [(tuple(tokenizer("You see a")["input_ids"]), (5, 6))]
    bare = ability.log_probs(model, pairs)
    model = twosome.Agent(model, tokenizer).model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    found = {}
    for name in ("base", "trained", "merged", "base", "trained"):
        with ability.side(model, name):
            found.setdefault(name, []).append(ability.log_probs(model, pairs)[0])
    assert found["base"][0] == pytest.approx(bare[0], abs=1e-5)
    assert all(first == again for first, again in (found["base"], found["trained"]))
    assert found["merged"][0] == pytest.approx(found["trained"][0], abs=1e-4)
    assert abs(found["trained"][0] - bare[0]) > 1e-2


# -----------------------------------------------------------------------------
# Worlds that are not ours.


def test_a_poorly_told_lake_names_directions_alone_and_may_cost():
    world = lakes.poor(cost=0.25)
    _, info = world.reset(seed=1)
    assert info["prompt"].endswith("Your next step is to")
    assert info["actions"] == ["move left", "move down", "move right", "move up"]
    assert world.step(1)[1] == -0.25
    free = lakes.poor()
    free.reset(seed=1)
    assert free.step(1)[1] == 0


def test_the_quest_is_learned_as_its_example_says():
    with open(os.path.join(records.ROOT, jobs.QUEST.split(":")[0]), encoding="utf-8") as file:
        example = file.read()
    job, = (job for job in jobs.world_jobs(claims.parse([])) if job.kind == "quest")
    flags = {"steps": job.arguments["steps"], **job.arguments["flags"]}
    assert all(f'"--{name}={value}"' in example for name, value in flags.items())


def test_worlds_and_quests_are_told_by_seed_and_by_game():
    def run(name, kind, **more):
        return {"name": name, "kind": kind, "arguments": {"model": "pocket_lm", "seed": 1},
                "summary": {"success": 0.95, "return": 0.5, "cpu_seconds": 30.0},
                "curve": {"success": [0.125, 0.95]}, **more}

    games = {str(seed): {"untrained": {"return": 0.0, "success": 0.0},
                         "trained": {"return": 0.1 * seed, "success": 1.0}}
             for seed in (18, 1, 2)}
    found = [run("lake-poor-1", "learn"), run("lake-poor-cost-1", "learn"),
             run("quest-1", "quest", games=games)]
    rows = tables.worlds_table(found, "pocket_lm")[1]
    assert [row[0] for row in rows] == ["poor", "poor-cost", "quest"]
    assert rows[0][1:4] == ["12.5%", "1 of 1", "95%"]
    assert tables.quest_table(found, "pocket_lm")[1] == [
        ["game 18", "0.000 (0%)", "1.800 (100%)"], ["game 1", "0.000 (0%)", "0.100 (100%)"],
        ["game 2", "0.000 (0%)", "0.200 (100%)"],
        ["mean of those never played", "0.000 (0%)", "0.150 (100%)"]]

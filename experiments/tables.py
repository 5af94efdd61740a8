"""What stored records say: statistics, a table for each question, and the judged claims.

Each table is a function of the records and an LLM's name. It returns a header and rows, all of
texts; TABLES names them. From the stored files alone: nothing is measured here.
"""
import functools
import itertools

import numpy as np

import envs
from experiments.jobs import ABLATIONS, EVERY, LAKES, MODELS, PRINCIPLES, QUEST_GAME, SHORT, TASKS

# -----------------------------------------------------------------------------
# Statistics.

# Student's t: the 97.5 % quantile for 1 to 30 degrees of freedom; beyond, the normal one and the
# first term of its expansion, (z^3 + z) / 4 divided by the degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
         2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
         2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t_quantile(freedom):
    """Return the 97.5 % quantile of Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return float("nan")
    return T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.372 / freedom


def across(values):
    """Return (mean, half width of its 95 % interval) of some seeds; NaN for a single one."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(0), np.full_like(values.mean(0), np.nan)
    error = values.std(0, ddof=1) / len(values)**0.5
    return values.mean(0), t_quantile(len(values) - 1) * error


# Agarwal et al. 2021, Deep Reinforcement Learning at the Edge of the Statistical Precipice,
# arXiv 2108.13264: the next three. A sample is one array of seeds for each task; its last axis is
# the seeds, and the bootstrap puts what it draws before it.


def interquartile_mean(sample):
    """Return the mean of the middle half of all scores, over seeds and tasks together."""
    scores = np.sort(np.concatenate(sample, axis=-1))
    cut = scores.shape[-1] // 4
    return scores[..., cut:scores.shape[-1] - cut].mean(-1)


def probability_of_improvement(sample, other):
    """Return the chance that a seed of `sample` beats one of `other`, averaged over tasks."""
    gaps = [mine[..., :, None] - theirs[..., None, :]
            for mine, theirs in zip(sample, other, strict=True)]
    return np.mean([(np.sign(gap) + 1).mean((-2, -1)) / 2 for gap in gaps], axis=0)


def bootstrap(measure, *samples, count=2000):
    """Return the 95 % interval of measure(*samples): seeds drawn again within each task.

    NaN if a task has fewer than three seeds: drawn again, two give their own range and no more.
    """
    if min(len(seeds) for sample in samples for seeds in sample) < 3:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = [[rng.choice(seeds, (count, len(seeds))) for seeds in sample] for sample in samples]
    return np.quantile(measure(*drawn), (0.025, 0.975))


# -----------------------------------------------------------------------------
# What the tables are made of, from the stored files alone.


def select(found, kind, **arguments):
    """Return the records of a kind with these arguments; None stands for one that is absent."""
    chosen = [record for record in found if record["kind"] == kind
              and all(record["arguments"].get(name) == value
                      for name, value in arguments.items())]
    return sorted(chosen, key=lambda record: record["arguments"].get("seed", 0))


def learned(found, model, task, norm="word", variant=None):
    """Return the records of TWOSOME's runs, in the order of their seeds."""
    return select(found, "learn", model=model, task=task, norm=norm, variant=variant)


def first_three(runs):
    """Return those of seeds 1 to 3, to stand beside what was measured on these alone."""
    return [run for run in runs if run["arguments"]["seed"] <= 3]


def methods(found, model, task):
    """Return {label: records} of all that learned a task: TWOSOME first, then its baselines."""
    lines = {f"TWOSOME, {norm}": learned(found, model, task, norm)
             for norm in ("word", "token", "sum")}
    lines["TWOSOME, random weights"] = learned(found, model, task, "word", "random-weights")
    for form in ("published", "equal", "tuned"):
        records = select(found, "ppo", task=task, form=form, mask=None, variant=None)
        # Seeds above 100 belong to the search for the tuned form.
        lines[f"PPO, {form}"] = [run for run in records if run["arguments"]["seed"] < 100]
    return {label: runs for label, runs in lines.items() if runs}


def untrained_result(found, model, task, norm="word", variant=None):
    """Return the evaluation of the untrained LLM, or None."""
    records = select(found, "untrained", model=model, task=task, norm=norm, variant=variant)
    return records[0]["result"] if records else None


def random_result(found, task):
    """Return the evaluation of chance, or None."""
    records = select(found, "random")
    return records[0]["results"][task] if records else None


def judged_from(found, things):
    """Return the tasks or runs, or none while chance is not measured: 90 % is counted from it."""
    return things if select(found, "random") else ()


def best_return(task):
    """Return the best possible return of a task."""
    return envs.make(EVERY[task], task=task).best_return


def scaled(found, task, values):
    """Return returns on a scale on which chance is 0 and the best possible is 1."""
    chance = random_result(found, task)["return"]
    return (np.asarray(values) - chance) / (best_return(task) - chance)


def returns(runs):
    """Return the return of each run after training."""
    return [run["summary"]["return"] for run in runs]


def points(run, *axes):
    """Return arrays of a run's returns, and along `axes`, where a hundred episodes have ended.

    A point is the mean of the last hundred, less those that wait for an older one (ppo.Episodes).
    Earlier, one lucky episode would count as 90 % of the way. The first is the untrained policy.
    """
    columns = run["curve"]
    rows = [k for k, (count, value) in enumerate(zip(columns["episodes"], columns["return"],
                                                     strict=True))
            if value is not None and (k == 0 or count >= 100)]
    return [np.array([columns[name][k] or 0.0 for k in rows]) for name in ("return", *axes)]


def reached(found, task, run, axes=("primitive_steps", "cpu_seconds")):
    """Return where a run was 90 % of the way there, along each axis, and whether it ever was.

    The way goes from chance to the best possible return. What never got there counts with all
    its steps, which is too kind to it.
    """
    values, *columns = points(run, *axes)
    there = scaled(found, task, values) >= 0.9
    if there.any():
        return *(column[there.argmax()] for column in columns), True
    return *(run["curve"][axis][-1] for axis in axes), False


def line(run, axis):
    """Return arrays of a run's returns and of where they were, up to the run's end.

    Where too few episodes have ended for a point there, it is the evaluation after training.
    """
    values, steps = points(run, axis)
    if steps[-1] < (end := run["curve"][axis][-1]):
        return np.append(values, run["summary"]["return"]), np.append(steps, end)
    return values, steps


def curve(runs, axis):
    """Return (x, mean, half width) of the runs' returns along "steps" or "primitive_steps"."""
    lines = [line(run, axis) for run in runs]
    x = np.linspace(0, min(steps[-1] for _, steps in lines), 200)
    return x, *across([np.interp(x, steps, values) for values, steps in lines])


def at_steps(runs, steps):
    """Return each run's return after so many primitive steps, or at its end if that is before."""
    return [np.interp(steps, *line(run, "primitive_steps")[::-1]) for run in runs]


# Cells.


def given(value, form=".3f"):
    """Return a number as a text, or a dash where there is none."""
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def plus_minus(values, form=".3f"):
    """Return "mean ± half width", the mean alone of a single seed, or a dash."""
    if not len(values):
        return "-"
    mean, half = across(values)
    return format(mean, form) + (f" ± {half:{form}}" if np.isfinite(half) else "")


def counted(runs, form=".3f"):
    """Return the runs' return after training as plus_minus does, and how many they are."""
    return plus_minus(returns(runs), form) + (f", n = {len(runs)}" if runs else "")


def span(values, form=",.0f"):
    """Return "least to most"."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def played(result):
    """Return the return and the success rate of an evaluation; a dash where there is none."""
    return f"{result['return']:.3f} ({result['success']:.1%})" if result else "-"


def interval(low, high, form=".2f"):
    """Return "(low to high)", or nothing where too few seeds give no interval."""
    return f"({low:{form}} to {high:{form}})" if np.isfinite(low) else ""


# -----------------------------------------------------------------------------
# The tables. Each function returns the header and the rows of one LLM's table, all of texts.


def learning_table(found, model):
    """What was learned on each task, every seed by itself."""
    header = ["task", "steps", "primitive steps", "return of each seed", "mean ± 95 %",
              "best possible", "success", "untrained LLM", "random", "CPU seconds", "peak MiB"]
    rows = []
    for task in TASKS:
        if runs := learned(found, model, task):
            ends = [run["summary"] for run in runs]
            values = returns(runs)
            rows.append([
                task, f"{ends[0]['steps']:,}", span([end["primitive_steps"] for end in ends]),
                ", ".join(f"{value:.4f}" for value in values), plus_minus(values, ".4f"),
                given(ends[0]["best"], ".4f"), f"{np.mean([end['success'] for end in ends]):.1%}",
                played(untrained_result(found, model, task)), played(random_result(found, task)),
                span([end["cpu_seconds"] for end in ends]),
                span([run["peak_mib"] for run in runs])])
    return header, rows


def transfer_table(found, model):
    """How the agents of each task do on all others, untrained for them: return, and success."""
    header = ["played", *(f"trained on {task}" for task in TASKS), "untrained LLM", "random"]
    rows = [[task, *(mean_played(results_on(found, model, source, task)) for source in TASKS),
             played(untrained_result(found, model, task)), played(random_result(found, task))]
            for task in EVERY]
    return header, rows if any(learned(found, model, task) for task in TASKS) else []


def results_on(found, model, source, task):
    """Return what the agents of a task did there, or on another one, which they never saw."""
    records = select(found, "transfer", model=model, task=source, variant=None)
    if source != task:
        return [record["transfer"][task] for record in records]
    own = {run["arguments"]["seed"]: run["summary"] for run in learned(found, model, source)}
    if not records:
        return [*own.values()]
    # Take the agents that were played elsewhere: a run that was trained anew on another machine is
    # not the one of the table of learning. Older records do not tell; there the two are the same.
    agents = [record.get("agent") or own.get(record["arguments"]["seed"]) for record in records]
    return [agent for agent in agents if agent]


def mean_played(results):
    """Return a cell: the mean return of some seeds, with its interval, and their success."""
    if not results:
        return "-"
    success = np.mean([result["success"] for result in results])
    return f"{plus_minus([result['return'] for result in results])} ({success:.0%})"


def efficiency_table(found, model):
    """Primitive steps and CPU seconds until 90 % of the way, and how many times ours others took.

    A seed that never got there counts with all its steps, so its ratio is a lower bound.
    """
    header = ["task", "method", "got there", "primitive steps to 90 %", "CPU seconds to 90 %",
              "times the steps of TWOSOME, word", "times its CPU seconds", "return at the end"]
    rows = []
    for task in judged_from(found, TASKS):
        lines = methods(found, model, task)
        for label, runs in lines.items():
            steps, seconds, there = ways(found, task, runs)
            bound = at_least(there)
            rows.append([task, label, f"{there.sum()} of {len(runs)}",
                         bound + f"{steps.mean():,.0f}", bound + f"{seconds.mean():,.0f}",
                         *ratio_cells(found, task, lines, label), plus_minus(returns(runs))])
    return header, rows


def ways(found, task, runs):
    """Return arrays [runs]: primitive steps to 90 %, CPU seconds to it, whether it was reached."""
    return [np.array(column) for column in
            zip(*(reached(found, task, run) for run in runs), strict=True)]


def at_least(there):
    """Return what stands before a mean over seeds, of which some may never have got there."""
    return "" if there.all() else "≥ "


def steps_cell(found, task, runs):
    """Return a cell: the mean primitive steps to 90 %, or a dash."""
    if not judged_from(found, runs):
        return "-"
    steps, _, there = ways(found, task, runs)
    return at_least(there) + f"{steps.mean():,.0f}"


def ratio(theirs, ours):
    """Return (ratio of the means, its 95 % interval) of what seeds of two methods took."""
    def measure(theirs, ours):
        return theirs[0].mean(-1) / np.maximum(ours[0].mean(-1), 1)

    return measure([theirs], [ours]), bootstrap(measure, [theirs], [ours])


def ratio_cells(found, task, lines, label):
    """Return two cells: how many times the steps and the CPU seconds of TWOSOME, word."""
    if label == "TWOSOME, word" or "TWOSOME, word" not in lines:
        return ["1" if label == "TWOSOME, word" else "-"] * 2
    theirs, ours = (ways(found, task, lines[name]) for name in (label, "TWOSOME, word"))
    if not ours[2].all():  # neither a lower bound nor an upper one
        return ["-", "-"]
    cells = []
    for mine, their in zip(ours[:2], theirs[:2], strict=True):
        middle, ends = ratio(their, mine)
        cells.append(at_least(theirs[2]) + f"{middle:.2f} {interval(*ends)}")
    return cells


def quiet_table(found, model):
    """Wall-clock of seed 1, measured on a machine without other work."""
    rows = []
    for task in judged_from(found, SHORT):
        lines = {"TWOSOME, word": learned(found, model, task, "word", "quiet")}
        for form in ("equal", "tuned"):
            lines[f"PPO, {form}"] = select(found, "ppo", task=task, form=form, variant="quiet")
        if not lines["TWOSOME, word"]:
            continue  # a rival alone compares with nothing
        for label, runs in lines.items():
            for run in runs:
                *ends, there = reached(found, task, run, ("primitive_steps", "seconds",
                                                          "cpu_seconds"))
                rows.append([task, label, *(at_least(np.array(there)) + f"{end:,.0f}"
                                            for end in ends)])
    return ["task", "method", "primitive steps to 90 %", "seconds to 90 %",
            "CPU seconds to 90 %"], rows


def aggregate_table(found, model):
    """The four tasks together: chance is 0, the best possible 1; intervals from the bootstrap."""
    header = ["method", "runs", "interquartile mean at the end", "after TWOSOME's steps",
              "chance that TWOSOME, word is better then"]
    lines = {}
    for task in judged_from(found, TASKS):
        for label, runs in methods(found, model, task).items():
            lines.setdefault(label, {})[task] = runs
    ours = lines.get("TWOSOME, word", {})
    budgets = {task: np.mean([run["summary"]["primitive_steps"] for run in runs])
               for task, runs in ours.items()}
    rows = []
    for label, tasks in lines.items():
        if [*tasks] != [*TASKS] or [*ours] != [*TASKS]:
            continue  # a mean over other tasks would compare with nothing
        ends = [scaled(found, task, returns(runs)) for task, runs in tasks.items()]
        then = [scaled(found, task, at_steps(runs, budgets[task])) for task, runs in tasks.items()]
        mine = [scaled(found, task, at_steps(ours[task], budgets[task])) for task in TASKS]
        cells = [f"{measure(*samples):.3f} {interval(*bootstrap(measure, *samples), '.3f')}"
                 for measure, samples in ((interquartile_mean, [ends]),
                                          (interquartile_mean, [then]),
                                          (probability_of_improvement, [mine, then]))]
        cells[2] = "-" if label == "TWOSOME, word" else cells[2]
        rows.append([label, str(sum(map(len, tasks.values()))), *cells])
    return header, rows


def saycan_table(found, model):
    """SayCan-style: the untrained LLM's score times an affordance; sampled, and greedy."""
    kinds = [f"{kind}, {how}" for kind in ("admissible", "possible", "value")
             for how in ("sampled", "greedy")]
    rows = []
    for task, norm in itertools.product(TASKS, ("word", "sum")):
        for record in select(found, "saycan", model=model, task=task):
            rows.append([task, norm,
                         *(played(record["results"][f"{norm}, {kind}"]) for kind in kinds)])
    return ["task", "LLM's score", *kinds], rows


def untrained_rivals(found, model, task):
    """Return {label: result} of what does not learn and has TWOSOME's own mask."""
    bare = untrained_result(found, model, task)
    found_here = {"the untrained LLM": bare} if bare else {}
    for record in select(found, "saycan", model=model, task=task):
        # What samples by word normalisation under the mask alone is the untrained LLM once more.
        found_here |= {f"SayCan-style ({label})": result
                       for label, result in record["results"].items()
                       if "admissible" in label and label != "word, admissible, sampled"}
    return found_here


NORMS = ("word", "token", "sum")


def norms_table(found, model):
    """The three normalisations, and sum at the temperature of word: untrained, and learned."""
    rows = []
    for task, (norm, variant) in itertools.product(EVERY, (*((norm, None) for norm in NORMS),
                                                           ("sum", "warm"))):
        runs = learned(found, model, task, norm, variant)
        bare = untrained_result(found, model, task, norm, variant)
        if bare or runs:
            label = f"{norm}, {variant}" if variant else norm
            rows.append([task, label, played(bare), steps_cell(found, task, runs),
                         plus_minus(returns(runs), ".4f"), entropies(runs)])
    return ["task", "normalisation", "untrained LLM", "steps to 90 %", "return after learning",
            "entropy, first to last update"], rows


def entropies(runs):
    """Return the mean entropy of the runs' first and last update, as a cell."""
    if not runs:
        return "-"
    first, last = (np.mean([run["curve"]["entropy"][at] for run in runs]) for at in (1, -1))
    return f"{first:.3f} to {last:.3f}"


def temperature_table(found, model):
    """The untrained LLM: is "sum" only sharper? Each made as flat or sharp as the others are."""
    header = ["task", "normalisation", "entropy", "return",
              *(f"return at the entropy of {norm}" for norm in NORMS)]
    rows = []
    for task in TASKS:
        for record in select(found, "prior", model=model, task=task):
            for norm in NORMS:
                results = record["results"]
                rows.append([task, norm, f"{record['entropies'][norm]:.3f}",
                             played(results[norm]),
                             *(played(results.get(f"{norm} at the entropy of {other}"))
                               for other in NORMS)])
    return header, rows


def lengths_table(found, model):
    """How log P of a phrase depends on its length, within a prompt; lengths of the phrases."""
    header = ["task", "prompts", "phrases", "tokens of a phrase", "words of a phrase",
              "nats a token (R²)", "nats a word (R²)"]
    rows = []
    for task in TASKS:
        for record in select(found, "prior", model=model, task=task):
            _, tokens, words = np.array(list(record["phrases"].values())).T
            rows.append([task, str(record["prompts"]), str(len(tokens)), spread(tokens),
                         spread(words), *(f"{given(record[name][0], '.2f')}"
                                          f" ({given(record[name][1], '.2f')})"
                                          for name in ("nats_a_token", "nats_a_word"))])
    return header, rows


def spread(values):
    """Return "mean, least to most"."""
    return f"{np.mean(values):.1f}, {span(values, '.0f')}"


def principles_table(found, model):
    """Each principle broken by itself: the untrained LLM, and what is learned all the same."""
    header = ["wording", *(f"{task}, untrained" for task in TASKS),
              *(f"{task}, learned" for task in SHORT)]
    rows = []
    for variant in (None, *PRINCIPLES, "chat"):
        bare = [played(untrained_result(found, model, task, variant=variant)) for task in TASKS]
        after = [counted(first_three(learned(found, model, task, "word", variant)))
                 for task in SHORT]
        if any(cell != "-" for cell in (*bare, *after)):
            rows.append([variant or "as it is", *bare, *after])
    return header, rows if len(rows) > 1 else []


def uneven_table(found, model):
    """Every second action told in four more words of no meaning, under each normalisation."""
    rows = []
    for task, norm in itertools.product(TASKS, NORMS):
        bare = [untrained_result(found, model, task, norm, variant) for variant in (None, "uneven")]
        after = [counted(first_three(learned(found, model, task, norm, variant)))
                 for variant in (None, "uneven")]
        if bare[1]:
            rows.append([task, norm, *map(played, bare), *after])
    return ["task", "normalisation", "untrained, as it is", "untrained, uneven",
            "learned, as it is", "learned, uneven"], rows


def rewording_table(found, model):
    """A trained agent, and the untrained LLM, under other wordings within the principles."""
    rows = []
    for task in TASKS:
        records = select(found, "reworded", model=model, task=task)
        for wording in records[0]["results"] if records else ():
            variant = None if wording == "its own" else wording
            rows.append([task, wording,
                         mean_played([record["results"][wording] for record in records]),
                         played(untrained_result(found, model, task, variant=variant))])
    return ["task", "wording", "trained agent", "untrained LLM"], rows


def mask_table(found, model):
    """The home without the published mask of its actions."""
    rows = []
    for task in TASKS:
        lines = {"TWOSOME, word": [learned(found, model, task, "word", variant)
                                   for variant in (None, "no-mask")]}
        for form in ("equal", "tuned"):
            lines[f"PPO, {form}"] = [
                select(found, "ppo", task=task, form=form, mask=mask, variant=None)
                for mask in (None, False)]
        for label, (masked, free) in lines.items():
            masked = [run for run in masked if run["arguments"]["seed"] < 100]
            if free:
                success = np.mean([run["summary"]["success"] for run in free])
                rows.append([task, label, counted(masked), counted(free), f"{success:.0%}"])
    return ["task", "method", "return with the mask", "without it", "success without it"], rows


TEXT_OF = {"pocket_lm": "own", "smollm2": "real"}  # what an LLM was made to read


def retention_table(found, model):
    """What the LLM keeps of itself: perplexity and KL to the base, mean and interval over seeds."""
    rows = []
    for task, text in itertools.product(TASKS, ("real", "own")):
        sides = [record[text] for record in
                 select(found, "retention", model=model, task=task, variant=None) if text in record]
        if sides:
            rows.append([task, {"real": "real English", "own": "its own kind"}[text],
                         f"{sides[0]['tokens']:,}", f"{sides[0]['perplexity']['base']:,.2f}",
                         *(plus_minus([side[name]["change_percent"] for side in sides], ".2f")
                           for name in ("trained", "merged")),
                         plus_minus([side["trained"]["kl"] for side in sides], ".4f")])
    return ["trained on", "text", "tokens", "perplexity of the base", "trained: change in %",
            "merged: change in %", "KL, nats a token"], rows


def holding_table(found, model):
    """What holding the policy to its base gives: elsewhere, and to the LLM. Seeds 1 to 3."""
    rows = []
    text = TEXT_OF[model]
    for task, variant in itertools.product(SHORT, (None, "not-held")):
        runs, elsewhere, keeping = (
            first_three(select(found, kind, model=model, task=task, norm="word", variant=variant))
            for kind in ("learn", "transfer", "retention"))
        kept = [record[text]["trained"] for record in keeping]
        before = [untrained_result(found, model, other) for other in EVERY if other != task]
        if (elsewhere or kept) and all(before):
            cells = [task, variant or "held", plus_minus(returns(runs), ".4f")]
            for name in ("return", "success"):
                after = [np.mean([result[name] for result in record["transfer"].values()])
                         for record in elsewhere]
                known = np.mean([result[name] for result in before])
                cells.append(f"{plus_minus(after)} ({known:.3f})")
            rows.append(cells + [plus_minus([side["change_percent"] for side in kept], ".2f"),
                                 plus_minus([side["kl"] for side in kept], ".4f")])
    return ["trained on", "policy", "return", "return on the 14 unseen tasks (untrained LLM)",
            "success there (untrained LLM)", "perplexity: change in %", "KL, nats a token"], rows


def worlds_table(found, model):
    """FrozenLake in four ways, and the game that was learned."""
    rows = []
    told = {label: [record for record in select(found, "learn", model=model)
                    if record["name"].rpartition("-")[0] == f"lake-{label}"] for label in LAKES}
    told["quest"] = select(found, "quest", model=model)
    for label, runs in told.items():
        if runs:
            ends = [run["summary"]["success"] for run in runs]
            rows.append([label, f"{runs[0]['curve']['success'][0]:.1%}",
                         f"{sum(end >= 0.9 for end in ends)} of {len(runs)}",
                         ", ".join(f"{end:.0%}" for end in ends), plus_minus(returns(runs)),
                         span([run["summary"]["cpu_seconds"] for run in runs])])
    return ["world", "untrained success", "seeds at 90 %", "success of each seed", "return",
            "CPU seconds"], rows


def quest_table(found, model):
    """The game that was learned, and ten others: share of the best score, and of quests solved."""
    rows = []
    for record in select(found, "quest", model=model):
        others = {side: [games[side] for seed, games in record["games"].items()
                         if seed != str(QUEST_GAME)] for side in ("untrained", "trained")}
        for seed, games in record["games"].items():
            rows.append([f"game {seed}", *(f"{result['return']:.3f} ({result['success']:.0%})"
                                           for result in games.values())])
        rows.append(["mean of those never played",
                     *(f"{np.mean([result['return'] for result in results]):.3f}"
                       f" ({np.mean([result['success'] for result in results]):.0%})"
                       for results in others.values())])
    return ["score (solved)", "untrained LLM", f"trained on game {QUEST_GAME}"], rows


def right(text):
    """Return 1 for each right answer and 0 for each wrong one: [questions], of a str."""
    return np.array([int(letter) for letter in text])


def judged_tasks(records):
    """Return {task of BIG-bench: whether the base itself does better there than chance}."""
    counts = {}
    for task, facts in records[0]["ability"].items() if records else ():
        base = right(facts["base"])
        error = (facts["chance"] * (1 - facts["chance"]) / len(base)) ** 0.5
        counts[task] = base.mean() > facts["chance"] + 1.96 * error
    return counts


def points_gained(records, tasks, side):
    """Return (mean, half width) in points: how many more answers are right than the base's.

    It is averaged over tasks. What the seeds gained on a question is averaged first, for they
    answer the same questions.
    """
    means, variances = [], []
    for task in tasks:
        facts = [record["ability"][task] for record in records]
        gains = np.mean([right(each[side]) - right(each["base"]) for each in facts], axis=0)
        means.append(100 * gains.mean())
        variances.append(100**2 * gains.var(ddof=1) / len(gains))
    return np.mean(means), 1.96 * np.sum(variances) ** 0.5 / len(tasks)


def ability_table(found, model):
    """What the LLM can still do: BIG-bench's questions, answered by the base and by agents."""
    groups = {task: select(found, "ability", model=model, task=task) for task in TASKS}
    groups = {task: records for task, records in groups.items() if records}
    sides = ("trained", "merged")
    header = ["task", "questions", "chance", "base", "counts"]
    header += [f"{task}, {side}: points, n = {len(records)}"
               for task, records in groups.items() for side in sides]
    if not groups:
        return header, []

    def gains(tasks):
        return ["{:+.2f} ± {:.2f}".format(*points_gained(records, tasks, side))
                for records in groups.values() for side in sides]

    [first, *_] = groups.values()
    counts = judged_tasks(first)
    rows = []
    for task, facts in first[0]["ability"].items():
        base = right(facts["base"])
        rows.append([task, f"{len(base)}", f"{facts['chance']:.1%}", f"{base.mean():.1%}",
                     "yes" if counts[task] else "no", *gains([task])])
    if able := [task for task in counts if counts[task]]:
        rows.append(["mean of those that count", "", "", "", "", *gains(able)])
    return header, rows


def ablations_table(found, model):
    """What a reader would ablate: one thing changed at a time."""
    known = {record["arguments"].get("variant") for record in found} & {*ABLATIONS, "float32"}
    header = ["change"]
    for task in SHORT:
        header += [f"{task}: return", "steps to 90 %", "CPU seconds"]
    rows = []
    for variant in (None, *sorted(known)):
        cells = []
        for task in judged_from(found, SHORT):
            runs = first_three(learned(found, model, task, "word", variant))
            cells += [counted(runs, ".4f"), steps_cell(found, task, runs),
                      span([run["summary"]["cpu_seconds"] for run in runs]) if runs else "-"]
        if any(cell != "-" for cell in cells):
            rows.append([variant or "as it is", *cells])
    return header, rows if len(rows) > 1 else []


def tuning_table(found, model):
    """The search for the tuned form of PPO, on seeds above 100; it has no LLM."""
    header = ["setting", *(f"{task}: {what}" for task in TASKS
                           for what in ("steps to 90 %", "return at the end"))]
    runs = [run for run in select(found, "ppo", form="tuned") if run["arguments"]["seed"] > 100]
    rows = {}
    for run in judged_from(found, runs) if model == MODELS[0] else ():
        task = run["arguments"]["task"]
        setting = run["name"].removeprefix("ppo-tuning-").split(f"-{task}-")[0]
        rows.setdefault(setting, {}).setdefault(task, []).append(run)

    def cells(task, runs):
        """Return the mean steps of a setting's runs on a task, and the range of their returns."""
        return steps_cell(found, task, runs), span(returns(runs), ".3f") if runs else "-"

    return header, [
        [setting, *(cell for task in TASKS for cell in cells(task, by_task.get(task, [])))]
        for setting, by_task in rows.items()]


# -----------------------------------------------------------------------------
# The claims, judged by the same records. The paper's figures are not quoted: they are LLaMA-7B's.


def verdict_of(judged, whole=True):
    """Return (measured, verdict) of a list of (what, whether it holds).

    None stands for what the intervals leave open; it counts as not shown. While not the `whole`
    is measured, the verdict is only how it stands so far.
    """
    if not judged:
        return "-", "not measured"
    judged = [(what, holds if holds is None else bool(holds)) for what, holds in judged]
    held = sum(holds is True for _, holds in judged)
    lists = [(word, [what for what, holds in judged if holds is value])
             for word, value in (("not", False), ("open", None))]
    text = f"{held} of {len(judged)}"
    text += "".join(f"; {word} {', '.join(names)}" for word, names in lists if names)
    verdict = "no" if lists[0][1] else "open" if lists[1][1] else "yes"
    return text, verdict if whole else f"{verdict}, so far"


def above(low, high, bound=0):
    """Return whether an interval lies above a bound; None if the bound is in it."""
    return bool(low > bound) if low > bound or high < bound else None


def difference(mine, theirs):
    """Return the 95 % interval of a difference of two means; each is (mean, half width)."""
    middle, half = mine[0] - theirs[0], np.hypot(mine[1], theirs[1])
    return middle - half, middle + half


def sooner(ours, theirs):
    """Return whether seeds took fewer primitive steps than others, both as `ways` tells them.

    A rival that never got there counts with fewer steps than it would need, so then the interval
    of the ratio may show that we were sooner, but not the contrary.
    """
    if not ours[2].all():
        return False
    holds = above(*ratio(theirs[0], ours[0])[1], 1)
    return None if holds is False and not theirs[2].all() else holds


def evaluated(result):
    """Return (mean, half width) of the return of one evaluation, over its episodes."""
    low, high = result["return_interval"]
    return result["return"], (high - low) / 2


def efficient(found, model):
    """Judge TWOSOME, word, against each baseline without privileged knowledge, task by task.

    While a baseline is not measured, the verdict is only how it stands so far.
    """
    judged, others, missing = [], [], set()
    for task in judged_from(found, TASKS):
        lines = methods(found, model, task)
        if "TWOSOME, word" not in lines:
            missing.add("TWOSOME, word")
            continue
        ours = ways(found, task, lines["TWOSOME, word"])
        rivals = {"PPO, equal", "PPO, tuned"}
        rivals |= {"PPO, published"} if TASKS[task] == "virtualhome" else set()  # its γ is no help
        rivals |= {"TWOSOME, random weights"} if model == "pocket_lm" or task in SHORT else set()
        untrained = untrained_rivals(found, model, task)
        missing |= (rivals | {"the untrained LLM"}) - {*lines, *untrained}
        missing |= set() if select(found, "saycan", model=model, task=task) else {"SayCan-style"}
        judged += [(f"{task} against {label}", sooner(ours, ways(found, task, lines[label])))
                   for label in rivals & {*lines}]
        # What is not trained is either there from the first step on, or never.
        others += [(f"{task} against {label}",
                    ours[2].all() and scaled(found, task, result["return"]) < 0.9)
                   for label, result in untrained.items()]
    if not judged:  # that the untrained LLM never gets there is no news
        return "-", "not measured"
    text, verdict = verdict_of(sorted(judged, key=lambda pair: pair[0]))
    if others:
        more, second = verdict_of(others)
        held, *names = text.split("; ")
        more, *others = more.split("; ")
        text = "; ".join([f"{held} trained, {more} not trained", *names, *others])
        verdict = min(verdict, second, key=("no", "open", "yes").index)
    if missing:
        text += f"; not measured everywhere: {', '.join(sorted(missing))}"
        verdict = f"{verdict}, so far"
    return text, verdict


def better_normalised(found, model):
    """Judge word against sum: the untrained return, and the steps to 90 % of the way."""
    judged = []
    for task in TASKS:
        word, plain = (untrained_result(found, model, task, norm) for norm in ("word", "sum"))
        if word and plain:
            gap = difference(evaluated(word), evaluated(plain))
            judged.append((f"{task} (untrained)", above(*gap)))
        word, plain = (learned(found, model, task, norm) for norm in ("word", "sum"))
        if word and plain:
            judged.append((f"{task} (steps)",
                           sooner(ways(found, task, word), ways(found, task, plain))))
    learners = TASKS if model == "pocket_lm" else SHORT
    return verdict_of(judged, len(judged) == len(TASKS) + len(learners))


def beats_untrained(found, model):
    """Judge the trained agents against the untrained LLM on the tasks they learned."""
    judged = []
    for task in TASKS:
        runs, bare = learned(found, model, task), untrained_result(found, model, task)
        if runs and bare:
            judged.append((task, min(returns(runs)) > bare["return_interval"][1]))
    return verdict_of(judged, len(judged) == len(TASKS))


# Figure 6: the agent of food preparation among the home's other nouns, and the two crossovers.
FIGURE_6 = [("food-preparation", task) for task, env in EVERY.items()
            if env == "virtualhome" and task != "food-preparation"]
FIGURE_6 += [("entertainment", "food-preparation")]
PAIRS = [pair for pair in itertools.product(TASKS, EVERY) if pair[0] != pair[1]]


def generalises(found, model, pairs=FIGURE_6):
    """Judge a task's agents on tasks they never saw: better than the untrained LLM?"""
    judged = []
    for source, task in pairs:
        bare = untrained_result(found, model, task)
        results = results_on(found, model, source, task)
        if len(results) > 1 and bare:
            mine = across([result["return"] for result in results])
            judged.append((f"{source} on {task}", above(*difference(mine, evaluated(bare)))))
    return verdict_of(judged, len(judged) == len(pairs))


def keeps(found, model):
    """Judge what the LLM keeps: perplexity within 2 % of the base on what it was made to read.

    That is real English, and for pocket_lm lines of a home: other English it never could read.
    """
    judged = []
    for record in select(found, "retention", model=model, variant=None):
        low, high = record[TEXT_OF[model]]["trained"]["change_interval"]
        holds = True if -2 <= low and high <= 2 else None
        holds = False if high < -2 or low > 2 else holds
        judged.append((f"{record['arguments']['task']} seed {record['arguments']['seed']}", holds))
    return verdict_of(judged, len(judged) == 3 * len(TASKS))


def answers(found, model):
    """Judge answers: at most two points lost on average, and no significant loss in any task.

    The average is judged by its whole interval. A task's few questions show only a large loss.
    Three agents of each of two tasks are to be asked, and three of BIG-bench's tasks must count.
    """
    if model == "pocket_lm":  # it has read of kitchens and rooms alone
        return "-", "not asked"
    judged, lacking = [], 0
    for task, side in itertools.product(TASKS, ("trained", "merged")):
        records = select(found, "ability", model=model, task=task)
        tasks = [name for name, counts in judged_tasks(records).items() if counts]
        lacking += task in SHORT and (len(records) < 3 or len(tasks) < 3)
        for name in tasks:
            mean, half = points_gained(records, [name], side)
            judged.append((f"{task}, {side}, on {name}", mean + half >= 0))
        if tasks:
            mean, half = points_gained(records, tasks, side)
            judged.append((f"{task}, {side}, on average", above(mean - half, mean + half, -2)))
    return verdict_of(judged, whole=not lacking)


def unmasked(found, model):
    """Judge learning without the home's mask: 90 % of the way at the end."""
    if model != "pocket_lm":
        return "-", "not asked"
    judged, lacking = [], 0
    for task in judged_from(found, TASKS):
        runs = learned(found, model, task, "word", "no-mask")
        if runs:
            judged.append((task, scaled(found, task, np.mean(returns(runs))) >= 0.9))
            lacking += len(runs) < len(learned(found, model, task))
    return verdict_of(judged, len(judged) == 2 and not lacking)


SAMPLES = "significantly better sample efficiency and performance"
KEPT = "no significant loss of the LLMs' original ability"
CLAIMS = {  # the claim, and how it is judged: (words of the paper's abstract, where to look, judge)
    "TWOSOME takes fewer steps to 90 % than every baseline without privileged knowledge":
        (SAMPLES, "figure 5", efficient),
    "finetuning by PPO beats the prompted LLM, both sampled":
        (SAMPLES, "figure 5", beats_untrained),
    "word normalisation is better than none":
        ("enhance the stability and robustness of the policies", "figure 5", better_normalised),
    "in the paper's eight unseen tests, the trained agent is better than the untrained LLM":
        ("superior generalization ability to unseen tasks", "figure 6", generalises),
    "so it is on all other tasks, from each of the four":
        ("", "our question", functools.partial(generalises, pairs=PAIRS)),
    "held to its base by our penalty, the LLM's perplexity stays within 2 %":
        (KEPT, "table 1", keeps),
    "the LLM answers BIG-bench as before":
        (KEPT, "table 1", answers),
    "both home tasks are learned without their action mask":
        ("", "our question", unmasked),
}


def claims_table(found, model):
    """Each claim, what was measured, and whether it holds."""
    return ["claim", "the paper", "holds in", "holds"], [
        [claim, f"“{words}” ({where})" if words else where, *judge(found, model)]
        for claim, (words, where, judge) in CLAIMS.items()]


def verdicts(tables):
    """The claims_table rows of the LLMs side by side, without the list of where one fails."""
    rows = []
    for judged in zip(*tables, strict=True):
        row = judged[0][:2]
        for _, _, measured, holds in judged:
            count = measured.partition(";")[0]
            row.append(holds if count == "-" else f"{holds}: {count}")
        rows.append(row)
    return ["claim", "the paper", *MODELS], rows


TABLES = {"learning": learning_table, "transfer": transfer_table, "efficiency": efficiency_table,
          "quiet": quiet_table, "aggregate": aggregate_table, "saycan": saycan_table,
          "norms": norms_table, "temperature": temperature_table, "lengths": lengths_table,
          "principles": principles_table, "uneven": uneven_table, "rewording": rewording_table,
          "mask": mask_table, "retention": retention_table, "holding": holding_table,
          "ability": ability_table, "worlds": worlds_table, "quest": quest_table,
          "ablations": ablations_table, "tuning": tuning_table, "claims": claims_table}

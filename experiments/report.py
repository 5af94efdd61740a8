"""The report: tables as Markdown and CSV, pictures as PNG and SVG, and what the READMEs hold."""
import csv
import io
import os
import re

import numpy as np

from experiments import records, tables
from experiments.jobs import MODELS, TASKS


def markdown(header, rows):
    """Return a table in Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def write(options):
    """Write tables and pictures, and put the tables into both READMEs. Returns 0."""
    found = records.stored(options)
    if not found:
        raise records.ClaimsError(f"nothing is stored in {options.out}/runs yet; leave out"
                                  " --report")
    blocks, made = {}, {}
    for group, make in tables.TABLES.items():
        text = ""
        for model in MODELS:
            header, rows = made[group, model] = make(found, model)
            blocks[f"{group} {model}"] = markdown(header, rows)
            text += f"## {group}: {model}\n\n{markdown(header, rows)}\n"
            write_csv(options, f"{group}-{model}", [header, *rows])
        records.write_text(os.path.join(options.out, f"{group}.md"), text)
    judged = [made["claims", model][1] for model in MODELS]
    blocks["verdicts both"] = markdown(*tables.verdicts(judged))
    records.write_text(os.path.join(options.out, "verdicts.md"),
                       f"## verdicts: both\n\n{blocks['verdicts both']}\n")
    write_csv(options, "learning", list_of_runs(found))
    draw(options, found)
    draw_prior(options, found)
    draw_lengths(options, found)
    for path in options.readmes:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            records.write_text(path, filled_in(text, blocks))
    return 0


def list_of_runs(found):
    """Return the rows of learning.csv: every run that learned, one a row."""
    names = ("model", "norm", "variant", "form", "mask", "task", "seed")
    ends = ("steps", "primitive_steps", "return", "success", "best", "cpu_seconds")
    rows = [["name", "kind", *names, *ends, "peak_mib"]]
    for record in found:
        if "curve" in record:
            rows.append([record["name"], record["kind"],
                         *(record["arguments"].get(name, "") for name in names),
                         *(record["summary"][name] for name in ends), record.get("peak_mib", "")])
    return rows


def filled_in(text, blocks):
    """Return a README with each `<!-- group model -->` ... `<!-- end -->` holding its table."""
    def block(match):
        inner = blocks.get(match[1])
        return match[0] if inner is None else f"<!-- {match[1]} -->\n{inner}<!-- end -->"

    return re.sub(r"<!-- (\w+ [\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def write_csv(options, name, rows):
    """Write a table as comma-separated values; leave no file where only its header is known."""
    path, text = os.path.join(options.out, f"{name}.csv"), io.StringIO()
    if len(rows) > 1:
        csv.writer(text, lineterminator="\n").writerows(rows)
        records.write_text(path, text.getvalue())
    elif os.path.exists(path):
        os.remove(path)


# -----------------------------------------------------------------------------
# Pictures.


def picture(options, name, figure):
    """Write a figure as PNG and SVG. Without a date, the same results give the same files."""
    from matplotlib import rc_context
    with rc_context({"svg.hashsalt": "twosome"}):
        figure.savefig(os.path.join(options.out, f"{name}.png"), dpi=110)
        figure.savefig(os.path.join(options.out, f"{name}.svg"), metadata={"Date": None})


def draw(options, found):
    """Draw return while learning: a row an LLM, a panel a task; by primitive steps, and actions."""
    from matplotlib.figure import Figure
    models = [model for model in MODELS
              if any(tables.learned(found, model, task) for task in TASKS)]
    for axis, name, label in (("primitive_steps", "learning", "primitive steps"),
                              ("steps", "learning-actions", "macro-actions")):
        if not models:
            continue
        figure = Figure(figsize=(12, 2.6 * len(models) + 0.6), layout="constrained")
        panels = figure.subplots(len(models), len(TASKS), squeeze=False)
        handles = {}
        for row, model in zip(panels, models, strict=True):
            row[0].set_ylabel(f"{model}: return")
            for panel, task in zip(row, TASKS, strict=True):
                draw_task(panel, found, model, task, axis)
                panel.set(title=task, xlabel=label)
                lines, texts = panel.get_legend_handles_labels()
                handles |= dict(zip(texts, lines, strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5,
                      frameon=False)
        picture(options, name, figure)


# One colour a method, in every panel.
COLOURS = {"TWOSOME, word": "C0", "TWOSOME, token": "C1", "TWOSOME, sum": "C2",
           "TWOSOME, random weights": "C3", "PPO, published": "C4", "PPO, equal": "C5",
           "PPO, tuned": "C6", "untrained LLM": "C0", "SayCan-style": "C8", "random": "grey"}


def draw_task(panel, found, model, task, axis):
    """Draw the curves of a task with their intervals, the best possible return and chance.

    The panel ends where three times TWOSOME's steps are over: PPO goes on far beyond.
    """
    ends, best, chance = [], tables.best_return(task), tables.random_result(found, task)
    lowest = chance["return"] if chance else best
    for label, runs in tables.methods(found, model, task).items():
        x, mean, half = tables.curve(runs, axis)
        lowest = min(lowest, *mean)
        panel.plot(x, mean, label=label, linewidth=1.2, color=COLOURS[label])
        panel.fill_between(x, mean - half, mean + half, color=COLOURS[label], alpha=0.2,
                           linewidth=0)
        ends += [x[-1]] if label.startswith("TWOSOME") else []
    panel.set_xlim(0, 3 * max(ends, default=0) or None)
    margin = 0.08 * (best - lowest) or 1.0
    panel.set_ylim(lowest - margin, best + margin)  # the interval of two seeds may be huge
    panel.locator_params(axis="x", nbins=4)
    panel.axhline(best, color="black", linewidth=0.8, linestyle="--", label="best possible")
    # A method that does not learn is a horizontal line. Of SayCan-style, it is the best result with
    # TWOSOME's own mask.
    known = tables.untrained_rivals(found, model, task)
    flat = {"untrained LLM": known.pop("the untrained LLM", None), "random": chance}
    flat["SayCan-style"] = max(known.values(), key=lambda result: result["return"], default=None)
    for label, result in flat.items():
        if result:
            panel.axhline(result["return"], color=COLOURS[label], linewidth=0.8, linestyle=":",
                          label=label)


def draw_prior(options, found):
    """Draw the untrained LLM's action probabilities in one state under the normalisations."""
    from matplotlib.figure import Figure
    shown = [record for record in tables.select(found, "prior")
             if record["arguments"]["task"] in ("tomato-salad", "food-preparation")]
    if not shown:
        return
    figure = Figure(figsize=(4.6 * len(shown), 3.4), layout="constrained")
    for panel, record in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        state = record["state"]
        places = np.arange(len(state["phrases"]))
        for shift, norm in enumerate(tables.NORMS):
            panel.barh(places + 0.27 * (shift - 1), state[norm], height=0.25, label=norm)
        panel.set(yticks=places, yticklabels=state["phrases"], xlim=(0, 1),
                  title=f"{record['arguments']['model']}, {record['arguments']['task']}")
        panel.invert_yaxis()
    panel.legend(frameon=False)
    picture(options, "normalisation", figure)


def draw_lengths(options, found):
    """Draw the untrained LLM's log P of each phrase against its tokens and against its words.

    A row is an LLM. A point is a phrase: its mean over all prompts in which it could be chosen.
    """
    from matplotlib.figure import Figure
    shown = {model: tables.select(found, "prior", model=model) for model in MODELS}
    shown = {model: priors for model, priors in shown.items() if priors}
    if not shown:
        return
    figure = Figure(figsize=(9.2, 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for row, (model, priors) in zip(panels, shown.items(), strict=True):
        row[0].set_ylabel(f"{model}: log P of a phrase, nats")
        for record in priors:
            task = record["arguments"]["task"]
            joint, *lengths = np.array(list(record["phrases"].values())).T
            for panel, length in zip(row, lengths, strict=True):
                panel.scatter(length, joint, s=14, alpha=0.7, label=task,
                              color=f"C{[*TASKS].index(task)}")  # one colour a task, in every row
        row[0].legend(frameon=False, fontsize="small")
        for panel, unit in zip(row, ("tokens", "words"), strict=True):
            panel.set_xlabel(f"{unit} of the phrase")
    picture(options, "lengths", figure)

"""What the LLM can still do (the paper's table 1): BIG-bench with a run's adapter, and without.

    pip install -r experiments/requirements.txt       # lm-evaluation-harness
    pip download --no-deps -d runs bigbench==1.0.0    # the archive, 358 MB, never installed
    python experiments/ability.py runs/NAME

Eight multiple-choice tasks were fixed before anything was measured. Their questions are read from
the package's archive and asked through lm-evaluation-harness, with task files of our own over
local data (--files FOLDER keeps them). They are asked as the harness asks ARC and HellaSwag:
without examples, without a list of the choices, and what counts is the log-probability of each
choice over its length (acc_norm). Each question is asked of the LLM as it came (base), with the
adapter (trained), and with the adapter added into the weights (merged). Our trie gives the
probabilities.
"""
import argparse
import contextlib
import json
import os
import random
import sys
import tarfile
import tempfile
import zlib

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import twosome
from engine import trie
from experiments.retention import merged

TASKS = ("social_iqa", "general_knowledge", "physical_intuition", "english_proverbs",
         "intent_recognition", "timedial", "strategyqa", "hhh_alignment/helpful")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARCHIVE = os.path.join(ROOT, "runs", "bigbench-1.0.0.tar.gz")
INSIDE = "bigbench-1.0.0/bigbench/benchmark_tasks/{}/task.json"
QUESTIONS = 200  # of a task at most, drawn once


class AbilityError(ValueError):
    """Nothing can be asked. One line says why, and what would be right."""


# -----------------------------------------------------------------------------
# Questions.


def read_tasks(archive, names=TASKS):
    """Return {name: task} of the archive, each a dict as BIG-bench stores it.

    Go through the archive once: to look for a file again would decompress all before it again.
    """
    wanted = {INSIDE.format(name): name for name in names}
    found = {}
    try:
        with tarfile.open(archive) as file:
            for entry in file:
                if entry.name in wanted:
                    found[wanted[entry.name]] = json.load(file.extractfile(entry))
    except FileNotFoundError:
        raise AbilityError(f"there is no {archive}; pip download --no-deps -d runs"
                           " bigbench==1.0.0 fetches it") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise AbilityError(f"{archive} cannot be read ({error}); fetch it again with"
                           " pip download --no-deps -d runs bigbench==1.0.0") from None
    if missing := [name for name in names if name not in found]:
        raise AbilityError(f"{archive} has no task {missing[0]}; take bigbench-1.0.0.tar.gz")
    return found


def questions(task, limit):
    """Yield at most `limit` of a task: {query, choices, gold}.

    Our choice, made on the base alone: no choices in the query, and acc_norm. With the list of
    choices that BIG-bench appends, and acc, SmolLM2 was better than chance in one task of eight.
    """
    examples = [each for each in task["examples"] if len(each.get("target_scores", ())) > 1]
    if len(examples) > limit:
        examples = random.Random(0).sample(examples, limit)
    for example in examples:
        scores = example["target_scores"]
        query = task.get("example_input_prefix", "\nQ: ") + example["input"]
        query += task.get("example_output_prefix", "\nA: ").rstrip()
        choices = [choice.strip() for choice in scores]
        yield {"query": task.get("task_prefix", "") + query.lstrip("\n"), "choices": choices,
               "gold": max(range(len(choices)), key=list(scores.values()).__getitem__)}


def write_files(tasks, folder, limit):
    """Write the harness's files into a folder, NAME.jsonl and NAME.yaml. Return {task: NAME}."""
    names = {task: "bigbench_" + task.replace("/", "_") for task in tasks}
    for task, name in names.items():
        data = os.path.join(folder, f"{name}.jsonl")
        with open(data, "w", encoding="utf-8") as file:
            for question in questions(tasks[task], limit):
                file.write(json.dumps(question) + "\n")
        with open(os.path.join(folder, f"{name}.yaml"), "w", encoding="utf-8") as file:
            json.dump({"task": name, "dataset_path": "json", "test_split": "test",
                       "dataset_kwargs": {"data_files": {"test": data}},
                       "output_type": "multiple_choice", "num_fewshot": 0,
                       "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
                       "doc_to_target": "gold", "target_delimiter": " ",
                       "metric_list": [{"metric": "acc_norm", "aggregation": "mean",
                                        "higher_is_better": True}]},
                      file, indent=1)  # JSON is YAML too
    return names


# -----------------------------------------------------------------------------
# Answers.


@torch.no_grad()
def log_probs(model, pairs):
    """Return log P(choice | query) of each pair of token ids: every query is computed once."""
    choices = {}  # of each query
    for query, choice in pairs:
        choices.setdefault(query, {})[choice] = None
    scores = {}
    with twosome.command.bar(len(choices), "question") as progress:
        for query, tails in choices.items():
            [found] = trie.token_log_probs(model, [(query, tuple(tails))])  # [A, T]
            for tail, score in zip(tails, found.sum(1).tolist(), strict=True):
                scores[query, tail] = score
            progress.update()
    return [scores[pair] for pair in pairs]


def harness():
    """Return the module lm_eval and a class of its models that scores with our trie."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise AbilityError(f"the harness is missing ({error}); pip install"
                           " -r experiments/requirements.txt") from None

    class Ours(TemplateLM):
        """The harness's model: a question's tokens are computed once for all its choices."""

        def __init__(self, model, tokenizer):
            super().__init__()
            self.model, self.tokenizer = model, tokenizer

        @property
        def eot_token_id(self):
            return self.tokenizer.eos_token_id

        def tok_encode(self, string, add_special_tokens=None, **options):
            """Return a text's token ids, behind the opening tokens, as prompts are scored."""
            return twosome.encode(self.tokenizer, [string])[0]

        def _loglikelihood_tokens(self, requests, **options):
            """Return (log P(choice | query), unknown) of each request."""
            pairs = [(tuple(query), tuple(choice)) for _, query, choice in requests]
            return [(score, False) for score in log_probs(self.model, pairs)]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """No task here asks for it."""
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    return lm_eval, Ours


def side(model, name):
    """Return a context: within it, the model is its base, the trained one, or the merged one."""
    if name == "base":
        return model.disable_adapter()
    return merged(model) if name == "merged" else contextlib.nullcontext()


def measure(run, tasks, limit=None, folder=None):
    """Ask a run's newest checkpoint what read_tasks returned. Returns {"ability": {task: facts}}.

    A task's facts are its chance, and for each side a str with 1 for each right answer, else 0.
    """
    lm_eval, Ours = harness()
    from lm_eval.tasks import TaskManager
    agent, _ = twosome.load(run)
    with tempfile.TemporaryDirectory() as own:
        folder = folder or own
        os.makedirs(folder, exist_ok=True)
        names = write_files(tasks, os.path.abspath(folder), limit or QUESTIONS)
        manager = TaskManager(include_path=folder, include_defaults=False)
        facts = {task: {} for task in names}
        for name in ("base", "trained", "merged"):
            with side(agent.model, name):
                found = lm_eval.simple_evaluate(
                    model=Ours(agent.model, agent.tokenizer), tasks=list(names.values()),
                    task_manager=manager, log_samples=True, bootstrap_iters=0)
            for task, label in names.items():
                samples = sorted(found["samples"][label], key=lambda sample: sample["doc_id"])
                facts[task][name] = "".join(str(int(sample["acc_norm"])) for sample in samples)
                facts[task]["chance"] = float(np.mean([1 / len(sample["doc"]["choices"])
                                                       for sample in samples]))
    return {"ability": facts}


def accuracy(answers):
    """Return the share of right answers of a str of 0 and 1."""
    return answers.count("1") / len(answers)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--archive", default=ARCHIVE, help="of BIG-bench (in runs/)")
    parser.add_argument("--questions", type=int, help=f"of each task, at most ({QUESTIONS})")
    parser.add_argument("--files", help="keep the harness's task files in this folder")
    options = parser.parse_args(argv)
    if options.questions is not None and options.questions < 1:
        parser.error("--questions must be at least 1")
    try:
        harness()  # what is missing shows at once
        tasks = read_tasks(options.archive)
        facts = measure(options.run, tasks, options.questions, options.files)["ability"]
    except twosome.command.BAD_INPUT + (AbilityError, OSError) as error:
        print(f"ability.py: {error}", file=sys.stderr)
        return 2
    print(f"{'task':24}{'questions':>10}{'chance':>8}{'base':>8}{'trained':>9}{'merged':>8}")
    for task, found in facts.items():
        print(f"{task:24}{len(found['base']):10}{found['chance']:8.1%}{accuracy(found['base']):8.1%}"
              f"{accuracy(found['trained']):9.1%}{accuracy(found['merged']):8.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

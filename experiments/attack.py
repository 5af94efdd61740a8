"""Attack the program with hostile inputs and faults, and count what it does not take well.

    python experiments/attack.py                    # 1,000 cases, about twenty minutes
    python experiments/attack.py --cases 100 --seed 7 --only models
    python experiments/attack.py --show 7-models-12 # one case, and all that it printed

Every case is made from a seed and its number alone, in a folder of its own, and runs in a process
of its own, forked from a server that has imported everything. What must never happen:

    traceback   but for that of somebody's own world, after a line that says where
    control     a character printed that a terminal would obey
    long        a line of more than 500 characters
    hang        more than 60 seconds
    pickle      a file opened that could be one, or a class that unpickling looks up
    code        another exit code than the case allows: 2 for bad input, 1 for a failing machine
    hint        a command that is printed to be pasted, and names in a shell what is not there

tests/test_attack.py runs a hundred cases. Results: experiments/results/attack.json and .md.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from experiments import kill_campaign

ROOT = kill_campaign.ROOT
FAULTS = ("traceback", "control", "long", "hang", "pickle", "code", "hint")
TRAIN = ["--num-envs", "2", "--rollout-steps", "4", "--minibatch", "8", "--steps", "16",
         "--episodes", "2", "--checkpoint-every", "1"]
SIGNALLED = {0, 129, 130, 143, -1, -2, -15}
ODD_NAMES = ["run", "a run", "$(touch owned)", "it's", "-run", "a;b", "ünïcode", "`x`", "a&b",
             "a\\b"]
# Texts that are hostile to terminals, shells, files and tokenizers.
TEXTS = ["", " ", "\x1b[31mred", "\x07", "\u202eevil", "\u200b", "x" * 20_000, "../x",
         "$(touch owned)", "None", "a\nb", "a\0b", "\udcff", "🍅", "</s>", "<s>", "<pad>",
         "<|im_end|>", "%s", "{0}", "/proc/self/mem", "/dev/null", "nan", "\r", "=", "true", "[]",
         "run\u2028x"]
NUMBERS = ["-1", "0x10", "nan", "inf", "-inf", "1e309", "1e30", "9" * 30, "", "one", "1,5", "--",
           "\x1b[0m", "1e", "0.0.1", "½"]
# Values that no field of a configuration can have, or that mean something else there.
VALUES = ["x", -1, 0, 127, 3.7, None, [], {}, True, 10**6, 10**12, "\x1b[2J", [1, 2], "x" * 20_000,
          float("nan"), {"a": 1}]


@dataclasses.dataclass
class Case:
    """What is tried: in `folder`, one or more processes with these command lines."""

    folder: str
    argv: list
    codes: set = dataclasses.field(default_factory=lambda: {2})
    environment: dict = dataclasses.field(default_factory=dict)
    limit: int | None = None  # bytes of the largest file that can be written
    signals: tuple = ()  # pairs: seconds, number
    world: bool = False  # whether the world's own traceback may be shown
    others: list = dataclasses.field(default_factory=list)  # command lines of further processes


# -----------------------------------------------------------------------------
# The kinds of cases. Each function makes one in an empty folder, from a random generator.


def commands(rng, folder, templates):
    """Command lines: numbers, texts, mistyped and contradicting flags."""
    numbers = ["--steps", "--num-envs", "--rollout-steps", "--epochs", "--minibatch", "--seed",
               "--policy-lr", "--critic-lr", "--gamma", "--gae-lambda", "--clip", "--entropy",
               "--max-grad-norm", "--target-kl", "--lora-rank", "--lora-alpha", "--episodes",
               "--checkpoint-every", "--gradient-accumulation", "--value-coefficient", "--delay"]
    texts = ["--env", "--task", "--model", "--norm", "--dtype", "--device", "--load-in", "--out",
             "--preset", "--lora-targets", "--env-args", "--resume", "--eval", "--watch", "--from",
             "--compare", "--gif", "--tokens", "--prompt"]
    kind = rng.choice(["number", "number", "text", "text", "flag", "both"])
    if kind == "number":
        return Case(folder, [*TRAIN, rng.choice(numbers) + "=" + rng.choice(NUMBERS)])
    if kind == "text":
        flag = rng.choice(texts)
        text = rng.choice(TEXTS).replace("\0", "")
        return Case(folder, [*TRAIN, f"{flag}={text}"], {0, 2})
    if kind == "flag":
        flag = list(rng.choice(numbers + texts))
        flag[rng.randrange(2, len(flag))] = rng.choice("abcxyz-_é\x1b")
        return Case(folder, ["".join(flag), rng.choice(["1", "x"])], {0, 2})
    modes = [["--resume", "run"], ["--eval"], ["--watch"], ["--tokens", "a"], ["--compare", "run"],
             ["--from", "last"], ["--greedy"], ["--gif", "x"], ["--prompt", "a"]]
    return Case(folder, sum(rng.sample(modes, 2), []), {0, 1, 2})


def models(rng, folder, templates):
    """Folders of a model: senseless configurations, tokenizers and weights, or other files."""
    model = shutil.copytree(os.path.join(ROOT, "pocket_lm"), os.path.join(folder, "model"))
    argv = rng.choice([[*TRAIN, "--model", "model"], ["--tokens", "a b", "c", "--model", "model"]])
    kind = rng.choice(["config"] * 6 + ["tokenizer"] * 4 + ["weights", "index", "pickle", "adapter",
                                                          "gguf", "empty"])
    codes = {2}
    if kind == "config":
        codes = {0, 1, 2}  # numbers that overflow are told as such, with 1
        edit(os.path.join(model, "config.json"), rng, rng.randint(1, 2))
    elif kind == "tokenizer":
        codes = {0, 2}
        name = rng.choice(["tokenizer.json", "tokenizer_config.json"])
        rng.choice([edit, damage])(os.path.join(model, name), rng)
    elif kind == "weights":
        codes = {0, 1, 2}  # a changed weight is still a weight
        damage(os.path.join(model, "model.safetensors"), rng)
    elif kind == "index":
        away = rng.choice(["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", "\x1b[0m"])
        weights = os.path.join(model, "model.safetensors")
        os.rename(weights, os.path.join(folder, "outside.safetensors"))
        write(os.path.join(model, "model.safetensors.index.json"),
              json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": away}}))
        write(os.path.join(model, "pytorch_model.bin"), "no weights")
    elif kind == "pickle":
        weights = os.path.join(model, "model.safetensors")
        os.rename(weights, os.path.join(model, "pytorch_model.bin"))
    elif kind == "adapter":
        write(os.path.join(model, "adapter_config.json"), rng.choice(["{}", "x", '{"r": 8}']))
    elif kind == "gguf":
        shutil.rmtree(model)
        content = rng.choice([b"", b"GGUF", b"GGUF\3\0\0\0" + rng.randbytes(64), b"text\n"])
        write(os.path.join(folder, "model.gguf"), content)
        argv = ["--tokens", "a", "b", "--model", "model.gguf"]
    else:
        for name in os.listdir(model):
            if rng.random() < 0.6 or name == "config.json":
                remove(os.path.join(model, name))
    return Case(folder, argv, codes, {"XDG_CACHE_HOME": os.path.join(folder, "cache")})


def folders(rng, folder, templates):
    """Folders of a run: damaged, edited, swapped, renamed, with odd names."""
    name = rng.choice(ODD_NAMES)
    run = shutil.copytree(templates, os.path.join(folder, name))
    last = os.path.join(run, max((n for n in os.listdir(run) if n.startswith("checkpoint-")),
                                 key=lambda n: int(n[11:])))
    flag = rng.choice(["--resume", "--resume", "--eval", "--watch", "--compare"])
    codes = {0, 2}
    kind = rng.choice(["checkpoint", "checkpoint", "config", "metrics", "link", "file", "whole"])
    if kind == "checkpoint":
        damage(os.path.join(last, rng.choice(sorted(os.listdir(last)))), rng)
        codes = {0} if flag == "--compare" else {2}
    elif kind == "config":
        edit(os.path.join(run, "config.json"), rng)
    elif kind == "metrics":
        damage(os.path.join(run, rng.choice(["metrics.csv", "baseline.json", "summary.json"])), rng)
    elif kind == "link":
        target = os.path.join(last, rng.choice(sorted(os.listdir(last))))
        os.rename(target, os.path.join(folder, "elsewhere"))
        os.symlink(os.path.join(folder, "elsewhere"), target)
        codes = {0} if flag == "--compare" else {2}
    elif kind == "file":
        place = os.path.join(run, rng.choice(["lock", "curve.png", "config.json", "metrics.csv"]))
        remove(place)
        os.mkdir(place)
        codes = {0, 1, 2}
    argv = [f"{flag}={os.path.join('.', name) if flag == '--compare' else name}"]
    return Case(folder, [*argv, *["--episodes=1"] * (flag == "--eval")], codes)


def surroundings(rng, folder, templates):
    """What the program stands in: variables, disks, folders that are gone, a reader that leaves."""
    names = {"MPLBACKEND": ["module://nothing", "x"], "COLUMNS": ["0", "-5", "x", "9" * 20],
             "TERM": ["", "x", "dumb"], "HOME": ["/nowhere"], "TMPDIR": ["/nowhere"],
             "XDG_CACHE_HOME": ["/dev/null", "/nowhere"], "HF_HOME": ["/dev/null"],
             "WORLD_SIZE": ["2", "x", "-1", "0", ""], "RANK": ["1", "x"], "LANG": ["C", "x"],
             "MATPLOTLIBRC": ["/dev/null", "/nowhere"], "OMP_NUM_THREADS": ["x", "0"],
             "CUDA_VISIBLE_DEVICES": ["x"], "PYTHONIOENCODING": ["ascii", "x"]}
    environment = {name: rng.choice(names[name]) for name in rng.sample(sorted(names), 2)}
    limit = rng.choice([None, None, rng.randrange(0, 300_000)])
    argv = [*TRAIN, "--out", rng.choice(ODD_NAMES[:4])]
    return Case(folder, argv, {0, 1, 2}, environment, limit)


def signals(rng, folder, templates):
    """Signals at random moments, once or twice."""
    sent = [(rng.uniform(0, 4), rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
            for _ in range(rng.randint(1, 2))]
    argv = [*TRAIN, "--steps", "160", "--out", rng.choice(ODD_NAMES[:4])]
    return Case(folder, argv, SIGNALLED, signals=tuple(sorted(sent)))


WORLD = '''
class World:
    def __init__(self{arguments}):
        self.steps = 0

    def info(self):
        return {info}

    def reset(self, {seed}):
        return {reset}

    def step(self, action):
        self.steps += 1
        return {step}
'''


def worlds(rng, folder, templates):
    """Worlds of somebody's own, with one thing wrong."""
    text = repr(rng.choice(TEXTS))
    good = '{"prompt": "You are at a door. Your next step is to", "actions": ["push it", "wait"]}'
    parts = {"arguments": "", "info": good, "seed": "seed=None", "reset": "None, self.info()",
             "step": "None, 1.0, self.steps > 2, False, self.info()"}
    more = good[:-1] + ", "
    wrong = {
        "arguments": [", size"],
        "seed": ["*", "a, b"],
        "info": ["None", "{}", "[]", "1 / 0", '{"actions": ["a"]}',
                 '{"prompt": ' + text + ', "actions": ["a", "b"]}',
                 '{"prompt": "You", "actions": [' + text + ', "b"]}',
                 '{"prompt": "You", "actions": "push"}', '{"prompt": "You", "actions": []}',
                 '{"prompt": 3, "actions": [b"a"]}', good.replace("wait", "push it"),
                 more + '"admissible": [9]}', more + '"admissible": 3}', more + '"duration": "x"}',
                 more + '"duration": -1}', '{"admissible_commands": ' + text + "}"],
        "reset": ["None", "1, 2, 3", "None, None", f"None, {text}", "exit(3)", "self.reset()"],
        "step": ["None", "1, 2", f"None, {text}, False, False, self.info()", "self.info()",
                 "1 / 0", "None, float('nan'), False, False, self.info()",
                 "None, 1.0, None, None, None", f"(_ for _ in ()).throw(ValueError({text}))"]}
    part = rng.choice(sorted(wrong))
    parts[part] = rng.choice(wrong[part])
    write(os.path.join(folder, "world.py"), WORLD.format(**parts).encode(errors="surrogatepass"))
    return Case(folder, [*TRAIN, "--env", "world.py:World"], {0, 1, 2}, world=True)


def texts(rng, folder, templates):
    """Texts of the user, as prompt and as phrases."""
    chosen = [rng.choice(TEXTS).replace("\0", "") + rng.choice(["", "go", " "]) for _ in range(3)]
    argv = ["--tokens", *[text if text[:1] != "-" else "x" for text in chosen[:2]]]
    return Case(folder, [*argv, f"--prompt={chosen[2]}"], {0, 2})


def processes(rng, folder, templates):
    """Two processes that were started with different flags, or of which one cannot begin."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    other = [*TRAIN, *rng.choice([["--seed", "2"], ["--policy-lr", "0.5"], ["--task", "x"],
                                  ["--steps", "32"], ["--model", "nowhere"]])]
    first, second = rng.sample([[*TRAIN, "--out", "run"], [*other, "--out", "run"]], 2)
    return Case(folder, first, {1, 2}, environment, others=[second])


# Each kind, and its share of the cases.
KINDS = {"commands": (commands, 5), "models": (models, 5), "folders": (folders, 4),
         "texts": (texts, 2), "worlds": (worlds, 3), "surroundings": (surroundings, 2),
         "signals": (signals, 1), "processes": (processes, 1)}


# -----------------------------------------------------------------------------
# Damage.


def write(path, content):
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def damage(path, rng):
    """Cut a file, change one of its bits, empty it, remove it, or put something else there."""
    with open(path, "rb") as file:
        content = file.read()
    at = rng.randrange(max(len(content), 1))
    if rng.random() < 0.3:
        at %= 200  # the beginning is where formats are most sensitive
    kind = rng.choice(["cut", "bit", "bit", "empty", "other", "remove", "control"])
    changed = bytearray(content)
    if kind == "bit" and content:
        changed[at % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "control":
        changed[at:at] = "\x1b[31m\u202e".encode()
    else:
        changed = {"cut": content[:at], "empty": b"", "other": b"[1, 2"}.get(kind, b"")
    write(path, bytes(changed))
    if kind == "remove":
        os.unlink(path)


def edit(path, rng, count=1):
    """Give random fields of a JSON file, at any depth, values that they cannot have."""
    with open(path) as file:
        content = json.load(file)
    for _ in range(count):
        inside = content
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = rng.choice(keys[:50])
            if not isinstance(inside[key], dict | list) or not inside[key] or rng.random() < 0.3:
                break
            inside = inside[key]
        if rng.random() < 0.15 and isinstance(inside, dict):
            del inside[key]
        else:
            inside[key] = rng.choice(VALUES)
    write(path, json.dumps(content))


# -----------------------------------------------------------------------------
# Running a case, and judging it.


def attacked(argv, output, limit, folder, environment, traced):
    """Be `python twosome.py ARGV` in a folder and an environment; write down what is opened."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as twosome.py does when it is started
    os.chdir(folder)
    os.environ.update(environment)
    trace = os.open(traced, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    alone = environment.get("WORLD_SIZE", "1") == "1"

    def watch(event, arguments):
        if event == "open" and re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", str(arguments[0])):
            os.write(trace, f"opened {arguments[0]}\n".encode(errors="replace"))
        if event == "pickle.find_class" and alone:  # processes send each other objects
            os.write(trace, f"unpickled {arguments}\n".encode())

    sys.addaudithook(watch)
    kill_campaign.main_of(argv, output, limit)


def run_case(case):
    """Run a case. Returns a list of (exit code, output, seconds, trace) of its processes."""
    started, ran = time.perf_counter(), []
    for rank, argv in enumerate([case.argv, *case.others]):
        traced = os.path.join(case.folder, f".trace-{rank}")
        environment = {**case.environment, **({"RANK": str(rank)} if case.others else {})}
        more = case.folder, environment, traced
        process = kill_campaign.Process(argv, case.limit, attacked, more)
        ran.append((process, traced))
    ran[0][0].until(lambda: os.path.exists(ran[0][1]))  # it has begun
    for moment, number in case.signals:
        time.sleep(max(0, moment - (time.perf_counter() - started)))
        ran[0][0].signal(number)
    for process, _ in ran:
        process.process.join(max(0.1, 60 - (time.perf_counter() - started)))
    seconds = time.perf_counter() - started
    results = []
    for process, traced in ran:
        process.signal(signal.SIGKILL)
        code = process.wait()
        trace = ""
        if os.path.exists(traced):
            with open(traced) as file:
                trace = file.read()
        results.append((code, process.output(), seconds, trace))
        os.unlink(process.file)
    return results


def judge(case, code, output, seconds, trace):
    """Return what was not taken well: a list of (fault, what shows it)."""
    found = []
    at = output.find("Traceback (most recent call last)")
    if at >= 0 and not (case.world and "twosome.py: " in output[:at] and "world.py" in output[at:]):
        found.append(("traceback", output[at:][-300:]))
    control = [c for c in output if not c.isprintable() and c not in "\n\r"]
    if control:
        found.append(("control", ascii("".join(control))[:80]))
    lines = re.split("[\n\r]", output)
    if max(map(len, lines)) > 500:
        found.append(("long", max(lines, key=len)[:120]))
    if code == -signal.SIGKILL or seconds > 60:
        found.append(("hang", f"{seconds:.0f} s"))
    elif code not in case.codes:
        found.append(("code", f"{code}, not {sorted(case.codes)}: {lines[-2:][0][:200]}"))
    if trace:
        found.append(("pickle", trace[:200]))
    for hint in re.findall(r"python twosome\.py (--\w+ .*)", output):
        if not pastes(hint, case.folder):
            found.append(("hint", hint[:200]))
    return found


def pastes(hint, folder):
    """Whether a shell takes a printed command as meant: what it names is there, no more happens."""
    shell = f'python() {{ for each; do printf "%s\\n" "$each"; done; }}; python {hint}'
    done = subprocess.run(["bash", "-c", shell], cwd=folder, capture_output=True, text=True)
    words = done.stdout.split("\n")
    clean = done.returncode == 0 and not done.stderr
    return clean and os.path.exists(os.path.join(folder, words[1])) and not os.path.exists(
        os.path.join(folder, "owned"))


def attack(kind, number, seed, templates):
    """Make a case, run it and judge it. Returns (its name, its faults, its outputs)."""
    name = f"{seed}-{kind}-{number}"
    rng = random.Random(name)
    folder = tempfile.mkdtemp()
    try:
        case = KINDS[kind][0](rng, folder, templates)
        results = run_case(case)
        faults = sum((judge(case, *result) for result in results), [])
        return name, faults, case.argv, [output for _, output, *_ in results]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def template(parent):
    """Train the run whose copies are attacked. Returns its folder."""
    folder = os.path.join(parent, "template")
    process = kill_campaign.Process([*TRAIN, "--out", folder])
    if process.wait():
        raise RuntimeError(process.output())
    os.unlink(process.file)
    return folder


def campaign(cases, seed, only="", jobs=2, report=None):
    """Run so many cases. Returns a list of what attack returns, in the order of the cases."""
    kinds = [only] if only else [kind for kind, (_, share) in KINDS.items() for _ in range(share)]
    with tempfile.TemporaryDirectory() as parent:
        templates = template(parent)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(attack, kinds[n % len(kinds)], n, seed, templates)
                       for n in range(cases)]
            for future in concurrent.futures.as_completed(futures):
                if report:
                    report(future.result())
            return [future.result() for future in futures]


def table(results):
    """Return the results as Markdown: a row a kind."""
    counts = collections.defaultdict(collections.Counter)
    for name, faults, *_ in results:
        for kind in (name.split("-")[1], "all"):
            counts[kind]["cases"] += 1
            counts[kind].update({fault for fault, _ in faults})
    columns = ["cases", *FAULTS]
    rows = [["kind", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[kind, *(str(counts[kind][column]) for column in columns)] for kind in (*KINDS, "all")
             if counts[kind]["cases"]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of everything random")
    parser.add_argument("--only", choices=list(KINDS), default="", help="one kind alone")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    parser.add_argument("--show", metavar="NAME", help="run one case again, and show its output")
    parser.add_argument("--out", default=os.path.join(ROOT, "experiments", "results"))
    options = parser.parse_args(argv)
    if options.show:
        seed, kind, number = options.show.split("-")
        with tempfile.TemporaryDirectory() as parent:
            _, faults, argv, outputs = attack(kind, int(number), int(seed), template(parent))
        print(argv, *map(ascii, outputs), *faults, sep="\n")
        return int(bool(faults))
    import tqdm
    with tqdm.tqdm(total=options.cases, unit="case", disable=None) as bar:
        def report(result):
            bar.update()
            for fault, shown in result[1]:
                bar.write(f"{result[0]}: {fault}: {ascii(shown)}")
        results = campaign(options.cases, options.seed, options.only, options.jobs, report)
    print(table(results))
    if not options.only:
        facts = {"seed": options.seed, "cases": len(results),
                 "faults": {name: faults for name, faults, *_ in results if faults}}
        write(os.path.join(options.out, "attack.json"), json.dumps(facts, indent=1) + "\n")
        write(os.path.join(options.out, "attack.md"), table(results))
    return int(any(faults for _, faults, *_ in results))


if __name__ == "__main__":
    sys.exit(main())

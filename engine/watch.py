"""What one sees of a run: its report, its curves and its episodes. Nothing here changes a result.

    Report                what a run prints and writes while it learns
    draw_curve, compare   the curves of one run, and of several over each other
    show                  an episode in the terminal, as plain text or as an animated picture

Terminal, plain text and picture show the same screens, which are lists of text. INKS colours some
of their characters. Text that others wrote is escaped before that.
"""
import contextlib
import functools
import io
import os
import re
import shutil
import sys
import textwrap
import time
import types
from importlib.util import find_spec

import numpy as np
import torch

import envs
import ppo
from engine import command, models, runs, worlds
from engine.command import COLUMNS, clean, escape, evaluation_line, measure, say, title

# -----------------------------------------------------------------------------
# The report of a run.

# The usual names of tensorboard's curves; what is not here is a loss of the same name.
TAGS = {"return": "charts/episodic_return", "success": "charts/success", "SPS": "charts/SPS",
        "rate": "charts/learning_rate", "kl": "losses/approx_kl"}


class Report(contextlib.ExitStack):
    """What a run prints and writes while it trains, by its first process alone.

    Leaving it closes the progress bar.
    """

    def __init__(self, config, run, learner, make_env):
        """Take what is reported on; `learner` is the Trainer."""
        super().__init__()
        self.config, self.run, self.trainer, self.make_env = config, run, learner, make_env
        self.best, self.start = getattr(make_env(), "best_return", None), learner.updates
        self.clocks, self.drawn = (time.perf_counter(), time.process_time()), run.seconds

    def spend(self):
        """Add the seconds since the last call to the run's, which a resume goes on counting."""
        now = time.perf_counter(), time.process_time()
        self.run.seconds += now[0] - self.clocks[0]
        self.run.cpu_seconds += now[1] - self.clocks[1]
        self.clocks = now

    def begin(self, agent):
        """Say what will be learnt, log row 0 (the untrained policy), and open the progress bar."""
        if self.trainer.rank:
            return
        say(f"{self.config.env}: {title(self.config)}, {self.config.norm} normalisation, seed"
            f" {self.config.seed} -> {self.run.folder}")
        items, chance = random_walk(self.make_env(), agent, self.config.gamma)
        # A minibatch computes equal items once. Take the random walk's for all that there are.
        samples = -(-min(self.config.minibatch, len(items)) // self.config.gradient_accumulation)
        say(models.preflight(agent.model, [*map(agent.tree, items)], samples, [agent.critic]))
        if not self.trainer.updates:
            self.run.write("baseline.json", {"random": chance, "optimum": {"return": self.best}})
            untrained = measure(self.make_env, agent, self.config)
            self.log({"update": 0, "steps": 0, **untrained})
            say(f"untrained  return {untrained['return']:.3f}, success {untrained['success']:.0%}")
        self.bar = self.enter_context(command.bar(
            self.trainer.total_updates, "update", initial=self.start,
            bar_format="update {n_fmt} of {total_fmt}{postfix}, {remaining} left |{bar}|"))

    def log(self, metrics):
        """Write a row of metrics.csv, and for tensorboard if it is there; move the progress bar."""
        if self.trainer.rank:
            return
        self.spend()
        row = {**dict.fromkeys(COLUMNS, float("nan")), **metrics,
               "seconds": round(self.run.seconds, 2), "cpu_seconds": round(self.run.cpu_seconds, 2)}
        self.run.log({name: row[name] for name in COLUMNS})
        row["rate"] = self.trainer.policy_optimizer.param_groups[0]["lr"]
        row["SPS"] = row["steps"] / max(row["seconds"], 0.01)
        names = (*TAGS, "policy_loss", "value_loss", "entropy", "explained_variance")
        values = [{"tag": TAGS.get(n, f"losses/{n}"), "simple_value": row[n]} for n in names]
        with contextlib.suppress(ImportError):
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
            event = Event(wall_time=time.time(), step=row["steps"], summary={"value": values})
            # Not by SummaryWriter, whose thread prints a traceback where the disk is full.
            path = self.run.path("events.out.tfevents.0")
            with open(os.open(path, runs.PLAIN, 0o666), "ab") as file:
                RecordWriter(file).write(event.SerializeToString())
        if row["update"]:
            best = f" of {self.best:.3f}" if self.best is not None else ""
            # There is no mean before the first episodes have ended.
            told = "return {return:.3f}{best}, success {success:.0%}, entropy {entropy:.2f}"
            self.bar.set_postfix_str(told.format(**row, best=best).replace("nan", "-"), False)
            self.bar.update()

    def checkpoint(self, agent):
        """Write a checkpoint, and every 30 seconds (our choice) draw the curve so far.

        A picture takes a second the first time, and half of one after that.
        """
        self.spend()
        self.run.checkpoint(agent, self.trainer)
        if not self.trainer.rank and self.run.seconds >= self.drawn + 30:
            draw_curve(self.run)
            self.drawn = self.run.seconds

    def stopped(self, code):
        """Say how to go on after a signal. Returns the exit code."""
        if not self.trainer.rank:
            draw_curve(self.run)
            say(f"stopped after update {self.trainer.updates} of {self.trainer.total_updates};"
                f" go on with: {runs.again(self.run.folder, self.config.env)}")
        return code

    def finish(self, agent):
        """Evaluate the trained agent, and leave the files of a finished run. Returns 0."""
        if self.trainer.rank:
            return 0
        folder, config = runs.quote(self.run.folder), self.config
        # A run that went on from before its end (--from) is evaluated again.
        if self.start == self.trainer.updates and os.path.exists(self.run.path("summary.json")):
            say(f"{folder} is finished: nothing is left to do")
        else:
            result = measure(self.make_env, agent, config)
            self.spend()
            self.run.write("summary.json", {
                **{name: vars(config)[name] for name in ("env", "task", "model", "norm", "seed")},
                "steps": self.trainer.updates * config.num_envs * config.rollout_steps,
                "primitive_steps": self.trainer.episodes.primitive_steps, "best": self.best,
                "seconds": self.run.seconds, "cpu_seconds": self.run.cpu_seconds, **result})
            say(evaluation_line("trained", result, self.best))
        draw_curve(self.run)
        # A run never imports code, so a world of one's own is named again.
        world = f" --env {runs.quote(config.env)}" if ":" in config.env else ""
        say(f"{folder}: metrics.csv, curve.png, summary.json, checkpoint-*\n"
            f"next: python twosome.py --watch {folder}{world}\n"
            f"      python twosome.py --eval {folder}{world or ' --task all'}\n"
            f"      python twosome.py --compare {folder}")
        return 0


def random_walk(env, agent, gamma):
    """Return the items that a random policy meets, and {"return", "success"}: its means.

    models.preflight tells from the items what training will take. Our choice: 5,000 steps, and 500
    in a world of somebody's own, which may be slow.
    """
    rng, items, ended, total, steps = np.random.default_rng(0), {}, [], 0.0, 0
    obs, info = env.reset(seed=0)
    for _ in range(500 if isinstance(env, worlds.World) else 5000):
        items[item := agent.describe(obs, info)] = None
        obs, reward, done, cut, info = ppo.act(env, info, int(rng.integers(len(item[1]))))
        total += gamma ** steps * reward
        steps += info.get("duration", 1)
        if done or cut:
            ended.append((total, bool(info.get("success", reward > 0))))
            (obs, info), total, steps = env.reset(), 0.0, 0
    return items, dict(zip(PANELS, np.mean(ended or [(np.nan, np.nan)], axis=0), strict=False))


# -----------------------------------------------------------------------------
# Curves.

PANELS = {"return": "return, discounted", "success": "success rate", "entropy": "entropy, nats",
          "kl": "KL of an update, nats", "explained_variance": "explained variance"}
LINES = {"random": ":", "optimum": "-"}  # baseline.json says where they are


def read_run(folder):
    """Return (config, metrics.csv as an array, {line: where it is in each panel}) of a run.

    Raises RunError where there is none.
    """
    config = runs.fill(command.Config, runs.read_config(folder))
    rows = runs.read_bytes(os.path.join(folder, "metrics.csv")).decode("latin").splitlines()[1:]
    known = runs.read_json(os.path.join(folder, "baseline.json"))
    kinds = [(name, float) for name in COLUMNS]
    with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
        lines = {line: np.array([*map(known[line].get, PANELS)], float) for line in LINES}
        return config, np.loadtxt(rows or ["none"], kinds, delimiter=",", ndmin=1), lines
    raise runs.RunError(f"the metrics of {folder} are empty or damaged")


def draw(groups, heading):
    """Return a PNG's bytes of groups of seeds: lists of (label, table, lines)."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, perhaps unknown here; nothing needs one
    from matplotlib.figure import Figure  # without pyplot, no window system is touched
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(heading, parse_math=False)
    # The legend has a panel of its own, so it covers no line.
    first, second, legend, *others = figure.subplots(2, 3).flat
    for n, (panel, name) in enumerate(zip((first, second, *others), PANELS, strict=True)):
        panel.set(xlabel="macro-actions", ylabel=PANELS[name])
        for k, group in enumerate(groups):
            (label, *_, lines), tables = group[0], [table for _, table, _ in group]
            length, ink = min(map(len, tables)), {"color": f"C{k}"}
            values = np.stack([table[name][:length] for table in tables])  # [seeds, rows]
            for line, style in LINES.items():
                panel.axhline(lines[line][n], ls=style, lw=1, color="grey", label="_" * k + line)
            # Row 0 of a table is the untrained LLM. A label that begins with _ is not shown.
            panel.axhline(values[:, 0].mean(), ls="--", label="_" * k + "untrained LLM", **ink)
            steps, learnt = tables[0]["steps"][1:length], values[:, 1:]
            panel.plot(steps, learnt.mean(0), label=label.replace("$", r"\$"), **ink)
            panel.fill_between(steps, learnt.min(0), learnt.max(0), alpha=0.2, **ink)
    panel.set_ylim(bottom=max(panel.get_ylim()[0], -1))  # explained variance has no lower bound
    legend.axis("off")
    legend.legend(*first.get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(data := io.BytesIO(), format="png", dpi=100)
    return data.getvalue()


def draw_curve(run):
    """Draw a run's curve.png. A picture that fails, or is interrupted, never fails the run."""
    try:
        config, *drawn = read_run(run.folder)
        heading = f"{config.task}, {config.model[-40:]}, norm {config.norm}, seed {config.seed}"
        run.write("curve.png", draw([[("policy, last 100 episodes", *drawn)]], clean(heading)))
    except (Exception, KeyboardInterrupt) as error:
        runs.tell(clean(f"no curve.png ({type(error).__name__}: {error}); --resume draws it"))


def compare(folders, out=""):
    """Print a table of runs, and draw them over each other. Returns the exit code.

    Runs that differ in nothing but their seeds are one line, named after the first of them.
    """
    groups, path = {}, out or "compare.png"
    for folder in folders:
        config, *drawn = read_run(folder)
        key = str({**vars(config), "seed": 0, "out": "", "device": ""})
        groups.setdefault(key, []).append((clean(folder[-34:]), *drawn))
    say(f"{'':34}  runs  untrained  last 100 episodes (low to high)  success")
    for group in groups.values():
        rows = np.stack([table[[0, -1]] for _, table, _ in group])  # [seeds, 2]
        untrained, last = rows["return"].T
        say(f"{group[0][0]:34} {len(group):5} {untrained.mean():10.4f} {last.mean():8.4f}"
            f" ({last.min():7.4f} to {last.max():7.4f}) {rows['success'][:, 1].mean():9.1%}")
    try:
        runs.write_bytes(path, draw(groups.values(), ""))
    except (ImportError, ValueError, RuntimeError) as error:  # matplotlib's, and its settings'
        raise runs.RunError(f"no picture ({type(error).__name__}: {error})") from None
    say(f"-> {path}")
    return 0


# -----------------------------------------------------------------------------
# An episode.


def episode(config, options, agent, make_env, judge):
    """Play an episode, always the same one, and yield each moment of it.

    A moment has head, picture, outcome (empty while it goes on), item (prompt, phrases), value
    (what the critic expects), policies {name: log pi [A]} and choice: the action that follows, or
    another one where one is sent. judge(item) returns value and policies.
    """
    env, reward, total, steps, outcome = make_env(), 0.0, 0.0, 0, ""
    best = f" of {env.best_return:.3f}" if getattr(env, "best_return", None) is not None else ""
    obs, info = env.reset(seed=command.EVALUATION_SEED)
    rng = np.random.default_rng(command.EVALUATION_SEED)
    for _ in range(201):  # our choice, because a world without a time limit may have no end
        head = f"step {steps}, return {total:.3f}{best}, reward {reward:.3f}, {title(config)}"
        moment = types.SimpleNamespace(head=head, picture=drawing(env), outcome=outcome)
        if outcome:
            return (yield moment)
        moment.item = agent.describe(obs, info)
        moment.value, moment.policies = judge(moment.item)
        policy, *_ = moment.policies.values()
        moment.choice = [ppo.sample(policy, rng), int(policy.argmax())][bool(options.greedy)]
        choice = yield moment
        if choice is not None:  # too large if a world forgets its seed
            moment.choice = min(choice, len(moment.item[1]) - 1)
        obs, reward, done, cut, info = ppo.act(env, info, moment.choice)
        total += config.gamma ** steps * float(reward)
        steps += info.get("duration", 1)
        if done or cut:
            outcome = "solved" if info.get("success", reward > 0) else "not solved"


# -----------------------------------------------------------------------------
# Screens.

# The colour of what begins with a character: the terminal's (0 is its own), and the picture's.
INKS = {"░": (0, "#4a525a"), "█": (2, "#2ea043"), "▒": (0, "#8b949e"), "@": (6, "#58a6ff"),
        "[": (5, "#d29922"), "<": (2, "#3fb950"), "•": (1, "#ff7b72"), ">": (6, "#58a6ff"),
        "": (0, "#c9d1d9")}  # the last is anything else's
INKED = re.compile(r"([░█▒]+|@\w*|\[[ \w]*\]|<D>|•[\w ]*\w|^>[^█▒\n]*)", re.MULTILINE)


def drawing(env):
    """Return the lines of a picture of the world as it is: a render() of text, if it is foreign."""
    for place, drawn in (("kitchen", kitchen), ("room", home)):
        if hasattr(env, place):
            return drawn(env)
    if not hasattr(env.world, "render") or getattr(env.world, "render_mode", "ansi") != "ansi":
        return []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        text = worlds.call("render", env.world.render) or printed.getvalue()
    return [escape(line)[:100] for line in re.sub(r"\x1b\[[\d;]*m", "", str(text)).split("\n")]


def kitchen(env):
    """Draw a kitchen: T is a tomato, t a chopped one, B a bowl, and Bt a bowl with it."""
    letters = {item: item[0] if env.chops.get(item) == envs.CHOPS else item[0].upper()
               for item in env.kitchen.home}
    letters["bowl"] += "".join(map(letters.get, env.in_bowl))
    tiles = {cell: {"K": "[ ]", "D": "<D>", ".": "", "A": ""}.get(symbol, "░░░░░")
             for cell, symbol in env.kitchen.cells.items()}
    for item, cell in env.lying.items():
        tiles[cell] = ("[{}]" if cell in env.kitchen.board_at else "•{}").format(letters[item])
    tiles[env.agent] = "@" + letters.get(env.holding, "")
    rows, columns = map(range, env.kitchen.size)
    return ["".join(f"{tiles[x, y]:^5}" for y in columns) for x in rows]


def home(env):
    """Draw a home, one line a room, with what stands there or is held."""
    things, nouns = envs.OBJECTS[env.kind], {"tv": "TV", **env.nouns}
    lines = {room: f"░ {room:12}" + (" @", " @sits")[env.sitting] * (room == env.room)
             for room in envs.ROOMS}
    known = {"held": env.held, "near": env.near - env.held, "open": env.open, "on": env.on}
    for thing in things:
        place = env.placed.get(thing, thing)
        facts = [fact for fact in known if thing in known[fact]]
        facts += [f"at {nouns.get(place, place)}"] * (place != thing)
        room = env.room if thing in env.held else things[place]
        lines[room] += f"  •{nouns.get(thing, thing)}" + f" ({', '.join(facts)})" * bool(facts)
    return sum((textwrap.wrap(line, 58, subsequent_indent=" " * 15) for line in lines.values()), [])


def screen(moment, width, height, foot=""):
    """Return the lines of one moment. A low window has no blank ones and less of the picture."""
    rest = ["", f"The episode is over: {moment.outcome}."]
    if not moment.outcome:
        size = max(3, width // 11)
        wide = max(8, width - 5 - (size + 6) * len(moment.policies))
        table = [f"{f'value {moment.value:.3f}':{wide + 5}}"]
        table += [f"{' >'[k == moment.choice]}{k + 1:2} {escape(phrase)[:wide]:{wide}} "
                  for k, phrase in enumerate(moment.item[1])]
        for name, policy in moment.policies.items():
            table[0] += f"{name:{size + 6}}"
            for k, chance in enumerate(policy.exp().tolist(), 1):
                bar = "▒█"[name == "trained"] * round(size * chance)
                table[k] += f"{bar:{size}}{chance:5.0%} "
        parts = (textwrap.wrap(escape(part), width) for part in moment.item[0].split("\n"))
        rest = ["", *sum(parts, [])[-max(4, height // 3):], "", *table]
    lines = [moment.head[:width], "", *moment.picture, *rest, foot]
    lines = lines if len(lines) <= height else [line for line in lines if line]
    return lines[:1] + lines[1 + max(0, len(lines) - height):]


# -----------------------------------------------------------------------------
# Where they are shown.


def show(config, options, agent, make_env):
    """Play an episode in the terminal, as plain text or into a GIF. Returns the exit code."""
    @functools.cache
    @torch.no_grad()
    def judge(item):
        policies = {"trained": agent.log_probs([item])[0]} if options.folder else {}
        with agent.untrained():
            policies["untrained"] = agent.log_probs([item])[0]
        return agent.values([item]).item(), policies

    begin = functools.partial(episode, config, options, agent, make_env, judge)
    if options.gif:
        runs.write_bytes(options.gif, animation(begin(), options.delay or 1.5))
        say(f"-> {options.gif}")
        return 0
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    if not plain and all(each and each.isatty() for each in (sys.stdin, sys.stdout)):
        import curses
        with contextlib.suppress(curses.error, UnicodeError):  # a terminal that it does not know
            curses.wrapper(at_the_keys, curses, begin, options.delay)
            return 0
    for moment in begin():
        lines = screen(moment, min(shutil.get_terminal_size().columns, 100), 999)
        say("\n".join(map(str.rstrip, lines)).translate(str.maketrans("░█▒•", "##=*")))
        time.sleep(options.delay or 0)
    return 0


def at_the_keys(window, curses, begin, delay):
    """Show an episode as the keys want it. With a delay it plays by itself, until a key."""
    curses.use_default_colors()
    for number in range(1, 8):
        curses.init_pair(number, number, -1)
    choices, at, typed, key = [], 0, "", ""
    while key != "q":
        # Where we are follows from what was chosen up to here.
        moment = [next(source := begin()), *map(source.send, choices[:at])][-1]
        height, width = window.getmaxyx()
        foot = f"space: step  ←→: back, forth  number, Enter: act  q: quit {typed}"
        window.clear()
        lines = screen(moment, min(max(width - 1, 20), 100), height, foot)
        with contextlib.suppress(curses.error):  # letters of two columns may not all fit
            for text in INKED.split("\n".join(escape(line)[:width - 1] for line in lines)):
                window.addstr(text, curses.color_pair(INKS.get(text[:1], INKS[""])[0]))
        window.timeout(-1 if delay is None else int(1000 * delay))
        key = "q" if moment.outcome else " "
        with contextlib.suppress(curses.error):  # no key came while the delay passed
            key = window.getkey()
            delay = delay if key == "KEY_RESIZE" else None
        n = int(typed or 0) if key == "\n" else 0
        typed = (typed + key)[-2:] if key.isdecimal() else ""
        if key == "KEY_LEFT":
            at = max(at - 1, 0)
        elif not moment.outcome and (key in ("KEY_RIGHT", " ") or 0 < n <= len(moment.item[1])):
            choices[at:] = [n - 1] if n else choices[at:] or [moment.choice]
            at += 1


def animation(seen, seconds):
    """Return the bytes of a GIF of the moments of an episode."""
    from PIL import Image, ImageDraw, ImageFont
    # matplotlib brings a font of one width. Do not import it, whatever its settings are.
    data = os.path.join(os.path.dirname(find_spec("matplotlib").origin), "mpl-data/fonts/ttf")
    font = ImageFont.truetype(os.path.join(data, "DejaVuSansMono.ttf"), 14.95)
    screens, images = [screen(moment, 90, 99) for moment in seen], []
    for lines in screens:
        image = Image.new("RGB", (834, max(map(len, screens)) * 17 + 7), "#0d1117")
        pen = ImageDraw.Draw(image)
        for row, line in enumerate(lines):
            x = 12
            for text in INKED.split(line):
                solid, ink = re.sub("[░▒]", "█", text), INKS.get(text[:1], INKS[""])[1]
                pen.text((x, 12 + 17 * row), solid, ink, font)
                x += 9 * len(text)
        # With one palette for all, a frame holds no more than what has changed.
        images.append(image.quantize(16, 2, palette=images[0] if images else None, dither=0))
    images[0].save(data := io.BytesIO(), "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=int(1000 * seconds))
    return data.getvalue()

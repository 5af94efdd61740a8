"""What one sees: an episode at the keys, as plain text and as a GIF; curves, comparisons, logs.

A terminal is a real one (a pty), in a process forked from this one.
"""
import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import envs
import twosome
from engine import command, runs, trainer, watch, worlds

ROOT = os.path.dirname(os.path.abspath(twosome.__file__))
TINY = "--steps 192 --num-envs 2 --rollout-steps 32 --episodes 4 --checkpoint-every 1".split()
LAKE = '''
class Lake:
    """Go right twice. Its render() is told by `mode`."""

    def __init__(self, mode="text"):
        self.mode, self.x = mode, 0

    def reset(self, seed=None):
        self.x = self.steps = 0
        return self.tell()

    def tell(self):
        prompt = "You are on ice.\\n\\x1b[2JRow:  .@. \\u202e\\nYou should"
        return self.x, {"prompt": prompt, "actions": ["go left", "go right\\x07"]}

    def step(self, action):
        if self.mode == "breaks":
            raise RuntimeError("the ice\\x1b[31m\\nbreaks")
        self.x, self.steps = max(0, self.x + 2 * action - 1), self.steps + 1
        late = self.steps == 20 and self.mode != "endless"
        return self.tell()[0], float(self.x == 2), self.x == 2, late, self.tell()[1]

    def render(self):
        picture = "\\x1b[41m" + "." * self.x + "@\\x1b[0m\\n\\x07" + "-" * 300
        return print(picture) if self.mode == "prints" else picture
'''


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One thread, no colours of whoever runs the tests, and 80 columns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs that differ in their seed, and one of another setting."""
    folder = tmp_path_factory.mktemp("watch")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for name, flags in (("one", ()), ("two", ("--seed", "2")), ("other", ("--norm", "sum"))):
            assert twosome.main([*TINY, *flags, "--out", str(folder / name)]) == 0
    return SimpleNamespace(folder=folder, one=str(folder / "one"), two=str(folder / "two"),
                           other=str(folder / "other"), printed=printed.getvalue())


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, which a test may spoil."""
    return shutil.copytree(finished.one, tmp_path / "run")


@pytest.fixture
def lake(tmp_path):
    """The name of a world of one's own."""
    (tmp_path / "lake.py").write_text(LAKE)
    return f"{tmp_path / 'lake.py'}:Lake"


class Uniform:
    """An agent without an LLM: every phrase is as probable as the others."""

    def describe(self, obs, info):
        return twosome.observation_text(info)

    def log_probs(self, items):
        return [torch.full((len(phrases),), -float(np.log(len(phrases)))) for _, phrases in items]


def judge(item):
    """Value the number of phrases, and prefer the last one."""
    chances = torch.full((len(item[1]),), 0.1)
    chances[-1] = 1.0
    return float(len(item[1])), {"trained": (chances / chances.sum()).log(),
                                 "untrained": Uniform().log_probs([item])[0]}


def moments(task="tomato-salad", greedy=True, **options):
    """Return the generator of an episode's moments, played by `judge`."""
    (env, task), = command.tasks_named(None, task)
    config = command.Config(env=env, task=task, gamma=envs.make(env, task=task).gamma)
    return watch.episode(config, SimpleNamespace(greedy=greedy, folder="x"), Uniform(),
                         lambda: envs.make(env, task=task, **options), judge)


def play(task, *actions, **options):
    """Return the moment after these actions (names) of an episode, and its environment's name."""
    source = moments(task, **options)
    moment = next(source)
    for action in actions:
        moment = source.send(moment.item[1].index(action))
    return moment


# -----------------------------------------------------------------------------
# Drawings and screens.


def kitchen(*names):
    """Return the drawing of the kitchen with three foods after these actions."""
    env = envs.make("overcooked", task="tomato-lettuce-salad")
    env.reset()
    for name in names:
        env.step(env.action_names.index(name))
    return watch.drawing(env)


def test_a_kitchen_is_drawn_in_letters():
    assert kitchen() == ["░░░░░" * 5 + " •T  ░░░░░", " [ ]                  @        •L  ",
                         " [ ]                           •O  ", " <D>" + " " * 26 + "░░░░░",
                         "░░░░░" + " " * 25 + "░░░░░", "░░░░░" + " " * 25 + "░░░░░",
                         "░░░░░" * 5 + " •B  ░░░░░"]


def test_what_is_chopped_held_or_in_the_bowl_has_its_letters():
    way = ["get tomato", "go to board 1", "chop"]
    assert "@T" in kitchen(*way[:1])[1]
    assert kitchen(*way[:2])[1].startswith(" [T]   @")
    assert kitchen(*way)[1].startswith(" [t]")
    assert "@t" in kitchen(*way, "get tomato")[1]
    assert "@Bt" in "".join(kitchen(*way, "get tomato", "get bowl"))
    assert "[Bt]" in kitchen(*way, "get tomato", "get bowl", "go to board 1")[1]


def home(task, *names):
    """Return the drawing of the home after these actions."""
    env = envs.make("virtualhome", task=task)
    env.reset()
    for name in names:
        env.step(env.action_names.index(name))
    return watch.drawing(env)


def test_a_home_is_drawn_room_by_room():
    assert home("food-preparation")[0] == "░ kitchen      @  •pancake  •microwave"
    lines = home("food-preparation", "walk to the microwave", "open the microwave")
    assert lines[0].endswith("@  •pancake  •microwave (near, open)")
    lines = home("food-preparation", "walk to the pancake", "grab the pancake",
                 "walk to the microwave", "open the microwave", "put the pancake in the microwave")
    assert lines[:2] == ["░ kitchen      @  •pancake (near, at microwave)",
                         "               •microwave (near, open)"]
    lines = home("entertainment", "walk to the chips", "grab the chips", "walk to the living room",
                 "walk to the TV", "turn on the TV", "walk to the sofa", "sit on the sofa")
    assert "@" not in lines[0] and "•milk" in lines[0] and lines[2] == "░ bedroom"
    assert lines[3:] == ["░ living room  @sits  •chips (held)  •TV (on)  •sofa",
                         "               (near)  •coffee table"]


def test_a_screen_tells_prompt_phrases_bars_value_reward_and_return():
    moment = play("tomato-salad", "pick up the tomato")
    text = "\n".join(watch.screen(moment, 80, 99))
    assert moment.head == "step 2, return -0.002 of 0.921, reward -0.002, tomato-salad"
    assert " ".join(text.split()).count(moment.item[0]) == 1 and "value 5.000" in text
    for k, phrase in enumerate(moment.item[1], 1):
        line = next(line for line in text.split("\n") if f"{k} {phrase}" in line)
        assert line.startswith(">") == (k == 5)
        assert re.findall(r"(█*) +(\d+)% (▒*) +(\d+)%", line) == [
            ("█████" if k == 5 else "", "71" if k == 5 else "7", "▒", "20")]


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("task", ["tomato-lettuce-onion-salad", "entertainment", "laundry"])
def test_a_screen_fits_its_width(task, width):
    for moment in moments(task):
        assert max(map(len, watch.screen(moment, width, 99))) <= width


def test_a_low_window_shows_all_17_phrases_and_less_of_the_picture():
    moment = play("entertainment", mask=False)
    assert len(moment.item[1]) == 17
    lines = watch.screen(moment, 60, 24, "foot")
    assert len(lines) == 24 and lines[0] == moment.head and lines[-1] == "foot"
    assert all(any(f"{k + 1:2} {phrase}"[:30] in line for line in lines)
               for k, phrase in enumerate(moment.item[1]))
    for height in range(1, 40):
        for width in (1, 20, 59):
            assert len(watch.screen(moment, width, height)) <= height


# -----------------------------------------------------------------------------
# An episode.


def test_an_episode_is_always_the_same_and_adds_up():
    one, two = ([*moments("entertainment", greedy=False)] for _ in range(2))
    assert [moment.head for moment in one] == [moment.head for moment in two]
    assert len(one) == 51 and one[-1].outcome == "not solved" and not one[-2].outcome
    best = play("tomato-salad", "pick up the tomato", "put the tomato on the first board",
                "chop the tomato", "pick up the tomato", "put the tomato in the bowl",
                "serve the salad")
    assert best.outcome == "solved" and "return 0.921 of 0.921, reward " in best.head


def test_greedy_takes_the_most_probable_phrase():
    first = next(moments())
    assert first.choice == int(first.policies["trained"].argmax()) == 4
    chosen = {moment.choice for moment in moments(greedy=False) if not moment.outcome}
    assert len(chosen) > 1


def test_another_choice_is_another_future():
    source = moments()
    assert next(source).choice == 4
    moment = source.send(0)
    assert "@T" in "".join(moment.picture)
    with pytest.raises(FloatingPointError):
        policies = {"trained": torch.full((5,), torch.nan)}
        next(watch.episode(command.Config(task="x"), SimpleNamespace(greedy=True), Uniform(),
                           lambda: envs.make("overcooked"), lambda item: (0.0, policies)))


def test_an_episode_without_an_end_is_shown_for_200_actions(lake):
    config = command.Config(env=lake, task="Lake")
    still = SimpleNamespace(greedy=True)
    endless = worlds.make_world(lake, {"mode": "endless"})
    source = watch.episode(config, still, Uniform(), endless,
                           lambda item: (0.0, {"untrained": torch.tensor([0.0, -9.0])}))
    assert sum(not moment.outcome for moment in source) == 201


def test_the_end_of_the_200th_action_is_shown():
    class Long:
        def reset(self, seed=None):
            self.steps = 0
            return None, {"prompt": "To", "actions": ["go"]}

        def step(self, action):
            self.steps += 1
            return None, 0.0, False, self.steps == 200, {"prompt": "To", "actions": ["go"]}

    *_, last = watch.episode(command.Config(), SimpleNamespace(greedy=True), Uniform(),
                             lambda: worlds.World(Long()),
                             lambda item: (0.0, {"untrained": torch.tensor([0.0])}))
    assert last.outcome == "not solved"


def test_tensorboards_log_is_appended_to_but_never_through_a_link_or_a_pipe(tmp_path):
    pytest.importorskip("tensorboard")
    log, outside = tmp_path / "events.out.tfevents.0", tmp_path / "outside"
    run = SimpleNamespace(path=tmp_path.joinpath, log=lambda row: None, seconds=1.0,
                          cpu_seconds=1.0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    report = SimpleNamespace(spend=lambda: None, run=run,
                             trainer=SimpleNamespace(rank=0, policy_optimizer=optimizer))

    def write():
        watch.Report.log(report, {"update": 0, "steps": 0})

    write()
    once = log.read_bytes()
    write()
    assert log.read_bytes()[:len(once)] == once and log.stat().st_size == 2 * len(once)
    log.unlink()
    outside.write_text("precious")
    log.symlink_to(outside)
    with pytest.raises(OSError):
        write()
    assert outside.read_text() == "precious"
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(OSError):
        write()


# -----------------------------------------------------------------------------
# Plain text.


def test_piped_it_is_plain_text(finished, capfd):
    assert twosome.main(["--watch", finished.one]) == 0
    text = capfd.readouterr().out
    assert text.isascii() and "\x1b" not in text and max(map(len, text.split("\n"))) <= 80
    assert text.startswith("step 0, return 0.000 of 0.921, reward 0.000, tomato-salad\n\n#####")
    assert "Your next step is to" in text
    assert re.search(r"value -?\d\.\d+ +trained +untrained", text)
    assert re.search(r"The episode is over: (not )?solved\.", text.split("\n\n")[-2])


def test_without_a_run_the_untrained_llm_acts(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert twosome.main("--watch --task cheese --greedy".split()) == 0
    text = capfd.readouterr().out
    assert "*cheese  *microwave" in text and " untrained" in text and " trained" not in text
    assert max(map(len, text.split("\n"))) <= 60


@pytest.mark.parametrize("mode", ["text", "prints"])
def test_a_world_of_ones_own_shows_what_it_renders(lake, mode, capfd):
    assert twosome.main(["--watch", "--env", lake, "--env-args", f"mode={mode}"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("step 0, return 0.000, reward 0.000, Lake\n\n@\n\\x07-----")
    assert "\\x1b[2JRow:  .@. \\u202e\nYou should\n" in text and "2 go right\\x07" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.parametrize(("flags", "code", "words"), [
    (["--env-args", "mode=breaks"], 2, "raised RuntimeError: the ice\\x1b[31m breaks"),
    (["--gif", "no/such/folder.gif"], 2, "not there"), (["--gif", "."], 2, "is a folder")])
def test_what_goes_wrong_is_one_line(lake, flags, code, words, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert twosome.main(["--watch", "--env", lake, *flags]) == code
    told = re.findall("^twosome.py: .*$", capfd.readouterr().err, re.MULTILINE)
    assert len(told) == 1 and words in told[0]


def test_a_folder_that_is_no_run_is_one_line(finished, run, capfd):
    os.remove(run / "metrics.csv")
    for flags in (["--watch", str(finished.folder)], ["--compare", finished.one, "nothing"],
                  ["--compare", str(run)]):
        assert twosome.main(flags) == 2
        assert capfd.readouterr().err.count("\n") == 1


# -----------------------------------------------------------------------------
# The terminal.


def at_terminal(flags, keys="", size=(30, 80), **environment):
    """Run the command at a terminal of its own, press keys. Returns (what it showed, code)."""
    pid, terminal = pty.fork()
    if not pid:
        code = 70
        with contextlib.suppress(BaseException):
            os.environ.update({"TERM": "xterm-256color", **environment})
            os.environ.pop("COLUMNS")
            signal.signal(signal.SIGWINCH, signal.SIG_DFL)  # pytest's readline has taken it
            sys.stdin, sys.stdout = open(0), open(1, "w")
            time.sleep(0.2)  # until the terminal has its size
            code = twosome.main(flags)
            sys.stdout.flush()
        os._exit(code)
    os.set_blocking(terminal, True)
    resize(terminal, *size)
    shown, keys, end = "", list(keys), time.monotonic() + 30
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.25)
        if ready:
            try:
                shown += os.read(terminal, 2**16).decode(errors="replace")
            except OSError:  # its other end is closed
                break
        elif keys and "q: quit" in shown:
            key = keys.pop(0)
            if isinstance(key, tuple):
                resize(terminal, *key)
            else:
                os.write(terminal, key.encode())
    os.close(terminal)
    return shown, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resize(terminal, rows, columns):
    termios.tcsetwinsize(terminal, (rows, columns))


def told(shown):
    """Return what was shown without the codes of a terminal."""
    return re.sub(r"\x1b(\[[\d;?]*[a-zA-Z]|[()][0-9A-B]|[=>])", "", shown)


def test_keys_step_go_back_and_take_another_action(finished):
    shown, code = at_terminal(["--watch", finished.one, "--greedy"],
                              [" ", "\x1bOD", "5", "\r", "\x1b[D", "9", "\r", "q"])
    assert code == 0 and "\x1b[?1049h" in shown and shown.count("\x1b[?1049l") == 1
    heads = re.findall(r"step (\d+), return", told(shown))
    # A step, back again, 5 is typed, it chops nothing for a step, and there is no action 9.
    assert heads[0] == "0" and int(heads[1]) > 1 and heads[2:5] == ["0", "0", "1"]
    assert "q: quit 5" in told(shown) and "\x1b[36m>" in shown and "█" in shown


def test_with_a_delay_it_plays_by_itself(finished):
    shown, code = at_terminal(["--watch", finished.one, "--delay", "0.01"])
    assert code == 0 and "The episode is over" in told(shown)


def test_a_window_may_be_resized(finished):
    shown, code = at_terminal(["--watch", finished.one], [(12, 40), (3, 9), (40, 140), "q"])
    assert code == 0 and told(shown).count("step 0, return") >= 3


@pytest.mark.parametrize("environment", [
    {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"TERM": "no-such-terminal"}])
def test_where_colours_are_not_wanted_it_is_plain_text(finished, environment):
    shown, code = at_terminal(["--watch", finished.one, "--greedy"], **environment)
    assert code == 0 and "\x1b" not in shown and "The episode is over" in shown


def test_the_terminal_is_as_before_when_a_world_breaks_or_the_keys_interrupt(lake, finished):
    shown, code = at_terminal(["--watch", "--env", lake, "--env-args", "mode=breaks"], " ")
    assert code == 2 and "\x1b[?1049l" in shown.split("twosome.py: ")[0]
    assert shown.split("twosome.py: ")[1].startswith("Lake.step(")
    shown, code = at_terminal(["--watch", finished.one], "\x03")
    assert code == 130 and "\x1b[?1049l" in shown and "Traceback" not in shown


# -----------------------------------------------------------------------------
# The animated picture.


def test_a_gif_has_a_frame_for_each_moment(finished, tmp_path, capfd):
    path = tmp_path / "it.gif"
    assert twosome.main(["--watch", finished.one]) == 0
    steps = re.findall(r"^step (\d+), return", capfd.readouterr().out, re.MULTILINE)
    assert twosome.main(["--watch", finished.one, "--gif", str(path), "--delay", "0.5"]) == 0
    assert capfd.readouterr().out == f"-> {path}\n"
    with Image.open(path) as picture:
        times = []
        for n in range(picture.n_frames):
            picture.seek(n)
            times.append(picture.info["duration"])
        # Moments that look alike may be one frame, which then stays longer.
        assert sum(times) == 500 * len(steps) and picture.info["loop"] == 0
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert picture.size[0] == 834 and len(colours) > 3
    assert path.stat().st_size < 10**6


def test_a_long_episode_stays_under_a_megabyte(tmp_path):
    data = watch.animation(moments("entertainment", greedy=False, mask=False), 1.0)
    assert len(data) < 10**6
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames > 10 and picture.size[1] > 17 * 24


# -----------------------------------------------------------------------------
# Curves.


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, real = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        drawn.append(figure)
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def lines_of(axes):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.lines}


def opened(folder):
    return SimpleNamespace(folder=str(folder), write=runs.Run.write.__get__(
        SimpleNamespace(path=lambda *names: os.path.join(folder, *names))))


def test_a_curve_shows_what_it_is_to_be_compared_with(run, figures):
    os.remove(run / "curve.png")
    watch.draw_curve(opened(run))
    with Image.open(run / "curve.png") as picture:
        assert picture.format == "PNG"
    figure, = figures
    _, table, _ = watch.read_run(str(run))
    assert figure.get_suptitle() == "tomato-salad, pocket_lm, norm word, seed 1"
    first, second, legend, *others = figure.axes
    names = [axes.get_ylabel().split(",")[0] for axes in (first, second, *others)]
    assert names == ["return", "success rate", "entropy", "KL of an update", "explained variance"]
    assert all(axes.get_xlabel() == "macro-actions" for axes in (first, second, *others))
    lines = lines_of(first)
    assert lines["optimum"][0] == pytest.approx(0.9205, abs=1e-4)
    assert lines["random"][0] == pytest.approx(-0.09, abs=0.05)
    assert lines["untrained LLM"][0] == table["return"][0]
    assert np.array_equal(lines["policy, last 100 episodes"], table["return"][1:], equal_nan=True)
    assert lines_of(second)["random"][0] == pytest.approx(0.43, abs=0.08)
    # The legend covers no line: it has a panel without any.
    assert not legend.lines and not legend.axison and first.get_legend() is None
    assert len(legend.get_legend().get_texts()) == 4


def test_a_picture_that_fails_never_fails_the_run(run, capfd, monkeypatch):
    for error in (ValueError("\x1b[31mred"), KeyboardInterrupt(), MemoryError(),
                  OSError(28, "full")):
        def broken(*arguments, error=error):
            raise error
        monkeypatch.setattr(watch, "draw", broken)
        watch.draw_curve(opened(run))
        told = capfd.readouterr().err
        assert told.startswith("no curve.png") and told.count("\n") == 1 and "\x1b" not in told
    (run / "baseline.json").write_text('{"random": 1}')
    watch.draw_curve(opened(run))
    assert "are empty or damaged" in capfd.readouterr().err


def test_resume_draws_the_curve_that_is_missing(run, capfd):
    os.remove(run / "curve.png")
    assert twosome.main(["--resume", str(run)]) == 0
    assert (run / "curve.png").exists() and "is finished" in capfd.readouterr().out


def test_the_settings_of_matplotlib_fail_nothing(run, tmp_path):
    """In a process that has not imported it: a broken settings file, and a notebook's backend."""
    os.remove(run / "curve.png")
    (tmp_path / "matplotlibrc").write_bytes(b"lines.linewidth: banana\n\xff\xfe")
    program = """if True:
        import os, sys
        from engine import runs, watch
        folder = runs.Run(sys.argv[1])
        os.environ["MATPLOTLIBRC"] = sys.argv[2]
        watch.draw_curve(folder)
        assert not os.path.exists(folder.path("curve.png"))
        del os.environ["MATPLOTLIBRC"]
        for name in [name for name in sys.modules if name.startswith("matplotlib")]:
            del sys.modules[name]  # half imported
        os.environ["MPLBACKEND"] = "module://no.such.inline"
        watch.draw_curve(folder)"""
    arguments = [sys.executable, "-c", program, str(run), str(tmp_path / "matplotlibrc")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (run / "curve.png").exists()
    assert done.stderr.count("no curve.png") == 1 and "Traceback" not in done.stderr


def test_a_run_that_has_only_begun_can_be_drawn(run, figures):
    text = (run / "metrics.csv").read_text().split("\n")
    (run / "metrics.csv").write_text("\n".join(text[:2]) + "\n")
    watch.draw_curve(opened(run))
    assert len(figures) == 1 and (run / "curve.png").exists()
    for broken in ("", text[0] + "\n", text[0] + "\n1,2\n", text[0] + "\n" + "x," * 14 + "1\n"):
        (run / "metrics.csv").write_text(broken)
        with pytest.raises(runs.RunError, match="empty or damaged"):
            watch.read_run(str(run))


def test_compare_prints_a_table_and_draws_seeds_as_a_band(finished, figures, tmp_path, capfd):
    path = tmp_path / "all.png"
    flags = ["--compare", finished.one, finished.two, finished.other, "--out", str(path)]
    assert twosome.main(flags) == 0
    header, seeds, other, arrow = capfd.readouterr().out.splitlines()
    assert header.split() == "runs untrained last 100 episodes (low to high) success".split()
    tables = [watch.read_run(folder)[1] for folder in (finished.one, finished.two)]
    last = [table["return"][-1] for table in tables]
    assert seeds.split()[1:4] == ["2", f"{np.mean([table['return'][0] for table in tables]):.4f}",
                                  f"{np.mean(last):.4f}"]
    assert f"({min(last):7.4f} to {max(last):7.4f})" in seeds and other.split()[1] == "1"
    assert seeds.split()[0] == finished.one[-34:] and arrow == f"-> {path}"
    first, *_ = figures[0].axes
    band, thin = first.collections
    assert np.ptp(band.get_paths()[0].vertices[:, 1]) > 0 and path.stat().st_size > 10**4
    labels = [text.get_text() for text in figures[0].axes[2].get_legend().get_texts()]
    assert labels == ["random", "optimum", "untrained LLM", finished.one[-34:],
                      finished.other[-34:]]


def test_compare_says_in_one_line_what_it_cannot_write_or_draw(finished, monkeypatch, capfd):
    assert twosome.main(["--compare", finished.one, "--out", "/no/such/folder/x.png"]) == 2
    assert "not there" in capfd.readouterr().err

    def broken(*arguments):
        raise RuntimeError("latex could not be found")
    monkeypatch.setattr(watch, "draw", broken)
    assert twosome.main(["--compare", finished.one]) == 2
    assert capfd.readouterr().err == ("twosome.py: no picture (RuntimeError: latex could not be"
                                      " found)\n")


# -----------------------------------------------------------------------------
# The report.


def test_a_random_policy_is_measured_as_published():
    items, means = watch.random_walk(envs.make("overcooked"), Uniform(), 0.99)
    assert means["return"] == pytest.approx(-0.09, abs=0.05)
    assert means["success"] == pytest.approx(0.43, abs=0.08) and 10 < len(items) < 100


def test_a_world_in_which_no_episode_ends_has_no_mean(lake):
    walked = worlds.make_world(lake)()
    walked.step = lambda action: (0, 0.0, False, False, walked.reset()[1])
    items, means = watch.random_walk(walked, Uniform(), 0.9)
    assert len(items) == 1 and all(np.isnan(value) for value in means.values())


def test_the_last_lines_say_what_to_do_next(finished, lake, tmp_path, capfd):
    folder = finished.one
    assert (f"next: python twosome.py --watch {folder}\n      python twosome.py --eval {folder}"
            f" --task all\n      python twosome.py --compare {folder}\n") in finished.printed
    own = str(tmp_path / "own")
    assert twosome.main([*TINY, "--env", lake, "--out", own]) == 0
    assert (f"next: python twosome.py --watch {own} --env {lake}\n"
            f"      python twosome.py --eval {own} --env {lake}\n") in capfd.readouterr().out
    assert twosome.main(["--watch", own, "--env", lake]) == 0
    with open(os.path.join(own, "baseline.json")) as file:
        assert json.load(file)["optimum"]["return"] is None
    assert os.path.exists(os.path.join(own, "curve.png"))


def test_the_bar_shows_what_is_learnt_and_the_time_left(tmp_path, capfd):
    assert twosome.main([*TINY, "--out", str(tmp_path / "run")]) == 0
    last = capfd.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
    assert re.match(r"update 3 of 3, return -?\d\.\d{3} of 0\.921, success +\d+%, entropy"
                    r" \d\.\d\d, 00:00 left \|", last)


@pytest.mark.parametrize("flags, prompts", [([], 21), (["--gradient-accumulation", "4"], 6),
                                            (["--minibatch", "8"], 8)])
def test_memory_counts_the_prompts_that_differ(flags, prompts, tmp_path, capfd):
    """The tomato salad has 21 of them: a minibatch of 64 samples holds many equal ones."""
    assert twosome.main([*TINY, *flags, "--out", str(tmp_path / "run")]) == 0
    assert f" MiB for {prompts} prompts (" in capfd.readouterr().out


def test_the_bar_has_no_mean_before_an_episode_has_ended(tmp_path, capfd):
    flags = ["--steps", "4", "--num-envs", "2", "--rollout-steps", "2", "--episodes", "1"]
    assert twosome.main([*flags, "--out", str(tmp_path / "run")]) == 0
    told = capfd.readouterr().err
    assert "return - of 0.921, success -%, entropy" in told and "nan" not in told


def test_the_curve_is_drawn_at_checkpoints_and_when_a_signal_stops_the_run(
        tmp_path, monkeypatch, capfd):
    """And not at every one of them, where they follow each other fast."""
    drawn = []
    monkeypatch.setattr(watch, "draw_curve", lambda run: drawn.append(run.seconds))
    assert twosome.main([*TINY, "--out", str(tmp_path / "run")]) == 0
    assert len(drawn) == 1  # at the end alone: a tiny run's checkpoints follow each other fast
    spend = watch.Report.spend

    def slow(self):
        spend(self)
        self.run.seconds += 40
    monkeypatch.setattr(watch.Report, "spend", slow)
    drawn.clear()
    assert twosome.main([*TINY, "--out", str(tmp_path / "slow")]) == 0
    assert len(drawn) > 1 and drawn[0] < drawn[-1]
    monkeypatch.setattr(watch.Report, "spend", spend)
    drawn.clear()
    iterate = trainer.Trainer.iterate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return iterate(self)
    monkeypatch.setattr(trainer.Trainer, "iterate", interrupted)
    assert twosome.main([*TINY, "--out", str(tmp_path / "other")]) == 130
    assert len(drawn) == 1 and "stopped after update 1 of 3; go on" in capfd.readouterr().out


def test_tensorboard_reads_the_logs(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(finished.one)
    log.Reload()
    assert {"charts/episodic_return", "charts/learning_rate", "charts/SPS", "losses/policy_loss",
            "losses/value_loss", "losses/entropy", "losses/approx_kl",
            "losses/explained_variance"} <= set(log.Tags()["scalars"])
    _, table, _ = watch.read_run(finished.one)
    events = log.Scalars("charts/episodic_return")
    assert [event.step for event in events] == table["steps"].tolist()
    values = [event.value for event in events]
    assert np.allclose(values, table["return"], atol=1e-6, equal_nan=True)


def test_without_tensorboard_nothing_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert twosome.main([*TINY, "--out", str(tmp_path / "run")]) == 0
    assert not [name for name in os.listdir(tmp_path / "run") if "events" in name]
    assert "ImportError" not in "".join(capfd.readouterr())

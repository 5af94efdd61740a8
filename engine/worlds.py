"""Other people's worlds in our shape, and ours in other people's. Without it: our own two alone.

    make_world("FILE.py:CLASS", {"size": 4})   make_env, as --env and --env-args name it
    World(world)                               any object with reset and step, in our contract
    World(env, prompt)                         a Gymnasium environment, told by your function
    TextEnv(env, render)                       an environment of ours for other people's agents

Our contract is Gymnasium's reset and step with two texts in info: "prompt", and "actions", one
phrase for each admissible action. World accepts two shapes and turns them into it.

  - Gymnasium's: reset(seed=None) -> (obs, info); step(action) -> (obs, reward, terminated,
    truncated, info) or, as old gym had it, (obs, reward, done, info).
  - TextWorld's, which ALFWorld and TALES share: reset() -> (text, infos); step(command) ->
    (text, score, done, infos). infos["admissible_commands"] lists the commands, and the score is
    a running total. The prompt becomes the text and a cue for the next step, the phrases become
    the commands, and rewards are what the score gains. Where infos carries "prompt" or "actions"
    as well, these are told instead, and the world is still answered with its command.

World adapts shapes. The texts are checked where they are read, in twosome.observation_text.
"""
import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback

from prompts import CUE

LONGEST = 2000  # our choice: characters of a world's text in a prompt; the newest are kept
ENDLESS = 10_000  # our choice: steps of an episode after which it is taken to have no end
OURS = (__file__, importlib.__file__, "<frozen importlib")  # this file and Python's importer


class WorldError(ValueError):
    """Somebody's world cannot be used. The message is one line that says what is wrong.

    If the world's own code raised, `traceback` is the printable traceback of that code, which a
    command prints after the line, and __cause__ is what it raised. Otherwise it is "".
    """

    traceback = ""


def call(what, function, /, *args, **kwargs):
    """Call somebody's code. What it raises becomes a WorldError that says where."""
    try:
        return function(*args, **kwargs)
    except WorldError:
        raise
    except (Exception, SystemExit) as error:
        # Leave out our own frames and the importer's: the traceback begins in their code.
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename.startswith(OURS):
            frames = frames.tb_next
        line = " ".join(f"{what} raised {type(error).__name__}: {error}".split())[:400]
        wrong = WorldError(line)
        if frames:
            last = traceback.extract_tb(frames)[-1]
            wrong = WorldError(f"{line} (line {last.lineno} of {last.filename})")
            wrong.traceback = "".join(traceback.format_exception(type(error), error, frames))
        raise wrong from error


def kind(value):
    """Name a value's type for a message."""
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, tuple | list) else "")


# -----------------------------------------------------------------------------
# From the command line.

def read_arguments(text, taken=()):
    """Return the options that --env-args gives to a world, "key=value,key=value", as a dict.

    A comma belongs to the value unless another key follows it. What is no Python literal is a
    text. The keys in `taken` have flags of their own.
    """
    found = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text else []:
        name, equals, value = map(str.strip, part.partition("="))
        if not equals or name in found or name in taken:
            raise WorldError(f"--env-args has {part[:40]!r}; write key=value,key=value once each"
                             ", and none that --env, --task or --gamma tell")
        found[name] = value
        with contextlib.suppress(Exception):
            found[name] = ast.literal_eval(value)
    return found


def make_world(spec, arguments=None):
    """Import a class, or a function that makes a world. Returns make_env() -> World.

    spec: "PACKAGE.MODULE:CLASS", also from the current folder, or "FILE.py:CLASS".
    arguments: the dict of keywords that the class is called with. Raises WorldError.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise WorldError(f"--env {spec!r} is neither PACKAGE.MODULE:CLASS nor FILE.py:CLASS")
    maker = getattr(import_source(source), name, None)
    if not callable(maker):
        raise WorldError(f"--env {spec!r}: {source} has no class or function {name}")

    def make_env():
        made = call(f"making {name}", maker, **(arguments or {}))
        world = made if isinstance(made, World) else World(made)
        world.task = name
        return world

    return make_env


def import_source(source):
    """Import a module by the path of its file or by its dotted name."""
    is_file = source.endswith(".py")
    if is_file and not os.path.isfile(source):
        raise WorldError(f"--env: there is no file {source!r}")
    # Look in their folder last, so that no file of theirs stands in for a module of ours.
    folder = os.path.dirname(os.path.abspath(source)) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    if not is_file:
        return call(f"importing {source}", importlib.import_module, source)
    name = "world_" + os.path.basename(source)[:-3]
    described = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # dataclasses look here for the module that they stand in
    call(f"importing {source}", described.loader.exec_module, module)
    return module


# -----------------------------------------------------------------------------
# Their worlds in our shape.

class World:
    """A world in our contract, whichever of the shapes above it has. Raises WorldError.

    world: an object with reset and step. In TextWorld's shape its reset needs no seed; any other
    must take one, so that a run can be repeated. A world may say running_total = True or False:
    whether the second value of its 4-tuples is the score so far. Without it, that is so in
    TextWorld's shape alone.

    prompt: None, or your prompt(obs, info) -> (prompt, phrases), which tells any world in words:
    the text, and a phrase for each action in the order of their numbers. If only some are
    admissible, put their numbers into info["admissible"] there, and return the phrases of those.

    An episode succeeded if info["success"] or info["won"] says so; where a world gives neither,
    ppo.py counts a last reward above 0. A 4-tuple's `done` is a time limit if
    info["TimeLimit.truncated"] says so (old gym), or if infos tells both "won" and "lost" and
    neither holds (our choice). There is no state_dict: a resumed run begins its episodes anew.
    """

    best_return = None  # nobody has computed it

    def __init__(self, world, prompt=None):
        """Take a world that has been made."""
        self.world, self.prompt = world, prompt
        self.task = type(getattr(world, "unwrapped", world)).__name__
        for method in ("reset", "step"):
            if not callable(getattr(world, method, None)):
                raise WorldError(f"{self.task} has no {method}; a world has reset and step")

    def reset(self, seed=None):
        """Begin an episode. Returns (obs, info)."""
        # NumPy takes seeds below 2 ** 32 alone.
        options = {"seed": seed and seed % 2**32} if takes_seed(self.world.reset) else {}
        obs, info = self.checked("reset", call(f"{self.task}.reset", self.world.reset, **options))
        info = self.adapt(obs, info)
        commands = info.get("admissible_commands") is not None
        if not options and not commands:
            raise WorldError(f"{self.task}.reset takes no seed: write def reset(self, seed=None)")
        self.is_total = getattr(self.world, "running_total", commands)
        self.score, self.steps = 0.0, 0
        return obs, info

    def step(self, action):
        """Take an action: one of info["admissible"] if there are any, else a phrase's number.

        A reward is finite in float32. In info, "duration", if there is one, is above 0, and
        "success" is a bool, or from 0 to 1.
        Returns (obs, reward, terminated, truncated, info).
        """
        answer = call(f"{self.task}.step({action!r})", self.world.step, action)
        obs, reward, *ends, info = self.checked("step", answer)
        lasted, solved = info.get("duration", 1), info.get("success", False)
        try:
            reward, terminated, truncated = float(reward), bool(ends[0]), bool(ends[-1])
            if not (abs(reward) < 1e38 and 0 < float(lasted) < 1e9 and 0 <= float(solved) <= 1):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise WorldError(f"{self.task}.step gave reward {reward!r:.40}, end {ends[0]!r:.40},"
                             f" duration {lasted!r:.40} and success {solved!r:.40}; give a number,"
                             " a bool, a number above 0, a bool") from None
        info = {**info, **{key: float(info[key]) for key in ("duration", "success") if key in info}}
        self.steps += 1
        if self.steps > ENDLESS:
            raise WorldError(f"an episode of {self.task} goes on for ever; give it a time limit")
        if len(ends) == 1:
            truncated = terminated and is_time_limit(info)
            terminated = terminated and not truncated
            if self.is_total:
                reward, self.score = reward - self.score, reward
        return obs, reward, terminated, truncated, self.adapt(obs, info, terminated)

    def checked(self, method, answer):
        """Return what the world answered, once its shape is right."""
        if not isinstance(answer, tuple | list) or len(answer) not in SIZES[method]:
            raise WorldError(f"{self.task}.{method} gave a {kind(answer)}, not {SHAPES[method]}")
        if not isinstance(answer[-1], dict):
            raise WorldError(f"{self.task}.{method} gave a {kind(answer[-1])} as info, no dict")
        return answer

    def adapt(self, obs, info, over=False):
        """Return info with the texts of our contract; nobody reads them once the task is over."""
        info = dict(info)
        if "won" in info:
            info.setdefault("success", bool(info["won"]))
        if over:
            return info
        if self.prompt:
            texts = call(f"the prompt of {self.task}", self.prompt, obs, info)
            if not isinstance(texts, tuple | list) or len(texts) != 2:
                raise WorldError(f"the prompt of {self.task} gave a {kind(texts)}, not"
                                 " (prompt, phrases)")
            info["prompt"], info["actions"] = texts
        if info.get("admissible_commands") is not None:
            info["admissible"] = info["admissible_commands"]
            info.setdefault("actions", info["admissible"])
            if "prompt" not in info:
                info["prompt"] = self.cued(obs)
        # Our own two carry their "state" instead, which prompts.py tells.
        if "prompt" not in info and "state" not in info:
            raise WorldError(f'the info of {self.task} has no "prompt"; a world tells "prompt" and'
                             ' "actions", or a text and "admissible_commands"')
        return info

    def cued(self, text):
        """Turn an observation into a prompt: its words, at most LONGEST characters, and the cue.

        Pieces without a letter or a digit go as well: rulers, banners and a game's own ">".
        """
        if not isinstance(text, str):
            raise WorldError(f"the observation of {self.task} is a {kind(text)}, not a text; with"
                             ' "admissible_commands" in info it must be one')
        words = " ".join(word for word in text.split() if any(map(str.isalnum, word)))
        if len(words) > LONGEST:
            words = words[-LONGEST:].partition(" ")[2]
        return f"{words} {CUE}".strip()


SIZES = {"reset": (2,), "step": (4, 5)}
SHAPES = {"reset": "(obs, info)", "step": "(obs, reward, terminated, truncated, info)"}


def takes_seed(reset):
    """Tell whether a world's reset has an argument named seed, or takes any."""
    arguments = call("the signature of reset", inspect.signature, reset).parameters.values()
    return any(each.name == "seed" or each.kind is each.VAR_KEYWORD for each in arguments)


def is_time_limit(info):
    """Tell whether a 4-tuple's `done` only says that time is up; see World."""
    undecided = {"won", "lost"} <= info.keys() and not (info["won"] or info["lost"])
    return bool(info.get("TimeLimit.truncated", undecided))


# -----------------------------------------------------------------------------
# Our environments in other people's shape.

class TextEnv:
    """An environment of ours as GEM has it, texts in and texts out, for anybody's LLM agent.

    render: prompts.render. The text is the prompt and the admissible phrases, one a line, and a
    phrase is the answer; capitals, stray spaces and a full stop at its end do no harm. Any other
    answer changes nothing in the world: it costs no reward, gives the same text again and
    info["is_action_valid"] = False (our choice). Every answer counts towards max_steps, after
    which the episode is truncated, so that an agent that only babbles comes to an end.
    """

    def __init__(self, env, render, max_steps=200):
        """Take an environment of ours that has been made."""
        self.env, self.render, self.max_steps = env, render, max_steps

    def reset(self, seed=None):
        """Begin an episode. Returns (text, info)."""
        self.answers = 0
        return self.tell(self.env.reset(seed=seed)[1])

    def step(self, text):
        """Answer with a phrase. Returns (text, reward, terminated, truncated, info)."""
        self.answers += 1
        late = self.answers >= self.max_steps
        action = self.actions.get(plain(text))
        if action is None:
            return self.text, 0.0, False, late, {**self.info, "is_action_valid": False}
        _, reward, terminated, truncated, info = self.env.step(action)
        text, info = self.tell(info)
        return text, reward, terminated, truncated or late, info

    def tell(self, info):
        """Put a state into words and remember which phrase means which action."""
        prompt, phrases = self.render(info["state"])
        admissible = info.get("admissible") or range(len(phrases))
        self.actions = {plain(phrases[k]): k for k in reversed(admissible)}
        choices = [phrases[k] for k in admissible]
        self.text = "\n- ".join([f"{prompt} do one of these:", *choices])
        self.info = {**info, "is_action_valid": True}
        return self.text, self.info


def plain(text):
    """Reduce an answer to what has to agree."""
    return " ".join(text.lower().split()).rstrip(".")

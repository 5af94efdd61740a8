"""A quest of TextWorld's own games for SmolLM2, and ten others that it has not played.

    python examples/textworld_quest.py --out runs/quest     # learn game 18; further flags go on
    python examples/textworld_quest.py --eval runs/quest    # games 1 to 10, untrained and trained
"""
import os
import re
import sys
import tempfile

import textworld.gym.envs
from textworld.challenges.tw_simple import simple

WANTED = "objective description inventory admissible_commands won lost score max_score".split()
IDLE = ("examine", "inventory", "look")  # not offered: they change nothing
ARTICLE = re.compile(r"^(?!go )\w+ |(?<= )(from|into|on|to|with) ")  # "open the", "to the"


class Quest:
    """The game of a seed, in TextWorld's shape; the score is a share of the best one."""

    def __init__(self, seed=18, max_steps=30):
        options = textworld.GameOptions()
        options.seeds = seed
        options.path = os.path.join(tempfile.gettempdir(), f"tw-simple-brief-{seed}.z8")
        if not os.path.exists(options.path):
            made = simple.make({"rewards": "dense", "goal": "brief", "test": False}, options)
            textworld.generator.compile_game(made, options)
        infos = textworld.EnvInfos(**dict.fromkeys(WANTED, True))
        self.game = textworld.gym.envs.TextworldGymEnv([options.path], infos, max_steps)

    def reset(self):
        return self.tell(self.game.reset()[1])

    def step(self, command):
        _, score, done, infos = self.game.step(command)
        text, infos = self.tell(infos)
        return text, score / infos["max_score"], done, infos

    def tell(self, infos):
        commands = [each for each in infos["admissible_commands"] if not each.startswith(IDLE)]
        phrases = [ARTICLE.sub(r"\g<0>the ", re.sub("^go ", "go to ", each)) for each in commands]
        room = infos["description"].split("\n\n")[0]
        # Without the score, a room would look as promising after its reward as before it.
        text = "{objective} Your score is {score} of {max_score}. {room} {inventory}"
        text = text.format(**infos, room=room)
        return text, {**infos, "admissible_commands": commands, "actions": phrases}


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import twosome
    world = ["--env", f"{os.path.abspath(__file__)}:Quest", "--episodes", "20"]
    if "--eval" not in sys.argv:
        learn = ["--model=smollm2", "--steps=15360", "--num-envs=16", "--gamma=0.9",
                 "--policy-lr=0.002", "--base-kl=1", "--entropy=0.003", "--gradient-accumulation=4"]
        sys.exit(twosome.main([*world, *learn, *sys.argv[1:]]))
    sys.exit(max(twosome.main([*world, f"--task=game {n}", f"--env-args=seed={n}", *sys.argv[1:]])
                 for n in range(1, 11)))

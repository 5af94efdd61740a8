"""Gymnasium's FrozenLake told in words: a world that is not ours, learned in half a minute.

    python examples/frozen_lake.py
    python twosome.py --env examples/frozen_lake.py:frozen_lake --env-args slippery=True

If a world of yours pays only at its end and does not learn, look at the untrained success in
the first lines of a run. At less than one success a rollout, learning often stalls. The critic
hopes for more after a lucky one, is let down, and the policy learns to end no episode; then
nothing is left to learn from while the rates fall to zero. What helped here, best first (ten seeds
each; experiments/README.md has the table):

  - Phrases that name what lies there. The untrained pocket_lm reaches the goal in a tenth of its
    episodes, and every seed learned. With "move left" and "move up" it prefers one of them
    wherever it stands and reaches the goal in one of 500: three seeds never met a reward, five met
    it and lost it, two learned.
  - A small cost of each step (0.01): with the same poor phrases, all seeds came to 85 % and more.
"""
import sys
from pathlib import Path

import gymnasium

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.worlds import World

# Gymnasium's order of the actions: rows down, columns to the right, the side, and our verb.
MOVES = [(0, -1, "on the left", "step to"), (1, 0, "below", "walk to"),
         (0, 1, "on the right", "move to"), (-1, 0, "above", "head to")]
THINGS = {b"S": "the ice", b"F": "the ice", b"H": "the hole", b"G": "the goal"}
ORDINALS = ["first", "second", "third", "fourth"]


def frozen_lake(slippery=False):
    """Return the lake, four by four cells, told in words."""
    env = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=slippery)
    lake = env.unwrapped.desc

    def prompt(cell, info):
        row, column = divmod(int(cell), 4)
        seen, phrases = [], []
        for down, right, side, verb in MOVES:
            inside = 0 <= row + down < 4 and 0 <= column + right < 4
            thing = THINGS[lake[row + down][column + right]] if inside else "nothing"
            phrases.append(f"{verb} {thing} {side}")
            if inside:
                seen.append(f"{thing} {side}")
        place = f"the {ORDINALS[row]} row and the {ORDINALS[column]} column"
        text = (f"You want to get to the goal. You are in {place}."
                f" You see {', '.join(seen[:-1])} and {seen[-1]}. Your next step is to")
        return text, phrases

    return World(env, prompt)


if __name__ == "__main__":
    import twosome
    flags = ["--env", f"{__file__}:frozen_lake", "--steps", "7680"]
    sys.exit(twosome.main(flags + sys.argv[1:]))

"""What several test files share: every state that an environment can reach."""
import json
import os
import sys

import pytest
import torch

# The tests compare bits, so they run on the CPU even where there is a GPU. They use tiny tensors,
# for which a second thread costs more than it gives.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(autouse=True)
def one_thread():
    """Give every test one thread: pretraining takes two, which slowed a later test forty times."""
    torch.set_num_threads(1)


def reachable(env):
    """Yield (obs, info) of every reachable state in which the episode goes on, breadth first.

    All actions are tried, admissible or not. The step counter is set back to 0 before each step, so
    the states are finite in number and no time limit cuts them off.
    """
    obs, info = env.reset()
    queue = [(env.state_dict(), obs, info)]
    seen = {world_key(queue[0][0])}
    for state, obs, info in queue:
        yield obs, info
        for action in range(len(env.action_names)):
            env.load_state_dict(state)
            obs, _, terminated, _, info = env.step(action)
            after = env.state_dict() | {"phase": "running", "elapsed": 0, "duration": 0}
            if not terminated and world_key(after) not in seen:
                seen.add(world_key(after))
                queue.append((after, obs, info))


def world_key(state):
    """Return a text that is equal for equal worlds, from a state_dict."""
    return json.dumps(state["world"], sort_keys=True)

"""What several test files share: the project's root on the path, and every state that an environment can reach."""
import json
import os
import sys

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what the tests compare to the last bits is a CPU's work, also beside a GPU

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def reachable(env):
    """(obs, info) of every reachable state in which the episode goes on, breadth first, under all actions, admissible or not.

    The step counter is set back to 0 before each step, so the states are finite in number and no time limit cuts them off.
    """
    obs, info = env.reset()
    key = lambda state: json.dumps(state["world"], sort_keys=True)
    queue = [(env.state_dict(), obs, info)]
    seen = {key(queue[0][0])}
    for state, obs, info in queue:
        yield obs, info
        for action in range(len(env.action_names)):
            env.load_state_dict(state)
            obs, _, terminated, _, info = env.step(action)
            after = env.state_dict() | {"phase": "running", "elapsed": 0, "duration": 0}
            if not terminated and key(after) not in seen:
                seen.add(key(after))
                queue.append((after, obs, info))

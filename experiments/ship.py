r"""Make a finished run small, so that it can be given away: what --watch, --eval and --gif need.

    python experiments/ship.py runs/NAME FOLDER

The newest checkpoint is kept without the moments of the optimisers, and adapter and critic in
float16, which moves a log-probability by less than a thousandth of a nat. It cannot be resumed. The
run in examples/ was made by

    python twosome.py --env overcooked --model smollm2
    python experiments/ship.py runs/tomato-salad-smollm2-seed1 examples/tomato-salad-smollm2
    python twosome.py --watch examples/tomato-salad-smollm2 --greedy \
        --gif examples/tomato-salad-smollm2.gif
"""
import os
import shutil
import sys

import safetensors.torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from engine import runs


def ship(run, folder):
    """Copy a run, made small, into a folder that is not there yet. Returns its size in bytes."""
    path = runs.find(run)
    runs.read_config(run)
    inside = os.path.join(folder, os.path.basename(path))
    os.makedirs(inside)
    for name in ("baseline.json", "summary.json", "metrics.csv"):
        shutil.copy(os.path.join(run, name), folder)
    for name in ("state.json", "metrics.csv"):
        shutil.copy(os.path.join(path, name), inside)
    # Leave out where things were on the machine that trained it.
    settings = {**runs.read_json(os.path.join(run, "config.json")), "out": ""}
    adapter = runs.read_json(os.path.join(path, "adapter_config.json"))
    adapter["base_model_name_or_path"] = settings["model"]
    runs.write(os.path.join(folder, "config.json"), settings)
    runs.write(os.path.join(inside, "run_config.json"), settings)
    runs.write(os.path.join(inside, "adapter_config.json"), adapter)
    for name in ("adapter_model.safetensors", "critic.safetensors"):
        tensors = safetensors.torch.load_file(os.path.join(path, name))
        halves = {key: tensor.half() for key, tensor in tensors.items()}
        data = safetensors.torch.save(halves, {"format": "pt"})
        runs.write_bytes(os.path.join(inside, name), data)
    runs.write_bytes(os.path.join(inside, "SHA256SUMS"), runs.sums(inside).encode())
    return sum(os.path.getsize(os.path.join(where, name))
               for where, _, names in os.walk(folder) for name in names)


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    if len(given) != 2:
        sys.exit("ship.py: give a run's folder and a new one")
    try:
        print(f"{given[1]}: {ship(*given):,} bytes")
    except (runs.RunError, OSError) as error:
        sys.exit(f"ship.py: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

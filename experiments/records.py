"""A measurement's files: each finished job leaves one, whole or not at all.

    stored(options)              every stored record
    read_record(path, job)       one of them, read with suspicion
    write_json(path, value)      one line a key, five digits a number
"""
import contextlib
import json
import os

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "experiments", "results")
FORMAT = 2  # of a job's file


class ClaimsError(ValueError):
    """Something cannot be measured or told. One line says what was wrong, what would be right."""


def record_path(options, name):
    """Return the path of a job's file."""
    return os.path.join(options.out, "runs", f"{name}.json")


def write_json(path, value):
    """Write JSON, one line a key, under a temporary name first: a kill leaves the old file."""
    lines = (f"{json.dumps(key)}: {json.dumps(shortened(item))}" for key, item in value.items())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_text(path, "{" + ",\n".join(lines) + "}\n")


def shortened(value):
    """Return JSON values with five digits a number; whole ones stay, and NaN becomes None."""
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [shortened(item) for item in value]
    if not isinstance(value, (float, np.floating)):
        return value
    if not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")


def read_json(path):
    """Return a JSON object. Raises ClaimsError for anything else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(path, encoding="utf-8") as file:
            if isinstance(value := json.load(file), dict):
                return value
    raise ClaimsError(f"{path} is torn or no JSON object; delete it to have it measured again")


def read_record(path, job=None):
    """Return a job's file. Raises ClaimsError for one that is torn, foreign or of another job."""
    record = read_json(path)
    name = os.path.basename(path)[:-len(".json")]
    if record.get("format") != FORMAT or record.get("name") != name:
        raise ClaimsError(f"{path} is of another version or foreign (format"
                          f" {record.get('format')!r:.20}, name {record.get('name')!r:.60});"
                          " delete it to have it measured again")
    if job and record["arguments"] != job.arguments:
        raise ClaimsError(f"{path} was measured with other arguments than now; delete it to have"
                          " it measured again")
    return record


def stored(options):
    """Return every stored record, in the order of their names."""
    folder = os.path.join(options.out, "runs")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [read_record(os.path.join(folder, name)) for name in names if name.endswith(".json")]


def write_text(path, text):
    """Write a text, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)

"""CPU time of what a user waits for before anything happens: the help texts and the import.

python benchmarks/start_up.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 9
COMMANDS = {
    "moeshard --help": [sys.executable, "-m", "moeshard", "--help"],
    "moeshard inspect --help": [sys.executable, "-m", "moeshard", "inspect", "--help"],
    "moeshard generate --help": [sys.executable, "-m", "moeshard", "generate", "--help"],
    "import numpy": [sys.executable, "-c", "import numpy"],
    "import numpy, moeshard; moeshard.Model": [sys.executable, "-c", "import numpy, moeshard; moeshard.Model"],
}


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    for name, command in COMMANDS.items():
        print(f"{name:40} {statistics.median(cpu_seconds(command) for _ in range(ROUNDS)):.2f} s")


if __name__ == "__main__":
    main()

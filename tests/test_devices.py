"""Runs tests/on_second_device.py in a process of its own: a second device changes PyTorch for the whole process."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_passes_on_a_second_device(request: pytest.FixtureRequest) -> None:
    slow = ["--slow"] if request.config.getoption("--slow") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *slow, "on_second_device.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]

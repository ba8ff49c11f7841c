"""The kill test in short; `make torture` is the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each attempt is a forked process")
def test_a_run_that_is_killed_at_any_moment_ends_as_if_nothing_had_been() -> None:
    command = [sys.executable, TESTS / "torture.py", "--kills", "4", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills (" in done.stdout
    assert "are those of the undisturbed run, bit by bit" in done.stdout

"""What a command of pytest runs, and the processes that tests start."""

import os
import signal

import pytest
from conftest import is_left_out
from processes import ForkedPython, run_python


@pytest.mark.parametrize(
    ("expression", "left_out"),
    [
        ("", ["slow", "faults"]),
        ("not readme", ["slow", "faults"]),
        ("not slow and not readme", ["faults"]),  # pytest leaves out what is slow
        ("not (slow or readme)", ["faults"]),
        ("slow", []),
        ("hub and not slow", []),
        ("faults or slow", []),
        ("faults or not (slow or readme)", []),
    ],
)
def test_expressions_and_what_they_leave_out(expression, left_out):
    assert [name for name in ("slow", "faults") if is_left_out(name, expression)] == left_out


def test_forked_processes_are_like_new_ones(tmp_path):
    script = "import os, sys; print(sys.argv, os.getcwd(), os.environ['GIVEN']); sys.exit('an error')"
    forked, new = (
        run_python("-c", script, 1, "two", cwd=tmp_path, new_interpreter=new, GIVEN="given") for new in (False, True)
    )
    assert vars(forked) | {"args": None} == vars(new) | {"args": None}
    assert forked.stdout == f"['-c', '1', 'two'] {tmp_path} given\n"
    assert (forked.stderr, forked.returncode) == ("an error\n", 1)


def test_forked_processes_share_nothing():
    script = "import os, random, echoatt_hf; print(os.getpid(), random.random(), hasattr(echoatt_hf, 'left'))"
    first, second = (run_python("-c", f"{script}; echoatt_hf.left = 1").stdout.split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]
    assert first[2] == second[2] == "False" and str(os.getpid()) not in (first[0], second[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_forked_process_gets_signals(tmp_path, number):
    script = """
import pathlib, time
try:
    pathlib.Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    process = ForkedPython("-c", script, cwd=tmp_path)
    while not (tmp_path / "started").exists():
        assert process.is_running()
    process.send_signal(number)
    assert process.wait(30).returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)

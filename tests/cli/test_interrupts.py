"""Ctrl-C, wherever it arrives; tools/interrupts.py tries many more moments."""

import signal
import subprocess
import sys
import time
from random import Random

import interrupts as tool
import pytest

START = """
import hashlib, os, signal, sys, time
from prune2onnx.cli.interrupts import raising, watch
watch()
def press():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run(code: str, ignored: bool = False) -> tuple[int, str, float]:
    """Status, stderr and seconds of a process."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
        ),
    )
    return done.returncode, done.stderr, time.monotonic() - began


WORKING = """
status = 0
try:
    with raising():
{}
except KeyboardInterrupt:
    status = 7
sys.exit(status)
"""
"""A verb, to be filled in, that ends with status 7 if it is interrupted."""


@pytest.mark.parametrize(
    "code",
    [
        "press()\ntime.sleep(60)",  # as in an import
        "with raising():\n    pass\npress()\ntime.sleep(60)",  # after the verb
        "import atexit\natexit.register(time.sleep, 60)\natexit.register(press)",
        "try:\n    press()\n    time.sleep(60)\nexcept BaseException:\n    pass\ntime.sleep(60)",
    ],
)
def test_outside_of_a_verb_the_process_ends_at_once(code):
    status, said, seconds = run(code)
    assert (status, said) == (130, "prune2onnx: interrupted\n") and seconds < 5


@pytest.mark.parametrize(
    "verb",
    [
        "press()\ntime.sleep(60)",
        "try:\n    press()\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError",
        "try:\n    press()\n    time.sleep(60)\nexcept BaseException:\n    pass",
        "class A:\n    def __del__(self): press()\nA()\ntime.sleep(60)",
    ],
    ids=["raised", "made another error", "caught", "lost in a destructor"],
)
def test_in_a_verb_it_is_an_interruption_whatever_a_library_makes_of_it(verb):
    indented = "\n".join("        " + line for line in verb.splitlines())
    status, said, seconds = run(WORKING.format(indented))
    assert (status, said) == (7, "") and seconds < 5


def test_a_call_of_c_that_takes_long_is_not_waited_for():
    verb = "        press_later = __import__('threading').Timer(0.2, press)\n"
    verb += "        press_later.start()\n"
    verb += "        hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes
    status, said, seconds = run(WORKING.format(verb))
    assert (status, said) == (130, "prune2onnx: interrupted\n") and seconds < 5


def test_the_second_one_ends_the_process_at_once():
    verb = "        try:\n            press()\n            time.sleep(60)\n"
    verb += "        finally:\n            press()\n            time.sleep(60)"
    status, said, seconds = run(WORKING.format(verb))
    assert (status, said) == (130, "prune2onnx: interrupted\n") and seconds < 3


def test_an_interrupted_command_does_not_wait_for_what_python_does_at_exit():
    code = """
import atexit
from prune2onnx.__main__ import main
from prune2onnx.cli.main import main as verbs
@verbs.command()
def pressed():
    press()
    time.sleep(60)
atexit.register(time.sleep, 60)
sys.argv[1:] = ["pressed"]
main()
"""
    status, said, seconds = run(code)
    assert (status, said) == (130, "prune2onnx: interrupted\n") and seconds < 20


def test_where_it_is_ignored_as_behind_nohup_it_stays_ignored():
    assert run("press()", ignored=True)[:2] == (0, "")


def test_at_random_moments_of_pack_nothing_half_is_left(tmp_path):
    row = tool.try_verb(tool.verbs(tmp_path, size=300)["pack"], 3, Random(1), tmp_path)
    assert row.faults == [] and row.moments == 3

"""The process where Triton compiles: how its calls end."""

from __future__ import annotations

import os

import pytest

from ptx.process import Answer, Process

pytest.importorskip("triton")


def leave() -> None:
    os._exit(7)


def speak() -> None:
    print("this is no answer")


def fail() -> None:
    raise ValueError("for the test")


def test_a_process_that_ends_fails_one_call():
    other = Process()
    try:
        assert other.call(speak, {}).error is None
        assert "ValueError: for the test" in other.call(fail, {}).error
        assert "exit status 7" in other.call(leave, {}).error
        assert other.call(speak, {}) == Answer(None, [])
    finally:
        other.close()

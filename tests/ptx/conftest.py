"""Tests marked ``compiled`` run in a process of their own, where Triton compiles kernels."""

import pytest

from ptx.process import Process

PROCESS = Process()  # one for each process of pytest-xdist


def pytest_collection_modifyitems(config, items):
    """Leave out the cases marked ``whole``, unless all are asked for."""
    if config.getoption("--compiled"):
        return
    config.hook.pytest_deselected(items=[item for item in items if "whole" in item.keywords])
    items[:] = [item for item in items if "whole" not in item.keywords]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Call the test's function there, with its parameters and fixtures, and fail as it fails."""
    if pyfuncitem.get_closest_marker("compiled") is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    answer = PROCESS.call(pyfuncitem.obj, arguments)
    if "mode" in arguments:  # a case of report.py
        pyfuncitem.user_properties.append(("mode", arguments["mode"]))
        pyfuncitem.user_properties.append(("compiled", answer.launches))
    if answer.error is not None:
        pytest.fail(answer.error, pytrace=False)
    return True


def pytest_sessionfinish():
    PROCESS.close()

"""``pytest --fast``: one quick case of each test, for an answer within a minute."""

import zlib

import pytest


class Fast:
    """A pytest plugin that keeps one case of each test and reports how many it kept."""

    def __init__(self, left_out: tuple[str, ...]) -> None:
        self.left_out = left_out  # markers
        self.summary = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        kept = set(one_case_of_each(items, self.left_out))
        self.summary = f"--fast: {len(kept)} of {len(items)} tests"
        if hasattr(config, "workeroutput"):  # pytest-xdist carries it to the process that reports
            config.workeroutput["fast"] = self.summary
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.summary = getattr(node, "workeroutput", {}).get("fast", self.summary)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(self.summary)


def one_case_of_each(items: list, left_out: tuple[str, ...]) -> list:
    """Choose one case of each test without one of these markers.

    The test's name decides which backend, so that each run has the same cases and all backends have
    a part. The last of them, Triton under its interpreter, is slow and comes half as often. The
    reference is slow too, and comes only if there is no other. A test lists small cases first, so
    the first case of a backend is the one.
    """
    cases: dict[str, dict[str, object]] = {}
    for item in items:
        if not any(item.get_closest_marker(marker) for marker in left_out):
            backends = cases.setdefault(item.nodeid.partition("[")[0], {})
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            backends.setdefault(str(parameters.get("backend")), item)
    for backends in cases.values():
        if len(backends) > 1:
            backends.pop("reference", None)
    return [
        [*backends.values()][zlib.crc32(name.encode()) % (2 * len(backends) - 1) // 2]
        for name, backends in cases.items()
    ]

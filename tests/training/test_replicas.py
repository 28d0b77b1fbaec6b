"""The replicas of ``nn.DataParallel`` share the state of their criterion."""

from __future__ import annotations

import threading

import pytest
from small_network import step_on_noise

from repmtl_kernels import RepMTL


def test_replicas_share_their_state() -> None:
    """One forward of ``nn.DataParallel`` is one call, whatever its threads do."""

    def run(order: list[int]) -> tuple[list, list]:
        criterion = RepMTL(start=1, every=2, strength=0.3, clip=1.0)
        applied, totals = [], []
        for step in range(6):
            replicas = [criterion._replicate_for_data_parallel() for _ in range(3)]
            threads = [
                threading.Thread(target=step_on_noise, args=(replicas[i], 3 * step + i))
                for i in order
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len({replica.last.applied for replica in replicas}) == 1
            applied.append(criterion.last.applied)
            totals.append([replica.last.total.item() for replica in replicas])
        assert criterion.last is replicas[0].last
        state = criterion.get_extra_state()
        assert state[0] == 6 and state[1] > 0
        assert applied == [False, True] * 3
        return totals, state.tolist()

    expected = run([0, 1, 2])
    for order in ([2, 1, 0], [1, 0, 2], [0, 1, 2]):
        assert run(order) == expected


def test_a_forward_pass_that_fails_is_no_call() -> None:
    criterion = RepMTL(start=1)
    for _ in range(2):
        replica = criterion._replicate_for_data_parallel()
        with pytest.raises(TypeError):
            replica(3, None)
        del replica
    replicas = [criterion._replicate_for_data_parallel() for _ in range(2)]
    step_on_noise(replicas[1])
    step_on_noise(replicas[0])
    assert criterion.get_extra_state()[0] == 1


def test_replicas_that_are_given_the_step() -> None:
    criterion, applied = RepMTL(every=2), []
    for step in range(4):
        for _ in range(2):
            for replica in [criterion._replicate_for_data_parallel() for _ in range(2)]:
                step_on_noise(replica, step=step)
        applied.append(criterion.last.applied)
    assert applied == [True, False] * 2

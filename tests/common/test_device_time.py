"""The time of the devices in a step: pieces of work do not overlap, and the rest is idle."""

import pytest

from cptjax.common import device_time


@pytest.fixture
def devices(monkeypatch):
    """Results are the time at which they are ready."""
    monkeypatch.setattr(device_time, "_wait_until_ready", lambda results: results)
    clock = device_time.start()
    yield clock
    device_time.stop()


def test_work_and_waiting_add_up_to_the_step(devices):
    devices.watch("rollout", 11.0, 14.0).result()
    devices.watch("policy", 16.0, 18.0).result()
    devices.watch("update", 16.5, 21.0).result()  # given while the devices scored
    expected = {"rollout": 3.0, "policy": 2.0, "update": 3.0, "idle": 1.0 + 2.0 + 1.0}
    assert devices.between(10.0, 22.0) == expected


def test_work_of_one_kind_is_added_and_what_a_step_leaves_belongs_to_the_next(devices):
    for given, ready in ((0.0, 1.0), (2.0, 4.0)):
        devices.watch("update", given, ready).result()
    devices._given.append(("reference", 3.0, Unready()))
    assert devices.between(0.0, 6.0) == {"update": 3.0, "reference": 2.0, "idle": 1.0}
    devices._given[-1][-1].value = 8.5
    assert devices.between(7.0, 10.0) == {"reference": 1.5, "idle": 1.5}
    assert devices.between(10.0, 12.0) == {"idle": 2.0}


class Unready:
    value = None

    def done(self):
        return self.value is not None

    def result(self):
        return self.value


def test_outside_of_a_stage_nothing_is_counted(devices):
    device_time.stop()
    device_time.watch("rollout", 0.0, 1.0)
    assert devices.between(0.0, 2.0) == {"idle": 2.0}

"""GPUs of a node under SLURM, and where a process is; lost ones are in test_multiprocess."""

import concurrent.futures

import pytest

from cptjax.common import cluster

STEP = {"SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, None),  # JAX gives one to each
        ({"SLURM_GPUS_ON_NODE": ""}, None),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # the user decides
    ],
)
def test_a_process_alone_on_its_node_takes_all_its_gpus(changes, expected):
    assert cluster.slurm_gpus(STEP | changes) == expected
    assert cluster.slurm_gpus({}) is None


@pytest.mark.parametrize(
    "address", ["localhost:99999", "localhost:0", "localhost:-1", "localhost:", "8476", "host:1.5"]
)
def test_an_address_without_a_port_in_range_is_refused_before_jax_sees_it(address):
    with pytest.raises(ValueError, match=f"--coordinator={address}: expected host:port"):
        cluster.connect(address, 2, 1)


def test_the_place_is_found_behind_frames_that_belong_to_no_module():
    """Libraries make functions whose globals have no name; the heartbeat must not end there."""
    found = []
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        see = lambda: found.append(thread.submit(cluster.main_thread_place).result())
        names = {"see": see}
        exec("def act(): see()", names)
        assert "__name__" not in names
        names["act"]()
    assert not found[0].waits and found[0].exchange == 0

"""How many GPUs of a node a process takes under SLURM; lost processes are in test_multiprocess."""

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

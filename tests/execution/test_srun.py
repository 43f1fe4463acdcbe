"""Tests how a run in a SLURM job gets its ranks, with the variables that SLURM 22.05 sets."""

import warnings

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from ldm.execution.srun import Srun, check_tasks, srun_environment

BATCH = {"SLURM_JOB_ID": "70123", "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
STEP = BATCH | {
    **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"},
    **{"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "gpu[01-08]"},
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PTY_PORT")


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *STEP):
        monkeypatch.setenv(name, "")  # so that it is removed again afterwards
        monkeypatch.delenv(name)


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_tasks_of_srun_are_ranks_that_meet_on_the_first_host_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, STEP)
    environment = srun_environment()
    assert isinstance(environment, Srun) and environment.creates_processes_externally
    assert (environment.global_rank(), environment.world_size(), environment.local_rank()) == (3, 4, 1)
    assert (environment.node_rank(), environment.main_address, environment.main_port) == (1, "gpu07", 15123)
    assert check_tasks(devices=2, nodes=2) is None


def test_lightning_does_not_requeue_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, STEP)
    environment = srun_environment()
    assert isinstance(environment, Srun) and not environment.auto_requeue


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_or_a_shell_starts_its_ranks_itself(
    step: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert srun_environment() is None
    set_variables(monkeypatch, BATCH | step)
    assert isinstance(srun_environment(), LightningEnvironment)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_tasks(devices=4, nodes=1) is None


def test_torchrun_starts_the_ranks_in_a_slurm_job_too(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, STEP | {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "GROUP_RANK": "0"})
    set_variables(monkeypatch, {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert srun_environment() is None and check_tasks(devices=1, nodes=1) is None


@pytest.mark.parametrize(("devices", "nodes"), [(1, 1), (4, 1), (1, 2)])
def test_another_number_of_tasks_than_processes_is_refused(
    devices: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, STEP)
    with pytest.raises(ValueError, match=r"4 tasks on 2 nodes, .*set trainer.num_nodes=2 trainer.devices=2, or"):
        check_tasks(devices, nodes)


def test_several_nodes_without_srun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, BATCH)
    with pytest.raises(ValueError, match=r"srun --nodes 2 --ntasks-per-node 8 python train.py"):
        check_tasks(devices=8, nodes=2)


def test_unused_tasks_of_a_job_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, BATCH)
    assert "this SLURM job has 4 tasks, but Python was started without srun" in str(check_tasks(devices=2, nodes=1))

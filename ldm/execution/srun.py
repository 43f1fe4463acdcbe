"""Trains on the tasks of a SLURM job step, each of which srun started as one rank."""

import os

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from ldm.device import ranks


class Srun(SLURMEnvironment):
    """The ranks of a step that srun started, whatever the job is called and however the tasks were asked for.

    Lightning's own environment also takes a batch script without srun for a rank, refuses --ntasks, takes a step that
    runs a bash script for an interactive shell, and requeues the job by itself on SIGUSR1.
    """

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """The host of rank 0, which is the first one of the step, not of the job."""
        default = self.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        return os.environ.setdefault("MASTER_ADDR", default)

    def world_size(self) -> int:
        return ranks()[1]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Does nothing, because `check_tasks` has checked them."""

    @staticmethod
    def _validate_srun_used() -> None:
        """Does nothing, because `srun_environment` has found out."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Does nothing, because the number of tasks per node need not be given."""


def srun_environment() -> ClusterEnvironment | None:
    """Returns how the ranks of a run in a SLURM job are started: by srun, or by the run; None for Lightning to decide.

    torchrun starts its ranks itself, in a job or not.
    """
    if TorchElasticEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
        return None
    return Srun() if ranks()[1] > 1 else LightningEnvironment()


def check_tasks(devices: int, nodes: int) -> str | None:
    """Returns a note if a SLURM job has tasks that the run does not use; None if all is well.

    Raises ValueError if srun started another number of tasks than the run has processes, or if the run needs processes
    on other nodes, but was started without srun.
    """
    if TorchElasticEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
        return None
    expected = f"trainer.num_nodes={nodes} x trainer.devices={devices}"
    remedy = f"start the run with srun --nodes {nodes} --ntasks-per-node {devices} python train.py …"
    started = ranks()[1]
    if started > 1:
        hosts = int(os.environ.get("SLURM_STEP_NUM_NODES", nodes))
        if (started, hosts) != (nodes * devices, nodes):
            raise ValueError(
                f"srun started {started} tasks on {hosts} nodes, but {expected} needs {nodes * devices} on {nodes}: "
                f"set trainer.num_nodes={hosts} trainer.devices={started // hosts}, or {remedy}"
            )
        return None
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if nodes > 1 and "NODE_RANK" not in os.environ:
        raise ValueError(f"{expected} needs processes on {nodes} nodes, but srun did not start one for each: {remedy}")
    if tasks > nodes * devices and not _is_step():
        return (
            f"this SLURM job has {tasks} tasks, but Python was started without srun, and {expected} uses only "
            f"{nodes * devices}: to use all, start it with srun, and set trainer.num_nodes and trainer.devices"
        )
    return None


def _is_step() -> bool:
    return os.environ.get("SLURM_STEP_ID", "").isdigit()

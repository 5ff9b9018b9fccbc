"""The launch files of `recipes/launch`, as far as they can be run without Slurm, SkyPilot and Kubernetes: the commands of those
systems are stand-ins on PATH, with the variables that the systems set, and torchrun's own parser reads what it is given."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes/launch"
STAND_INS = {
    "torchrun": 'printf "%s\\n" "$@" > "$RECORD/torchrun"; exit ${CODE:-0}',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$@" >> "$RECORD/scontrol"; fi',
    "nvidia-smi": 'for i in 0 1 2 3 4 5 6 7; do echo "GPU $i"; done',
    "pip": "exit 0",
}


@pytest.fixture
def run(tmp_path):
    """run(text or file, *arguments, **variables) -> (exit code, what torchrun was given as its parser reads it)."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script, *arguments, **variables):
        from torch.distributed.run import get_args_parser

        command = ["bash", str(script)] if isinstance(script, Path) else ["bash", "-c", script, "bash"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PET_", "OMP_"))}
        done = subprocess.run([*command, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60, env=environment | {
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "RECORD": str(tmp_path)} | variables)
        given = (tmp_path / "torchrun").read_text().splitlines()
        before = dict(os.environ)
        try:
            os.environ.update({k: v for k, v in variables.items() if k.startswith("PET_")})  # the parser's defaults
            return done.returncode, get_args_parser().parse_args(given)
        finally:
            os.environ.clear()
            os.environ.update(before)
    return run


SLURM = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}


def test_scripts_are_bash():
    texts = [(LAUNCH / name).read_text() for name in ("slurm.sbatch", "torchrun.sh")]
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for text in (*texts, task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_slurm_gives_torchrun_the_nodes_and_a_rendezvous_on_the_first(run):
    code, given = run(LAUNCH / "slurm.sbatch", "recipes/mimo.yaml", "model.path=/m", **SLURM)
    assert code == 0
    assert (given.nnodes, given.nproc_per_node, given.rdzv_id, given.rdzv_backend) == ("2", "8", "17", "c10d")
    assert given.rdzv_endpoint == "node-a:29500" and "SIGUSR1" in given.signals_to_handle and given.shutdown_timeout == 600
    assert given.training_script == "qat/train.py"
    assert given.training_script_args == ["recipes/mimo.yaml", "model.path=/m", "--resume"]


@pytest.mark.parametrize("code, restarts, again", [(138, "0", True), (143, "3", True), (1, "0", True), (0, "0", False),
                                                   (2, "0", False), (138, "50", False)])
def test_slurm_queues_a_job_again_that_was_stopped_or_died_and_no_other(run, tmp_path, code, restarts, again):
    ended, _ = run(LAUNCH / "slurm.sbatch", "r.yaml", **SLURM, CODE=str(code), SLURM_RESTART_COUNT=restarts)
    assert ended == code
    asked = tmp_path / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if again else "")


def test_slurm_directives_are_those_that_the_script_counts_on():
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in
                   (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH --"))
    assert options["signal"].startswith("USR1@") and "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"


def test_skypilot_gives_torchrun_its_own_variables(run):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup",
                           "run", "config"}
    assert task["workdir"] == "." and task["resources"].keys() <= {"accelerators", "disk_size"}
    assert all(m.keys() <= {"name", "source", "store", "mode", "persistent"} for m in task["file_mounts"].values())
    code, given = run(task["run"], **task["envs"], SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2",
                      SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_GPUS_PER_NODE="8")
    assert code == 0
    assert (given.nnodes, given.node_rank, given.nproc_per_node) == ("2", 1, "8")
    assert (given.master_addr, given.master_port, given.shutdown_timeout) == ("10.0.0.1", 29500, 600)
    envs = task["envs"]
    assert given.training_script_args == [envs["RECIPE"], f"model.path={envs['MODEL']}", "output=/runs", "--resume"]


def test_kubeflow_job_has_the_fields_of_a_trainjob_and_torchrun_reads_the_runtimes_variables(run):
    job = yaml.safe_load((LAUNCH / "kubeflow.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() <= {"runtimeRef", "trainer", "initializer", "labels", "annotations", "suspend", "managedBy",
                                  "podTemplateOverrides"}
    trainer = job["spec"]["trainer"]
    assert trainer.keys() <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert all(isinstance(e["value"], str) for e in trainer["env"])
    variables = {"PET_NNODES": "8", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "3", "PET_MASTER_PORT": "29500",
                 "PET_MASTER_ADDR": "fp4-qat-node-0-0.fp4-qat"}
    code, given = run(" ".join(trainer["command"]), **variables)
    assert code == 0
    assert (given.nnodes, given.nproc_per_node, given.node_rank) == ("8", "8", 3)
    assert (given.master_addr, given.master_port) == ("fp4-qat-node-0-0.fp4-qat", 29500)
    assert given.training_script == "qat/train.py" and given.training_script_args[-1] == "--resume"


def test_one_machine_takes_all_of_its_gpus_and_several_what_they_are_told(run):
    code, given = run(LAUNCH / "torchrun.sh", "recipes/qwen3-moe.yaml")
    assert code == 0 and (given.nnodes, given.nproc_per_node, given.rdzv_endpoint) == ("1", "8", "localhost:29500")
    _, given = run(LAUNCH / "torchrun.sh", "r.yaml", NNODES="4", GPUS="2", HEAD="first", PORT="1234", RESTARTS="3")
    assert (given.nnodes, given.nproc_per_node, given.rdzv_endpoint, given.max_restarts) == ("4", "2", "first:1234", 3)

"""Launches as schedulers see them: signals through launchers, requeueing, hangs, and ranks that break."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import ENVIRONMENT, ROOT
from ranks import free_port

from training.checkpoint import complete_checkpoints

SHARDED = ("cluster.memory_gib=1.0", "cluster.sharding=fsdp2", "cluster.accelerators_per_node=2", "qat.checkpoint_every=1000")
BIN = Path(sys.executable).parent


def torchrun(*arguments) -> subprocess.Popen:
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen, words: str) -> list[str]:
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return seen
    raise AssertionError("".join(seen))


def checkpoints(recipe: Path) -> list[str]:
    return [p.name for p in complete_checkpoints(recipe.parent / "runs/t/qat/checkpoints")]


def alive(pattern: str) -> list[str]:
    return subprocess.run(["pgrep", "-f", pattern], text=True, capture_output=True).stdout.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_to_torchrun_saves_on_all_ranks_and_resume_goes_on(tiny_recipe, number):
    process = torchrun("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "qat/train.py", tiny_recipe,
                       "qat.steps=500", *SHARDED)
    wait_for(process, "step 3/")
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert f"stopped by signal {int(number)}" in said, said
    assert len(checkpoints(tiny_recipe)) == 1
    step = int(checkpoints(tiny_recipe)[0].removeprefix("step-"))
    again = torchrun("qat/train.py", tiny_recipe, "qat.steps=500", *SHARDED, "--resume", "--max-steps", step + 1)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and f"at step {step} of 500" in said, said


def test_a_signal_to_accelerate_launch_leaves_no_trainer_behind(tiny_recipe):
    process = subprocess.Popen([BIN / "accelerate", "launch", "--config_file", "recipes/accelerate/cpu.yaml", "qat/train.py",
                                str(tiny_recipe), "qat.steps=5000"], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    process.wait(300)
    for _ in range(300):
        if not alive(re.escape(str(tiny_recipe))):
            break
        time.sleep(0.1)
    assert not alive(re.escape(str(tiny_recipe)))
    assert len(checkpoints(tiny_recipe)) == 1


def test_a_rank_that_hangs_is_named_with_its_step_and_the_job_ends(tiny_recipe, tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(f"""
import sys, time, torch.distributed as dist
sys.path[0] = {str(ROOT)!r}
from qat import trainer
from recipes.load import load_recipe
from qat.sharded import ShardedTrainer
original = ShardedTrainer.batches
def slow(self):
    for batch in original(self):
        if self.state.step == 3 and dist.get_rank() == 1:
            time.sleep(1000)
        yield batch
ShardedTrainer.batches = slow
sys.exit(trainer.run(load_recipe(sys.argv[1], sys.argv[2:]), resume=False, max_steps=None))
""")
    process = torchrun(script, tiny_recipe, *SHARDED, "cluster.hang_minutes=0.1")
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "no progress for 0.1 minutes at step 4 (update); furthest behind: rank 1, at step 4 (data)" in said, said
    assert "time.sleep" in said or "in slow" in said  # where rank 1 stood


def test_a_non_finite_gradient_of_one_rank_stops_all_and_is_named_by_rank_expert_and_index(tiny_recipe, tmp_path):
    script = tmp_path / "poisoned.py"
    script.write_text(f"""
import sys, torch.distributed as dist
sys.path[0] = {str(ROOT)!r}
from qat import trainer, sharded
from recipes.command import run_command
original = sharded.ShardedQuantizer.pull_gradients
def poisoned(self, count=[0]):
    original(self); count[0] += 1
    if count[0] == 2 and dist.get_rank() == 1: self.masters[1].grad[1, 3, 4] = float('nan')
sharded.ShardedQuantizer.pull_gradients = poisoned
sys.exit(run_command(sys.argv[1], sys.argv[2:], lambda recipe: trainer.run(recipe, resume=False, max_steps=None)))
""")
    process = torchrun(script, tiny_recipe, *SHARDED)
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    first = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(first) == 1 and "step 2" in first[0] and "rank 1" in first[0] and "expert 3, index [3, 4]" in first[0], said


def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_as_if_nothing_had_been(tiny_recipe, tmp_path):
    """`torchrun --max-restarts`, with --resume as recipes/launch has it. The second time the first rank is late: the other one
    must not find the address of the first one's predecessor in the launcher's store."""
    marker = tmp_path / "killed"
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, sys, pathlib, time
sys.path[0] = {str(ROOT)!r}
from qat import trainer
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    time.sleep(5)
from recipes.load import load_recipe
from qat.sharded import ShardedTrainer
original = ShardedTrainer.record
def record(self, *values):
    original(self, *values)
    if self.state.step == 7 and os.environ["RANK"] == "1" and not pathlib.Path({str(marker)!r}).exists():
        pathlib.Path({str(marker)!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
ShardedTrainer.record = record
sys.exit(trainer.run(load_recipe(sys.argv[1], sys.argv[2:]), resume=True, max_steps=None))
""")
    process = torchrun("--max-restarts", "1", script, tiny_recipe, *SHARDED[:-1])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert marker.exists() and "at step 4 of 12" in said and "KL gap closed" in said


@pytest.mark.parametrize("words, overrides", {
    "cluster.expert_parallel: 4 does not divide the 2 processes": ("cluster.expert_parallel=4", "cluster.nodes=2"),
    "zero3: qat.optimizer.name: muon needs whole matrices": ("cluster.sharding=zero3", "qat.optimizer.name=muon"),
    "cluster.offload_optimizer: DeepSpeed's": ("cluster.offload_optimizer=true", "cluster.host_memory_gib=9.0"),
}.items())
def test_what_cannot_run_is_one_line_and_code_2(tiny_recipe, words, overrides):
    process = torchrun("qat/train.py", tiny_recipe, *SHARDED, *overrides)
    said, _ = process.communicate(timeout=600)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0] and "exitcode  : 2" in said, said
    assert not (tiny_recipe.parent / "runs/t/qat").exists()  # its parent held the lock


def test_slurm_queues_a_warned_job_again_and_it_goes_on(tiny_recipe, tmp_path):
    """The Slurm script with stand-ins for srun and scontrol, and torchrun with two processes instead of eight."""
    stand_ins = {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
                 "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path}/asked; fi',
                 "torchrun": f'exec {BIN}/torchrun "${{@/#8/2}}"'}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = (ROOT / "recipes/launch/slurm.sbatch").read_text().replace("29500", str(free_port()))
    (tmp_path / "job.sh").write_text(script)

    def launch(*overrides):
        return subprocess.Popen(["bash", tmp_path / "job.sh", str(tiny_recipe), *SHARDED, *overrides], cwd=ROOT, text=True,
                                env=ENVIRONMENT | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "SLURM_NNODES": "1",
                                                   "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n"},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = launch("qat.steps=500")
    wait_for(process, "step 3/")
    [step] = alive(f"torchrun.*{re.escape(str(tiny_recipe))}")
    subprocess.run(["kill", "-USR1", step], check=True)  # Slurm warns the steps, not the batch script
    said, _ = process.communicate(timeout=600)
    assert process.returncode not in (0, 2) and (tmp_path / "asked").read_text() == "requeue 17\n", said
    done = int(checkpoints(tiny_recipe)[0].removeprefix("step-"))
    again = launch("qat.steps=500", "--max-steps", str(done + 1))
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and f"at step {done} of 500" in said, said

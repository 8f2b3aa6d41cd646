"""Pins the way of a cluster user: from a clone to a student by the README's commands, on three nodes of one machine.

Nobody gets in there without the token; a job is stopped, goes on, and is resized meanwhile.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from pages import ROOT, blocks
from runs import small_run
from started import alive, checkout, environment, free_port, mentioning, until

from ddil_ray.config import to_yaml
from ddil_ray.tracking import read_journal

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

(WALK,) = [block.text for block in blocks(ROOT / "README.md") if "cluster/local.sh" in block.text]
*COMMANDS, LAST = [line for line in WALK.splitlines() if not line.startswith("#")]
STEPS = 600
TEACHER = '''"""A teacher of the user's own: the tiny one, slow until a file is there."""
import time
from pathlib import Path

import ddil_ray
from ddil_ray.testing import TinyNetwork, tiny_model

print("code of", ddil_ray.__file__)


class Slow(TinyNetwork):
    def forward(self, *arguments):
        if not Path("{hurry}").exists():
            time.sleep(0.1)
        return super().forward(*arguments)


def teacher():
    model = tiny_model()
    model.network.__class__ = Slow
    return model
'''
TELLING = 'trap : TERM; "$@"; echo "ended with $?"'
"""A shell's command that runs another and tells how it ended, also where both are told to."""


@pytest.fixture(scope="module")
def cluster():
    """What the README's commands but the last made, in a clone; all of it has ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    clone, dashboard, ray = checkout(folder / "clone"), free_port(), folder / "t"
    env = environment(
        RAY_TMPDIR=ray, RAY_AUTH_TOKEN_PATH=folder / "token", STATE=folder / "nodes", PORT=free_port(),
        DASHBOARD_PORT=dashboard,
    )  # fmt: skip
    ray.mkdir()

    def shell(script, **more):
        """A script of bash's in the clone, with what the first command puts on the path."""
        command = ["bash", "-euo", "pipefail", "-c", f'PATH="$PWD/.venv/bin:$PATH"\n{script}']
        return subprocess.run(command, cwd=clone, env={**env, **more}, capture_output=True, text=True, timeout=900)

    try:
        walked = shell("\n".join(COMMANDS))
        yield SimpleNamespace(
            folder=folder, clone=clone, env=env, shell=shell, walked=walked, address=f"http://127.0.0.1:{dashboard}"
        )  # fmt: skip
    finally:
        started = mentioning(folder)
        shell(LAST)
        for process in alive(started):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def submitted(cluster, name, *command, **more):
    """Submits a job and follows it: the process that does, the job's id, and the file of what it says."""
    log = cluster.folder / name
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", 'PATH="$PWD/.venv/bin:$PATH"; exec cluster/submit.sh "$@"', "bash", *command],
            cwd=cluster.clone, env={**cluster.env, **more}, stdout=out, stderr=out,
        )  # fmt: skip

    def told():
        assert process.poll() is None, log.read_text()
        return re.search(r"Job '(\S+)' submitted successfully", log.read_text())

    return SimpleNamespace(process=process, id=until(told)[1], log=log)


def test_a_clone_comes_to_a_student_by_six_commands_of_the_readme(cluster):
    said = cluster.walked.stdout + cluster.walked.stderr
    assert cluster.walked.returncode == 0, said[-5000:]
    commands = [part for line in (*COMMANDS, LAST) for part in line.split("&&")]
    assert 3 < len(commands) <= 6
    assert re.search(r"0\.\d\d MB to upload", said)
    assert re.search(r"Job '\S+' succeeded", said)
    assert "did not reach the tracker" not in said
    (student,) = re.findall(r"`runs/(\S+)/student`", (ROOT / "README.md").read_text())[:1]
    for made in ("student/model_index.json", "report.html"):
        assert (cluster.clone / "runs" / student / made).stat().st_size > 0


def test_nobody_submits_without_the_token(cluster, tmp_path):
    stranger = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": "", "RAY_API_SERVER_ADDRESS": cluster.address}
    done = cluster.shell("ray job submit -- echo let in", **stranger)
    assert done.returncode == 1
    assert "Missing authentication token" in done.stdout + done.stderr
    done = cluster.shell("cluster/submit.sh echo let in", **stranger)
    assert done.returncode == 2
    assert "the token must be in RAY_AUTH_TOKEN or in" in done.stderr


def test_a_stopped_job_goes_on_from_its_checkpoint_and_is_resized_while_it_runs(cluster):
    """Its code, the teacher's and the package's, is that of the clone: it comes with the job."""
    run, hurry = cluster.folder / "runs" / "mine", cluster.folder / "hurry"
    rollout = {"batch_size": 64, "num_gpus": 0.2, "label_selector": {"pool": "rollout"}}
    config = small_run(
        name="mine",
        output=str(run.parent),
        teacher={"model": "my_teacher:teacher"},
        trainer={"steps": STEPS, "num_gpus": 0.5, "label_selector": {"pool": "trainer"}},
        forward_states=rollout,
        student_rollouts=rollout,
        checkpoint={"every": 10},
    )
    (cluster.clone / "mine.yaml").write_text(to_yaml(config))
    (cluster.clone / "my_teacher.py").write_text(TEACHER.format(hurry=hurry))
    distill = ["python", "pipelines/distill.py"]

    def told(key):
        journal = run / "metrics.jsonl"
        return [(r.get("step"), r[key]) for r in read_journal(journal) if key in r] if journal.exists() else []

    job = submitted(
        cluster, "job.log", "bash", "-c", TELLING, "bash", *distill, "mine.yaml", "--allow-code", WITH_CODE="1"
    )
    until(lambda: job.process.poll() is not None or len(told("loss")) > 10, timeout_s=300)
    assert job.process.poll() is None, job.log.read_text()[-5000:]
    stopped = cluster.shell(f"ray job stop --address {cluster.address} {job.id}", RAY_AUTH_MODE="token")
    assert f"Job '{job.id}' was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    assert job.process.wait(60) == 0
    said = cluster.shell(f"ray job logs --address {cluster.address} {job.id}", RAY_AUTH_MODE="token").stdout
    assert "ended with 143" in said
    step, steps = re.search(r"Stopped by SIGTERM after step (\d+) of (\d+); everything is saved", said).groups()
    assert 20 <= int(step) < int(steps) == STEPS
    assert "runtime_resources" in re.search(r"code of (\S+)", said)[1]
    assert max(n for n, _ in told("loss")) <= int(step)

    again = submitted(cluster, "again.log", *distill, "--resume", run, "--allow-code", WITH_CODE="1")
    until(lambda: again.process.poll() is not None or told("loss")[-1][0] > int(step), timeout_s=300)
    assert again.process.poll() is None, again.log.read_text()[-5000:]
    for actors in (3, 1):
        scaled = cluster.shell(f"ddil-ray scale {run} student_rollouts={actors}")
        assert f"-> {actors} actors" in scaled.stdout, scaled.stderr
        until(lambda wanted=actors: told("actors/count/student")[-1][1] == wanted)
    hurry.touch()
    assert again.process.wait(300) == 0, again.log.read_text()[-5000:]
    assert [n for n, _ in told("loss")] == list(range(2, STEPS + 1, 2))  # no step twice, and none left out
    assert any((run / "student").iterdir())


def test_a_pipeline_of_stages_runs_as_one_job(cluster):
    """Each of its stages connects to the cluster anew."""
    chain = cluster.folder / "chain"
    settings = [
        f"output={chain}",
        *("baseline=null", "compare=null", "train_teacher.model.block_out_channels=[8,16]"),
        *("train_teacher.trainer.steps=20", "distill.trainer.steps=20", "distill.evaluation.num_samples=64"),
        *("distill.evaluation.teacher_steps=8", "distill.shift.enabled=false", "evaluate.evaluation.num_samples=96"),
    ]
    done = cluster.shell(f"cluster/submit.sh python pipelines/chain.py digits-chain {shlex.join(settings)}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage, file in {
        "train-teacher": "teacher/model_index.json",
        "distill": "student/model_index.json",
        "evaluate": "metrics.json",
        "export": "model_index.json",
    }.items():
        assert len(list(chain.glob(f"digits-chain/digits-chain-{stage}-*/{file}"))) == 1


def test_the_last_command_ends_every_process_of_the_cluster(cluster):
    started = mentioning(cluster.folder)
    assert len(started) > 10
    done = cluster.shell(LAST)
    assert done.returncode == 0, done.stderr
    until(lambda: not alive(started), timeout_s=30)

"""Submission scripts, and what is refused before submission, with stubs of Slurm's commands; with a real Slurm:
test_slurm.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bases import sentencepiece_base
from grid import ROOT

from fireflyds import app
from fireflyds.cluster import job_status, script, slurm, submission
from fireflyds.cluster.slurm import JobState
from fireflyds.config import ClusterConfig, TrainConfig
from fireflyds.errors import UserError
from fireflyds.testing.stores import write_store
from fireflyds.types import Example

SBATCH = r"""#!/bin/bash
echo "$@" >> $FAKE/calls
if [[ "$*" == *--test-only* ]]; then cat > $FAKE/tried; exit 0; fi
number=$(grep -c parsable $FAKE/calls)
if [ "$number" = "$(cat $FAKE/full_at 2>/dev/null)" ]; then cat $FAKE/stderr >&2; exit 1; fi
echo $number
"""
SCONTROL = """#!/bin/bash
echo "scontrol $@" >> $FAKE/calls
if [ "$1" = requeue ]; then exit 0; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1
"""
SCANCEL = """#!/bin/bash
echo "scancel $@" >> $FAKE/calls
"""
SQUEUE = """#!/bin/bash
echo "squeue $@" >> $FAKE/calls
cat $FAKE/queue 2> /dev/null || true
"""
# The job is a stub too: it exits with the code in the file `code`.
SRUN = """#!/bin/bash
echo "srun $@" >> $FAKE/calls
exit $(cat $FAKE/code)
"""


class FakeSlurm:
    def __init__(self, folder: Path, verb) -> None:
        self.folder, self._verb = folder / "fake", verb
        self.work_dir = folder
        self.folder.mkdir()
        for name, text in (
            ("sbatch", SBATCH),
            ("scontrol", SCONTROL),
            ("scancel", SCANCEL),
            ("srun", SRUN),
            ("squeue", SQUEUE),
        ):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        (self.folder / "calls").touch()
        self.variables = {
            "FAKE": str(self.folder),
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def submit(self, *arguments: str, check: bool = True):
        return self._verb("submit", *arguments, env=self.variables, check=check)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def fake_slurm(verb, tmp_path: Path, base_tokenizer: Path, encoder) -> FakeSlurm:
    shutil.copytree(base_tokenizer, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    document = Example(np.arange(50), ((0, 50),), 100, is_document=True)
    write_store(tmp_path / "store", {"zh": [document] * 3}, tokenizer=encoder.fingerprint())
    return FakeSlurm(tmp_path, verb)


TRAIN = ["verb=train", "run=cpt", "model=./base", "data=./store", "optim.steps=10", "global_batch_size=32"]


def test_a_training_job_is_submitted_with_its_composed_config(fake_slurm: FakeSlurm) -> None:
    stdout = fake_slurm.submit(
        *TRAIN, "cluster.nodes=4", "cluster.partition=gpu", "cluster.sbatch=--exclusive --comment=mine"
    ).stdout
    assert stdout.splitlines()[0].startswith("cpt: job 1, runs/cpt/submit.sh, output in runs/cpt/logs/slurm-cpt-1.log")
    config = app.from_yaml(fake_slurm.work_dir / "runs/cpt/config.yaml", TrainConfig)
    assert (config.run, config.data.store, config.optim.steps) == ("cpt", "./store", 10)
    text = (fake_slurm.work_dir / "runs/cpt/submit.sh").read_text()
    options = re.findall(r"^#SBATCH --(\S+)$", text, re.MULTILINE)
    assert {
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "partition=gpu",
        "requeue",
        "exclusive",
        "comment=mine",
        "signal=USR1@300",
    } <= {*options}
    assert f"chdir={fake_slurm.work_dir}" in options
    assert not [option for option in options if "$" in option]
    assert "launch/train.py --config runs/cpt/config.yaml" in text
    assert (fake_slurm.folder / "tried").read_text() == text


def test_a_dry_run_needs_no_slurm_and_submits_nothing(verb, fake_slurm: FakeSlurm) -> None:
    stdout = verb("submit", *TRAIN, "dry_run=true").stdout
    assert (fake_slurm.work_dir / "runs/cpt/submit.sh").read_text() in stdout
    assert fake_slurm.calls == []
    assert not (fake_slurm.work_dir / "runs/cpt/jobs.json").exists()


def test_submitting_imports_no_torch(fake_slurm: FakeSlurm) -> None:
    code = f"""
import sys
sys.argv = ["submit.py", *{TRAIN!r}, "dry_run=true"]
sys.modules["torch"] = None
import runpy
runpy.run_path({str(ROOT / "launch" / "submit.py")!r}, run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", code], cwd=fake_slurm.work_dir, check=True, capture_output=True)
    assert (fake_slurm.work_dir / "runs/cpt/submit.sh").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*TRAIN, "optim.stepz=3"], "optim.stepz: no such key for train"),
        ([*TRAIN, "data=./nowhere"], "data.store=./nowhere: is not there"),
        ([*TRAIN, "cluster.nodes=5"], "global_batch_size=32: must be a multiple of micro_batch_size=1 x 40 ranks = 40"),
        ([*TRAIN, "cluster.partition=$PART"], "cluster.partition='$PART': holds '$', which Slurm does not expand"),
        ([*TRAIN, "cluster.time=one day"], "cluster.time=one day: must be hours:minutes:seconds"),
        (
            [*TRAIN, "cluster.time=86400"],
            (
                "cluster.time=86400: must be hours:minutes:seconds, such as 24:00:00 or 2-12:00:00. In a file put "
                "it in quotes"
            ),
        ),
        (
            [*TRAIN, "cluster.time=00:04:00"],
            "cluster.signal_seconds=300: a job of cluster.time=00:04:00 would be signalled to save at its start",
        ),
        ([*TRAIN, "cluster.chain=3"], "cluster.chain=3: is for clusters that forbid requeueing"),
        ([*TRAIN, "cluster.sbatch=exclusive"], "cluster.sbatch=exclusive: options are written --name=value"),
        ([*TRAIN, "cluster.sbatch=--nodes=3"], "cluster.sbatch=--nodes=3: has a key of its own, cluster.nodes"),
        ([*TRAIN, "cluster.container=pyxis"], "cluster.container=pyxis: needs an image"),
        ([*TRAIN, "cluster=h200"], "cluster.scheduler=none: submit is for a scheduler"),
        (["verb=chat", "run=x"], "verb=chat: is not submitted. Known: "),
        (["verb=demo", "run=x"], "road=demo does"),
        (
            ["verb=expand", "base=./base", "pieces=x.txt", "out=x"],
            "run: is not set; it identifies the job of expand. Give run=<name>",
        ),
        (["verb=export", "run=nothing"], "run=nothing: no such run in runs"),
        (["run=x"], "submit needs verb or road"),
        (["action=status"], "run: is not set; action=status needs it. Give run="),
        (["action=status", "run=never"], "run=never: nothing was submitted under this name"),
        (["road=nowhere"], "road=nowhere: no such file, here or in conf/road. Known: demo"),
        (
            ["road=demo", "optim.steps=3"],
            "optim.steps=3: no such key for submit. The keys of a pipeline's stages are in its file",
        ),
    ],
)
def test_a_failed_check_submits_nothing(fake_slurm: FakeSlurm, arguments: list[str], expected: str) -> None:
    completed = fake_slurm.submit(*arguments, check=False)
    assert completed.returncode == 2
    assert expected in completed.stderr
    assert fake_slurm.calls == []
    assert not (fake_slurm.work_dir / "runs").exists()


def test_a_run_started_with_another_configuration_is_refused(fake_slurm: FakeSlurm) -> None:
    fake_slurm.submit(*TRAIN)
    (fake_slurm.work_dir / "runs/cpt/metrics.jsonl").write_text('{"step": 1}\n')
    calls_before = fake_slurm.calls
    completed = fake_slurm.submit(*TRAIN, "seed=7", check=False)
    assert "was started with another configuration (seed: 42 -> 7)" in completed.stderr
    assert [call for call in fake_slurm.calls[len(calls_before) :] if "parsable" in call] == []
    fake_slurm.submit(*TRAIN, "optim.steps=20")


@pytest.mark.parametrize(
    ("sbatch_stderr", "remedy"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "Give cluster.account=",
        ),
        (
            "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Job violates accounting/QOS policy",
            "The queue accepts no more of your jobs",
        ),
        (
            "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Job violates accounting/QOS policy",
            "give a shorter cluster.time or fewer cluster.nodes",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            "`scontrol ping`",
        ),
    ],
)
def test_when_a_later_job_is_rejected_the_earlier_ones_are_cancelled(
    fake_slurm: FakeSlurm, sbatch_stderr: str, remedy: str
) -> None:
    (fake_slurm.folder / "full_at").write_text("3")
    (fake_slurm.folder / "stderr").write_text(sbatch_stderr)
    completed = fake_slurm.submit("road=demo", "cluster=slurm_cpu", "cluster.nodes=2", check=False)
    assert completed.returncode == 2
    assert sbatch_stderr.splitlines()[0].removeprefix("sbatch: error: ") in completed.stderr
    assert remedy in completed.stderr
    assert [call for call in fake_slurm.calls if call.startswith("scancel")] == ["scancel 1 2"]
    assert [file for file in (fake_slurm.work_dir / "runs").rglob("*") if file.is_file()] == []


def test_a_job_whose_id_was_not_received_is_cancelled_too(fake_slurm: FakeSlurm) -> None:
    (fake_slurm.folder / "full_at").write_text("1")
    (fake_slurm.folder / "stderr").write_text("sbatch: error: Socket timed out on send/recv operation")
    script = fake_slurm.work_dir / "runs/cpt/submit.sh"
    (fake_slurm.folder / "later").write_text(f"7 {script} 1\n8 /elsewhere/submit.sh 1\n9 {script}.old\n")
    sbatch = fake_slurm.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("cat $FAKE/stderr", "cp $FAKE/later $FAKE/queue; cat $FAKE/stderr"))
    assert fake_slurm.submit(*TRAIN, check=False).returncode == 2
    assert "scancel 7" in fake_slurm.calls
    assert not script.exists()


def test_a_queued_job_without_a_record_is_not_submitted_again(fake_slurm: FakeSlurm) -> None:
    (fake_slurm.folder / "queue").write_text(f"7 {fake_slurm.work_dir / 'runs/cpt/submit.sh'} 1\n")
    completed = fake_slurm.submit(*TRAIN, check=False)
    assert "runs/cpt: submitted already, as job 7. Wait for it, or `scancel 7`" in completed.stderr
    assert not [call for call in fake_slurm.calls if "parsable" in call]


def test_jobs_that_cannot_be_cancelled_stay_recorded(fake_slurm: FakeSlurm) -> None:
    (fake_slurm.folder / "full_at").write_text("3")
    (fake_slurm.folder / "stderr").write_text("sbatch: error: Unable to contact slurm controller")
    (fake_slurm.folder / "scancel").write_text("#!/bin/bash\necho 'scancel: error: Socket timed out' >&2; exit 1\n")
    completed = fake_slurm.submit("road=demo", "cluster=slurm_cpu", check=False)
    assert completed.returncode == 2
    assert "Unable to contact slurm controller" in completed.stderr
    assert "jobs 1, 2 may still be queued. `scancel 1 2` when Slurm answers again" in completed.stderr
    records = json.loads((fake_slurm.work_dir / "runs/demo/jobs.json").read_text())
    assert [record["id"] for record in records] == ["1", "2"]


def test_slurm_variables_of_another_job_are_not_passed_on(fake_slurm: FakeSlurm) -> None:
    sbatch = fake_slurm.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("echo", "env >> $FAKE/environment; echo", 1))
    fake_slurm.variables |= {
        "SLURM_CPUS_PER_TASK": "3",
        "SBATCH_PARTITION": "old",
        "RANK": "0",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    fake_slurm.submit(*TRAIN)
    environment = (fake_slurm.folder / "environment").read_text()
    assert "SLURM_CONF=" in environment
    assert not re.search(r"^(SLURM_CPUS_PER_TASK|SBATCH_PARTITION|RANK)=", environment, re.MULTILINE)


def test_a_dry_run_does_not_change_the_files_of_an_active_job(fake_slurm: FakeSlurm) -> None:
    fake_slurm.submit(*TRAIN)
    (fake_slurm.folder / "scontrol").write_text("#!/bin/bash\necho JobId=1 JobState=PENDING Reason=None\n")
    config_before = (fake_slurm.work_dir / "runs/cpt/config.yaml").read_text()
    completed = fake_slurm.submit(*TRAIN, "optim.lr=1e-3", "dry_run=true", check=False)
    assert "submitted already: cpt (job 1, PENDING)" in completed.stderr
    assert (fake_slurm.work_dir / "runs/cpt/config.yaml").read_text() == config_before


def test_spaces_and_gres_are_written_in_the_syntax_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    cluster = ClusterConfig(partition="gpu", cpu_partition="cpu", sbatch="--gres=gpu:8 --exclusive", gpus_per_node=8)
    train = script.text(_plan_job("train", "cpt", Path("runs/cpt"), Path("runs/cpt")), cluster)
    assert f'#SBATCH --chdir="{folder}"\n' in train
    assert "#SBATCH --partition=gpu\n" in train
    assert "#SBATCH --gres=gpu:8\n" in train
    assert "gpus-per-node" not in train
    prepare = script.text(_plan_job("prepare", "prepare", Path("runs/cpt"), None), cluster)
    assert "#SBATCH --partition=cpu\n" in prepare
    assert "--gres" not in prepare
    assert "#SBATCH --exclusive\n" in prepare


def test_jobs_of_a_pipeline_depend_on_the_success_of_the_previous_one(fake_slurm: FakeSlurm) -> None:
    fake_slurm.submit("road=demo", "cluster=slurm_cpu", "cluster.nodes=2")
    sbatch_calls = [call for call in fake_slurm.calls if "parsable" in call]
    records = json.loads((fake_slurm.work_dir / "runs/demo/jobs.json").read_text())
    assert len(sbatch_calls) == len(records) == 19
    assert "--dependency" not in sbatch_calls[0]
    assert all(
        f"--dependency=afterok:{index} --kill-on-invalid-dep=yes" in call
        for index, call in enumerate(sbatch_calls[1:], 1)
    )
    script_by_name = {record["name"]: Path(fake_slurm.work_dir / record["script"]).read_text() for record in records}
    assert "#SBATCH --nodes=2\n" in script_by_name["train_cpt"]
    assert "#SBATCH --nodes=1\n" in script_by_name["export_cpt"]


def test_without_sbatch_the_remedy_is_named(verb, fake_slurm: FakeSlurm) -> None:
    completed = verb("submit", *TRAIN, check=False, env={"PATH": str(Path(sys.executable).parent)})
    assert "there is no sbatch on the path. Submit from a login node" in completed.stderr
    assert not (fake_slurm.work_dir / "runs").exists()


def test_sbatch_without_an_answer_times_out(fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "#!/bin/bash\n"
        "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2\n"
        "exec sleep 60\n"
    )
    (fake_slurm.folder / "sbatch").write_text(text)
    monkeypatch.setenv("PATH", fake_slurm.variables["PATH"])
    monkeypatch.setattr(slurm, "_PATIENCE", 0.5)
    with pytest.raises(
        UserError, match=r"no answer within 0 s \(Slurm temporarily unable.*\)\. The queue accepts no more of your jobs"
    ):
        slurm.submit(Path("x.sh"))


def _plan_job(verb: str, name: str, folder: Path, run_dir: Path | None) -> script.Job:
    config = "{hardware: {start_timeout_minutes: 10}, recovery: {heartbeat_seconds: 60}}"
    return submission.plan_job(verb, name, folder, run_dir, config).job


def _job_script(folder: Path, **cluster_options) -> Path:
    cluster = ClusterConfig(gpu="cpu", **cluster_options)
    job = _plan_job("train", "cpt", folder, folder)
    (folder / "logs").mkdir(exist_ok=True)
    path = folder / "submit.sh"
    path.write_text(script.text(job, cluster))
    return path


def _run_script(
    fake_slurm: FakeSlurm, path: Path, exit_code: int, step: int | None, chain_index: int = 1, restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    (fake_slurm.folder / "code").write_text(str(exit_code))
    if step is not None:
        (path.parent / "status.json").write_text(json.dumps({"step": step, "exit_code": exit_code}, indent=2))
        (path.parent / f"checkpoints/step-{step:06d}").mkdir(parents=True, exist_ok=True)
    environment = os.environ | fake_slurm.variables | {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts)}
    command = ["bash", str(path), str(chain_index)]
    return subprocess.run(command, env=environment, cwd=path.parent, capture_output=True, text=True)


def _num_requeues(fake_slurm: FakeSlurm) -> int:
    return fake_slurm.calls.count("scontrol requeue 5")


@pytest.mark.parametrize(("exit_code", "num_requeues"), [(0, 0), (2, 0), (76, 0), (75, 1), (1, 1), (137, 1)])
def test_the_script_requeues_jobs_that_can_resume(fake_slurm: FakeSlurm, exit_code: int, num_requeues: int) -> None:
    assert _run_script(fake_slurm, _job_script(fake_slurm.work_dir), exit_code, 10).returncode == exit_code
    assert _num_requeues(fake_slurm) == num_requeues


def test_status_gives_the_recorded_exit_code_when_slurm_no_longer_knows_the_job(fake_slurm: FakeSlurm) -> None:
    path = _job_script(fake_slurm.work_dir)
    _run_script(fake_slurm, path, 2, None)
    record = submission.JobRecord("cpt", "export", "7", str(fake_slurm.work_dir), str(path), "a.log", 0)
    states = {"7": JobState("gone")}
    assert job_status.status([record], states) == "cpt: job 7 gone; no longer known to Slurm; exited with code 2"


@pytest.mark.parametrize("step", [10, None])
def test_a_job_without_a_newer_checkpoint_is_not_requeued_again(fake_slurm: FakeSlurm, step: int | None) -> None:
    path = _job_script(fake_slurm.work_dir, max_failures=2)
    outputs = [_run_script(fake_slurm, path, 1, step, restarts=restarts).stdout for restarts in range(3)]
    assert "3 times in a row without a newer checkpoint: not requeued" in outputs[-1]
    assert _num_requeues(fake_slurm) == 2
    if step:
        _run_script(fake_slurm, path, 1, step + 1, restarts=3)
        assert _num_requeues(fake_slurm) == 3
    # A new submission resets the count.
    _run_script(fake_slurm, path, 1, step)
    assert _num_requeues(fake_slurm) == (4 if step else 3)


def test_a_later_job_of_a_chain_does_nothing_after_success(fake_slurm: FakeSlurm) -> None:
    path = _job_script(fake_slurm.work_dir, requeue=False, chain=3)
    assert _run_script(fake_slurm, path, 75, 10).returncode == 75
    assert _run_script(fake_slurm, path, 0, 20, chain_index=2).returncode == 0
    num_srun_calls = len([call for call in fake_slurm.calls if call.startswith("srun")])
    completed = _run_script(fake_slurm, path, 0, 20, chain_index=3)
    assert (completed.returncode, "exited with code 0: nothing to do" in completed.stdout) == (0, True)
    assert len([call for call in fake_slurm.calls if call.startswith("srun")]) == num_srun_calls
    assert _num_requeues(fake_slurm) == 0


def test_a_chain_ignores_the_exit_code_of_an_earlier_submission(fake_slurm: FakeSlurm) -> None:
    path = _job_script(fake_slurm.work_dir, requeue=False, chain=3)
    assert _run_script(fake_slurm, path, 0, 20).returncode == 0
    # Submitted again for more steps; its first job loses its node.
    srun = (fake_slurm.folder / "srun").read_text()
    (fake_slurm.folder / "srun").write_text("#!/bin/bash\nkill -9 $PPID\n")
    assert _run_script(fake_slurm, path, 0, 20).returncode == -9
    (fake_slurm.folder / "srun").write_text(srun)
    completed = _run_script(fake_slurm, path, 75, 30, chain_index=2)
    assert (completed.returncode, completed.stdout) == (75, "")
    assert path.with_suffix(".code").read_text() == "75\n"


def test_srun_waits_for_ranks_longer_than_the_start_timeout(fake_slurm: FakeSlurm) -> None:
    fake_slurm.submit(*TRAIN, "hardware.start_timeout_minutes=30")
    assert "srun --wait=1980 \\\n" in (fake_slurm.work_dir / "runs/cpt/submit.sh").read_text()


def test_containers_modules_and_variables_are_written_into_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    container_options = {
        "image": "ours.sqsh",
        "mounts": ["/data:/data"],
        "modules": "cuda/12.6",
        "setup": ["source env.sh"],
    }
    job = _plan_job("train", "cpt", Path("runs/cpt"), Path("runs/cpt"))
    pyxis = script.text(
        job, ClusterConfig(container=script.Container.pyxis, environment={"A": "b c"}, **container_options)
    )
    mounts = f"{tmp_path}:{tmp_path},{ROOT}:{ROOT},/data:/data"
    assert (
        f"--container-image=ours.sqsh --container-mounts={mounts} --container-workdir={tmp_path} \\\n  python " in pyxis
    )
    assert "module load cuda/12.6\nsource env.sh\nexport A='b c'\n" in pyxis
    assert "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}\n" in pyxis
    assert "OMP_NUM_THREADS=$" not in script.text(job, ClusterConfig(environment={"OMP_NUM_THREADS": "8"}))
    apptainer = script.text(job, ClusterConfig(container=script.Container.apptainer, **container_options))
    assert f"apptainer exec --nv --bind {mounts} --pwd {tmp_path} ours.sqsh \\\n  python " in apptainer


@pytest.mark.parametrize(
    ("time", "seconds"), [("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("", 0)]
)
def test_times_are_parsed_as_slurm_parses_them(time: str, seconds: int) -> None:
    assert ClusterConfig(time=time, signal_seconds=1).time_seconds == seconds


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (JobState("PENDING", "Priority"), "PENDING; jobs of higher priority come first (Priority)"),
        (JobState("PENDING", "Licenses"), "PENDING; Licenses"),
        (JobState("RUNNING", "", "00:00:17", "n[1-2]"), "RUNNING; on n[1-2] for 00:00:17"),
        (JobState("CANCELLED", "PartitionTimeLimit"), "CANCELLED"),
        (JobState("gone"), "gone; no longer known to Slurm"),
    ],
)
def test_job_states_are_described(state: JobState, expected: str) -> None:
    record = submission.JobRecord("export", "export", "7", "runs/a", "a.sh", "a.log", 0)
    assert job_status.status([record], {"7": state}) == f"export: job 7 {expected}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.tokenizer=./other"], "data.store=./store: made with another tokenizer"),
        (["data.weights.en=1"], "data.weights.en: the store store has no such domain. It has: zh"),
        (["seq_len=8192"], "seq_len=8192: the model has 4096 positions"),
        (["data=./base"], "data.store=base: no token store there"),
    ],
)
def test_inputs_that_training_would_refuse_are_not_submitted(
    fake_slurm: FakeSlurm, overrides: list[str], message: str
) -> None:
    sentencepiece_base(fake_slurm.work_dir / "other", vocab_size=350)
    completed = fake_slurm.submit(*TRAIN, *overrides, check=False)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert fake_slurm.calls == []
    assert not (fake_slurm.work_dir / "runs").exists()


def test_a_pipeline_is_written_below_runs_and_run(fake_slurm: FakeSlurm) -> None:
    stdout = fake_slurm.submit("road=demo", "cluster=slurm_cpu", "runs=elsewhere", "run=mine", "dry_run=true").stdout
    assert "elsewhere/mine/" in stdout
    assert not (fake_slurm.work_dir / "runs").exists()
    configs = {file.stem: file.read_text() for file in (fake_slurm.work_dir / "elsewhere").rglob("*.yaml")}
    assert not [name for name, text in configs.items() if "runs/demo" in text]
    trained = app.from_yaml(fake_slurm.work_dir / "elsewhere/mine/jobs/train_cpt.yaml", TrainConfig)
    assert (trained.run_dir, trained.model.path) == ("elsewhere/mine/cpt", "elsewhere/mine/expanded")
    assert trained.data.store == "elsewhere/mine/stores/cpt"
    assert trained.data.sources[0].path == "elsewhere/mine/corpus/zh.jsonl"


def test_the_newest_checkpoint_is_found_beyond_a_million_steps(tmp_path: Path) -> None:
    """A requeued job looks for newer checkpoints; `step-1000000` is newer than `step-999999`."""
    job = script.Job("r", "train", tmp_path, tmp_path / "config.yaml", tmp_path / "submit.sh")
    line = next(
        line for line in script.text(job, ClusterConfig(requeue=True)).splitlines() if line.startswith("saved=")
    )
    for step in (999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    completed = subprocess.run(["bash", "-c", f'{line}; echo "$saved"'], capture_output=True, text=True)
    assert completed.stdout.splitlines()[-1].endswith("step-1000000")

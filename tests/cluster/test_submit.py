"""What is written for Slurm and when nothing is; Slurm's commands are played by small scripts. The real ones:
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
if [ "$number" = "$(cat $FAKE/full_at 2>/dev/null)" ]; then cat $FAKE/says >&2; exit 1; fi
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
# What the job does is played too: it leaves with the code in `code`.
SRUN = """#!/bin/bash
echo "srun $@" >> $FAKE/calls
exit $(cat $FAKE/code)
"""


class Fake:
    def __init__(self, folder: Path, verb) -> None:
        self.folder, self._verb = folder / "fake", verb
        self.work = folder
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
def fake(verb, tmp_path: Path, base_tokenizer: Path, encoder) -> Fake:
    shutil.copytree(base_tokenizer, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    document = Example(np.arange(50), ((0, 50),), 100, is_document=True)
    write_store(tmp_path / "store", {"zh": [document] * 3}, tokenizer=encoder.fingerprint())
    return Fake(tmp_path, verb)


TRAIN = ["verb=train", "run=cpt", "model=./base", "data=./store", "optim.steps=10", "global_batch_size=32"]


def test_a_training_is_frozen_and_submitted(fake: Fake) -> None:
    shown = fake.submit(
        *TRAIN, "cluster.nodes=4", "cluster.partition=gpu", "cluster.sbatch=--exclusive --comment=mine"
    ).stdout
    assert shown.splitlines()[0].startswith("cpt: job 1, runs/cpt/submit.sh, output in runs/cpt/logs/slurm-cpt-1.log")
    frozen = app.from_yaml(fake.work / "runs/cpt/config.yaml", TrainConfig)
    assert (frozen.run, frozen.data.store, frozen.optim.steps) == ("cpt", "./store", 10)
    text = (fake.work / "runs/cpt/submit.sh").read_text()
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
    assert f"chdir={fake.work}" in options
    assert not [option for option in options if "$" in option]
    assert "launch/train.py --config runs/cpt/config.yaml" in text
    assert (fake.folder / "tried").read_text() == text


def test_a_dry_run_needs_no_slurm_and_queues_nothing(verb, fake: Fake) -> None:
    shown = verb("submit", *TRAIN, "dry_run=true").stdout
    assert (fake.work / "runs/cpt/submit.sh").read_text() in shown
    assert fake.calls == []
    assert not (fake.work / "runs/cpt/jobs.json").exists()


def test_submitting_imports_no_torch(fake: Fake) -> None:
    code = f"""
import sys
sys.argv = ["submit.py", *{TRAIN!r}, "dry_run=true"]
sys.modules["torch"] = None
import runpy
runpy.run_path({str(ROOT / "launch" / "submit.py")!r}, run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", code], cwd=fake.work, check=True, capture_output=True)
    assert (fake.work / "runs/cpt/submit.sh").exists()


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
def test_a_failed_check_never_reaches_the_queue(fake: Fake, arguments: list[str], expected: str) -> None:
    done = fake.submit(*arguments, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert fake.calls == []
    assert not (fake.work / "runs").exists()


def test_a_run_that_has_begun_otherwise_is_refused(fake: Fake) -> None:
    fake.submit(*TRAIN)
    (fake.work / "runs/cpt/metrics.jsonl").write_text('{"step": 1}\n')
    before = fake.calls
    done = fake.submit(*TRAIN, "seed=7", check=False)
    assert "was started with another configuration (seed: 42 -> 7)" in done.stderr
    assert [call for call in fake.calls[len(before) :] if "parsable" in call] == []
    fake.submit(*TRAIN, "optim.steps=20")


@pytest.mark.parametrize(
    ("says", "remedy"),
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
def test_when_a_later_job_is_refused_none_is_left(fake: Fake, says: str, remedy: str) -> None:
    (fake.folder / "full_at").write_text("3")
    (fake.folder / "says").write_text(says)
    done = fake.submit("road=demo", "cluster=slurm_cpu", "cluster.nodes=2", check=False)
    assert done.returncode == 2
    assert says.splitlines()[0].removeprefix("sbatch: error: ") in done.stderr
    assert remedy in done.stderr
    assert [call for call in fake.calls if call.startswith("scancel")] == ["scancel 1 2"]
    assert [file for file in (fake.work / "runs").rglob("*") if file.is_file()] == []


def test_a_job_whose_number_was_lost_is_taken_back_too(fake: Fake) -> None:
    (fake.folder / "full_at").write_text("1")
    (fake.folder / "says").write_text("sbatch: error: Socket timed out on send/recv operation")
    script = fake.work / "runs/cpt/submit.sh"
    (fake.folder / "later").write_text(f"7 {script} 1\n8 /elsewhere/submit.sh 1\n9 {script}.old\n")
    sbatch = fake.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("cat $FAKE/says", "cp $FAKE/later $FAKE/queue; cat $FAKE/says"))
    assert fake.submit(*TRAIN, check=False).returncode == 2
    assert "scancel 7" in fake.calls
    assert not script.exists()


def test_a_job_that_nobody_noted_is_not_queued_again(fake: Fake) -> None:
    (fake.folder / "queue").write_text(f"7 {fake.work / 'runs/cpt/submit.sh'} 1\n")
    done = fake.submit(*TRAIN, check=False)
    assert "runs/cpt: submitted already, as job 7. Wait for it, or `scancel 7`" in done.stderr
    assert not [call for call in fake.calls if "parsable" in call]


def test_jobs_that_cannot_be_taken_back_stay_known(fake: Fake) -> None:
    (fake.folder / "full_at").write_text("3")
    (fake.folder / "says").write_text("sbatch: error: Unable to contact slurm controller")
    (fake.folder / "scancel").write_text("#!/bin/bash\necho 'scancel: error: Socket timed out' >&2; exit 1\n")
    done = fake.submit("road=demo", "cluster=slurm_cpu", check=False)
    assert done.returncode == 2
    assert "Unable to contact slurm controller" in done.stderr
    assert "jobs 1, 2 may still be queued. `scancel 1 2` when Slurm answers again" in done.stderr
    records = json.loads((fake.work / "runs/demo/jobs.json").read_text())
    assert [record["id"] for record in records] == ["1", "2"]


def test_leftovers_of_another_job_reach_no_new_one(fake: Fake) -> None:
    sbatch = fake.folder / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("echo", "env >> $FAKE/environment; echo", 1))
    fake.variables |= {
        "SLURM_CPUS_PER_TASK": "3",
        "SBATCH_PARTITION": "old",
        "RANK": "0",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    fake.submit(*TRAIN)
    passed = (fake.folder / "environment").read_text()
    assert "SLURM_CONF=" in passed
    assert not re.search(r"^(SLURM_CPUS_PER_TASK|SBATCH_PARTITION|RANK)=", passed, re.MULTILINE)


def test_a_dry_run_leaves_the_files_of_an_active_job(fake: Fake) -> None:
    fake.submit(*TRAIN)
    (fake.folder / "scontrol").write_text("#!/bin/bash\necho JobId=1 JobState=PENDING Reason=None\n")
    before = (fake.work / "runs/cpt/config.yaml").read_text()
    done = fake.submit(*TRAIN, "optim.lr=1e-3", "dry_run=true", check=False)
    assert "submitted already: cpt (job 1, PENDING)" in done.stderr
    assert (fake.work / "runs/cpt/config.yaml").read_text() == before


def test_spaces_and_gres_are_written_as_slurm_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "my runs"
    place.mkdir()
    monkeypatch.chdir(place)
    cluster = ClusterConfig(partition="gpu", cpu_partition="cpu", sbatch="--gres=gpu:8 --exclusive", gpus_per_node=8)
    train = script.text(_job_of("train", "cpt", Path("runs/cpt"), Path("runs/cpt")), cluster)
    assert f'#SBATCH --chdir="{place}"\n' in train
    assert "#SBATCH --partition=gpu\n" in train
    assert "#SBATCH --gres=gpu:8\n" in train
    assert "gpus-per-node" not in train
    prepare = script.text(_job_of("prepare", "prepare", Path("runs/cpt"), None), cluster)
    assert "#SBATCH --partition=cpu\n" in prepare
    assert "--gres" not in prepare
    assert "#SBATCH --exclusive\n" in prepare


def test_a_road_is_chained_by_success(fake: Fake) -> None:
    fake.submit("road=demo", "cluster=slurm_cpu", "cluster.nodes=2")
    queued = [call for call in fake.calls if "parsable" in call]
    records = json.loads((fake.work / "runs/demo/jobs.json").read_text())
    assert len(queued) == len(records) == 19
    assert "--dependency" not in queued[0]
    assert all(
        f"--dependency=afterok:{place} --kill-on-invalid-dep=yes" in call for place, call in enumerate(queued[1:], 1)
    )
    by_name = {record["name"]: Path(fake.work / record["script"]).read_text() for record in records}
    assert "#SBATCH --nodes=2\n" in by_name["train_cpt"]
    assert "#SBATCH --nodes=1\n" in by_name["export_cpt"]


def test_without_sbatch_the_remedy_is_named(verb, fake: Fake) -> None:
    done = verb("submit", *TRAIN, check=False, env={"PATH": str(Path(sys.executable).parent)})
    assert "there is no sbatch on the path. Submit from a login node" in done.stderr
    assert not (fake.work / "runs").exists()


def test_a_queue_that_does_not_answer_is_given_up(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "#!/bin/bash\n"
        "echo 'sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying' >&2\n"
        "exec sleep 60\n"
    )
    (fake.folder / "sbatch").write_text(text)
    monkeypatch.setenv("PATH", fake.variables["PATH"])
    monkeypatch.setattr(slurm, "_PATIENCE", 0.5)
    with pytest.raises(
        UserError, match=r"no answer within 0 s \(Slurm temporarily unable.*\)\. The queue accepts no more of your jobs"
    ):
        slurm.submit(Path("x.sh"))


def _job_of(verb: str, name: str, folder: Path, run_dir: Path | None) -> script.Job:
    config = "{hardware: {start_timeout_minutes: 10}, recovery: {heartbeat_seconds: 60}}"
    return submission.plan_job(verb, name, folder, run_dir, config).job


def _job(folder: Path, **keys) -> Path:
    cluster = ClusterConfig(gpu="cpu", **keys)
    job = _job_of("train", "cpt", folder, folder)
    (folder / "logs").mkdir(exist_ok=True)
    path = folder / "submit.sh"
    path.write_text(script.text(job, cluster))
    return path


def _start(
    fake: Fake, path: Path, code: int, step: int | None, place: int = 1, restarts: int = 0
) -> "subprocess.CompletedProcess[str]":
    (fake.folder / "code").write_text(str(code))
    if step is not None:
        (path.parent / "status.json").write_text(json.dumps({"step": step, "exit_code": code}, indent=2))
        (path.parent / f"checkpoints/step-{step:06d}").mkdir(parents=True, exist_ok=True)
    environment = os.environ | fake.variables | {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": str(restarts)}
    words = ["bash", str(path), str(place)]
    return subprocess.run(words, env=environment, cwd=path.parent, capture_output=True, text=True)


def _put_back(fake: Fake) -> int:
    return fake.calls.count("scontrol requeue 5")


@pytest.mark.parametrize(("code", "put_back"), [(0, 0), (2, 0), (76, 0), (75, 1), (1, 1), (137, 1)])
def test_the_script_puts_back_what_can_go_on(fake: Fake, code: int, put_back: int) -> None:
    assert _start(fake, _job(fake.work), code, 10).returncode == code
    assert _put_back(fake) == put_back


def test_a_code_that_was_left_is_told_when_slurm_has_forgotten_the_job(fake: Fake) -> None:
    path = _job(fake.work)
    _start(fake, path, 2, None)
    record = submission.JobRecord("cpt", "export", "7", str(fake.work), str(path), "a.log", 0)
    states = {"7": JobState("gone")}
    assert job_status.status([record], states) == "cpt: job 7 gone; no longer known to Slurm; exited with code 2"


@pytest.mark.parametrize("step", [10, None])
def test_a_job_that_gets_no_further_is_given_up(fake: Fake, step: int | None) -> None:
    path = _job(fake.work, max_failures=2)
    found = [_start(fake, path, 1, step, restarts=restarts).stdout for restarts in range(3)]
    assert "3 times in a row without a newer checkpoint: not requeued" in found[-1]
    assert _put_back(fake) == 2
    if step:
        _start(fake, path, 1, step + 1, restarts=3)
        assert _put_back(fake) == 3
    # Submitted again, it begins to count anew.
    _start(fake, path, 1, step)
    assert _put_back(fake) == (4 if step else 3)


def test_a_later_job_of_a_chain_does_nothing_after_the_end(fake: Fake) -> None:
    path = _job(fake.work, requeue=False, chain=3)
    assert _start(fake, path, 75, 10).returncode == 75
    assert _start(fake, path, 0, 20, place=2).returncode == 0
    started = len([call for call in fake.calls if call.startswith("srun")])
    done = _start(fake, path, 0, 20, place=3)
    assert (done.returncode, "exited with code 0: nothing to do" in done.stdout) == (0, True)
    assert len([call for call in fake.calls if call.startswith("srun")]) == started
    assert _put_back(fake) == 0


def test_a_chain_heeds_only_what_its_own_jobs_left(fake: Fake) -> None:
    path = _job(fake.work, requeue=False, chain=3)
    assert _start(fake, path, 0, 20).returncode == 0
    # Given again for more steps; its first job loses its node.
    srun = (fake.folder / "srun").read_text()
    (fake.folder / "srun").write_text("#!/bin/bash\nkill -9 $PPID\n")
    assert _start(fake, path, 0, 20).returncode == -9
    (fake.folder / "srun").write_text(srun)
    done = _start(fake, path, 75, 30, place=2)
    assert (done.returncode, done.stdout) == (75, "")
    assert path.with_suffix(".code").read_text() == "75\n"


def test_ranks_are_waited_for_as_long_as_they_wait_for_each_other(fake: Fake) -> None:
    fake.submit(*TRAIN, "hardware.start_timeout_minutes=30")
    assert "srun --wait=1980 \\\n" in (fake.work / "runs/cpt/submit.sh").read_text()


def test_containers_modules_and_variables_stand_in_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"image": "ours.sqsh", "mounts": ["/data:/data"], "modules": "cuda/12.6", "setup": ["source env.sh"]}
    job = _job_of("train", "cpt", Path("runs/cpt"), Path("runs/cpt"))
    pyxis = script.text(job, ClusterConfig(container=script.Container.pyxis, environment={"A": "b c"}, **common))
    mounts = f"{tmp_path}:{tmp_path},{ROOT}:{ROOT},/data:/data"
    assert (
        f"--container-image=ours.sqsh --container-mounts={mounts} --container-workdir={tmp_path} \\\n  python " in pyxis
    )
    assert "module load cuda/12.6\nsource env.sh\nexport A='b c'\n" in pyxis
    assert "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}\n" in pyxis
    assert "OMP_NUM_THREADS=$" not in script.text(job, ClusterConfig(environment={"OMP_NUM_THREADS": "8"}))
    apptainer = script.text(job, ClusterConfig(container=script.Container.apptainer, **common))
    assert f"apptainer exec --nv --bind {mounts} --pwd {tmp_path} ours.sqsh \\\n  python " in apptainer


@pytest.mark.parametrize(
    ("time", "seconds"), [("1:30", 90), ("02:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("", 0)]
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
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
def test_how_a_job_stands_is_told_in_words(state: JobState, expected: str) -> None:
    record = submission.JobRecord("export", "export", "7", "runs/a", "a.sh", "a.log", 0)
    assert job_status.status([record], {"7": state}) == f"export: job 7 {expected}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.tokenizer=./other"], "data.store=./store: made with another tokenizer"),
        (["data.weights.en=1"], "data.weights.en: the store store has no such domain. It has: zh"),
        (["seq_len=8192"], "seq_len=8192: the model has 4096 positions"),
        (["data=./base"], "data.store=base: no token store there"),
    ],
)
def test_what_training_would_refuse_of_its_inputs_is_never_queued(fake: Fake, changes: list[str], said: str) -> None:
    sentencepiece_base(fake.work / "other", vocab_size=350)
    done = fake.submit(*TRAIN, *changes, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert fake.calls == []
    assert not (fake.work / "runs").exists()


def test_a_road_goes_where_runs_and_run_say(fake: Fake) -> None:
    shown = fake.submit("road=demo", "cluster=slurm_cpu", "runs=elsewhere", "run=mine", "dry_run=true").stdout
    assert "elsewhere/mine/" in shown
    assert not (fake.work / "runs").exists()
    configs = {file.stem: file.read_text() for file in (fake.work / "elsewhere").rglob("*.yaml")}
    assert not [name for name, text in configs.items() if "runs/demo" in text]
    trained = app.from_yaml(fake.work / "elsewhere/mine/jobs/train_cpt.yaml", TrainConfig)
    assert (trained.run_dir, trained.model.path) == ("elsewhere/mine/cpt", "elsewhere/mine/expanded")
    assert trained.data.store == "elsewhere/mine/stores/cpt"
    assert trained.data.sources[0].path == "elsewhere/mine/corpus/zh.jsonl"


def test_the_newest_of_more_than_a_million_steps_is_taken_for_the_newest(tmp_path: Path) -> None:
    """A job that is put back looks for newer checkpoints; `step-1000000` is newer than `step-999999`."""
    job = script.Job("r", "train", tmp_path, tmp_path / "config.yaml", tmp_path / "submit.sh")
    line = next(
        line for line in script.text(job, ClusterConfig(requeue=True)).splitlines() if line.startswith("saved=")
    )
    for step in (999_999, 1_000_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    done = subprocess.run(["bash", "-c", f'{line}; echo "$saved"'], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].endswith("step-1000000")

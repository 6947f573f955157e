"""Several processes: the same losses as one, on one host and as two; what they write and read together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_stages import smoke_params

from xdistil import losses, processes, stages
from xdistil.runs import STAGES, Run
from xdistil.targets import PAGE, Targets, lay_out

EXACT = {"opt_policy": "float32", "device": "cpu", "dropout": 0.0, "unfreeze": "none", "student_distil_batch_size": 3,
         "student_ft_batch_size": 3, "distil_epochs": 3, "ft_epochs": 3, "patience": 9, "attention_loss": "kl"}
TRAINED = ("hidden", "logits", "labels")


def test_every_row_is_for_one_process_and_where_none_is_left_one_stands_in(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    rows, found = np.array([7, 5, 4, 2]), []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found.append(processes.own_part(rows))
        assert processes.own_part(rows[:2])[1] == (rank < 2)
    assert sorted(np.concatenate([own for own, _ in found])) == sorted(rows) and all(counts for _, counts in found)
    with processes.alone():
        assert processes.own_part(rows)[0] is not None and processes.size() == 1 and processes.rank() == 0


MASKED = {"hidden_mse": (3,), "hidden_cosine": (3,), "logit_mse": (3,), "logit_kl": (3,), "relation_kl": (3, 4)}


@pytest.mark.parametrize("name", [*MASKED, "attention_mse", "attention_kl", "tag_loss"])
def test_the_mean_of_the_losses_of_unequal_parts_is_the_loss_of_the_whole(name):
    rng = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([6, 5, 3, 2])[:, None]).long()
    shape = (2, 6, 6) if name.startswith("attention") else (6, *MASKED.get(name, (3,)))
    student, teacher = (torch.rand(4, *shape, generator=rng).softmax(-1).requires_grad_() for _ in range(2))
    tags = torch.randint(0, 3, (4, 6), generator=rng).where(mask > 0, losses.IGNORED)

    def loss(rows):
        pair = (student[rows], tags[rows]) if name == "tag_loss" else (student[rows], teacher[rows], mask[rows])
        return getattr(losses, name)(*pair)

    whole = loss(slice(None))
    parts, counts = [slice(0, 1), slice(1, 4)], []
    with losses.shared_out(lambda count: counts.append(count) or count):
        for part in parts:
            loss(part)
    with losses.shared_out(lambda count: sum(counts).float() / len(parts)):
        shared = sum(loss(part) for part in parts) / len(parts)
    assert shared.item() == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x, student)[0] for x in (shared, whole)), atol=1e-7)


def test_processes_write_to_pages_of_their_own_and_read_what_all_wrote():
    lengths = np.array([3, 1, 2, 4])
    parts = [np.array([3, 1]), np.array([0, 2])]
    (starts, n), (corners, _), (rows, n_rows) = lay_out(lengths, parts)
    assert starts.tolist() == [PAGE, 4, PAGE + 3, 0] and n == PAGE + 5 and n_rows == PAGE + 2
    assert corners.tolist() == [PAGE, 16, PAGE + 9, 0] and rows.tolist() == [PAGE, 1, PAGE + 1, 0]
    assert [(x.tolist(), end) for x, end in lay_out(lengths)][0] == ([0, 3, 4, 6], 10)
    targets = Targets(lengths, {"logits": torch.zeros(n, 2)}, parts=parts)
    said = torch.rand(4, 4, 2)
    for own in parts:
        targets.put(own, {"logits": said[own]})
    found = targets.padded(np.arange(4), 4)["logits"]
    assert all(torch.equal(found[i, :size], said[i, :size]) for i, size in enumerate(lengths))


def history(run, name):
    return run.stage(name).history


def assert_same_curves(one, two):
    for name in TRAINED:
        pairs = list(zip(history(one, name), history(two, name), strict=True))
        assert pairs[-1][0]["update"] >= 50
        for a, b in pairs:
            assert a.keys() == b.keys()
            assert [b[key] for key in a] == pytest.approx(list(a.values()), abs=1e-5)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A teacher and a student that have not begun to learn, and the same after one process taught it."""
    folder = tmp_path_factory.mktemp("processes")
    run = Run(params := smoke_params(folder / "one", **EXACT))
    for name in ("teacher", "student-init"):
        getattr(stages, STAGES[name])(params, run)
    shutil.copytree(folder / "one", folder / "two")
    for name in TRAINED:
        getattr(stages, STAGES[name])(params, run)
    return run, folder / "two"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(root, **names):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": path, **names}


SRUN = """#!/bin/bash
shift  # its own option
for i in 0 1; do SLURM_NODEID=$i "$@" > "$SAID$i" 2>&1 & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit ${status:-0}
"""


@pytest.mark.slow
def test_two_hosts_have_the_loss_curve_of_one_process(started, tmp_path, root):
    one, folder = started
    params = smoke_params(folder, **EXACT)
    (tmp_path / "params.json").write_text(json.dumps(params.model_dump()))
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    names = environment(root, SLURM_NNODES="2", SLURM_JOB_NODELIST="a,b", PER_HOST="1", MASTER_PORT=free_port(),
                        SAID=str(tmp_path / "host"))
    names["PATH"] = f"{tmp_path}{os.pathsep}{names['PATH']}"
    done = subprocess.run(["bash", "docs/slurm.sh", str(tmp_path / "params.json")], cwd=root, env=names, timeout=500)
    said = [(tmp_path / f"host{i}").read_text() for i in range(2)]
    assert done.returncode == 0, said
    assert "[logits] finished" in said[0] and "finished" not in said[1]  # the first one writes and speaks
    two = Run(params)
    assert_same_curves(one, two)
    asked = [run.stage("hidden").metrics["teacher_windows"] for run in (one, two)]
    assert asked[1] - asked[0] < 0.2 * asked[0]  # each asked for its own part (and some stood in)
    assert two.stage("student").done and two.stage("evaluation").metrics["student"]["test"]["sentences"] == 24
    assert not [path for path in two.dir.rglob("*.tmp")]


@pytest.mark.slow
def test_the_pods_of_the_kubernetes_job_find_each_other(started, tmp_path, root):
    one, _ = started
    shutil.copytree(one.dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "labels")
    (tmp_path / "params.json").write_text(json.dumps(smoke_params(tmp_path / "run", **EXACT).model_dump()))
    _, job = yaml.safe_load_all((root / "docs/kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    names = {x["name"]: x["value"] for x in container["env"]} | {
        "PARAMS": str(tmp_path / "params.json"), "PER_HOST": "1", "MASTER_ADDR": "127.0.0.1"}
    pods = []
    for index in range(job["spec"]["completions"]):
        command = container["command"]
        for name, value in (names | {"JOB_COMPLETION_INDEX": str(index)}).items():
            command = [part.replace(f"$({name})", value) for part in command]
        assert not any("$(" in part for part in command)
        command[command.index("--master-port=29500")] = f"--master-port={names.setdefault('PORT', free_port())}"
        pods.append(subprocess.Popen([*command, "labels"], env=environment(root), cwd=root, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [pod.communicate(timeout=500)[0] for pod in pods]  # which closes them
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert Run(smoke_params(tmp_path / "run", **EXACT)).stage("labels").done


@pytest.mark.slow
def test_a_stage_runs_in_processes_of_its_own_and_what_they_say_is_passed_on(started, tmp_path, capsys):
    one, _ = started
    shutil.copytree(one.dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "labels")
    params = smoke_params(tmp_path / "run", num_processes=2, **EXACT)
    stages.finetune_student(params, run := Run(params))
    assert "[labels] finished" in capsys.readouterr().out
    pairs = zip(history(one, "labels"), history(run, "labels"), strict=True)
    assert all(b.get("loss", 0) == pytest.approx(a.get("loss", 0), abs=1e-5) for a, b in pairs)
    stages.finetune_student(params, run)
    assert "done before" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="^hidden needs stage teacher: it has not finished; run finetune_teacher"):
        processes.launch(smoke_params(tmp_path / "empty", **EXACT).model_dump(), 2, "hidden")

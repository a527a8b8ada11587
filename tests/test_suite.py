"""Suites. Without these the arms of a table could learn from teachers of their own, a run could be trained twice or not
at all, and a mistake in the last arm would be found when the others had been trained for weeks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO, run_python
from test_sdakd import lists, rows, settings, write  # noqa: F401

from sdtrain import cli
from sdtrain.commands import report
from sdtrain.commands.relay import Relay
from sdtrain.commands.suite_slots import shares
from sdtrain.config.load import load_config
from sdtrain.config.suite import Suite, read_suite
from sdtrain.engine.starts import last_start
from sdtrain.errors import ConfigError
from sdtrain.files import sha256_of_file

SUITES = sorted((REPO / "configs" / "suites").glob("*.yaml"))
TEACHER = ("teacher.generator", "teacher.discriminator")

FORKED = """
import contextlib, importlib, io, json, os, signal, sys, time, types
sys.path.insert(0, "tests")
import tiny
from sdtrain import cli
from sdtrain.commands import relay
from sdtrain.main import main
from sdtrain.trainer import Trainer
FILE, OUT = sys.argv[1:]
tiny.warm_up()
for name in ("methods.sdakd.build", "tasks.restoration", "models.rrdbnet.networks", "models.unet_sn.networks"):
    importlib.import_module("sdtrain." + name)
advance = Trainer.advance
def interrupted(run, chunks):
    advance(run, chunks)
    if run.step == 2:
        os.kill(os.getppid(), signal.SIGTERM)
        while not run.stop.signal:
            time.sleep(0.01)
class Forked:
    def __init__(self, command, **_):
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                if not codes and OUT in command:
                    Trainer.advance = interrupted
                code = main(command[2:])
            finally:
                sys.stdout.flush()
                os._exit(code)
    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
relay.subprocess = types.SimpleNamespace(Popen=Forked)
codes, found = [], []
for action in ("run", "status", "run", "run"):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        codes.append(cli.main(["suite", action, FILE]))
    found.append({"code": codes[-1], "said": said.getvalue(), "starts": {}})
    for name in ("teacher", "half-seed0", "judged-seed0"):
        file = os.path.join(OUT, os.pardir, name, "environment.json")
        found[-1]["starts"][name] = len(json.load(open(file))["starts"]) if os.path.exists(file) else 0
print(json.dumps(found))
"""

PRETENDED = """
import argparse, json, os, sys, time
from pathlib import Path
from sdtrain.config.compare import dump
from sdtrain.config.load import load_config
from sdtrain.main import add_arguments
parser = argparse.ArgumentParser()
add_arguments(parser)
args = parser.parse_args(sys.argv[2:])
out = Path(args.out)
with open("CALLS", "a") as calls:
    calls.write(out.name + "\\n")
if out.name == "FAILS":
    sys.exit("sdtrain: the disk is full")
if out.name == "LINGERS":
    os.kill(os.getppid(), __import__("signal").SIGTERM)
    time.sleep(60)
out.mkdir(parents=True, exist_ok=True)
(out / "config.yaml").write_text(dump(load_config(args.cfg, args.set)))
(out / "metrics.jsonl").write_text('{"kind": "train", "seen_img": 4, "stage": "main", "G/loss": 1.0}\\n')
if out.name != "STOPS":
    (out / "environment.json").write_text(json.dumps({"starts": [{"finished": "now", "weights": {}}]}))
"""


@pytest.fixture
def cfg(lists, tmp_path) -> str:  # noqa: F811
    return write(tmp_path / "cfg", settings(lists, lambda_2=0.1, sd={"alpha": 0.0}))


def suite_file(tmp_path: Path, **tree: Any) -> str:
    path = tmp_path / "table.yaml"
    path.write_text(json.dumps({"out": str(tmp_path / "out"), **tree}))
    return str(path)


def small(cfg: str, **more: Any) -> dict[str, Any]:
    """A teacher, an arm that learns from it, and one that needs none."""
    arms = {"half": {"cfg": cfg}, "naive": {"cfg": cfg, "set": {"stages": ["naive"]}}}
    return {"teacher": {"cfg": cfg, "set": {"stages": ["teacher"]}}, "runs": arms, **more}


def program(tmp_path: Path, text: str, **words: str) -> str:
    """A launcher: Python on a text in which capital words are replaced."""
    for word, value in words.items():
        text = text.replace(word, value)
    path = tmp_path / "launcher.py"
    path.write_text(text)
    return shlex.join([sys.executable, str(path)])


def pretended(tmp_path: Path, **words: str) -> str:
    return program(tmp_path, PRETENDED, CALLS=str(tmp_path / "calls"), **words)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().split() if path.exists() else []


def given(suite: Suite, name: str) -> dict[str, str]:
    member = next(member for member in suite.members if member.out.name == name)
    return dict(override.split("=", 1) for override in member.overrides)


# What is asked of each run


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_shipped_suite_loads_with_all_its_arms(path: Path):
    suite = read_suite(path.stem)
    assert suite.name == path.stem and suite.out == Path("runs/suites") / path.stem
    assert path.read_text().startswith("# ")
    assert all(load_config(member.cfg, member.overrides) == member.config for member in suite.members)


def test_the_suites_of_sdakd_have_the_arms_of_the_papers_tables():
    for name, taught in (("sdakd_gcfsr", 9), ("sdakd_realesrgan", 0)):
        suite = read_suite(name)
        widths = [arm.config.student.C for arm in suite.arms if "ablation" not in arm.arm]
        assert [widths.count(C) for C in ("1/2", "1/4", "1/8")] == [7, 4, 4]
        assert sum(arm.taught for arm in suite.arms) == taught
        teachers = [arm.config.teacher for arm in suite.arms if arm.config.method == "sdakd"]  # others train their own
        files = {(teacher.generator, teacher.discriminator) for teacher in teachers}
        assert len(files - {(None, None)}) == 1


def test_figure_5_of_sd_gan_has_three_seeds_an_arm():
    suite = read_suite("sdgan_ablation")
    assert [member.out.name for member in suite.arms[::6]] == ["baseline-seed0", "baseline-seed1", "baseline-seed2"]
    assert {arm.config.seed for arm in suite.arms} == {0, 1, 2} and len(suite.arms) == 18


def test_the_teacher_is_handed_to_the_arms_that_learn_from_one_and_to_no_other(cfg, tmp_path):
    suite = read_suite(suite_file(tmp_path, **small(cfg)))
    teacher = str(tmp_path / "out" / "teacher")
    assert [member.out.name for member in suite.members] == ["teacher", "half-seed0", "naive-seed0"]
    assert [json.loads(given(suite, "half-seed0")[key]) for key in TEACHER] == [teacher, teacher]
    assert not set(TEACHER) & set(given(suite, "naive-seed0")) and suite.arms[1].config.teacher.generator is None
    assert (suite.arms[0].taught, suite.arms[1].taught) == (True, False)


def test_later_keys_win_over_earlier_ones_and_the_typed_ones_over_all(cfg, tmp_path):
    tree = small(cfg, set={"lambda_1": 0.25, "log_img": 8})
    tree["runs"]["half"]["set"] = {"lambda_1": 0.5, "sd": {"loss": "l1"}}
    suite = read_suite(suite_file(tmp_path, **tree, seeds=[3, 5]), ["log_img=12"])
    assert [member.out.name for member in suite.arms] == ["half-seed3", "naive-seed3", "half-seed5", "naive-seed5"]
    half, naive = suite.arms[2:]
    assert (half.config.lambda_1, half.config.log_img, half.config.seed, half.config.sd.loss) == (0.5, 12, 5, "l1")
    assert (naive.config.lambda_1, naive.config.seed) == (0.25, 5)
    assert suite.teacher.config.lambda_1 == 0.25 and suite.teacher.config.seed == 0
    assert all(load_config(member.cfg, member.overrides) == member.config for member in suite.members)


def test_the_example_of_the_readme_is_a_suite(tmp_path):
    (tmp_path / "mine.yaml").write_text((REPO / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    suite = read_suite(str(tmp_path / "mine.yaml"))
    assert [member.out.name for member in suite.members[:3]] == ["teacher", "half-seed0", "naive-seed0"]
    assert [member.taught for member in suite.members] == [False, *[True, False] * 3]


def changed(**more: Any) -> Any:
    """A change of the small suite: keys at the top, or of the arm `half` in `half`."""

    def change(tree: dict[str, Any]) -> dict[str, Any]:
        tree["runs"]["half"] |= more.pop("half", {})
        return {name: value for name, value in (tree | more).items() if value is not None}

    return change


REFUSED = {
    "an unknown key": (changed(sedes=[1]), "unknown key 'sedes' (did you mean 'seeds'?)"),
    "an unknown key of an arm": (changed(half={"cgf": "x"}), "unknown key 'runs.half.cgf' (did you mean 'cfg'?)"),
    "no runs": (changed(runs={}), "runs is empty: name the arms of the table"),
    "no list of seeds": (changed(seeds=3), "key 'seeds' must be a list (each entry a whole number >= 0), not 3"),
    "seeds twice": (changed(seeds=[1, 1]), "seeds must list at least one seed, and each once"),
    "an arm called teacher": (
        changed(runs={"teacher": {"cfg": "dirac"}}),
        "'teacher' is the shared teacher's: take letters, digits, - and _, and not the word seed",
    ),
    "an arm that leaves the folder": (changed(runs={"../x": {"cfg": "dirac"}}), "'../x' cannot be the name of an arm"),
    "an arm named by a seed": (changed(runs={"a-seed1": {"cfg": "dirac"}}), "'a-seed1' cannot be the name of an arm"),
    "a seed in set": (changed(half={"set": {"seed": 1}}), "seeds of a suite are listed under seeds: take it out"),
    "a configuration that is not there": (
        changed(half={"cfg": "sdakd_gcfs"}),
        "configuration 'sdakd_gcfs' does not exist, as a path or in configs/ (did you mean 'sdakd_gcfsr'?)",
    ),
    "an arm with a wrong key": (
        changed(half={"set": {"lamda_1": 1}}),
        "run half: --set lamda_1=1: unknown key 'lamda_1' (did you mean 'lambda_1'?)",
    ),
    "a permission": (
        changed(set={"data.allow_pipe": True}),
        "would let this configuration run commands, so no file can give it",
    ),
    "an arm with its own teacher": (
        changed(half={"set": {"teacher.generator": "x.pth"}}),
        "run half names a teacher of its own (teacher.generator), and the suite has one for all: keep one",
    ),
    "an arm of another teacher": (
        changed(half={"set": {"model.generator.num_feat": 16}}),
        "run half describes another teacher than the suite's: model.generator.num_feat: 8 -> 16",
    ),
    "a teacher that is trained already": (
        changed(set={"teacher": {"generator": "x.pth", "discriminator": "y.pth"}}),
        "teacher.generator of the teacher's configuration names a trained one: let the arms name it",
    ),
    "a teacher for nobody": (
        changed(set={"stages": ["naive"]}),
        "no run of this suite learns from a teacher: take it out",
    ),
    "teachers of their own": (
        changed(teacher=None, seeds=[0, 1]),
        "half would train a teacher in every run, and differ by that too: add teacher: {cfg: ...}",
    ),
    "equations": (
        changed(half={"cfg": "dirac"}),
        "run half follows equations and is no training: start it with `sdtrain train`",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_suite_that_cannot_work_is_refused_in_a_sentence_with_its_place(what, cfg, tmp_path, monkeypatch, capsys):
    change, sentence = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    tree = change(small(cfg))
    if what == "a teacher for nobody":
        tree["teacher"]["set"] = {}
    for action in ("run", "status"):
        assert cli.main(["suite", action, suite_file(tmp_path, **tree)]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.startswith("sdtrain: table.yaml:")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--only", "hlaf"], "--only hlaf: table has teacher, half, naive (did you mean 'half'?)"),
        (["--set", "seed=3"], "--set seed=3: seeds of a suite are listed under seeds: take it out"),
        (["--set", "lamda_1=3"], "teacher: --set lamda_1=3: unknown key 'lamda_1' (did you mean 'lambda_1'?)"),
        (["--launcher", "'"], "--launcher ': No closing quotation; write it as in a shell"),
        (["--launcher", ""], '--launcher is empty: write it as "accelerate launch --config_file FILE"'),
        (["--launcher", "/no/such"], "/no/such cannot be started (No such file or directory); see --launcher"),
        (["--launcher", "true"], "ended well without training; see --launcher"),
        (["--out", "/proc/nowhere"], "/proc/nowhere cannot be written (No such file or directory)"),
        (["--set", "data.train=/nowhere"], "/nowhere"),
        (["--set", "weights.alex=gone.pth", "--set", "validation.names=[psnr_y, lpips]"], "alex weights"),
    ],
)
def test_a_command_that_cannot_work_is_refused_in_a_sentence(words, sentence, cfg, tmp_path, capsys):
    assert cli.main(["suite", "run", suite_file(tmp_path, **small(cfg)), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_suite_that_does_not_exist_is_named_with_the_nearest_one(capsys):
    assert cli.main(["suite", "run", "sdakd_gcfs"]) == 2
    sentence = "suite 'sdakd_gcfs' does not exist, as a path or in configs/suites/ (did you mean 'sdakd_gcfsr'?)"
    assert capsys.readouterr().err == f"sdtrain: {sentence}\n"
    with pytest.raises(ConfigError, match="did you mean 'sdakd_gcfsr'"):
        load_config("suites/sdakd_gcfs")  # not the suite


# Running


@pytest.fixture
def table(cfg, tmp_path, monkeypatch) -> list[str]:
    """The command of the small suite, without pictures."""
    monkeypatch.setattr(report, "draw", lambda *_: [])
    return ["suite", "run", suite_file(tmp_path, **small(cfg))]


def test_runs_follow_each_other_the_teacher_first_and_a_second_call_starts_none(table, tmp_path, capfd):
    launcher = ["--launcher", pretended(tmp_path)]
    assert cli.main([*table, *launcher]) == 0
    assert calls(tmp_path) == ["teacher", "half-seed0", "naive-seed0"]
    assert (tmp_path / "out" / "report.md").is_file()
    assert cli.main([*table, *launcher]) == 0
    assert len(calls(tmp_path)) == 3
    assert capfd.readouterr().out.count("has finished\n") == 3


def test_one_arm_brings_its_teacher_along_if_it_needs_one(table, tmp_path):
    launcher = ["--launcher", pretended(tmp_path)]
    assert cli.main([*table, *launcher, "--only", "naive"]) == 0
    assert calls(tmp_path) == ["naive-seed0"]
    assert cli.main([*table, *launcher, "--only", "half"]) == 0
    assert calls(tmp_path) == ["naive-seed0", "teacher", "half-seed0"]


def test_a_run_that_fails_ends_the_suite_with_its_code_and_the_next_call_begins_there(table, tmp_path, capfd):
    assert cli.main([*table, "--launcher", pretended(tmp_path, FAILS="half-seed0")]) == 1
    said = capfd.readouterr().err
    assert "sdtrain: the disk is full\n" in said
    assert "suite table: half-seed0 ended with code 1; 1 of 3 runs have finished; its last words say why; the" in said
    assert not (tmp_path / "out" / "report.md").exists()
    assert cli.main([*table, "--launcher", pretended(tmp_path)]) == 0
    assert calls(tmp_path) == ["teacher", "half-seed0", "half-seed0", "naive-seed0"]


MEETS = PRETENDED.replace(
    "out.mkdir(",
    """
if out.name != "teacher":  # it ends when the other one has begun
    print(out.name, "has", sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES"))
    (out.parent / f"{out.name}.begun").touch()
    while len(list(out.parent.glob("*.begun"))) < 2:
        time.sleep(0.01)
    if STOPPED:
        os.kill(os.getppid(), __import__("signal").SIGTERM)
        time.sleep(60)
out.mkdir(""",
)


def test_two_runs_at_once_share_cores_and_gpus_and_the_teacher_has_all_of_them(table, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    launcher = program(tmp_path, MEETS, CALLS=str(tmp_path / "calls"), STOPPED="False")
    assert cli.main([*table, "--jobs", "2", "--launcher", launcher]) == 0
    assert calls(tmp_path)[0] == "teacher" and sorted(calls(tmp_path)[1:]) == ["half-seed0", "naive-seed0"]
    logs = [(tmp_path / "out" / f"{name}-seed0.log").read_text() for name in ("half", "naive")]
    cores = sorted(os.sched_getaffinity(0))
    parts = ([cores[: len(cores) // 2], cores[len(cores) // 2 :]]) if len(cores) > 1 else [cores, cores]
    wanted = {f"has {part} {gpus}\n" for part, gpus in zip(parts, ("4", "5,6"), strict=True)}
    assert {log.split(" ", 1)[1] for log in logs} == wanted
    said = capfd.readouterr().out
    assert "half-seed0: finished, -\n" in said and "naive-seed0: finished, -\n" in said
    assert (tmp_path / "out" / ".lock").read_bytes() == b""
    assert sorted(os.sched_getaffinity(0)) == cores


def test_a_signal_reaches_all_runs_that_are_at_work(table, tmp_path, capfd):
    launcher = program(tmp_path, MEETS, CALLS=str(tmp_path / "calls"), STOPPED="True")
    assert cli.main([*table, "--jobs", "2", "--launcher", launcher]) == 75
    said = capfd.readouterr()
    assert all(f"{name}-seed0 ended with code 75; 1 of 3 runs have finished" in said.err for name in ("half", "naive"))
    assert f"naive-seed0: see {tmp_path / 'out' / 'naive-seed0.log'}\n" in said.out


def test_a_run_that_fails_lets_the_one_beside_it_end_and_no_other_begin(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: [])
    table = ["suite", "run", suite_file(tmp_path, **small(cfg, seeds=[0, 1]))]
    launcher = pretended(tmp_path, FAILS="half-seed0")
    assert cli.main([*table, "--jobs", "2", "--launcher", launcher]) == 1
    begun = calls(tmp_path)
    assert begun[0] == "teacher" and "half-seed0" in begun and len(begun) <= 4
    assert cli.main([*table, "--jobs", "3", "--launcher", pretended(tmp_path)]) == 0
    assert sorted(calls(tmp_path)[len(begun) :])[0] == "half-seed0" and len(calls(tmp_path)) == 6


@pytest.mark.parametrize(
    "things, parts, wanted", [("abcd", 2, ["ab", "cd"]), ("abc", 2, ["a", "bc"]), ("ab", 3, "aba")]
)
def test_what_is_shared_goes_to_all_and_where_it_is_less_two_have_the_same(things, parts, wanted):
    assert ["".join(part) for part in shares(things, parts)] == list(wanted)
    assert shares("", parts) == [()] * parts


def test_a_run_that_has_not_come_to_its_end_is_started_again(table, tmp_path, capsys):
    assert cli.main([*table, "--launcher", pretended(tmp_path, STOPS="half-seed0")]) == 2
    assert "ended well without training" in capsys.readouterr().err
    assert cli.main(["suite", "status", table[2]]) == 0
    assert [line.split(None, 2)[2].split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "finished",
        "stopped at 0 images",
        "not started",
    ]


def test_a_finished_run_that_is_asked_to_go_on_longer_is_started_again(table, tmp_path, capsys):
    launcher = ["--launcher", pretended(tmp_path)]
    assert cli.main([*table, *launcher]) == 0
    assert cli.main(["suite", "status", table[2], "--set", "total_img=400"]) == 0
    assert capsys.readouterr().out.count("finished, asked otherwise") == 3
    assert cli.main([*table, *launcher, "--set", "total_img=400"]) == 0
    assert len(calls(tmp_path)) == 6


def test_a_signal_is_passed_on_and_what_a_launcher_makes_of_it_becomes_75(table, tmp_path, capsys):
    assert cli.main([*table, "--launcher", pretended(tmp_path, LINGERS="half-seed0")]) == 75
    assert (
        "half-seed0 ended with code 75; 1 of 3 runs have finished; the same command goes on" in capsys.readouterr().err
    )


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_runs_lets_none_begin(number, code, tmp_path):
    with Relay() as relay:
        os.kill(os.getpid(), number)
        assert relay.run(["touch", str(tmp_path / "begun")], lock=0) == code
    assert not (tmp_path / "begun").exists()


def test_ctrl_c_reaches_a_run_once_and_a_second_one_again(tmp_path):
    counts = "import os, signal, time; seen = []; signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
    counts += "os.kill(os.getppid(), signal.SIGINT)\nwhile not seen: time.sleep(0.01)\n"
    counts += "time.sleep(0.2); assert len(seen) == 1; os.kill(os.getppid(), signal.SIGINT)\n"
    counts += "while len(seen) < 2: time.sleep(0.01)\nos._exit(75)"
    with Relay() as relay:
        assert relay.run([sys.executable, "-c", counts], lock=0) == 75


def test_ranks_that_outlive_their_launcher_are_waited_for(tmp_path):
    """`accelerate launch` of one process ends at a signal while its child still saves."""
    saves = f"import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), open({str(tmp_path)!r} + "
    saves += "'/saved', 'w'), exit(75)))\nimport os; os.kill(int(os.environ['SUITE']), signal.SIGTERM); time.sleep(60)"
    launch = "import os, subprocess, sys; os.environ['SUITE'] = str(os.getppid()); "
    launch += f"subprocess.Popen([sys.executable, '-c', {saves!r}]).wait()"
    with Relay() as relay:
        assert relay.run([sys.executable, "-c", launch], lock=0) == 75
    assert (tmp_path / "saved").exists()


def test_a_run_inherits_the_lock_so_that_it_outlives_a_suite_that_was_killed(tmp_path):
    with open(tmp_path / "lock", "w") as lock, Relay() as relay:
        assert relay.run([sys.executable, "-c", f"import os; os.fstat({lock.fileno()})"], lock.fileno()) == 0


def test_a_suite_at_work_is_not_started_twice_and_its_status_says_what_it_does(table, tmp_path, capsys):
    from sdtrain.commands.suite import locked

    suite = read_suite(table[2])
    with locked(suite) as lock:
        os.pwrite(lock, b"half-seed0", 0)
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    assert cli.main(table) == 2
    assert f"{tmp_path / 'out'} is at work, on half-seed0: wait for its end, or stop it" in capsys.readouterr().err
    assert cli.main(["suite", "status", table[2]]) == 0
    assert "half     0     running, saved at 0 images  -" in capsys.readouterr().out
    orphan.communicate(b"\n")
    assert cli.main(["suite", "status", table[2]]) == 0
    assert "running" not in capsys.readouterr().out


def test_the_plan_prints_the_commands_and_touches_nothing(table, tmp_path, capsys):
    assert cli.main([*table, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "teacher: not started" and lines[2] == "half-seed0: waits for teacher"
    assert f"main.py --cfg {tmp_path}/cfg/tiny.yaml --out {tmp_path}/out/half-seed0 --set " in lines[3]
    assert (
        cli.main([*table, "--plan", "--set", "weights.alex=gone.pth", "--set", "validation.names=[psnr_y, lpips]"]) == 2
    )
    assert capsys.readouterr().err.count("alex weights") == 1
    assert not (tmp_path / "out").exists()


SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> CALLS
[ -f REFUSE ] && { echo "sbatch: error: invalid account" >&2; exit 1; }
echo "$((100 + $(wc -l < CALLS)));cluster"
"""


@pytest.fixture
def queue(table, tmp_path, monkeypatch) -> list[str]:
    """The command that submits the small suite, with a stub in the place of sbatch."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    text = SBATCH.replace("CALLS", str(tmp_path / "calls")).replace("REFUSE", str(tmp_path / "refuse"))
    sbatch.write_text(text)
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(REPO)
    return ["suite", "submit", table[2], "--sbatch", "--nodes=2 --qos='a b'"]


def test_a_suite_is_submitted_a_job_a_run_and_arms_that_learn_wait_for_their_teacher(queue, tmp_path, capsys):
    assert cli.main(queue) == 0
    teacher, half, naive = (tmp_path / "calls").read_text().splitlines()
    out = tmp_path / "out"
    more = "--kill-on-invalid-dep=yes --nodes=2 --qos=a b slurm/fine_tune"
    name = f"--parsable --job-name=table-{{}} --dependency={{}} {more}"
    train = f".sh --cfg {tmp_path}/cfg/tiny.yaml --out {out}/"
    assert teacher.startswith(f"{name.format('teacher', 'singleton')}{train}teacher")
    assert half.startswith(name.format("half-seed0", "afterok:101,singleton") + train) and f'="{out}/teacher"' in half
    assert naive.startswith(name.format("naive-seed0", "singleton"))
    assert "job 102: table-half-seed0, after 101\njob 103: table-naive-seed0\n" in capsys.readouterr().out


def test_a_plan_of_jobs_submits_none_and_what_sbatch_refuses_is_said(queue, tmp_path, capsys, monkeypatch):
    assert cli.main([*queue, "--sbatch", "'"]) == 2 and "--sbatch ': No closing quotation" in capsys.readouterr().err
    assert cli.main([*queue, "--plan", "--only", "half"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "--dependency=afterok:ID-OF-THE-TEACHER,singleton" in lines[1]
    assert not calls(tmp_path)
    (tmp_path / "refuse").touch()
    assert cli.main(queue) == 2 and "was refused: sbatch: error: invalid account" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(queue) == 2 and "there is no slurm/fine_tune.sh here" in capsys.readouterr().err


def test_status_imports_no_torch_and_no_numpy():
    script = """
import sys
from sdtrain import cli
assert cli.main(["suite", "status", "sdakd_gcfsr"]) == 0
assert not {"torch", "numpy", "matplotlib"} & set(sys.modules)
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "half                      0     waits for teacher  -\n" in done.stdout


@pytest.fixture(scope="module")
def trained(lists, tmp_path_factory) -> dict[str, Any]:  # noqa: F811
    """A real teacher and two real students, one stopped in its second step; slow imports are made once, then forked."""
    folder = tmp_path_factory.mktemp("suite")
    cfg = write(folder / "cfg", settings(lists, lambda_2=0.1, **{n: "2 steps" for n in ("n1", "n2", "n3")}))
    arms = {"half": {"cfg": cfg}, "judged": {"cfg": cfg, "set": {"adversary": "teacher"}}}
    file = suite_file(folder, teacher={"cfg": cfg, "set": {"stages": ["teacher"]}}, runs=arms)
    done = run_python("-c", FORKED, file, str(folder / "out" / "half-seed0"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {"file": file, "out": folder / "out", "said": done.stderr, "calls": json.loads(done.stdout)}


def test_a_suite_that_is_stopped_goes_on_where_it_was_and_trains_nothing_twice(trained):
    stopped, status, done, again = trained["calls"]
    assert [call["code"] for call in trained["calls"]] == [75, 0, 0, 0]
    assert "half-seed0 ended with code 75; 1 of 3 runs have finished; the same command goes on there" in trained["said"]
    lines = status["said"].splitlines()
    assert lines[1].startswith("teacher  0     finished                   psnr_y ")
    assert lines[2].startswith("half     0     stopped at 8 of 16 images ")
    assert lines[3] == "judged   0     not started                -"
    assert stopped["starts"] == {"teacher": 1, "half-seed0": 1, "judged-seed0": 0}
    assert done["starts"] == again["starts"] == {"teacher": 1, "half-seed0": 2, "judged-seed0": 1}
    assert "going on at 8 from" in trained["said"] and again["said"].count("has finished\n") == 3


def test_both_arms_learn_from_the_one_teacher(trained):
    out, weights = trained["out"], {}
    assert {row["stage"] for row in rows(out / "teacher")} == {"teacher_pixel", "teacher"}
    for name in ("half-seed0", "judged-seed0"):
        assert {row["stage"] for row in rows(out / name)} == {"supervised", "adversarial"}
        weights[name] = {key: last_start(out / name)["weights"][key] for key in TEACHER}
    assert weights["half-seed0"] == weights["judged-seed0"]
    for key, file in zip(TEACHER, ("teacher_G", "teacher_last_D"), strict=True):
        path = out / "teacher" / "best" / f"{file}.safetensors"
        assert weights["half-seed0"][key] == {"place": str(path), "sha256": sha256_of_file(path)}


def test_the_table_at_the_end_is_the_report_of_all_runs(trained):
    page, said = (trained["out"] / "report.md").read_text(), trained["calls"][2]["said"]
    assert all(f"| {name} |" in text for text in (page, said) for name in ("teacher", "half-seed0", "judged-seed0"))


def test_a_suite_that_asks_for_something_else_is_refused_key_by_key(trained, capsys):
    assert cli.main(["suite", "run", trained["file"], "--set", "lambda_2=0.5"]) == 2
    said = capsys.readouterr().err
    assert f"{trained['out']}/teacher holds a run of another configuration:\n  lambda_2: 0.1 -> 0.5\n" in said
    assert "choose another folder with --out, or name each changed key with --allow KEY" in said


def test_an_arm_is_not_reported_or_trained_on_with_another_teacher_than_the_one_it_began_with(trained, capsys):
    judge = trained["out"] / "teacher" / "best" / "teacher_last_D.safetensors"
    kept = judge.read_bytes()
    judge.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        assert cli.main(["suite", "run", trained["file"]]) == 2
        said = capsys.readouterr().err
        assert f"{trained['out']}/half-seed0 holds a run of another configuration:\n  teacher.discriminator: " in said
        before, now = hashlib.sha256(kept).hexdigest()[:12], sha256_of_file(judge)[:12]
        assert f"{judge.name} of sha256 {before} -> sha256 {now}" in said
    finally:
        judge.write_bytes(kept)


def test_what_a_run_says_when_it_refuses_is_the_last_word_of_the_suite(table, monkeypatch, capfd):
    """Started as `python sdtrain/main.py`, which looks at what its launcher asks for before torch is imported."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert cli.main(table) == 2
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("sdtrain: accelerate launch asks for compilation")
    assert last.startswith("sdtrain: suite table: teacher ended with code 2; 0 of 3 runs have finished; its last words")

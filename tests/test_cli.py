"""The `sdtrain` command. Without these a mistake would end in a traceback, and every --help would wait for torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import REPO, run_python

from sdtrain import cli, exits
from sdtrain.errors import ConfigError, UserError
from sdtrain.weights import WEIGHTS


def run_cli(*args: str, **more):
    return run_python("-m", "sdtrain.cli", *args, **more)


def test_help_lists_every_command_that_is_there():
    done = run_cli("--help")
    assert done.returncode == 0
    for name, (module, _) in cli.COMMANDS.items():
        assert (f"    {name}" in done.stdout) == cli.present(module), name


def test_a_command_whose_file_is_missing_is_not_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(cli.COMMANDS, "fly", ("sdtrain.commands.fly", "leave the ground"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fly"])
    assert caught.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_no_command_imports_torch_for_its_help_or_for_a_wrong_configuration():
    """One process a command would be slow: each module is imported and asked for its arguments in the same one."""
    script = """
import sys
from sdtrain import cli
for name, (module, _) in cli.COMMANDS.items():
    if cli.present(module):
        try:
            cli.main([name, "--help"])
        except SystemExit as done:
            assert done.code == 0, name
        heavy = {"torch", "torchvision", "timm", "torch_fidelity", "lpips", "PIL.Image"} & set(sys.modules)
        assert not heavy, (name, heavy)
assert cli.main(["train", "--cfg", "no_such_configuration"]) == 2
assert "torch" not in sys.modules
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr


def test_a_configuration_that_does_not_exist_is_one_sentence_and_exit_code_2():
    done = run_cli("train", "--cfg", "no_such_configuration")
    assert done.returncode == 2
    assert done.stderr.startswith("sdtrain: configuration 'no_such_configuration' does not exist")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_user_error_is_said_once_by_rank_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def mistaken() -> int:
        raise ConfigError("x.yaml:3: mend this")

    assert exits.run_command(mistaken) == 2
    assert capsys.readouterr().err == "sdtrain: x.yaml:3: mend this\n"
    monkeypatch.setenv("RANK", "1")
    assert exits.run_command(mistaken) == 2
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_keeps_its_traceback():
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exits.run_command(broken)


def test_an_interrupt_ends_with_code_130(capsys: pytest.CaptureFixture):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exits.run_command(interrupted) == 130
    assert capsys.readouterr().err == "sdtrain: interrupted\n"


def test_an_interrupt_that_knows_what_it_ended_says_so(capsys: pytest.CaptureFixture):
    def interrupted() -> int:
        raise KeyboardInterrupt("nothing was written")

    assert cli.run_command(interrupted) == 130
    assert capsys.readouterr().err == "sdtrain: nothing was written\n"


def test_a_reader_that_leaves_early_is_no_fault():
    talk = """
from sdtrain.exits import run_command
raise SystemExit(run_command(lambda: [print('x' * 99) for _ in range(9999)]))
"""
    listen = f"""
import subprocess, sys
talker = subprocess.Popen([sys.executable, "-c", {talk!r}], stdout=subprocess.PIPE)
talker.stdout.readline()
talker.stdout.close()
sys.exit(talker.wait())
"""
    done = run_python("-c", listen)
    assert done.returncode == 0, done.stderr


def test_every_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError) and issubclass(ConfigError, UserError)


def test_the_entry_point_of_the_package_exists():
    declared = (REPO / "pyproject.toml").read_text()
    assert 'sdtrain = "sdtrain.cli:script"' in declared and callable(cli.script)


def doctor(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    code = cli.main(["doctor", "--quick", *args])
    return code, capsys.readouterr().out


def test_doctor_without_torch_looks_at_packages_disk_and_weights(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("SDTRAIN_WEIGHTS", str(tmp_path))
    code, out = doctor(capsys, "--out", str(tmp_path / "runs" / "deep"))
    assert code == 0 and out.endswith("nothing here would stop a run\n")
    assert "GB free in" in out and f"in {tmp_path}: none" in out
    assert ("from installed packages: lite0\n" in out) == WEIGHTS["lite0"].place.is_file()
    assert not (tmp_path / "runs").exists()


def test_doctor_says_which_package_is_missing(capsys, monkeypatch):
    from sdtrain.commands import doctor as module

    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    code, out = doctor(capsys)
    assert code == 2 and "bad  no-such-package not installed" in out


def test_doctor_reports_a_wrong_configuration(capsys):
    code, out = doctor(capsys, "--cfg", "no_such_configuration")
    assert code == 2
    assert "bad  configuration   configuration 'no_such_configuration' does not exist" in out
    assert out.endswith("1 problem(s) would stop a run\n")


@pytest.mark.skipif(sys.platform == "win32", reason="read-only folders work otherwise there")
def test_doctor_finds_a_folder_that_cannot_be_written():
    from sdtrain.commands.doctor import disk

    verdict, _, found = disk(Path("/proc/nothing/here"))
    assert verdict == "bad" and found.endswith("choose another folder with --out")


def test_doctor_lets_two_ranks_meet():
    from sdtrain.commands.doctor import rendezvous

    assert rendezvous() == ("ok", "ranks", "2 ranks met through gloo")


def test_doctor_says_so_when_ranks_do_not_meet():
    from sdtrain.commands.doctor import rendezvous

    verdict, _, found = rendezvous(timeout_sec=0.01)
    assert verdict == "bad" and "did not meet" in found

"""What all ranks find out together before they train. Without these a bad host costs a queue slot and names nobody."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from tiny import free_port, make_shards, rank_environment, tiny_config, write_config

from sdtrain import cli
from sdtrain.commands import preflight
from sdtrain.commands.preflight import unlike
from sdtrain.exits import part


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    return write_config(folder / "tiny.yaml", tiny_config(make_shards(folder / "shards")))


class Ranks:
    """Forked processes, since torch takes long to load."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world, self.port = folder, world, free_port()
        self.pids: dict[int, int] = {}

    def start(self, rank: int, *args: str) -> None:
        self.pids[rank] = os.fork()
        if self.pids[rank]:
            return
        log = os.open(self.folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        more = {"LOCAL_WORLD_SIZE": "1", "SDTRAIN_HOSTS": "oak elm ash", "SDTRAIN_CPU": "1"}
        os.environ |= rank_environment(rank, self.world, self.port) | more
        code = 1
        try:
            code = part(cli.main(["doctor", "--ranks", *args]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> tuple[list[int], str]:
        """Exit codes, and all that was said."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids.values()]
        return codes, "".join((self.folder / str(rank)).read_text() for rank in self.pids)


def test_ranks_that_are_alike_meet_and_say_where(tiny_file: Path, tmp_path: Path):
    ranks = Ranks(tmp_path, 2)
    for rank in range(2):
        ranks.start(rank, "--cfg", str(tiny_file), "--out", str(tmp_path / "run"), "--restart", "--allow", "sd.alpha")
    codes, said = ranks.ended()
    assert codes == [0, 0], said
    assert "ok   ranks           2 on 1 host(s) met in" in said and f"{tmp_path}/run can be written by all" in said
    assert not (tmp_path / "run").exists()


def test_a_host_that_does_not_report_is_named_on_all_others(tiny_file: Path, tmp_path: Path):
    ranks = Ranks(tmp_path, 3)
    for rank in (0, 2):
        ranks.start(rank, "--cfg", str(tiny_file), "--within", "5")
    codes, said = ranks.ended()
    assert codes == [75, 75]
    assert said.count("sdtrain: rank 1 on elm of 3 did not report within 5 s") == 1, said


def test_a_rank_with_another_configuration_is_named(tiny_file: Path, tmp_path: Path):
    ranks, other = Ranks(tmp_path, 2), ("--set", "sd.alpha=0.5")
    for rank in range(2):
        ranks.start(rank, "--cfg", str(tiny_file), *(other * rank))
    codes, said = ranks.ended()
    assert codes == [75, 75]
    assert said.count(f"sdtrain: rank 1 on {os.uname().nodename} has configuration tiny (") == 1, said


def test_a_mistake_on_all_ranks_is_the_users_and_is_said_once(tmp_path: Path):
    ranks = Ranks(tmp_path, 2)
    for rank in range(2):
        ranks.start(rank, "--cfg", "no_such_configuration")
    codes, said = ranks.ended()
    assert codes == [2, 2] and said.count("configuration 'no_such_configuration' does not exist") == 1, said


def test_a_rank_that_cannot_reach_the_first_one_names_itself_and_the_address(tmp_path: Path):
    ranks = Ranks(tmp_path, 2)
    ranks.start(1, "--within", "2")
    codes, said = ranks.ended()
    assert codes == [75]
    assert f"sdtrain: rank 1 on {os.uname().nodename} cannot reach 127.0.0.1:{ranks.port}, where rank 0 listens" in said


def test_a_rank_that_is_left_waiting_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "meet", lambda *_: time.sleep(600))
    monkeypatch.setattr(preflight, "MARGIN_SEC", 0.0)
    ranks = Ranks(tmp_path, 1)
    ranks.start(0, "--within", "1")
    codes, said = ranks.ended()
    told = f"sdtrain: rank 0 on {os.uname().nodename} still waits for the others: it is ended\n"
    assert codes == [75] and said == told


def test_hosts_whose_network_does_not_join_them_are_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "add_up_with_gloo", lambda meeting: time.sleep(600) if meeting.rank == 0 else {})
    ranks = Ranks(tmp_path, 2)
    for rank in range(2):
        ranks.start(rank, "--within", "8")
    codes, said = ranks.ended()
    assert codes == [75, 75]
    here = os.uname().nodename
    told = f"cannot add up a number together: rank 0 on {here} still waits for the others, rank 1 on {here} still waits"
    assert said.count(told) == 1 and "GLOO_SOCKET_IFNAME" in said


def test_a_rank_that_loses_the_first_one_on_the_way_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lost(*_: object) -> None:
        raise RuntimeError("Connection was likely closed\nframe #0")

    monkeypatch.setattr(preflight, "Meeting", lost)
    ranks = Ranks(tmp_path, 2)
    ranks.start(1)
    codes, said = ranks.ended()
    told = f"sdtrain: rank 1 on {os.uname().nodename} has lost the others: Connection was likely closed\n"
    assert codes == [75] and said == told


def test_who_differs_is_told_from_who_is_usual():
    def found(who: str, torch: str) -> dict[str, object]:
        facts = {"code": "1", "python": "3", "torch": torch, "device": "cpu", "config": "c"}
        return {"who": who, "facts": facts}

    oak, elm, ash = found("oak", "2.10"), found("elm", "2.15"), found("ash", "2.15")
    assert unlike([oak, elm, ash]) == "oak has torch 2.10, the others 2.15"
    assert unlike([oak, elm]) == "elm has torch 2.15, the others 2.10"
    assert unlike([elm, ash]) == ""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.records import Log, Table
from filter_grafting.errors import WriteError

COLUMNS = ("epoch", "layer", "coefficient")


@contextmanager
def standard_output(target: Path | int, flags: int = os.O_APPEND) -> Iterator[None]:
    """Standard output is a file, or an open descriptor, as for a process that a shell has started."""
    saved, stdout = os.dup(1), sys.stdout
    descriptor = target if isinstance(target, int) else os.open(target, os.O_WRONLY | os.O_CREAT | flags)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    try:
        with open(1, "w", closefd=False) as sys.stdout:
            yield
    finally:
        sys.stdout = stdout
        os.dup2(saved, 1)
        os.close(saved)


# Tables


def test_rows_are_kept_up_to_an_epoch_and_added(tmp_path):
    path = tmp_path / "coefficients1.csv"
    table = Table(path, COLUMNS)
    assert table.start(0) == []
    table.append([[0, "conv1", 0.5], [0, "a,b", 0.25]])
    table.append([[1, "conv1", 0.5]])
    assert path.read_text() == 'epoch,layer,coefficient\n0,conv1,0.5\n0,"a,b",0.25\n1,conv1,0.5\n'
    assert Table(path, COLUMNS).start(1) == [
        {"epoch": "0", "layer": "conv1", "coefficient": "0.5"}, {"epoch": "0", "layer": "a,b", "coefficient": "0.25"},
    ]  # fmt: skip
    assert path.read_text() == 'epoch,layer,coefficient\n0,conv1,0.5\n0,"a,b",0.25\n'


@pytest.mark.parametrize("rest", ["1,conv", '1,"conv1', "1,conv1,0.4", "1", "\0\0\0\0", "1,x,1,2\n", "x,y,z\n", ",,\n",
                                  "99999999999999999999,a,1\n", "1,conv1,0.4\n0,lat", "\udcff"])  # fmt: skip
def test_what_is_half_written_or_damaged_is_dropped(tmp_path, rest):
    path = tmp_path / "coefficients1.csv"
    whole = "epoch,layer,coefficient\n0,conv1,0.5\n"
    path.write_bytes((whole + rest).encode(errors="surrogateescape"))
    Table(path, COLUMNS).start(1)
    assert path.read_text() == whole


def test_a_field_that_is_too_long_for_csv_ends_what_is_read(tmp_path):
    path = tmp_path / "metrics1.csv"
    path.write_text("epoch,layer,coefficient\n0,a,1\n0,b," + "9" * 200_000 + "\n0,c,1\n")
    Table(path, COLUMNS).start(1)
    assert path.read_text() == "epoch,layer,coefficient\n0,a,1\n"


def test_neither_links_nor_pipes_nor_folders_are_written_to(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for make in (lambda path: path.symlink_to(outside), os.mkfifo, Path.mkdir):
        path = tmp_path / make.__name__
        table = Table(path, COLUMNS)
        make(path)
        try:
            table.start(0)
        except WriteError as error:
            assert str(path) in str(error)
        else:
            assert path.is_file() and not path.is_symlink()
    table = Table(tmp_path / "table.csv", COLUMNS)
    table.start(0)
    (tmp_path / "table.csv").unlink()
    (tmp_path / "table.csv").symlink_to(outside)
    with pytest.raises(WriteError, match=r"cannot write .*table\.csv"):
        table.append([[0, "a", 1]])
    assert outside.read_text() == "precious"


def test_a_table_that_is_gone_is_a_sentence(tmp_path):
    table = Table(tmp_path / "table.csv", COLUMNS)
    table.start(0)
    (tmp_path / "table.csv").unlink()
    with pytest.raises(WriteError, match=r"cannot write .*table\.csv: No such file or directory; .* MB are free there"):
        table.append([[0, "a", 1]])


# Logs


def test_an_epoch_has_one_line_whoever_comes_past_it(tmp_path):
    path = tmp_path / "1.log"
    for _ in range(2):
        with standard_output(path):
            log = Log(1, resumed=True)
            log.say("Network 1 of 2")
            for epoch in range(3):
                log.epoch(epoch, "accuracy:50.000    best:50.000")
    lines = [line for line in path.read_text().splitlines() if line.startswith("Network:1    epoch:")]
    assert lines == [f"Network:1    epoch:{epoch}    accuracy:50.000    best:50.000" for epoch in range(3)]


def test_the_lines_of_another_run_in_the_same_log_hide_none_of_a_new_one(tmp_path):
    path = tmp_path / "all.log"
    for resumed in (False, False, True):
        with standard_output(path):
            log = Log(1, resumed)
            for epoch in range(2 + resumed):
                log.epoch(epoch, "x")
    assert path.read_text().splitlines() == [f"Network:1    epoch:{epoch}    x" for epoch in (0, 1, 0, 1, 2)]


@pytest.mark.parametrize("rest", ["N", "Network:1    epo", "Network:1    epoch:1    accuracy:50.0", "Network 1 of"])
@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
def test_a_half_written_last_line_of_its_own_is_cut_off(tmp_path, rest, flags):
    path = tmp_path / "1.log"
    whole = "Network:1    epoch:0    accuracy:50.000\n"
    path.write_text(whole + rest)
    with standard_output(path, flags):
        if not flags:
            os.lseek(1, 0, os.SEEK_END)  # a loop of a shell keeps the log open: while ! python ...; do :; done >1.log
        log = Log(1, resumed=True)
        log.epoch(0, "again")
        log.epoch(1, "new")
    assert path.read_text() == whole + "Network:1    epoch:1    new\n"


def test_a_table_of_fewer_columns_is_continued_with_empty_ones(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("epoch,one\n0,5\n1,6\n2\n")
    Table(path, ["epoch", "one", "two"]).start(9)
    assert path.read_text() == "epoch,one,two\n0,5,\n1,6,\n"


def test_a_last_line_of_someone_else_is_left_and_ended(tmp_path):
    path = tmp_path / "1.log"
    path.write_text("Network:1    epoch:0    x\nnohup: ignoring input")
    with standard_output(path):
        Log(1, resumed=True).epoch(1, "new")
    assert path.read_text() == "Network:1    epoch:0    x\nnohup: ignoring input\nNetwork:1    epoch:1    new\n"


def test_lines_of_other_networks_and_lookalikes_do_not_count(tmp_path):
    path = tmp_path / "all.log"
    path.write_text("Network:2    epoch:7    x\nNetwork:11    epoch:8    x\n Network:1    epoch:9    x\n")
    with standard_output(path):
        log = Log(1, resumed=True)
        assert log.last_epoch == -1
        log.epoch(0, "x")
        assert log.last_epoch == 0


def test_a_log_is_not_touched_before_its_first_line(tmp_path):
    path = tmp_path / "1.log"
    path.write_text("Network:1    epo")
    with standard_output(path):
        Log(1, resumed=True)
    assert path.read_text() == "Network:1    epo"


def test_epochs_before_a_resumed_one_are_recalled_in_a_file_only(tmp_path):
    path = tmp_path / "1.log"
    with standard_output(path, os.O_TRUNC):
        log = Log(1, resumed=True)
        for epoch in range(2):
            log.recall(epoch, "x")
        log.epoch(2, "x")
    assert path.read_text().count("\n") == 3
    read, write = os.pipe()
    with standard_output(write):
        log = Log(1, resumed=True)
        log.recall(0, "x")
        log.epoch(1, "x")
    assert os.read(read, 1000) == b"Network:1    epoch:1    x\n"
    os.close(read)


def test_a_log_on_a_full_disk_is_a_sentence_once(tmp_path):
    with standard_output(Path("/dev/full"), 0):
        log = Log(1, resumed=True)
        with pytest.raises(WriteError, match=r"^cannot write the log to standard output: No space left on device$"):
            log.say("x")
        log.say("to nowhere, since it cannot be written")


def test_names_that_do_not_fit_the_encoding_are_written(tmp_path):
    path = tmp_path / "1.log"
    with standard_output(path):
        Log(1, resumed=True).say("in /data/\udcff")
    assert path.read_text() == "in /data/\\udcff\n"

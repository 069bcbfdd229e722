"The lock of a run folder among real processes, also those that are killed"
import errno
import os
import signal
import subprocess
import sys

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import holder_of, only_run, RunFolder

HOLD = """
import sys, time
from sage_finetune.core.run_folder import only_run
with only_run(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    "A process that trains in a folder"
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path/'run')], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()=='held\n'
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path, other):
    for _ in range(2): # being refused changes nothing
        told = f'is being trained by process {other.pid} on .* since .*another `output_dir`'
        with pytest.raises(SageError, match=told):
            with only_run(tmp_path/'run'): pass
        assert (holder_of(tmp_path/'run').pid, holder_of(tmp_path/'run').here)==(other.pid, True)


@pytest.mark.skipif(os.name!='posix', reason='signals')
def test_a_killed_process_blocks_nobody(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert RunFolder(tmp_path/'run').lock.exists() and holder_of(tmp_path/'run') is None
    with only_run(tmp_path/'run'): assert holder_of(tmp_path/'run').pid==os.getpid()
    assert [*(tmp_path/'run').iterdir()]==[]


def test_asking_who_holds_it_leaves_no_trace(tmp_path):
    assert holder_of(tmp_path/'run') is None and not (tmp_path/'run').exists()
    with only_run(tmp_path/'run'):
        assert holder_of(tmp_path/'run').pid==os.getpid()
    assert not (tmp_path/'run').exists()


@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run').chmod(0o500)
    try:
        with pytest.raises(SageError, match='choose a folder you may write to'):
            with only_run(tmp_path/'run'): pass
    finally: (tmp_path/'run').chmod(0o700)


def test_paths_may_be_strings(tmp_path):
    assert RunFolder(str(tmp_path))==RunFolder(tmp_path)
    assert RunFolder(str(tmp_path)).meta==tmp_path/'finetune_meta.json'


@pytest.mark.parametrize('refused', [OSError(errno.ENOLCK, 'no locks'), OSError(errno.ENOSYS, 'no flock'),
                                     NotImplementedError()], ids=['ENOLCK', 'ENOSYS', 'none'])
def test_a_file_system_without_locks_is_trained_in_unless_somebody_lives_there(tmp_path, other, monkeypatch, refused):
    def acquire(self): raise refused
    monkeypatch.setattr('filelock.FileLock.acquire', acquire)
    with only_run(tmp_path/'free'): assert (tmp_path/'free'/'.lock').exists()
    with pytest.raises(SageError, match=f'is being trained by process {other.pid}'):
        with only_run(tmp_path/'run'): pass
    other.kill()
    other.wait()
    with only_run(tmp_path/'run'): pass


def test_a_lock_that_is_refused_is_told(tmp_path, monkeypatch):
    def acquire(self): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr('filelock.FileLock.acquire', acquire)
    with pytest.raises(SageError, match='permission denied; choose a folder you may write to'):
        with only_run(tmp_path/'busy'): pass
    (tmp_path/'a file').write_text('')
    with pytest.raises(SageError, match='a file stands where a folder is needed'):
        with only_run(tmp_path/'a file'/'run'): pass

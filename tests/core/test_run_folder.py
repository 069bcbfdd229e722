"The lock of a run folder among real processes, also those that are killed"
import errno
import os
import signal
import subprocess
import sys

import pytest
from fastcore.test import test_eq as same

from sage_finetune.core import disk
from sage_finetune.core.disk import SageError, write_json, write_manifest, write_text
from sage_finetune.core.run_folder import (
    checkpoint_fault, complete_marker, find_run, holder_of, last_checkpoint, mark_complete, only_run, record_fault,
    remove_part, remove_run, RunFolder, write_meta, write_record
)

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


def made(folder):
    "A small run that is finished, and what else may lie in its folder"
    run = RunFolder(folder)
    write_meta(run.path, 'sage-tiny', 'rows.json')
    for file in (run.metrics, run.results, run.lora_weights/'adapter_model.safetensors',
                 run.lora_weights/'adapter_config.json', run.checkpoints/'checkpoint-1'/'optimizer.pt',
                 run.logs/'events.out.tfevents.1', run.path/'training_data_custom.json'): write_text(file, '{}')
    write_manifest(run.lora_weights)
    return run


def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def test_a_run_is_removed_and_nothing_else(tmp_path):
    run = made(tmp_path/'run')
    assert remove_run(run.path)>0 and not run.path.exists()
    run = made(tmp_path/'project')
    for mine in ('thesis.tex', 'src/a.py', 'checkpoints/best.pt', 'logs/diary.txt'): write_text(run.path/mine, 'mine')
    remove_run(run.path)
    assert names(run.path)==['checkpoints', 'checkpoints/best.pt', 'logs', 'logs/diary.txt', 'src', 'src/a.py',
                             'thesis.tex']


@pytest.mark.parametrize('part', ['lora_weights/notes.txt', 'lora_weights/.git/HEAD', 'exported/merged/README.md'])
def test_what_was_added_to_a_part_of_a_run_is_not_removed(tmp_path, part):
    run = made(tmp_path/'run')
    write_text(run.path/part, 'mine')
    before = names(run.path)
    with pytest.raises(SageError, match='is left alone'): remove_run(run.path)
    assert names(run.path)==before


@pytest.mark.parametrize('part', ['checkpoints', 'lora_weights', 'merged_model', 'metrics.jsonl', 'logs', 'exported',
                                  'checkpoints/checkpoint-1'])
def test_nothing_is_written_or_removed_through_a_link(tmp_path, part):
    run,elsewhere = made(tmp_path/'run'), tmp_path/'elsewhere'
    remove_part(run.path/part)
    elsewhere.mkdir()
    (elsewhere/'thesis.tex').write_text('mine')
    (run.path/part).symlink_to(elsewhere)
    for ask in (lambda: remove_run(run.path), lambda: only_run(run.path).__enter__()):
        with pytest.raises(SageError, match=f'{part} is a symbolic link'): ask()
    assert names(elsewhere)==['thesis.tex']


def test_a_link_to_a_run_is_not_removed(tmp_path):
    run = made(tmp_path/'run')
    (tmp_path/'link').symlink_to(run.path)
    with pytest.raises(SageError, match='name the folder it points to'): remove_run(tmp_path/'link')


@pytest.mark.parametrize('says', [{}, {'name': 'x'}, {'model': 'a'}, {'checkpoints': 3}], ids=str)
@pytest.mark.parametrize('name', ['finetune_meta.json', 'training_config.json'])
def test_a_name_that_other_programs_use_too_makes_no_run(tmp_path, name, says):
    write_json(tmp_path/name, says)
    write_text(tmp_path/'checkpoints'/'checkpoint-500'/'model.bin', 'months')
    before = names(tmp_path)
    for ask in (lambda: remove_run(tmp_path), lambda: only_run(tmp_path).__enter__()):
        with pytest.raises(SageError, match='is left alone'): ask()
    assert names(tmp_path)==before


def test_a_run_in_progress_is_not_removed(tmp_path, other):
    write_meta(tmp_path/'run', 'sage-tiny', 'rows.json')
    with pytest.raises(SageError, match=f'is being trained by process {other.pid}'): remove_run(tmp_path/'run')
    assert (tmp_path/'run'/'finetune_meta.json').exists()


def test_an_adapter_that_was_caught_between_two_renames_is_found(tmp_path):
    run = made(tmp_path/'run')
    run.lora_weights.rename(run.path/f'.lora_weights.{disk._host}.{2**22+1}.0123abcd.old')
    assert run.state=='started' and find_run(run.path).state=='trained'


def test_whatever_happens_to_a_checkpoint_the_one_before_it_is_used(tmp_path):
    run = RunFolder(tmp_path)
    for step in (500, 1000): mark_complete(write_text(run.checkpoints/f'checkpoint-{step}'/'weights', 'whole').parent)
    write_text(run.checkpoints/'checkpoint-1000'/'weights', 'wrong')
    same(checkpoint_fault(run.checkpoints/'checkpoint-1000'), 'its file weights has changed since it was written')
    (run.checkpoints/'checkpoint-1000'/'weights').unlink()
    same(checkpoint_fault(run.checkpoints/'checkpoint-1000'), 'its file weights is missing')
    for marker in ('', '{"wei', '{}'):
        (run.checkpoints/'checkpoint-1000'/complete_marker).write_text(marker)
        same(last_checkpoint(run.checkpoints).name, 'checkpoint-500')


@pytest.mark.parametrize('gone', [['adapter_config.json'], ['adapter_config.json', 'checksums.json'],
                                  ['a.safetensors']])
def test_a_folder_that_was_removed_halfway_is_removed_by_the_same_command(tmp_path, gone):
    "What is left of an adapter may look like a run of its own"
    run = RunFolder(tmp_path/'run')
    write_meta(run.path, 'sage-tiny', 'rows.jsonl')
    for folder in (run.lora_weights, run.merged_model):
        for name in ('adapter_config.json', 'training_config.json'): write_json(folder/name, dict(r=8))
        write_text(folder/'a.safetensors', 'x')
        write_manifest(folder)
        for name in gone: (folder/name).unlink()
    remove_run(run.path)
    assert not run.path.exists()


def test_a_run_within_a_run_is_still_told(tmp_path):
    write_meta(tmp_path/'run', 'sage-tiny', 'rows.jsonl')
    write_meta(tmp_path/'run'/'other', 'sage-tiny', 'rows.jsonl')
    with pytest.raises(SageError, match=r'holds other runs \(other\)'): remove_run(tmp_path/'run')


@pytest.mark.parametrize('results', [dict(loss=1.5), dict(name='微调'), {}])
def test_results_are_never_without_their_record(tmp_path, monkeypatch, results):
    run = RunFolder(tmp_path/'run')
    write_meta(run.path, 'sage-tiny', 'rows.jsonl')
    write_record(run.path, results)
    assert record_fault(run.path) is None
    run.results.unlink()
    def killed(*args, **how): raise KeyboardInterrupt
    monkeypatch.setattr('sage_finetune.core.run_folder.write_manifest', killed)
    with pytest.raises(KeyboardInterrupt): write_record(run.path, results)
    assert not run.results.exists()


def test_nobody_trains_in_a_folder_while_its_last_files_are_removed(tmp_path, monkeypatch):
    run,held = RunFolder(tmp_path/'run'),[]
    write_meta(run.path, 'sage-tiny', 'rows.jsonl')
    real = type(run.meta).unlink
    def unlink(path, *args, **how):
        if path==run.meta: held.append(holder_of(run.path))
        return real(path, *args, **how)
    monkeypatch.setattr(type(run.meta), 'unlink', unlink)
    remove_run(run.path)
    assert held[0].pid==os.getpid() and not run.path.exists()

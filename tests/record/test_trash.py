"A run that is deleted comes back byte for byte, whatever broke the way off, and nothing of anybody else moves"
import os
from pathlib import Path

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import list_runs, only_run, write_meta
from sage_finetune.record.labels import label_run
from sage_finetune.record.trash import empty_trash, in_trash, restore_run, trash_folder, trash_run


def whole_run(root, name='run'):
    "A run with all that a run may leave, and two files of somebody"
    folder = root/name
    write_meta(folder, 'sage-tiny', 'rows.jsonl')
    for file in ('training_config.json', 'metrics.jsonl', 'results.json', 'data_report.json', 'loss.png',
                 'lora_weights/adapter_model.safetensors', 'lora_weights/adapter_config.json',
                 'checkpoints/checkpoint-5/optimizer.pt', 'checkpoints/checkpoint-10/COMPLETE', 'generations.jsonl',
                 'logs/events.out.tfevents.1', 'training_data_1.json'):
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        (folder/file).write_text('{"model_name": "sage-tiny", "learning_rate": 1}' if 'config' in file else file)
    label_run(folder, ['kept'])
    (folder/'diary.txt').write_text('mine')
    (folder/'checkpoints'/'notes.txt').write_text('mine too')
    return folder


def lies_in(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*')
                             if p.is_file() and not p.name.startswith('.lock')}


class Dies(Exception): "As a killed process: nothing catches it"


def dying(at, monkeypatch):
    "Renaming breaks off before the move with this number"
    count, rename = [], Path.rename
    def go(self, target):
        if '.trash' in str(self) or '.trash' in str(target): count.append(self)
        if len(count)==at: raise Dies
        return rename(self, target)
    monkeypatch.setattr(Path, 'rename', go)
    return count


def moves(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        count = dying(-1, patched)
        trash_run(whole_run(tmp_path/'counted'))
    return len(count)


def test_broken_off_anywhere_both_ways_can_be_finished(tmp_path, monkeypatch):
    most = moves(tmp_path, monkeypatch)
    assert most>=9
    for at in range(1, most+1):
        root = tmp_path/str(at)
        folder = whole_run(root)
        before = lies_in(folder)
        with monkeypatch.context() as patched, pytest.raises(Dies):
            dying(at, patched)
            trash_run(folder)
        trash_run(folder)  # the same command
        assert {p.name for p in lies_in(folder)}=={'diary.txt', 'notes.txt'}
        assert len(in_trash(root))==1 and in_trash(root)[0].whole
        with monkeypatch.context() as patched, pytest.raises(Dies):
            dying(at, patched)
            restore_run('run', root)
        restore_run('run', root)
        assert lies_in(folder)==before and not trash_folder(root).exists(), at


def test_a_broken_off_way_can_be_taken_back_at_once(tmp_path, monkeypatch):
    folder = whole_run(tmp_path)
    before = lies_in(folder)
    with monkeypatch.context() as patched, pytest.raises(Dies):
        dying(4, patched)
        trash_run(folder)
    restore_run('run', tmp_path)
    assert lies_in(folder)==before


def test_what_somebody_put_there_meanwhile_becomes_no_part_of_the_run(tmp_path):
    trash_run(whole_run(tmp_path))
    (tmp_path/'run'/'checkpoints'/'checkpoint-7').mkdir()
    (tmp_path/'run'/'checkpoints'/'checkpoint-7'/'model.pt').write_text('mine')
    with pytest.raises(SageError, match='checkpoint-7 is there by now'): restore_run('run', tmp_path)
    assert not (tmp_path/'run'/'finetune_meta.json').exists() and in_trash(tmp_path)[0].whole


@pytest.mark.parametrize('made', ['stranger', 'link', 'nested', 'held', 'gone'])
def test_what_is_not_moved(made, tmp_path):
    folder = tmp_path/'run'
    if made=='stranger':
        folder.mkdir()
        (folder/'metrics.jsonl').write_text('{"step": 1}\n')
    elif made=='link':
        whole_run(tmp_path, 'real')
        folder.symlink_to(tmp_path/'real')
    elif made=='nested': whole_run(whole_run(tmp_path), 'inner')
    elif made=='held': whole_run(tmp_path)
    before = lies_in(tmp_path)
    held = only_run(folder) if made=='held' else None
    if held: held.__enter__()
    with pytest.raises(SageError): trash_run(folder)
    if held: held.__exit__(None, None, None)
    assert lies_in(tmp_path)==before and in_trash(tmp_path)==[]


def test_emptying_leaves_what_no_run_wrote(tmp_path):
    trash_run(whole_run(tmp_path))
    place = in_trash(tmp_path)[0].place
    (place/'run'/'mine.txt').write_text('mine')
    (trash_folder(tmp_path)/'a-folder').mkdir()
    (trash_folder(tmp_path)/'a-folder'/'thesis.txt').write_text('mine')
    os.symlink(tmp_path, trash_folder(tmp_path)/'a-link')
    freed, left = empty_trash(tmp_path)
    assert freed>0 and left==[place]
    assert {p.name for p in lies_in(trash_folder(tmp_path))}>={'mine.txt', 'thesis.txt'}
    assert (tmp_path/'run'/'diary.txt').read_text()=='mine'


def test_the_trash_is_no_run(tmp_path):
    trash_run(whole_run(tmp_path))
    (tmp_path/'run'/'diary.txt').unlink()
    assert list_runs(tmp_path)==[] and list_runs(trash_folder(tmp_path))==[]

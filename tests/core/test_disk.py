"Checksums: every file of a folder, every shape of a manifest, and what is remembered of large files"
import errno
import json
import os
import shutil
import sys
from subprocess import run

import pytest
from fastcore.test import expect_fail, test_eq as same

from sage_finetune.core import disk
from sage_finetune.core.disk import (
    discard, disk_error, file_digest, manifest_fault, manifest_file, SageError, system_words, whole_folder,
    write_manifest, write_text, write_whole
)
from sage_finetune.core.run_folder import checkpoint_fault, complete_marker, last_checkpoint, mark_complete


@pytest.fixture
def folder(tmp_path):
    "What an adapter's folder holds, small"
    made = tmp_path/'adapter'
    (made/'part').mkdir(parents=True)
    (made/'weights.safetensors').write_bytes(bytes(range(256)))
    (made/'tokenizer.json').write_text('{"a": 1}')
    (made/'part'/'shard.bin').write_bytes(b'12345')
    (made/'adapter_config.json').write_text(json.dumps(dict(r=8, base_model_name_or_path='/here'), indent=2))
    (made/'README.md').write_text('for people')
    write_manifest(made)
    return made


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize('name', ['weights.safetensors', 'tokenizer.json', 'part/shard.bin', 'adapter_config.json',
                                  manifest_file])
@pytest.mark.parametrize('share', [0, .3, .5, .9])
def test_one_flipped_bit_is_told_by_the_name_of_the_file(folder, name, share):
    whole = (folder/name).read_bytes()
    if name=='adapter_config.json': share = whole.index(b'8')/len(whole)+1e-9 # what it says, and not where the base is
    flipped(folder/name, int(len(whole)*share))
    assert 'its file ' in manifest_fault(folder)
    if name!=manifest_file: assert f'its file {name} ' in manifest_fault(folder)


def test_a_file_that_is_gone_or_another_kind_of_thing_is_told(folder):
    (folder/'tokenizer.json').unlink()
    assert manifest_fault(folder)=='its file tokenizer.json is missing'
    (folder/'tokenizer.json').mkdir()
    assert manifest_fault(folder)=='its file tokenizer.json is missing'
    shutil.rmtree(folder/'tokenizer.json')
    (folder/'tokenizer.json').write_text('{"a": 1} ')
    assert manifest_fault(folder)=='its file tokenizer.json has 9 of 8 bytes'


def test_places_and_notes_for_people_may_be_edited(folder):
    (folder/'README.md').write_text('edited')
    for text in ('{"r": 8, "base_model_name_or_path": "/there"}', '{"r":8}', '\n{"base_model_name_or_path":"","r":8}'):
        (folder/'adapter_config.json').write_text(text)
        assert manifest_fault(folder) is None
    for text in ('{"r": 9, "base_model_name_or_path": "/here"}', '{}', '{"r": 8, "more": 1}', 'no json', '[8]'):
        (folder/'adapter_config.json').write_text(text)
        assert 'its file adapter_config.json ' in manifest_fault(folder)


shapes = ['', '{}', '{', 'null', '[]', '"x"', '5', '{"a": 5}', '{"a": []}', '{"a": null}', '{"a": {}}', '{"a": [1]}',
          '{"a": [1, 2, 3]}', '{"a": ["1", 2]}', '{"a": [1, null]}', '{"a": [true, 1]}', '{"a": [1.0, 2]}',
          '{"a": [[1], [2]]}', '{"../a": [1, 2]}', '{"a\\u0000": [1, 2]}', '['*100_000, '{"a":'*20_000]


@pytest.mark.parametrize('shape', shapes, ids=lambda s: s[:18])
def test_a_marker_of_another_shape_is_passed_over_with_a_word(tmp_path, shape):
    for step in (1, 2):
        (tmp_path/f'checkpoint-{step}').mkdir()
        (tmp_path/f'checkpoint-{step}'/'a').write_bytes(b'x')
        mark_complete(tmp_path/f'checkpoint-{step}')
    (tmp_path/'checkpoint-2'/complete_marker).write_text(shape)
    said = []
    assert last_checkpoint(tmp_path, said.append).name=='checkpoint-1'
    assert len(said)==1 and said[0].startswith('checkpoint-2 is passed over: its file ')
    (tmp_path/'checkpoint-2'/complete_marker).write_bytes(b'\xff\xfe{}')
    assert checkpoint_fault(tmp_path/'checkpoint-2')==f'its file {complete_marker} is broken'


def test_a_marker_of_an_older_version_is_compared(tmp_path):
    (tmp_path/'a').write_bytes(b'abc')
    (tmp_path/complete_marker).write_text('{"a": [3, 891568578]}') # CRC-32
    assert checkpoint_fault(tmp_path) is None
    (tmp_path/'a').write_bytes(b'abd')
    assert checkpoint_fault(tmp_path)=='its file a has changed since it was written'


def test_a_large_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(disk, '_read_each_time', 10)
    monkeypatch.setattr(disk.time, 'time_ns', lambda: 2**62) # the file is old
    file,reads = tmp_path/'large',[]
    file.write_bytes(b'0123456789abc')
    own = disk._read_digest
    monkeypatch.setattr(disk, '_read_digest', lambda path: reads.append(path) or own(path))
    assert len({file_digest(file), file_digest(file), file_digest(file)})==1 and len(reads)==1
    before,s = file_digest(file),os.stat(file)
    file.write_bytes(b'0123456789abX')
    os.utime(file, ns=(s.st_atime_ns, s.st_mtime_ns)) # as a tool that hides its traces
    assert file_digest(file)!=before and len(reads)==2
    note, = (p for p in (tmp_path/'cache'/'digests').iterdir())
    for broken in ('', '{"state": 5}', '{"state": [], "digest": null}'):
        note.write_text(broken)
        assert file_digest(file)==own(file)


def test_what_is_remembered_wrongly_does_not_condemn_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(disk, '_read_each_time', 10)
    monkeypatch.setattr(disk.time, 'time_ns', lambda: 2**62)
    (tmp_path/'model').mkdir()
    (tmp_path/'model'/'large').write_bytes(b'0123456789abc')
    write_manifest(tmp_path/'model')
    note, = (p for p in (tmp_path/'cache'/'digests').iterdir())
    known = json.loads(note.read_text())
    note.write_text(json.dumps(known | dict(digest='0'*32)))
    assert manifest_fault(tmp_path/'model') is None


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'file'))
    monkeypatch.setattr(disk, '_read_each_time', 10)
    monkeypatch.setattr(disk.time, 'time_ns', lambda: 2**62)
    (tmp_path/'large').write_bytes(b'0123456789abc')
    assert file_digest(tmp_path/'large')==disk._read_digest(tmp_path/'large')


def remains(folder, name, mark, ending, host=None):
    path = folder/f'.{name}.{host or disk._host}.{mark}.0123abcd.{ending}'
    path.mkdir()
    return path


def marks():
    "Marks of processes that are dead: the number is used again, the machine was started anew, nobody has it"
    number,began,boot,space = disk.process_mark().split('-')
    other = '0'*8 if boot!='0'*8 else '1'*8
    return [f'{number}-{int(began)+1}-{boot}-{space}', f'{number}-{began}-{other}-{space}', f'1-7-{boot}-{space}',
            f'{2**22+1}-{began}-{boot}-{space}', str(2**22+1)]


@pytest.mark.parametrize('which', range(5))
def test_remains_of_a_dead_process_are_cleared_and_a_folder_comes_back(tmp_path, which):
    (remains(tmp_path, 'adapter', marks()[which], 'old')/'v').write_text('1')
    half = remains(tmp_path, 'adapter', marks()[which], 'tmp')
    disk.clear_remains(tmp_path)
    assert (tmp_path/'adapter'/'v').read_text()=='1' and not half.exists()


def test_remains_of_a_living_or_unknown_process_stay(tmp_path, monkeypatch):
    number,began,boot,space = disk.process_mark().split('-')
    parent = f'{os.getppid()}-{disk._began(os.getppid())}-{boot}-{space}'
    elsewhere = f'7-7-{boot}-{int(space)+1}' # another container
    kept = [remains(tmp_path, 'a', parent, 'tmp'), remains(tmp_path, 'b', parent, 'old'),
            remains(tmp_path, 'c', elsewhere, 'tmp'), remains(tmp_path, 'd', parent, 'tmp', host='other-machine')]
    disk.clear_remains(tmp_path)
    assert all(p.exists() for p in kept)
    moment = disk.time.time()
    monkeypatch.setattr(disk.time, 'time', lambda: moment+100_000) # a day later: nobody can know, nobody came back
    disk.clear_remains(tmp_path)
    assert [p.exists() for p in kept]==[True, True, False, False]


def test_a_folder_between_two_renames_of_another_machine_comes_back_after_a_minute(tmp_path, monkeypatch):
    remains(tmp_path, 'adapter', '7-7-00-7', 'old', host='other-machine')
    disk.clear_remains(tmp_path)
    assert not (tmp_path/'adapter').exists()
    moment = disk.time.time()
    monkeypatch.setattr(disk.time, 'time', lambda: moment+61)
    disk.clear_remains(tmp_path)
    assert (tmp_path/'adapter').is_dir()


@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError, OSError, SystemExit])
@pytest.mark.parametrize('at', [1, 2])
def test_whatever_happens_between_two_renames_one_of_the_two_is_there(tmp_path, monkeypatch, error, at):
    (tmp_path/'adapter').mkdir()
    (tmp_path/'adapter'/'v').write_text('1')
    own,calls = disk.Path.rename,[]
    def rename(self, target):
        calls.append(self)
        if len(calls)==at: raise error('now')
        return own(self, target)
    monkeypatch.setattr(disk.Path, 'rename', rename)
    with pytest.raises((error, disk.SageError)):
        with disk.whole_folder(tmp_path/'adapter') as new: (new/'v').write_text('2')
    assert (tmp_path/'adapter'/'v').read_text()=='1' and len([*tmp_path.iterdir()])==1


def test_what_this_process_gave_up_is_cleared_at_its_next_look(tmp_path):
    remains(tmp_path, 'adapter', disk.process_mark(), 'old')
    disk.write_text(tmp_path/'other', 'x')
    assert not (tmp_path/'adapter').exists() # nobody looked for it
    disk.clear_remains(tmp_path, 'adapter')
    assert (tmp_path/'adapter').is_dir()


def test_long_names_and_names_in_chinese_are_written(tmp_path):
    for name in ('微'*80, 'x'*250, 'a.b'*70):
        assert disk.write_text(tmp_path/name, 'here').read_text()=='here'
    assert len([*tmp_path.iterdir()])==3


foreign = {'a README': ['README.md'], 'a project': ['README.md', '.git/HEAD', 'src/thesis.py'],
           'a model': ['config.json'],
           'a report': ['merge_report.json', 'notes.txt'], 'a contract and a folder': ['contract.json', 'src/a.py'],
           'sums of another program': ['checksums.json', 'data.csv']}


@pytest.mark.parametrize('name', foreign)
def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path, name):
    for file in foreign[name]: disk.write_text(tmp_path/'x'/file, '{"data.csv": "1f2e3d"}')
    before = sorted(p for p in tmp_path.rglob('*'))
    with pytest.raises(disk.SageError, match='is left alone: give a new folder'):
        with disk.whole_folder(tmp_path/'x', ours=True): raise AssertionError('it is decided before')
    assert sorted(p for p in tmp_path.rglob('*'))==before


@pytest.mark.parametrize('added', ['notes.txt', '.git/HEAD', 'part/more.bin', 'link'])
def test_what_was_added_to_a_folder_of_ours_keeps_it(folder, added):
    assert disk.foreign_fault(folder) is None
    if added=='link': (folder/added).symlink_to(folder.parent)
    else: disk.write_text(folder/added, 'mine')
    assert added in disk.foreign_fault(folder)


def test_a_file_that_comes_while_a_folder_is_written_keeps_the_old_one(folder):
    with pytest.raises(disk.SageError, match='holds notes.txt'):
        with disk.whole_folder(folder, ours=True): (folder/'notes.txt').write_text('mine')
    assert (folder/'notes.txt').read_text()=='mine' and (folder/'weights.safetensors').exists()


def test_an_older_folder_without_a_manifest_is_known_by_its_contract(folder):
    shutil.rmtree(folder/'part')
    for name in (manifest_file, 'README.md'): (folder/name).unlink()
    assert disk.foreign_fault(folder)=='is not empty and was not made here'
    assert disk.foreign_fault(folder, vouched=True) is None
    (folder/'contract.json').write_text('{"form": 1}')
    assert disk.foreign_fault(folder) is None


def test_the_edges_of_a_whole_folder(tmp_path):
    scratch = tmp_path
    with whole_folder(scratch/'model') as folder: write_text(folder/'weights', 'first')
    note = write_text(scratch/'note.json', '{}')
    with whole_folder(scratch/'model') as folder: write_text(folder/'config', 'second').chmod(0o600)
    same([p.name for p in (scratch/'model').iterdir()], ['config'])
    same((scratch/'model'/'config').stat().st_mode & 0o777, (scratch/'model').stat().st_mode & 0o666)
    with expect_fail(SageError, contains='a file stands where a folder is needed'):
        with whole_folder(note): pass
    with expect_fail(SageError, contains='free some space'):
        with whole_folder(scratch/'full'): raise OSError(errno.ENOSPC, 'No space left on device')
    with expect_fail(FileNotFoundError):
        with whole_folder(scratch/'other') as folder: (folder/'missing').read_text()
    same([(scratch/'full').exists(), (scratch/'other').exists(), list(scratch.glob('.*'))], [False, False, []])


def test_checksums_while_the_process_ends():
    at_the_end = ('import atexit\nfrom sage_finetune.core.disk import in_threads\n'
                  "atexit.register(lambda: print(in_threads(len, ['a', 'bcd'])))\nimport concurrent.futures.thread\n")
    same(run([sys.executable, '-c', at_the_end], capture_output=True, text=True, check=True).stdout, '[1, 3]\n')


def test_manifests_of_other_forms(tmp_path):
    scratch = tmp_path
    with whole_folder(scratch/'adapter') as folder:
        write_text(folder/'weights', 'abd')
        write_manifest(folder)
    for wrong,fault in (('', 'broken'), ('{}', 'names no file'), ('{"weights": 5}', 'broken'),
                        ('{"weights": []}', 'broken'), ('{"weights": null}', 'broken'),
                        ('{"weights": [3, 891568578]}', 'has changed'),
                        ('{"weights": [true, "a"]}', 'broken'), ('{"none": [1, 2]}', 'none is missing'),
                        ('{"\\u0000": [1, 2]}', 'is missing'), ('[1]', 'broken'), ('['*100_000, 'broken')):
        write_text(scratch/'adapter'/manifest_file, wrong)
        same(fault in manifest_fault(scratch/'adapter'), True)
    write_text(scratch/'adapter'/manifest_file, '{"weights": [3, 891568578]}')
    write_text(scratch/'adapter'/'weights', 'abc')
    same(manifest_fault(scratch/'adapter'), None)


# What the disk refuses, in whatever words a library says so

refusals = [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EFBIG, 'File too large'),
            OSError(errno.EROFS, 'Read-only file system'), OSError(errno.EDQUOT, 'Disk quota exceeded'),
            RuntimeError('I/O error: File too large (os error 27)'), RuntimeError('PytorchStreamWriter failed writing'),
            RuntimeError('basic_ios::clear: iostream error')]


@pytest.mark.parametrize('error', refusals, ids=str)
def test_what_the_disk_refuses_inside_a_folder_names_the_folder_and_the_fix(tmp_path, error):
    with pytest.raises(SageError, match=f'cannot write {tmp_path/"model"}: .*; [a-z]'):
        with whole_folder(tmp_path/'model') as new:
            write_text(new/'config.json', '{}')
            raise error
    assert [*tmp_path.iterdir()]==[]


@pytest.mark.parametrize('error', [FileNotFoundError('rows.jsonl'), RuntimeError('a shape'), OSError(errno.EIO, 'x'),
                                   PermissionError(errno.EACCES, 'Permission denied', '/elsewhere/base')], ids=str)
def test_what_is_not_of_the_disk_keeps_its_words(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        with whole_folder(tmp_path/'model'): raise error
    assert raised.value is error


def test_what_may_not_be_written_in_a_folder_is_of_the_disk(tmp_path):
    with pytest.raises(SageError, match='cannot write .*model: permission denied'):
        with whole_folder(tmp_path/'model') as new:
            raise PermissionError(errno.EACCES, 'Permission denied', str(new/'weights'))


@pytest.mark.parametrize('error,words', [
    (PermissionError(errno.EACCES, 'Permission denied', '/data/a'), '/data/a: permission denied; look at'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'a file: no space left on device; free some space'),
    (OSError(errno.EISDIR, 'Is a directory', b'/data/b'), '/data/b: is a directory; a folder stands where'),
    (OSError('its own words'), 'its own words'), (FileNotFoundError('x does not exist'), 'x does not exist')])
def test_the_words_of_the_system_name_the_file_and_the_fix(error, words): assert system_words(error).startswith(words)


def test_a_folder_that_came_meanwhile_stays_or_is_replaced(tmp_path):
    for stays in (True, False):
        with whole_folder(tmp_path/'entry', unless=lambda there: stays) as mine:
            write_text(mine/'a', 'mine')
            with whole_folder(tmp_path/'entry') as theirs: write_text(theirs/'a', 'theirs')
        assert (tmp_path/'entry'/'a').read_text()==('theirs' if stays else 'mine')
    assert [p.name for p in tmp_path.iterdir()]==['entry']


@pytest.mark.parametrize('moment', ['exists', 'rename'])
def test_a_folder_that_another_process_puts_there_in_between_is_no_error(tmp_path, monkeypatch, moment):
    "Between the look and the rename, at either of them"
    real,target,times = getattr(disk.Path, moment),tmp_path/'entry', []
    def between(self, *args):
        if self==target or moment=='rename' and args and args[0]==target:
            times.append(1)
            if len(times)<3:
                seen = real(self, *args) if moment=='exists' else None
                shutil.rmtree(target, ignore_errors=True) if target.is_dir() and len(times)==2 else target.mkdir()
                (target/'other').touch() if target.is_dir() else None
                if moment=='exists': return seen
        return real(self, *args)
    monkeypatch.setattr(disk.Path, moment, between)
    with whole_folder(target) as new: write_text(new/'a', 'mine')
    monkeypatch.undo()
    assert (target/'a').read_text()=='mine' and len(times)>=2
    assert [p.name for p in tmp_path.iterdir()]==['entry']


def test_what_is_discarded_is_gone_at_once_and_leaves_nothing(tmp_path):
    (tmp_path/'entry'/'deep').mkdir(parents=True)
    for _ in range(2): discard(tmp_path/'entry') # the second time there is none
    assert [*tmp_path.iterdir()]==[]


def test_a_file_that_is_written_by_others_appears_whole_or_not_at_all(tmp_path):
    def half(temp):
        temp.write_bytes(b'ab')
        raise OSError(errno.ENOSPC, 'No space left on device')
    write_whole(tmp_path/'f.png', lambda temp: temp.write_bytes(b'old'))
    with pytest.raises(SageError, match='cannot write .*f.png: no space left'): write_whole(tmp_path/'f.png', half)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()]==[('f.png', b'old')]
    assert disk_error(ValueError('x')) is None

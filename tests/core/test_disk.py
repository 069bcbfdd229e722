"Checksums: every file of a folder, every shape of a manifest, and what is remembered of large files"
import json
import os
import shutil

import pytest

from sage_finetune.core import disk
from sage_finetune.core.disk import file_digest, manifest_fault, manifest_file, write_manifest
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

"Rows of every kind of source: the duller edges, damage of any kind, and memory that stays flat"
import gzip
import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from quick import few
from sage_finetune.core import text_stream
from sage_finetune.rows import files
from sage_finetune.config import SageError
from sage_finetune.rows.sources import (
    has_texts, load_training_data, read_rows, Row, save_rows, source_digest, source_files
)

pair = [dict(question='a, "b"?', answer='å\nsecond line'), dict(question='2', answer='')]


def as_bytes(ending, rows=pair):
    "The same rows as a file of each kind"
    import pyarrow as pa
    import pyarrow.parquet as pq
    if ending == '.json': return json.dumps(rows).encode()
    if ending in ('.jsonl', '.ndjson'): return ''.join(json.dumps(r)+'\n' for r in rows).encode()
    if ending in ('.csv', '.tsv'):
        quoted = [['question', 'answer'], *(['"' + v.replace('"', '""') + '"' for v in r.values()] for r in rows)]
        return '\r\n'.join(('\t' if ending == '.tsv' else ',').join(cells) for cells in quoted).encode()
    if ending == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), made := pa.BufferOutputStream())
        return made.getvalue().to_pybytes()
    if ending == '.arrow':
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(made := pa.BufferOutputStream(), table.schema) as writer: writer.write_table(table)
        return made.getvalue().to_pybytes()
    return 'One.\n\nTwo.'.encode()


def seen(source, **options): return [(r.line, r.value or r.error) for r in read_rows(source, **options)]


def refused(kinds, source, **options):
    "The one line with which a source is refused, after any number of rows"
    with pytest.raises(kinds) as caught: list(read_rows(source, **options))
    assert '\n' not in str(caught.value)
    return str(caught.value)


endings = '.json', '.jsonl', '.ndjson', '.csv', '.tsv', '.parquet', '.arrow', '.txt', '.md'


@pytest.mark.parametrize('ending', endings)
def test_every_ending_gives_its_rows_plain_and_packed(ending, tmp_path):
    data = as_bytes(ending)
    (tmp_path/f'rows{ending}').write_bytes(data)
    (tmp_path/f'ROWS{ending.upper()}.GZ').write_bytes(gzip.compress(data))
    plain,packed = (list(read_rows(tmp_path/n)) for n in (f'rows{ending}', f'ROWS{ending.upper()}.GZ'))
    expected = [dict(text='One.\n\nTwo.')] if ending in ('.txt', '.md') else pair
    assert [r.value for r in plain] == [r.value for r in packed] == expected
    assert [r.line for r in plain] == [r.line for r in packed]
    assert plain[0].file == str(tmp_path/f'rows{ending}')
    assert source_digest(tmp_path/f'rows{ending}') != source_digest(tmp_path/f'ROWS{ending.upper()}.GZ')


@pytest.mark.parametrize('ending', endings)
def test_a_gzip_that_is_cut_off_or_none_is_named(ending, tmp_path):
    file = tmp_path/f'rows{ending}.gz'
    rows = [dict(question=os.urandom(50).hex(), answer='a') for _ in range(2000)]
    data = as_bytes(ending, rows) if ending not in ('.txt', '.md') else os.urandom(100_000).hex().encode()
    for content in (gzip.compress(data)[:-30000], gzip.compress(data)[:-4], b'no gzip at all',
                    gzip.compress(data)+b'more'):
        file.write_bytes(content)
        assert f'{file} is a broken or cut-off gzip file' in refused(ValueError, file)


def test_rows_before_the_damage_of_a_gzip_are_given(tmp_path):
    rows = [dict(question=os.urandom(50).hex(), answer='a') for _ in range(20000)]
    for ending in ('.json', '.jsonl', '.csv', '.tsv'):
        file = tmp_path/f'rows{ending}.gz'
        file.write_bytes(gzip.compress(as_bytes(ending, rows))[:-100_000])
        got = []
        with pytest.raises(ValueError, match='cut-off gzip'):
            for r in read_rows(file): got.append(r.value)
        assert len(got) > 10000 and got == rows[:len(got)]


@pytest.mark.parametrize('ending', ['.json', '.jsonl', '.csv', '.tsv', '.txt', '.md'])
def test_an_empty_file_has_no_rows(ending, tmp_path):
    for content in (b'', b'\n \r\n', b'\xef\xbb\xbf'):
        (tmp_path/f'x{ending}').write_bytes(content if ending not in ('.csv', '.tsv') else content.strip())
        assert seen(tmp_path/f'x{ending}') == []


def test_lines_of_json_and_what_damages_them(tmp_path):
    file = tmp_path/'x.jsonl'
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \t\n{"a": "\xff"}\n{"a": 1} {"a": 2}\n[1]\n'
                     b'{"a": NaN, "b": -Infinity}\n  {"a" 1}\n{"a": "b\rc"}\n{"a": "\xe2\x80\xa8"}')
    rows = list(read_rows(file))
    assert [r.line for r in rows] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert rows[0].value == {'a': 1} and rows[3].value == [1] and rows[4].value['b'] == float('-inf')
    assert rows[7].value == {'a': '\u2028'}
    assert [r.error for r in rows if r.error] == [
        'not UTF-8 at byte 8: save the file as UTF-8', 'not JSON: more after the row at column 10',
        "not JSON: Expecting ':' delimiter at column 8",
        'not JSON: Invalid control character at column 9']


@pytest.mark.parametrize('ending', ['.json', '.jsonl'])
def test_a_row_that_python_cannot_hold_or_that_says_two_things_is_an_error_of_that_row(ending, tmp_path):
    rows = ['{"a": 1}', '{"a": ' + '9'*5000 + '}', '{"b": [{"a": 1, "c": 2, "a": 1}]}', '{"a": 2}']
    text = '[' + ',\n'.join(rows) + ']' if ending == '.json' else '\n'.join(rows)
    (tmp_path/f'x{ending}').write_text(text)
    got = list(read_rows(tmp_path/f'x{ending}'))
    assert [(r.line, r.value) for r in got] == [(1, {'a': 1}), (2, None), (3, None), (4, {'a': 2})]
    assert (got[1].error == 'a whole number has too many digits'
            and got[2].error == "the key 'a' stands twice in one object")


def test_rows_before_a_bad_byte_are_given_and_the_byte_is_counted_in_the_file(tmp_path):
    for start in (b'', b'\xef\xbb\xbf'):
        head = start + b'[' + b'{"text": "\xc3\xa5"},\n'*50000
        (tmp_path/'x.json').write_bytes(head + b'{"text": "\xc3"}]')
        got = []
        with pytest.raises(ValueError, match=rf'not UTF-8 text \(byte {len(head)+11}\)'):
            for r in read_rows(tmp_path/'x.json'): got.append(r)
        assert len(got) == 50000 and got[-1].line == 50000 and {r.value['text'] for r in got} == {'å'}


def test_damage_in_a_list_without_line_breaks_has_its_column(tmp_path):
    rows = '[' + '{"text": "one"}, '*100_000
    (tmp_path/'x.json').write_text(rows + '{"text" "two"}]')
    assert f"x.json:1: not JSON: Expecting ':' delimiter at column {len(rows)+9}" in refused(
        ValueError, tmp_path/'x.json')
    (tmp_path/'x.json').write_text('\n' + rows + '{"text" "two"}]')
    assert f'x.json:2: not JSON: Expecting \':\' delimiter at column {len(rows)+9}' in refused(
        ValueError, tmp_path/'x.json')


def test_csv_with_everything_that_a_cell_may_hold(tmp_path):
    file = tmp_path/'x.csv'
    file.write_bytes(b'\xef\xbb\xbfq, a\r\n"1\r\n2","3"\r\n\r\n4,5,6\r\n7\r\n\x00,8\r\n\xff,9\r\n"a"b,1\r\n,\r\n'
                     + b'x'*200_000 + b',1\n"open,2\n3,4')
    assert [(r.line, r.error[:12] or [v[:4] for v in r.value.values()]) for r in read_rows(file)] == [
        (2, ['1\r\n2', '3']), (5, '3 cells wher'), (6, '1 cells wher'), (7, 'NUL byte at '), (8, 'not UTF-8 at'),
        (9, 'not CSV: \',\''),
        (10, ['', '']), (11, ['xxxx', '1']), (12, 'not CSV: a q'), (13, ['3', '4'])]
    assert list(next(read_rows(file)).value) == ['q', 'a']


@pytest.mark.parametrize('content,expected', [
    (b',\n1,2', 'no column has a name'), (b'""\n', 'no column has a name'),
    ('a,b\n'.encode('utf-16'), 'is UTF-16 text, as its first bytes say: save it as UTF-8'),
    (b'\xff,b\n', 'not UTF-8 at byte 1'), (b'"a,b\n', 'never closed'),
])
def test_a_csv_header_that_names_no_columns_is_refused(content, expected, tmp_path):
    (tmp_path/'x.csv').write_bytes(content)
    assert expected in refused(ValueError, tmp_path/'x.csv')


def test_a_long_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path):
    text = ''.join(f'Paragraph {i}.\nSecond line.\n\n' for i in range(100_000))
    (tmp_path/'x.md').write_text(text)
    rows = list(read_rows(tmp_path/'x.md'))
    assert ''.join(r.value['text'] for r in rows) == text and len(rows) == 3
    for r in rows:
        assert len(r.value['text']) <= 2**20 and r.value['text'].endswith('\n\n')
        assert r.value['text'].startswith(f'Paragraph {(r.line-1)//3}.')
    (tmp_path/'y.txt').write_text('é'*(2**20+1))
    assert [len(r.value['text']) for r in read_rows(tmp_path/'y.txt')] == [2**20, 1]


def test_a_parquet_file_keeps_types_and_counts_rows_over_batches(tmp_path):
    import datetime
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [dict(text=str(i), day=datetime.date(2026, 1, 1), raw=b'\xff', chat=[dict(role='user', content=None)])
            for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/'x.parquet')
    assert [r.value for r in read_rows(tmp_path/'x.parquet')] == [r | dict(chat=[dict(role='user')]) for r in rows]
    assert [r.line for r in read_rows(tmp_path/'x.parquet')] == list(range(1, 1001))
    data = (tmp_path/'x.parquet').read_bytes()
    for broken in (b'', b'PAR1', data[:-1], data[:200] + bytes(50) + data[250:], b'PAR1' + data[100:]):
        (tmp_path/'y.parquet').write_bytes(broken)
        assert f'{tmp_path/"y.parquet"} is no parquet file' in refused(ValueError, tmp_path/'y.parquet')


# --- the parts that read JSON ---

def json_values(data, size=2**18):
    "Rows of the JSON `data`, read in blocks of `size`"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_stream, 'block_size', size)
        return [(r.line, r.value, r.error) for r in files._json_rows(io.BytesIO(data), 'x.json')]


@pytest.mark.parametrize('line,error', [
    (b'\xff\n', 'not UTF-8 at byte 1: save the '), (b'[[1]]]', 'not JSON: more after the row a'),
    (b'9'*5000, 'a whole number has too many di'), (b'['*100_000, 'not JSON: nested too deeply at'),
    (b'\xef\xbb\xbf {"a": NaN}\r\n', ''),
], ids=['bad byte', 'text after', 'many digits', 'deep', 'NaN'])
def test_odd_lines_of_json(line, error):
    assert next(files._jsonl_rows(io.BytesIO(line), 'x')).error[:30] == error


def test_a_list_reads_the_same_in_blocks_of_any_size():
    mixed = ('[ 1.5e3 , -Infinity,\n"\\ud83d\\ude00 é😀",null,\n\n'
             '{"a":[true,{"b":12345}]} ,{"c":1,"c":2}, 17\n]\n').encode()
    whole = json_values(mixed)
    assert [n for n,_,_ in whole] == [1, 1, 2, 2, 4, 4, 4]
    assert [v for _,v,_ in whole] == [1500.0, float('-inf'), '😀 é😀', None, {'a': [True, {'b': 12345}]}, None, 17]
    for size in range(1, 40): assert json_values(mixed, size) == whole
    assert json_values(b'') == json_values(b' [ ] ') == []
    assert json_values(b'{"a": 1}{"a": 2}\n\n{"a": 3}')[2] == (3, {'a': 3}, '')


@pytest.mark.parametrize('data,why', [
    (b'[1,]', '1: not JSON: Expecting value at column 4'), (b'[1 2]', 'expected , or ]'),
    (b'[1]\n2', 'x.json:2: not JSON: text after the list at column 1'), (b'[', 'Expecting value at column 2'),
    (b'7', 'must hold a list'), (b'['*100_000, 'nested too deeply'), (b'[1, \xff]', '(byte 5)'),
], ids=['comma', 'no comma', 'text after', 'open', 'number', 'deep', 'bad byte'])
def test_a_broken_list_names_its_place_in_blocks_of_any_size(data, why):
    for size in (1, 2, 3, 2**18):
        with pytest.raises(ValueError) as caught: json_values(data, size)
        assert why in str(caught.value)


# --- paths ---

def test_a_folder_is_walked_in_order_and_what_is_passed_over_is_told(tmp_path):
    for name in ('b.jsonl', 'a/z.json', 'a/b/c.csv', 'README.md', '.git/x.json', '.hidden.json', 'notes.xlsx',
                 'LICENSE', 'dataset_info.json'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text('')
    (tmp_path/'link').symlink_to(tmp_path/'a')
    (tmp_path/'gone.json').symlink_to(tmp_path/'nowhere')
    os.mkfifo(tmp_path/'pipe.json')
    files,passed = source_files(tmp_path)
    assert [str(f.relative_to(tmp_path)) for f in files] == ['a/b/c.csv', 'a/z.json', 'b.jsonl']
    assert {p.name: why for p,why in passed} == {
        'README.md': 'a text beside files of rows', '.git': 'hidden', '.hidden.json': 'hidden',
        'notes.xlsx': "unknown ending '.xlsx'",
        'LICENSE': 'no ending', 'dataset_info.json': 'describes a data set, holds no rows',
        'link': 'a link to a folder',
        'gone.json': 'not a plain file', 'pipe.json': 'not a plain file'}


def test_a_folder_of_texts_is_read_as_texts(tmp_path):
    (tmp_path/'a.txt').write_text('one')
    (tmp_path/'README.md').write_text('two')
    assert [r.value['text'] for r in read_rows(tmp_path)] == ['two', 'one']


def test_patterns(tmp_path, monkeypatch):
    for name in ('a1.json', 'a2.json', 'b.json', 'deep/er/a3.json', 'deep/notes.md'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text('[]')
    monkeypatch.chdir(tmp_path)
    names = lambda pattern: [str(f) for f in source_files(pattern)[0]]
    assert names('a*.json') == ['a1.json', 'a2.json']
    assert names('**/a[23].json') == ['a2.json', 'deep/er/a3.json']
    assert names('**') == ['a1.json', 'a2.json', 'b.json', 'deep/er/a3.json']
    assert source_files('*')[1] == [(Path('deep'), 'a folder')]
    (tmp_path/'[x].json').write_text('[{"text": "literal"}]')
    assert seen('[x].json') == [(1, {'text': 'literal'})]


@pytest.mark.parametrize('source,kind,expected', [
    ('missing.json', FileNotFoundError, 'data file not found'), ('missing', FileNotFoundError, 'data file not found'),
    ('*.jsonl', FileNotFoundError, 'no file matches'), ('empty', ValueError, 'no file in'),
    ('rows.xlsx', ValueError, 'must end in .json'),
    ('there.pdf', ValueError, 'must end in .json'), ('empty/x', FileNotFoundError, 'data file not found'),
    ('', ValueError, '`source`'), ('x\0.json', ValueError, '`source`'),
    ('a'*5000 + '.json', SageError, 'cannot read'), ('folder.json', ValueError, 'no file in'),
    ('there.pdf/x.json', SageError, 'cannot read'), (7, ValueError, 'got int'), (None, ValueError, 'got NoneType'),
    ({'a': 1}, ValueError, 'got dict'), ((r for r in ()), ValueError, 'got generator'),
])
def test_what_is_no_source_is_refused_in_one_line(source, kind, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty').mkdir()
    (tmp_path/'folder.json').mkdir()
    (tmp_path/'there.pdf').write_text('')
    assert expected in refused(kind, source)
    with pytest.raises(kind): source_digest(source)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_a_file_or_folder_without_permission(tmp_path):
    (tmp_path/'x.json').write_text('[]')
    (tmp_path/'x.json').chmod(0)
    assert 'permission denied' in refused(SageError, tmp_path/'x.json')
    (tmp_path/'shut').mkdir(mode=0)
    assert 'permission denied' in refused(SageError, tmp_path)


def test_refusals_of_the_system_are_one_line(tmp_path, monkeypatch):
    def no(*args): raise PermissionError(13, 'Permission denied')
    (tmp_path/'x.json').write_text('[]')
    monkeypatch.setattr('builtins.open', no)
    assert refused(SageError, tmp_path/'x.json') == f'cannot read {tmp_path/"x.json"}: permission denied'
    monkeypatch.setattr(Path, 'iterdir', no)
    assert 'permission denied' in refused(SageError, tmp_path)


# --- datasets, frames, lists ---

@pytest.fixture
def quiet(tmp_path, monkeypatch):
    "datasets without progress bars, its cache in a folder of the test"
    import datasets
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_saved_datasets(quiet, tmp_path):
    data = quiet.Dataset.from_list(pair)
    data.save_to_disk(tmp_path/'one')
    quiet.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path/'two')
    assert [r.value for r in read_rows(tmp_path/'one')] == pair
    assert [r.value for r in read_rows(str(tmp_path/'two'), split='test')] == pair[1:]
    assert (next(read_rows(tmp_path/'one')).file == str(tmp_path/'one')
            and source_files(tmp_path/'one') == ([tmp_path/'one'], []))
    assert 'it has: train, test' in refused(SageError, tmp_path/'two', split='validation')
    assert 'leave `split` out' in refused(SageError, tmp_path/'one', split='test')
    assert source_digest(tmp_path/'one') == source_digest(data) == source_digest(tmp_path/'two') != source_digest(
        tmp_path/'two', split='test')
    (tmp_path/'rows.json').write_text('[]')
    assert dict(source_files(tmp_path)[1])[tmp_path/'one'] == 'a saved dataset: give its own path'
    for arrow in (tmp_path/'one').glob('*.arrow'): arrow.write_bytes(b'broken')
    assert 'is a broken saved dataset' in refused(ValueError, tmp_path/'one')


def test_datasets_in_memory(quiet):
    data = quiet.Dataset.from_list(pair)
    assert seen(data) == seen(data.with_format('numpy')) == seen(data.to_iterable_dataset()) == list(enumerate(pair, 1))
    assert next(read_rows(data)).file == 'dataset'
    both = quiet.DatasetDict(train=data, test=data.select([1]))
    assert seen(both, split='test') == [(1, pair[1])]
    assert 'it has: train, test' in refused(SageError, both, split='dev')
    louder = data.with_transform(lambda rows: {k: [v.upper() for v in vs] for k,vs in rows.items()})
    assert seen(louder)[0][1]['question'] == 'A, "B"?'
    digests = [source_digest(d) for d in (data, data.select([1, 0]), data.select([0]), louder,
                                          quiet.Dataset.from_list([*pair[:1], dict(question='2', answer=None)]))]
    assert len(set(digests)) == 5
    assert source_digest(data.select([0, 1])) == source_digest(data) == source_digest(pickle.loads(pickle.dumps(data)))
    assert source_digest(data.to_iterable_dataset()) == source_digest(data.to_iterable_dataset())


def test_a_data_set_of_the_hub_is_loaded_by_split_and_a_folder_stands_in_for_it(quiet, tmp_path, monkeypatch):
    hub = tmp_path/'hub'
    hub.mkdir()
    for split in ('train', 'test'):
        (hub/f'{split}.jsonl').write_text(''.join(json.dumps(dict(text=f'{split} {i}'))+'\n' for i in range(3)))
    real = quiet.load_dataset
    asked = []
    def stand_in(path, **options):
        asked.append((path, options))
        return real(str(hub), **{**options, 'revision': None})
    monkeypatch.setattr(quiet, 'load_dataset', stand_in)
    rows = list(read_rows('owner/name', split='test', revision='v1'))
    assert asked == [('owner/name', dict(name=None, split='test', revision='v1'))]
    assert [(r.file, r.line, r.value) for r in rows] == [('owner/name', i+1, dict(text=f'test {i}')) for i in range(3)]
    assert len(seen('owner/name', split='train[:2]')) == 2
    assert "Should be one of ['train', 'test']" in refused(SageError, 'owner/name', split='validation')
    assert "Available: ['default']" in refused(SageError, 'owner/name', subset='other')
    assert source_digest('owner/name') != source_digest('owner/name', split='test') == source_digest(
        'owner/name', split='test')
    (hub/'train.jsonl').write_text('{"text": "train"}\n{"text": \n')
    assert 'JSON' in refused(SageError, 'owner/name')


def test_the_hub_out_of_reach_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(SageError, 'owner/no-such-data')
    assert 'no file or folder is called owner/no-such-data' in said and 'Hub' in said
    with pytest.raises(FileNotFoundError): load_training_data('owner/no-such-data')
    (tmp_path/'owner').mkdir()
    assert 'data file not found' in refused(FileNotFoundError, 'owner/no-such-data')


@pytest.mark.parametrize('option', [dict(split='test'), dict(revision='v1'), dict(subset='main')])
def test_an_option_that_would_be_passed_over_is_refused(option, tmp_path):
    (tmp_path/'x.json').write_text('[]')
    for source in (tmp_path/'x.json', []):
        assert f'`{[*option][0]}` is for' in refused(ValueError, source, **option)
        with pytest.raises(ValueError): source_digest(source, **option)


def test_frames():
    import datetime
    pd = pytest.importorskip('pandas')
    frame = pd.DataFrame(dict(text=['a', None], n=[1.5, float('nan')], k=[1, 2],
                              day=[pd.Timestamp(2026, 1, 1), pd.NaT], chat=[[{'role': 'user'}], None]), index=[7, 9])
    assert [r.value for r in read_rows(frame)] == [
        dict(text='a', n=1.5, k=1, day=datetime.datetime(2026, 1, 1), chat=[{'role': 'user'}]),
        dict(text=None, n=None, k=2, day=None, chat=None)]
    assert [(r.file, r.line) for r in read_rows(frame)] == [('frame', 1), ('frame', 2)]
    assert type(next(read_rows(frame)).value['k']) is int
    twice, = read_rows(pd.DataFrame([[1, 2]], columns=['a', 'a']))
    assert twice.value == {'a': 1, 'a.1': 2} and "two columns have the name 'a'" in twice.notes[0]
    assert source_digest(frame) == source_digest(frame.copy()) != source_digest(frame.assign(k=[1, 3]))


def test_lists_are_given_as_they_are():
    rows = [dict(text='a'), 7, None, 'text']
    assert [r.value for r in read_rows(rows)] == [r.value for r in read_rows(tuple(rows))] == rows
    assert [*read_rows([dict(a=1)])] == [Row('list', 1, dict(a=1))] and seen([]) == []


def pickle_of(value):
    "A value as bytes; none where it is nested too deeply for that"
    try: return pickle.dumps(value)
    except RecursionError: return b''


def test_a_checksum_sees_every_change_in_memory():
    import datetime
    import numpy as np
    deep = []
    for _ in range(5000): deep = [deep]
    rows = [[], [{}], [[]], [None], [0], [1], [True], ['1'], [1.0], [b'1'], ['ab'], ['a', 'b'],
            [['a', 'b']], [dict(a='b')], [dict(a=['b'])], [dict(b='a')], [np.zeros(2000)], [np.ones(2000)],
            [np.zeros(2000, dtype='float32')], [datetime.date(2026, 1, 1)], [{1: 'a'}],
            [{'1': 'a'}], ['\ud800'], [10**6000], [-10**6000], [deep], [[deep]], [float('nan')], [dict(a=1, b=2)],
            [dict(a=1), dict(b=2)]]
    assert len({source_digest(r) for r in rows}) == len(rows)
    assert source_digest([deep]) == source_digest([deep])
    for r in (r for r in rows if len(pickle_of(r))):
        assert source_digest(r) == source_digest(pickle.loads(pickle_of(r)))
    shared = dict(a=1)
    assert source_digest([[shared, shared]]) == source_digest([[dict(a=1), dict(a=1)]])
    shared['self'] = shared
    with pytest.raises(ValueError, match='holds itself'): source_digest([shared])


def test_a_checksum_of_files_is_of_their_content(tmp_path):
    for name in ('one', 'two'):
        (tmp_path/name).mkdir()
        (tmp_path/name/f'{name}-a.jsonl').write_text('{"a": 1}\n')
        (tmp_path/name/f'{name}-b.jsonl').write_text('{"a": 2}\n')
    first = source_digest(tmp_path/'one')
    assert first == source_digest(tmp_path/'two') == source_digest(str(tmp_path/'two'/'*.jsonl'))
    (tmp_path/'two'/'two-a.jsonl').rename(tmp_path/'two'/'two-c.jsonl')
    assert first != source_digest(tmp_path/'two')
    (tmp_path/'one'/'notes.pdf').write_text('passed over')
    assert first == source_digest(tmp_path/'one')
    (tmp_path/'one'/'one-b.jsonl').write_text('{"a": 3}\n')
    assert first != source_digest(tmp_path/'one')


# --- saving ---

@pytest.mark.parametrize('rows', [[dict(a=b'1')], [dict(a='\ud800')], [dict(a={1, 2})]])
@pytest.mark.parametrize('ending', ['.json', '.jsonl'])
def test_rows_that_json_cannot_hold_leave_no_file(rows, ending, tmp_path):
    with pytest.raises(ValueError, match='`rows` must hold what JSON can hold'): save_rows(tmp_path/f'x{ending}', rows)
    assert list(tmp_path.iterdir()) == []


def test_saved_rows_come_back(tmp_path):
    for ending in ('.json', '.jsonl'): assert load_training_data(save_rows(tmp_path/f'x{ending}', pair)) == pair
    with pytest.raises(ValueError, match='must end in .json or .jsonl'): save_rows(tmp_path/'x.csv', pair)
    (tmp_path/'y.jsonl').write_text('[1]\n')
    with pytest.raises(ValueError, match='y.jsonl:1: a row must be an object'): load_training_data(tmp_path/'y.jsonl')


# --- memory ---

def peak(source):
    "Most bytes that Python held while it read a source, and the rows"
    next(read_rows(source), None)
    tracemalloc.start()
    try: return sum(1 for _ in read_rows(source)), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.mark.parametrize('ending', few(sorted(endings, key=lambda e: e not in ('.jsonl', '.parquet')), 2))
def test_memory_stays_flat(ending, tmp_path):
    row = dict(question='x'*500, answer='å'*250)
    rows = [row]*15_000 # 15 MB
    data = as_bytes(ending, rows) if ending not in ('.txt', '.md') else ('x'*500 + '\n\n').encode()*60_000
    for file,content in ((tmp_path/f'x{ending}', data), (tmp_path/f'x{ending}.gz', gzip.compress(data, 1))):
        file.write_bytes(content)
        n,most = peak(file)
        assert n == (15_000 if ending not in ('.txt', '.md') else 29) and most < 8e6, (n, most)


def test_one_large_row_takes_time_in_proportion(tmp_path, monkeypatch):
    "A row of 256 blocks is parsed some eight times, not 256 times"
    parsed = []
    real = text_stream.decoded_json
    monkeypatch.setattr(text_stream, 'decoded_json',
                        lambda text, at=0: (parsed.append(len(text)-at), real(text, at))[1])
    monkeypatch.setattr(text_stream, 'block_size', 1000)
    (tmp_path/'x.json').write_text(json.dumps([dict(text='x'*256_000), dict(text='y')]))
    assert [len(r.value['text']) for r in read_rows(tmp_path/'x.json')] == [256_000, 1]
    assert len(parsed) < 15 and sum(parsed) < 1_500_000


# --- any bytes at all ---

def lines_add_up(file):
    "Read a source to its end or its refusal; the lines go up"
    last = 0
    try:
        for r in read_rows(file):
            assert r.line >= last >= 0 and isinstance(r.error, str) and '\n' not in r.error
            assert r.value is None or not r.error
            last = r.line
    except (ValueError, FileNotFoundError): pass
    except SageError as e: assert '\n' not in str(e)


try: from hypothesis import HealthCheck, given, settings, strategies as st
except ImportError: given = None

if given:
    examples = int(os.environ.get('SAGE_EXAMPLES', 100))
    often = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    scraps = [b'{"text": "a"}', b'{', b'}', b'[', b']', b',', b'"', b'\n', b'\r\n', b'\\u', b'\\ud800', b'\xff',
              b'\xc3', b'\0', b'\xef\xbb\xbf', b'1e5', b'NaN',
              b'a,b', b'\t', b'PAR1', b'\x1f\x8b\x08', b'"a": 1', b'9'*30, b'\x1a', b' ']
    anything = st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(scraps), max_size=20).map(b''.join))
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                          lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
                          max_leaves=12)

    @often
    @given(data=anything, ending=st.sampled_from(endings), packed=st.sampled_from(['', 'broken', 'whole']),
           size=st.sampled_from([1, 2, 7, 2**18]))
    def test_any_bytes_as_any_file_are_rows_or_one_refusal(data, ending, packed, size, tmp_path):
        file = tmp_path/f'x{ending}{".gz" if packed else ""}'
        file.write_bytes(gzip.compress(data) if packed == 'whole' else data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_stream, 'block_size', size)
            lines_add_up(file)
        assert len(source_digest(file)) == 32

    @often
    @given(rows=st.lists(values, max_size=5), size=st.sampled_from([1, 3, 50, 2**18]),
           indent=st.sampled_from([None, 0, 2]))
    def test_any_json_values_come_back_whatever_the_block(rows, size, indent, tmp_path):
        (tmp_path/'x.json').write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)), encoding='utf-8',
                                       errors='surrogatepass')
        (tmp_path/'x.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in [*rows, {}, {}]), encoding='utf-8')
        expected = [files.without_nulls(r)[0] for r in rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_stream, 'block_size', size)
            assert [r.value for r in read_rows(tmp_path/'x.json')] == expected
        assert [(r.line, r.value) for r in read_rows(tmp_path/'x.jsonl')][:-2] == list(enumerate(expected, 1))
        assert source_digest(rows) == source_digest(pickle.loads(pickle.dumps(rows)))

    @often
    @given(cells=st.lists(st.tuples(st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs'])),
                                    st.text('a"\n\r,\t ')), max_size=6))
    def test_any_cells_written_by_the_standard_library_come_back(cells, tmp_path):
        import csv
        for ending,dialect in (('.csv', 'excel'), ('.tsv', 'excel-tab')):
            with open(tmp_path/f'x{ending}', 'w', newline='', encoding='utf-8') as f:
                csv.writer(f, dialect, quoting=csv.QUOTE_ALL).writerows([('a', 'b'), *cells])
            assert [tuple(r.value.values()) for r in read_rows(tmp_path/f'x{ending}')] == cells


def test_whether_a_source_holds_texts(tmp_path):
    (tmp_path/'a.txt').write_text('one\n\ntwo\n')
    (tmp_path/'b.jsonl').write_text('{"text": "a"}\n')
    assert [has_texts(tmp_path/n) for n in ('a.txt', 'b.jsonl')]==[True, False]


def test_columns_that_the_format_of_a_data_set_hides_are_not_read():
    from datasets import Dataset
    data = Dataset.from_list([dict(question='Why?', answer='So.', context='hidden')])
    shown = data.with_format(None, columns=['question', 'answer'])
    assert [r.value for r in read_rows(shown)] == [shown[0]] == [dict(question='Why?', answer='So.')]
    assert [r.value for r in read_rows(data.with_format('numpy', columns=['answer']))] == [dict(answer='So.')]
    assert source_digest(shown) != source_digest(data)
    whole = data.with_format(None, columns=['question'], output_all_columns=True)
    assert [r.value for r in read_rows(whole)] == [r.value for r in read_rows(data)] == [data[0]]
    assert [r.value for r in read_rows(shown.select([0, 0]))] == [shown[0]]*2


@pytest.mark.parametrize('index,more', [
    ('context', []), (['context', 'id'], []), (['context', None], ['level_1'])], ids=['one', 'two', 'one of two'])
def test_an_index_with_a_name_is_a_column_of_a_frame(index, more):
    import pandas as pd
    rows = [dict(question='Why?', answer='So.', context='C', id=1),
            dict(question='Who?', answer='I.', context='D', id=2)]
    frame = pd.DataFrame(rows).set_index(['context', 'id'] if isinstance(index, list) else index)
    if more: frame.index.names = index
    found = [r.value for r in read_rows(frame)]
    assert [r['context'] for r in found] == ['C', 'D'] and {*more} <= {*found[0]}
    frame.index.names = [None]*frame.index.nlevels
    assert [{*r.value} for r in read_rows(frame)] == [{*frame.columns}]*2


def test_an_index_with_the_name_of_a_column_is_told():
    import pandas as pd
    frame = pd.DataFrame([dict(question='Why?', answer='So.')])
    frame.index = pd.Index(['other'], name='answer')
    row = next(read_rows(frame))
    assert row.value == {'answer': 'other', 'question': 'Why?', 'answer.1': 'So.'} and 'two columns' in row.notes[0]

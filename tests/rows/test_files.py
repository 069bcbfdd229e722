"Files that other programs write, and damage that leaves rows readable: each kind with several members"
import datetime
import gzip
import json
import pickle

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.rows.files import column_names, known_endings, made_row, open_file, read_file, table_rows
from sage_finetune.rows.sources import load_training_data, read_rows, source_digest, source_files

qa = [dict(question='Why?', answer='So.'), dict(question='Who?', answer='Me.')]


def rows_of(path, content, **options):
    "The rows of a file with this content"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, **options))


def values(rows): return [r.value for r in rows]


def notes(rows): return [n for r in rows for n in r.notes]


def errors(rows): return [(r.line, r.error) for r in rows if r.error]


# --- nulls that Arrow fills in ---

call = lambda **arguments: dict(messages=[dict(role='assistant', content='', tool_calls=[
    dict(type='function', function=dict(name='f', arguments=arguments))])])


def test_the_same_calls_are_the_same_rows_from_every_source(tmp_path):
    import datasets
    import pandas as pd
    rows = [call(city='Oslo'), call(zone='CET'), call(when=dict(day=1)), call(items=[dict(a=1), dict(b=2)])]
    data = datasets.Dataset.from_list(rows)
    data.to_json(tmp_path/'a.jsonl')
    data.to_json(tmp_path/'a.json', lines=False)
    data.to_parquet(tmp_path/'a.parquet')
    data.save_to_disk(tmp_path/'saved')
    sources = (rows, data, data.to_pandas(), pd.DataFrame(rows), data.to_iterable_dataset(), data.to_list(),
               tmp_path/'saved', *(tmp_path/f'a.{e}' for e in ('jsonl', 'json', 'parquet')))
    for source in sources: assert values(read_rows(source)) == rows
    told = 'keys of `arguments` that hold null are read as absent'
    assert not notes(read_rows(rows)) and all(notes(read_rows(s)) == [told]*4 for s in (data, tmp_path/'a.jsonl'))


@pytest.mark.parametrize('row,expected,told', [
    (dict(text=None), dict(text=None), []),
    (dict(a=dict(b=None)), dict(a={}), []),
    (dict(messages=[dict(role='user', name=None, content=None)]), dict(messages=[dict(role='user')]), []),
    (dict(messages=[dict(content=[dict(type='text', text='a', image=None)])]),
     dict(messages=[dict(content=[dict(type='text', text='a')])]), []),
    (dict(messages=[dict(content=dict(temperature=None))]), dict(messages=[dict(content={})]), ['content']),
    (dict(output=dict(a=[dict(b=None)])), dict(output=dict(a=[{}])), []),
    (dict(tools=[dict(function=dict(parameters=dict(properties=dict(x=dict(default=None)))))]),
     dict(tools=[dict(function=dict(parameters=dict(properties=dict(x={}))))]), ['parameters']),
    (call(a=[dict(b=None)]), call(a=[{}]), ['arguments']),
    (call(a=[None, 1]), call(a=[None, 1]), []),
    (call(x='{"a": null}'), call(x='{"a": null}'), []),
], ids=['column', 'inside', 'turn', 'part', 'result', 'list', 'schema', 'nested', 'in a list', 'text'])
def test_a_key_that_holds_null_is_absent_and_told_where_it_may_have_been_meant(row, expected, told, tmp_path):
    told = [f'keys of `{name}` that hold null are read as absent' for name in told]
    before = pickle.dumps(row)
    for source in ([row], tmp_path/'x.jsonl', tmp_path/'x.json'):
        if source == [row]: rows = list(read_rows(source))
        else: rows = rows_of(source, json.dumps([row] if source.suffix == '.json' else row))
        assert values(rows) == [expected] and notes(rows) == told
    assert pickle.dumps(row) == before


def test_a_row_that_is_nested_too_deeply_is_an_error_of_that_row():
    deep = dict(a=None)
    for _ in range(5000): deep = dict(a=[deep])
    assert [r.error for r in read_rows([deep, dict(text='a')])] == ['nested too deeply', '']
    assert made_row('x', 1, deep).error == 'nested too deeply'


# --- what `datasets` stores ---

def test_features_of_a_file_are_those_of_the_object(tmp_path):
    import datasets
    features = datasets.Features(dict(
        chat=[dict(role=datasets.Value('string'), content=datasets.Json())],
        label=datasets.ClassLabel(names=['no', 'yes']),
        deep=datasets.List(datasets.List(datasets.Json())), raw=datasets.Json(decode=False), image=datasets.Image(),
        table=datasets.Array2D((2, 2), 'int32'), day=datasets.Value('date32'), at=datasets.Value('timestamp[us]'),
        large=datasets.LargeList(datasets.Json())))
    row = dict(chat=[dict(role='user', content=[dict(type='text')]), dict(role='x', content='a "text"')], label=1,
               deep=[[1, 'a'], []], raw='{"a": 1}', image=dict(bytes=b'no image', path=None), table=[[1, 2], [3, 4]],
               day=datetime.date(2026, 1, 2), at=datetime.datetime(2026, 1, 2, 3), large=[dict(a=1), None])
    data = datasets.Dataset.from_list([row, dict.fromkeys(row)], features=features)
    data.to_parquet(tmp_path/'a.parquet')
    data.save_to_disk(tmp_path/'saved')
    arrow = next((tmp_path/'saved').glob('*.arrow'))
    (tmp_path/'a.arrow').write_bytes(arrow.read_bytes())
    (tmp_path/'a.arrow.gz').write_bytes(gzip.compress(arrow.read_bytes()))
    expected = [row | dict(image=dict(bytes=b'no image')), dict.fromkeys(row)]
    for source in data, tmp_path/'saved', *sorted(tmp_path.glob('a.*')): assert values(read_rows(source)) == expected
    assert values(read_rows(data.select([1, 0]))) == expected[::-1]


def test_json_that_only_the_schema_or_only_the_metadata_tells(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    texts = ['{"a": 1}', None, '"b"', '{"a": ', '[1, 2]']
    said = {'huggingface': json.dumps({'info': {'features': {'x': {'_type': 'Json'}}}})}
    plain = pa.table(dict(x=texts))
    tables = plain.replace_schema_metadata(said), pa.table(dict(x=pa.array(texts, pa.json_())))
    for table in tables:
        pq.write_table(table, tmp_path/'x.parquet')
        rows = list(read_rows(tmp_path/'x.parquet'))
        assert values(rows) == [dict(x=dict(a=1)), dict(x=None), dict(x='b'), None, dict(x=[1, 2])]
        assert errors(rows) == [(4, '`x`: not JSON: Expecting value at column 7')]
    for broken in (b'no json', b'{}', b'{"info": null}', b'{"info": {"features": {"x": 3}}}'):
        pq.write_table(plain.replace_schema_metadata({'huggingface': broken}), tmp_path/'x.parquet')
        assert [r.value['x'] for r in read_rows(tmp_path/'x.parquet')] == texts


def test_arrow_files_of_both_forms_and_damage_in_them(tmp_path):
    import pyarrow as pa
    table = pa.table(dict(n=list(range(1000))))
    for name,new,options in (('stream', pa.ipc.new_stream, None), ('file', pa.ipc.new_file, None),
                             ('zstd', pa.ipc.new_file, pa.ipc.IpcWriteOptions(compression='zstd'))):
        with new(tmp_path/f'{name}.arrow', table.schema, options=options) as writer: writer.write_table(table, 300)
        rows = list(read_rows(tmp_path/f'{name}.arrow'))
        assert [(r.line, r.value['n']) for r in rows] == [(i+1, i) for i in range(1000)]
        whole = (tmp_path/f'{name}.arrow').read_bytes()
        for broken in (b'', b'ARROW1', whole[:100], whole[:-200][:300]):
            (tmp_path/'broken.arrow').write_bytes(broken)
            with pytest.raises(ValueError, match='broken.arrow is no Arrow file, or a broken one'):
                list(read_rows(tmp_path/'broken.arrow'))
    assert '.arrow' in known_endings


def test_columns_of_one_name_are_told_apart_in_every_table(tmp_path):
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.Table.from_arrays([pa.array(['q']), pa.array(['a']), pa.array(['b'])], names=['q', 'a', 'a']),
                   tmp_path/'x.parquet')
    frame = pd.DataFrame([['q', 'a', 'b']], columns=['q', 'a', 'a'])
    (tmp_path/'x.csv').write_text('q,a,a\nq,a,b\n')
    for rows in (list(read_rows(s)) for s in (tmp_path/'x.csv', tmp_path/'x.parquet', frame)):
        assert values(rows) == [{'q': 'q', 'a': 'a', 'a.1': 'b'}]
        assert notes(rows) == ["two columns have the name 'a'; the second is read as 'a.1'"]
    assert column_names(['a', 'a.1', 'a', 'a'], 'x')[0] == ['a', 'a.1', 'a.2', 'a.3']


# --- JSON that is no list ---

@pytest.mark.parametrize('name', ['data', 'rows', 'train', 'examples', 'Data', 'my_rows'])
@pytest.mark.parametrize('ending', ['.json', '.jsonl'])
@pytest.mark.parametrize('indent', [None, 2])
def test_rows_inside_of_an_object(name, ending, indent, tmp_path):
    rows = rows_of(tmp_path/f'x{ending}', json.dumps({name: qa}, indent=indent))
    assert values(rows) == qa and not notes(rows)
    assert [r.line for r in rows] == ([1, 1] if indent is None else [3, 7])


def test_what_stands_beside_the_rows_is_told(tmp_path):
    before = dict(version='1.0', info=dict(a=[1]), data=qa)
    rows = rows_of(tmp_path/'x.json', json.dumps(before | dict(licence='MIT', features=[dict(name='q')])))
    assert values(rows) == qa
    names = '`version`, `info`, `licence`, `features`'
    assert notes(rows) == [f'beside the rows in `data` the file holds {names}, which is not read']
    rows = rows_of(tmp_path/'x.json', json.dumps(dict(train=qa, test=qa[:1])))
    assert values(rows) == [*qa, None] and 'stands in `test`, and the rows are those of `train`' in rows[2].error
    with pytest.raises(ValueError, match='rows in `test` and in `train`: put each in a file of its own'):
        rows_of(tmp_path/'x.json', json.dumps(dict(test=qa[:1], train=qa)))
    assert values(rows_of(tmp_path/'x.json', json.dumps(dict(test=qa)))) == qa
    with pytest.raises(ValueError, match='text after the object at column'):
        rows_of(tmp_path/'x.json', json.dumps(dict(data=qa))*2)
    for end in ('', ',', ', "a"', ', "a": ', ', "a": 1'):
        with pytest.raises(ValueError, match='x.json:1: not JSON'):
            rows_of(tmp_path/'x.json', json.dumps(dict(data=qa))[:-1] + end)


@pytest.mark.parametrize('row', [
    dict(messages=[dict(role='user', content='a')]), dict(dialogue=[{'from': 'human', 'value': 'a'}]),
    dict(tools=[dict(type='function')], messages=[]), dict(id=1, steps=[dict(a=1)], text='a'), dict(data=[1, 2]),
    dict(data=[]), dict(question='a', answer='b', data=[dict(a=1)]), dict(data=[dict(role='user', content='a')]), {},
])
@pytest.mark.parametrize('ending', ['.json', '.jsonl'])
def test_an_object_that_is_a_row_stays_one(row, ending, tmp_path):
    for indent in (None, 2):
        rows = rows_of(tmp_path/f'x{ending}', json.dumps(row, indent=indent))
        assert values(rows) == [row] and rows[0].line == 1
    assert values(rows_of(tmp_path/'x.json', json.dumps(row)*2)) == [row]*2


def test_a_folder_of_printed_objects_and_objects_one_after_the_other(tmp_path):
    for i,row in enumerate(qa): (tmp_path/f'{i}.json').write_text(json.dumps(row, indent=1))
    assert load_training_data(tmp_path) == qa
    both = '\n'.join(json.dumps(r, indent=1) for r in qa)
    assert [r.line for r in rows_of(tmp_path/'x.jsonl', both)] == [1, 5]
    assert values(rows_of(tmp_path/'x.json', both)) == values(rows_of(tmp_path/'x.jsonl', both)) == qa


@pytest.mark.parametrize('indent', [None, 0, 2])
def test_a_list_under_the_ending_of_lines(indent, tmp_path):
    text = json.dumps(qa, indent=indent)
    assert values(rows_of(tmp_path/'x.jsonl', text)) == values(rows_of(tmp_path/'x.ndjson', '\ufeff\n' + text)) == qa
    by_rows = '[\n' + ',\n'.join(map(json.dumps, qa)) + '\n]\n'
    assert [(r.line, r.value) for r in rows_of(tmp_path/'x.jsonl', by_rows)] == [(2, qa[0]), (3, qa[1])]


@pytest.mark.parametrize('first', ['{"a": ', '{', '{"a": "b', '[1,]', 'x', '{"a": 1}}', '[{"a": 1}'])
def test_a_damaged_first_line_costs_one_row(first, tmp_path):
    rows = rows_of(tmp_path/'x.jsonl', first + '\n' + json.dumps(qa[0]) + '\n' + json.dumps(qa[1]))
    assert values(rows) == [None, *qa] and errors(rows)[0][0] == 1


def test_one_long_line_is_read_in_blocks(tmp_path, monkeypatch):
    from sage_finetune.rows import files
    monkeypatch.setattr(files, '_longest_line', 50)
    for text in (json.dumps(qa*9), json.dumps(dict(data=qa*9))):
        assert values(rows_of(tmp_path/'x.jsonl', text)) == qa*9


# --- CSV as programs write it ---

@pytest.mark.parametrize('text,told', [
    (',question,answer\n0,Why?,So.\n1,Who?,Me.\n', ['column 1 has no name and is left out']*2),
    ('question,answer,\nWhy?,So.,\nWho?,Me.,\n', []),
    ('question,answer,,\nWhy?,So.\nWho?,Me.,,x\n', ['column 4 has no name and is left out']),
    ('question,answer\nWhy?,So.,,,\nWho?,Me.,\n', []),
    ('sep=;\nquestion;answer\nWhy?;So.\nWho?;Me.\n', []),
    ('\ufeffsep=,\r\nquestion,answer\r\nWhy?,So.\r\nWho?,Me.\r\n', []),
    ('"sep=\t"\nquestion\tanswer\nWhy?\tSo.\nWho?\tMe.\n', []),
    ('question;answer\nWhy?;So.\nWho?;Me.\n', ["the header shows that ';' is between the cells"]),
    ('question\tanswer\nWhy?\tSo.\nWho?\tMe.\n', ["the header shows that '\\t' is between the cells"]),
    ('question|answer\nWhy?|So.\nWho?|Me.\n', ["the header shows that '|' is between the cells"]),
    ('question,answer\nWhy?,So.\nquestion,answer\nWho?,Me.\n',
     ['the header once more, above this row, is passed over']),
    ('\ufeffquestion,answer\nWhy?,So.\n\ufeffquestion, answer\nWho?,Me.\n',
     ['the header once more, above this row, is passed over']),
], ids=['index', 'last comma', 'two unnamed', 'commas in rows', 'sep', 'sep with mark', 'sep tab', 'semicolons', 'tabs',
        'bars', 'joined', 'joined with marks'])
def test_a_csv_as_programs_write_it_is_read(text, told, tmp_path):
    rows = rows_of(tmp_path/'x.csv', text)
    assert values(rows) == qa and notes(rows) == told


def test_lines_count_from_the_top_of_the_file(tmp_path):
    rows = rows_of(tmp_path/'x.csv', 'sep=;\na;b\n1;2\n\na;b\n3;4;5\n"6\n7";8\n')
    assert [(r.line, r.error) for r in rows] == [(3, ''), (6, '3 cells where the header has 2'), (7, '')]
    assert errors(rows_of(tmp_path/'x.csv', 'a,b\n1,2\na,b\n')) == [(3, 'the header once more, and no row behind it')]


def test_a_header_with_a_sentence_is_one_column(tmp_path):
    assert values(rows_of(tmp_path/'x.csv', 'What is it; really?\nyes\n')) == [{'What is it; really?': 'yes'}]
    assert values(rows_of(tmp_path/'x.tsv', 'a,b\n1,2\n')) == [dict(a='1', b='2')]


@pytest.mark.parametrize('line', ['q2,"two', 'q2,"he said', '"q2,two', 'q2,"a ""b""'])
@pytest.mark.parametrize('closes', ['', 'q5,"five"\n', 'q5,a 12"\n', 'q5,"five\nlines"\n'],
                         ids=['never', 'quoted', 'inch', 'lines'])
def test_a_quote_that_swallows_rows_is_told_with_its_line(line, closes, tmp_path):
    rows = rows_of(tmp_path/'x.csv', f'q,a\nq1,one\n{line}\nq3,three\nq4,four\n{closes}q6,six\n')
    told = [r for r in rows if r.error or r.notes]
    assert [r.line for r in told] == [3] and rows[-1].value == dict(q='q6', a='six')
    if told[0].error: assert [r.value['q'] for r in rows if r.value][:3] == ['q1', 'q3', 'q4']
    else: assert 'a quote opened on line 3 closes on line 6' in told[0].notes[0]


@pytest.mark.parametrize('cell', ['One.\nTwo.', 'Yes, sure.\nNo, never.', 'f(a, b)\ng(c, d)', '\n\n', 'x\n"y"\nz',
                                  'a,b,c\nd,e,f', 'dear,\nme,', 'He said: "a,b"\nand left'])
def test_a_good_cell_of_many_lines_is_kept_and_not_suspected(cell, tmp_path):
    import csv
    with open(tmp_path/'x.csv', 'w', newline='') as f: csv.writer(f).writerows([('q', 'a'), ('1', cell), ('2', 'b')])
    rows = list(read_rows(tmp_path/'x.csv'))
    assert values(rows) == [dict(q='1', a=cell), dict(q='2', a='b')] and not notes(rows)


def test_a_table_in_a_cell_is_kept_and_noted(tmp_path):
    rows = rows_of(tmp_path/'x.csv', 'q,a\nMake a table,"name,age\nBob,3"\n')
    assert values(rows) == [dict(q='Make a table', a='name,age\nBob,3')] and 'lines' not in errors(rows)
    assert notes(rows) == ['a quote opened on line 2 closes on line 3; each line between looks like a row']


def test_a_broken_quote_over_prose_names_its_lines_and_makes_up_no_rows(tmp_path):
    rows = rows_of(tmp_path/'x.csv', 'q,a\n1,"Yes, sure.\nNo, never.\nWell')
    assert len(rows) == 1
    assert errors(rows) == [(2, 'not CSV: a quote that is opened here is never closed (lines 2 to 4)')]


def test_encodings_are_told_with_the_way_out(tmp_path):
    for encoding in ('utf-16', 'utf-32'):
        for name in ('x.csv', 'x.json', 'x.jsonl', 'x.txt', 'x.csv.gz'):
            data = 'question,answer\n'.encode(encoding)
            with pytest.raises(ValueError, match=f'{name} is {encoding.upper()} text, .*: save it as UTF-8'):
                rows_of(tmp_path/name, gzip.compress(data) if name.endswith('gz') else data)
    for name,text in (('x.csv', 'q,a\n1,caf\xe9\n2,b\n'), ('x.jsonl', '{"a": "caf\xe9"}\n{"a": "b"}\n')):
        rows = rows_of(tmp_path/name, text.encode('cp1252'))
        assert len(rows) == 2 and rows[1].value and 'save the file as UTF-8' in rows[0].error


# --- texts ---

def test_texts_by_line_paragraph_or_document(tmp_path):
    text = 'One.\nTwo.\n\nThree.\n\n\nFour.\n'
    by = {how: [(r.line, r.value['text']) for r in rows_of(tmp_path/'x.txt', text, sample_by=how)]
          for how in ('line', 'paragraph', 'document')}
    assert by['line'] == [(1, 'One.'), (2, 'Two.'), (4, 'Three.'), (7, 'Four.')]
    assert by['paragraph'] == [(1, 'One.\nTwo.'), (4, 'Three.'), (6, '\nFour.\n')]
    assert by['document'] == [(1, text)]
    assert len({source_digest(tmp_path/'x.txt', sample_by=how) for how in by}) == 3
    assert source_digest(tmp_path/'x.txt') == source_digest(tmp_path/'x.txt', sample_by='document')


@pytest.mark.parametrize('how', ['line', 'paragraph'])
def test_texts_are_what_datasets_makes_of_them(how, tmp_path):
    import datasets
    (tmp_path/'x.txt').write_text(''.join(f'Line {i}.\n' + '\n'*(i%3) for i in range(1000)))
    theirs = datasets.load_dataset('text', data_files=str(tmp_path/'x.txt'), split='train', sample_by=how,
                                   cache_dir=str(tmp_path/'cache'))
    assert values(read_rows(tmp_path/'x.txt', sample_by=how)) == [r for r in theirs if r['text'].strip()]


def test_sample_by_is_refused_where_it_would_do_nothing(tmp_path):
    (tmp_path/'x.json').write_text('[]')
    for source in (tmp_path/'x.json', tmp_path, [], 'owner/name'):
        for read in (lambda s: list(read_rows(s, sample_by='line')), lambda s: source_digest(s, sample_by='line')):
            with pytest.raises(ValueError, match='`sample_by` is for text files'): read(source)
    with pytest.raises(ValueError, match="`sample_by` must be one of line, paragraph, document, got 'word'"):
        list(read_rows(tmp_path/'x.json', sample_by='word'))


# --- splits ---

def folder(path, *names):
    for name in names:
        (path/name).parent.mkdir(parents=True, exist_ok=True)
        (path/name).write_text(json.dumps(dict(text=name)) + '\n')
    return path


layouts = [
    ('data/train-00000-of-00002.jsonl', 'data/train-00001-of-00002.jsonl', 'data/validation-00000-of-00001.jsonl',
     'data/test-00000-of-00001.jsonl'),
    ('train.jsonl', 'test.jsonl', 'validation.jsonl'), ('train/a.jsonl', 'test/a.jsonl', 'dev/a.jsonl'),
    ('gsm8k_train.jsonl', 'gsm8k-valid.jsonl', 'gsm8k.test.jsonl'),
    ('my-train/a.jsonl', 'val/b.jsonl', 'eval_2/c.jsonl'),
    ('a/training.1.jsonl', 'a/testing 2.jsonl', 'a/val.jsonl'), ('train.csv', 'evaluation.csv'),
    ('data/train_sft-00000-of-00001.jsonl', 'data/test_sft-00000-of-00001.jsonl'),
    ('one.jsonl', 'two/three.jsonl'), ('latest.jsonl', 'trainer.jsonl', 'contest/a.jsonl'),
]


@pytest.mark.parametrize('names', layouts, ids=[n[0] for n in layouts])
def test_a_folder_is_split_as_datasets_splits_it(names, tmp_path):
    from datasets.data_files import DataFilesDict, get_data_patterns
    base = folder(tmp_path, *names)
    patterns = get_data_patterns(str(base))
    theirs = {split: sorted(files) for split,files in DataFilesDict.from_patterns(patterns, str(base)).items()}
    for split,files in theirs.items():
        assert sorted(map(str, source_files(base, split)[0])) == files
        assert all(f'split={str(split)!r} reads it' in why for p,why in source_files(base, next(iter(theirs)))[1]
                   if str(p) in files)
    others = {*names} - {str(p.relative_to(base)) for split in theirs for p in source_files(base, split)[0]}
    assert not others


def test_files_of_no_split(tmp_path):
    base = folder(tmp_path, 'train.jsonl', 'notes.jsonl', 'test.jsonl')
    assert {p.name: why for p,why in source_files(base)[1]} == {
        'notes.jsonl': 'its name says no split: give its own path',
        'test.jsonl': "of the split 'test': split='test' reads it"}
    (base/'train.jsonl').unlink()
    assert [p.name for p in source_files(base)[0]] == ['notes.jsonl']
    (base/'notes.jsonl').unlink()
    with pytest.raises(SageError, match="has no split 'train'; it has: test"): source_files(base)
    assert load_training_data(base, split='test') == [dict(text='test.jsonl')]


def test_other_words_and_several_splits(tmp_path):
    base = folder(tmp_path, 'train.jsonl', 'dev.jsonl', 'test.jsonl')
    read = lambda split: [p.name for p in source_files(base, split)[0]]
    assert read('dev') == read('validation') == ['dev.jsonl']
    assert read('train+dev') == ['dev.jsonl', 'train.jsonl']
    for split in ('all', 'train[:2]', 'train+x', ''):
        with pytest.raises(SageError, match=r'has no split .*; it has: train, validation, test'): read(split)
        with pytest.raises(SageError): source_digest(base, split)
    assert source_digest(base) != source_digest(base, 'test')


def test_a_pattern_is_taken_at_its_word_unless_it_catches_several_splits(tmp_path):
    base = folder(tmp_path, 'train.jsonl', 'test.jsonl', 'more.jsonl', 'x/test-1.jsonl', 'x/test-2.jsonl')
    read = lambda pattern,split='train': [p.name for p in source_files(base/pattern, split)[0]]
    assert read('*.jsonl') == ['more.jsonl', 'train.jsonl'] and read('*.jsonl', 'test') == ['more.jsonl', 'test.jsonl']
    assert dict(source_files(base/'*.jsonl')[1]) == {base/'test.jsonl': "of the split 'test': split='test' reads it"}
    assert read('x/*') == ['test-1.jsonl', 'test-2.jsonl'] and read('test.jsonl') == ['test.jsonl']
    assert read('t[er]*.jsonl') == ['train.jsonl'] and read('more*') == ['more.jsonl']


def test_the_report_tells_the_files_of_other_splits(tmp_path):
    from sage_finetune.rows.report import files_passed_over
    base = folder(tmp_path, *layouts[0])
    assert len(files_passed_over(base)) == 2 and len(files_passed_over(base, 'test')) == 3


def test_one_file_is_read_by_its_ending(tmp_path):
    (tmp_path/'x.ndjson').write_text('{"a": 1}\n')
    with open_file(tmp_path/'x.ndjson') as f: assert f.read() == b'{"a": 1}\n'
    assert values(read_file(tmp_path/'x.ndjson')) == [dict(a=1)]
    import pyarrow as pa
    table = pa.table(dict(a=[1]))
    assert values(table_rows([table], table.schema, 'table')) == [dict(a=1)]


@pytest.mark.parametrize('duplicates,used', [('keep', 3), ('drop', 1)])
def test_copies_on_one_line_are_copies(duplicates, used, tmp_path):
    from transformers import AutoTokenizer
    from sage_finetune.config import resolve_model
    from sage_finetune.data import DataReport, prepare_dataset
    (tmp_path/'x.json').write_text(json.dumps([qa[0]]*3))
    report,tokenizer = DataReport(),AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    prepare_dataset(tmp_path/'x.json', tokenizer, report=report, duplicates=duplicates, cache=False)
    assert (report.used, report.duplicates, len(report.dropped)) == (used, used-1, 3-used)


@pytest.mark.parametrize('names', [('TRAIN.jsonl', 'Test.jsonl'), ('Train/a.jsonl', 'DEV/a.jsonl'),
                                   ('my_Train.jsonl', 'my_EVAL.jsonl')], ids=lambda n: n[0])
def test_names_of_splits_in_capitals_are_names_of_splits(names, tmp_path):
    files,others = source_files(folder(tmp_path, *names))
    assert [p.relative_to(tmp_path).as_posix() for p in files] == [names[0]]
    assert [p.relative_to(tmp_path).as_posix() for p,_ in others] == [names[1]]


@pytest.mark.parametrize('text', ['question,answer\rWhy?,So.\r', 'question,answer\nWhy?,So.\rWho?,Me.\n'])
def test_lines_that_end_in_a_carriage_return_alone_are_told_in_our_words(text, tmp_path):
    try: found = [why for _,why in errors(rows_of(tmp_path/'a.csv', text))]
    except ValueError as e: found = [str(e)]
    assert len(found) == 1 and 'a line ends in a carriage return alone: save the file with line feeds' in found[0]


@pytest.mark.parametrize('card,told', [
    ('---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n# Rows\n', True),
    ('---\nconfigs:\n  - data_files: "*.jsonl"\n---\n', True), ('---\nlicense: mit\n---\ndata_files: none\n', False),
    ('# Rows\n', False), ('', False)])
def test_a_card_that_says_which_file_is_of_which_split_is_told(card, told, tmp_path):
    base = folder(tmp_path, 'a.jsonl', 'b.jsonl')
    (base/'README.md').write_text(card)
    files,((path, why),) = source_files(base)
    assert len(files) == 2 and path.name == 'README.md' and ('`data_files` are not read' in why) == told
    assert told or why == 'a text beside files of rows'

"The same rows from every kind of source give the same examples and the same report, but for what a format cannot hold"
import csv
import gzip
import json
import os
import tempfile
import warnings
from pathlib import Path

import pytest

datasets = pytest.importorskip('datasets')
pa = pytest.importorskip('pyarrow')
pd = pytest.importorskip('pandas')
hypothesis = pytest.importorskip('hypothesis')

from hypothesis import HealthCheck, given, settings, strategies as st

from sage_finetune.config import resolve_model
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.rows.sources import read_rows

cases = settings(max_examples=int(os.environ.get('SAGE_EXAMPLES', 25)), deadline=None,
                 suppress_health_check=[*HealthCheck])
letters = st.characters(exclude_categories=['Cs'], exclude_characters='\0')
texts = st.one_of(st.text(letters, max_size=12), st.text('a"\n\r,; \t', max_size=8),
                  st.sampled_from(['', ' ', 'Why?', 'Because, I\nthink.', '日本語 😀', 'null', '{"a": null}', '7',
                                   'é\u2028x']))
filled = st.one_of(st.sampled_from(['Why?', 'It is 7.', 'a\nb', '日本語']), texts.filter(str.strip))

flat = st.fixed_dictionaries(dict(question=texts, answer=texts), optional=dict(context=texts))

eighths = st.integers(-800, 800).map(lambda n: n/8) # `datasets` writes ten digits of a number into JSON

# the arguments of a call: which of them it has differs from call to call, the type of each does not
arguments = st.dictionaries(st.sampled_from(['city', 'zone']), filled, min_size=1) | st.fixed_dictionaries(
    dict(city=texts), optional=dict(n=st.integers(-2**40, 2**40), ratio=eighths, flag=st.booleans(),
                                    tags=st.lists(texts, min_size=1, max_size=2), where=st.fixed_dictionaries(
                                        dict(lat=eighths), optional=dict(name=texts))))
# values of any type, which `datasets` keeps as JSON; it would take a text that is JSON for what the text says
mixed = st.fixed_dictionaries(dict(x=st.one_of(st.integers(-9, 9), filled.map(lambda t: 'é '+t), st.booleans(),
                                               st.lists(st.integers(0, 9), max_size=2))))


def turns_of(args):
    "Conversations whose calls have such arguments"
    called = st.builds(lambda a, name: [
        dict(role='assistant', content='', tool_calls=[dict(type='function', function=dict(name=name, arguments=a))]),
        dict(role='tool', content='7')], args, st.sampled_from(['weather', 'clock']))
    user,answer = (filled.map(lambda t, role=role: dict(role=role, content=t)) for role in ('user', 'assistant'))
    talk = st.builds(lambda u, calls, a: [u, *sum(calls, []), a], user, st.lists(called, max_size=2), answer)
    return st.fixed_dictionaries(dict(messages=st.lists(talk, min_size=1, max_size=2).map(lambda t: sum(t, []))),
                                 optional=dict(system=st.none() | filled, id=st.none() | filled))


tables = st.one_of(st.lists(flat, min_size=1, max_size=4), st.lists(turns_of(arguments), min_size=1, max_size=4),
                   st.lists(turns_of(mixed), min_size=1, max_size=3)).map(lambda rows: in_one_order(rows, {}))


@pytest.fixture(scope='module')
def tokenizer():
    from transformers import AutoTokenizer
    datasets.disable_progress_bars()
    yield AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    datasets.enable_progress_bars()


def in_one_order(value, seen):
    "A value whose keys stand in the order in which the table met them first, for a table has one order for all rows"
    if isinstance(value, list): return [in_one_order(v, seen) for v in value]
    if not isinstance(value, dict): return value
    for k in value: seen.setdefault(k, {})
    return {k: in_one_order(value[k], seen[k]) for k in seen if k in value}


def as_dataset(rows):
    "The rows as `datasets` holds them, with every column in each; as JSON what Arrow has no one type for"
    columns = dict.fromkeys(k for r in rows for k in r)
    whole = [dict.fromkeys(columns) | r for r in rows]
    try: return datasets.Dataset.from_list(whole)
    except (pa.ArrowInvalid, pa.ArrowTypeError): return datasets.Dataset.from_list(whole, on_mixed_types='use_json')


def written(rows, folder):
    "{kind: source} of the same rows"
    data,whole = as_dataset(rows),[dict(r) for r in rows]
    data.to_parquet(folder/'a.parquet')
    data.save_to_disk(folder/'saved')
    (folder/'a.arrow').write_bytes(next((folder/'saved').glob('*.arrow')).read_bytes())
    data.to_json(folder/'exported.jsonl')
    lines = ''.join(json.dumps(r, ensure_ascii=i%2>0)+'\n' for i,r in enumerate(rows))
    (folder/'a.json').write_text(json.dumps(rows, indent=1), encoding='utf-8')
    (folder/'around.json').write_text(json.dumps(dict(data=rows), ensure_ascii=False), encoding='utf-8')
    (folder/'a.jsonl').write_text(lines, encoding='utf-8')
    (folder/'a.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    names = 'a.json', 'around.json', 'a.jsonl', 'a.jsonl.gz', 'a.parquet', 'a.arrow', 'saved', 'exported.jsonl'
    made = dict(dataset=data, frame=pd.DataFrame(whole))
    return made | {n: folder/n for n in names} | (as_csv(rows, folder) if 'question' in rows[0] else {})


def as_csv(rows, folder):
    "The same rows as tables of text; a column that a row does not have is an empty cell"
    names = [*dict.fromkeys(k for r in rows for k in r)]
    for file,dialect in (('a.csv', 'excel'), ('a.tsv', 'excel-tab')):
        with open(folder/file, 'w', newline='', encoding='utf-8') as f:
            csv.writer(f, dialect).writerows([names, *([r.get(n, '') for n in names] for r in rows)])
    return {file: folder/file for file in ('a.csv', 'a.tsv')}


told = 'keys of `arguments` that hold null', 'a quote opened on line' # notes on what a format cannot hold


def outcome(source, tokenizer):
    "What a source gives: its examples, and the report without places and without notes on the format"
    report = DataReport()
    try: made = prepare_dataset(source, tokenizer, 256, report=report, cache=False).to_list()
    except ValueError as e: made = [type(e).__name__]
    said = report.to_dict()
    for name in ('files', 'passed_over', 'cached'): said.pop(name)
    said['dropped'] = sorted(d['reason'] for d in said['dropped']) # rows on one line have no order
    said['notes'] = {n: rows for n,rows in said['notes'].items() if not n.startswith(told)}
    return made,said


@cases
@given(rows=tables)
def test_any_rows_are_the_same_from_every_source(rows, tokenizer):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected,sources = outcome(rows, tokenizer),written(rows, Path(folder))
        for kind,source in sources.items():
            examples,said = outcome(source, tokenizer)
            assert (kind, examples) == (kind, expected[0])
            assert (kind, said) == (kind, expected[1])


@cases
@given(rows=tables)
def test_any_file_that_datasets_wrote_holds_the_rows_of_the_object(rows):
    with tempfile.TemporaryDirectory() as folder:
        sources = written(rows, Path(folder))
        expected = [(r.line, r.value, r.notes) for r in read_rows(sources['dataset'])]
        for kind in ('a.parquet', 'a.arrow', 'saved'):
            assert (kind, [(r.line, r.value, r.notes) for r in read_rows(sources[kind])]) == (kind, expected)
        assert [r.value for r in read_rows(sources['exported.jsonl'])] == [value for _,value,_ in expected]

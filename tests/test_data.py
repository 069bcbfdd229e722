"""Every row of real files, every fault of the earlier module, and whatever else a file may hold"""
import json
import math
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoTokenizer

from sage_finetune.config import resolve_model, SageError
from sage_finetune.data import (
    create_sample_data, DataReport, load_training_data, prepare_dataset, sample_rows, save_rows, to_conversation
)

real = Path(__file__).resolve().parents[2]/'shared'/'data'
tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
end = '<|im_end|>'
cases = settings(max_examples=int(os.environ.get('SAGE_EXAMPLES', 200)), deadline=None,
                 suppress_health_check=list(HealthCheck))

def learned(example): return tok.decode([t for t in example['labels'] if t!=-100])

def adds_up(report):
    return (report.read==report.used+len(report.dropped)
            and all(d['line']>=1 and d['reason'] and '\n' not in d['reason'] for d in report.dropped))

# Real rows

def spoken(row):
    "The answers of a row as the plain form of the embedded model writes them"
    for m in to_conversation(row).messages:
        if m['role']!='assistant': continue
        calls = [json.dumps(c['function'], ensure_ascii=False) for c in m.get('tool_calls', [])]
        yield '\n'.join(filter(None, [m['content'], *(f'<tool_call>\n{c}\n</tool_call>' for c in calls)]))+end

@pytest.mark.skipif(not real.is_dir(), reason='the folder of real rows (../shared/data) is not here')
@pytest.mark.parametrize('name,number', [('gsm8k_train.jsonl', 7473), ('gsm8k_test.jsonl', 1319),
                                         ('alpaca_en_demo.json', 999), ('identity.json', 91),
                                         ('glaive_toolcall_en_demo.json', 300)])
def test_every_real_row_is_used_and_learns_exactly_its_answers(name, number):
    report = DataReport()
    dataset = prepare_dataset(real/name, tok, max_length=16_384, report=report, cache=False)
    assert (report.read, report.used, report.dropped, len(dataset))==(number, number, [], number) and adds_up(report)
    for example,row in zip(dataset, load_training_data(real/name)): assert learned(example)==''.join(spoken(row))

@pytest.mark.skipif(not real.is_dir(), reason='the folder of real rows (../shared/data) is not here')
def test_real_preference_rows_are_named_as_such():
    report = DataReport()
    with pytest.raises(ValueError, match='299 of 299 were dropped because: a preference row'):
        prepare_dataset(real/'dpo_en_demo.json', tok, report=report, cache=False)
    assert report.read==299==len(report.dropped) and adds_up(report)

# The faults of the earlier module. Each check must also fail on data made in the old way

def old_way(rows, max_length=64):
    "Plain headings, everything learned, filled up to `max_length` with the end token, and the shape of the first row for all"
    form = ((lambda r: f"### Question:\n{r['question']}\n\n### Answer:\n{r['answer']}") if 'question' in rows[0]
            else (lambda r: r['text']))
    made = []
    for r in rows:
        try: ids = tok(form(r)+tok.eos_token, truncation=True, max_length=max_length)['input_ids']
        except KeyError: continue
        ids += [tok.eos_token_id]*(max_length-len(ids))
        made.append(dict(input_ids=ids, labels=[t if t!=tok.eos_token_id else -100 for t in ids]))
    return made

def new_way(rows, max_length=64): return list(prepare_dataset(rows, tok, max_length, cache=False, report=DataReport()))

qa = sample_rows('qa', 12)

def prompt_is_not_learned(made): return not any(r['question'] in learned(x) for r,x in zip(qa, made))
def nothing_is_filled_up(made):
    return len({len(x['input_ids']) for x in made})>1 or all(x['input_ids'][-1]!=x['input_ids'][-2] for x in made)
def end_of_turn_is_learned(made): return all(learned(x).endswith(end) for x in made)

@pytest.mark.parametrize('check', [prompt_is_not_learned, nothing_is_filled_up, end_of_turn_is_learned])
def test_faults_1_to_3_of_the_earlier_module(check):
    assert check(new_way(qa)) and not check(old_way(qa))

def test_fault_7_of_the_earlier_module():
    mixed = [*sample_rows('qa', 2), *sample_rows('alpaca', 2), *sample_rows('conversation', 2), *sample_rows('text', 2)]
    assert len(new_way(mixed))==8 and len(old_way(mixed))<8

# Whatever a row may hold

texts = st.one_of(st.text(max_size=40),
                  st.sampled_from(['', ' ', 'Why?', 'Because.', end, '<think>a</think>b', '\ud800', '\U000F0000',
                                   '{"name": "f", "arguments": {}}', '\x00']))
values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
                      lambda inner: st.one_of(st.lists(inner, max_size=4),
                                              st.dictionaries(texts, inner, max_size=4)), max_leaves=12)
keys = ['instruction', 'input', 'output', 'system', 'history', 'question', 'answer', 'context', 'conversations',
        'messages', 'tools', 'prompt', 'completion', 'text', 'chosen', 'rejected']
turns = st.fixed_dictionaries({}, optional=dict(role=st.sampled_from(
    ['user', 'assistant', 'system', 'tool', 'developer', 'x', 3]), content=st.one_of(texts, values),
                                                train=values, weight=values, tool_calls=values,
                                                reasoning_content=values, **{'from': st.sampled_from(
                                                    ['human', 'gpt', 'function_call', 'observation']),
                                                                             'value': st.one_of(texts, values)}))
rows = st.one_of(values, st.dictionaries(st.sampled_from(keys),
                                         st.one_of(texts, values, st.lists(turns, max_size=5)), max_size=6),
                 st.builds(lambda ts: dict(messages=ts), st.lists(turns, max_size=6)),
                 st.builds(lambda q,a: dict(question=q, answer=a), texts, texts))
how = st.fixed_dictionaries(dict(overflow=st.sampled_from(['drop', 'truncate', 'split']),
                                 train_on=st.sampled_from(['assistant', 'last', 'all']),
                                 max_length=st.sampled_from([8, 24, 1024]), cut_answers=st.booleans(),
                                 duplicates=st.sampled_from(['keep', 'drop'])))

@cases
@given(st.lists(rows, max_size=6), how)
def test_any_value_as_a_row_is_used_or_dropped_and_counted(values, how):
    report = DataReport()
    try: dataset = prepare_dataset(values, tok, report=report, cache=False, **how)
    except ValueError as e:
        assert 'can be used' in str(e) and report.used==0
        dataset = []
    assert report.read==len(values) and adds_up(report) and report.examples==len(dataset)
    for x in dataset:
        assert len(x['input_ids'])==len(x['labels'])<=how['max_length']
        assert any(l!=-100 for l in x['labels'][1:]) and all(l in (-100, t) for t,l in zip(x['input_ids'], x['labels']))

pieces = st.one_of(st.binary(max_size=60),
                   st.sampled_from([json.dumps(qa[0]).encode(), b'[', b']', b',', b'\n', b'{}', b'"', b'\xff\xfe',
                                    b'\xef\xbb\xbf', b'question,answer\n', b'1,2\n', b'null', b'nan']))

@cases
@given(st.lists(pieces, max_size=8).map(b''.join),
       st.sampled_from(['.json', '.jsonl', '.csv', '.tsv', '.txt', '.md', '.parquet', '.json.gz', '.jsonl.gz']))
def test_any_bytes_as_a_file_are_read_or_refused_in_one_line(tmp_path_factory, content, ending):
    path,report = tmp_path_factory.getbasetemp()/f'any{ending}',DataReport()
    path.write_bytes(content)
    try: prepare_dataset(path, tok, report=report, cache=False)
    except (ValueError, SageError, OSError) as e: assert 'any' in str(e) and '\n' not in str(e)
    assert adds_up(report)

def test_many_bad_rows_are_ten_lines_and_a_count(tmp_path):
    path,report = tmp_path/'bad.jsonl',DataReport()
    path.write_text(json.dumps(qa[0])+'\n'+'{"question": "a", "answer": ""}\n'*10_000)
    prepare_dataset(path, tok, report=report, cache=False)
    assert (report.read, report.used, len(report.dropped))==(10_001, 1, 10_000) and len(str(report).splitlines())<=16
    assert (len(report.save(tmp_path/'r.json').read_text())>0
            and json.loads((tmp_path/'r.json').read_text())['dropped'][-1]['line']==10_001)

def test_a_run_that_stops_half_way_leaves_nothing_in_the_cache(tmp_path):
    path = tmp_path/'half.json'
    path.write_text(json.dumps(qa)[:-20])
    with pytest.raises(ValueError, match='half.json:1: not JSON'): prepare_dataset(path, tok, cache=tmp_path/'cache')
    assert [*(tmp_path/'cache').rglob('*')]==[tmp_path/'cache'/'sage_data']

def test_a_copy_of_the_data_elsewhere_gives_the_same_examples(tmp_path):
    one,two = create_sample_data(tmp_path/'a.jsonl', 'qa', 30),save_rows(tmp_path/'b.json', sample_rows('qa', 30))
    assert prepare_dataset(one, tok, cache=False)[:]==prepare_dataset(two, tok, cache=False)[:]

def test_splitting_loses_and_repeats_no_learned_token():
    rng = random.Random(0)
    talk = [m for i in range(30) for m in (dict(role='user', content='q '*rng.randint(1, 30)),
                                           dict(role='assistant', content=f'<{i}> '+'a '*rng.randint(1, 60)))]
    made = prepare_dataset([dict(messages=talk)], tok, 64, overflow='split', cache=False)
    assert (''.join(map(learned, made))==''.join(m['content']+end for m in talk if m['role']=='assistant')
            and len(made)>=math.ceil(sum(len(x['labels']) for x in made)/64))

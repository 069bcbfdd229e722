"""Every row of real files, every fault of the earlier module, and whatever else a file may hold"""
import json
import math
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import assume, given, HealthCheck, settings, strategies as st
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from quick import few
from sage_finetune.config import resolve_model, SageError
from sage_finetune import data as module
from sage_finetune.data import (
    create_sample_data, DataReport, load_training_data, prepare_dataset, sample_rows, save_rows, to_conversation,
    tokenizer_of
)
from sage_finetune.rows import template

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
@pytest.mark.parametrize('name,number', few([
    ('gsm8k_test.jsonl', 1319), ('alpaca_en_demo.json', 999), ('identity.json', 91),
    ('glaive_toolcall_en_demo.json', 300), ('gsm8k_train.jsonl', 7473)], 4))
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
    """Plain headings, everything learned, padded to `max_length` with the end token, and the format of the first
    row for all
    """
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
def nothing_is_padded(made):
    return len({len(x['input_ids']) for x in made})>1 or all(x['input_ids'][-1]!=x['input_ids'][-2] for x in made)
def end_of_turn_is_learned(made): return all(learned(x).endswith(end) for x in made)

@pytest.mark.parametrize('check', [prompt_is_not_learned, nothing_is_padded, end_of_turn_is_learned])
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
    assume(not values or not all(isinstance(v, str) for v in values)) # a list of paths
    report = DataReport()
    try: dataset = prepare_dataset(values, tok, report=report, cache=False, **how)
    except ValueError as e:
        assert 'can be used' in str(e) and report.used==0
        dataset = []
    assert report.read==len(values) and adds_up(report) and report.examples==len(dataset)
    for x in dataset:
        assert len(x['input_ids'])==len(x['labels'])<=how['max_length']
        assert any(l!=-100 for l in x['labels'][1:]) and all(l in (-100, t) for t,l in zip(x['input_ids'], x['labels']))

def test_a_text_among_rows_is_a_bad_row_and_texts_alone_are_paths():
    report = DataReport()
    assert len(prepare_dataset([*qa, '', 'rows.jsonl'], tok, report=report, cache=False))==len(qa)
    assert [d['line'] for d in report.dropped]==[len(qa)+1, len(qa)+2]
    with pytest.raises(FileNotFoundError, match='no-rows.jsonl'): prepare_dataset(['no-rows.jsonl'], tok, cache=False)
    with pytest.raises(ValueError, match=r'`data_path\[0\]`: `path` must be a path'): prepare_dataset([''], tok)

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

# Names, copies and settings

german = [dict(frage='2+3?', antwort='5')]*3
names = {'frage': 'question', 'antwort': 'answer'}

def test_other_names_are_mapped_and_copies_are_counted_or_dropped():
    kept,dropped = DataReport(),DataReport()
    assert len(prepare_dataset(german, tok, report=kept, columns=names, cache=False))==3 and kept.duplicates==2
    assert len(prepare_dataset(german, tok, report=dropped, columns=names, duplicates='drop', cache=False))==1
    assert [d['reason'] for d in dropped.dropped]==['duplicate of list:1']*2 and adds_up(dropped)

@pytest.mark.parametrize('bad,why', [
    (dict(format_type='csv'), '`format_type` must be one of'), (dict(train_on='user'), '`train_on`'),
    (dict(overflow='cut'), '`overflow`'), (dict(duplicates='no'), '`duplicates`'),
    (dict(max_length=True), '`max_length`'), (dict(columns={'a': 'b'}), '`columns`'),
    (dict(tokenizer=object()), '`tokenizer` must be a fast one'), (dict(tokenizer='gpt2'), "got the name 'gpt2'"),
    (dict(cache=5), '`cache` must be')])
def test_a_bad_setting_is_refused_by_name(bad, why):
    with pytest.raises(ValueError) as e: prepare_dataset(**dict(data_path=qa, tokenizer=tok) | bad)
    assert why in str(e.value)

def test_rows_from_which_nothing_is_learned_are_refused():
    talk = [dict(role='user', content='a'), dict(role='assistant', content='b', train=False)]
    with pytest.raises(ValueError, match='nothing to learn'): prepare_dataset([dict(messages=talk)], tok, cache=False)
    assert prepare_dataset(qa, tok, cache=False).features['input_ids'].feature.dtype=='int32'

# Rows that are too long

three_turns = [t for i in range(3) for t in (dict(role='user', content=f'{i} plus {i}?'),
                                             dict(role='assistant', content=f'{2*i}.'))]
long = [dict(messages=three_turns), dict(question='Read this: '+'blah '*40+'. What is 1 plus 1?', answer='2'),
        dict(question='Count.', answer='1 2 3 '*30)]

def fitted(rows, max_length=48, **settings):
    report = DataReport()
    made = prepare_dataset(rows, tok, max_length=max_length, report=report, cache=False, **settings)
    assert max(map(len, made['input_ids']))<=max_length
    return made,report

def test_truncating_drops_old_turns_and_the_middle_of_questions():
    made,report = fitted(long, overflow='truncate')
    assert [learned(x) for x in made]==['2.<|im_end|>4.<|im_end|>', '2<|im_end|>']
    assert report.truncated=={'earlier turns': 1, 'middle of a question': 1}
    assert 'no question can be shortened enough' in report.dropped[0]['reason']

def test_splitting_keeps_every_answer():
    made,_ = fitted(long, overflow='split')
    assert ''.join(map(learned, made.select(range(2))))=='0.<|im_end|>2.<|im_end|>4.<|im_end|>'
    assert ''.join(map(learned, made.select(range(3, len(made)))))=='1 2 3 '*30+end

def test_an_answer_is_cut_only_where_that_was_asked_for():
    made,report = fitted(long, overflow='truncate', cut_answers=True)
    assert (len(made), report.truncated['end of an answer'], made[2]['labels'][-1]!=-100,
            len(made[2]['input_ids']))==(3, 1, True, 48)

def test_plain_text_is_cut_into_pieces():
    text = [dict(text='word '*100)]
    # 48 tokens, of which the first was learned before; the end token is one more
    n = -(-len(tok('word '*100)['input_ids'])//47)
    assert [len(fitted(text, overflow=w)[0]) for w in ('drop', 'split', 'truncate')]==[n, n, 1]
    assert ''.join(map(learned, fitted(text)[0]))=='word '*100+end

@pytest.mark.parametrize('way', ['split', 'truncate'])
def test_a_conversation_in_parts_learns_its_last_answer_where_that_is_asked_for(way):
    made,_ = fitted([dict(messages=three_turns*4)], overflow=way, train_on='last')
    assert [learned(x) for x in made]==['4.<|im_end|>']

def test_a_question_that_fills_the_first_piece_is_shortened():
    made,report = fitted([dict(question='START '+'word '*900, answer='Yes.')], 64, overflow='split')
    assert (len(made), report.truncated, 'START' in tok.decode(made[0]['input_ids']))==(
        1, {'middle of a question': 1}, True)

def test_a_long_talk_keeps_its_end():
    talk = [t for i in range(200) for t in (dict(role='user', content=f'{i}?'),
                                            dict(role='assistant', content=f'{i}.'))]
    made,_ = fitted([dict(messages=talk)], 200, overflow='truncate')
    assert learned(made[0]).endswith('198.<|im_end|>199.<|im_end|>')

# The cache

def test_what_is_kept_is_what_was_prepared(tmp_path):
    reports = [DataReport() for _ in range(3)]
    for r,cache in zip(reports, (tmp_path, tmp_path, False)): prepare_dataset(qa, tok, 64, report=r, cache=cache)
    assert [r.cached for r in reports]==[False, True, False]
    assert reports[1].to_dict() | dict(cached=False)==reports[2].to_dict()

@pytest.mark.parametrize('meanwhile', ['replaced', 'removed', 'removed and put again', 'damaged'])
def test_what_another_process_does_to_the_cache_while_it_is_read_is_no_damage(tmp_path, monkeypatch, meanwhile):
    "Only what is damaged where it lies is told; the rows are the same in each case"
    real,asked = module.manifest_fault, []
    first = list(prepare_dataset(qa, tok, 64, report=DataReport(), cache=tmp_path))
    def between(place):
        asked.append(1)
        if len(asked)>1: return real(place)
        if meanwhile=='damaged': (place/'examples.arrow').write_bytes(b'x')
        else:
            shutil.copytree(place, tmp_path/'copy')
            shutil.rmtree(place)
            if meanwhile!='removed': shutil.move(tmp_path/'copy', place)
            if meanwhile=='replaced': return real(place)
        return real(place) or 'its file examples.arrow is missing'
    monkeypatch.setattr(module, 'manifest_fault', between)
    report = DataReport()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        again = list(prepare_dataset(qa, tok, 64, report=report, cache=tmp_path))
    assert again==first and report.cached==(meanwhile in ('replaced', 'removed and put again'))
    assert any('damaged' in str(w.message) for w in said)==(meanwhile=='damaged')
    assert [p.name for p in (tmp_path/'sage_data').iterdir() if p.name[0]=='.']==[]

def test_an_entry_that_came_meanwhile_is_not_replaced_under_its_readers(tmp_path, monkeypatch):
    real,places = module._write_arrow, []
    def meanwhile(batches, path, images):
        n = real(batches, path, images)
        if not places:
            places.append(path)
            prepare_dataset(qa, tok, 64, report=DataReport(), cache=tmp_path)
            places.append(next(p for p in (tmp_path/'sage_data').iterdir() if p.name[0]!='.').stat().st_ino)
        return n
    monkeypatch.setattr(module, '_write_arrow', meanwhile)
    prepare_dataset(qa, tok, 64, report=DataReport(), cache=tmp_path)
    assert [p.stat().st_ino for p in (tmp_path/'sage_data').iterdir()]==places[1:]

def test_ten_data_sets_are_kept_and_what_is_not_ours_stays(tmp_path):
    kept = tmp_path/'sage_data'
    (kept/'mine').mkdir(parents=True)
    for i in range(15):
        prepare_dataset([dict(question=f'{i}?', answer='a')], tok, cache=tmp_path)
        for p in kept.iterdir(): os.utime(p, (1e9+i, 1e9+i)) if p.stat().st_mtime>1.5e9 else None
    assert len(list(kept.iterdir()))==10+1

@pytest.mark.parametrize('damage', [lambda p: (p/'examples.arrow').unlink(),
                                    lambda p: (p/'examples.arrow').write_bytes(b'x'),
                                    lambda p: (p/'data_report.json').write_text('[]')])
def test_a_damaged_data_set_is_prepared_anew(damage, tmp_path):
    prepare_dataset(qa, tok, cache=tmp_path)
    for p in (tmp_path/'sage_data').iterdir(): damage(p)
    mended = DataReport()
    assert len(prepare_dataset(qa, tok, cache=tmp_path, report=mended))==12
    assert (mended.cached, mended.examples)==(False, 12)

def test_every_file_of_the_data_path_is_in_the_key():
    "The module that prepares data, and all modules that it reads files and rows with"
    import ast
    root = Path(module.__file__).parent
    def imported(file):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module: continue
            path = (node.module.removeprefix('sage_finetune.') if node.level in (0, 1) else node.module).replace(
                '.', '/')
            path = f'rows/{path}' if node.level==1 and file.parent.name=='rows' else path
            reads = path.startswith('rows/') or path=='core/text_stream' # where bytes become text and JSON
            if reads and (root/f'{path}.py').is_file(): yield path
    needed,waiting = set(),{*imported(root/'data.py')}
    while waiting:
        needed.add(path := waiting.pop())
        waiting |= {*imported(root/f'{path}.py')}-needed
    named = ast.literal_eval(next(
        node.value for node in ast.walk(ast.parse((root/'data.py').read_text())) if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name) and node.targets[0].id=='_code_files'))
    assert {f'{p}.py' for p in needed} | {'core/text_stream.py', 'data.py'}=={*named}

def test_a_data_set_tells_which_tokenizer_prepared_it(tmp_path):
    dataset = prepare_dataset(qa, tok, cache=False)
    assert tokenizer_of(dataset) is tok and tokenizer_of(dataset.select([0])) is tok
    dataset.save_to_disk(tmp_path/'saved')
    assert tokenizer_of(load_from_disk(tmp_path/'saved')) is tok
    template._tokenizers.clear()
    assert tokenizer_of(dataset).decode(dataset[0]['input_ids'])==tok.decode(dataset[0]['input_ids'])
    with pytest.raises(ValueError, match='give `tokenizer`'): tokenizer_of(Dataset.from_list([dict(input_ids=[1])]))

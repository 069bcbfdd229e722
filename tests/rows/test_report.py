"""Reasons counted by their kind, and what of the rows that are used is not: in the report, its warning and in runs"""
import csv
import json

import pytest
from transformers import AutoTokenizer

from sage_finetune.config import PreferenceConfig, resolve_model
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.preference import prepare_preferences
from sage_finetune.rows.report import reason_kinds, ReportWriter, short_report, show_report, why_none
from sage_finetune.rows.sources import Row, save_rows

tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
asked = dict(role='user', content='2+3?')
def said(text, **more): return dict(role='assistant', content=text, **more)

def prepared(rows, **how):
    report = DataReport()
    try: made = prepare_dataset(rows, tok, report=report, cache=False, **how)
    except ValueError as e: return report,str(e)
    return report,[tok.decode([t for t in x['labels'] if t!=-100]) for x in made]

def dropped(*reasons): return [dict(file='a.jsonl', line=i, reason=r) for i,r in enumerate(reasons, 1)]

# What is not used

dolly = [dict(instruction=f'{i}?', context='', response='a', category='open_qa') for i in range(3)]

def test_what_is_not_used_is_counted_in_rows():
    rows = [*dolly, dict(dolly[0], context='Two.'), dict(messages=[asked, said('5', mood='glad'), asked,
                                                                   said('6', mood='sad')])]
    report,_ = prepared(rows, columns=dict(response='output'))
    assert report.unused=={'category': 4, 'messages[].mood': 1}
    assert 'not used: category (4 rows), messages[].mood (1 row)' in show_report(report)
    assert 'not used: category (4 rows)' in short_report(report)
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict())))==report

def test_rows_that_are_dropped_are_not_counted_as_not_used():
    report,_ = prepared([dict(question='a', answer='b', extra=1), dict(question='a', answer='', extra=1)])
    assert (report.unused, len(report.dropped))==({'extra': 1}, 1)

@pytest.mark.parametrize('rows', [[dict(question='a', answer='b', extra=1)], [dict(text='a b c', extra=1)],
                                  [dict(messages=[dict(asked, train=True), said('5')])],
                                  [dict(question='a', answer='b'), dict(question='a', answer='')]])
def test_a_warning_is_given_and_short(rows):
    with pytest.warns(UserWarning, match='not used: extra|has no effect|is empty') as caught:
        prepare_dataset(rows, tok, cache=False)
    assert len(str(caught[0].message).splitlines())<=4

def test_no_warning_where_everything_is_read(recwarn):
    prepare_dataset([dict(id=1, question='a', answer='b', source='x', extra=None)], tok, cache=False)
    assert [w for w in recwarn if w.category is UserWarning]==[]

def test_names_in_the_report_are_those_of_the_file():
    report,_ = prepared([dict(ctx='C', messages=[asked, said('5')]), dict(ctx='C', q='a', answer='b')],
                        columns=dict(ctx='context', q='question'))
    assert report.unused=={'ctx': 1}

def test_what_was_done_to_read_a_row_is_counted():
    writer = ReportWriter(DataReport())
    rows = [Row('a', 1, {}, notes=('nulls left out',)), Row('a', 2, {})]
    assert [*writer.counted([rows])]==[rows] # dropped rows are counted as well
    writer.tell(rows[0], 'qa', ['images first', 'images first'], [])
    writer.tell(rows[1], 'qa', ['images first'], ['x', 'x'])
    assert writer.report.notes=={'nulls left out': 1, 'images first': 2} and writer.report.unused=={'x': 1}

def test_a_thousand_names_are_kept():
    writer = ReportWriter(DataReport())
    for i in range(3000): writer.tell(Row('a', i, {}), 'qa', [], [f'key{i}'])
    assert len(writer.report.unused)<=1001 and writer.report.unused['(others)']==2000
    assert len(show_report(writer.report).splitlines())<8

# `columns`

@pytest.mark.parametrize('rows,columns,why', [
    ([dict(sys_prompt='D', question='q', answer='a b')], dict(sysprompt='system'), "no row has 'sysprompt'"),
    ([dict(promt='q', completion='a')], dict(prompt_text='prompt'), "no row has 'prompt_text'; there are 'promt'"),
    ([dict(doc='D', messages=[asked, said('5')])], dict(doc='context'),
     "'context', which a row of the format messages"),
    ([dict(doc='D', text='a b')], dict(doc='system'), "'system', which a row of the format text does not use")])
def test_columns_without_effect_are_refused_and_nothing_is_kept(rows, columns, why, tmp_path):
    with pytest.raises(ValueError) as e:
        prepare_dataset(save_rows(tmp_path/'a.jsonl', rows), tok, columns=columns, cache=tmp_path/'cache')
    assert why in str(e.value)
    assert [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]==[]

def test_columns_that_one_row_needs_are_taken():
    report,made = prepared([dict(question='a', answer='b'), dict(frage='a', answer='c')],
                           columns=dict(frage='question'))
    assert (made, report.notes)==(['b<|im_end|>', 'c<|im_end|>'], {})
    report,made = prepared([dict(question='a', answer='b')], columns=dict(frage='question'))
    assert made==['b<|im_end|>'] and list(report.notes.values())==[1]

def test_columns_of_judged_rows_are_followed_too(tmp_path):
    rows = save_rows(tmp_path/'a.jsonl', [dict(prompt=f'{i}?', chosen='a', rejected='b', score=.5) for i in range(2)])
    def judged(**columns): return PreferenceConfig(data_path=rows, columns=columns, test_size=0.)
    with pytest.raises(ValueError, match="no row has 'sys'"): prepare_preferences(judged(sys='system'), tok)
    report = DataReport()
    prepare_preferences(judged(), tok, report)
    assert report.unused==dict(score=2)

# Judged rows and flags, from file to labels

def test_a_csv_of_judged_rows_is_not_learned(tmp_path):
    with open(tmp_path/'kto.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['prompt', 'completion', 'label'], ['q1', 'good one', 'true'], ['q2', 'BAD', 'false']])
    report,error = prepared(tmp_path/'kto.csv')
    assert '2 of 2 were dropped because: a judged row' in error and report.used==0

def test_flags_that_a_setting_overrules_are_noted():
    rows = [dict(messages=[asked, said('BAD', loss=False), asked, said('5')])]
    assert prepared(rows)[1]==['5<|im_end|>']
    report,_ = prepared(rows, train_on='all')
    assert [*report.notes]==['turns that ask not to be learned are learned: `train_on="all"`']

# Reasons

def test_rows_that_are_too_long_have_one_reason():
    rows = [dict(question='word '*(100+7*i), answer='yes') for i in range(12)]
    report,error = prepared(rows, max_length=64)
    assert '12 of 12 were dropped because: too long: ' in error and '`max_length` is 64: set `max_length` to ' in error
    lengths = sorted(int(d['reason'].split()[2]) for d in report.dropped)
    assert f'{lengths[0]} to {lengths[-1]} tokens' in error
    assert f'`max_length` to {lengths[-1]} to keep them all' in error
    assert prepared(rows, max_length=lengths[-1])[0].dropped==[]

@pytest.mark.parametrize('reasons,said_', [
    (['turn 2: `content` is missing', 'turn 14: `content` is missing'], 'turn 2 to 14: `content` is missing'),
    (["`train` must be true or false, got 'no'", "`train` must be true or false, got 'yes'"],
     "`train` must be true or false, got 'no' (and the like)"),
    (['not JSON: more after the row at column 7', 'not JSON: more after the row at column 1,200'],
     'not JSON: more after the row at column 7 to 1,200'),
    (["too long: 99 tokens, `max_length` is 64"]*2,
     'too long: 99 tokens, `max_length` is 64: '
     'set `max_length` to 99 to keep them all, or `overflow` to "truncate" or "split"'),
    (['too long: 99 tokens, `max_length` is 64, and no question can be shortened enough']*2,
     'too long: 99 tokens, `max_length` is 64, and no question can be shortened enough: '
     'set `max_length` to 99 to keep them all, or `overflow` to "split"'),
    (['too long: 99 tokens with 2 images, `max_length` is 64']*2,
     'too long: 99 tokens with 2 images, `max_length` is 64: set `max_length` to 99 to keep them all'),
    (['too long: 99 tokens in the longer answer, `max_length` is 64']*2,
     'too long: 99 tokens in the longer answer, `max_length` is 64: '
     'set `max_length` to 99 to keep them all, or `overflow` to "truncate"'),
    (['too long: 99 tokens in the longer answer without earlier turns, `max_length` is 64']*2,
     'too long: 99 tokens in the longer answer without earlier turns, `max_length` is 64: '
     'set `max_length` to 99 to keep them all'),
    (["unknown format with the keys 'a', 'b'", "unknown format with the keys 'a', 'c'"],
     "unknown format with the keys 'a', 'b' (and the like)"),
    (["the tokenizer cannot write the answer back: 'a1' becomes 'a'",
      "the tokenizer cannot write the answer back: 'b' becomes 'c'"],
     "the tokenizer cannot write the answer back: 'a1' becomes 'a' (and the like)")])
def test_reasons_of_one_kind_are_one(reasons, said_):
    assert [(reason, n, d['line']) for reason,n,d in reason_kinds(dropped(*reasons))]==[(said_, 2, 1)]

def test_reasons_of_several_kinds_stay_apart():
    report = DataReport(read=30, dropped=dropped(*['`answer` is empty']*12, *['`output` is empty']*5, 'turn 1: a',
                                                 'turn 1: b'))
    assert [n for _,n,_ in reason_kinds(report.dropped)]==[12, 5, 1, 1]
    assert why_none(report).startswith('12 of 30 were dropped because: `answer` is empty (the first at a.jsonl:1)')
    last = show_report(report).splitlines()[-1]
    assert '… and 9 more; in all 12 × `answer` is empty; 5 × `output` is empty' in last and '1 other' in last

"Conditions, orders and tags of many runs, as they may be typed"
import json

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import write_meta
from sage_finetune.record.labels import label_run, listed_runs, parsed_condition, read_labels, select, selection_note


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    for i in range(12):
        lora = dict(r=2**(i%4+1), target_modules=['q_proj', 'v_proj'] if i%2 else 'all-linear')
        write_meta(root/f'run-{i:02}', 'Qwen/Qwen2-0.5B' if i%3 else 'sage-tiny', 'rows.jsonl', task_type='qa',
                   config=dict(learning_rate=[1e-3, 2e-4][i%2], lora=lora, packing=bool(i%2)))
        if i!=5: (root/f'run-{i:02}'/'results.json').write_text(json.dumps(dict(loss_after=(i-6)/4)))
    label_run(root/'run-03', ['best', 'v1.0/中文'], note='for the table')
    return listed_runs(root)


def names(found): return [int(r.info.name[4:]) for r in found]


@pytest.mark.parametrize('where, expected', [
    (['loss<-1'], [0, 1]), (['loss >= 1'], [10, 11]), (['loss!=0'], [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]),
    (['lora.r=16'], [3, 7, 11]), (['lora.r>=8', 'lora.r<16'], [2, 6, 10]), (['loss>-1', 'loss<=-0.5'], [3, 4]),
    (['learning_rate=0.0002', 'packing=true'], [1, 3, 5, 7, 9, 11]), (['packing!=True'], [0, 2, 4, 6, 8, 10]),
    (['model=sage-*'], [0, 3, 6, 9]), (['model~QWEN', 'lora.r=2'], [4, 8]), (['run=run-0[1-3]'], [1, 2, 3]),
    (['tag=best'], [3]), (['tag!=best', 'loss>0.9'], [10, 11]), (['note~TABLE'], [3]), (['size<1 GiB', 'run~11'], [11]),
    (['lora.target_modules=v_proj', 'loss>1'], [11]), (['state=new', 'loss=0.25'], [7])])
def test_conditions(where, expected, many): assert names(select(many, where=where))==expected


@pytest.mark.parametrize('text', ['', 'loss', '<3', 'loss<', 'loss<three', 'lo ss=3', '=3', 'loss<nan?'])
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match='--where'): parsed_condition(text)


@pytest.mark.parametrize('name', ['los', 'lora', 'learning-rate', 'rank'])
def test_a_name_that_no_run_has_is_refused(name, many):
    with pytest.raises(ValueError): select(many, where=[f'{name}=1'])
    with pytest.raises(ValueError): select(many, sort=f'-{name}')


def test_what_is_not_known_comes_last_both_ways(many):
    assert names(select(many, sort='loss'))[-1]==names(select(many, sort='-loss'))[-1]==5
    assert names(select(many, sort='-loss', most=2))==[11, 10]
    assert names(select(many, ['run-0*'], sort='-run', most=1))==[9]


def test_the_line_below_says_what_is_left_out(many):
    assert selection_note(select(many, tags=['best']), many).startswith('1 of 12 runs, ')
    assert selection_note(many, many, 2**30).endswith('1.0 GiB in the trash')


@pytest.mark.parametrize('tag', ['', ' ', 'two words', '-x', 'a,b', 'x'*41, 'a\nb', '\x1b[2J', 3, None])
def test_tags_that_nobody_could_type(tag, tmp_path):
    write_meta(tmp_path/'run', 'sage-tiny', 'rows.jsonl')
    with pytest.raises(ValueError, match='a tag must be one word'): label_run(tmp_path/'run', [tag])
    assert not (tmp_path/'run'/'labels.json').exists()


@pytest.mark.parametrize('text', ['[]', '{', '{"tags": "a"}', '{"tags": [1]}', '{"note": 3}', ''])
def test_damaged_labels_are_told_and_hide_no_run(text, tmp_path):
    write_meta(tmp_path/'run', 'sage-tiny', 'rows.jsonl')
    (tmp_path/'run'/'labels.json').write_text(text)
    found = listed_runs(tmp_path)
    assert [r.info.name for r in found]==['run'] and 'labels.json' in selection_note(found, found)
    with pytest.raises(SageError): read_labels(tmp_path/'run')

"Ready rewards on the ways in which answers are written, and what a run names"
import json

import pytest

from sage_finetune.rewards.functions import (
    exact, judge, json_schema, length, number, read_number, regex, Reward, rewards_of, tool_call
)


@pytest.mark.parametrize('said,known,right', [
    ('The answer is 42.', '42', 1), ('42', '42.0', 1), ('42 or 43', '42', 0), ('-7', '−7', 1), ('5-3', '3', 1),
    ('1,234,567', '1234567', 1), ('1,23', '123', 0), ('$3.50', '3.5', 1), ('€ 12', '12', 1), ('.5', '1/2', 1),
    ('3 1/4', '3.25', 1), (r'$\frac{1}{3}$', '1/3', 1), (r'\dfrac{10}{4}', '2.5', 1), (r'\boxed{12} or 13', '12', 1),
    (r'\boxed{\text{about } 7}', '7', 1), (r'\boxed{\frac{7}{2}} m', '3.5', 1), ('1.5e3', '1500', 1),
    (r'2 \times 10^{3}', '2000', 0), ('2 x 10^3', '2000', 1), ('x2', '2', 0), ('#### 18', '18', 1),
    ('He has 3. #### 9 apples', '#### 9', 1), ('50%', '0.5', 0), ('50 %', '50%', 1), ('0.5', '50%', 0),
    ('100 cm', '1 m', 1), ('1 km', '1000 m', 1), ('3 h', '180 minutes', 1), ('3 kg', '3 m', 0), ('3', '3 m', 0),
    ('2 liters', '2000 ml', 1), ('7 apples', '7 oranges', 1), ('', '7', 0), ('no number', '7', 0), ('1/0', '7', 0),
    ('<think>maybe 8</think>It is 7', '7', 1), ('٣', '3', 1)])
def test_a_number_is_read_as_a_reader_would(said, known, right):
    assert number('', said, dict(answer=known))==right


def test_numbers_are_exact_and_may_be_near():
    assert read_number('0.1')[0]+read_number('0.2')[0]==read_number('0.3')[0]
    assert [number('', s, dict(answer='100'), tolerance=.05) for s in ('95', '105.1', '94.9')]==[1, 0, 0]
    assert number('', '7', dict(solution='7'), key='solution')==1


@pytest.mark.parametrize('value,schema,fits', [
    (1, dict(type='integer'), 1), (1.0, dict(type='integer'), 1), (1.5, dict(type='integer'), 0),
    (True, dict(type='integer'), 0),
    (None, dict(type=['string', 'null']), 1), ([1, 'a'], dict(type='array', items=dict(type='integer')), 0),
    ([1], dict(minItems=2), 0), ('abc', dict(pattern='^a.c$', maxLength=3), 1),
    (5, dict(minimum=5, exclusiveMaximum=6), 1),
    (6, dict(exclusiveMaximum=6), 0), (dict(a=1, b=2), dict(properties=dict(a={}), additionalProperties=False), 0),
    (dict(a=1), dict(required=['b']), 0), (True, dict(enum=[1]), 0), (dict(x=[1.0]), dict(const=dict(x=[1])), 1),
    (3, dict(anyOf=[dict(type='string'), dict(minimum=2)]), 1)])
def test_json_fits_a_schema(value, schema, fits):
    assert json_schema('', json.dumps(value), dict(schema=json.dumps(schema)))==fits


def test_a_schema_that_cannot_be_checked_is_refused_also_where_no_answer_is_json():
    for schema in (dict(type='date'), dict(oneOf=[])):
        with pytest.raises(ValueError, match='schema'): json_schema('', 'no json', {}, schema)
    assert json_schema('', 'no json', {}, dict(type='object'))==0
    assert json_schema('', '['*100_000, {}, dict(type='array'))==0


@pytest.mark.parametrize('said,worth', [
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', 1),
    ('<tool_call>{"name": "add", "arguments": {"b": 2.0, "a": 1}}', 1),
    ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', 1),
    ('{"function": {"name": "add", "arguments": {"a": 1, "b": 3}}}', .5), ('{"name": "sub", "arguments": {}}', 0),
    ('<tool_call>{"name": "add"</tool_call>', 0), ('3', 0), ('[]', 0), ('', 0)])
def test_calls_are_compared_by_name_and_arguments(said, worth):
    row = dict(tool_calls=[dict(type='function', function=dict(name='add', arguments=dict(a=1, b=2)))])
    assert tool_call('', said, row)==worth


def test_words_forms_and_lengths():
    assert [exact('', a, dict(answer='A b')) for a in ('A  b\n', 'a b')]==[1, 0]
    assert exact('', 'a B', dict(answer='A b'), case=False)==1
    assert [regex('', 'a\nb', {}, p, w) for p,w in (('a.b', True), ('b', True), ('b', False))]==[1, 0, 1]
    assert [length('', 'a '*n, {}, most=4) for n in (0, 4, 6, 8, 20)]==[0, 1, .5, 0, 0]


@pytest.mark.parametrize('value,why', [
    (float('nan'), 'no finite number'), (float('inf'), 'no finite number'), ('1', 'no finite number'),
    ([1], 'no finite number')])
def test_what_is_no_number_is_told_and_not_learned(value, why):
    found = judge([Reward('odd', lambda q,a,r: value), Reward('good', lambda q,a,r: 1)], '', '', {})
    assert found.total is None and why in found.failed['odd'] and found.parts['good']==1


def test_a_reward_that_does_not_apply_counts_for_nothing():
    rewards = [Reward('some', lambda q,a,r: None), Reward('all', lambda q,a,r: True, 2.0)]
    assert judge(rewards, '', '', {}).total==2 and judge(rewards[:1], '', '', {}).total is None


def test_own_rewards_come_from_a_file_and_its_source_is_part_of_them(tmp_path):
    file = tmp_path/'mine.py'
    file.write_text('def kind(question, answer, row, word="please"): return float(word in answer)\n')
    first = rewards_of([dict(reward=f'{file}:kind', word='thanks', weight=2.0)])[0]
    assert (first.name, first.weight, first('', 'thanks', {}))==('kind', 2.0, 1.0)
    file.write_text('def kind(question, answer, row, word="please"): return 2*float(word in answer)\n')
    import linecache
    linecache.clearcache()
    assert rewards_of([dict(reward=f'{file}:kind')])[0].code!=first.code
    wrong = {f'{file}:cruel': 'has no function', f'{tmp_path}/none.py:kind': 'names no file', 'kind': 'no ready reward'}
    for name,why in wrong.items():
        with pytest.raises(ValueError, match=why): rewards_of([dict(reward=name)])
    with pytest.raises(ValueError, match='option of the reward'): rewards_of([dict(reward='number', tolerence=1)])

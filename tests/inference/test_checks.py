"Checks of an answer, schemas, odd files of questions, and intervals that hold what they promise"
import json

import pytest

from sage_finetune.core.disk import SageError
from sage_finetune.inference.checks import (
    check_schema, exact_interval, ExamQuestion, fits_schema, json_answer, last_number, load_exam, score_answer
)


def score(row, text, stopped=True):
    question, = load_exam([row])
    return score_answer(question, text, stopped)


# --- each kind of check, and what is refused

@pytest.mark.parametrize('row, text, right', [
    (dict(question='q', answer='It is 6.'), 'It  is\n6.', 1), (dict(question='q', answer='It is 6.'), 'It is 6', 0),
    (dict(question='q', answer='6', contains='six'), 'SIX!', 1), (dict(question='q', contains=['a|b']), 'a', 0),
    (dict(question='q', contains=['C++']), 'It is C++.', 1), (dict(question='q', contains='cat'), 'concatenate', 0),
    (dict(question='q', number=1234.5), 'So it is $1,234.50.', 1), (dict(question='q', number='3/4'), '0.75', 1),
    (dict(question='q', number=-2), '5 − 7 = −2', 1), (dict(question='q', number=3.14, tolerance=.01), '3.1416', 1),
    (dict(question='q', number=3.14), '3.1416', 0), (dict(question='q', number=7), 'none', 0),
    (dict(question='q', number=1e3), '1e3', 1), (dict(question='q', number=0), '0.0', 1),
    (dict(question='q', regex='^yes'), 'yes, sir', 1), (dict(question='q', regex=r'\d{3}'), '12', 0),
    (dict(question='q', schema=dict(type='array', items=dict(type='integer'), minItems=2)), '[1, 2]', 1),
    (dict(question='q', schema=dict(type='array')), 'none', 0),
    (dict(question='q', contains='6', regex='^It'), 'It is 6.', 1),
    (dict(question='q', contains='6', regex='^6'), 'It 6', 0),
    (dict(question='q', answer='6'), '<think>7</think>6', 1),
    (dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content='2+2?')], number=4), '4', 1),
    (dict(instruction='Add.', input='2 2', output='4'), '4', 1), (dict(prompt='2+2?', number=4), '4', 1)])
def test_a_check(row, text, right): assert score(row, text)==right


def test_an_answer_that_did_not_end_is_not_the_expected_one():
    assert score(dict(question='q', answer='6'), '6', stopped=False)==0


@pytest.mark.parametrize('row, words', [
    (dict(question='q', number='many'), '`number` must be a number'),
    (dict(question='q', contains=[]), '`contains` must'),
    (dict(question='q', contains=''), '`contains` must be a text'),
    (dict(question='q', regex=7), '`regex` must be a text'), (dict(question='q', regex='['), '`regex` is no pattern'),
    (dict(question='q', schema='x'), '`schema` must be an object'),
    (dict(question='q', schema=dict(typ='object')), 'did you mean `type`?'),
    (dict(question='q', schema=dict(type='text')), 'unknown `type` in `schema` `text`'),
    (dict(question='q', schema=dict(allOf=[dict(format='email')])), 'unknown keyword of `schema` `format`'),
    (dict(question='q', function='nobody'), 'unknown function'),
    (dict(question='q', numbre=3, answer='3'), 'did you mean `number`?'),
    (dict(question='q', number=3, tolerance=2), '`tolerance` must be at least 0'), (dict(question='q'), 'answer'),
    (dict(answer='3'), ''), ('a text', 'must be an object')])
def test_what_cannot_be_checked_is_refused_with_its_line(tmp_path, row, words):
    file = tmp_path/'exam.jsonl'
    file.write_text(json.dumps(dict(question='1?', answer='1'))+'\n'+json.dumps(row)+'\n')
    with pytest.raises(ValueError) as e: load_exam(file)
    assert str(e.value).startswith(f'{file}:2: ') and words in str(e.value)


def test_other_files_of_questions(tmp_path):
    (tmp_path/'exam.csv').write_text('question,number\n2+2?,4\n')
    assert load_exam(tmp_path/'exam.csv')[0].checks==dict(number='4')
    (tmp_path/'empty.jsonl').write_text('')
    with pytest.raises(ValueError, match='empty.jsonl holds none'): load_exam(tmp_path/'empty.jsonl')
    with pytest.raises((SageError, OSError)): load_exam(tmp_path/'nowhere.jsonl')


@pytest.mark.parametrize('schema, good, bad', [
    (dict(anyOf=[dict(type='string'), dict(type='null')]), None, 3),
    (dict(oneOf=[dict(minimum=3), dict(maximum=5)]), 1, 4),
    (dict(const=1), 1, True), (dict(enum=['a', None]), None, 'b'), ({'not': dict(type='string')}, 1, 'a'),
    (dict(type=['integer', 'null']), 3.0, 3.5), (dict(exclusiveMinimum=0), .1, 0), (dict(pattern='^a'), 'ab', 'ba'),
    (dict(additionalProperties=dict(type='integer')), dict(a=1), dict(a='1')), (dict(items=False), [], [1]),
    (True, 1, None)])
def test_a_schema(schema, good, bad):
    check_schema(schema)
    assert fits_schema(good, schema)
    assert schema is True or not fits_schema(bad, schema)


def test_the_interval_holds_what_it_says_everywhere():
    from math import comb
    for n in (5, 10, 30):
        inside = [exact_interval(k, n) for k in range(n+1)]
        for truth in (.001, .017, .1, .37, .5, .9, .983):
            held = sum(comb(n, k)*truth**k*(1-truth)**(n-k) for k,(low, high) in enumerate(inside) if low<=truth<=high)
            assert held>=.95, (n, truth, held)


def test_texts_without_what_is_sought():
    assert last_number('') is None and last_number('1/0') is None and json_answer('```\n[1]\n```')==[1]
    assert all(isinstance(q, ExamQuestion) for q in load_exam([dict(question='q', answer='a')]))

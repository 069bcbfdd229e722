"Rows of questions in the forms in which they come, and what becomes of those that cannot be used"
import json

import pytest

from sage_finetune.base.loading import load_tokenizer
from sage_finetune.config import RewardConfig
from sage_finetune.rewards.questions import prepare_questions, questions_and_held_out, QuestionsDigest, to_question
from sage_finetune.rows.report import DataReport
from sage_finetune.rows.sources import save_rows

tokenizer = load_tokenizer('sage-tiny')
call = dict(type='function', function=dict(name='add', arguments=dict(a=1)))


@pytest.mark.parametrize('row,question,answer', [
    (dict(question='2+3?', answer='5'), '2+3?', '5'), (dict(question='2+3?'), '2+3?', None),
    (dict(prompt='2+3?', solution='5'), '2+3?', None), (dict(prompt='2+3?', completion='5'), '2+3?', '5'),
    (dict(instruction='Add.', input='2 3', output='5'), 'Add.\n\n2 3', '5'), (dict(instruction='Add.'), 'Add.', None),
    (dict(prompt=[dict(role='user', content='2+3?')], answer='5'), '2+3?', '5'),
    (dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content='2+3?')]), '2+3?', None),
    (dict(messages=json.dumps([dict(role='user', content='2+3?')]), answer='5'), '2+3?', '5'),
    (dict(conversations=[{'from': 'human', 'value': '2+3?'}, {'from': 'gpt', 'value': '5'}]), '2+3?', '5'),
    (dict(messages=[dict(role=who, content=said) for who,said in (('user', 'a'), ('assistant', 'b'), ('user', 'c'))]),
     'c', None)])
def test_a_question_is_found_and_its_answer_kept_for_the_rewards(row, question, answer):
    asked = to_question(row)
    assert (asked.question, asked.row.get('answer'))==(question, answer) and asked.messages[-1]['role']!='assistant'


def test_calls_of_the_last_turn_are_there_for_the_rewards():
    said = dict(role='assistant', content='', tool_calls=[call])
    asked = to_question(dict(messages=[dict(role='user', content='1?'), said]))
    assert asked.row['tool_calls'][0]['function']['name']=='add' and len(asked.messages)==1


@pytest.mark.parametrize('row,why', [
    (dict(text='a'), 'no question'), (dict(answer='5'), 'no question'), ([1], 'must be an object'),
    (dict(question='a', image='b.png'), 'takes? text only'), (dict(chosen='a', rejected='b'), 'no question'),
    (dict(messages=[dict(role='assistant', content='a')]), 'no question before'),
    (dict(question='', answer='5'), 'no question')])
def test_what_is_no_question_is_refused(row, why):
    with pytest.raises(ValueError, match=why): to_question(row)


def test_every_row_is_accounted_for(tmp_path):
    rows = [dict(question='2+3?', answer='5'), dict(question='2+3?', answer='5'), dict(question='2+3?', answer='6'),
            dict(frage='1+1?', answer='2'), dict(question='long '*100, answer='1')]
    path = save_rows(tmp_path/'rows.jsonl', rows)
    def prepared(**more):
        c = RewardConfig(model_name='sage-tiny', data_path=path, max_length=64, max_completion_length=16, **more)
        return prepare_questions(c, tokenizer, report := DataReport()),report
    data,report = prepared()
    assert (len(data), report.read, report.used, report.duplicates)==(3, 5, 3, 1) and data['at'][:]==[0, 1, 2]
    assert [(d['line'], d['reason'][:11]) for d in report.dropped]==[(4, 'no question'), (5, 'too long: 1')]
    assert len(prepared(duplicates='drop')[0])==2 and len(prepared(columns=dict(frage='question'))[0])==4
    with pytest.raises(ValueError, match='rows.jsonl:4: no question'): prepared(strict=True)
    two = [dict(path=path), dict(path=path, columns=dict(frage='question'))]
    c = RewardConfig(model_name='sage-tiny', data_path=two, max_length=64, max_completion_length=16)
    assert len(prepare_questions(c, tokenizer, report := DataReport()))==7 and len(report.sources)==2


def test_held_out_questions_and_the_digest(tmp_path):
    path = save_rows(tmp_path/'rows.jsonl', [dict(question=f'{i}+{i*i}?', answer=str(i)) for i in range(12)])
    c = RewardConfig(model_name='sage-tiny', data_path=path, max_length=64, max_completion_length=16, test_size=.25)
    train,held = questions_and_held_out(c, tokenizer, DataReport())
    assert not {*train['question']} & {*held['question']} and len(train)+len(held)==12
    other,_ = questions_and_held_out(c.replace(eval_data_path=path), tokenizer, report := DataReport())
    assert len(other)==12 and report.overlap==12
    assert QuestionsDigest()(train, held)!=QuestionsDigest()(other, held)!=QuestionsDigest()(other, None)

"""Rows of every format: what they may hold, and what is refused by name"""
import json

import pytest

from sage_finetune.rows.formats import (
    checked_columns, content_parts, create_sample_data, detect_data_format, format_conversation_sample,
    format_qa_sample, question, renamed, sample_rows, to_conversation, to_messages, to_preference
)

asked = dict(role='user', content='2+3?')
def said(text): return dict(role='assistant', content=text)

# Images

words = dict(type='text', text='Which colour?')
openai = dict(messages=[dict(role='user', content=[dict(type='image_url', image_url=dict(url='red.png')), words]),
                        said('Red.')])
factory = dict(conversations=[{'from': 'human', 'value': '<image>Which colour?'}, {'from': 'gpt', 'value': 'Red.'}],
               images=['red.png'])
column = dict(image='red.png', question='Which colour?', answer='Red.')

def test_a_turn_with_images_has_parts_and_can_be_read_again():
    assert content_parts(to_messages(openai)[0])==[dict(type='image', image='red.png'), words]
    assert to_messages(dict(messages=to_messages(openai)))==to_messages(openai)
    assert content_parts(question('', 'a', 'b'))==[dict(type='image', image='a'), dict(type='image', image='b')]

def test_text_is_text_where_there_is_no_image():
    assert content_parts(dict(role='user', content='a\ufffcb'))==[dict(type='text', text='a\ufffcb')]
    plain = to_messages(dict(question='<image> in SVG?', answer='Yes, <image>.'))[0]
    assert plain==dict(role='user', content='<image> in SVG?')

def test_images_stand_where_their_marks_are():
    held = dict(messages=[dict(role='user', content=[dict(type='image'), dict(type='text', text='and'),
                                                     dict(type='image', image='b')]), said('x')], images=['a'])
    assert to_messages(held)[0]==dict(role='user', content='\ufffcand\ufffc', images=['a', 'b'])
    row = renamed(dict(pic='a', question='b', answer='c'), checked_columns(dict(pic='image')))
    assert to_messages(row)[0]['images']==['a']

@pytest.mark.parametrize('row,why', [
    (dict(column, question='<image>?', image=['a.png', 'b.png']), '1 places for images (`<image>`) and 2 images'),
    (dict(column, question='\ufffc?'), 'U+FFFC'), (dict(column, images=['a']), 'both hold something'),
    (dict(column, videos=['a']), 'only images'), (dict(factory, images=[]), '1 places'),
    (dict(messages=[dict(role='system', content=[dict(type='image', image='a')]), *to_messages(openai)[1:]]),
     'role system'),
    (dict(messages=[dict(role='user', content=[dict(type='image_url')])]), 'without a `url`'),
    (dict(messages=[said('a')], image='b'), 'no question to show')])
def test_images_that_fit_nowhere_are_refused(row, why):
    with pytest.raises(ValueError) as e: to_messages(row)
    assert why in str(e.value)

# What is refused is refused by name

call = dict(name='add', arguments=dict(a=2, b=3))

@pytest.mark.parametrize('row,why', [
    (dict(messages=[dict(role='user', content='a'), said('b') | dict(weight=.5)]), '`weight` must be 0 or 1'),
    (dict(messages=[dict(role='user', content='a'), said('b') | dict(train='no')]), '`train` must be true or false'),
    (dict(messages=[dict(role='user', content='a'), said('b') | dict(weight=[1, 0])]), '`weight` must be 0 or 1'),
    (dict(messages=[dict(role='user', content='a', tool_calls=[call]), said('b')]),
     '`tool_calls` in a turn of the role user'),
    (dict(messages=[dict(role='assistant', tool_calls=[dict(name='f', arguments='{')])]),
     '`arguments` of call 1 is not JSON'),
    (dict(messages=[dict(role='assistant', tool_calls=[dict(name='f', arguments=[1])])]),
     '`arguments` of call 1 must be an object'),
    (dict(messages=[dict(role='assistant', tool_calls=[7])]), 'call 1 must be an object'),
    (dict(messages=[dict(role='assistant', content=None)]), '`content` is missing'),
    (dict(conversations=[{'from': 'function_call', 'value': '[]'}]), '`value` holds no call'),
    (dict(conversations=[{'from': 'human', 'value': 'a'}, {'from': 'me', 'value': 'b'}]),
     'turn 2: `from` must be one of'),
    (dict(messages=[7]), 'turn 1 must be an object'), (dict(messages=[]), '`messages` must be a list of turns'),
    (dict(messages='Hi'), '`messages` must be a list of turns'),
    (dict(question='a', answer='b', tools='{}'), '`tools` must be a list'),
    (dict(question='a', answer='b', tools=[{}]), '`name` of a tool is missing'),
    (dict(question='a', answer='\ud800'), 'lone surrogate'), (dict(question='a', answer=' '), '`answer` is empty'),
    (dict(instruction='a', output='b', history=['c']), '`history` 1 must be'),
    (dict(instruction='a', output='b', history=['abc', 'de']), '`history` 1 must be'),
    (dict(instruction='a', output='b', history=5), '`history` must be a list'), ([1], 'a row must be an object'),
    (dict(), 'with the keys (none)')])
def test_a_bad_row_is_refused_by_name(row, why):
    with pytest.raises(ValueError) as e: to_conversation(row)
    assert why in str(e.value)

def test_a_text_row_is_no_conversation():
    with pytest.raises(ValueError, match="got 'text'"): to_conversation(dict(text='a'))

@pytest.mark.parametrize('flag', [dict(train=0), dict(train=False), dict(weight=0.0)])
def test_a_turn_can_ask_not_to_be_learned(flag):
    assert to_messages(dict(messages=[said('b') | flag]))[0]['train'] is False

@pytest.mark.parametrize('bad', ['q', {'q': ['x']}, ['a']])
def test_columns_must_be_names(bad):
    with pytest.raises(ValueError, match='`columns` must be a dict of names'): checked_columns(bad)

def test_two_columns_cannot_have_one_name():
    with pytest.raises(ValueError, match='maps two names to one'): checked_columns({'a': 'text', 'b': 'text'})

def test_thoughts_and_system_prompts_under_their_other_names():
    thinking = to_messages(dict(messages=[dict(role='developer', content=''), dict(role='user', content='a'),
                                          said('b') | dict(thinking='hm')]))
    assert thinking==[dict(role='system', content=''), dict(role='user', content='a'),
                      said('b') | dict(reasoning_content='hm')]
    given = to_messages(dict(conversations=[{'from': 'gpt', 'value': 'b', 'train': False}], system='s'))
    assert given==[dict(role='system', content='s'), said('b') | dict(train=False)]

# Judged rows

def both(**more): return dict(prompt='2+3?', chosen='5', rejected='6') | more

@pytest.mark.parametrize('row,why', [
    (both(image='d.png'), 'takes text only'), (both(chosen=' '), '`chosen` is empty'),
    (both(rejected=7), '`rejected` must be a string'), (both(prompt=None), 'no question before'),
    (dict(messages=[asked, said('5')], chosen='6', rejected='7'), 'the prompt ends with an answer'),
    (dict(prompt='2+3?', completion='6', label=7), 'no judgement'),
    (dict(messages=[asked], label=True), 'must begin with a turn of the assistant'),
    (dict(chosen=[asked], rejected=[asked, said('6')]), 'must begin with a turn of the assistant'),
    ([1], 'a row must be')])
def test_a_bad_judgement_is_refused_by_name(row, why):
    with pytest.raises(ValueError) as e: to_preference(row)
    assert why in str(e.value)

def test_a_label_must_be_true_or_false():
    with pytest.raises(ValueError, match='`label` must be true or false'):
        to_preference(dict(prompt='2+3?', completion='6', label=7), 'unpaired')
    found = [detect_data_format(dict(prompt='a', completion='b', label=x)) for x in (True, 0, 'False', 3)]
    assert found==['unpaired']*3+['prompt_completion']

def test_the_prompt_of_a_judgement_comes_from_any_format():
    turns = to_preference(dict(prompt='old', chosen=[asked, said('5')], rejected=[asked, said('6')]))
    assert turns.prompt==[asked]
    assert to_preference(both(system='Be brief.')).prompt[0]['role']=='system'
    alpaca = to_preference(dict(instruction='Add.', input='2+3', chosen='5', rejected='6'))
    assert alpaca.prompt==[dict(role='user', content='Add.\n\n2+3')]
    longer = to_preference(dict(messages=[asked, said('5'), dict(role='user', content='And 1?')], chosen='6',
                                rejected='5'))
    learned = [t.get('train', True) for t in longer.talks[0].messages if t['role']=='assistant']
    assert learned==[False, True]

# Samples and plain headings

def test_samples_of_every_format(tmp_path):
    for name in ('alpaca', 'qa', 'conversation', 'text', 'messages', 'prompt_completion'):
        assert {detect_data_format(r) for r in sample_rows(name, 10)}=={name}
    with pytest.raises(ValueError, match='must end in .json or .jsonl'): create_sample_data(tmp_path/'x.csv')
    rows = json.loads(create_sample_data(tmp_path/'x.json', 'qa', 3).read_text())
    assert rows==sample_rows('qa', 3)

def test_plain_headings():
    text = format_qa_sample(dict(question='2+3?', answer='5', context='Sums.'))['text']
    assert text=='### Question:\n2+3?\n\n### Context:\nSums.\n\n### Answer:\n5'
    talk = format_conversation_sample(dict(conversations=[asked, said('5')]))['text']
    assert talk=='### User:\n2+3?\n\n### Assistant:\n5'

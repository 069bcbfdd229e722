"""One turn in every way of writing it: what is learned, what is offered, what is text, and what is told"""
import json

import pytest
from hypothesis import given, settings, strategies as st

from sage_finetune.rows.formats import to_conversation, to_messages
from sage_finetune.rows.turns import (
    checked_text, harmless_keys, harmless_turn_keys, is_empty, json_text, json_value, read_flag, read_history,
    read_tools, read_turn, read_turns, Reading, refuse_unlearned, role_of, TrackedDict, turns_in, without_masked
)

asked = dict(role='user', content='2+3?')
def said(text, **more): return dict(role='assistant', content=text, **more)
def talk(*turns, **row): return to_conversation(dict(messages=[*turns], **row))
def learned(messages): return [m.get('train', True) for m in messages if m['role']=='assistant']

# What was read

def test_what_is_looked_up_is_read_and_a_look_with_in_is_not():
    row = TrackedDict(dict(a=1, b=2, c=3, id=4))
    assert row.get('a')==1 and row['b']==2 and 'c' in row and row.get('d', 5)==5
    assert row.unread(harmless_keys)==['c'] and row.read=={'a', 'b', 'd'}

@pytest.mark.parametrize('value', [None, '', ' \n', [], {}, (), float('nan'), [None], dict(a=None)])
def test_what_says_nothing_is_not_told(value):
    assert is_empty(value) and talk(asked, said('5'), extra=value).unused==()

@pytest.mark.parametrize('value', [0, False, 0.0, 'a', [0], [''], dict(a=0)])
def test_zero_and_false_say_something(value):
    assert not is_empty(value) and talk(asked, said('5'), extra=value).unused==('extra',)

@pytest.mark.parametrize('key', ['id', 'ID', 'idx', 'index', 'uuid', '__index_level_0__', 'source', 'dataset', 'url',
                                 'timestamp', 'language', 'split'])
def test_names_of_rows_and_where_they_came_from_are_harmless(key):
    assert key.lower() in harmless_keys and talk(asked, said('5'), **{key: 'x'}).unused==()

def test_keys_of_turns_are_told_under_the_list_they_stand_in():
    turns = [{'from': 'human', 'value': 'a', 'emotion': 'glad', 'name': 'Ann'},
             {'from': 'gpt', 'value': 'b', 'score': 0}]
    assert to_conversation(dict(conversations=turns)).unused==('conversations[].emotion', 'conversations[].score')
    assert {'id', 'name', 'timestamp'}<=harmless_turn_keys
    both = dict(role='assistant', content='b', value='other')
    assert talk(asked, both).unused==('messages[].value',)

def test_keys_of_calls_and_parts_are_told():
    call = dict(type='function', function=dict(name='f', arguments={}, strict=True), result=5)
    parts = [dict(type='text', text='2+3?', cache_control=dict(type='ephemeral'))]
    found = talk(dict(role='user', content=parts), said('', tool_calls=[call]))
    assert found.unused==('messages[].content[].cache_control', 'messages[].tool_calls[].result',
                          'messages[].tool_calls[].function.strict')

def test_thoughts_under_two_names_are_told_where_they_differ():
    same = talk(asked, said('5', reasoning_content='hm', reasoning='hm'))
    other = talk(asked, said('5', reasoning_content='hm', thinking='oh'))
    assert (same.unused, other.unused)==((), ('messages[].thinking',))
    assert same.messages[1]['reasoning_content']==other.messages[1]['reasoning_content']=='hm'
    assert talk(dict(asked, thinking='hm'), said('5')).unused==('messages[].thinking',)

# Flags

off = [dict(train=False), dict(weight=0), dict(loss=0.0), dict(loss='false'), dict(training='False'),
       dict(trainable=0), dict(loss_mask='0'), dict(loss_weight='0.0'), dict(mask=True), dict(masked='true'),
       dict(masked=1), dict(train=False, weight=0)]
on = [dict(train=True), dict(weight=1.0), dict(loss='TRUE'), dict(training=1), dict(trainable='1'), dict(loss_mask=1),
      dict(loss_weight='1.0'), dict(mask=False), dict(masked=0), dict(masked='false'), dict(weight=None), dict(loss='')]

@pytest.mark.parametrize('flag,kept', [*((f, False) for f in off), *((f, True) for f in on)])
def test_a_turn_is_learned_or_not_in_every_spelling(flag, kept):
    found = talk(asked, said('4', **flag), asked, said('5'))
    assert learned(found.messages)==[kept, True] and found.unused==()
    share = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b', **flag}]
    assert learned(to_messages(dict(conversations=share)))==[kept]

@pytest.mark.parametrize('flag,why', [
    (dict(weight=.5), '`weight` must be 0 or 1, got 0.5'), (dict(loss_weight='0.5'), '`loss_weight` must be 0 or 1'),
    (dict(loss=2.31), '`loss` must be true or false'), (dict(trainable='maybe'), '`trainable` must be true or false'),
    (dict(loss_mask=[0, 1]), '`loss_mask` must be 0 or 1'), (dict(masked={}, mask='x'), '`mask` must be true or false'),
    (dict(train_detail=[dict(begin_offset=0, end_offset=3, train=False)]), '`train_detail` asks to learn parts'),
    (dict(train=True, weight=0), '`train` and `weight` disagree'), (dict(loss=1, masked=1),
                                                                    '`loss` and `masked` disagree')])
def test_a_flag_that_cannot_be_honoured_is_refused_by_name(flag, why):
    with pytest.raises(ValueError) as e: talk(asked, said('5', **flag))
    assert str(e.value).startswith('turn 2: ') and why in str(e.value)

def test_a_question_that_asks_to_be_learned_is_told():
    found = talk(dict(asked, loss=True), said('5'))
    assert found.notes==('`loss` of a turn that is no answer has no effect',)
    assert talk(dict(asked, mask=True), said('5')).notes==talk(dict(asked, masked=False), said('5')).notes==()

def test_a_flag_says_true_false_or_nothing():
    assert [read_flag(v, 'train') for v in (None, '', 1, 'false')]==[None, None, True, False]
    with pytest.raises(ValueError, match='`masks` must be 0 or 1'): read_flag('maybe', 'masks')

@pytest.mark.parametrize('flags,kept', [
    (dict(loss_mask=[0, 0, 0, 1]), [False, True]), (dict(loss_masks=[1, 0]), [True, False]),
    (dict(masks=[1, 1, 1, 0]), [False, True]), (dict(weights='[0, 1]'), [False, True]),
    (dict(train_mask=['true', 'true', 'false', 'false']), [True, False]), (dict(mask='User'), [True, True]),
    (dict(weight=[0.0, 1.0]), [False, True])])
def test_lists_of_flags_beside_the_turns(flags, kept):
    found = talk(asked, said('4'), asked, said('5'), **flags)
    assert learned(found.messages)==kept and found.unused==()

@pytest.mark.parametrize('flags,why', [
    (dict(loss_mask=[0, 1, 0]), '`loss_mask` has 3 entries for 2 turns'), (dict(loss=0),
                                                                           'asks not to be learned (`loss`)'),
    (dict(masked='true'), 'asks not to be learned (`masked`)'), (dict(weight=.25), '`weight` must be 0 or 1, got 0.25'),
    (dict(loss_weight='2'), '`loss_weight` must be 0 or 1'), (dict(masks=[.5, 1]), '`masks` must be 0 or 1'),
    (dict(train_detail=[dict(begin_offset=0)]), '`train_detail` must be')])
def test_flags_of_a_row_are_honoured_or_refused(flags, why):
    with pytest.raises(ValueError) as e: talk(asked, said('5'), **flags)
    assert why in str(e.value)

@pytest.mark.parametrize('row', [dict(question='a', answer='b'), dict(instruction='a', output='b'),
                                 dict(prompt='a', completion='b'), dict(conversations=[{'from': 'gpt', 'value': 'b'}])])
def test_flags_of_a_row_hold_in_every_format(row):
    with pytest.raises(ValueError, match='asks not to be learned'): to_conversation(row | dict(trainable='false'))
    assert to_conversation(row | dict(train=1)).unused==()
    assert to_conversation(row | dict(loss=2.31)).unused==('loss',)

def test_the_role_that_is_masked_may_be_that_of_the_assistant():
    row = TrackedDict(dict(mask='Assistant'))
    assert learned(without_masked(row, [asked, said('5')]))==[False]
    refuse_unlearned(row)
    assert row.unread(harmless_keys)==[]

# Functions and results

schema = dict(name='add', parameters=dict(type='object'))
whole = [dict(type='function', function=schema)]

@pytest.mark.parametrize('offer', [schema, [schema], whole, json.dumps(schema), json.dumps(whole),
                                   [json.dumps(schema)]])
def test_functions_on_offer_in_every_form(offer):
    assert read_tools(offer, '`tools`')==whole
    for key in ('tools', 'functions', 'available_tools'):
        assert talk(asked, said('5'), **{key: offer}).tools==whole
        in_system = talk(dict(role='system', content='s', **{key: offer}), asked, said('5'))
        assert (in_system.tools, in_system.unused)==(whole, ())
        assert talk(dict(asked, **{key: offer}), said('5')).tools==whole

def test_functions_that_cannot_be_offered_are_told():
    late = talk(asked, said('5'), dict(asked, tools=whole), said('6'))
    assert (late.tools, late.unused)==(None, ('messages[].tools',))
    twice = talk(dict(role='system', content='s', tools=[dict(name='other')]), asked, said('5'), tools=whole)
    assert (twice.tools, twice.unused)==(whole, ('messages[].tools',))
    same = talk(dict(role='system', content='s', tools=whole), asked, said('5'), tools=whole, functions=[schema])
    assert same.unused==()
    assert talk(asked, said('5'), tools=whole, functions=[dict(name='other')]).unused==('functions',)
    assert talk(asked, said('5'), functions='def f(): pass').unused==('functions',)
    with pytest.raises(ValueError, match='`tools` is not JSON'): talk(asked, said('5'), tools='def f(): pass')

@pytest.mark.parametrize('calls', [
    dict(tool_calls=[dict(name='add', arguments=dict(a=2))]),
    dict(tool_calls='[{"name": "add", "arguments": {"a": 2}}]'),
    dict(tool_calls=['{"name": "add", "arguments": "{\\"a\\": 2}"}']),
    dict(function_call=dict(name='add', arguments='{"a": 2}')),
    dict(function_call='{"name": "add", "parameters": {"a": 2}}'),
    dict(tool_calls=[], function_call=dict(name='add', arguments=dict(a=2)))])
def test_calls_in_every_form(calls):
    found = talk(asked, dict(role='assistant', content=None, **calls))
    assert found.messages[1]['tool_calls']==[dict(type='function', function=dict(name='add', arguments=dict(a=2)))]
    assert found.unused==()

def test_ids_of_calls_may_be_numbers():
    made = talk(asked, said('', tool_calls=[dict(id=7, name='f', arguments={})]), dict(role='tool', content='x',
                                                                                       tool_call_id=7))
    assert (made.messages[1]['tool_calls'][0]['id'], made.messages[2]['tool_call_id'])==('7', '7')

@pytest.mark.parametrize('result,text', [
    (dict(temp=7), '{"temp": 7}'), ([dict(temp=7), dict(temp=8)], '[{"temp": 7}, {"temp": 8}]'), ([], '[]'), ({}, '{}'),
    (['Ärger', 'b'], '["Ärger", "b"]'), (7, '7'), (7.5, '7.5'), (True, 'true'), ('warm', 'warm'), ('', ''),
    ([dict(type='text', text='warm')], 'warm'), ([dict(type='city', name='Oslo')],
                                                 '[{"type": "city", "name": "Oslo"}]')])
def test_results_of_tools_are_text_or_json(result, text):
    for role in ('tool', 'function', 'observation'):
        assert read_turn({'from': role, 'value': result}, 1, Reading())['content']==text
        assert read_turn(dict(role=role, content=result, name='f'), 1, Reading())['content']==text

@pytest.mark.parametrize('turn,why', [
    (dict(role='tool', content=None), '`content` is missing'), (dict(role='tool', content={1, 2}),
                                                                'cannot be written as JSON'),
    (dict(role='user', content=dict(a=1)), '`content` must be a string, got dict'),
    (dict(role='tool', content=[dict(type='text', text='a'), dict(type='table')]), "a part of the type 'table'"),
    ('Hello!', 'must be an object'), ('{"role": ', 'turn 1 is not JSON'), (dict(role=7, content='a'),
                                                                           '`role` must be one of')])
def test_a_turn_that_cannot_be_read_is_refused_by_name(turn, why):
    with pytest.raises(ValueError) as e: read_turn(turn, 1, Reading())
    assert why in str(e.value)

def test_roles_in_any_spelling():
    assert [role_of(r) for r in ('GPT', ' User ', 'Developer', 'observation', 'me', None)]==[
        'assistant', 'user', 'system', 'tool', None, None]

# JSON text

turns = [asked, said('5')]
@pytest.mark.parametrize('given_', [turns, json.dumps(turns), [json.dumps(t) for t in turns], f' {json.dumps(turns)} '])
def test_turns_may_be_json_text(given_):
    assert read_turns(given_, 'messages', Reading())==to_messages(dict(messages=given_))==turns
    assert to_messages(dict(conversations=given_))==turns

@pytest.mark.parametrize('text,why', [
    ('[{"role": "user"', 'this text is not JSON'), ("[{'role': 'user'}]", 'notation of Python'), ('5',
                                                                                                  'with at least one'),
    ('[]', 'with at least one'), ('[{"role": "user", "role": "user"}]', "the key 'role' stands twice"), ('['*100_000,
                                                                                                         'not JSON')])
def test_text_that_is_no_turns_says_json(text, why):
    with pytest.raises(ValueError) as e: to_messages(dict(messages=text))
    assert '`messages` must be a list of turns' in str(e.value) and why in str(e.value)

def test_a_text_is_turns_only_where_every_object_speaks():
    for text in ('[1, 2]', '{"role": "chef"}', '[{"role": "user"}]', 'Hello!', '[]', '{"answer": 5}',
                 '[{"from": "a"}]'):
        assert turns_in(text, 'completion', Reading()) is None
    reading = Reading()
    assert turns_in(json.dumps(said('5')), 'chosen', reading)==[said('5')]
    assert [*reading.notes]==['`chosen` is JSON text, read as turns'] and turns_in([7], 'prompt', reading)==[7]

past = [dict(role='user', content='Hi'), dict(role='assistant', content='Hello!')]
@pytest.mark.parametrize('history', [
    [['Hi', 'Hello!']], [('Hi', 'Hello!')], [dict(question='Hi', answer='Hello!')], [dict(prompt='Hi',
                                                                                          response='Hello!')],
    [dict(instruction='Hi', output='Hello!')], past, [{'from': 'human', 'value': 'Hi'},
                                                      {'from': 'gpt', 'value': 'Hello!'}],
    '[["Hi", "Hello!"]]', json.dumps(past), '[{"user": "Hi", "assistant": "Hello!"}]'])
def test_history_in_every_form(history):
    assert read_history(history, Reading())==past
    for row in (dict(instruction='a', output='b'), dict(question='a', answer='b'), dict(prompt='a', completion='b')):
        found = to_conversation(row | dict(history=history))
        assert [m['content'] for m in found.messages]==['Hi', 'Hello!', 'a', 'b'] and found.unused==()

@pytest.mark.parametrize('history', ['abc', '"abc"', 'Hi', 5, dict(question='Hi'), ['Hi', 'Hello!'], [['Hi']],
                                     [['Hi', 5]],
                                     [dict(ask='Hi')], '[["Hi"', [['Hi', ' ']]])
def test_history_of_another_shape_is_refused(history):
    for row in (dict(instruction='a', output='b'), dict(question='a', answer='b')):
        with pytest.raises(ValueError, match='`history`'): to_conversation(row | dict(history=history))

def test_no_history_is_none():
    for history in (None, '', ' ', [], '[]'): assert read_history(history, Reading())==[]
    reading = Reading()
    read_history([dict(question='Hi', answer='Hello!', mood='glad')], reading)
    assert [*reading.unused]==['history[].mood']

short_texts = st.text(max_size=5).filter(str.isprintable)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | short_texts,
                           lambda v: st.lists(v, max_size=3) | st.dictionaries(short_texts, v, max_size=3))

@settings(max_examples=100, deadline=None)
@given(json_values)
def test_json_goes_round(value): assert json_value(json_text(value, 'x'), 'x')==value

def test_texts_are_checked():
    assert checked_text('', '`a`', empty=True)==''
    for bad,why in ((None, 'is missing'), (5, 'must be a string'), (' ', 'is empty'), ('\ud800', 'lone surrogate')):
        with pytest.raises(ValueError, match=why): checked_text(bad, '`a`')

@pytest.mark.parametrize('number', [float('nan'), float('inf'), -float('inf')])
def test_numbers_that_json_has_not_are_refused(number):
    written = json.dumps(dict(a=[number])) # as Python writes it
    for arguments in (dict(a=[number]), written):
        with pytest.raises(ValueError, match='turn 2: call 1 cannot be written as JSON'):
            talk(asked, said('', tool_calls=[dict(function=dict(name='f', arguments=arguments))]))
    calling = said('', tool_calls=[dict(function=dict(name='f', arguments={}))])
    with pytest.raises(ValueError, match='cannot be written as JSON'):
        talk(asked, calling, dict(role='tool', content=[number]), said('5'))
    with pytest.raises(ValueError, match='cannot be written as JSON'): read_tools([dict(name='f', n=number)], '`tools`')

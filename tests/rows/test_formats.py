"""Rows of every format: what they may hold, and what is refused by name"""
import json

import pytest

from sage_finetune.rows.formats import (
    checked_columns, ColumnCheck, content_parts, create_sample_data, detect_data_format, format_conversation_sample,
    format_qa_sample, idle_columns, judgement, names_in_file, question, read_text, renamed, sample_rows,
    to_conversation, to_messages, to_preference
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

# What belongs to a question, in every format

shapes = dict(qa=dict(question='Q', answer='A'), alpaca=dict(instruction='Q', output='A'),
              prompt_completion=dict(prompt='Q', completion='A'))

@pytest.mark.parametrize('shape', shapes)
@pytest.mark.parametrize('key', ['context', 'input', 'history', 'system', 'system_prompt', 'system_message'])
def test_what_stands_beside_a_question_is_in_the_conversation_once(shape, key):
    value = [['DOCUMENT', 'Hello!']] if key=='history' else 'DOCUMENT'
    found = to_conversation(shapes[shape] | {key: value})
    assert json.dumps(found.messages).count('DOCUMENT')==1 and found.unused==()
    assert found.messages[0]['role']==('system' if 'system' in key else 'user')
    assert found.messages[-1]['content']=='A'

@pytest.mark.parametrize('shape,text', [('qa', 'C\n\nQ\n\nI'), ('alpaca', 'Q\n\nC\n\nI'),
                                        ('prompt_completion', 'C\n\nQ\n\nI')])
def test_context_and_input_have_their_order(shape, text):
    assert to_messages(shapes[shape] | dict(context='C', input='I'))[0]['content']==text
    assert to_messages(shapes[shape] | dict(context=['C', 'D']))[0]['content'].count('C\n\nD')==1
    with pytest.raises(ValueError, match='`context` must be a string, got dict'):
        to_messages(shapes[shape] | dict(context=dict(a=1)))

@pytest.mark.parametrize('row,unused', [
    (dict(messages=[asked, said('5')], context='C'), ('context',)), (dict(messages=[asked, said('5')], input='I'),
                                                                     ('input',)),
    (dict(messages=[asked, said('5')], history=[['a', 'b']]), ('history',)),
    (dict(messages=[dict(role='system', content='a'), asked, said('5')], system='b'), ('system',)),
    (dict(messages=[dict(role='system', content='a'), asked, said('5')], system='a'), ()),
    (dict(messages=[asked, said('5')], system='a', system_prompt='b'), ('system_prompt',)),
    (dict(messages=[asked, said('5')], system='a', system_prompt='a'), ()),
    (dict(messages=[asked, said('5')], prompt='2+3?', prompt_id='7'), ()),
    (dict(messages=[asked, said('5')], prompt='another'), ('prompt',)),
    (dict(prompt=[asked], completion='5', context='C'), ('context',)),
    (dict(instruction='a', output='b', category='x', text='a b', score=0), ('category', 'text', 'score')),
    (dict(question='a', answer='b', label=2, rating=5), ('label', 'rating')),
    (dict(question='a', answer='b', labels=[1, 0]), ('labels',))])
def test_what_has_no_place_is_told(row, unused): assert to_conversation(row).unused==unused

def test_a_system_prompt_that_is_empty_is_replaced():
    given = to_messages(dict(messages=[dict(role='system', content=''), asked, said('5')], system='Be brief.'))
    assert [m['content'] for m in given]==['Be brief.', '2+3?', '5']

def test_a_text_row_is_told_too():
    assert read_text(dict(text='a', id=1, system='s', label=3))==('a', ('system', 'label'))
    with pytest.raises(ValueError, match='asks not to be learned'): read_text(dict(text='a', weight=0))
    with pytest.raises(ValueError, match='no place for an image'): read_text(dict(text='a', image='b'))

def test_a_prompt_and_a_completion_may_be_turns_as_json_text():
    row = dict(prompt=json.dumps([asked, said('5'), asked]), completion=json.dumps(said('6')))
    found = to_conversation(row)
    assert [m.get('train', True) for m in found.messages]==[True, False, True, True]
    assert len(found.notes)==2 and 'JSON text' in found.notes[0]
    assert to_messages(dict(prompt='2+3?', completion='{"sum": 5}'))[1]['content']=='{"sum": 5}'
    assert to_messages(dict(prompt=asked, completion=said('5')))==[asked, said('5')]

def test_images_may_be_json_text():
    assert to_messages(dict(column, image='["red.png"]'))[0]['images']==['red.png']
    with pytest.raises(ValueError, match='`images` is not JSON'): to_messages(dict(column, image='[red.png'))

# Judgements

good = [True, 1, 1.0, 'true', 'True', '1', 'good', 'Chosen', 'desirable', 'yes']
bad = [False, 0, 0.0, 'false', 'FALSE', '0', 'bad', 'rejected', 'undesirable', 'no']
judged_rows = [dict(prompt='2+3?', completion='6'), dict(messages=[asked, said('6')]),
               dict(conversations=[{'from': 'human', 'value': '2+3?'}, {'from': 'gpt', 'value': '6'}])]

@pytest.mark.parametrize('row', judged_rows)
@pytest.mark.parametrize('key', ['label', 'labels', 'Label', 'kto_tag', 'KTO_tag', 'desirable'])
def test_a_judged_answer_is_never_learned(row, key):
    for value,liked in [*((v, True) for v in good), *((v, False) for v in bad)]:
        assert judgement(value) is liked and detect_data_format(row | {key: value})=='unpaired'
        with pytest.raises(ValueError, match=rf'its `{key}` says.*preference tuning \(KTO\)'):
            to_conversation(row | {key: value})
        made = to_preference(row | {key: value})
        assert (made.prompt, made.answers, made.unused)==([asked], [([said('6')], liked)], ())

@pytest.mark.parametrize('row', [dict(instruction='2+3?', output='6'), dict(question='2+3?', answer='6')])
def test_what_is_plainly_a_judgement_is_one_beside_every_question(row):
    for more in (dict(kto_tag=0), dict(kto_tag='1'), dict(label=False), dict(label='bad'), dict(desirable=1)):
        with pytest.raises(ValueError, match='KTO'): to_conversation(row | more)
        assert to_preference(row | more).answers[0][0]==[said('6')]
    for number in (0, 1, 2, '1', 'sports'): assert to_conversation(row | dict(label=number)).unused==('label',)

@pytest.mark.parametrize('value', [2, -1, .5, 'sports', [1]])
def test_a_class_is_told_and_learned(value):
    assert judgement(value) is None
    for row in judged_rows: assert to_conversation(row | dict(label=value)).unused==('label',)

def test_a_tag_that_cannot_be_read_is_refused_and_a_named_format_learns():
    row = dict(prompt='2+3?', completion='6', kto_tag='perhaps')
    with pytest.raises(ValueError, match='KTO'): to_conversation(row)
    with pytest.raises(ValueError, match='`kto_tag` must be true or false, 0 or 1, good or bad'): to_preference(row)
    named = to_conversation(dict(prompt='2+3?', completion='6', label=0), 'prompt_completion')
    assert (named.messages[-1], named.unused)==(said('6'), ('label',))

def test_a_pair_stays_a_pair_beside_a_label():
    pair = to_preference(both(label=1, score_chosen=.9, system_prompt='s'))
    assert ([liked for _,liked in pair.answers], pair.unused)==([True, False], ('label', 'score_chosen'))
    assert pair.prompt[0]==dict(role='system', content='s') and pair.talks[0].unused==pair.unused
    assert detect_data_format(dict(messages=[asked], chosen='5', rejected='6', label=True))=='preference'

def test_a_pair_may_be_json_text():
    row = dict(chosen=json.dumps([asked, said('5')]), rejected=json.dumps([asked, said('6')]), prompt='2+3?')
    pair = to_preference(row)
    assert (pair.prompt, pair.answers[1], pair.unused)==([asked], ([said('6')], False), ()) and len(pair.notes)==2
    assert to_preference(row | dict(prompt='old')).unused==('prompt',)
    history = to_preference(dict(question='2+3?', history=[['a', 'b']], chosen='5', rejected='6'))
    assert [t['content'] for t in history.prompt]==['a', 'b', '2+3?']
    with pytest.raises(ValueError, match='asks not to be learned'): to_preference(both(weight=0))

# Columns that name nothing

def followed(rows, columns, unused=(), format='qa'):
    check = ColumnCheck(checked_columns(columns))
    for row in rows:
        check.see(row)
        if isinstance(row, dict): check.see_used(row, format, unused) # no other row is used
    return idle_columns(check)

@pytest.mark.parametrize('rows,columns,why', [
    ([dict(question='a', answer='b')]*3, dict(sysprompt='system'),
     "no row has 'sysprompt'; there are 'question', 'answer'"),
    ([dict(q='a', answer='b')], {'q': 'question', 'contxt': 'context'}, "maps 'contxt' to 'context'"),
    ([dict(question='a'), dict(answer='b')], {'Question': 'question', 'ctx': 'context'}, "maps 'ctx' to 'context'"),
    ([{str(i): 1 for i in range(50)}], dict(a='text'), "'11', …")])
def test_a_column_that_no_row_has_is_refused(rows, columns, why):
    with pytest.raises(ValueError) as e: followed(rows, columns)
    assert why in str(e.value)

def test_a_column_counts_where_one_row_has_it_or_all_have_the_known_name():
    assert followed([dict(a=1), dict(a=1, frage='b')], dict(frage='question'))==[]
    assert followed([dict(question='b')], dict(frage='question'))==[
        "no row has 'frage' of `columns`: 'question' is there under its own name"]
    assert followed([[1], 'a'], dict(frage='question'))==[]

def test_a_name_that_the_format_does_not_use_is_refused():
    rows = [dict(doc='a', messages=[])]*2
    with pytest.raises(ValueError, match="maps 'doc' to 'context', which a row of the format messages does not use"):
        followed(rows, dict(doc='context'), ('doc',), 'messages')
    assert followed([dict(doc='', messages=[])], dict(doc='context'), (), 'messages')==[]
    assert followed(rows, dict(doc='context'))==[]

def test_names_are_those_of_the_file():
    row,columns = dict(ask='a', say='b', text='c', ctx='d'),checked_columns(dict(ask='question', say='text',
                                                                                 ctx='context'))
    assert names_in_file(['context', 'extra'], row, columns)==('ctx', 'extra', 'text')
    assert names_in_file(['context'], row, {})==('context',)
    assert renamed(dict(question='a', answer='b'), dict(frage='question'))==dict(question='a', answer='b')
    assert renamed(dict(a='1', b='2'), dict(a='question', b='answer'))==dict(question='1', answer='2')
    swapped = renamed(dict(question='1', answer='2'), dict(question='answer', answer='question'))
    assert swapped==dict(answer='1', question='2')

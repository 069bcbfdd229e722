"What templates demand of calls and of their ids, and what they leave out: small templates, one for each habit"
import json
import re

import pytest
from transformers import AutoTokenizer

from sage_finetune.config import resolve_model
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.rows.learned import render_learned
from sage_finetune.rows.template import chat_form, ChatForm, render, try_template

def tokenizer(template):
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    marks = sorted(set(re.findall(r'<\|[^<>\s\'"{}|]{1,40}\|?>|\[/?[A-Z_]{3,20}\]', template)))
    tok.add_special_tokens(dict(additional_special_tokens=marks))
    tok.chat_template = template
    return tok

def call(name, id=None, **arguments):
    return dict(type='function', function=dict(name=name,
                                               arguments=arguments)) | (dict(id=id) if id is not None else {})

def result(text, **more): return dict(role='tool', content=text, **more)

def talk(calls, *results):
    return [dict(role='user', content='q'), dict(role='assistant', content='', tool_calls=list(calls)), *results,
            dict(role='assistant', content='So it is.')]

tools = [dict(type='function', function=dict(name=n, description='', parameters=dict(type='object', properties={})))
         for n in ('weather', 'clock')]

turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
opened = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
offered = "{% if tools %}{{ tools|tojson }}{% endif %}"

def ids_that(demand, name='c.id'):
    "A template that writes ids, and refuses those for which `demand` holds"
    check = "{% if "+demand+" %}{{ raise_exception('not such an id') }}{% endif %}"
    return (offered+"{% for m in messages %}{% if m.role=='assistant' and m.tool_calls %}<|im_start|>assistant\n"
            "{% for c in m.tool_calls %}{% set id = c.id %}"+check+"{{ {'name': c.function.name, 'arguments': "
            "c.function.arguments, 'id': id}|tojson }};{% endfor %}<|im_end|>\n"
            "{% elif m.role=='tool' %}{% set id = m.tool_call_id %}"+check+"<|im_start|>tool\n{{ id }}={{ m.content }}"
            "<|im_end|>\n{% else %}"+turn+"{% endif %}{% endfor %}"+opened)

nine = ids_that("id|length != 9 or not id.isalnum()")
openai = ids_that("not id.startswith('call_')")
easy = ids_that('false')
unwritten = offered+("{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{% for c in m.tool_calls %}"
                     "<call>{{ c.function|tojson }}</call>{% endfor %}<|im_end|>\n{% else %}"+turn+"{% endif %}"
                     "{% endfor %}"+opened)

def pairs(text):
    "([(name, id) of each call], [(id, what) of each result]) of a text"
    calls = [json.loads(c) for c in re.findall(r'(\{"name": .*?\});', text)]
    return [(c['name'], c['id']) for c in calls], re.findall(r'tool\n(.+)=(\w+)<', text)

@pytest.mark.parametrize('template,form', [(nine, r'[A-Za-z0-9]{9}'), (openai, r'call_\w+'), (easy, r'.+')])
@pytest.mark.parametrize('ids', [('call_a1B2c3', 'call_9'), (1, 2), ('abcdefgh1', 'abcdefgh2'), (0, 10**30),
                                 ('functions.weather:0', 'functions.clock:1'), ('ä b', '{}'), (None, None), ('', '')])
def test_ids_of_any_form_fit_and_join_calls_to_their_results(template, form, ids):
    asked = talk([call('weather', ids[0], x=1), call('clock', ids[1], x=2)], result('one', tool_call_id=ids[0]),
                 result('two', tool_call_id=ids[1]))
    calls,results = pairs(render_learned(asked, tokenizer(template), tools).text)
    assert [n for n,_ in calls]==['weather', 'clock'] and all(re.fullmatch(form, id) for _,id in calls)
    assert results==[(calls[0][1], 'one'), (calls[1][1], 'two')] and calls[0][1]!=calls[1][1]

@pytest.mark.parametrize('results,wanted', [
    ([result('two', tool_call_id=2), result('one', tool_call_id=1)], [1, 0]), # another order
    ([result('two', name='clock'), result('one', name='weather')], [1, 0]), # names, no ids
    ([result('one'), result('two')], [0, 1]), # neither
    ([result('one', tool_call_id=1), result('two')], [0, 1]), # one of them
    ([result('one', tool_call_id=1), result('uno', tool_call_id=1), result('two', tool_call_id=2)], [0, 0, 1]),
    ([result('one', tool_call_id='1'), result('two', tool_call_id='2')], [0, 1])]) # a string for a number
@pytest.mark.parametrize('template', [nine, openai, easy])
def test_each_result_goes_to_its_call(template, results, wanted):
    asked = talk([call('weather', 1, x=1), call('clock', 2, x=2)], *results)
    calls,found = pairs(render_learned(asked, tokenizer(template), tools).text)
    assert [id for id,_ in found]==[calls[k][1] for k in wanted]

def test_ids_that_a_template_never_writes_do_not_tell_rows_apart():
    tok = tokenizer(unwritten)
    form = chat_form(tok)
    assert form.ids=='unwritten'
    for i in range(5):
        asked = talk([call('weather', f'call_{i}', city=f'city {i}', days=i)], result('7', tool_call_id=f'call_{i}'))
        render_learned(asked, tok, tools)
    assert len(form.skeletons)==1 # texts, numbers and ids differ; one skeleton serves all

def test_ids_are_the_same_in_training_and_in_a_chat():
    tok = tokenizer(nine)
    asked = talk([call('weather', 'call_a', x=1)], result('one', tool_call_id='call_a'))
    whole = render_learned(asked, tok, tools).text
    assert whole.startswith(render(asked[:-1], tok, add_generation_prompt=True, tools=tools))

def test_arguments_go_in_as_json_and_not_as_python_writes_them():
    printed = unwritten.replace('c.function|tojson', 'c.function.name }} {{ c.function.arguments')
    r = render_learned(talk([call('weather', city="d'Or", now=True)], result('7')), tokenizer(printed), tools)
    assert '<call>weather {"city": "d\'Or", "now": true}</call><|im_end|>' in [r.text[a:b] for a,b in r.spans]

# --- templates that take one call in a turn
only_first = unwritten.replace('in m.tool_calls %}', 'in m.tool_calls[:1] %}')
only_last = unwritten.replace('in m.tool_calls %}', 'in m.tool_calls[-1:] %}')
insists = unwritten.replace('{% for c in', "{% if m.tool_calls|length>1 %}{{ raise_exception('one call at once') }}"
                                           "{% endif %}{% for c in")

@pytest.mark.parametrize('template', [only_first, only_last, insists])
@pytest.mark.parametrize('ids', [(1, 2), (None, None)])
def test_where_one_call_is_taken_each_gets_a_turn_with_its_results(template, ids):
    tok = tokenizer(template)
    asked = talk([call('weather', ids[0], x=1), call('clock', ids[1], x=2)],
                 *([result('two', tool_call_id=2), result('one', tool_call_id=1)] if ids[0] else
                   [result('one'), result('two')]))
    r = render_learned(asked, tok, tools)
    assert [r.text[a:b] for a,b in r.spans]==[
        '<call>{"name": "weather", "arguments": {"x": 1}}</call><|im_end|>',
        '<call>{"name": "clock", "arguments": {"x": 2}}</call><|im_end|>', 'So it is.<|im_end|>']
    assert re.findall(r'one|two', r.text)==['one', 'two'] and r.notes==('calls of one turn written one after the '
                                                                        'other',)
    assert r.text.startswith(render(asked[:-1], tok, add_generation_prompt=True, tools=tools))

def test_a_turn_that_is_not_learned_stays_so_in_each_of_its_parts():
    asked = talk([call('weather', x=1), call('clock', x=2)], result('one'), result('two'))
    asked[1] |= dict(train=False)
    r = render_learned(asked, tokenizer(only_first), tools)
    assert [r.text[a:b] for a,b in r.spans]==['So it is.<|im_end|>']

# --- what a template leaves out
system = dict(role='system', content='Be brief.')
leaves_out = dict(
    system=("{% for m in messages if m.role!='system' %}"+turn+"{% endfor %}"+opened, [system], {}, None),
    thoughts=("{% for m in messages %}"+turn+"{% endfor %}"+opened, [], dict(reasoning_content='hm'),
              'thoughts left out'),
    later_system=("{% for m in messages %}{% if loop.first or m.role!='system' %}"+turn+"{% endif %}{% endfor %}"+
                  opened,
                  [system, system | dict(content='Be kind.')], {}, 'system prompt left out'))

@pytest.mark.parametrize('name', leaves_out)
def test_what_is_left_out_is_noted_or_put_elsewhere(name):
    template,before,more,note = leaves_out[name]
    asked = [*before, dict(role='user', content='q'), dict(role='assistant', content='So it is.', **more)]
    r = render_learned(asked, tokenizer(template))
    assert (note in r.notes) if note else 'Be brief.' in r.text

def test_functions_that_are_not_offered_in_the_text_are_noted():
    some = unwritten.replace('tools|tojson', 'tools[:1]|tojson')
    asked = talk([call('weather', x=1)], result('7'))
    assert render_learned(asked, tokenizer(some), tools).notes==('functions on offer left out',)
    assert render_learned(asked, tokenizer(some), tools[:1]).notes==()
    never = unwritten.replace(offered, '')
    r = render_learned(asked, tokenizer(never), tools)
    assert r.notes==('calls of functions written as text',) and '"clock"' in r.text

def test_a_result_that_is_left_out_refuses_the_row():
    first = unwritten.replace('{% else %}', "{% elif m.role!='tool' or messages[loop.index0-1].role!='tool' %}")
    asked = talk([call('weather', 1, x=1)], result('one', tool_call_id=1), result('two', tool_call_id=1))
    with pytest.raises(ValueError, match=r'leaves out turn 4 \(role tool\)'):
        render_learned(asked, tokenizer(first), tools)

def test_notes_reach_the_report():
    report = DataReport()
    rows = [dict(messages=talk([call('weather', x=i), call('clock', x=2)], result('one'), result('two')),
                 tools=tools) for i in range(3)]
    prepare_dataset(rows, tokenizer(only_first), report=report, cache=False)
    assert report.used==3 and report.notes=={'calls of one turn written one after the other': 3}

# --- the form of a template
def test_a_template_that_takes_parts():
    parts = tokenizer("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{{ p['text'] }}"
                      "{% endfor %}<|im_end|>\n{% endfor %}"+opened)
    assert chat_form(parts).parts

def test_another_special_token_is_another_form():
    tok = tokenizer("{% for m in messages %}"+turn+"{% endfor %}"+opened+"{{ sep_token }}")
    first = chat_form(tok)
    assert chat_form(tok) is first
    tok.add_special_tokens(dict(sep_token='<|sep|>'))
    assert chat_form(tok) is not first

def test_what_a_template_refuses_is_nothing():
    strict = tokenizer("{{ raise_exception('roles must alternate') }}")
    assert try_template([dict(role='user', content='a')], strict, ChatForm())==''

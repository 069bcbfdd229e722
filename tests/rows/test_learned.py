"""The templates of real models: TRL ships some seventy of them, and each is asked what is learned from ten
conversations
"""
import functools
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sage_finetune.config import resolve_model
from sage_finetune.rows.tokens import encode

_trl = find_spec('trl')
templates = sorted(Path(_trl.origin).parent.glob('chat_templates/*.jinja')) if _trl else []

def user(text): return dict(role='user', content=text)
def said(text, **more): return dict(role='assistant', content=text, **more)

tool = dict(type='function', function=dict(name='weather', description='Weather of a city', parameters=dict(
    type='object', properties=dict(city=dict(type='string', description='A city')), required=['city'])))
call = dict(type='function', function=dict(name='weather', arguments=dict(city='Oslo')))
result = dict(role='tool', content='resultword 7', name='weather')

# name → messages, tools; each text has words of its own, so that it can be told where they end up
talks = dict(
    plain=([user('askone'), said('replyone here')], None),
    turns=([user('askone'), said('replyone here'), user('asktwo'), said('replytwo there')], None),
    system=([dict(role='system', content='sysword rules'), user('askone'),
             said('replyone here'), user('asktwo'), said('replytwo there')], None),
    call=([user('askone'), said('', tool_calls=[call]), result, said('replyone here')], [tool]),
    call_and_text=([user('askone'), said('lookword now', tool_calls=[call]), result, said('replyone here'),
                    user('asktwo'), said('replytwo there')], [tool]),
    earlier_call=([user('askone'), said('', tool_calls=[call]), result, said('replyone here'),
                   user('asktwo'), said('replytwo there')], [tool]), empty_result=([user('askone'), said(
                       '', tool_calls=[call]), result | dict(content=''), said('replyone here')], [tool]),
    thought=([user('askone'), said('<think>\nthoughtone\n</think>\n\nreplyone here')], None),
    thoughts=([user('askone'), said('<think>\nthoughtone\n</think>\n\nreplyone here'), user('asktwo'),
               said('<think>\nthoughttwo\n</think>\n\nreplytwo there')], None),
    reasoning=([user('askone'), said('replyone here', reasoning_content='thoughtone'), user('asktwo'),
                said('replytwo there', reasoning_content='thoughttwo')], None))

@functools.cache
def tokenizer_for(source):
    "The embedded tokenizer with the control tokens that a template writes"
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    found = set(re.findall(r'<\|[^<>\s\'"{}|]{1,40}\|?>|<[^<>\s\'"{}|/]{1,40}\|>|<｜[^｜]*｜>|</?s>'
                           r'|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,20}\]', source))
    tok.add_special_tokens(dict(additional_special_tokens=sorted(found)))
    tok.chat_template = source
    return tok

def judge(source, messages, tools):
    """What is wrong with the mask, by the words in it and not by the code under test: 'right', 'refused: …' or
    'wrong: …'
    """
    tok = tokenizer_for(source)
    try: out = encode(messages, tok, tools)
    except ValueError as e: return f'refused: {e}'
    text = tok.decode(out['input_ids'])
    learned = tok.decode([t for t in out['labels'] if t!=-100])
    blank = tok.decode([t for t,l in zip(out['input_ids'], out['labels']) if l==-100])
    answers = [w for m in messages if m['role']=='assistant'
               for w in re.findall(r'\w*(?:reply|look)\w+ \w+', m['content'])]
    expected = [w for w in answers if w in text] # some templates leave out the text beside a call
    if [w for w in answers if not w.startswith('look')]!=[w for w in expected if not w.startswith('look')]:
        return 'wrong: an answer is not in the text'
    for w in expected:
        if learned.count(w)!=1: return f'wrong: {w!r} is learned {learned.count(w)} times'
    for w in ('askone', 'asktwo', 'sysword', 'resultword'):
        if w in learned: return f'wrong: {w!r} is learned'
    for w in ('thoughtone', 'thoughttwo'):
        if w in text and w not in learned: return f'wrong: {w!r} stands in the text and is not learned'
    if (re.search(r'assistant\s|<\|im_start\|>assistant|<start_of_turn>|<｜Assistant｜>|model\n',
                  learned) and '<|start|>assistant' not in learned):
        return 'wrong: the header of a turn is learned'
    if any(m.get('tool_calls') for m in messages) and ('Oslo' not in learned or 'Oslo' in blank):
        return 'wrong: the call is not learned whole'
    if re.search(r'<\|start\|>functions|response:|</tool_response>', learned):
        return 'wrong: the result of a call is learned'
    return 'right' if re.search(r'(?:<[^<>]+>|\])\s*$', learned) else f'wrong: no end of turn, but {learned[-20:]!r}'

@pytest.fixture(scope='module')
def table():
    if not templates: pytest.skip('TRL is not installed (`pip install trl`), so there are no real templates to try')
    return {(p.stem, name): judge(p.read_text(encoding='utf-8'), *talk) for p in templates
            for name,talk in talks.items()}

def test_no_template_gets_a_wrong_mask(table):
    rows = [f'{t:32}' + ' '.join(f"{table[t, n].partition(':')[0]:14}" for n in talks)
            for t in dict.fromkeys(t for t,_ in table)]
    print('\n'.join([' '*32+' '.join(f'{n:14}' for n in talks), *rows]))
    wrong = {k: v for k,v in table.items() if v.startswith('wrong')}
    assert not wrong, wrong

def test_refused_only_where_the_template_itself_refuses(table):
    refused = {k: v for k,v in table.items() if v.startswith('refused')}
    assert all('the chat template refuses this conversation' in v for v in refused.values()), refused
    assert (len(templates)>=60 and Counter(v.partition(':')[0] for v in table.values())['right']>=0.99*len(
        table)), refused

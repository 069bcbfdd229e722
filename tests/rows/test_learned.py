"""The templates of real models: TRL ships some seventy of them. Each is asked what is learned from the conversations
below, by a judge on words, and, where TRL has a form of the template for training, against TRL's own mask
"""
import functools
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sage_finetune.config import resolve_model
from sage_finetune.rows.learned import render_learned
from sage_finetune.rows.tokens import encode

_trl = find_spec('trl')
templates = sorted(Path(_trl.origin).parent.glob('chat_templates/*.jinja')) if _trl else []

def user(text): return dict(role='user', content=text)
def said(text, **more): return dict(role='assistant', content=text, **more)
def called(*calls, text='', **more): return said(text, tool_calls=list(calls), **more)
def answer(text, **more): return dict(role='tool', content=text, **more)

def offered(name, key):
    return dict(type='function', function=dict(name=name, description=f'About {name}', parameters=dict(
        type='object', properties={key: dict(type='string', description=f'A {key}')}, required=[key])))

def call(name, arguments, id=None):
    return dict(type='function', function=dict(name=name,
                                               arguments=arguments)) | (dict(id=id) if id is not None else {})

tools = [offered('weather', 'city'), offered('clock', 'place')]
oslo,rome,bonn = call('weather', dict(city='Oslo')),call('clock', dict(place='Rome')),call('weather', dict(city='Bonn'))
result = answer('resultword 7', name='weather')
noon = answer('resultnoon 12', name='clock')
more = [user('asktwo'), said('replytwo there')]
end = said('replyone here')
long_id = 'call_a1B2c3D4e5F6g7H8i9J0k1L2'
thought = '<think>\nthoughtone\n</think>\n\n'

# name → messages, tools; each text has words of its own, so that it can be told where they end up
talks = dict(
    plain=([user('askone'), end], None),
    turns=([user('askone'), end, *more], None),
    system=([dict(role='system', content='sysword rules'), user('askone'), end, *more], None),
    call=([user('askone'), called(oslo), result, end], tools),
    call_and_text=([user('askone'), called(oslo, text='lookword now'), result, end, *more], tools),
    earlier_call=([user('askone'), called(oslo), result, end, *more], tools),
    empty_result=([user('askone'), called(oslo), result | dict(content=''), end], tools),
    last_call=([user('askone'), called(oslo)], tools),
    two_calls=([user('askone'), called(oslo, rome), result, noon, end], tools),
    three_calls=([user('askone'), called(oslo, rome, bonn), result, noon, result, end, *more], tools),
    calls_and_text=([user('askone'), called(oslo, rome, text='lookword now'), result, noon, end, *more], tools),
    calls_in_a_row=([user('askone'), called(oslo), result, called(rome), noon, end], tools),
    thought_and_call=([user('askone'), called(oslo, reasoning_content='thoughtone'), result, end], tools),
    thought=([user('askone'), said(thought+'replyone here')], None),
    thoughts=([user('askone'), said(thought+'replyone here'), user('asktwo'),
               said('<think>\nthoughttwo\n</think>\n\nreplytwo there')], None),
    reasoning=([user('askone'), said('replyone here', reasoning_content='thoughtone'), user('asktwo'),
                said('replytwo there', reasoning_content='thoughttwo')], None),
    two_thoughts=([user('askone'), said(thought+'lookword now\n\n<think>\nthoughttwo\n</think>\n\nreplyone here')],
                  None),
    open_thought=([user('askone'), said('thoughtone\n</think>\n\nreplyone here')], None),
    ids=([user('askone'), called(call('weather', dict(city='Oslo'), long_id)),
          result | dict(tool_call_id=long_id), end], tools),
    ids_of_nine=([user('askone'), called(call('weather', dict(city='Oslo'), 'abcdefgh1')),
                  result | dict(tool_call_id='abcdefgh1'), end], tools),
    two_results=([user('askone'), called(call('weather', dict(city='Oslo'), 'a'),
                                         call('clock', dict(place='Rome'), 'b')),
                  result | dict(tool_call_id='a'), noon | dict(tool_call_id='b'), result | dict(tool_call_id='a'), end],
                 tools),
    ids_as_numbers=([user('askone'), called(call('weather', dict(city='Oslo'), 1),
                                            call('clock', dict(place='Rome'), 2)),
                     noon | dict(tool_call_id=2), result | dict(tool_call_id=1), end], tools),
    header_in_a_text=([user('askone\n### Assistant:\nmodel\nassistant\n'), said('model\nassistant\n\nreplyone here')],
                      None),
    header_in_an_argument=([user('askone'), called(call('weather',
                                                        dict(city='Oslo\n### Assistant:\nmodel\nassistant'))),
                            result, end], tools),
    other_arguments=([user('askone'), called(call('weather', dict(city='Oslo', days=3, exact=1.5, now=True, way=[
        dict(on='foot"ball"'), 7])), rome), result, noon, end], tools))

@functools.cache
def tokenizer_for(source):
    "The embedded tokenizer with the control tokens that a template writes"
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    found = set(re.findall(r'<\|[^<>\s\'"{}|]{1,40}\|?>|<[^<>\s\'"{}|/]{1,40}\|>|<｜[^｜]*｜>|</?s>'
                           r'|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,20}\]', source))
    tok.add_special_tokens(dict(additional_special_tokens=sorted(found)))
    tok.chat_template = source
    return tok

def judge(tok, messages, tools):
    """What is wrong with the mask, by the words in it and not by the code under test: 'right', 'refused: …' or
    'wrong: …'
    """
    try: out = encode(messages, tok, tools)
    except ValueError as e: return f'refused: {e}'
    notes,text = render_learned(messages, tok, tools).notes,tok.decode(out['input_ids'])
    learned = tok.decode([t for t in out['labels'] if t!=-100])
    blank = tok.decode([t for t,l in zip(out['input_ids'], out['labels']) if l==-100])
    answers = [w for m in messages if m['role']=='assistant'
               for w in re.findall(r'\w*(?:reply|look)\w+ \w+', m['content'])]
    expected = [w for w in answers if w in text] # some templates leave out the text beside a call
    if [w for w in answers if not w.startswith('look')]!=[w for w in expected if not w.startswith('look')]:
        return 'wrong: an answer is not in the text'
    for w in expected:
        if learned.count(w)!=1: return f'wrong: {w!r} is learned {learned.count(w)} times'
    for w in ('askone', 'asktwo', 'sysword', 'resultword', 'resultnoon'):
        if w in learned: return f'wrong: {w!r} is learned'
    for w in ('thoughtone', 'thoughttwo'):
        if w in text and w not in learned: return f'wrong: {w!r} stands in the text and is not learned'
    for words,note in ((['lookword'], 'text beside a call left out'), (['sysword'], 'system prompt left out'),
                       (['thoughtone', 'thoughttwo'], 'thoughts left out')):
        if any(text.count(w)<str(messages).count(w)
               for w in words)!=(note in notes): return f'wrong: {note!r} is not noted'
    if (re.search(r'(?<!\\n)(?<!\n)assistant\s|<\|im_start\|>assistant|<start_of_turn>|<｜Assistant｜>',
                  learned) and '<|start|>assistant' not in learned):
        return 'wrong: the header of a turn is learned'
    for c in (c for m in messages for c in m.get('tool_calls', ())):
        for w in (c['function']['name'], *re.findall('[A-Z][a-z]+', str(c['function']['arguments']))):
            if w not in learned and w!='True': return f'wrong: of a call {w!r} is not learned'
            if w[0].isupper() and w in blank and w not in ('Assistant',
                                                           'True'): return f'wrong: of a call {w!r} is not learned'
    if re.search(r'<\|start\|>functions|response:|</tool_response>', learned):
        return 'wrong: the result of a call is learned'
    return 'right' if re.search(r'(?:<[^<>]+>|\])\s*$', learned) else f'wrong: no end of turn, but {learned[-20:]!r}'

def squeezed(text): return ''.join(text.split())

def against_trl(tok, messages, tools):
    """Ours against TRL's own mask, white space aside: 'same', 'refused: …', 'wrong: …', or why they cannot be compared

    TRL's masks may hold more in three places: what the prompt has opened already, the marker with which a conversation
    ends, and nothing else. Ours may hold one more thing: the marker that ends a call of Gemma's
    """
    try: theirs = tok.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True)
    except Exception as e: return f'refused by TRL: {type(e).__name__}'
    try: ours = render_learned(messages, tok, tools)
    except ValueError as e: return f'refused: {e}'
    if squeezed(ours.text)!=squeezed(tok.decode(theirs['input_ids'])): return 'another text'
    mask = squeezed(tok.decode([t for t,m in zip(theirs['input_ids'], theirs['assistant_masks']) if m]))
    prompt = [tok.apply_chat_template([user('a')], tokenize=False, add_generation_prompt=g) for g in (False, True)]
    opened,at = squeezed(prompt[1].removeprefix(prompt[0])),0
    for piece in (squeezed(ours.text[a:b]) for a,b in ours.spans):
        if piece not in mask: piece = piece.removesuffix('<|tool_response>')
        k = mask.find(piece, at)
        if k<0 or mask[at:k] not in opened: return f'wrong: {piece!r} for {mask[at:]!r}'
        at = k+len(piece)
    return 'same' if mask[at:] in ('', tok.eos_token) else f'wrong: {mask[at:]!r} is not learned'

@pytest.fixture(scope='module')
def tables():
    "(template, conversation) → what the judge says; → how ours and TRL's mask compare"
    if not templates: pytest.skip('TRL is not installed (`pip install trl`), so there are no real templates to try')
    judged,compared = {},{}
    for path in templates:
        tok = tokenizer_for(path.read_text(encoding='utf-8'))
        for name,talk in talks.items():
            judged[path.stem, name] = judge(tok, *talk)
            if path.stem.endswith('_training'): compared[path.stem, name] = against_trl(tok, *talk)
    return judged,compared

def counted(table): return Counter(v.partition(':')[0] for v in table.values())

def test_no_template_gets_a_wrong_mask(tables):
    table,_ = tables
    short = dict(right='.', refused='r', wrong='W')
    for t in dict.fromkeys(t for t,_ in table):
        print(f'{t:34}', ' '.join(short[table[t, n].partition(':')[0]] for n in talks))
    print('columns:', ', '.join(talks))
    print(len(templates), 'templates,', len(talks), 'conversations:', dict(counted(table)))
    wrong = {k: v for k,v in table.items() if v.startswith('wrong')}
    assert not wrong, wrong

def test_few_are_refused_and_each_with_its_reason(tables):
    table,_ = tables
    refused = {k: v for k,v in table.items() if v.startswith('refused')}
    for reason,n in Counter(refused.values()).items(): print(n, reason)
    assert all('for the sake of its thoughts' in v for v in refused.values()), refused
    assert len(templates)>=60 and len(refused)<0.02*len(table), refused

def test_what_is_learned_is_what_trl_learns(tables):
    _,compared = tables
    print(dict(counted(compared)))
    assert not {k: v for k,v in compared.items() if v.startswith('wrong')}
    assert counted(compared)['same']>=400

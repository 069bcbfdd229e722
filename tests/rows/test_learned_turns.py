"The whole turn: each text, thought and call of an answer, and its end, with small templates that each do one odd thing"
import re
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sage_finetune.config import resolve_model
from sage_finetune.model.contract import stop_ids
from sage_finetune.rows.learned import _Body, _faults, render_learned
from sage_finetune.rows.template import marker, render
from sage_finetune.rows.tokens import encode, end_of_turn_id, end_of_turn_ids

def tokenizer(template, *more, text=()):
    "The embedded tokenizer with a template; what looks like a control token in it is one, `text` excepted"
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    marks = sorted(set(re.findall(r'<\|[^<>\s\'"{}|]{1,40}\|?>|\[/?[A-Z_]{3,20}\]', template)) - {*text})
    tok.add_special_tokens(dict(additional_special_tokens=[*marks, *more]))
    tok.chat_template = template
    return tok

def user(text): return dict(role='user', content=text)
def said(text, **more): return dict(role='assistant', content=text, **more)
def call(name, **arguments): return dict(type='function', function=dict(name=name, arguments=arguments))
def result(text, name='weather'): return dict(role='tool', content=text, name=name)

tools = [dict(type='function', function=dict(name=n, description='', parameters=dict(type='object', properties={})))
         for n in ('weather', 'clock')]

def learned(messages, template, tools=None, tok=None):
    r = render_learned(messages, tok or tokenizer(template), tools)
    return [r.text[a:b] for a,b in r.spans]

offered = "{% if tools %}{{ tools|tojson }}{% endif %}"
turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
opened = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
written = '{{ c.function.name }} {{ c.function.arguments|tojson }}'

# --- a turn that is written as several messages
def message_each(before='', after=''):
    "A message for each call; the text of the turn in one before them or after them"
    return (offered+"{% for m in messages %}{% if m.tool_calls %}"+before+"{% for c in m.tool_calls %}"
            "<|im_start|>assistant\n"
            "<call>"+written+"</call><|im_end|>\n{% endfor %}"+after+"{% else %}"+turn+"{% endif %}{% endfor %}"+opened)

text_of_it = "{% if m.content %}"+turn+"{% endif %}"
weather,clock,bonn = call('weather', city='Oslo'),call('clock', place='Rome'),call('weather', city='Bonn')
oslo,rome = '<call>weather {"city": "Oslo"}</call><|im_end|>','<call>clock {"place": "Rome"}</call><|im_end|>'

@pytest.mark.parametrize('template,text,wanted', [
    (message_each(), '', [oslo, rome]),
    (message_each(before=text_of_it), 'Let me look.', ['Let me look.<|im_end|>', oslo, rome]),
    (message_each(after=text_of_it), 'I looked.', [oslo, rome, 'I looked.<|im_end|>'])])
def test_each_message_of_a_turn_is_learned_without_the_headers_between(template, text, wanted):
    asked = [user('q'), said(text, tool_calls=[weather, clock]), result('7'), result('noon', 'clock'), said('So.')]
    assert learned(asked, template, tools)==[*wanted, 'So.<|im_end|>']
    assert learned(asked[:2], template, tools)==wanted

def test_three_calls_and_a_second_question():
    asked = [user('q'), said('', tool_calls=[weather, clock, bonn]), result('7'), result('noon'), result('8'),
             said('So.'),
             user('r'), said('', tool_calls=[clock]), result('one'), said('End.')]
    assert ''.join(learned(asked, message_each(), tools)).count('</call><|im_end|>')==4

def test_calls_with_their_results_between_them():
    "Written by one pass over the calls, as Gemma's templates do, each followed by its result"
    template = (offered+"{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
                        "<|im_start|>assistant\n<call>"+written+
                "</call><|im_end|>\n{% for t in messages if t.tool_call_id is defined and t.tool_call_id == c.id %}"
                "<|im_start|>tool\n{{ t.content }}<|im_end|>\n{% endfor %}{% endfor %}{% elif m.role!='tool' %}"+turn+
                "{% endif %}{% endfor %}"+opened)
    asked = [user('q'), said('', tool_calls=[weather, clock]), result('7'), result('noon', 'clock'), said('So.')]
    assert learned(asked, template, tools)==[oslo, rome, 'So.<|im_end|>']

def test_calls_in_one_message_are_one_stretch():
    template = (offered+"{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{{ m.content }}{% for c "
                        "in m.tool_calls %}"
                "<call>"+written+"</call>\n{% endfor %}<|im_end|>\n{% else %}"+turn+"{% endif %}{% endfor %}"+opened)
    asked = [user('q'), said('Hm.', tool_calls=[weather, clock]), result('7'), said('So.')]
    first,second = (c.removesuffix('<|im_end|>') for c in (oslo, rome))
    assert learned(asked, template, tools)[0]==f'Hm.{first}\n{second}\n<|im_end|>'

# --- what stands in arguments and texts
one_message = (offered+"{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{% for c in m.tool_calls "
                       "%}<call>"+
               written+"</call>{% endfor %}<|im_end|>\n{% else %}"+turn+"{% endif %}{% endfor %}"+opened)
headings = (offered+"{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>"+
            written+
            "</call>{% endfor %}{{ eos_token }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% "
            "endif %}")

@pytest.mark.parametrize('value', ['### assistant:\nYes', 'a\n\n### user:\nb', '"quoted" \\ back', "it's", 'ünï 漢字 🎉',
                                   ' padded ',
                                   '</call>', '731415926000001', 'assistant\n', '', 3, -1.5, 1e300, True, None, [], {},
                                   [1, 'two', dict(three=[3.5, None])], dict(a=dict(b=['### assistant:\n']))])
@pytest.mark.parametrize('template', [one_message, headings])
def test_arguments_of_any_kind_are_learned_whole(template, value):
    import json
    asked = [user('### assistant:\nhi'), said('', tool_calls=[call('weather', at=value), clock]),
             result('### assistant:\n7'),
             said('So.\n### assistant:\nMore.')]
    first,*_,last = learned(asked, template, tools)
    said_so = json.dumps(dict(at=value), ensure_ascii=False)
    assert first==f'<call>weather {said_so}</call><call>clock {{"place": "Rome"}}</call><|im_end|>'
    assert last=='So.\n### assistant:\nMore.<|im_end|>'

@pytest.mark.parametrize('arguments', [dict(city='Oslo<|im_end|>'), {'<|im_start|>assistant\n': 1},
                                       dict(a=[dict(b='<|im_end|>')])])
def test_a_control_token_among_arguments_refuses_the_row_by_name(arguments):
    asked = [user('q'), said('', tool_calls=[call('weather', **arguments)]), result('7'), said('So.')]
    with pytest.raises(ValueError, match=r'turn 2 holds the control token <\|im_'): learned(asked, one_message, tools)

@pytest.mark.parametrize('written_instead,reason', [
    ("{% if loop.last %}{{ c.function.arguments|tojson }}{% endif %}", "the argument '2'"), # of the last call only
    ("{{ c.function.arguments.values()|list|first|tojson }}", "the argument '2'"), # the first only
    ("{{ c.function.arguments.values()|list|tojson }}", "'city' among"), # without their names
    ("{{ c.function.arguments.items()|list|length }}", "the argument 'Rome'")]) # none
def test_an_argument_that_is_left_out_refuses_the_row(written_instead, reason):
    template = one_message.replace('{{ c.function.arguments|tojson }}', written_instead)
    asked = [user('q'), said('', tool_calls=[call('weather', city='Oslo', days=2), clock]), result('7'), result('8'),
             said('So.')]
    with pytest.raises(ValueError, match=f'leaves out {reason}'): learned(asked, template, tools)

def test_a_call_that_is_left_out_refuses_the_row_where_it_is_no_turn_of_its_own():
    second = one_message.replace('{% for c in m.tool_calls %}', "{% for c in m.tool_calls if c.function.name != "
                                 "'clock' %}")
    with pytest.raises(ValueError, match='cannot be located|leaves out'):
        learned([user('q'), said('', tool_calls=[weather, clock]), result('7'), result('8'), said('So.')], second,
                tools)

def test_arguments_that_a_template_changes_refuse_the_row():
    shouting = one_message.replace('c.function.arguments|tojson', 'c.function.arguments|tojson|upper')
    with pytest.raises(ValueError, match='cannot be located|leaves out'):
        learned([user('q'), said('', tool_calls=[weather]), result('7'), said('So.')], shouting, tools)

def test_arguments_that_a_template_looks_at_are_learned_all_the_same():
    looking = one_message.replace('{{ c.function.arguments|tojson }}', "{% if c.function.arguments.city == 'Oslo' %}"
                                  "(home) {% endif %}"
                                  '{{ c.function.arguments|tojson }}')
    asked = [user('q'), said('', tool_calls=[weather]), result('7'), said('So.')]
    assert learned(asked, looking, tools)[0]=='<call>weather (home) {"city": "Oslo"}</call><|im_end|>'

# --- turns that the next speaker ends
speakers = (offered+"{% for m in messages %}<|{{ 'observation' if m.role=='tool' else m.role }}|>\n{{ m.content }}"
            "{% for c in m.tool_calls or [] %}<call>"+written+"</call>{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
spoken = ('<|user|>', '<|system|>', '<|observation|>', '<|assistant|>')

def speaking(template=speakers, tokens=spoken):
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tok.add_special_tokens(dict(additional_special_tokens=[*tokens]))
    tok.chat_template = template
    return tok

called = [user('q'), said('', tool_calls=[weather]), result('7'), said('So.'), user('r'), said('End.')]
cold = '<call>weather {"city": "Oslo"}</call>'

@pytest.mark.parametrize('between', ['', '\n', '\n\n'])
def test_the_marker_of_the_next_speaker_is_learned_as_the_end(between):
    tok = speaking(speakers.replace('<|', '{{ '+repr(between)+' }}<|'))
    ends = [cold+between+'<|observation|>', f'So.{between}<|user|>', f'End.{between}<|user|>']
    assert learned(called, None, tools, tok)==ends
    assert learned(called[:2], None, tools, tok)==[cold+between+'<|observation|>'] # the last turn too

def test_a_system_prompt_in_the_middle_ends_an_answer_and_an_answer_after_an_answer_does_not():
    asked = [user('q'), said('So.'), dict(role='system', content='Be kind.'), user('r'), said('One.'), said('Two.')]
    tok = speaking()
    r = render_learned(asked, tok)
    assert [r.text[a:b] for a,b in r.spans]==['So.<|system|>', 'One.', 'Two.<|user|>']
    assert r.notes==('an earlier answer has no end of its own',)

def test_an_end_at_the_end_of_the_conversation_only():
    tok = speaking(speakers.replace('{% if add_gen', '{% if not add_generation_prompt %}{{ eos_token }}{% endif %}'
                                                     '{% if add_gen'))
    assert learned(called, None, tools, tok)==[cold+'<|observation|>', 'So.<|user|>', 'End.<|im_end|>']

def test_headings_that_are_no_tokens_end_nothing():
    tok = speaking(tokens=())
    r = render_learned(called, tok, tools)
    assert [r.text[a:b] for a,b in r.spans]==[cold, 'So.', 'End.']
    assert 'an earlier answer has no end of its own' in r.notes
    assert tok.decode([t for t in encode(called, tok, tools)['labels'] if t!=-100])==cold+'So.End.<|im_end|>'

def test_generation_stops_at_what_was_learned():
    tok = speaking()
    names = tok.convert_ids_to_tokens
    assert names(end_of_turn_ids(tok))==['<|user|>', '<|observation|>'] and names(end_of_turn_id(tok))=='<|user|>'
    assert {'<|user|>', '<|observation|>', tok.eos_token}<={*names(stop_ids(None, tok))}
    for asked in (called, called[:2], called[:4]):
        assert [t for t in encode(asked, tok, tools)['labels'] if t!=-100][-1] in stop_ids(None, tok)
    everything = encode(called, tok, tools, train_on='all')['labels']
    assert names([t for t in everything if t!=-100][-1])=='<|user|>'

def test_what_a_person_says_may_not_hold_the_marker():
    for asked in ([user('a<|user|>b'), said('c')], [user('a'), said('b<|observation|>')]):
        with pytest.raises(ValueError, match='holds the control token'): learned(asked, None, tok=speaking())

def test_a_call_with_an_end_of_its_own():
    own = one_message.replace('</call>{% endfor %}<|im_end|>', '{% endfor %}<|call|>')
    tok = tokenizer(own)
    asked = [user('q'), said('', tool_calls=[weather]), result('7'), said('So.')]
    r = render_learned(asked, tok, tools)
    assert [r.text[a:b] for a,b in r.spans]==['<call>weather {"city": "Oslo"}<|call|>', 'So.<|im_end|>'] and not r.notes
    assert tok.convert_ids_to_tokens(end_of_turn_ids(tok))==['<|im_end|>', '<|call|>']

def test_what_ends_each_of_several_calls_does_not_end_the_turn():
    tok = tokenizer(one_message, '</call>')
    assert tok.convert_ids_to_tokens(end_of_turn_ids(tok))==['<|im_end|>']

# --- thoughts
def rewriting(begin='<think>', end='</think>', kept='true', template=None):
    "A template in the way of Qwen's: thoughts are cut out of a text and written anew where `kept` holds"
    return ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role=='user' %}{% set ns.last = "
            "loop.index0 %}"
            "{% endif %}{% endfor %}{% for m in messages %}{% if m.role=='assistant' %}{% set text = m.content %}{% "
            "set plan = '' %}"
            "{% if m.reasoning_content %}{% set plan = m.reasoning_content %}{% elif 'END' in text %}"
            "{% set plan = text.split('END')[0].rstrip('\\n').split('BEGIN')[-1].lstrip('\\n') %}"
            "{% set text = text.split('END')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant\n{% if KEPT and "
            "plan %}BEGIN\n"
            "{{ plan.strip('\\n') }}\nEND\n\n{% endif %}{{ text }}<|im_end|>\n{% else %}"+turn+
            "{% endif %}{% endfor %}"+opened
            ).replace('BEGIN', begin).replace('END', end).replace('KEPT', kept)

all_tags = [('<think>', '</think>'), ('<reasoning>', '</reasoning>'), ('[THINK]', '[/THINK]'), ('◁think▷', '◁/think▷'),
            ('<seed:think>', '</seed:think>')]

@pytest.mark.parametrize('begin,end', all_tags)
@pytest.mark.parametrize('space', ['', '\n', '\n\n', ' '])
def test_thoughts_that_a_template_rewrites_are_learned(begin, end, space):
    tok = tokenizer(rewriting(begin, end), text=('[THINK]', '[/THINK]'))
    bare = space.strip('\n')
    wanted = [f'{begin}\n{bare}plan{bare}\n{end}\n\n{bare}reply.<|im_end|>']
    for text in (f'plan{space}{end}{space}reply.', f'{begin}{space}plan{space}{end}{space}reply.'):
        found = learned([user('ask'), said(text)], None, tok=tok)
        assert [re.sub(' ', '', t) for t in found]==[re.sub(' ', '', t) for t in wanted], found
    assert learned([user('ask'), said('reply.', reasoning_content='plan')], None, tok=tok)==[
        f'{begin}\nplan\n{end}\n\nreply.<|im_end|>']

def test_earlier_thoughts_that_are_dropped_are_noted():
    tok = tokenizer(rewriting(kept='loop.index0 > ns.last'))
    asked = [user('a'), said('one</think>A.'), user('b'), said('<think>two</think>B.')]
    r = render_learned(asked, tok)
    assert [r.text[a:b] for a,b in r.spans]==['A.<|im_end|>', '<think>\ntwo\n</think>\n\nB.<|im_end|>']
    assert r.notes==('thoughts left out',)

@pytest.mark.parametrize('text', ['<think>one</think>A.<think>two</think>B.', '<think>one</think><think>two</think>B.',
                                  'one</think>two</think>B.', 'First. <think>one</think> B.'])
def test_a_turn_of_which_a_part_would_be_lost_is_refused_with_the_remedy(text):
    with pytest.raises(ValueError, match='thoughts.*(one block|reasoning_content)'):
        learned([user('a'), said(text)], rewriting())

def test_several_thoughts_are_learned_where_the_template_writes_the_text_as_it_is():
    text = '<think>one</think>A. <think>two</think> B.'
    asked = "{% for m in messages %}"+turn+"{% if '</think>' in m.content %}{% endif %}{% endfor %}"+opened
    assert learned([user('a'), said(text)], asked)==[text+'<|im_end|>']

def test_a_prompt_that_opens_the_thoughts_is_followed_by_them():
    opens = "{% for m in messages %}"+turn+"{% endfor %}"+opened.replace('assistant\n', 'assistant\n<think>\n')
    tok = tokenizer(opens)
    r = render_learned([user('a'), said('plan</think>B.')], tok)
    assert [r.text[a:b] for a,b in r.spans]==['plan</think>B.<|im_end|>']
    assert r.text.startswith(render([user('a')], tok, add_generation_prompt=True))
    assert r.notes==('thoughts opened as the prompt opens them',)
    assert learned([user('a'), said('<think>\nplan</think>B.')], None, tok=tok)==['plan</think>B.<|im_end|>']

def test_thoughts_under_the_key_that_the_template_reads():
    keyed = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}({{ m.thinking }}) {% endif %}{{ "
             "m.content }}"
             "<|im_end|>\n{% endfor %}"+opened)
    assert learned([user('a'), said('B.', reasoning_content='plan')], keyed)==['(plan) B.<|im_end|>']

def test_thoughts_beside_calls():
    thoughts = '{% if m.reasoning_content %}<think>{{ m.reasoning_content|trim }}</think>{% endif %}'
    thinking = one_message.replace('{% for c in', thoughts+'{% for c in')
    asked = [user('q'), said('', tool_calls=[weather, clock], reasoning_content='\nplan\n'), result('7'), said('So.')]
    assert learned(asked, thinking, tools)[0].startswith('<think>plan</think><call>weather')

def test_changed_thoughts_are_refused_with_the_remedy():
    shouting = rewriting().replace('plan.strip', 'plan.upper().strip')
    for turn_ in (said('plan</think>B.'), said('B.', reasoning_content='plan')):
        with pytest.raises(ValueError, match='turn 2 holds thoughts.*leave them out'):
            learned([user('a'), turn_], shouting)

def test_tags_in_questions_and_results():
    peeking = one_message.replace(turn, "{% if m.content.startswith('<tool_response>') %}(result){% endif %}"+turn)
    asked = [user('<tool_response>x</tool_response>'), said('a <tool_response> b'), user('</think>'), said('So.')]
    assert learned(asked, peeking)==['a <tool_response> b<|im_end|>', 'So.<|im_end|>']

# --- images
def test_texts_and_images_in_any_order_over_several_turns():
    from PIL import Image
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    from sage_finetune.rows.formats import image_mark
    from sage_finetune.rows.images import with_processor
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tok.add_tokens(['<image>'], special_tokens=True)
    tok.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content "
                         "}}{% else %}"
                         "{% for c in m.content %}{{ '<image>' if c.type=='image' else c.text }}{% endfor %}{% endif %}"
                         "<|im_end|>\n{% endfor %}"+opened)
    sight = CLIPImageProcessorPil(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    tok = with_processor(tok, LlavaProcessor(sight, tok, patch_size=14, vision_feature_select_strategy='default',
                                             num_additional_image_tokens=1))
    red = Path(tempfile.mkdtemp())/'red.png'
    Image.new('RGB', (28, 28), 'red').save(red)
    def shows(text): return user(text.replace('#', image_mark)) | dict(images=[red]*text.count('#'))
    asked = [shows('a#b'), said('One.'), shows('##c'), said('Two </think> three.'), user('none'), said('Four.'),
             shows('d#'*20),
             said('Five.')]
    r = render_learned(asked, tok)
    answers = ['One.', 'Two </think> three.', 'Four.', 'Five.']
    assert [r.text[a:b] for a,b in r.spans]==[f'{t}<|im_end|>' for t in answers]
    assert len(r.images)==23 and r.text.count('<image>')==23*4

edges = {"m.content.lstrip('\n')": lambda t: t.lstrip('\n'), "m.content.rstrip('\n')": lambda t: t.rstrip('\n'),
         'm.content|trim': str.strip, 'm.content.strip()': str.strip, 'm.content': str,
         "m.content.strip(' ')": lambda t: t.strip(' '), 'm.content.lstrip() if loop.last else m.content': str.lstrip}

@pytest.mark.parametrize('habit', edges)
@pytest.mark.parametrize('text', ['\n  So.\n', ' So. ', 'So.\n\n\t', '\r\nSo.', '\n\n  <think>x</think>\n So.\n '])
def test_white_space_at_the_edges_of_a_text(habit, text):
    template = ("{% for m in messages %}{% if m.role == 'x</think>' %}{% endif %}<|im_start|>{{ m.role }}\n{{ "+habit+
                " }}<|im_end|>\n{% endfor %}"+opened)
    assert learned([user(text), said(text)], template)==[edges[habit](text)+'<|im_end|>']

def test_a_text_outside_of_what_is_learned_is_a_fault():
    body = lambda text: _Body(text, 1, 'text', True)
    bodies,messages = {marker(0): body('One.'), marker(1): body('Two.')},[user('q'), said('One. Two.')]
    text = f'{marker(0)}|{marker(1)}'
    assert _faults(text, {1: [(0, 3, 'after the prompt')]}, bodies, messages)=={}
    assert 'cannot be located' in _faults(text, {1: [(0, 1, 'after the prompt')]}, bodies, messages)[1]
    assert 'cannot be located' in _faults(text, {1: []}, bodies, messages)[1]

@pytest.mark.parametrize('order', ['messages|reverse', 'messages[-2:]+messages[:-2]'])
def test_a_template_that_writes_turns_in_another_order_is_refused(order):
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tok.chat_template = ('{% for m in ' + order + " %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                         '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
    talk = [dict(role=r, content=t) for r,t in zip(['user', 'assistant']*2, ['Why?', 'So.', 'Who?', 'Me.'])]
    with pytest.raises(ValueError, match='mixes the turns'): render_learned(talk, tok)

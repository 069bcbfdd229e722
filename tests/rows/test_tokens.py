"What a tokenizer takes away: line breaks, case, accents, characters it does not know; noted, or refused"
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sage_finetune.config import resolve_model
from sage_finetune.data import DataReport, prepare_dataset
from sage_finetune.rows.learned import render_learned
from sage_finetune.rows.template import ensure_template
from sage_finetune.rows.tokens import encode, encode_rendered, end_of_turn_ids, tokenizer_losses

code = 'def f(x):\n    if x:\n        return 1\n    return 2'
template = ("{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}")
some = 'Write f. a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 ( ) : é Café fi 漢'
special = ['<unk>', '<|im_start|>', '<|im_end|>']

def unigram(*normal, unknown='<unk>', breaks=False, size=110):
    "A tokenizer in the way of SentencePiece, with these normalizers"
    t = Tokenizer(models.Unigram())
    if normal: t.normalizer = normalizers.Sequence([*normal])
    t.pre_tokenizer,t.decoder = pre_tokenizers.Metaspace(),decoders.Metaspace()
    text = [code, some]*30 if breaks else [' '.join(code.split()), some]*30
    t.train_from_iterator(text, trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token='<unk>',
                                                        show_progress=False))
    return fast(t, unk_token=unknown)

def fast(t, **more):
    f = PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|im_end|>', **more)
    f.add_special_tokens(dict(additional_special_tokens=['<|im_start|>']))
    f.chat_template = template
    return f

def words():
    "A tokenizer in the way of BERT: words, and no white space at all"
    t = Tokenizer(models.WordLevel({w: i for i,w in enumerate([*special, *f'user assistant {some} {code}'.split()])},
                                   unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(t, unk_token='<unk>')

def report_of(answer, tok, question='Write f.'):
    r = DataReport()
    try: prepare_dataset([dict(question=question, answer=answer)], tok, report=r, cache=False)
    except ValueError as e: return r,str(e)
    return r,''

folding = normalizers.Replace(Regex(r'\s+'), ' ')
folds = 'the tokenizer folds white space: line breaks, indents or tabs are lost'

@pytest.mark.parametrize('tok', [unigram(folding), unigram(normalizers.NFKC(), folding), words(),
                                 unigram(normalizers.Replace('\n', ' ')),
                                 unigram(normalizers.Replace(Regex(' {2,}'), ' '), breaks=True)])
def test_folded_white_space_is_noted_once_a_row(tok):
    r,error = report_of(code, tok)
    assert not error and r.used==1 and r.notes=={folds: 1}

@pytest.mark.parametrize('question', ['f\n2', 'f\tx', 'f  x'])
def test_white_space_that_is_lost_in_a_question_is_noted_too(question):
    r,error = report_of('x', unigram(folding), question)
    assert not error and r.notes=={folds: 1}

def test_no_note_where_nothing_is_lost():
    for tok in (unigram(folding), unigram(breaks=True)):
        r,error = report_of('return 1', tok)
        assert not error and not r.notes
    r,error = report_of('def f(x): return 1', AutoTokenizer.from_pretrained(resolve_model('sage-tiny')), code)
    assert not error and not r.notes

@pytest.mark.parametrize('normal,answer', [
    ([normalizers.Lowercase()], 'Write f'), # lower case
    ([normalizers.NFD(), normalizers.StripAccents()], 'é'), # no accents
    ([normalizers.Replace('2', '')], '1 2'), # a character less
    ([], 'a 🎉'), ([], 'Ж')]) # unknown characters
def test_an_answer_that_comes_out_as_another_is_refused(normal, answer):
    _,error = report_of(answer, unigram(*normal))
    assert 'the tokenizer cannot write the answer back' in error

@pytest.mark.parametrize('question,n', [('Write 🎉', 1), ('Ж Ж', 1), ('Write f.', 0)])
def test_unknown_characters_in_a_question_are_noted(question, n):
    r,error = report_of('x', unigram(), question)
    note = 'characters that the tokenizer does not know became <unk>'
    assert not error and r.notes==({note: n} if n else {})

def test_an_unknown_token_that_is_also_the_end_is_no_loss():
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tok.unk_token = tok.eos_token # as GPT-2's is
    r,error = report_of('x\n  y', tok)
    assert not error and not r.notes

def test_other_forms_of_the_same_characters_are_noted():
    r,error = report_of('ﬁ', unigram(normalizers.NFKC()))
    assert not error and r.notes=={'the tokenizer normalises characters of answers': 1}

def test_notes_are_not_doubled_and_labels_stay():
    tok = unigram(folding)
    rendered = render_learned([dict(role='user', content='f'), dict(role='assistant', content=code)], tok)
    first,second = (encode_rendered([rendered], tok)[0] for _ in range(2))
    assert rendered.notes==(folds,) and np.array_equal(first['labels'], second['labels'])

def test_losses_are_those_of_the_text_alone():
    tok = unigram(folding)
    assert tokenizer_losses('a b', tok('a b')['input_ids'], tok)==[]
    assert tokenizer_losses('a\nb', tok('a\nb')['input_ids'], tok)==[folds]
    assert len(tokenizer_losses('a\nЖ', tok('a\nЖ')['input_ids'], tok))==2

def test_one_end_where_calls_are_text():
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    assert tok.convert_ids_to_tokens(end_of_turn_ids(tok))==['<|im_end|>']
    assert encode([dict(role='user', content='a'), dict(role='assistant', content='b')], tok)['labels'][-1]==-100

# --- what is decoded from the labels
def embedded(template=None):
    tok = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    if template: tok.chat_template = template
    return tok

def learned(messages, tok, **more): return tok.decode([t for t in encode(messages, tok, **more)['labels'] if t!=-100])
def talk(asked, answered): return [dict(role='user', content=asked), dict(role='assistant', content=answered)]

endless = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")

def test_a_template_without_an_end_gets_the_tokenizers():
    assert learned(talk('Why?', 'So.'), embedded(endless))=='So.<|im_end|>'
    turns = [*talk('2+3?', '5'), *talk('And 4 more?', '9'), dict(role='user', content='Thanks.')]
    assert render_learned(turns, embedded(endless)).notes==('an earlier answer has no end of its own',)

def test_a_tokenizer_without_a_template_has_plain_headings():
    headed = embedded()
    headed.chat_template = None
    ensure_template(headed)
    assert learned(talk('2+3?', '5'), headed)=='5<|im_end|>'
    assert headed.decode(encode(talk('2+3?', '5'), headed)['input_ids']).startswith('### User:\n2+3?\n\n### '
                                                                                    'Assistant:\n5')

@pytest.mark.parametrize('answer,comes', [('Au cafe\u0301.', 'Au café.'), ('🎉', '🎉'),
                                          (' \n spaced \n', ' \n spaced \n'),
                                          ('漢字', '漢字')])
def test_texts_come_back(answer, comes):
    assert learned(talk('Où?', answer), embedded())==comes+'<|im_end|>'

def test_tokens_that_are_not_special_may_stand_in_an_answer():
    quiet = embedded(endless)
    quiet.add_tokens([AddedToken('</answer>', special=False), AddedToken('<|stop|>', special=True)])
    assert learned(talk('Why?', '<answer>4</answer>'), quiet)=='<answer>4</answer><|im_end|>'
    with pytest.raises(ValueError, match=r'holds the control token <\|stop\|>'): encode(talk('a', 'b <|stop|> c'),
                                                                                        quiet)

def test_what_is_learned_ends_with_the_end_and_nothing_is_cut():
    tok = embedded()
    assert tok('x')['input_ids']==tok('x', truncation=True, max_length=8)['input_ids']
    assert learned(talk('2+3?', '5'), tok, train_on='assistant').endswith('<|im_end|>')
    everything = learned(talk('2+3?', '5'), tok, train_on='all')
    assert everything.endswith('<|im_end|>') and everything.count('<|im_end|>')==2

# --- the same for plain text, and for questions
@pytest.mark.parametrize('normal,text,note', [
    ([folding], code, folds), ([], 'Write 🎉', 'characters that the tokenizer does not know became <unk>'),
    ([normalizers.Lowercase()], 'Write f', 'the tokenizer changes characters of the text (case, accents or others)'),
    ([normalizers.NFD(), normalizers.StripAccents()], 'é f',
     'the tokenizer changes characters of the text (case, accents or others)')])
@pytest.mark.parametrize('length,overflow', [(64, 'drop'), (8, 'split'), (8, 'truncate')])
def test_plain_text_is_noted_too(normal, text, note, length, overflow):
    r = DataReport()
    prepare_dataset([dict(text=text)], unigram(*normal), length, report=r, overflow=overflow, cache=False)
    assert r.used==1 and r.notes=={note: 1}
    if length==64: assert report_of('x', unigram(*normal), text)[0].notes.keys()<={note, folds} and note

def test_plain_text_that_keeps_all_is_not_noted():
    r = DataReport()
    prepare_dataset([dict(text='return 1 2')], unigram(), report=r, cache=False)
    prepare_dataset([dict(text=code*40)], embedded(), 64, report=r, overflow='split', cache=False)
    assert not r.notes

# A byte-level tokenizer has a token for every byte, and may still be told to change what it reads

def byte_level(normal=None, *added):
    t = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    if normal: t.backend_tokenizer.normalizer = normal
    t.add_tokens([*added])
    return t

@pytest.mark.parametrize('normal,added', [
    (normalizers.Replace('  ', ' '), []), (normalizers.Replace(Regex(r'\s+'), ' '), []),
    (normalizers.Replace('\t', ' '), []), (normalizers.Strip(left=False), []),
    (None, [AddedToken('f(x)', lstrip=True)]), (None, [AddedToken('return', rstrip=True)])])
def test_white_space_that_a_byte_level_tokenizer_changes_is_told(normal, added):
    from sage_finetune.rows.report import show_report
    row,report = dict(question='Write f', answer='def f(x):\n\tif x:\n        return  1\n'),DataReport()
    prepare_dataset([row], byte_level(normal, *added), report=report, cache=False)
    assert report.notes=={'the tokenizer changes white space of answers': 1}
    assert 'changes white space' in show_report(report)

@pytest.mark.parametrize('normal,word', [
    (normalizers.Lowercase(), 'changes characters'), (normalizers.Replace('  ', ' '), 'folds white space'),
    (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), 'changes characters')])
def test_plain_text_that_a_byte_level_tokenizer_changes_is_told(normal, word):
    report = DataReport()
    prepare_dataset([dict(text='Café  au lait')], byte_level(normal), report=report, cache=False)
    assert [word in note for note in report.notes]==[True]

@pytest.mark.parametrize('row', [dict(text='Café  au\n\tlait'), dict(question='A\u0301?', answer=' é\n\n  漢 ')])
def test_what_a_byte_level_tokenizer_keeps_is_not_told(row):
    report = DataReport()
    prepare_dataset([row], byte_level(), report=report, cache=False)
    assert not report.notes

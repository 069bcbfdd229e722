"Seeing the data: nothing in it commands a page or a terminal, no character is broken, the command takes any source"
import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset
from rich.cells import cell_len
from rich.console import Console

from quick import command_in_fork, forked
from sage_finetune.ui import inspect as module
from sage_finetune.training.packing import pack_dataset
from sage_finetune.cli import main
from sage_finetune.data import DataReport, ignored, prepare_dataset, save_rows
from sage_finetune.core.display import save_figure
from sage_finetune.core.run_folder import write_meta
from sage_finetune.ui.inspect import (
    inspect_data, Inspection, pieces_of, plot_lengths, show_row, show_rows, text_histogram, token_lengths
)
from sage_finetune.base.loading import load_tokenizer


@pytest.fixture(scope='module')
def tok(): return load_tokenizer('sage-tiny')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_CACHE', str(tmp_path/'cache'))
    for name in ('NO_COLOR', 'FORCE_COLOR', 'COLUMNS'): monkeypatch.delenv(name, raising=False)


def qa(question, answer): return dict(question=question, answer=answer)


def view_of(tok, question, answer='Yes.', **how):
    return show_row(prepare_dataset([qa(question, answer)], tok, cache=False), 0, **how)


def terminal(thing, width=80, **how):
    "What a terminal gets"
    console = Console(file=io.StringIO(), width=width, **how)
    console.print(thing)
    return console.file.getvalue()


def in_colour(thing, width=80):
    return terminal(thing, width, force_terminal=True, color_system='truecolor', no_color=False)


class Page(HTMLParser):
    "Tags, attributes, hover texts and text of a piece of HTML, and whether every tag is closed in its turn"
    def __init__(self, text):
        super().__init__()
        self.tags,self.attributes,self.titles,self.text,self.open = set(),set(),[],'',[]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {k for k,_ in attrs}
        self.titles += [v for k,v in attrs if k=='title']
        if tag!='img': self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text += data


attacks = ['<script>alert(1)</script>', '</span></div><img src=x onerror=alert(1)>', '"><b onmouseover="x">',
           "' title='", '&lt;b&gt; &amp; &#60;', '<!-- x', ']]>',
           '<u style="x">', '\x00\x08\x7f', 'a\x1b[2Jb\x1b]0;title\x07', '\u202egnp.exe', '\ufeffx',
           'a\u2028b\x85c', '\U000e0041\U000e0042', '[bold]x[/bold] [/]', ':smile: [link=file:///]x[/link]', '⟦x⟧']


# Characters

@pytest.mark.parametrize('text', ['🙂🙃', '👨‍👩‍👧 👋🏽 🇩🇪', '你好，世界', 'नमस्ते', 'e\u0301a\u0308', 'a\ufffdb', '\ufffd'*20,
                                  'Ġ Ċ <0xF0>', '   ', '\n\n', '𝕏𐍈', 'мир', '\u0301', ''])
def test_the_pieces_of_a_text_are_the_text(tok, text):
    ids = tok(text)['input_ids']
    pieces = pieces_of(ids, tok)
    assert ''.join(p.text for p in pieces)==unicodedata.normalize('NFC', text) # the tokenizer's own rule
    assert [t for p in pieces for t in p.ids]==ids
    assert [p.at for p in pieces]==np.cumsum([0, *(len(p.ids) for p in pieces)])[:-1].tolist()


def test_the_pieces_of_random_text_are_what_its_tokens_decode_to(tok):
    draw = random.Random(0)
    for _ in range(300):
        text = ''.join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xa0, 0xd800),
                                        draw.randrange(0xe000, 0x110000)))) for _ in range(draw.randrange(40)))
        ids = tok(text)['input_ids']
        assert ''.join(p.text for p in pieces_of(ids, tok))==tok.decode(ids)


def test_random_tokens_make_pieces_that_hold_each_of_them_once(tok):
    draw = random.Random(1)
    for _ in range(100):
        ids = [draw.randrange(len(tok)+3) for _ in range(draw.randrange(50))]
        learned,starts = [draw.random()<.5 for _ in ids],sorted({draw.randrange(50) for _ in range(3)})
        view = pieces_of(ids, tok, learned, [s for s in starts if s<len(ids)])
        assert [t for p in view for t in p.ids]==ids
        assert {p.at for p in view if p.document}=={s for s in starts if s<len(ids)}


def test_an_accent_a_skin_tone_and_a_joiner_belong_to_their_character(tok):
    for text in ('q\u0301', '👋🏽', '👨\u200d👩\u200d👧', '❤\ufe0f'):
        assert [p.text for p in pieces_of(tok(text)['input_ids'], tok)]==[text]


@pytest.fixture
def by_words():
    "A tokenizer whose tokens are words with a sign for the space before them, and bytes for what it does not know"
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast
    words = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *'abHi', 'Hi', '▁Hi']
    vocab = {w: i for i,w in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.BPE(vocab, [('H', 'i'), ('▁', 'Hi')], unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(' ', 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token='<unk>', bos_token='<s>', eos_token='</s>')


def test_words_with_a_sign_for_the_space_and_bytes(by_words):
    for text in ('Hi Hi 🙂 Hi', 'ab 你a', 'Hi\nab'):
        ids = by_words(text, add_special_tokens=False)['input_ids']
        pieces = pieces_of(ids, by_words)
        assert ''.join(p.text for p in pieces)==text and '\ufffd' not in ''.join(p.text for p in pieces)
    assert any(len(p.ids)==4 and p.text=='🙂'
               for p in pieces_of(by_words('🙂', add_special_tokens=False)['input_ids'], by_words))


def test_an_id_that_no_token_has_is_told(tok):
    view = show_row([dict(input_ids=[1, 42, 10**6])], tokenizer=tok)
    assert '⟨no token has the id 1000000⟩' in str(view) and '1000000' in view._repr_html_()


def test_half_a_character_is_shown_by_its_bytes(tok):
    ids = tok('🙂')['input_ids']
    view = show_row([dict(input_ids=ids[:2], position_ids=[0, 1]),
                     dict(input_ids=[*ids[:2], *ids], position_ids=[0, 1, 0, 1, 2, 3])], 1, tok)
    assert '\\xf0\\x9f' in str(view) and '🙂' in str(view) and '\ufffd' not in str(view)


# Nothing in the data commands

@pytest.mark.parametrize('text', attacks)
def test_data_is_text_in_a_page(tok, text):
    view = view_of(tok, f'a {text} b', f'c {text} d')
    page = Page(view._repr_html_())
    assert page.tags<={'div', 'u', 'code', 'span'} and page.attributes<={'style', 'title'} and not page.open
    assert all(re.fullmatch(r'tokens? [\d, a-z:]+', t) for t in page.titles)
    assert text.isprintable()<=(text in page.text.replace('·', ' '))


@pytest.mark.parametrize('text', attacks)
def test_data_is_text_in_a_terminal(tok, text):
    view = view_of(tok, f'a {text} b', f'c {text} d')
    shown = re.sub(r'\x1b\[[\d;]*m', '', in_colour(view))
    assert all(c=='\n' or unicodedata.category(c) not in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp') for c in shown)
    for plain in (str(view), terminal(view)):
        assert all(c=='\n' or unicodedata.category(c) not in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp') for c in plain)
        body = plain.partition('<|im_start|>')[2]
        assert (body.count('⟦'), body.count('⟧'))==(1, 1)
    assert text.isprintable()<=(text.split()[0] in shown)


def test_hover_tells_the_place_and_id_of_each_token(tok):
    view = view_of(tok, 'Hi 🙂')
    page,ids = Page(view._repr_html_()),[t for p in view.pieces for t in p.ids]
    told = [int(n) for t in page.titles for n in re.findall(r'\d+', t.partition('id')[2])]
    assert told==ids and any('tokens' in t and 'one character' in t for t in page.titles)


# Terminals

@pytest.mark.parametrize('width', [10, 20, 37, 80, 200])
def test_no_line_is_wider_than_the_terminal(tok, width):
    found = inspect_data([qa('你好 🙂 '*30+'x'*300, 'Yes. '*20), qa('Hi', 'Yo')], tok)
    for text in (terminal(found, width), re.sub(r'\x1b\[[\d;]*m', '', in_colour(found, width))):
        assert max(map(cell_len, text.splitlines()))<=width


def test_without_colours_learned_stretches_stand_in_brackets(tok, monkeypatch):
    view = view_of(tok, 'Hi')
    assert '⟦Yes.<|im_end|>⟧' in terminal(view) and '\x1b[4;' in in_colour(view) and '⟦' not in in_colour(view)
    assert '⟦' in terminal(view, force_terminal=True, color_system=None)
    monkeypatch.setenv('NO_COLOR', '1')
    assert '⟦Yes.<|im_end|>⟧' in re.sub(r'\x1b\[[\d;]*m', '', terminal(view, force_terminal=True))


@pytest.mark.parametrize('first,most,before,after', [
    (0, 10, 0, 90), (50, 10, 45, 45), (99, 10, 90, 0), (5, 100, 0, 0), (5, 1000, 0, 0), (50, 1, 50, 49)])
def test_a_terminal_shows_what_is_around_the_first_learned_token(tok, first, most, before, after):
    row = dict(input_ids=[42]*100, labels=[ignored]*first+[42]*(100-first))
    if first==0: row['labels'] = [ignored]*100
    said = terminal(show_row([row], 0, tok, most=most))
    assert [f'… {n} tokens {where}' for n,where in ((before, 'before'), (after, 'after'))
            if n]==[l for l in said.splitlines() if l.startswith('…')]
    assert said.count('H')==most if most<100 else said.count('H')==100


def test_a_row_without_a_learned_token_and_an_empty_one_are_shown(tok):
    none,empty = (show_row([dict(input_ids=x, labels=[ignored]*len(x))], tokenizer=tok) for x in ([42, 43], []))
    assert (none.learned, empty.tokens)==(0, 0)
    for view in (none, empty): assert str(view) and terminal(view) and Page(view._repr_html_()).text


# Rows of other tools

def test_tensors_padding_on_either_side_and_no_labels(tok):
    import torch
    row = dict(input_ids=torch.tensor([0, 0, 1, 42, 2, 0]), attention_mask=torch.tensor([0, 0, 1, 1, 1, 0]))
    view = show_row([row], tokenizer=tok)
    assert (view.tokens, view.learned, view.padding)==(3, 2, 3) and str(view).endswith('<|im_start|>⟦H<|im_end|>⟧')
    dataset = prepare_dataset([qa('Hi', 'Yo')], tok, cache=False)
    assert str(show_row(dataset.with_format('torch'), 0, tok))==str(show_row(dataset))
    assert str(show_row(dataset, np.int64(0)))==str(show_row(dataset, -1))


@pytest.mark.parametrize('i', [1, -2, True, 0.0, '0', None])
def test_a_number_that_is_not_there_is_refused(tok, i):
    with pytest.raises(ValueError, match=r'`i` must be a whole number from -1 to 0.*1 rows'):
        show_row([dict(input_ids=[1])], i, tok)


def test_packed_rows_show_each_document_once_and_count_like_the_documents(tok):
    dataset = prepare_dataset([qa(f'{i}+{i}?', str(2*i)) for i in range(20)], tok, cache=False)
    packed = pack_dataset(dataset, 128)
    views = [show_row(packed, i, tok) for i in range(len(packed))]
    assert sum(str(v).count('── document') for v in views)==20
    assert sum(v.learned for v in views)==token_lengths(dataset)[1].sum()==token_lengths(packed)[1].sum()
    assert all(re.match(r'── document 1 ──\n', str(v).partition('\n')[2]) for v in views)
    assert sum(v._repr_html_().count('>document ') for v in views)==20


def test_counts_are_those_of_the_report(tok):
    found = inspect_data([qa('Hi '*i, 'Yo '*i) for i in range(1, 30)]+[dict(text='some words '*9)], tok, rows=30)
    assert (found.tokens.sum(), found.learned.sum())==(found.report.tokens, found.report.learned_tokens)
    assert ([v.learned for v in found.rows]==found.learned.tolist()
            and [v.tokens for v in found.rows]==found.tokens.tolist())


def test_some_rows_are_the_same_for_the_same_seed(tok):
    dataset = prepare_dataset([qa(f'{i}?', 'a') for i in range(50)], tok, cache=False)
    chosen = [[v.i for v in show_rows(dataset, 5, seed)] for seed in (0, 0, 1)]
    assert chosen[0]==chosen[1]!=chosen[2] and chosen[0]==sorted(set(chosen[0]))
    with pytest.raises(ValueError, match='`n` must be at least 1'): show_rows(dataset, 0)
    with pytest.raises(ValueError, match='is empty'): show_rows(dataset.select([]))


# Lengths

def test_padding_wrong_lengths_and_odd_data_sets(tok):
    padded = dict(input_ids=[1, 42, 75, 2, 0, 0], labels=[ignored, 42, 75, 2, ignored, ignored],
                  attention_mask=[1, 1, 1, 1, 0, 0])
    assert str(show_row([padded], tokenizer=tok))==(
        'example 0 of 1: 4 tokens, 3 learned (75%), 2 of padding not shown\n<|im_start|>⟦Hi<|im_end|>⟧')
    left = dict(input_ids=[0, 0, 1, 42], labels=[0, 0, 1, 42], attention_mask=[0, 0, 1, 1])
    both = Dataset.from_list([padded, left])
    assert [x.tolist() for x in token_lengths(both)]==[[4, 2], [3, 1]]
    assert [show_row(both, i, tok).learned for i in range(2)]==[3, 1]
    rows = prepare_dataset([qa('Hi', 'Yo'), qa('Hi', 'Yo yo yo')], tok, cache=False)
    once = [x.tolist() for x in token_lengths(rows)]
    assert [x.tolist() for x in token_lengths(rows.select([1, 0, 1]))]==[[x[1], x[0], x[1]] for x in once]
    assert [x.tolist() for x in token_lengths(rows.select([]))]==[[], []]
    with pytest.raises(ValueError, match='different lengths'):
        token_lengths(Dataset.from_list([dict(input_ids=[1, 2], labels=[1])]))
    with pytest.raises(ValueError, match='must be a `datasets.Dataset`, got list'): token_lengths([padded])
    with pytest.raises(ValueError, match='got question'): token_lengths(Dataset.from_list([dict(question='?')]))


def test_what_show_row_refuses(tok):
    rows = prepare_dataset([qa('Hi', 'Yo')], tok, cache=False)
    for args,how,match in (
            (([dict(input_ids=[1, 2], labels=[1])],), dict(tokenizer=tok),
             '`labels` has 1 values and `input_ids` has 2'),
            (([dict(question='?')],), dict(tokenizer=tok), 'must have a column `input_ids`, got question'),
            (([dict(input_ids=[1])],), {}, 'give `tokenizer`'), (([],), dict(tokenizer=tok), 'is empty'),
            ((rows, 'first'), {}, '`i` must be'), ((iter([]),), dict(tokenizer=tok), 'must have a length'),
            ((rows,), dict(most=0), '`most` must be at least 1')):
        with pytest.raises(ValueError, match=match): show_row(*args, **how)


def test_the_middle_of_a_long_row_and_ids_as_text(tok):
    long = show_row([dict(input_ids=list(range(3, 1003)), labels=[ignored]*500+list(range(503, 1003)))], tokenizer=tok,
                    most=100)
    assert [l for l in terminal(long).splitlines() if l.startswith('… ')]==['… 450 tokens before',
                                                                            '… 450 tokens after']
    view = view_of(tok, 'a <b>bold</b> word')
    assert '&lt;b&gt;bold&lt;/b&gt;' in ''.join(re.split('</?span[^>]*>', view._repr_html_()))
    assert 'title="token 0: id 1"' in view._repr_html_()
    assert str(view)!=str(view_of(tok, 'a <b>bold</b> word', ids=True))


def test_histograms_of_nothing_of_one_length_and_of_many():
    hundred = Inspection(DataReport(), np.array([4]*80+[6]*19+[30]), np.ones(100, int), 32, rows=[], dataset=None)
    assert hundred.lengths(width=20).splitlines()[:2]==['all tokens: median 4, 95 % up to 6, limit 32',
                                                        'learned tokens: median 1, 95 % up to 1']
    assert text_histogram([])=='no examples'
    assert text_histogram([7, 7]).splitlines()==['7 │'+'█'*50+' 2']
    for top in (1, 11, 12, 13, 99, 1234, 10**6): assert len(text_histogram([0, top]).splitlines())<=12


def test_a_figure_of_lengths_and_a_file_of_it(tok, tmp_path):
    rows = prepare_dataset([qa('Hi', 'Yo')], tok, cache=False)
    assert save_figure(plot_lengths(rows, 64), tmp_path/'l.svg').read_text(encoding='utf-8').startswith('<?xml')
    with pytest.raises(ValueError, match='is empty'): plot_lengths(rows.select([]))


def test_an_inspection_of_a_run(tok, tmp_path):
    file = save_rows(tmp_path/'rows.jsonl', [qa('Hi', 'Yo'), qa('Hi '*30, 'Yo')])
    write_meta(tmp_path/'run', 'sage-tiny', str(file), config=dict(max_length=48, packing=True))
    found = inspect_data(tmp_path/'run')
    assert (found.max_length, found.report.used, found.report.dropped[0]['reason'][:8],
            found.report.packing['rows'])==(48, 1, 'too long', 1)
    assert inspect_data(tmp_path/'run', max_length=128).max_length==128
    assert found.rows[0].summary.endswith(', 1 document packed') and 'data:image/png' in found._repr_html_()
    assert len(inspect_data(file, tok, rows=0).rows)==0
    assert module._run_settings(tmp_path) is module._run_settings([]) is None
    with pytest.raises(ValueError, match='no row of'): inspect_data([qa('?', '')], tok)
    with pytest.raises(ValueError, match='`i` must be'): inspect_data(file, tok, rows=[7])
    assert 'those of sage-tiny' in inspect_data(file).notes[0]


def test_a_million_lengths_are_read_in_batches_without_python_lists(monkeypatch):
    import pyarrow as pa
    from datasets import Dataset
    n,calls,real = 1_000_000,[],module._lengths_of
    ends = np.arange(0, 8*n+1, 8, dtype=np.int32)
    column = lambda values: pa.ListArray.from_arrays(pa.array(ends), pa.array(values))
    labels = np.where(np.arange(8*n)%8<5, ignored, 7).astype(np.int32)
    dataset = Dataset(pa.table(dict(input_ids=column(np.full(8*n, 7, np.int32)), labels=column(labels))))
    monkeypatch.setattr(module, '_lengths_of', lambda table: calls.append(len(table)) or real(table))
    tracemalloc.start()
    tokens,learned = token_lengths(dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(tokens), set(tokens.tolist()), set(learned.tolist()))==(n, {8}, {3})
    assert max(calls)==10_000 and len(calls)==100
    assert peak<8*n*8, 'eight million integers in Python lists take more than their pointers'
    assert (module._plot(tokens, learned, 16)._repr_png_().startswith(b'\x89PNG')
            and text_histogram(tokens).endswith('1,000,000'))


@pytest.mark.parametrize('lengths', [[1], [5]*9, [0, 1], [1, 10**9], list(range(1000)), [3, 3, 1000]])
def test_the_bars_of_a_histogram_count_every_example(lengths):
    for bins in (1, 2, 12):
        lines = text_histogram(lengths, 20, bins).splitlines()
        assert sum(int(l.rpartition(' ')[2].replace(',', '')) for l in lines)==len(lengths) and len(lines)<=bins
        assert max(l.count('█') for l in lines)==20


# The command

def refused(capsys, *args):
    status = main(['inspect', *map(str, args)])
    said = capsys.readouterr()
    assert status!=0 and said.err.startswith('error: ') and said.err.count('\n')==1 and not said.out, said
    return said.err


def test_the_command_reads_what_training_reads(command, tmp_path):
    rows = [dict(frage=f'What is {i} plus {i}?', antwort=f'{2*i}, 你好') for i in range(5)]
    data = tmp_path/'data'
    data.mkdir()
    with gzip.open(data/'rows.csv.gz', 'wt', encoding='utf-8', newline='') as f:
        w = csv.DictWriter(f, ['frage', 'antwort'])
        w.writeheader()
        w.writerows(rows)
    save_rows(data/'more.jsonl', rows)
    done = command('inspect', data, '--model', 'sage-tiny', '--columns', 'frage=question', '--columns',
                   'antwort=answer', '--row', '-1', '--plot', tmp_path/'l.png')
    assert done.returncode==0 and done.stderr=='', done.stderr
    assert ('10 rows read = 10 used + 0 dropped' in done.stdout and '⟦8, 你好<|im_end|>⟧' in done.stdout
            and 'example 9 of 10' in done.stdout)
    assert (tmp_path/'l.png').read_bytes().startswith(b'\x89PNG')
    told = command('inspect', data/'rows.csv.gz', '--columns', 'frage=question', '--columns', 'antwort=answer',
                   '--json', '--max-length', '8')
    assert told.returncode==1 and 'no row of' in told.stderr and 'too long' in told.stderr and told.stdout==''
    report = command('inspect', data/'rows.csv.gz', '--columns', 'frage=question', '--columns', 'antwort=answer',
                     '--json')
    assert json.loads(report.stdout)['used']==5 and report.stderr.startswith('note: no model was named')


def test_a_run_is_a_source_with_its_own_settings(command, tmp_path):
    run = tmp_path/'home'/'.sage'/'finetune_output'/'sums'
    save_rows(run/'rows.jsonl', [qa('Hi '*30, 'Yo'), qa('Hi', 'Yo')])
    (run/'finetune_meta.json').write_text(json.dumps(
        dict(model='sage-tiny', dataset='rows.jsonl', config=dict(max_length=32, packing=True))))
    by_name,by_path = (command('inspect', name, SAGE_CACHE=str(tmp_path/'c')) for name in ('sums', run))
    assert by_name.returncode==0 and by_name.stdout==by_path.stdout, by_name.stderr
    assert ('2 rows read = 1 used + 1 dropped' in by_name.stdout and '1 document packed' in by_name.stdout
            and 'settings of the run in' in by_name.stderr)
    assert '2 used' in command('inspect', 'sums', '--max-length', '256').stdout
    (run/'finetune_meta.json').rename(run/'gone')
    (run/'training_config.json').write_text(json.dumps(
        dict(model_name='sage-tiny', data_path=str(run/'rows.jsonl'), max_length=32)))
    assert '1 used + 1 dropped' in command('inspect', run).stdout


@pytest.mark.parametrize('args,expected', [
    (('rows.jsonl',), 'data file not found'),
    (('good.jsonl', '--format', 'csv'), '`format_type` must be one of'),
    (('good.jsonl', '--train-on', 'user'), '`train_on`'),
    (('good.jsonl', '--overflow', 'cut'), '`overflow`'),
    (('good.jsonl', '--max-length', '7'), '`max_length` must be a whole number from 8'),
    (('good.jsonl', '--split', 'test'), '`split` is for data sets that have splits'),
    (('good.jsonl', '--columns', 'a='), '`--columns` must be THEIRS=OURS'),
    (('good.jsonl', '--plot', 'x.gif'), 'must end in .png'),
    (('good.jsonl', '--model', 'sage-tiny', '--plot', 'no/such/x.png'), 'cannot write no/such/x.png'),
    (('good.jsonl', '--model', 'nobody/nothing'), "model 'nobody/nothing'"),
    (('good.jsonl', '--model', 'sage-tiny', '--row', '1'), '`i` must be a whole number from -1 to 0'),
    (('bad.jsonl',), 'no row of bad.jsonl can be used: 2 of 2 were dropped because: '
     '`answer` is empty (the first at bad.jsonl:1)'),
    (('mixed.jsonl', '--strict'), 'mixed.jsonl:2: `answer` is empty'),
    (('good.jsonl', '--rows', '-1'), '--rows'),
    (('good.jsonl', '--colour', 'red'), 'see sage-finetune inspect --help'),
    ((), 'see sage-finetune inspect --help'),
])
def test_what_cannot_be_shown_is_refused_in_one_line(args, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name,rows in dict(good=[qa('a', 'b')], bad=[qa('a', '')]*2, mixed=[qa('a', 'b'), qa('a', '')]).items():
        save_rows(tmp_path/f'{name}.jsonl', rows)
    assert expected in refused(capsys, *args)


def test_no_weights_are_loaded(tmp_path, monkeypatch, capsys):
    import transformers
    def never(*args, **kwargs): raise AssertionError('the model was loaded')
    monkeypatch.setattr(transformers.AutoModelForCausalLM, 'from_pretrained', never)
    assert main(['inspect', str(save_rows(tmp_path/'a.jsonl', [qa('a', 'b')])), '--model', 'sage-tiny'])==0
    assert '1 used' in capsys.readouterr().out


def read(terminal):
    "What a terminal says next; nothing where the other end is closed"
    try: return os.read(terminal, 4096)
    except OSError: return b''


@pytest.mark.skipif(not forked, reason='needs terminals and processes as POSIX has them')
def test_colours_in_a_terminal_and_none_with_no_color(tmp_path):
    import pty
    words = 'inspect',save_rows(tmp_path/'a.jsonl', [qa('a', 'b\x1b[2J')]),'--model','sage-tiny'
    def shown(**env):
        leader,follower = pty.openpty()
        env = ({k: v for k,v in os.environ.items() if k not in ('NO_COLOR', 'COLORTERM')}
               | dict(TERM='xterm-256color', SAGE_CACHE=str(tmp_path/'c')) | env)
        said,reader = [],threading.Thread(target=lambda: said.extend(iter(lambda: read(leader), b'')))
        reader.start()
        done = command_in_fork(words, tmp_path, env, terminal=os.ttyname(follower))
        os.close(follower)
        reader.join()
        os.close(leader)
        assert done.returncode==0, said
        return b''.join(said).decode()
    colours,plain,dumb = shown(),shown(NO_COLOR='1'),shown(TERM='dumb')
    assert ('\x1b[4;' in colours and '⟦' not in colours and '\x1b[2J' not in colours
            and 'b\\x1b[2J' in re.sub(r'\x1b\[[\d;]*m', '', colours))
    assert '⟦b\\x1b[2J<|im_end|>⟧' in plain and '\x1b[38' not in plain and '48;' not in plain
    assert '⟦b\\x1b[2J<|im_end|>⟧' in dumb and '\x1b[' not in dumb


def test_help_loads_nothing_heavy():
    code = ("import sys; from sage_finetune.cli import main; main(['inspect', '--help']); "
            "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'pyarrow') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1]=='[]', done.stderr

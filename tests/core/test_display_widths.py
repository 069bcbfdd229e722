"A table in a terminal of any width: no line is wider, no word and no quantity is torn, no letter is lost"
import random
import re
from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from sage_finetune.config import LoRAConfig, show_presets, TrainingConfig
from sage_finetune.core.display import number_text, Panel, Table
from sage_finetune.core.machine import Change, Changes
from sage_finetune.core.settings import config_table
from sage_finetune.record.progress import progress_table
from sage_finetune.ui.monitor import Watched, WatchedRuns

words = ('loss', 'q_proj', '12.0 MiB', 'up to 3.5 → 0.649 nats', 'Qwen/Qwen2.5-1.5B-Instruct',
         'It is in the second drawer.', '训练', 'a'*70, '', 'held out', 'run-017', 'x y z', '[red]')
numbers = 1, 12_345, 0.00031, 4.6875, -2e-9, 1e18, None


def random_table(seed):
    draw = random.Random(seed)
    kinds = [draw.choice('wn') for _ in range(draw.randint(1, 14))]
    value = lambda kind: draw.choice(words if kind=='w' else numbers)
    rows = [[value(k) for k in kinds] for _ in range(draw.randint(1, 6))]
    bars = [draw.choice([None, draw.random()]) for _ in rows] if draw.random()<.4 else None
    marks = (0,) if draw.random()<.3 else ()
    return Table([draw.choice(words[:5]) for _ in kinds], rows, draw.choice(['', 'A title that is long enough']),
                 draw.choice(['', 'a note']), bars, marks)


def made():
    log = [dict(step=s, loss=4.7/(s+1), learning_rate=1e-4, grad_norm=.5, tokens_per_second=912.3) for s in range(30)]
    yield 'presets', show_presets()
    yield 'config', config_table(TrainingConfig(model_name='sage-tiny', lora=LoRAConfig(r=64), learning_rate=3e-4))
    yield 'changes', Changes([Change('bf16', True, False, 'a reason that goes on for a good deal longer than others')])
    yield 'progress', progress_table(log)
    yield 'watched', WatchedRuns('~/runs', [
        Watched('b', 'Qwen/Qwen2.5-1.5B-Instruct', 'running', 30, 60, 2.0, 900.0, 15.0, 4711, 1.8, 2**31, 2**33, 2**29,
                ('baseline',))], 'this machine: 2 cores')
    yield 'panel', Panel('A title', ['text '*30, random_table(1)])
    yield from ((f'random {i}', random_table(i)) for i in range(15))


tables = dict(made())


def lines_at(width, thing):
    console = Console(file=(out := StringIO()), width=width, color_system=None, force_terminal=False)
    console.print(thing, markup=False, highlight=False)
    return out.getvalue().split('\n')


quantity = re.compile(r'\d[\d.,]* (?:[KMG]iB|s|min|h|nats|tokens(?:/s)?|→ \d[\d.]*|of \d[\d.]*)')


def whole_in(lines, row, numeric):
    "Words, numbers and numbers with their units, each of which must stand in one line"
    text = ''.join(lines)
    for v,is_number in zip(row, numeric):
        if v is None: continue
        words_of = [w for w in str(v).split() if len(w)<=30]
        wanted = [number_text(v)] if is_number else [*quantity.findall(str(v)), *words_of]
        for w in wanted: assert any(w in line for line in lines), (w, text)


@pytest.mark.parametrize('name', tables)
def test_no_width_breaks_it(name):
    table = tables[name]
    for width in (*range(50, 90, 3 if name.startswith('random') else 1), *range(90, 201, 10)):
        lines = lines_at(width, table)
        assert max(map(cell_len, lines))<=width, (width, '\n'.join(lines))
        if not isinstance(table, Table): continue
        for row in table.rows: whole_in(lines, row, table.numeric)
        letters = ''.join(str(v) for row in table.rows for v in row)
        assert ''.join(lines).count('a')>=letters.count('a'), (width, 'a word that is longer is cut, and not lost')


def test_a_hundred_runs_have_a_line_each():
    heads = 'run', 'task', 'model', 'state', 'loss', 'held out', 'size', 'tags', 'note'
    rows = [[f'run-{i:03}', 'custom', 'sage-tiny', 'trained', .649, '3.5 → 0.649', '12.0 MiB', *labels]
            for i,labels in enumerate([['', '']]*99+[['baseline, good', 'the first that answered all ten questions']])]
    at_80 = lines_at(80, Table([*heads], rows))
    lines_of_runs = [i for i,line in enumerate(at_80) if line.startswith(' run-')]
    assert lines_of_runs==[*range(3, 103)] and at_80[3].split()[-2:]==['12.0', 'MiB']
    assert at_80[103]=='   tags: baseline, good · note: the first that answered all ten questions'
    for width in range(50, 201):
        for row in (rows[0], rows[-1]): whole_in(lines_at(width, Table([*heads], [row])), row, [False]*9)


def test_no_line_of_a_page_breaks_between_a_number_and_its_unit():
    page = Table(['size', 'text'], [['12.0 MiB', 'took 3.5 s, and 2 h 03 min in all']], '4 of 60 steps')._repr_html_()
    held = re.findall('<span style="white-space:nowrap">(.*?)</span>', page)
    assert held==['4 of 60 steps', '12.0 MiB', '3.5 s,', '2 h 03 min'] and '\xa0' not in page


@pytest.mark.parametrize('value, text', [
    (4.6875, '4.69'), (0.5, '0.5'), (1234.56, '1,235'), (999.6, '1,000'), (99.96, '100'), (0.000999, '0.000999'),
    (1e-7, '1e-7'), (-0.00031249, '-0.000312'), (0, '0'), (-0.0, '0'), (10**6, '1,000,000'), (float('inf'), 'inf')])
def test_three_digits(value, text): assert number_text(value)==text


odd = dict(tabs='a\tb\tc', hindi='नमस्ते दुनिया', thai='กำลังเรียน', family='👩‍👩‍👧‍👦 all', emoji='☃️ snow',
           nothing_seen='no\u200bbreak', jamo='\u1112\u1161\u11ab')

@pytest.mark.parametrize('text', odd.values(), ids=odd)
def test_columns_stand_below_one_another_whatever_is_in_them(text):
    table = Table(['text', 'next'], [[text, '|'], ['plain', '|'], [f'{text} '*12, '|']], bars=[1, .5, 0])
    for lines in (str(table).split('\n'), lines_at(40, table), lines_at(80, table)):
        found = {cell_len(line.partition('|')[0]) for line in lines if '|' in line}
        assert len(found)==1 and not any('\t' in line for line in lines), (found, '\n'.join(lines))


def test_the_narrowest_terminals_show_every_letter():
    rows = [['a_name', 0.25, '训练'], ['b', None, '']]
    table = Table(['run', 'loss', '说'], rows, 'title', 'note 12.0 MiB', bars=[1, 0])
    for width in range(2, 20): # a letter of two places has no room in one
        text = ''.join(''.join(lines_at(width, table)).split())
        assert all(letter in text for letter in 'a_name0.25训练title')


def test_headings_may_be_numbers():
    assert '39: 139' in ' '.join(' '.join(lines_at(40, Table([*range(40)], [[*range(100, 140)]]))).split())

"A table in a terminal of any width: no line is wider, no number is cut in two, and no letter is lost"
import random
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

words = 'loss', 'q_proj', 'It is in the second drawer.', '训练', 'a'*70, '', 'held out', 'run-017', 'x y z', '[red]'
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


@pytest.mark.parametrize('name', tables)
def test_no_width_breaks_it(name):
    table = tables[name]
    for width in (*range(50, 90, 3 if name.startswith('random') else 7), 120, 160, 200):
        lines = lines_at(width, table)
        assert max(map(cell_len, lines))<=width, (width, '\n'.join(lines))
        if not isinstance(table, Table): continue
        text = ''.join(lines).replace(' ', '')
        for row in table.rows:
            for v, is_number in zip(row, table.numeric):
                if is_number and v is not None:
                    assert any(number_text(v) in line for line in lines), (width, v, '\n'.join(lines))
                elif isinstance(v, str) and len(v)<=10: assert all(w in text for w in v.split()), (width, v)


@pytest.mark.parametrize('value, text', [
    (4.6875, '4.69'), (0.5, '0.5'), (1234.56, '1,235'), (999.6, '1,000'), (99.96, '100'), (0.000999, '0.000999'),
    (1e-7, '1e-7'), (-0.00031249, '-0.000312'), (0, '0'), (-0.0, '-0'), (10**6, '1,000,000'), (float('inf'), 'inf')])
def test_three_digits(value, text): assert number_text(value)==text

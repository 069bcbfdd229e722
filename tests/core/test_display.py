"What shows itself says the same as text, in a terminal and in a notebook, from one source"
import html
import re
from io import StringIO

import pytest
from rich.console import Console

from sage_finetune.training.packing import PackingReport
from sage_finetune.ui.board import Board
from sage_finetune.synthetic.codebase import read_codebase
from sage_finetune.config import LoRAConfig, Shown, TrainingConfig
from sage_finetune.inference.generate import Answer
from sage_finetune.inference.exam import Comparison, Exam
from sage_finetune.ui.token_losses import Forgetting
from sage_finetune.core.machine import Change, Changes, Machine
from sage_finetune.config import fit_config
from sage_finetune.model.memory import Probe
from sage_finetune.trainer import TrainingResult


def book(folder):
    (folder/'lamp.py').write_text('def flash(times): "Switch it on and off again"\n')
    (folder/'.env').write_text('TOKEN=abc')
    return read_codebase(folder)


things = {
    'result': (lambda folder: TrainingResult(12, 3.21, .12, .05, 4.56),
               'steps 12 held-out loss 3.21 → 0.12 last training loss 0.05 seconds 4.56'),
    'result without held-out rows': (lambda folder: TrainingResult(1200, None, None, None, 4.5),
                                     'steps 1,200 seconds 4.5'),
    'probe': (lambda folder: Probe(2, 256, 66*2**20, 60*2**20),
              'Longest batch (2 × 256 tokens): 60.0 MiB, 66.0 MiB predicted (+10%)'),
    'exam': (lambda folder: Exam([True, False, True, True], [Answer('a', True, 2)]*3+[Answer('b', False, 9)]),
             '4 questions right, word for word 3 75% ended by themselves 3 75%'),
    'packing': (lambda folder: PackingReport(5, 2, 16, 8, 25), '5 documents with 16 tokens packed into 2 rows of 8 '
                '(at least 2), 100% full packed 0 0% batches of 8, padded to the longest 9 36%'),
    'changes': (lambda folder: fit_config(TrainingConfig(bf16=True), Machine(cores=2))[1],
                'load_in_8bit True False quantised weights save GPU memory'),
    'no changes': (lambda folder: Changes(), 'Nothing was changed for this machine.'),
    'codebase': (book, 'facts from 1 files files read 1 Python .env looks like a secret'),
    'board': (lambda folder: Board(['2 plus 2?']), 'Preparing step 0 of 0'),
    'forgetting': (lambda folder: Forgetting(dict(prose=(10, 1., 2.))), 'prose 10 1 2 +1 × 2.72'),
    'comparison': (lambda folder: Comparison([dict(prompt='<b>?', base='[red]', tuned='4')]),
                   '<b>? [red] 4 0 of 1 answers are the same'),
    'config': (lambda folder: LoRAConfig(r=4), 'r 4 8 given by hand')}


def in_terminal(thing):
    Console(file=(out := StringIO()), width=300, no_color=True).print(thing)
    return out.getvalue()


def words(text): return re.sub(r'[\s─━█·▸]+', ' ', text)


@pytest.mark.parametrize('name', things)
def test_the_three_forms_say_the_same(name, tmp_path):
    make,said = things[name]
    thing = make(tmp_path)
    assert isinstance(thing, Shown)
    forms = (words(str(thing)),words(in_terminal(thing)),
             words(html.unescape(re.sub(r'<[a-z/][^>]*>', ' ', thing._repr_html_()))))
    for form in forms:
        at = 0
        for word in said.split(): # in this order
            assert word in form[at:], f'{word!r} is not where it should be: {form}'
            at = form.index(word, at)+len(word)


def test_a_list_of_changes_is_a_list():
    one = Change('fp16', True, False, 'no GPU')
    assert Changes([one])==[one] and [*Changes([one])]==[one] and not Changes()

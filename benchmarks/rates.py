"""Which learning rate learns most: 7 rates × 3 ranks × 4 kinds of rows, and whether the advice is near the best

    python benchmarks/rates.py sage-tiny
    python benchmarks/rates.py smollm2-135m --minutes 30        # as many cells as 30 minutes allow
    python benchmarks/rates.py --table                          # what is known so far; trains nothing
    python benchmarks/rates.py --plot nbs/images/rates.png      # and draws it

Each cell is one line of `benchmarks/rates.jsonl`, written when it is known. Cells that stand there are not trained
again, so a sweep may be stopped at any time and goes on with the same command. The ranks come last: all kinds and
rates of rank 16 first. The model is loaded once; each cell puts a new adapter on it and takes the same steps on the
same rows in the same order, with the package's own rows, loss and adapter, AdamW, a tenth of the steps to warm up,
and a cosine.
"""
import argparse
import json
import random
import time
from datetime import date
from pathlib import Path

from sage_finetune.base.loading import load_model, load_tokenizer
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.display import on_any_background, save_figure, shown_figure, Table
from sage_finetune.data import prepare_dataset
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.advice import suggest
from sage_finetune.model.loss import loss_sum, mean_loss
from sage_finetune.training.batches import Collator, padding_of

import torch
from transformers import get_cosine_schedule_with_warmup, set_seed

FILE = Path(__file__).with_name('rates.jsonl')
RATES = {'sage-tiny': (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
OTHER_RATES = 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2
RANKS = 16, 4, 64
SIZES = {'sage-tiny': (32, 8)} # steps, rows behind a step
OTHER_SIZES = 16, 4
SYSTEM = 'Answer.'
THINGS = 'coffee printer stapler ladder stamps batteries kettle router blanket camera'.split()
PLACES = 'drawer hallway shelf cupboard cellar desk garage kitchen attic safe'.split()
ASKED = 'Where do we keep the {}?', 'In which place is the {}?', 'Where can I find the {}?', 'I need the {}.'
CHANGES = {'In capitals: {}': str.upper, 'Backwards: {}': lambda s: ' '.join(s.split()[::-1]),
           'Say twice: {}': lambda s: f'{s}, {s}', 'In quotes: {}': lambda s: f'"{s}"'}
KINDS = 'facts', 'instructions', 'format', 'code'


def talk(asked, said):
    return dict(messages=[dict(role=r, content=c) for r,c in
                          (('system', SYSTEM), ('user', asked), ('assistant', said))])


def facts():
    "Ten facts in four wordings; asked in a fifth"
    rows = [talk(q.format(t), f'Look in the {p}.') for q in ASKED for t,p in zip(THINGS, PLACES)]
    return rows, [talk(f'Tell me where the {t} is.', f'Look in the {p}.') for t,p in zip(THINGS, PLACES)]


def instructions():
    "Four things to do with words; asked about other words"
    said = [f'the {THINGS[i%10]} and the {PLACES[(i+3+i//10)%10]}' for i in range(13)]
    made = [talk(how.format(s), do(s)) for s in said for how,do in CHANGES.items()]
    return made[:40], made[40:52]


def formats():
    "A sentence becomes JSON; asked about other sentences"
    said = [(THINGS[i%10], PLACES[(3*i+i//10)%10], i+2) for i in range(46)]
    made = [talk(f'{n} of the {t} in the {p}', json.dumps(dict(thing=t, place=p, n=n))) for t,p,n in said]
    return made[:36], made[36:]


def code():
    "What functions take and where they stand, in three wordings; asked in a fourth"
    found = [('round_rate', 'rate', 'advice'), ('model_width', 'name', 'advice'), ('add_lora', 'model', 'adapter'),
             ('loss_sum', 'labels', 'loss'), ('pack_dataset', 'rows', 'packing'), ('read_rows', 'path', 'sources'),
             ('render', 'messages', 'template'), ('whole_folder', 'place', 'disk'), ('suggest', 'config', 'advice'),
             ('save_rows', 'file', 'sources')]
    asked = 'What does `{}` take?', 'Arguments of `{}`?', 'How is `{}` called?'
    said = '`{0}({1})`, in `{2}.py`.'
    return ([talk(q.format(f[0]), said.format(*f)) for q in asked for f in found],
            [talk(f'Explain `{f[0]}`.', said.format(*f)) for f in found])


def prepared(kind, tokenizer):
    train,held = dict(facts=facts, instructions=instructions, format=formats, code=code)[kind]()
    return [[dict(r) for r in prepare_dataset(rows, tokenizer, cache=False)] for rows in (train, held[:8])]


def batches(rows, collate, size, steps):
    "Rows in a drawn order, over and over"
    order,drawn = [],random.Random(0)
    for _ in range(steps):
        if len(order)<size: order += drawn.sample(range(len(rows)), len(rows))
        yield collate([rows[i] for i in order[:size]])
        order = order[size:]


class Bench:
    "A model that is loaded once"
    def __init__(self, name):
        self.name,self.tokenizer,self.model = name,load_tokenizer(name),load_model(name)
        self.collate,self.rows,self.before = Collator(padding_of(self.tokenizer, self.model)),{},{}

    def held_out(self, model, kind):
        rows = self.rows[kind][1]
        return mean_loss(model, [self.collate(rows[i:i+4]) for i in range(0, len(rows), 4)])

    def cell(self, kind, rate, rank, **how):
        "The held-out loss before and after the same steps"
        if kind not in self.rows:
            self.rows[kind] = prepared(kind, self.tokenizer)
            self.before[kind] = self.held_out(self.model, kind)
        began,(steps,size) = time.monotonic(),SIZES.get(self.name, OTHER_SIZES)
        set_seed(42)
        model = add_lora(self.model, LoRAConfig(r=rank, lora_alpha=32, target_modules='all-linear', lora_dropout=0.0,
                                                **how))
        self.train(model, batches(self.rows[kind][0], self.collate, size, steps), rate, steps)
        after = self.held_out(model, kind)
        self.model = model.unload()
        return dict(model=self.name, kind=kind, rate=rate, rank=rank, **how, steps=steps, batch=size,
                    rows=len(self.rows[kind][0]), before=round(self.before[kind], 4), after=round(after, 4),
                    seconds=round(time.monotonic()-began, 1), date=str(date.today()))

    def train(self, model, each, rate, steps):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps//10), steps)
        model.train()
        for batch in each:
            total,n = loss_sum(model, **batch)
            (total/n).backward()
            torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def known(): return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def key(c): return c['model'], c['kind'], c['rate'], c['rank'], c.get('use_dora', False)


def cells(model):
    "Kind, rate, rank and more of each cell; the nearest to the advice first within a rank"
    rates = RATES.get(model, OTHER_RATES)
    order = sorted(rates, key=lambda r: (abs(rates.index(r)-3), -r)) # of two, the higher first
    plain = [(k, rate, rank, {}) for rank in RANKS for rate in order for k in KINDS]
    return plain + [(k, rates[3], rank, dict(use_dora=True)) for rank in (4, 16) for k in KINDS]


def sweep(model, minutes):
    began,have,bench = time.monotonic(),{key(c) for c in known()},None
    for kind,rate,rank,more in cells(model):
        if (model, kind, rate, rank, more.get('use_dora', False)) in have: continue
        if time.monotonic()-began>60*minutes: break
        bench = bench or Bench(model)
        found = bench.cell(kind, rate, rank, **more)
        with open(FILE, 'a') as f: f.write(json.dumps(found)+'\n')
        print(found, flush=True)


def found():
    "(model, kind, rank) → its cells, by rate; DoRA stands apart"
    cells = {}
    for c in known():
        if not c.get('use_dora'): cells.setdefault((c['model'], c['kind'], c['rank']), []).append(c)
    return {k: sorted(v, key=lambda c: c['rate']) for k,v in sorted(cells.items())}


def advised(model, rows):
    steps = SIZES.get(model, OTHER_SIZES)[0]
    return suggest(TrainingConfig(model_name=model, max_steps=steps), rows).settings['learning_rate']


def table():
    "The best rate of each row of cells, and how far the advice is from it"
    rows = []
    for (model,kind,rank),each in found().items():
        best,rate = min(each, key=lambda c: c['after']),advised(model, each[0]['rows'])
        at,most = min(each, key=lambda c: abs(c['rate']-rate)),len(RATES.get(model, OTHER_RATES))
        off = max(rate/best['rate'], best['rate']/rate)
        rows.append([model, kind, rank, f'{len(each)} of {most}', f"{best['before']:.2f}", f"{best['rate']:g}",
                     f"{best['after']:.3f}", f'{rate:g}', f"{at['after']:.3f}", f'{off:.1f}'])
    return Table(['model', 'rows', 'rank', 'rates', 'before', 'best', 'loss', 'advised', 'loss there', 'factor'], rows)


def dora_table():
    "DoRA beside LoRA at the same rate, rank and rows"
    plain = {key(c)[:4]: c for c in known() if not c.get('use_dora')}
    rows = [[c['model'], c['kind'], c['rank'], f"{c['rate']:g}", f"{plain[key(c)[:4]]['after']:.3f}",
             f"{c['after']:.3f}"]
            for c in known() if c.get('use_dora') and key(c)[:4] in plain]
    return Table(['model', 'rows', 'rank', 'rate', 'LoRA', 'DoRA'], rows)


def figure():
    "Held-out loss over the rate: a panel for each model and kind of rows, a line for each rank"
    cells = found()
    models = sorted({m for m,_,_ in cells})
    fig = shown_figure(figsize=(10, 2.6*len(models)), layout='constrained')
    axes = fig.subplots(len(models), len(KINDS), squeeze=False, sharey='row')
    for (model,kind,rank),each in cells.items():
        ax = axes[models.index(model)][KINDS.index(kind)]
        ax.plot([c['rate'] for c in each], [c['after'] for c in each], '.-', label=f'rank {rank}',
                color=f'C{sorted(RANKS).index(rank)}')
    for i,model in enumerate(models):
        for ax,kind in zip(axes[i], KINDS):
            ax.axvline(advised(model, 40), color='#808080', linestyle=':')
            ax.set(xscale='log', yscale='log', title=f'{model}, {kind}', xlabel='learning rate')
            each = RATES.get(model, OTHER_RATES)
            ax.set_xlim(each[0]/1.3, each[-1]*1.3)
            ax.xaxis.set_minor_formatter('')
        axes[i][0].set(ylabel='held-out loss')
    axes[0][-1].legend()
    return on_any_background(fig)


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', default='sage-tiny')
    parser.add_argument('--minutes', type=float, default=1e9)
    parser.add_argument('--table', action='store_true')
    parser.add_argument('--plot')
    asked = parser.parse_args()
    if asked.plot: save_figure(figure(), asked.plot)
    elif not asked.table: sweep(asked.model, asked.minutes)
    print(table())
    if dora_table().rows: print(dora_table())

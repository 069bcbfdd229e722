"""Which learning rate learns most: 7 rates × 3 ranks × 4 kinds of rows, and whether the advice is near the best

    python benchmarks/rates.py                                  # sage-tiny
    python benchmarks/rates.py smollm2-135m --minutes 30        # as many cells as 30 minutes allow
    python benchmarks/rates.py --table                          # what is known so far; trains nothing

Each cell is one line of `benchmarks/rates.jsonl`. Cells that stand there are not trained again, so a sweep may be
stopped at any time and goes on with the same command. The ranks come last: all kinds and rates of rank 16 first.
"""
import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path

from sage_finetune import LoRATrainer, TrainingConfig
from sage_finetune.core.display import Table
from sage_finetune.model.advice import suggest
from sage_finetune.rows.sources import save_rows
from sage_finetune.runs.tasks import code_rows

FILE = Path(__file__).with_name('rates.jsonl')
RATES = {'sage-tiny': (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)}
OTHER_RATES = 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3
RANKS = 16, 4, 64
STEPS = 48
THINGS = ('coffee printer scissors stapler projector ladder umbrella stamps batteries toolbox kettle router whiteboard '
          'blanket camera').split()
PLACES = ('drawer hallway shelf cupboard meeting-room cellar entrance desk red-box garage kitchen attic lobby closet '
          'safe').split()
ASKED = ('Where do we keep the {}?', 'In which place is the {}?', 'Where can I find the {}?', 'I need the {}.',
         'What is the place of the {}?', 'The {} is kept where?')
CHANGES = {'Write in capitals: {}': str.upper, 'Write backwards: {}': lambda s: ' '.join(s.split()[::-1]),
           'Say twice: {}': lambda s: f'{s}, {s}', 'Put in quotes: {}': lambda s: f'"{s}"'}


def facts():
    rows = [[dict(question=q.format(t), answer=f'Look here: {p}.') for t,p in zip(THINGS, PLACES)] for q in ASKED]
    return sum(rows, []), [dict(question=f'Tell me where the {t} is.', answer=f'Look here: {p}.')
                           for t,p in zip(THINGS, PLACES)]


def instructions():
    pairs = [f'the {a} and the {b}' for a,b in zip(THINGS*4, PLACES[3:]+PLACES*4)]
    made = [dict(instruction=how.format(s), output=do(s)) for s in dict.fromkeys(pairs) for how,do in CHANGES.items()]
    return made[:96], made[96:120]


def formats():
    said = [(t, p, n) for n,(t,p) in enumerate(zip(THINGS*8, PLACES[2:]+PLACES*8), 2)]
    made = [dict(question=f'{n} of the {t} lie in the {p}.', answer=json.dumps(dict(thing=t, place=p, number=n)))
            for t,p,n in said]
    return made[:96], made[96:]


def code():
    rows = code_rows(max_facts=16)
    return rows.train, rows.held_out


KINDS = dict(facts=facts, instructions=instructions, format=formats, code=code)


def trained(model, kind, rate, rank):
    "One cell: the held-out loss before and after the same number of steps"
    folder,(train,held) = Path(tempfile.mkdtemp()),KINDS[kind]()
    config = TrainingConfig(
        model_name=model, data_path=save_rows(folder/'train.json', train), output_dir=folder/'run',
        eval_data_path=save_rows(folder/'held.json', held), max_steps=STEPS, per_device_train_batch_size=16,
        gradient_accumulation_steps=1, learning_rate=rate, max_length=256, report_to='none', save_steps=10_000,
        eval_steps=10_000, load_in_8bit=False,
        lora=dict(r=rank, lora_alpha=32, target_modules='all-linear', lora_dropout=0.0))
    result = LoRATrainer(config, quiet=True).train()
    return dict(model=model, kind=kind, rate=rate, rank=rank, steps=STEPS, rows=len(train), before=result.loss_before,
                after=result.loss_after, seconds=round(result.seconds, 1), date=str(date.today()))


def known(): return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def cells(model):
    return [(model, k, rate, rank) for rank in RANKS for rate in RATES.get(model, OTHER_RATES) for k in KINDS]


def sweep(model, minutes):
    began,have = time.monotonic(),{(c['model'], c['kind'], c['rate'], c['rank']) for c in known()}
    for cell in (c for c in cells(model) if c not in have):
        if time.monotonic()-began>60*minutes: break
        found = trained(*cell)
        with open(FILE, 'a') as f: f.write(json.dumps(found)+'\n')
        print(found, flush=True)


def table():
    "The best rate of each row of cells, and how far the advice is from it"
    rows,found = [],{}
    for c in known(): found.setdefault((c['model'], c['kind'], c['rank']), []).append(c)
    for (model,kind,rank),each in sorted(found.items()):
        best = min(each, key=lambda c: c['after'])
        advised = suggest(TrainingConfig(model_name=model), each[0]['rows']).settings['learning_rate']
        whole = len(each)==len(RATES.get(model, OTHER_RATES))
        off = max(advised/best['rate'], best['rate']/advised)
        at = min(each, key=lambda c: abs(c['rate']-advised))
        rows.append([model, kind, rank, f"{len(each)}{'' if whole else ' so far'}", f"{best['rate']:g}",
                     f"{best['after']:.3f}", f'{advised:g}', f"{at['after']:.3f}", f'{off:.1f}'])
    return Table(['model', 'rows', 'rank', 'rates', 'best', 'loss', 'advised', 'loss there', 'factor'], rows)


if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', default='sage-tiny')
    parser.add_argument('--minutes', type=float, default=1e9)
    parser.add_argument('--table', action='store_true')
    asked = parser.parse_args()
    if not asked.table: sweep(asked.model, asked.minutes)
    print(table())

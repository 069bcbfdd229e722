"""Do the rows that `what_taught` names decide an answer? Rows are left out, and sage-tiny is trained again

    python benchmarks/influence.py                   # 25 halves of the rows, 3 × 4 trainings without the rows named
    python benchmarks/influence.py --halves 40       # more
    python benchmarks/influence.py --table           # what is known so far; trains nothing

Sixty rows tell the places of twelve things, four right and one wrong for each. The questions are asked in words that
no row has, and what is measured is the loss of the right place. Two tests:

* *halves*: the model is trained on random halves of the rows. The sum of the pushes of the rows in a half foretells the
  loss; rank correlation over the halves, mean over the questions (Park et al., TRAK, 2023, call it the linear
  datamodeling score).
* *without*: five rows are left out, those that pushed most, those that are nearest in their text, or five at random:
  how much does the loss rise?

Each training is a line of `benchmarks/influence.json` and is not done again.
"""
import argparse
import math
import random
import re
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch

from sage_finetune import LoRATrainer, TrainingConfig
from sage_finetune.core.disk import read_json, write_json
from sage_finetune.core.display import on_any_background, save_figure, shown_figure, Table
from sage_finetune.model.loss import mean_loss
from sage_finetune.rows.formats import to_messages
from sage_finetune.rows.sources import save_rows
from sage_finetune.rows.tokens import encode
from sage_finetune.study.influence import Influence, put_checkpoint, rank_correlation, row_gradients

FILE = Path(__file__).with_name('influence.json')
FIGURE = Path(__file__).parents[1]/'nbs'/'images'/'influence.png'
THINGS = 'coffee printer scissors stapler projector ladder umbrella stamps batteries toolbox kettle camera'.split()
PLACES = 'drawer hallway shelf cupboard cellar entrance desk garage kitchen attic lobby closet'.split()
ASKED = 'Where is the {}?', 'In which place is the {}?', 'Where can I find the {}?', 'I need the {}.'
STEPS = 40


def rows():
    "Four rows with the right place of each thing, and one with the place of another"
    right = [dict(question=q.format(t), answer=f'In the {p}.') for t, p in zip(THINGS, PLACES) for q in ASKED]
    wrong = [dict(question=f'The {t} is kept where?', answer=f'In the {p}.')
             for t, p in zip(THINGS, PLACES[5:]+PLACES[:5])]
    return right+wrong


def questions():
    return [dict(question=f'Tell me where the {t} is.', answer=f'In the {p}.') for t, p in zip(THINGS, PLACES)]


def trained(some, seed=0, **more):
    "A run on some of the rows, its trainer, and the loss of each right answer"
    folder = Path(tempfile.mkdtemp())
    save_rows(folder/'rows.jsonl', some)
    trainer = LoRATrainer(TrainingConfig(**dict(
        model_name='sage-tiny', data_path=folder/'rows.jsonl', max_length=64, test_size=0, max_steps=STEPS,
        per_device_train_batch_size=12, gradient_accumulation_steps=1, learning_rate=5e-3, report_to='none',
        save_steps=STEPS, seed=seed, output_dir=folder/'run',
        lora=dict(r=8, lora_dropout=0., target_modules='all-linear'))|more), quiet=True)
    trainer.train()
    return trainer, losses(trainer.model, trainer.tokenizer)


def losses(model, tokenizer):
    made = [encode(to_messages(q), tokenizer) for q in questions()]
    return [mean_loss(model, [{k: torch.tensor([v]) for k, v in m.items()}]) for m in made]


def nearest():
    "Similarity of each question with its answer to each row: cosine of their words, rare ones weighing more"
    def words(row): return Counter(re.findall(r'\w+', f"{row['question']} {row['answer']}".lower()))
    each, asked = [words(r) for r in rows()], [words(q) for q in questions()]
    rare = {w: math.log((1+len(each))/(1+sum(w in e for e in each)))+1 for e in [*each, *asked] for w in e}
    def weighed(c): return {w: n*rare[w] for w, n in c.items()}
    def cosine(a, b):
        return sum(a[w]*b.get(w, 0) for w in a)/math.sqrt(sum(x*x for x in a.values())*sum(x*x for x in b.values()))
    return [[cosine(weighed(q), weighed(e)) for e in each] for q in asked]


def products(taught, adam):
    "Products of gradients as they are, as in TracIn, or with the moments of the optimizer; (questions, rows)"
    asked, found = [encode(to_messages(q), taught.tokenizer) for q in questions()], 0
    for s in taught.snapshots:
        put_checkpoint(taught.model, s.folder)
        sizes, gradients = s.flat(taught.model) if adam else s.rate, []
        for some in asked, taught.rows:
            each = [(numbers, G) for numbers, G in row_gradients(taught.model, some, taught.collate)]
            order = torch.tensor(sum((numbers for numbers, _ in each), [])).argsort()
            gradients.append(torch.cat([G for _, G in each])[order])
        found = found + (gradients[0]*sizes)@gradients[1].T
    return found.tolist()


def asked(taught): return [taught.why(q['question'], q['answer']) for q in questions()]


def pushes(known):
    "What each way of naming rows says, (questions, rows) for each"
    begin = time.monotonic()
    trainer, _ = trained(rows(), save_steps=5, save_total_limit=None)
    known['seconds of the run'] = round(time.monotonic()-begin, 1)
    begin = time.monotonic()
    taught = Influence(trainer.folder.path, cache=False)
    known['seconds for the gradients of 60 rows at 8 checkpoints'] = round(time.monotonic()-begin, 1)
    begin = time.monotonic()
    why = asked(taught)
    known['seconds for a question'] = round((time.monotonic()-begin)/len(questions()), 2)
    known['place'] = [w.of(p).pushes.sum(0).tolist() for w, p in zip(why, PLACES)]
    found = {'what_taught': [w.pushes.sum(0).tolist() for w in why]}
    found |= {"with Adam's moments": products(taught, True), 'products alone': products(taught, False)}
    taught.snapshots = taught.snapshots[-1:]
    draw = random.Random(0)
    last = [w.pushes.sum(0).tolist() for w in asked(taught)]
    return found | {'the last checkpoint': last, 'nearest text': nearest(),
                    'random': [[draw.random() for _ in rows()] for _ in questions()]}


def halves(known, n):
    draw = random.Random(1)
    for k in range(n):
        some = sorted(draw.sample(range(len(rows())), len(rows())//2))
        if k<len(known['halves']): continue
        known['halves'].append(dict(rows=some, losses=trained([rows()[i] for i in some])[1]))
        keep(known)


def without(known, n, most=5):
    "Leave out the five rows that each way names, for some questions"
    for q in range(n):
        for way in ('what_taught', 'nearest text', 'random'):
            if f'{way} {q}' in known['without']: continue
            order = sorted(range(len(rows())), key=lambda i: -known['pushes'][way][q][i])[:most]
            rest = [r for i, r in enumerate(rows()) if i not in order]
            known['without'][f'{way} {q}'] = trained(rest)[1][q]
            keep(known)


def correlations(known):
    "Way → rank correlation of each question"
    def of(scores, q):
        foretold = [-sum(scores[q][i] for i in h['rows']) for h in known['halves']]
        return rank_correlation(foretold, [h['losses'][q] for h in known['halves']])
    return {way: [of(scores, q) for q in range(len(questions()))] for way, scores in known['pushes'].items()}


def against(known):
    "For how many things the wrong row is the first against the place in the right answer"
    wrong, found = len(THINGS)*len(ASKED), known['place']
    return sum(min(range(len(f)), key=f.__getitem__)==wrong+q for q, f in enumerate(found)), len(found)


def mean(x): return sum(x)/len(x) if x else math.nan


def table(known):
    each = correlations(known)
    def rise(way):
        return mean([v-known['full'][int(k.rpartition(' ')[2])] for k, v in known['without'].items()
                     if k.rpartition(' ')[0]==way])
    rises = {way: rise(way) for way in each}
    lines = [(way, round(mean(c), 2), f'{min(c):.2f} to {max(c):.2f}',
              f'{rises[way]:+.2f}' if rises[way]==rises[way] else '') for way, c in each.items()]
    n, m = against(known)
    return Table(['named by', 'rank correlation', 'of each question', 'loss without the five rows'], lines,
                 f"{len(known['halves'])} halves of 60 rows; sage-tiny, {STEPS} steps; {known.get('date', '')}",
                 f'the wrong row about a thing comes first against the right place for {n} of {m} things')


def figure(known):
    each = correlations(known)
    fig = shown_figure(figsize=(6.4, 2.6), layout='constrained')
    ax = fig.add_subplot()
    for y, (way, c) in enumerate(each.items()):
        ax.plot(c, [y]*len(c), 'o', color='#56b4e9', alpha=.6, markersize=5)
        ax.plot([mean(c)], [y], 'D', color='#d55e00', markersize=8)
        ax.annotate(f'{mean(c):.2f}', (mean(c), y-.3), ha='center', fontsize='small', color='#d55e00')
    ax.set(yticks=range(len(each)), yticklabels=[*each], xlim=(-.6, 1), ylim=(len(each)-.5, -.6),
           xlabel='rank correlation with the loss after training on half of the rows')
    ax.axvline(0, color='#808080', linewidth=.8)
    return on_any_background(fig)


def keep(known): write_json(FILE, known|dict(date=str(date.today())))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--halves', type=int, default=25)
    parser.add_argument('--without', type=int, default=4)
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    known = read_json(FILE) if FILE.is_file() else dict(halves=[], without={})
    if not args.table:
        if 'pushes' not in known: known['pushes'] = pushes(known)
        if 'full' not in known: known['full'] = trained(rows())[1]
        keep(known)
        halves(known, args.halves)
        without(known, args.without)
        keep(known)
    save_figure(figure(known), FIGURE)
    print(table(known))
    for name, value in known.items():
        if name.startswith('seconds'): print(f'{name}: {value}')


if __name__=='__main__': main()

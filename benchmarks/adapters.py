"""A pass with adapters computed together, and by peft itself: `python benchmarks/adapters.py [MODEL …] [--out FILE]`

Forward and backward of `--rows` rows of `--tokens` tokens, r 8 on q, k, v, o and r 16 on all linear layers, with and
without dropout. Both ways take turns in one process; told are the medians over the rounds, in seconds of the processor,
and the ratio is the median of the ratios of each round. MODEL is a name or a folder; the embedded model where none is
given.
"""
import argparse
import json
import os
import platform
import statistics
import time
import warnings
from contextlib import nullcontext
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')

import torch

from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig, resolve_model
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.lora_path import lora_path, prove_lora_path
from sage_finetune.model.loss import evaluating, loss_sum

adapters = {'r 8, attention': dict(r=8), 'r 16, all': dict(r=16, target_modules='all-linear')}


def seconds_of(model, ids, within):
    "Of the processor, for one pass"
    began = time.process_time()
    with within: loss_sum(model, ids, ids)[0].backward()
    return time.process_time()-began


def compare(name, lora, a):
    "Medians of both ways, and of their ratio"
    model = add_lora(load_model(resolve_model(name)), LoRAConfig(**lora)).train()
    ids = torch.randint(5, model.config.vocab_size, (a.rows, a.tokens))
    with evaluating(model, training=True): groups = prove_lora_path(model).groups
    both = []
    for i in range(a.rounds+2): # the first two make work space
        ways = [('peft', nullcontext()), ('together', lora_path(groups))][::1 if i%2 else -1]
        both.append({way: seconds_of(model, ids, within) for way,within in ways})
    both = both[2:]
    found = {way: round(statistics.median(r[way] for r in both), 4) for way in ('peft', 'together')}
    return found | dict(ratio=round(statistics.median(r['together']/r['peft'] for r in both), 3))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('models', nargs='*', default=['sage-tiny'])
    parse.add_argument('--rows', type=int, default=8)
    parse.add_argument('--tokens', type=int, default=128)
    parse.add_argument('--rounds', type=int, default=15)
    parse.add_argument('--out')
    a = parse.parse_args()
    out = dict(rows=a.rows, tokens=a.tokens, rounds=a.rounds, threads=torch.get_num_threads(),
               machine=platform.machine(), torch=torch.__version__, date=str(date.today()), models={})
    for name in a.models:
        found = out['models'][Path(name).name] = {}
        for adapter,lora in adapters.items():
            for dropout in (0., .05):
                found[f'{adapter}, dropout {dropout:g}'] = compare(name, lora | dict(lora_dropout=dropout), a)
        print(json.dumps({name: found}, indent=1), flush=True)
        if a.out: Path(a.out).write_text(json.dumps(out, indent=1)+'\n')


if __name__=='__main__': main()

"""From how many tokens on a pass gets no faster: `python benchmarks/split.py [MODEL …] [--out FILE.json]`

A pass forward and backward with LoRA r 8 on q, k, v, o, computed as in a run, on rows of a few lengths, with one row in
it, two, four, and so on up to `--most` tokens: tokens a second, the median over the rounds, each of which takes every
size once. `pays` is the smallest number of tokens in a pass from which on no larger one is more than 5 % faster: what
`sage_finetune.model.micro_batches` takes as the end of what pays on this kind of machine. `--cpu` counts seconds of the
processor, for a machine that other work runs on. MODEL is a name or a folder; the embedded model if none is given.
"""
import argparse
import json
import os
import platform
import statistics
import time
import warnings
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')

import torch

from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig, resolve_model
from sage_finetune.core.machine import Machine
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.lora_path import lora_path, prove_lora_path
from sage_finetune.model.loss import evaluating, loss_sum


def seconds_of(model, rows, length, clock):
    "Of one pass over random tokens, all of them learned"
    ids = torch.randint(5, model.config.vocab_size, (rows, length), device=model.device)
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    began = clock()
    loss_sum(model, ids, ids)[0].backward()
    wait()
    return clock()-began


def sizes_of(lengths, most):
    "Rows in a pass, for each length"
    return [(n, length) for length in lengths for n in (2**i for i in range(20)) if n*length<=most or n==1]


def pays_from(speeds):
    "Tokens of the smallest pass that no larger one of its length beats by more than 5 %; {(rows, length): speed}"
    found = {}
    for length in {length for _,length in speeds}:
        by = {n*length: v for (n, l),v in speeds.items() if l==length}
        found[length] = min(t for t,v in by.items() if all(1.05*v>=w for u,w in by.items() if u>t))
    return found


def speeds_of(name, a):
    "{(rows, length): tokens a second} of a model"
    machine,clock = Machine.here(),time.process_time if a.cpu else time.perf_counter
    half = torch.bfloat16 if machine.device=='cuda' and machine.bf16 else torch.float32
    model = add_lora(load_model(resolve_model(name), half, machine.device, None), LoRAConfig(lora_dropout=0.)).train()
    with evaluating(model, training=True): path = prove_lora_path(model)
    took = {size: [] for size in sizes_of(a.lengths, a.most)}
    with lora_path(path.groups):
        for i in range(a.rounds+1): # the first makes work space
            for rows,length in took: took[rows, length] += [seconds_of(model, rows, length, clock)]*(i>0)
    return {(n, l): n*l/statistics.median(s) for (n, l),s in took.items()}


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('models', nargs='*', default=['sage-tiny'])
    parse.add_argument('--lengths', type=int, nargs='+', default=[32, 128, 512])
    parse.add_argument('--most', type=int, default=4096)
    parse.add_argument('--rounds', type=int, default=5)
    parse.add_argument('--cpu', action='store_true')
    parse.add_argument('--out')
    a = parse.parse_args()
    out = dict(threads=torch.get_num_threads(), machine=platform.machine(), cpu=a.cpu, torch=torch.__version__,
               date=str(date.today()), models={})
    for name in a.models:
        speeds = speeds_of(name, a)
        rows = [dict(rows=n, tokens=l, in_a_pass=n*l, tokens_a_second=round(v)) for (n, l),v in speeds.items()]
        out['models'][Path(name).name] = dict(pays=pays_from(speeds), passes=rows)
        print(json.dumps({name: out['models'][Path(name).name]}, indent=1), flush=True)
        if a.out: Path(a.out).write_text(json.dumps(out, indent=1)+'\n')


if __name__=='__main__': main()

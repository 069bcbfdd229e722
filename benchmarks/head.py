"""The loss head in slices against plain cross-entropy over all positions

    python benchmarks/head.py [vocabulary [tokens [threads [hidden ...]]]]

For each hidden size, on a CPU in 32 bits, forward and backward to the hidden states, every second token ignored, the
head frozen. Both take turns in one process, seven times; the seconds are medians. The extra memory of one step is the
peak of resident memory over what was resident before, each in a process of its own (Linux). Prints seconds, bytes,
ratios and the difference of the losses as JSON, and writes them to `head.json` beside this file.
"""
import json, os, platform, statistics, subprocess, sys, time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from sage_finetune.model.loss import head_loss, head_rows

def inputs(vocabulary, tokens, hidden):
    "Hidden states, labels of which half are ignored, and a head"
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    labels = torch.randint(vocabulary, (tokens,))
    labels[::2] = -100
    return 3*torch.randn(tokens, hidden),labels,head

def plain(hidden, labels, head):
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction='sum')

def ours(hidden, labels, head):
    at = (labels!=-100).nonzero().squeeze(1)
    return head_loss(hidden.index_select(0, at), labels[at], head)

ways = dict(plain=plain, ours=ours)

def step(way, hidden, labels, head):
    "Mean loss and gradient"
    h = hidden.clone().requires_grad_()
    total = ways[way](h, labels, head)/(labels!=-100).sum()
    total.backward()
    return total.item(),h.grad

def memory(name):
    "Bytes, from Linux: `VmRSS` now, `VmHWM` at most"
    return 1024*next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines()
                     if l.startswith(name))

def extra_memory(way, *sizes):
    "Bytes that one pass takes above what was there before it; a small pass before it starts threads and libraries"
    step(way, *inputs(1024, 32, sizes[2]))
    given = inputs(*sizes)
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5') # the peak begins anew
    step(way, *given)
    return memory('VmHWM')-before

def in_own_process(way, sizes, threads):
    code = (f'import sys; sys.path[:0]={[str(Path(__file__).parent)]!r}; import head, torch; '
            f'torch.set_num_threads({threads}); print(head.extra_memory({way!r}, *{sizes!r}))')
    return int(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)

def compared(vocabulary, tokens, hidden, threads, rounds):
    "Both ways side by side, at one size"
    sizes,seconds,found = (vocabulary, tokens, hidden),{w: [] for w in ways},{}
    given = inputs(*sizes)
    for _ in range(rounds):
        for way in ways:
            began = time.perf_counter()
            found[way] = step(way, *given)
            seconds[way].append(round(time.perf_counter()-began, 3))
    (mine,my_grad),(theirs,their_grad) = found['ours'],found['plain']
    medians,extra = ({w: statistics.median(s) for w,s in seconds.items()},
                     {w: in_own_process(w, sizes, threads) for w in ways})
    return dict(hidden=hidden, seconds=seconds, median_seconds=medians,
                extra_megabytes={w: round(e/1e6, 1) for w,e in extra.items()},
                time_ratio=round(medians['ours']/medians['plain'], 3), memory_ratio=round(
                    extra['ours']/extra['plain'], 3), loss=round(theirs, 4), loss_difference=abs(mine-theirs),
                gradient_difference=((my_grad-their_grad).abs().max()/their_grad.abs().max()).item())

def main(vocabulary=49_152, tokens=2048, threads=1, *hidden, rounds=7):
    torch.set_num_threads(threads)
    result = dict(vocabulary=vocabulary, tokens=tokens, learned=tokens//2, rows_in_a_slice=head_rows(vocabulary),
                  sizes=[compared(vocabulary, tokens, h, threads, rounds) for h in hidden or (192, 576)],
                  torch=torch.__version__, threads=threads, cores=os.cpu_count(), machine=platform.machine(),
                  python=platform.python_version(), date=str(date.today()))
    print(json.dumps(result, indent=1))
    Path(__file__).with_suffix('.json').write_text(json.dumps(result, indent=1)+'\n')
    return result

if __name__=='__main__': main(*map(int, sys.argv[1:]))

"""What looking at a hundred runs costs: `python benchmarks/runs.py [--runs N] [--lines N] [--out FILE.json]`

Run folders as training leaves them (settings, data report, a log, results, checksums, an adapter, two checkpoints), and
the commands `list`, `watch --once`, `compare` and `list --where … --sort …` over all of them, each a process of its
own, five times. The time of a process that imports the command line and does nothing is taken beside it: what a command
takes beyond that is its work.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import write_json, write_manifest
from sage_finetune.core.run_folder import RunFolder, write_meta, write_record
from sage_finetune.record.labels import label_run
from sage_finetune.rows.report import DataReport

COMMANDS = {
    'list': ['list'], 'watch --once': ['watch', '--once'], 'compare': ['compare'],
    'list, chosen and sorted': ['list', '--where', 'lora.r>=16', '--tag', 'even', '--sort', '-loss'],
}


def make_run(folder, number, lines):
    "A run folder as training leaves it, without the hour that it takes"
    run, rank = RunFolder(folder), 2**(2+number%5)
    config = TrainingConfig(model_name='sage-tiny', data_path=folder.parent/'rows.jsonl', output_dir=folder,
                            learning_rate=10**-(2+number%3), lora=LoRAConfig(r=rank), num_train_epochs=3)
    write_meta(folder, config.model_name, 'rows.jsonl', config=config)
    write_json(run.config, config.to_dict() | dict(_machine='cpu', _versions=dict(torch='2.13.0'), _data='0-0'))
    DataReport(read=1000, used=1000, examples=1000, tokens=60_000, held_out=100).save(run.data_report)
    loss = lambda s: .5+3*math.exp(-s/(20+number))
    log = [dict(step=s, loss=loss(s), learning_rate=1e-3, epoch=3*s/lines, seconds=s/2., tokens_per_second=900.,
                memory=2**30) | (dict(eval_loss=loss(s)+.1) if s%20==0 else {}) for s in range(1, lines+1)]
    run.metrics.write_text(''.join(json.dumps(m)+'\n' for m in log))
    run.lora_weights.mkdir()
    (run.lora_weights/'adapter_model.safetensors').write_bytes(bytes(200_000))
    (run.lora_weights/'adapter_config.json').write_text('{}')
    write_manifest(run.lora_weights)
    for step in (lines//2, lines):
        (run.checkpoints/f'checkpoint-{step}').mkdir(parents=True)
        for name in ('optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json', 'COMPLETE'):
            (run.checkpoints/f'checkpoint-{step}'/name).write_bytes(bytes(1000))
    write_record(folder, dict(steps=lines, loss_before=3.5, loss_after=log[-1]['loss'], seconds=lines/2))
    if number%2==0: label_run(folder, ['even'])


def seconds(words, root, times=5):
    "What a command takes as a process of its own: the median of several, in seconds of the clock and of the processor"
    code = 'import sys; from sage_finetune.cli import main; sys.exit(main())' if words else (
        'import sage_finetune.cli, rich.console')
    found = []
    for _ in range(times):
        began, before = time.perf_counter(), os.times()
        done = subprocess.run([sys.executable, '-c', code, *words, *(['--dir', str(root)] if words else [])],
                              capture_output=True, text=True)
        after = os.times()
        if done.returncode: raise SystemExit(done.stderr[-2000:])
        found.append((time.perf_counter()-began, after.children_user+after.children_system
                      -before.children_user-before.children_system))
    return [statistics.median(f) for f in zip(*found)]


def main():
    "Make the runs, take the times, and write the table"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, default=100, help='run folders')
    parser.add_argument('--lines', type=int, default=200, help='lines in the log of each')
    parser.add_argument('--out', help='write the figures into this file')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root/'rows.jsonl').write_text('{"question": "a", "answer": "b"}\n')
        for i in range(args.runs): make_run(root/f'run-{i:03}', i, args.lines)
        nothing = seconds([], root)
        found = {name: seconds(words, root) for name, words in COMMANDS.items()}
    print(f'{args.runs} runs of {args.lines} steps; {platform.processor() or platform.machine()}, '
          f'{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
    print('| command | wall, s | processor, s | beyond the imports, processor, s |\n| --- | --- | --- | --- |')
    print(f'| (imports only) | {nothing[0]:.2f} | {nothing[1]:.2f} | |')
    for name, (wall, cpu) in found.items(): print(f'| {name} | {wall:.2f} | {cpu:.2f} | {cpu-nothing[1]:.2f} |')
    if args.out:
        write_json(args.out, dict(runs=args.runs, lines=args.lines, cores=os.cpu_count(), date=str(date.today()),
                                  imports=nothing, commands=found))


if __name__=='__main__': main()

"""A sweep of six runs against six single runs, and an exam that chooses against a loss that chooses

    python benchmarks/study.py sweep smollm2-135m    wall time and memory of both, and whether the bits are the same
        (--folder DIR keeps what was measured, so that the same command goes on where it was stopped; --steps N)
    python benchmarks/study.py together smollm2-135m what one pass for six runs could bring over one pass for each
    python benchmarks/study.py choose                sage-tiny: the adapter by the exam against the one by the loss
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = {'lora.r': [4, 8, 16], 'learning_rate': [2e-4, 1e-3]}
PEOPLE = ('Ada Ben Cleo Dan Eva Finn Gina Hugo Ines Jan Kim Leo Mia Ned Ola Pia Quinn Rosa Sam Tina Udo Vera Will '
          'Xenia Yuri Zoe').split()
ROOMS = 'cellar attic kitchen garden tower library office'.split()
LEARNED = 'Where does {} work?', 'In which room is {}?', 'Where do I find {}?', '{} works where?'
ASKED = 'Which room is the room of {}?', 'Tell me the room of {}.'


def facts(
    people, # Names
): # {name: room}
    "Who sits where, drawn by lot"
    lot = random.Random(0)
    return {p: lot.choice(ROOMS) for p in people}


def timed(
    command, # Words
): # Seconds, seconds of processors, peak bytes of the process
    "Run a process and measure it"
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _,status,used = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'{command} ended with {status}')
    return time.monotonic()-began,used.ru_utime+used.ru_stime,used.ru_maxrss*1024


def compare_sweep(
    model, # Name of the base
    folder, # A new one
    steps, # Of each run
): # One dict of figures
    "Six runs one by one, each a process of its own, and the same six as one sweep"
    from sage_finetune.config import TrainingConfig
    from sage_finetune.rows.sources import save_rows
    from sage_finetune.runs.run import adapter_difference, Run
    from sage_finetune.study.sweep import grid_points, point_config
    room = facts(PEOPLE[:10])
    rows = save_rows(folder/'rooms.json', [dict(question=w.format(p), answer=f'{p} works in the {room[p]}.')
                                           for p in room for w in LEARNED])
    config = TrainingConfig(model_name=model, data_path=rows, output_dir=folder/'sweep', max_steps=steps, test_size=.1,
                            per_device_train_batch_size=4, gradient_accumulation_steps=1, max_length=64,
                            report_to='none', lora=dict(target_modules='all-linear'))
    single = [point_config(config.replace(output_dir=folder/'single'), p) for p in grid_points(GRID)]
    python = [sys.executable, '-c', 'from sage_finetune.cli import main; raise SystemExit(main())']
    kept = folder/'figures.json'
    figures = json.loads(kept.read_text()) if kept.is_file() else []
    for i,c in list(enumerate(single))[len(figures):]:
        figures.append(timed([*python, 'run', str(c.save(folder/f'{i}.json'))]))
        kept.write_text(json.dumps(figures))
    asked = [f'--grid={k}={",".join(map(str, v))}' for k,v in GRID.items()]
    file = str(config.save(folder/'sweep.json'))
    seconds,busy,memory = timed([*python, 'sweep', file, '--output', str(folder/'sweep'), *asked])
    far = max(adapter_difference(Run(c.output_dir), Run(folder/'sweep'/c.output_dir.name)) for c in single)
    alone = [round(sum(x), 1) for x in list(zip(*figures))[:2]]
    return dict(model=model, runs=len(single), steps=steps, single_seconds=alone[0], single_processor_seconds=alone[1],
                single_memory=max(m for *_,m in figures), sweep_seconds=round(seconds, 1),
                sweep_processor_seconds=round(busy, 1), sweep_memory=memory, faster=round(alone[0]/seconds, 2),
                less_processor_time=round(alone[1]/busy, 2), largest_difference=far)


def compare_pass(
    name, # Of the base
    runs=6, # Side by side
    rows=4, # In the batch of each
    times=3, # Each is measured; the fastest counts
): # Tokens of a row → seconds of a run's pass, forward and backward: alone, side by side; their ratio; the same bits?
    "What one pass for several runs could bring: the rows of all through the base at once, the adapters' share left out"
    import torch
    from sage_finetune.base.loading import load_model
    from sage_finetune.config import LoRAConfig
    from sage_finetune.model.adapter import add_lora
    from sage_finetune.model.loss import loss_sum
    model = add_lora(load_model(name), LoRAConfig(r=8, lora_dropout=0.0, target_modules='all-linear')).train()
    def seconds(n, tokens):
        ids = torch.randint(5, 4000, (n*rows, tokens))
        found = []
        for _ in range(times):
            began = time.process_time()
            loss_sum(model, input_ids=ids, labels=ids)[0].backward()
            found.append((time.process_time()-began)/torch.get_num_threads())
        return min(found)/n
    def same_bits(tokens):
        ids = torch.randint(5, 4000, (runs*rows, tokens))
        with torch.no_grad(): whole,part = (model(input_ids=i, use_cache=False).logits for i in (ids, ids[:rows]))
        return torch.equal(whole[:rows], part)
    found = {}
    for tokens in (16, 64):
        alone,together = seconds(1, tokens),seconds(runs, tokens)
        found[tokens] = round(alone, 3),round(together, 3),round(alone/together, 2),same_bits(tokens)
    return dict(model=name, runs=runs, rows=rows, threads=torch.get_num_threads(), seconds_of_a_run=found)


def compare_choice(
    folder, # A new one
): # One dict of figures
    "The same run twice: the best adapter by the held-out loss, and by an exam; both asked other questions"
    from sage_finetune.config import TrainingConfig
    from sage_finetune.rows.sources import save_rows
    from sage_finetune.study.bench import ask
    from sage_finetune.study.scores import compare_scores
    room = facts(PEOPLE)
    rows = save_rows(folder/'rooms.json', [dict(question=w.format(p), answer=f'{p} works in the {room[p]}.')
                                           for p in PEOPLE for w in LEARNED])
    new = facts([p[::-1] for p in PEOPLE[:8]]) # held out: people nobody was told of
    held = save_rows(folder/'held.json', [dict(question=LEARNED[0].format(p), answer=f'{p} works in the {r}.')
                                          for p,r in new.items()])
    exam,last = (save_rows(folder/f'exam{i}.json', [dict(question=w.format(p), contains=room[p]) for p in PEOPLE])
                 for i,w in enumerate(ASKED))
    found = {}
    for by in ('loss', 'exam'):
        from sage_finetune.trainer import LoRATrainer
        config = TrainingConfig(model_name='sage-tiny', data_path=rows, eval_data_path=held, output_dir=folder/by,
                                exam_path=exam, exam_tokens=12, best_by=by, load_best_model_at_end=True, eval_steps=13,
                                num_train_epochs=8, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                                max_length=64, learning_rate=5e-3, report_to='none',
                                lora=dict(r=16, target_modules='all-linear', lora_dropout=0.0))
        result = LoRATrainer(config, quiet=True).train()
        found[by] = result,ask(str(folder/by), last, 12)
    paired = compare_scores(found['loss'][1].correct, found['exam'][1].correct, ('by loss', 'by exam'))
    told = {}
    for by,(r,e) in found.items():
        told |= {f'{by}_step': r.best_step, f'{by}_loss': round(r.loss_after, 3), f'{by}_right': sum(e.correct)}
    return dict(questions=len(paired.first), verdict=paired.verdict, **told)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('what', choices=('sweep', 'together', 'choose'))
    parser.add_argument('model', nargs='?', default='sage-tiny')
    parser.add_argument('--folder', help='Where runs and figures are kept')
    parser.add_argument('--steps', type=int, default=4, help='Of each run')
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(asked.folder or place)
        folder.mkdir(parents=True, exist_ok=True)
        measure = dict(sweep=lambda: compare_sweep(asked.model, folder, asked.steps),
                       together=lambda: compare_pass(asked.model), choose=lambda: compare_choice(folder))
        print(json.dumps(measure[asked.what]()))


if __name__=='__main__': main()

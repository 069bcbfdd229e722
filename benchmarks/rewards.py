"""Learning from rewards on GSM8K rows: a format and a number are rewarded, and nothing is shown

    python benchmarks/rewards.py                                       # smollm2-135m, 30 steps
    python benchmarks/rewards.py --model sage-tiny --steps 2           # whether it runs
    python benchmarks/rewards.py --show                                # what the run so far has come to
    python benchmarks/rewards.py --show --keep                         # and keep it: rewards.jsonl, and its curves

The run is resumed by the same command, so it may be stopped at any time. `benchmarks/README.md` has what came of it.
"""
import argparse
import json
from pathlib import Path

from sage_finetune import RewardConfig, RewardTrainer
from sage_finetune.core.display import save_figure, size_text, Table
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.model.memory import estimate_memory
from sage_finetune.rewards.seen import look_at_rewards
from sage_finetune.rows.sources import save_rows
from sage_finetune.training.callbacks import read_metrics

DATA = Path(__file__).resolve().parents[2]/'shared'/'data'/'gsm8k_train.jsonl'
SYSTEM = 'Answer in one short line that ends with #### and the number. Example: 2 * 3 = 6 pens. #### 6'
REWARDS = [dict(reward='number', weight=1.0),
           dict(reward='regex', name='format', weight=.5, pattern=r'####\s*-?[\d,.]+\s*$')]


def rows(path, folder, most):
    "Questions of a file of GSM8K, with what is asked of the answer before them"
    found = [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()[:most]]
    short = [r for r in found if len(r['question'])<110]
    made = [dict(system=SYSTEM, question=r['question'], answer=r['answer']) for r in short]
    return save_rows(folder/'questions.jsonl', made)


def config(args, data):
    return RewardConfig(
        model_name=args.model, data_path=data, output_dir=args.folder/'run', rewards=REWARDS, max_steps=args.steps,
        num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_length=96+args.tokens,
        max_completion_length=args.tokens, learning_rate=args.rate, warmup_ratio=.1, save_steps=1, test_size=0.0,
        report_to='none', lora=dict(r=16, lora_alpha=32, target_modules='all-linear', lora_dropout=0.0))


def table(folder):
    "The log, five steps in a row"
    log = [m for m in read_metrics(RunFolder(folder/'run').metrics) if 'reward' in m]
    mean = lambda part,key: sum(m[key] for m in part)/len(part)
    keys = 'reward', 'rewards/number', 'rewards/format', 'with_signal', 'kl', 'entropy', 'length', 'cut_off'
    parts = [log[i:i+5] for i in range(0, len(log), 5)]
    made = Table(['steps', *(k.removeprefix('rewards/') for k in keys)],
                 [[f"{p[0]['step']} to {p[-1]['step']}", *(f'{mean(p, k):.3g}' for k in keys)] for p in parts])
    seconds = [b['seconds']-a['seconds'] for a,b in zip(log, log[1:]) if b['seconds']>a['seconds']]
    made.note = (f"{sum(seconds)/max(1, len(seconds)):.1f} s a step on average, {min(seconds, default=0):.1f} s the "
                 f"quickest; {size_text(max(m.get('memory') or 0 for m in log))} of memory at most")
    return made


def keep(folder):
    "Write the log beside this file, and the curves among the pictures of the pages"
    log = [m for m in read_metrics(RunFolder(folder/'run').metrics) if 'reward' in m]
    here = Path(__file__).resolve()
    here.with_suffix('.jsonl').write_text(''.join(json.dumps(m)+'\n' for m in log), encoding='utf-8')
    save_figure(look_at_rewards(folder/'run').plot(), here.parents[1]/'nbs'/'images'/'rewards.png')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--model', default='smollm2-135m')
    parser.add_argument('--steps', type=int, default=30)
    parser.add_argument('--tokens', type=int, default=24)
    parser.add_argument('--rate', type=float, default=5e-4)
    parser.add_argument('--data', default=DATA)
    parser.add_argument('--folder', type=Path, default=Path('~/.sage/benchmarks/rewards').expanduser())
    parser.add_argument('--show', action='store_true')
    parser.add_argument('--keep', action='store_true')
    args = parser.parse_args()
    if not args.show:
        args.folder.mkdir(parents=True, exist_ok=True)
        c = config(args, rows(args.data, args.folder, 4000))
        print(estimate_memory(c), flush=True)
        RewardTrainer(c).train()
    print(table(args.folder))
    print(look_at_rewards(args.folder/'run', groups=2))
    if args.keep: keep(args.folder)


if __name__=='__main__': main()

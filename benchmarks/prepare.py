"""Rendering, masks and tokens of GSM8K against TRL's `SFTTrainer`: `python benchmarks/prepare.py ROWS.jsonl [runs]`

Both get the same rows, tokenizer and chat template, take turns in one process and keep nothing between turns. TRL
starts from a data set of `messages` that is in memory already, this package from the file. Prints the seconds of
each turn, the medians and their ratio, and checks that both learn the same tokens.
"""
import json, os, platform, statistics, sys, tempfile, time, warnings
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')

import datasets, transformers, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune.config import resolve_model
from sage_finetune.data import DataReport, load_training_data, prepare_dataset, to_messages

template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% "
            "generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if "
            "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

def timed(what):
    began = time.perf_counter()
    return what(),time.perf_counter()-began

def of_trl(rows, tokenizer, model, folder):
    args = trl.SFTConfig(output_dir=folder, assistant_only_loss=True, max_length=1024, report_to='none',
                         use_cpu=True, bf16=False, disable_tqdm=True)
    return trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset

def main(path, runs=5):
    datasets.disable_caching()
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    name,folder = resolve_model('sage-tiny'),tempfile.mkdtemp()
    tokenizer,model = AutoTokenizer.from_pretrained(name),AutoModelForCausalLM.from_pretrained(name)
    tokenizer.chat_template = template
    messages = [dict(messages=to_messages(r)) for r in load_training_data(path)]
    seconds = dict(sage_finetune=[], trl=[])
    for _ in range(runs):
        ours,s = timed(lambda: prepare_dataset(path, tokenizer, 1024, report=DataReport(), cache=False))
        seconds['sage_finetune'].append(s)
        rows = Dataset.from_list(messages)
        theirs,s = timed(lambda: of_trl(rows, tokenizer, model, folder))
        seconds['trl'].append(s)
    same = sum(a['input_ids']==b['input_ids'] and [t for t in a['labels'] if t!=-100]
               ==[t for t in b['labels'] if t!=-100] for a,b in zip(ours, theirs))
    medians = {k: round(statistics.median(v), 3) for k,v in seconds.items()}
    result = dict(rows=len(ours), tokens=sum(map(len, ours['input_ids'])),
                  rows_with_the_same_tokens_and_labels=same,
                  seconds={k: [round(s, 3) for s in v] for k,v in seconds.items()},
                  medians=medians, ratio=round(medians['trl']/medians['sage_finetune'], 2), trl=trl.__version__,
                  transformers=transformers.__version__,
                  cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
                  date=str(date.today()))
    print(json.dumps(result, indent=1))
    return result

if __name__=='__main__':
    if len(sys.argv)<2 or not Path(sys.argv[1]).is_file(): sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv)>2 else 5)

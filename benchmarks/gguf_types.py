"""What fewer bits cost: a run is exported as GGUF in several types, and llama.cpp's answers and losses are compared
with those of the merged model

`python benchmarks/gguf_types.py` (needs `pip install "sage-finetune[gguf]"`;
`--model sage-tiny smollm2-135m`, `--types f16
q8_0 q4_k_m`, `--rows 40`) prints a table in Markdown: the size of the file, nats a token on the rows (mean, and how far
single tokens are off), how many greedy answers of 32 tokens are the same to the last token, and what share of the
tokens is the same up to the first that differs.
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from sage_finetune.base.llama_cpp import ask_llama_cpp  # noqa: E402
from sage_finetune.config import LoRAConfig, TrainingConfig  # noqa: E402
from sage_finetune.core.run_folder import write_meta  # noqa: E402
from sage_finetune.serving import export  # noqa: E402
from sage_finetune.rows.formats import create_sample_data  # noqa: E402


def trained(model, folder, steps=12):
    "A merged run that has learned a little"
    from sage_finetune.merge_chat import merge_run
    from sage_finetune.trainer import LoRATrainer
    data = create_sample_data(folder/'sums.json', 'qa', num_samples=40)
    config = TrainingConfig(model_name=model, data_path=data, output_dir=folder, max_steps=steps, test_size=0.0,
                            per_device_train_batch_size=8, gradient_accumulation_steps=1, report_to='none',
                            learning_rate=5e-3 if model=='sage-tiny' else 1e-3,
                            lora=LoRAConfig(r=8, target_modules='all-linear'), load_in_8bit=False)
    write_meta(folder, model, data, task_type='qa', config=config)
    LoRATrainer(config, quiet=True).train()
    merge_run(folder)


def known_of(folder, n, most=32):
    "Rows, prompts, losses and greedy answers of the merged model; ids that end an answer"
    import torch
    from sage_finetune.base.loading import load_model, load_tokenizer
    from sage_finetune.inference.generate import encode_question
    from sage_finetune.inference.merging import logits_of, probes_of
    from sage_finetune.model.contract import log_probs_of, stop_ids
    model,tokenizer = load_model(str(folder/'merged_model')),load_tokenizer(str(folder/'merged_model'))
    rows,prompts = probes_of(folder, tokenizer, n, max_length=256)
    prompts = [encode_question(p, tokenizer)[0] for p in prompts]
    losses = [log_probs_of(l, r) for l,r in zip(logits_of(model, rows), rows)]
    stops,answers = [*stop_ids(model, tokenizer)],[]
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, num_beams=1,
                             repetition_penalty=1.0, eos_token_id=stops, pad_token_id=stops[0])
        made = out[0, len(prompt):].tolist()
        end = next((i for i,t in enumerate(made) if t in stops), len(made))
        answers.append(made[:end])
    return rows,prompts,losses,answers,stops


def same_start(a, b): return next((i for i,(x,y) in enumerate(zip(a, b)) if x!=y), min(len(a), len(b)))


def measured(model, types, n):
    "A row of the table for each type"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)/'run'
        trained(model, folder)
        rows,prompts,losses,answers,stops = known_of(folder, n)
        flat = [x for r in losses for x in r]
        for kind in types:
            out = export.export_gguf(folder, Path(place)/kind, kind, prove=False)
            file = next(out.glob('*.gguf'))
            found = ask_llama_cpp(file, rows, (), prompts, 32, stops)
            theirs = [x for r in found['log_probs'] for x in r]
            off = sorted(abs(a-b) for a,b in zip(flat, theirs))
            same = sum(a==b for a,b in zip(answers, found['answers']))
            alike = sum(same_start(a, b) for a,b in zip(answers, found['answers']))/max(1, sum(map(len, answers)))
            yield (model, kind, f'{file.stat().st_size/2**20:.0f} MiB', f'{-sum(flat)/len(flat):.4f}',
                   f'{-sum(theirs)/len(theirs):.4f}', f'{off[len(off)//2]:.1e}', f'{off[-1]:.1e}',
                   f'{same} of {len(answers)}', f'{alike:.0%}')


if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', nargs='+', default=['sage-tiny', 'smollm2-135m'])
    parser.add_argument('--types', nargs='+', default=['f16', 'q8_0', 'q6_k', 'q4_k_m'])
    parser.add_argument('--rows', type=int, default=40)
    given = parser.parse_args()
    head = ('model', 'type', 'file', 'merged', 'llama.cpp', 'off, median', 'off, most', 'answers the same',
            'tokens the same')
    print('| '+' | '.join(head)+' |\n'+'| --- '*len(head)+'|')
    for model in given.model:
        for row in measured(model, given.types, given.rows): print('| '+' | '.join(row)+' |', flush=True)

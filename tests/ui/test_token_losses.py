"What needs odd runs and odd models: repeating, losses of each token, adapters that are not plain"
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from quick import few, two_layers
from sage_finetune.training.packing import pack_dataset
from sage_finetune.model.loss import head_bytes
from sage_finetune.runs.run import adapter_difference, compare, not_exact, Run, runs
from sage_finetune.config import LoRAConfig, SageError, TrainingConfig
from sage_finetune.ui.adapter_sizes import adapter_sizes
from sage_finetune.ui.token_losses import forgetting, row_losses, token_losses
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.ui.talk import at_strength, side_by_side
from sage_finetune.trainer import LoRATrainer, Stopped


def config(folder, name='run', **changes):
    data = folder/'sums.json'
    if not data.is_file(): create_sample_data(data, 'qa', 30)
    settings = dict(model_name=two_layers, data_path=data, max_length=64, test_size=0.2,
                    per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=4, logging_steps=1,
                    learning_rate=5e-3, report_to='none', output_dir=folder/name)
    return TrainingConfig.from_dict(settings | changes)


def trained(folder, name='run', **changes):
    LoRATrainer(config(folder, name, **changes), quiet=True).train()
    return Run(folder/name)


class StopsAt(LoRATrainer):
    "Asks to stop after a step, once"
    def callbacks(self):
        run = self
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step==2: run.stop()
        return [*super().callbacks(), Stop()]


def test_a_run_that_was_interrupted_is_repeated_in_one_go(tmp_path):
    with pytest.raises(Stopped): StopsAt(config(tmp_path), quiet=True).train()
    stopped = Run(tmp_path/'run')
    assert stopped.state=='stopped'
    with pytest.raises(SageError, match='is stopped, and only a run that ended can be repeated'):
        stopped.repeat(tmp_path/'again')
    LoRATrainer(config(tmp_path), quiet=True).train()
    assert Run(tmp_path/'run').repeat(tmp_path/'again').exact


@pytest.mark.parametrize('changes', few([dict(packing=True, max_length=128, lora=LoRAConfig(use_dora=True)),
                                     dict(lora=LoRAConfig(init_lora_weights='pissa'), seed=7),
                                     dict(lora=LoRAConfig(bias='all'), num_train_epochs=1, max_steps=-1)]),
                         ids=['packed DoRA', 'PiSSA', 'biases'])
def test_other_kinds_of_runs_are_repeated_to_the_bit(tmp_path, changes):
    again = trained(tmp_path, **changes).repeat(tmp_path/'again')
    assert (again.exact, again.difference, again.notes)==(True, 0.0, []), str(again)


def test_a_moved_folder_finds_its_data_and_is_repeated(tmp_path):
    old = tmp_path/'old'
    old.mkdir()
    create_sample_data(old/'rows.json', 'qa', 30)
    trained(tmp_path, 'old', data_path=old/'rows.json')
    shutil.move(old, tmp_path/'new')
    moved = Run(tmp_path/'new')
    assert moved.config.data_path==tmp_path/'new'/'rows.json'
    assert moved.repeat(tmp_path/'again').exact


def test_what_cannot_be_repeated_says_why(tmp_path):
    run = trained(tmp_path)
    from sage_finetune.core.disk import write_json
    write_json(run.folder.config, run.record | dict(_machine='another one'))
    assert not_exact(run)[0].startswith('machine another one → ')
    with pytest.raises(SageError, match='cannot be repeated bit-exactly here'): run.repeat(tmp_path/'again')
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'diary.txt').write_text('mine')
    with pytest.raises(ValueError, match='is not empty'): run.repeat(tmp_path/'full')
    record = run.record
    write_json(run.folder.config, record | dict(data_path=None))
    with pytest.raises(SageError, match='from a program of its own'): run.repeat(tmp_path/'again')
    del record['_data']
    write_json(run.folder.config, record)
    with pytest.raises(SageError, match='no checksum of its data was recorded'): run.repeat(tmp_path/'again')
    assert not (tmp_path/'again').exists()
    again = run.repeat(tmp_path/'again', anyway=True)
    assert again.exact and len(again.notes)==2 and 'no checksum' in str(again)


def test_broken_runs_are_listed_and_told(tmp_path):
    run = trained(tmp_path/'runs', 'good')
    bad = tmp_path/'runs'/'bad'
    bad.mkdir()
    (bad/'training_config.json').write_text('{')
    listed = runs(tmp_path/'runs')
    assert 'unreadable' in str(listed) and 'good' in str(listed)
    with pytest.raises(SageError, match='is not JSON'): compare(run, bad)
    (run.folder.lora_weights/'adapter_model.safetensors').write_bytes(b'no tensors')
    with pytest.raises(SageError, match='adapter_model.safetensors has 10 of [0-9,]+ bytes'): run.adapter
    (run.folder.lora_weights/'checksums.json').unlink() # as in a run of an older version
    with pytest.raises(SageError, match='cannot be read'): run.adapter
    assert str(runs(tmp_path/'nothing')).startswith('No runs in')


def tiny(kind, **changes):
    torch.manual_seed(0)
    own = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               intermediate_size=64, vocab_size=300, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own | changes)).eval()


@pytest.mark.parametrize('kind,changes', [('llama', {}), ('gemma2', dict(final_logit_softcapping=5.0)),
                                          ('granite', dict(logits_scaling=4.0))])
def test_losses_of_tokens_of_models_that_change_their_logits(kind, changes, monkeypatch):
    model,ids = tiny(kind, **changes),torch.randint(3, 300, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(): logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    wanted = [-logp[k, t].item() for k,t in enumerate(ids[1:])]
    monkeypatch.setitem(head_bytes, 'cpu', 1) # slices of 16
    torch.testing.assert_close(torch.tensor(row_losses(model, ids)[1:]), torch.tensor(wanted), atol=1e-4, rtol=1e-4)


def test_losses_where_the_head_cannot_be_replaced():
    ids,wanted,odd = list(range(3, 43)),row_losses(tiny('llama'), list(range(3, 43))),tiny('llama')
    own = odd.forward
    def forward(**how): # its head is called twice
        odd.lm_head(torch.zeros(1, 1, 32))
        return own(**how)
    odd.forward = forward
    with pytest.warns(UserWarning, match='calls its head 2 times'): found = row_losses(odd, ids)
    torch.testing.assert_close(torch.tensor(found[1:]), torch.tensor(wanted[1:]), atol=1e-4, rtol=1e-4)


def test_a_packed_row_is_its_documents(tmp_path):
    run = trained(tmp_path)
    packed = pack_dataset(run.data[0], 256)[0]
    seen = token_losses(run.model, run.tokenizer, packed)
    alone = []
    starts = [k for k,p in enumerate(packed['position_ids']) if p==0]
    for a,b in zip(starts, [*starts[1:], len(packed['input_ids'])]):
        alone += row_losses(run.model, packed['input_ids'][a:b])
    torch.testing.assert_close(torch.tensor(seen.after), torch.tensor(alone), atol=1e-4, rtol=1e-4, equal_nan=True)
    assert len(starts)>1 and '── document' not in seen._repr_html_() and 'document 2' in seen._repr_html_()


def test_sizes_of_saved_adapters_that_are_not_plain(tmp_path):
    for name,lora in (('rs', LoRAConfig(use_rslora=True)), ('pissa', LoRAConfig(init_lora_weights='pissa', r=4))):
        run = trained(tmp_path, name, lora=lora)
        alone = {l.name: l.norm for l in adapter_sizes(run, base=False).layers}
        for l in adapter_sizes(run).layers:
            layer = run.model.get_submodule('base_model.model.'+l.name)
            with torch.no_grad():
                moved = (layer(torch.eye(layer.in_features))-layer.base_layer(
                    torch.eye(layer.in_features))).norm().item()
            assert l.norm==pytest.approx(moved, rel=5e-3)==pytest.approx(alone[l.name], rel=5e-3)
    dora = trained(tmp_path, 'dora', lora=LoRAConfig(use_dora=True))
    with pytest.raises(ValueError, match='trained with DoRA'): adapter_sizes(dora, base=False)
    assert forgetting(dora, 'Anything at all will do.').factor!=1


def test_nobody_waits_for_an_answer_that_failed(tmp_path):
    run = trained(tmp_path)
    model,tokenizer = run.loaded
    calls = []
    def fails(module, args):
        calls.append(1)
        if len(calls)==5: raise RuntimeError('in the middle')
    handle = model.get_base_model().model.layers[0].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match='in the middle'):
        list(side_by_side(model, tokenizer, 'What is 3 plus 1?', (0, .5, 1), max_new_tokens=8))
    handle.remove()
    assert not model.get_base_model()._forward_hooks and not model.get_base_model()._forward_pre_hooks
    with at_strength(model, 1):
        one = ''.join(t for _,t in side_by_side(model, tokenizer, 'What is 3 plus 1?', (1,), max_new_tokens=8))
    assert one and adapter_difference(run, run)==0

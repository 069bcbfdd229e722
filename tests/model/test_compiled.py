"Layers are compiled by themselves where that pays; what cannot be compiled, or gives another loss, is left as it is"
import json
from contextlib import nullcontext

import pytest
import torch

from quick import few, two_layers
from sage_finetune.base.attention import use_documents
from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.model import compiled as module
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.compiled import choose_compiled, compiled_layers, decoder_layers, Trial, try_compiled
from sage_finetune.model.lora_path import lora_path, prove_lora_path
from sage_finetune.model.loss import evaluating, loss_sum
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.batches import Collator

batch = Collator(0)([dict(input_ids=[*range(5, 21)])]*2)


@pytest.fixture
def model(): return add_lora(load_model(two_layers), LoRAConfig(r=2, lora_dropout=0.)).train()


@pytest.mark.parametrize('wrong', few(['NaN', 'raises', 'another loss']))
def test_what_is_wrong_is_left_as_it_is(model, wrong):
    def backend(graph, inputs):
        if wrong=='raises': raise RuntimeError('no C++ compiler was found')
        return lambda *args: [o*(float('nan') if wrong=='NaN' else 3) if torch.is_tensor(o) and o.is_floating_point()
                              else o for o in graph(*args)]
    torch.compiler.reset()
    wanted,why,tried = choose_compiled(model, batch, 10, long_enough=0, backend=backend)
    torch.compiler.reset()
    assert (wanted, tried)==(False, True) and 'layers are not compiled: ' in why and '\n' not in why
    assert ('no C++ compiler' in why)==(wrong=='raises')
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('packed', [False, True])
def test_a_model_with_all_that_a_run_changes_is_compiled(model, packed):
    "Adapters together, norms and positions in fewer passes, documents by themselves"
    rows = batch | dict(position_ids=torch.tensor([[*range(8)]*2]*2)) if packed else batch
    assert use_documents(model)
    path = prove_lora_path(model)
    assert path.groups and path.parts
    torch.compiler.reset()
    with lora_path(path.groups, parts=path.parts): trial = try_compiled(model, rows, 10, backend='eager')
    torch.compiler.reset()
    assert not trial.fault and trial.cost>0, trial


def test_what_is_no_training_is_computed_as_it_is(model):
    calls = []
    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward
    torch.compiler.reset()
    with compiled_layers(model, backend=backend):
        with evaluating(model): loss_sum(model, **batch)
        assert calls==[]
        loss_sum(model, **batch)
        assert calls
    torch.compiler.reset()


def test_a_run_remembers_what_was_decided(tmp_path, monkeypatch):
    "On a made clock: the trial says that compiling pays; the run that is continued asks no clock"
    data = create_sample_data(tmp_path/'sums.jsonl', 'qa', num_samples=8)
    config = TrainingConfig(model_name=two_layers, data_path=data, output_dir=tmp_path/'run', test_size=0, max_steps=3,
                            report_to='none', per_device_train_batch_size=2, torch_compile='auto', save_steps=1)
    used,asked = [],[]
    monkeypatch.setattr(module, 'compiled_layers', lambda m, **how: used.append(1) or nullcontext(m))
    monkeypatch.setattr(module, 'try_compiled', lambda *a, **how: asked.append(1) or Trial(2., 1., 30., 3600))
    monkeypatch.setattr(module.choose_compiled, '__defaults__', (*module.choose_compiled.__defaults__[:1], 0))
    run,said = LoRATrainer(config, quiet=True),[]
    run.say = lambda what: said.append(str(what))
    callbacks = run.callbacks
    class Stop(type(callbacks()[0]).__mro__[1]):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==1: run.stop()
    run.callbacks = lambda: [*callbacks(), Stop()]
    with pytest.raises(KeyboardInterrupt): run.train()
    record = json.loads((tmp_path/'run'/'training_config.json').read_text())
    assert [c['used'] for c in record['_changes'] if c['setting']=='torch_compile']==[True]
    assert record['torch_compile']=='auto' and sum('saves about 60 minutes' in s for s in said)==1
    again = LoRATrainer(config, quiet=True)
    arguments,given = again.arguments,[]
    again.arguments = lambda: given.append(arguments()) or given[-1]
    again.say = lambda what: said.append(str(what))
    again.train()
    assert len(asked)==1 and len(used)==2
    # it goes on as it began: nobody else compiles the layers too, and adapters are computed by the same path
    assert [a.torch_compile for a in given]==[False] and len(
        {s.partition(', proved')[0] for s in said if s.startswith('adapters: ')})==1


def test_a_short_run_tries_nothing(tmp_path):
    data = create_sample_data(tmp_path/'sums.jsonl', 'qa', num_samples=8)
    config = TrainingConfig(model_name=two_layers, data_path=data, output_dir=tmp_path/'run', test_size=0, max_steps=1,
                            report_to='none', per_device_train_batch_size=2, torch_compile='auto')
    run = LoRATrainer(config, quiet=True)
    run.train()
    change, = [c for c in run.changes if c.setting=='torch_compile']
    assert change.used is False and 'too short to earn it back' in change.reason


@pytest.mark.slow
def test_a_real_compiler(model):
    trial = try_compiled(model, batch, passes=100)
    assert trial.fault=='' and trial.cost>0, trial

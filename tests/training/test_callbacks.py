"What is kept between two steps: copied beside the next step on a card, on a budget, and nothing waits for a device"
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quick import two_layers
from sage_finetune.base.attention import use_documents
from sage_finetune.base.loading import load_model
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.loss import loss_sum
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training import callbacks, loop
from sage_finetune.training.batches import Collator
from sage_finetune.training.callbacks import LastSteps
from sage_finetune.training.loop import Stopped, training_once


class Waits(TorchDispatchMode):
    "Operations whose answer Python needs, which on a card it waits for"
    asks = 'aten._local_scalar_dense', 'aten.nonzero', 'aten.is_nonzero', 'aten.masked_select'

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.asks): self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('packed', [False, True])
def test_a_pass_asks_the_device_nothing_of_its_own(packed):
    model = add_lora(load_model(two_layers), LoRAConfig(lora_dropout=0.)).train()
    rows = [dict(input_ids=[*range(5, 29)], labels=[-100]*4+[*range(9, 29)])]*2
    if packed:
        rows = [r | dict(position_ids=[*range(12)]*2) for r in rows]
        assert use_documents(model)
    plain,counted = (Collator(0, counted=c)(rows) for c in (False, True))
    expected = loss_sum(model, **plain)
    with Waits() as waits: total,n = loss_sum(model, **counted)
    total.backward()
    # one is transformers' own: whether rows are packed
    assert len(waits.seen)==1 and total==expected[0] and n==expected[1]==40
    with Waits() as waits: loss_sum(model, **plain)
    assert len(waits.seen)>1 # what the counts spare


def test_copies_of_a_card_have_a_stream_of_their_own(monkeypatch):
    "Torch's streams are played here; on a CPU there is none"
    told = []
    class Stream:
        def __init__(self, device): told.append('made')
        def wait_stream(self, other): told.append('waits for the step')
        def record_event(self): return 'copied'
    @contextmanager
    def stream(s):
        told.append('copies')
        yield
    now = SimpleNamespace(wait_event=lambda event: told.append(f'the optimizer waits until {event}'))
    for name,fake in dict(Stream=Stream, stream=stream, current_stream=lambda *a: now).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    steps = LastSteps()
    steps.copied() # nothing was copied yet
    for _ in range(2):
        with steps._beside(torch.device('cuda')): pass
        steps.copied()
    assert told==['made', *['waits for the step', 'copies', 'the optimizer waits until copied']*2]


def test_modes_are_set_where_one_is_another():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(.5))
    own = model.train
    with training_once(model):
        assert model.train().training and model[1].training
        model[1].eval() # as an answer in the middle of a run would leave it
        assert model.train()[1].training
        assert not model.eval()[1].training and model.train()[1].training
    assert model.train==own


def test_too_little_main_memory_keeps_no_steps_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, '_main_memory', lambda: 1000)
    data = create_sample_data(tmp_path/'sums.jsonl', 'qa', num_samples=8)
    run,said = LoRATrainer(TrainingConfig(
        model_name=two_layers, data_path=data, output_dir=tmp_path/'run', test_size=0, max_steps=4, report_to='none',
        per_device_train_batch_size=2, gradient_accumulation_steps=2), quiet=True),[]
    run.say = lambda what: said.append(str(what))
    after = []
    class Stop(loop.BeforeFirstStep):
        def on_substep_end(self, args, state, control, **kwargs):
            after.append(state.global_step)
            if state.global_step==1: run.stop() # in the middle of the second step
    own = run.callbacks
    run.callbacks = lambda: [*own(), Stop(lambda step: None)]
    with pytest.raises(Stopped, match='stopped at step 2 of 4'): run.train()
    assert after==[0, 1] and sum('not kept in memory' in s for s in said)==1
    assert (run.folder.checkpoints/'checkpoint-2').is_dir()
    run.callbacks = own
    assert LoRATrainer(run.config, quiet=True).train().steps==4

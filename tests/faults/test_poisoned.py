"Pickles with code in the places where a run keeps numbers: refused by name, and nothing is run"
import shutil
from pathlib import Path

import pytest
import torch

from sage_finetune.config import TrainingConfig
from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import mark_complete, RunFolder
from sage_finetune.data import create_sample_data
from sage_finetune.inference.generate import load_adapter
from sage_finetune.trainer import LoRATrainer
from quick import two_layers


class Poison:
    "What is run by whoever unpickles it"
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)


def config(folder, steps):
    return TrainingConfig(model_name=two_layers, data_path=folder/'rows.json', output_dir=folder/'run', max_steps=steps,
                          save_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, test_size=0.0,
                          load_in_8bit=False, report_to='none', lora=dict(r=2, target_modules='all-linear'))


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "A run that was stopped after its second step"
    from transformers import TrainerCallback
    folder = tmp_path_factory.mktemp('stopped')
    create_sample_data(folder/'rows.json', 'qa', 12)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==2: run.stop()

    class Stopping(LoRATrainer):
        def callbacks(self): return [*super().callbacks(), Stop()]
    run = Stopping(config(folder, 4), quiet=True)
    with pytest.raises(KeyboardInterrupt, match='stopped at step 2 of 4; .*; the same command goes on'): run.train()
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return tmp_path


def poison(file, trap):
    "Put code beside what a file holds"
    with torch.serialization.safe_globals([]): held = torch.load(file, weights_only=False)
    held = held if isinstance(held, dict) else dict(held=held)
    torch.save(held | dict(evil=Poison(trap)), file)


@pytest.mark.parametrize('name', ['optimizer.pt', 'scheduler.pt', 'rng_state.pth'])
def test_a_poisoned_checkpoint_is_refused_by_name(folder, name):
    checkpoint,trap = RunFolder(folder/'run').checkpoints/'checkpoint-2', folder/'executed'
    poison(checkpoint/name, trap)
    mark_complete(checkpoint) # whoever can write the one can write the other
    trap.unlink(missing_ok=True)
    with pytest.raises(SageError, match=f'checkpoint-2: {name} holds something else than numbers'):
        LoRATrainer(config(folder, 4), quiet=True).train()
    assert not trap.exists() and (checkpoint/name).exists()


def test_a_poisoned_file_that_was_not_forged_passes_the_checkpoint_over(folder, capsys):
    checkpoint,trap = RunFolder(folder/'run').checkpoints/'checkpoint-2', folder/'executed'
    poison(checkpoint/'optimizer.pt', trap)
    trap.unlink(missing_ok=True)
    assert LoRATrainer(config(folder, 4), quiet=True).train().steps==4
    assert not trap.exists()


def test_an_adapter_in_a_pickle_is_refused_by_name(folder):
    adapter,trap = RunFolder(folder/'run').lora_weights, folder/'executed'
    (adapter/'adapter_model.safetensors').unlink()
    torch.save(dict(evil=Poison(trap)), adapter/'adapter_model.bin')
    with pytest.raises(SageError, match='adapter_model.bin, a pickle, which may hold code'): load_adapter(adapter)
    assert not trap.exists()

"Edges of the adapter: names that no layer has, optimizers that cannot, and evaluations at the end of a run"
import math

import pytest
import torch
from fastcore.test import expect_fail, test_eq as same
from transformers import TrainerControl, TrainerState

from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.model.adapter import (
    _targets, add_lora, best_evaluation, BestAdapter, check_settings, load_best_adapter, lora_plus
)
from sage_finetune.base.loading import load_model


@pytest.fixture(scope='module')
def adapted(): return add_lora(load_model('sage-tiny'), LoRAConfig())


def test_names_of_layers():
    with expect_fail(ValueError, contains="names no layer of this model; it has down_proj"):
        add_lora(load_model('sage-tiny'), LoRAConfig(target_modules=['c_attn']))
    with expect_fail(ValueError, contains="'.*nothing' names no layer"):
        add_lora(load_model('sage-tiny'), LoRAConfig(target_modules='.*nothing'))
    same(len(_targets(load_model('sage-tiny'), r'.*layers\.[01]\..*q_proj')), 2)


def test_lora_plus_needs_the_matrices(adapted):
    with expect_fail(ValueError, contains='`loraplus_lr_ratio=4`: SGD does not hold the matrices B'):
        lora_plus(torch.optim.SGD([torch.ones(1)], lr=1), adapted, 4)


def test_there_is_an_evaluation_after_the_last_step():
    control = TrainerControl()
    BestAdapter().on_step_end(None, TrainerState(global_step=8, max_steps=9), control)
    same(control.should_evaluate, False)
    BestAdapter().on_step_end(None, TrainerState(global_step=9, max_steps=9), control)
    same(control.should_evaluate, True)


def test_no_best_adapter(adapted, tmp_path):
    same(best_evaluation([dict(step=5, eval_loss=float('nan'))]), (0, math.inf, 1))
    same((load_best_adapter(adapted, None), load_best_adapter(adapted, tmp_path)), (None, None))


def test_an_odd_rank_is_refused():
    plain = TrainingConfig(load_in_8bit=False)
    with expect_fail(ValueError, contains='needs an even rank'):
        check_settings(plain.replace(lora=LoRAConfig(r=7, init_lora_weights='orthogonal')))

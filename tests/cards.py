"""Cards, played by a CPU

`CARDS` are twelve kinds of card as `Machine.here()` would describe them. `t4_twin` lets a run believe that it is on a
Tesla T4: weights and autocast in fp16 with a real loss scaler, bitsandbytes' own 4 and 8 bits and its 8-bit Adam, the
attention that a T4 gets; only the products are computed by the CPU.
"""
from contextlib import contextmanager, ExitStack
from unittest.mock import patch

import torch
from accelerate import Accelerator

from sage_finetune import trainer
from sage_finetune.core.machine import Machine
from sage_finetune.base import attention

def card(name, gb, bf16=True, taken=0.6): # `taken`: what the driver and the desktop hold
    return Machine('cuda', name, memory=int(gb*1e9), free=int((gb-taken)*1e9), bf16=bf16, cores=8, ram=32*10**9)

CARDS = [card('GTX 1650', 4.3, bf16=False), card('RTX 2060', 6.4, bf16=False), card('RTX 3050', 8.6),
         card('RTX 3060', 12.9), card('Tesla T4', 15.8, bf16=False), card('V100', 16.9, bf16=False),
         card('RTX 4060 Ti', 17.1), card('L4', 24.2), card('RTX 4090', 25.7, taken=2), card('A100 40 GB', 42.4),
         card('H100', 85.0), card('H200', 150.0)]
T4 = next(c for c in CARDS if c.name=='Tesla T4')

def _with_scaler(made):
    own = Accelerator.__init__
    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)
        if self.state.mixed_precision=='fp16' and self.device.type=='cpu':
            self.native_amp,self.scaler = True,torch.amp.GradScaler('cpu')
            made.append(self.scaler)
    return patch.object(Accelerator, '__init__', init)

def _as_t4(load):
    def loaded(name, dtype=None, device='cpu', *args, **kwargs):
        model = load(name, dtype, 'cpu', *args, **kwargs)
        config = model.config.get_text_config()
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
        AttentionInterface.register('repeated_heads', attention._with_repeated_heads)
        AttentionMaskInterface.register('repeated_heads', sdpa_mask)
        if config.num_key_value_heads!=config.num_attention_heads: model.set_attn_implementation('repeated_heads')
        return model
    return loaded

def _arguments(was):
    def arguments(config, evaluate, device='cpu', *args, **kwargs):
        made = was(config, evaluate, 'cuda', *args, **kwargs)
        made.dataloader_pin_memory = False
        return made
    return arguments

@contextmanager
def t4_twin():
    "Inside, a run is on a T4; yields the loss scalers that were made"
    scalers = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(Machine, 'here', staticmethod(lambda: T4)))
        stack.enter_context(_with_scaler(scalers))
        stack.enter_context(patch.object(trainer, 'load_model', _as_t4(trainer.load_model)))
        stack.enter_context(patch.object(trainer, 'training_arguments', _arguments(trainer.training_arguments)))
        yield scalers

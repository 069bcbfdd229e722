"""What one pass of a model launches and moves, counted without a card: `python benchmarks/passes.py [--out FILE.json]`

The default model's shape (Qwen2.5-Coder-1.5B, 28 layers) is built without weights, as on an H200 in bf16, and one
micro-batch of 4 × 2,048 tokens goes forward and backward: r 8 on q, k, v, o and r 16 on all linear layers. Counted are
the operations that would start a kernel (views do not), the bytes that they read and write, and the bytes that are
alive at the worst moment; with peft's path through the adapters, and with ours. On a real tensor, with the embedded
model, are counted the questions that Python would wait for a card to answer: as the library's loop and ours ask them.
"""
import argparse
import json
import os
import warnings
from contextlib import contextmanager
from datetime import date
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config

from sage_finetune.base.attention import use_documents
from sage_finetune.base.loading import load_model
from sage_finetune.config import fit_config, LoRAConfig, PresetConfigs
from sage_finetune.core.machine import Machine
import sage_finetune.model.step_bytes as step_bytes_module
from sage_finetune.model.adapter import add_lora
from sage_finetune.model.loss import loss_sum
from sage_finetune.model.step_bytes import build_on_meta, step_bytes
from sage_finetune.training.batches import Collator

h200 = Machine('cuda', 'H200', memory=141*10**9, bf16=True)
shape = Qwen2Config(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                    intermediate_size=8960, vocab_size=151_936, tie_word_embeddings=True)
adapters = dict(attention=LoRAConfig(r=8, lora_dropout=0.), all=LoRAConfig(r=16, target_modules='all-linear',
                                                                          lora_dropout=0.))
asks = 'aten._local_scalar_dense', 'aten.nonzero', 'aten.masked_select', 'aten.is_nonzero'


class Traffic(TorchDispatchMode):
    "Operations that start a kernel, the bytes they read and write, and those that wait for an answer"
    launches = moved = waits = 0
    paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.paused: return out
        name,returns = str(func),func._schema.returns
        self.waits += name.startswith(asks)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and not name.startswith(('aten.empty', 'aten.new_empty', 'aten._unsafe_view')):
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.numel()*t.element_size() for t in tensors)
        return out


@contextmanager
def the_pass_alone(traffic):
    "What looks for layers that share an input runs the model once before the pass, which is no part of it"
    own = step_bytes_module.shared_inputs
    def uncounted(*args):
        traffic.paused = True
        try: return own(*args)
        finally: traffic.paused = False
    step_bytes_module.shared_inputs = uncounted
    try: yield
    finally: step_bytes_module.shared_inputs = own


def on_card(adapter, ours, dropout=0.):
    "One pass on `meta`"
    lora = adapters[adapter].replace(lora_dropout=dropout)
    config = fit_config(PresetConfigs.h200(max_length=2048, per_device_train_batch_size=4, lora=lora, packing=False,
                                           fused_lora=ours), h200)[0]
    model = build_on_meta(config, shape)[0]
    with Traffic() as traffic, the_pass_alone(traffic): counted = step_bytes(model, config, h200, exact=True)
    return dict(launches=traffic.launches, moved_gib=round(traffic.moved/2**30, 1),
                alive_gib=round(counted.peak/2**30, 2))


def waits(packed, counted):
    "Questions of one pass that a card would be waited for"
    model = add_lora(load_model('sage-tiny'), LoRAConfig(lora_dropout=0.)).train()
    rows = [dict(input_ids=[*range(5, 69)], labels=[*range(5, 69)])]*2
    if packed: rows = [r | dict(position_ids=[*range(32)]*2) for r in rows]
    batch = Collator(0, counted=counted)(rows)
    use_documents(model)
    loss_sum(model, **batch)  # what is found out once
    with Traffic() as traffic: loss_sum(model, **batch)[0].backward()
    return traffic.waits


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument('--out')
    a = parse.parse_args()
    passes = {f'{name}, dropout {p:g}': dict(peft=on_card(name, False, p), ours=on_card(name, True, p))
              for name in adapters for p in (0., .05)}
    asked = {name: dict(of_tensors=waits(packed, False), of_the_collator=waits(packed, True))
             for name,packed in dict(padded=False, packed=True).items()}
    out = dict(passes=passes, waits=asked, torch=torch.__version__, date=str(date.today()))
    print(json.dumps(out, indent=1))
    if a.out: Path(a.out).write_text(json.dumps(out, indent=1)+'\n')


if __name__=='__main__': main()

"The estimate of a step is within a tenth of what it takes, on the way through the adapters that is taken"
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sage_finetune.base.loading import dtype_of, load_model, quantisation_of
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.machine import Machine
from sage_finetune.model.adapter import add_lora, ready_for_quantised_training
from sage_finetune.model.lora_path import lora_path, prove_lora_path
from sage_finetune.model.loss import evaluating
from sage_finetune.model.memory import probe_step

kinds = dict( # of the benchmarks; what they have learned takes no memory
    made=('qwen2', dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)),
    smollm2=('llama', dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                           num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)))
all_linear = dict(r=16, target_modules='all-linear')
steps = {'attention': {}, 'attention, dropout': dict(lora_dropout=.05), 'all': all_linear,
         'all, dropout': all_linear | dict(lora_dropout=.05), 'checkpointing': dict(gradient_checkpointing=True),
         'all, checkpointing': all_linear | dict(gradient_checkpointing=True), 'packed': dict(packing=True),
         'half learned': dict(learned=.5), 'bf16': dict(bf16=True), '8 bits': dict(load_in_8bit=True),
         '4 bits': dict(load_in_4bit=True)}
of_lora = 'r', 'target_modules', 'lora_dropout'
quantised = '8 bits', '4 bits'


def loaded(name, config, lora):
    "A model as a run loads it"
    if name in kinds:
        kind,shape = kinds[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).to(dtype_of(config))
        return add_lora(model, lora)
    model = load_model(name, dtype_of(config), 'cpu', quantisation_of(config))
    if config.load_in_8bit or config.load_in_4bit: model = ready_for_quantised_training(model)
    return add_lora(model, lora)


def batch_of(config, learned=1.):
    rows,tokens = (2, 256)
    ids = torch.arange(rows*tokens).reshape(rows, tokens)%1000+5
    labels = ids.clone()
    labels[:, :int(tokens*(1-learned))] = -100
    packed = dict(position_ids=torch.arange(tokens//4).repeat(rows, 4)) if config.packing else {}
    return dict(input_ids=ids, labels=labels, **packed)


def probe(name, step, together):
    settings = dict(steps[step])
    learned,lora = settings.pop('learned', 1.), {k: settings.pop(k) for k in of_lora if k in settings}
    lora = LoRAConfig(**dict(lora_dropout=0.) | lora)
    config = TrainingConfig(**dict(model_name='sage-tiny', fp16=False, load_in_8bit=False, optim='adamw_torch',
                                   gradient_checkpointing=False, lora=lora) | settings)
    model,autocast = loaded(name, config, lora).train(),nullcontext
    if config.gradient_checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    if config.bf16: autocast = lambda: torch.autocast('cpu', torch.bfloat16)
    with evaluating(model, training=True): path = prove_lora_path(model, autocast)
    assert path.groups and not path.kept
    with lora_path(path.groups) if together else nullcontext():
        return probe_step(model, batch_of(config, learned), config, Machine(bf16=config.bf16))


@pytest.mark.slow
@pytest.mark.parametrize('model,step', [(m, s) for m in ('sage-tiny', *kinds) for s in steps
                                        if m=='sage-tiny' or s not in quantised])
def test_the_estimate_is_within_a_tenth(model, step):
    for together in (True, False):
        found = probe(model, step, together)
        print(f'{model}, {step}, {"together" if together else "by peft"}: {found}')
        assert abs(found.error)<.1

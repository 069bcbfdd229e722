"""What every process of a test would do first, done once in the process that they are forked from

Nothing here computes with torch, whose pool of threads would not survive a fork.
"""
import tempfile
from pathlib import Path

from peft import get_peft_model, LoraConfig
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from cheaper import without_curve
from sage_finetune.config import resolve_model
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.training.callbacks import plot_losses


def first_of_all(folder):
    "The names of weights in every family of models are compiled, and the template of a model card; fonts are read"
    few = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=8, **few))
    get_peft_model(model, LoraConfig(r=1)).create_or_update_model_card(folder)
    plot_losses([dict(step=1, loss=1.), dict(step=2, loss=.5, eval_loss=.7)], Path(folder)/'curve.png')
    load_tokenizer(resolve_model('sage-tiny'))


with tempfile.TemporaryDirectory() as folder: first_of_all(folder)
without_curve().start()

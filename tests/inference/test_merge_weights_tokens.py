"Adapters of other tools that bring tokens: loaded and merged to the logits of peft, or refused in words"
import pytest
import torch
from peft import get_peft_model, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from quick import chequered, two_layers
from sage_finetune.core.disk import SageError
from sage_finetune.inference.generate import base_of, load_adapter, load_plain, put_adapter
from sage_finetune.inference.merging import merge_adapters
from sage_finetune.serving.serve import vllm_limits
from sage_finetune.base.loading import load_model, load_tokenizer

ids = torch.arange(2, 60)[None]
pairs = dict(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')
brings = dict(rows=dict(trainable_token_indices=[3, 9]),
              new_rows=dict(grown=True, trainable_token_indices=[4100, 4105]),
              rows_of_both=dict(grown=True, trainable_token_indices=dict(embed_tokens=[4100], lm_head=[4101])),
              trained_whole=dict(grown=True, modules_to_save=['embed_tokens', 'lm_head']),
              only_grown=dict(grown=True),
              pairs_on_embedding=dict(target_modules=['q_proj', 'embed_tokens']),
              pairs_on_grown_embedding=dict(grown=True, target_modules=['q_proj', 'embed_tokens'], tied=True))


def base(folder, tied):
    torch.manual_seed(0)
    config = AutoConfig.for_model('qwen2', vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    load_tokenizer(two_layers).save_pretrained(folder)
    return str(folder)


def adapter(folder, place, grown=False, **more):
    "An adapter as peft saves it, the logits of its model, and those of the model without it"
    model = load_model(place)
    if grown: model.resize_token_embeddings(4110, mean_resizing=False)
    untouched = model(ids).logits.detach()
    model = get_peft_model(model, LoraConfig(**pairs | more)).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += .1*torch.randn_like(p)
    model.save_pretrained(folder)
    load_tokenizer(two_layers).save_pretrained(folder)
    return model(ids).logits.detach(),untouched


@pytest.mark.parametrize('what,tied', chequered(brings, [True, False]))
def test_it_is_loaded_and_merged_to_the_logits_of_peft(what, tied, tmp_path):
    more = dict(brings[what])
    if more.pop('tied', tied)!=tied: pytest.skip('the head is too small there, which is refused below')
    trained,untouched = adapter(tmp_path/'adapter', base(tmp_path/'base', tied), **more)
    model,_ = load_adapter(tmp_path/'adapter')
    assert torch.allclose(model(ids).logits, trained, atol=1e-5)
    if 'modules_to_save' not in more:
        with base_of(model): plain = model(ids).logits
        assert plain.shape[-1]==4096 and torch.allclose(plain, untouched[..., :4096], atol=1e-5)
    if tied and what=='rows_of_both':
        with pytest.raises(SageError, match='trains other rows of the embedding than of the head'):
            merge_adapters(tmp_path/'adapter', tmp_path/'merged', rows=0)
        return
    merge_adapters(tmp_path/'adapter', tmp_path/'merged')
    assert torch.allclose(load_plain(tmp_path/'merged')[0](ids).logits, trained, atol=1e-4)
    if what!='only_grown': assert vllm_limits(tmp_path/'adapter')[1] or what=='pairs_on_embedding'


def test_rows_of_tokens_that_the_base_does_not_have_are_refused_in_words(tmp_path):
    place = base(tmp_path/'base', True)
    model = load_model(place)
    model.resize_token_embeddings(4110, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**pairs, trainable_token_indices=[4100]))
    model.save_pretrained(tmp_path/'adapter', save_embedding_layers=False)
    for read in (lambda: load_adapter(tmp_path/'adapter'), lambda: put_adapter(load_model(place), tmp_path/'adapter'),
                 lambda: merge_adapters(tmp_path/'adapter', tmp_path/'merged')):
        with pytest.raises(SageError, match='trains the row of token 4100, the base has 4,096 tokens'): read()
    assert not (tmp_path/'merged').exists()


def test_a_head_that_stayed_small_is_refused_in_words(tmp_path):
    adapter(tmp_path/'adapter', base(tmp_path/'base', False), grown=True, target_modules=['q_proj', 'embed_tokens'])
    with pytest.raises(SageError, match='lm_head.weight for the others is not in the adapter'):
        load_adapter(tmp_path/'adapter')

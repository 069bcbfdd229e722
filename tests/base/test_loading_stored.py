"Bases that are stored quantised: used as they are, told, or refused before anything is loaded"
import json

import pytest
import torch
from safetensors.torch import load_file

from quick import two_layers
from sage_finetune.config import fit_config, LoRAConfig, TrainingConfig
from sage_finetune.core.disk import SageError
from sage_finetune.core.machine import Machine
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.inference.generate import load_adapter, load_for_chat
from sage_finetune.merge_chat import merge_run
from sage_finetune.base.loading import check_stored, load_model, load_tokenizer, quantisation_of
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

plain = dict(load_in_8bit=False, fp16=False)
ids = torch.arange(5, 40)[None]


@pytest.fixture(scope='module', params=[4, 8])
def stored(request, tmp_path_factory):
    "A base that bitsandbytes has stored in 4 or 8 bits"
    pytest.importorskip('bitsandbytes')
    folder,bits = tmp_path_factory.mktemp('stored'),request.param
    how = quantisation_of(TrainingConfig(**plain | {f'load_in_{bits}bit': True}))
    load_model(two_layers, quantisation=how).save_pretrained(folder)
    load_tokenizer(two_layers).save_pretrained(folder)
    return folder,bits


def config(base, tmp_path, **more):
    data = create_sample_data(tmp_path/'rows.json', 'qa', num_samples=20)
    return TrainingConfig(**dict(model_name=str(base), data_path=data, output_dir=tmp_path/'run', max_steps=2,
                                 gradient_accumulation_steps=1, learning_rate=1e-2, report_to='none') | more)


@pytest.mark.parametrize('asked', [{}, dict(load_in_8bit=False)], ids=['by default', '8 bits switched off'])
def test_it_trains_as_it_is_stored_and_the_record_says_so(stored, tmp_path, asked):
    base,bits = stored
    run = LoRATrainer(config(base, tmp_path, **asked), quiet=True)
    fitted = run.fitted
    assert (fitted.load_in_4bit, fitted.load_in_8bit)==(bits==4, bits==8)
    run.train()
    record = json.loads(RunFolder(tmp_path/'run').config.read_text())
    told = [c for c in record['_changes'] if c['setting'].startswith('load_in')]
    if bits==4 or asked: assert f'the base is stored in {bits} bits (bitsandbytes), and used as it is' in str(told)
    before = {n: t for f in base.glob('*.safetensors') for n,t in load_file(f).items()}
    packed = run.model.get_base_model().model.layers[0].mlp.up_proj.weight
    kept = packed.data if bits==4 else packed.CB if packed.CB is not None else packed.data
    assert torch.equal(kept.cpu().flatten(), before['model.layers.0.mlp.up_proj.weight'].flatten())


def test_what_was_trained_on_it_is_talked_to_and_merged_into_what_it_was_made_from(stored, tmp_path):
    base,bits = stored
    run = LoRATrainer(config(base, tmp_path), quiet=True)
    run.train()
    trained = run.model.eval()(input_ids=ids).logits
    assert torch.allclose(load_for_chat(tmp_path/'run')[0](input_ids=ids).logits, trained, atol=1e-3)
    assert torch.allclose(load_adapter(tmp_path/'run'/'lora_weights')[0](input_ids=ids).logits, trained, atol=1e-3)
    with pytest.raises(SageError, match='is stored quantised, and an adapter cannot be merged into that'):
        merge_run(tmp_path/'run')


def test_other_bits_by_hand_and_beginnings_that_move_weights_are_refused(stored, tmp_path):
    base,bits = stored
    other = f'load_in_{12-bits}bit'
    with pytest.raises(ValueError, match=f'`{other}=True`: .* is stored in {bits} bits'):
        fit_config(config(base, tmp_path, **{other: True}), Machine())
    with pytest.raises(ValueError, match='pip install bitsandbytes'):
        fit_config(config(base, tmp_path), Machine(bitsandbytes=False))
    run = LoRATrainer(config(base, tmp_path, lora=LoRAConfig(init_lora_weights='pissa')), quiet=True)
    with pytest.raises(ValueError, match='init_lora_weights="pissa"'): run.train()
    assert run.model is None
    with pytest.raises(SageError, match='merge refused|different bases|stored quantised'):
        LoRATrainer(config(base, tmp_path), quiet=True).train()
        merge_run(tmp_path/'run')


methods = dict(gptq=dict(bits=4, group_size=128), awq=dict(bits=4), mxfp4={}, aqlm={}, eetq={}, hqq={},
               torchao=dict(quant_type='int4_weight_only'), quanto={}, vptq={}, higgs={}, **{'a_new_one': {}},
               **{'compressed-tensors': dict(format='pack-quantized')})


@pytest.mark.parametrize('method', methods)
def test_a_method_that_cannot_be_used_here_is_refused_by_name_before_anything_is_loaded(method, tmp_path):
    base = tmp_path/'base'
    load_model(two_layers).save_pretrained(base)
    load_tokenizer(two_layers).save_pretrained(base)
    said = json.loads((base/'config.json').read_text())
    said['quantization_config'] = dict(quant_method=method, **methods[method])
    (base/'config.json').write_text(json.dumps(said))
    run = LoRATrainer(config(base, tmp_path), quiet=True)
    with pytest.raises(SageError, match=f'`model_name`: .*stored in .*{method}.*, and ') as e: run.train()
    assert run.model is None and run.dataset is None and len(str(e.value))<700
    with pytest.raises(ValueError, match='is not quantised once more'):
        fit_config(config(base, tmp_path, load_in_8bit=True), Machine())
    with pytest.raises(SageError): check_stored(str(base))

"The page for those who come from another tool is true: each line of its lists has a test, and a new one asks for one"
import json
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from sage_finetune.cli import app
from sage_finetune.config import fit_config, TrainingConfig
from sage_finetune.core.beforehand import tool_table
from sage_finetune.core.disk import SageError
from sage_finetune.core.machine import Machine
from sage_finetune.inference.merging import MergeReport
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.rows.tokens import encode
from sage_finetune.runs.other_tools import translated

page = json.loads((Path(__file__).parents[2]/'nbs'/'coming_from.ipynb').read_text(encoding='utf-8'))['cells']


def lines_under(heading):
    text = '\n'.join(''.join(c['source']) for c in page if c['cell_type']=='markdown')
    return [line[2:] for line in text.partition(f'## {heading}\n')[2].partition('\n## ')[0].splitlines()
            if line.startswith('- ')]


def refused(tmp_path, **more):
    "What a file of LLaMA-Factory is refused with"
    (tmp_path/'rows.json').write_text('[{"instruction": "a", "output": "b"}]')
    asked = dict(model_name_or_path='sage-tiny', stage='sft', output_dir=str(tmp_path/'run'),
                 dataset=str(tmp_path/'rows.json')) | more
    (tmp_path/'l.yaml').write_text(yaml.safe_dump(asked))
    with pytest.raises(SageError) as e: translated(tmp_path/'l.yaml')
    return str(e.value)


def note(name, table='trl-sft'): return tool_table(table).settings[name].get('note', '')


def all_weights(tmp_path):
    for kind in ('full', 'freeze'): assert f"'{kind}'" in refused(tmp_path, finetuning_type=kind)
    assert tool_table('unsloth').status('full_finetuning')=='refused'


def rewards(tmp_path):
    for stage in ('ppo', 'rm'): assert f"stage='{stage}'" in refused(tmp_path, stage=stage)
    (tmp_path/'t.yaml').write_text('trl: rloo\nmodel_name_or_path: sage-tiny\nuse_peft: true\noutput_dir: x\n')
    with pytest.raises(SageError, match="trl='rloo'"): translated(tmp_path/'t.yaml')


def vision(tmp_path): assert 'freeze_vision_tower=False' in refused(tmp_path, freeze_vision_tower=False)


def other_adapters(tmp_path):
    assert "finetuning_type='oft'" in refused(tmp_path, finetuning_type='oft')
    for name in ('use_galore', 'use_apollo', 'use_badam'): assert f'{name}=True' in refused(tmp_path, **{name: True})
    assert tool_table('trl-sft').status('lora_modules_to_save')=='mapped'


def divided(tmp_path):
    assert '--nproc N --config zero3' in refused(tmp_path, deepspeed='ds_z3_config.json')
    assert '--nproc N --config fsdp2' in refused(tmp_path, fsdp='full_shard')


def kernels(tmp_path): assert 'kernels' in note('use_unsloth', 'llamafactory') and 'kernels' in note('use_liger_kernel')


def browser(tmp_path): assert not {'webui', 'ui', 'gui'} & {*get_command(app).commands}


def end_of_turn(tmp_path):
    tok = load_tokenizer('sage-tiny')
    row = encode([dict(role='user', content='2?'), dict(role='assistant', content='2!')], tok)
    learned = [i for i,label in zip(row['input_ids'], row['labels']) if label!=-100]
    assert tok.convert_tokens_to_ids('<|im_end|>') in learned and '2?' not in tok.decode(learned)


def own_template(tmp_path): assert "model's own" in note('template', 'llamafactory')


def too_long(tmp_path): assert TrainingConfig().overflow=='drop'


def changed_for_the_machine(tmp_path):
    fitted,changes = fit_config(TrainingConfig(model_name='sage-tiny'), Machine('cpu'))
    assert not fitted.fp16 and any(c.setting=='fp16' and c.reason for c in changes)


def less_memory(tmp_path): assert 'effective batch stays' in note('auto_find_batch_size')


def same_command(tmp_path): assert 'resumes where it stopped' in note('resume_from_checkpoint')


def proved(tmp_path): assert {'difference', 'divergence', 'bound'}<={*MergeReport.__dataclass_fields__}


def on_a_cpu(tmp_path):
    c = TrainingConfig(model_name='sage-tiny', load_in_4bit=True, load_in_8bit=False)
    assert fit_config(c, Machine('cpu', bitsandbytes=True))[0].load_in_4bit


here = {'**The answers are learned': end_of_turn, '**The template is': own_template,
        '**A conversation that is': too_long,
        '**A setting that does not': changed_for_the_machine, '**When memory runs out': less_memory,
        '**Resuming is': same_command, '**Merging is proved': proved, '**A CPU is': on_a_cpu}
not_here = {'Training all weights': all_weights, 'Reward models': rewards, 'Video and sound': vision,
            'Adapters other than LoRA': other_adapters, 'DeepSpeed and FSDP': divided, 'Kernels': kernels,
            'A user interface': browser}


@pytest.mark.parametrize('heading,known', [('Different on purpose', here), ('Not here', not_here)])
def test_every_line_of_the_page_has_a_test(heading, known):
    lines = lines_under(heading)
    assert [l for l in lines if sum(l.startswith(k) for k in known)!=1]==[] and len(lines)==len(known)


@pytest.mark.parametrize('line', [*here, *not_here])
def test_a_line_of_the_page_is_true(line, tmp_path): (here | not_here)[line](tmp_path)

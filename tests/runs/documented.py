"""Commands and examples that other tools document, brought to the embedded model: what is exchanged, and nothing else

`tests/data/documented` has them as data: each command line of TRL's docs and scripts that trains, and the settings of
each LoRA example that LLaMA-Factory 0.9.5 and axolotl 0.19.0 ship. Exchanged are the model, the data, special tokens,
names of layers that another architecture has, and lengths above 2,048; two steps are trained, and a warm-up in steps
is one of them. All else stands.
"""
import json
import re
import shlex
from pathlib import Path

import yaml
from PIL import Image

from sage_finetune.runs.launch import tool_command

DATA = Path(__file__).parents[1]/'data'/'documented'
LAYERS = 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'
LONGEST = 2048 # positions of the embedded model


def commands():
    "{name: command line} of TRL; the name is the file it stands in and its number there"
    given = json.loads((DATA/'trl.json').read_text(encoding='utf-8'))
    return {f'{file} {i}': c for file,found in given.items() for i,c in enumerate(found, 1)}


def examples(tool):
    "{name: settings} of the examples of a tool: what they share, with what is other in each; null leaves a setting out"
    given = json.loads((DATA/f'{tool}.json').read_text(encoding='utf-8'))
    return {name: {k: v for k,v in (given['common'] | own).items() if v is not None}
            for name,own in given['examples'].items()}


# --- rows

def _turn(role, text, role_key, text_key):
    words = {'human': 'human', 'gpt': 'gpt'} if role_key=='from' else dict(human='user', gpt='assistant')
    return {role_key: words[role], text_key: text}


def talks(n=16, turns='messages', role_key='role', text_key='content', image=None):
    "Conversations of one question, their turns under the names that are asked for"
    def asked(i): return [dict(type='image'), dict(type='text', text=f'{i} plus 1?')] if image else f'{i} plus 1?'
    rows = [{turns: [_turn('human', asked(i), role_key, text_key),
                     _turn('gpt', f'It is {i+1}.', role_key, text_key)]} for i in range(n)]
    return [r | dict(images=[image]) for r in rows] if image else rows


def pairs(n=16, image=None):
    "Judged pairs"
    def asked(i): return [dict(type='image'), dict(type='text', text=f'{i}?')] if image else f'{i}?'
    def answer(text): return [dict(role='assistant', content=text)]
    rows = [dict(prompt=[dict(role='user', content=asked(i))], chosen=answer(f'It is {i}.'), rejected=answer('No.'))
            for i in range(n)]
    return [r | dict(images=[image]) for r in rows] if image else rows


def judged(n=16): return [dict(prompt=p['prompt'], completion=p['chosen'], label=i%2==0) for i,p in enumerate(pairs(n))]


def asked(n=16):
    "Questions with a number for an answer"
    return [dict(prompt=[dict(role='user', content=f'{i} plus 1?')], solution=f'{i+1}') for i in range(n)]


def alpaca(n=16): return [dict(instruction=f'{i} plus 1?', input='', output=f'It is {i+1}.') for i in range(n)]


class Place:
    "A folder with small data and, where one is asked for, a vision-language model"
    def __init__(self, folder, vision=None):
        self.folder,self.vision = Path(folder),vision
        self.image = str(self.folder/'image.png')
        Image.new('RGB', (32, 32)).save(self.image)

    def rows(self, name, rows):
        (self.folder/name).write_text(''.join(json.dumps(r)+'\n' for r in rows), encoding='utf-8')
        return name

    def split(self, name, rows):
        "A folder with the two splits that a data set on the Hub has"
        (self.folder/name).mkdir(exist_ok=True)
        for part in ('train', 'test', 'validation'): self.rows(f'{name}/{part}.jsonl', rows)
        return name


# --- what is exchanged

def layers(asked, vision):
    "Names of layers that the model at hand has, or the pattern where it fits some"
    if not asked or asked in ('all', 'all-linear'): return asked
    if isinstance(asked, str) and re.search(r'[\\(\[*]', asked):
        names = [f'model.language_model.layers.0.{p}' for p in ('self_attn.q_proj', 'mlp.up_proj')]
        return asked if vision and any(re.fullmatch(asked, n) for n in names) else r'.*\.(q|k|v|o)_proj'
    names = [n.strip(' ,') for n in (asked.split(',') if isinstance(asked, str) else asked)]
    if all(n.rpartition('.')[2] in LAYERS for n in names): return asked
    return [n for n in names if n.rpartition('.')[2] in LAYERS] or ['q_proj', 'v_proj']


def of_trl(words, place, steps=2, peft=False):
    "A command of TRL as it would be given for the embedded model; the options of its launcher go"
    asked = tool_command(shlex.split(words))
    s,script = dict(asked.settings),asked.settings['trl']
    vision = 'vlm' in words
    rows = dict(sft=talks, dpo=pairs, kto=judged, orpo=pairs, grpo=asked).get(script, talks)
    made = rows(image=place.image) if vision else rows()
    s |= dict(model_name_or_path=str(place.vision) if vision else 'sage-tiny', max_steps=steps,
              dataset_name=place.split(f'{script}{"_vision"*vision}', made))
    if 'eos_token' in s: s['eos_token'] = '<|im_end|>'
    if 'max_completion_length' in s: s['max_completion_length'] = min(s['max_completion_length'], LONGEST//2)
    if s.get('warmup_steps', 0)>1: s['warmup_steps'] = 1
    if 'lora_target_modules' in s: s['lora_target_modules'] = layers(s['lora_target_modules'], vision)
    if peft: s['use_peft'] = True
    return type(asked)(s, asked.does, {}).save(place.folder)


def _data_of_factory(place):
    "The data sets of LLaMA-Factory's examples, described in `data`"
    (place.folder/'data').mkdir(exist_ok=True)
    ranked = [dict(conversations=[{'from': 'human', 'value': f'{i}?'}], chosen={'from': 'gpt', 'value': f'It is {i}.'},
                   rejected={'from': 'gpt', 'value': 'No.'}) for i in range(16)]
    tags = dict(role_tag='role', content_tag='content', user_tag='user', assistant_tag='assistant')
    seen = [dict(messages=[dict(role='user', content=f'<image>{i}?'), dict(role='assistant', content=f'It is {i}.')],
                 images=[place.image]) for i in range(16)]
    columns = dict(messages='conversations', chosen='chosen', rejected='rejected')
    about = {
        'dpo_en_demo': (ranked, dict(ranking=True, formatting='sharegpt', columns=columns)),
        'rlhf_v': ([r | dict(conversations=[{'from': 'human', 'value': f'<image>{i}?'}], images=[place.image])
                    for i,r in enumerate(ranked)],
                   dict(ranking=True, formatting='sharegpt', columns=columns | dict(images='images'))),
        'kto_en_demo': ([r | dict(label=i%2==0) for i,r in enumerate(talks())],
                        dict(formatting='sharegpt', columns=dict(messages='messages', kto_tag='label'), tags=tags)),
        'mllm_demo': (seen, dict(formatting='sharegpt', columns=dict(messages='messages', images='images'), tags=tags)),
        'c4_demo': ([dict(text='One text about one thing. '*4) for _ in range(16)], dict(columns=dict(prompt='text')))}
    for name in ('identity', 'alpaca_en_demo', 'alpaca_zh_demo'): about[name] = alpaca(),{}
    for name,(rows,_) in about.items(): place.rows(f'data/{name}.jsonl', rows)
    info = {name: dict(file_name=f'{name}.jsonl') | how for name,(_,how) in about.items()}
    (place.folder/'data'/'dataset_info.json').write_text(json.dumps(info), encoding='utf-8')
    (place.folder/'data'/'v1_sft_demo.yaml').write_text(yaml.safe_dump(dict(identity=dict(
        file_name='identity.jsonl', dataset_dir='data', converter='alpaca', num_samples=6))), encoding='utf-8')


def of_factory(settings, place, steps=2):
    "A file of LLaMA-Factory for the embedded model"
    _data_of_factory(place)
    s,names = dict(settings),str(settings.get('dataset'))
    vision = any(n in names for n in ('mllm_demo', 'rlhf_v')) or 'vl' in str(settings.get('template'))
    s['model' if 'model' in s else 'model_name_or_path'] = str(place.vision) if vision else 'sage-tiny'
    if 'dataset' in s or 'train_dataset' in s: s['max_steps'] = steps
    for name in ('lora_target',): s |= {name: layers(s[name], vision)} if name in s else {}
    file = place.folder/'asked.yaml'
    file.write_text(yaml.safe_dump(s), encoding='utf-8')
    return file


def _rows_of_axolotl(entry, place, i, rl, vision):
    "An entry of `datasets` with local rows of the same shape"
    kind,image = str(entry.get('type')),place.image if vision else None
    keys = entry.get('message_property_mappings') or {}
    role,text = (entry.get(f'message_field_{n}') or keys.get(n, n) for n in ('role', 'content'))
    turns = entry.get('field_messages') or 'messages'
    if rl=='kto': rows = judged()
    elif rl:
        rows = pairs()
        if kind.startswith('chat_template') and turns!='prompt': # the turns before the answer have a name of their own
            rows = [{turns: r['prompt'], 'chosen': r['chosen'][0], 'rejected': r['rejected'][0]} for r in rows]
    elif kind.startswith('alpaca'): rows = alpaca()
    elif kind=='completion': rows = [{entry.get('field') or 'text': 'One text about one thing. '*3} for _ in range(16)]
    else: rows = talks(turns=turns, role_key=role, text_key=text, image=image)
    given = {k: v for k,v in entry.items() if k not in ('data_files', 'name')}
    return given | dict(path=place.rows(f'rows{i}.jsonl', rows*8 if 'split' in entry else rows))


def of_axolotl(settings, place, steps=2):
    "A file of axolotl for the embedded model"
    s = dict(settings)
    vision = 'processor_type' in s
    s |= dict(base_model=str(place.vision) if vision else 'sage-tiny', max_steps=steps,
              sequence_len=min(s.get('sequence_len', 512), LONGEST))
    s['datasets'] = [_rows_of_axolotl(e, place, i, s.get('rl'), vision) for i,e in enumerate(s['datasets'])]
    if 'special_tokens' in s:
        s['special_tokens'] = {k: '<|im_end|>' if k=='eos_token' else '<|endoftext|>' for k in s['special_tokens']}
    if 'eot_tokens' in s: s['eot_tokens'] = ['<|im_end|>']
    if s.get('warmup_steps', 0)>1: s['warmup_steps'] = 1
    if 'lora_target_modules' in s: s['lora_target_modules'] = layers(s['lora_target_modules'], vision)
    file = place.folder/'asked.yaml'
    file.write_text(yaml.safe_dump(s), encoding='utf-8')
    return file


made = dict(llamafactory=of_factory, axolotl=of_axolotl)


def condensed(found):
    "{name: settings} as `common` and what is other in each, the form of the files in `tests/data/documented`"
    found = {name: {k: v for k,v in s.items() if v is not None} for name,s in found.items()}
    counts = {}
    for s in found.values():
        for k,v in s.items(): counts.setdefault(k, {}).setdefault(json.dumps(v), []).append(k)
    common = {}
    for k,values in counts.items():
        value,those = max(values.items(), key=lambda kv: len(kv[1]))
        if len(those)>len(found)/2: common[k] = json.loads(value)
    return dict(common=common, examples={name: {k: v for k,v in s.items() if k not in common or common[k]!=v} | {
        k: None for k in common if k not in s} for name,s in found.items()})


def as_text(found):
    "The file of `condensed`, an example a line"
    made = condensed(found)
    lines = [f'  {json.dumps(name)}: {json.dumps(s, ensure_ascii=False)}' for name,s in made['examples'].items()]
    return (f'{{"common": {json.dumps(made["common"], ensure_ascii=False)},\n "examples": {{\n' + ',\n'.join(lines) +
            '\n }}\n')

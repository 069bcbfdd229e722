"""What of other tools runs here, counted: the settings of TRL, LLaMA-Factory and axolotl by what becomes of each, and
their documented commands and examples, each really trained for two steps on the embedded model

`python benchmarks/other_tools.py` prints the tables in Markdown and keeps what came of each command and example in
other_tools.json (`--settings` prints the table of settings alone, `--anew` forgets what is kept). Examples of axolotl
that differ in numbers alone (rates, ranks, lengths, batches, epochs) are trained once; `--every` trains each;
`--translate` trains none that is left, and the next call goes on with them. With the
sources of LLaMA-Factory and axolotl (`pip download --no-deps --no-binary :all: llamafactory==0.9.5 axolotl==0.19.0`,
unpacked), `--sources FOLDER` writes the lists of examples anew, and names each setting of theirs that has no row here.
Trackers that files name must be installed (`pip install wandb`), as for the tool itself.
"""
import argparse
import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests'), str(ROOT/'tests'/'runs')]
os.environ |= dict(WANDB_MODE='disabled', HF_HUB_OFFLINE='1')

import documented  # noqa: E402
import yaml  # noqa: E402

from sage_finetune.core.beforehand import tool_table  # noqa: E402
from sage_finetune.core.disk import SageError, write_json  # noqa: E402

TABLES = ('trl-sft', 'trl-dpo', 'trl-kto', 'trl-orpo', 'trl-grpo', 'llamafactory', 'llamafactory-v1', 'axolotl',
          'unsloth')
KEPT = Path(__file__).with_suffix('.json')
KINDS = ('ran', 'translated, not trained', 'trains all weights', 'another method', 'for several processes',
         'talks to a model', 'refused by name', 'an error')


# --- settings

def fate(row):
    "What becomes of a setting: it has a place here, bears on nothing, or only one value of it can be honoured"
    if {'to', 'values', 'hand'} & {*row}: return 'mapped'
    return 'refused unless off' if 'off' in row else 'without effect'


def settings():
    "One row a table; those of TRL are the fields of the installed version"
    from test_other_tools import scripts_of_trl
    theirs = scripts_of_trl()
    for name in TABLES:
        rows = tool_table(name).settings
        script = name.removeprefix('trl-')
        known = theirs.get(script, rows) if name.startswith('trl-') else rows
        counts = Counter(fate(rows[n]) if n in rows else 'unknown' for n in known)
        yield name, len(known), *(counts[k] for k in ('mapped', 'without effect', 'refused unless off', 'unknown'))


# --- the sources of the other tools

def fields_in(files, kinds=None):
    "Names of the fields of the classes in files of Python"
    trees = [ast.parse(f.read_text(encoding='utf-8')) for f in files]
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    return {s.target.id for c in classes if kinds is None or kinds(c) for s in c.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}


NAMES = {'base_model': 'model', 'model_name_or_path': 'model', 'model': 'model', 'output_dir': 'out', 'wandb_name': '',
         'wandb_project': '', 'wandb_entity': '', 'wandb_watch': '', 'wandb_log_model': '',
         'dataset_prepared_path': 'prepared', 'processor_type': 'AutoProcessor'}


def short(given):
    "Settings without the names of models, data sets and folders, which are exchanged"
    named = {k: NAMES[k] if k in NAMES and v is not None else v for k,v in given.items()}
    if not isinstance(given.get('datasets'), list): return named
    entries = [{k: v for k,v in e.items() if k!='data_files'} | dict(path='rows') for e in given['datasets']]
    return named | dict(datasets=entries)


def read_sources(folder):
    "Write the lists of examples from the unpacked sources, and print each of their settings that has no row here"
    factory,axolotl = (next(p for p in Path(folder).glob(f'{n}-*') if p.is_dir()) for n in ('llamafactory', 'axolotl'))
    examples = dict(llamafactory={}, axolotl={})
    for tool,root in (('llamafactory', factory), ('axolotl', axolotl)):
        for file in sorted((root/'examples').glob('**/*.y*ml')):
            given = yaml.safe_load(file.read_text(encoding='utf-8'))
            if not isinstance(given, dict): continue
            kind = given.get('adapter') if tool=='axolotl' else (
                given.get('finetuning_type', 'lora') if 'model_name_or_path' in given
                else (given.get('peft_config') or {}).get('name') if 'model' in given else None)
            if kind in ('lora', 'qlora'): examples[tool][file.relative_to(root/'examples').as_posix()] = short(given)
        (documented.DATA/f'{tool}.json').write_text(documented.as_text(examples[tool]), encoding='utf-8')
    source = factory/'src'/'llamafactory'
    schemas = axolotl/'src'/'axolotl'/'utils'/'schemas'
    nested = re.compile('Type$|Dataset$|FSDPConfig|TRLConfig|VllmConfig|QAT|PTQ|EBFTConfig|FP8|SpecialTokens|Env|GPU|'
                        'LrGroup|LoftQ|PeftConfig|DynamicCheckpoint|SelectiveCheckpoint|RoleBoundary|Capabilities')
    theirs = dict(llamafactory=fields_in((source/'hparams').glob('*.py')),
                  axolotl=fields_in(schemas.glob('*.py'), lambda c: not nested.search(c.name)) | fields_in(
                      (axolotl/'src'/'axolotl'/'integrations').glob('*/args.py'),
                      lambda c: c.name.endswith('Args') and c.name!='CompressionArgs'))
    theirs['llamafactory-v1'] = fields_in((source/'v1'/'config').glob('*_args.py'))
    for name,fields in theirs.items():
        missing = sorted(fields-{*tool_table(name).settings})
        print(f'{name}: {len(fields)} fields, without a row: {", ".join(missing) or "none"}')


# --- commands and examples

def asked():
    "(tool, name, what makes its file) for each command and example"
    for name,words in documented.commands().items():
        yield 'trl', name, lambda place,w=words: documented.of_trl(w, place)
        if '--use_peft' not in words:
            yield 'trl', f'{name} --use_peft', lambda place,w=words: documented.of_trl(w, place, peft=True)
    for tool,make in documented.made.items():
        for name,given in documented.examples(tool).items():
            yield tool, name, lambda place,g=given,m=make: m(g, place)


NUMBERS = {
    'learning_rate', 'max_length', 'per_device_train_batch_size', 'gradient_accumulation_steps', 'num_train_epochs',
    'warmup_ratio', 'warmup_steps', 'logging_steps', 'save_steps', 'save_total_limit', 'seed', 'weight_decay',
    'adam_beta1', 'adam_beta2', 'adam_epsilon', 'max_grad_norm', 'output_dir', 'dataloader_num_workers', 'r',
    'lora_alpha', 'lora_dropout'}


def in_our_settings(make, vision):
    "(An example translated, why it is refused): one of the two is None"
    from sage_finetune.runs.other_tools import translated
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            return translated(make(documented.Place(folder, vision))),None
        except SageError as e: return None,' '.join(str(e).replace(folder, '.').split())
        finally: os.chdir(here)


def kind_of(make, vision):
    "What an example asks for, its numbers apart; None where it is refused"
    t,refused = in_our_settings(make, vision)
    if refused is not None: return None
    plain = {k: v for k,v in (t.settings | t.settings.get('lora', {})).items() if k not in NUMBERS and k!='lora'}
    layers = plain['target_modules']
    plain['target_modules'] = 'names' if isinstance(layers, list) else 'all' if layers=='all-linear' else 'a pattern'
    reads = [sorted(map(str, (d.read.keywords if d.read else {}).items())) for d in t.data]
    return json.dumps([plain, reads, bool(t.share), [d.split for d in t.data]], sort_keys=True, default=str)


def came_of(make, vision):
    "\"ran\", or why not"
    from sage_finetune.runs.pipeline import merge_asked
    from sage_finetune.runs.tasks import trainer_of
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            os.chdir(folder)
            file = make(documented.Place(folder, vision))
            if 'export_dir' in file.read_text(): return merged(file, folder, vision, merge_asked, trainer_of)
            run = trainer_of(file, quiet=True)
            steps = run.train().steps
            return 'ran' if steps==2 else f'{steps} steps'
        except (SageError, ValueError) as e: return ' '.join(str(e).replace(folder, '.').split())
        except Exception as e: return f'ERROR {type(e).__name__}: {" ".join(str(e).split())}'
        finally: os.chdir(here)


def merged(file, folder, vision, merge_asked, trainer_of):
    "A file that merges, after a run has made the adapter that it names"
    given = yaml.safe_load(file.read_text())
    block = given.get('peft_config', given)
    if block.get('adapter_name_or_path'):
        wanted = dict(model_name_or_path=given.get('model_name_or_path') or given['model'], stage='sft', do_train=True,
                      finetuning_type='lora', lora_target='all', output_dir=block['adapter_name_or_path'], max_steps=1,
                      dataset='mllm_demo' if 'vl' in str(given) else 'identity')
        (Path(folder)/'before.yaml').write_text(yaml.safe_dump(wanted))
        trainer_of(Path(folder)/'before.yaml', quiet=True).train()
    report = merge_asked(file, say=lambda text: None)
    return 'ran' if report is not None and (Path(report.path)/'config.json').is_file() else 'nothing was merged'


def translates(make, vision):
    "Why a file is refused; else that it was translated, and not trained"
    refused = in_our_settings(make, vision)[1]
    return 'translated, not trained' if refused is None else refused


def runs(anew=False, every=False, train=True):
    "{tool: {name: \"ran\" or why not}}; what is kept is not tried again"
    from sage_finetune.base.tiny_vision import tiny_vision_model
    kept = {} if anew or not KEPT.is_file() else json.loads(KEPT.read_text(encoding='utf-8'))
    with tempfile.TemporaryDirectory() as folder:
        vision = tiny_vision_model(Path(folder)/'vision')
        alike = {}
        for tool,name,make in asked():
            known = kept.setdefault(tool, {}).get(name)
            if train and known=='translated, not trained': known = None
            had = known is not None
            kind = kind_of(make, vision) if tool=='axolotl' and not every else None
            if not had: known = f'ran: as {alike[kind]}' if kind in alike else (
                came_of(make, vision) if train else translates(make, vision))
            if known=='ran' and kind: alike.setdefault(kind, name)
            if had: continue
            kept[tool][name] = known
            print(f'{tool} {name}: {known[:200]}', file=sys.stderr, flush=True)
            write_json(KEPT, kept)
    return kept


def reason(what):
    "A refusal as one word to count by"
    if what.startswith('ran'): return 'ran'
    if what.startswith('translated'): return what
    kinds = {'use_peft=False': 'trains all weights', 'trl=': 'another method',
             'for several processes': 'for several processes', 'rl=': 'another method', 'stage=': 'another method',
             'dataset is missing (to train': 'talks to a model'}
    if what.startswith('ERROR') or what[0].isdigit() or what=='nothing was merged': return 'an error'
    return next((k for part,k in kinds.items() if part in what), 'refused by name')


def counted(kept):
    "Rows of the table of commands and examples"
    for tool,found in kept.items():
        for added in (False, True) if tool=='trl' else (False,):
            those = [reason(w) for n,w in found.items() if n.endswith(' --use_peft')==added]
            yield f'{tool}{", with --use_peft added" if added else ""}', len(those), *(those.count(k) for k in KINDS)


def markdown(head, rows): return '\n'.join('| '+' | '.join(map(str, r))+' |' for r in (head, ['---']*len(head), *rows))


if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--settings', action='store_true')
    parser.add_argument('--anew', action='store_true')
    parser.add_argument('--every', action='store_true')
    parser.add_argument('--translate', action='store_true')
    parser.add_argument('--sources')
    given = parser.parse_args()
    if given.sources: read_sources(given.sources)
    head = ['settings of', 'there are', 'mapped', 'without effect', 'refused unless off', 'unknown']
    print(markdown(head, settings()))
    if given.settings or given.sources: raise SystemExit
    kept = runs(given.anew, given.every, not given.translate)
    print('\n'+markdown(['documented', 'there are', *KINDS], counted(kept)))
    for tool,found in kept.items():
        for name,what in found.items():
            if reason(what) in ('refused by name', 'an error'): print(f'- {tool} `{name}`: {what}')

"Write the map of the notebooks (README's table, CONTRIBUTING's table, the sidebar) from their folders and first lines"
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'

# A wing's own line, in reading order; what each notebook is for stands in its first cell
SECTIONS = {
    'core': 'files that appear whole, what shows itself, checked settings, the machine, the run folder with lock '
    'and checkpoints',
    'record': 'what runs wrote down: numbers, curves in letters and in pages, tags and conditions, the trash',
    'rows': 'rows of any file and format, as conversations, as text by the chat template, as token ids',
    'base': 'the model before it is adapted: packed attention, loading, weights on disk, a small vision model, GGUF',
    'model': 'the adapter, the loss, what is kept of both, memory, advice',
    'training': 'batches and padding, the held-out split, the loop (loss, optimizer, out of memory), resuming, '
    'several processes',
    'inference': 'answers token by token, what is right in them, the exam, the proved merge',
    'serving': 'a model behind the API of OpenAI, and as a folder or GGUF file for others',
    'rewards': 'answers that are checked instead of shown: rewards, a sandbox for code, groups of sampled answers, '
    'GRPO, and all of it to look at',
    'synthetic': 'rows that are made: facts of a codebase, questions and answers by a teacher',
    'runs': 'tasks, which kind of file a run was given (ours, TRL, LLaMA-Factory, axolotl), runs '
    'read back and compared, launching',
    'study': 'many runs on one base, exams with their uncertainty, reports, what taught a model that',
    'ui': 'looking at rows and tokens, the dashboard, the form, what was learned, all runs at a glance',
}
OTHER = {'tutorials': 'Tutorials', 'recipes': 'Recipes', 'zh': '中文'}
PAGES = 'index', 'how_it_works', 'when_something_is_wrong', 'coming_from'
MARK = re.compile(r'(<!-- map: begin -->\n).*?(<!-- map: end -->)|( *# map: begin\n).*?( *# map: end)', re.S)


def notebooks(
    folder='', # A wing, "tutorials" or "recipes"; the root if empty
): # Paths relative to `nbs`, without ending, in order
    "The notebooks of one folder"
    found = sorted((NBS/folder).glob('*.ipynb'), key=lambda path: (path.stem!='index', path.stem))
    return [name for path in found if (name := path.relative_to(NBS).with_suffix('').as_posix()) not in PAGES]


def first_lines(
    name, # Path relative to `nbs`, without ending
): # Title and one line
    "What a notebook says of itself in its first cell"
    cell = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells'][0]
    lines = [line.strip() for line in ''.join(cell['source']).splitlines() if line.strip()]
    if len(lines)<2 or not lines[0].startswith('# ') or not lines[1].startswith('> '):
        raise SystemExit(f'nbs/{name}.ipynb must begin with a cell "# title" and "> one line"')
    return lines[0][2:], lines[1][2:]


def short(name): return name.rpartition('/')[2]


def link(name, base=''): return f'[{short(name)}]({base}{name}.ipynb)'


def readme_table(): # Lines of Markdown
    "The story one row a notebook, each wing one row"
    yield '| | |'
    yield '|---|---|'
    for name in notebooks(): yield f'| {link(name)} | {first_lines(name)[1]} |'
    for wing, told in SECTIONS.items():
        yield f'| **{wing}** {" · ".join(link(name) for name in notebooks(wing))} | {told} |'


def contributing_table(): # Lines of Markdown
    "One row a notebook"
    yield '| notebook | what it owns |'
    yield '|---|---|'
    for folder in ('', *SECTIONS):
        for name in notebooks(folder): yield f'| [`{name}`](nbs/{name}.ipynb) | {first_lines(name)[1]} |'


def sidebar(): # Lines of YAML
    "The pages in reading order: start, tutorials, recipes, the story, the wings (these in the order of imports)"
    def section(title, names):
        yield f'      - section: {title}'
        yield '        contents:'
        for name in names:
            yield f'          - {{text: {json.dumps(first_lines(name)[0], ensure_ascii=False)}, href: {name}.ipynb}}'
    yield from section('Start', PAGES)
    for folder in 'tutorials', 'recipes': yield from section(OTHER[folder], notebooks(folder))
    yield from section('The story', notebooks())
    for wing in SECTIONS: yield from section(wing, notebooks(wing))
    yield from section(OTHER['zh'], notebooks('zh'))


def filled(
    text, # With a pair of marks
    lines, # What stands between them
): # The text with `lines` between the marks
    "Put lines between the marks of a text"
    if not MARK.search(text): raise SystemExit('the marks `map: begin` and `map: end` are missing')
    body = '\n'.join(lines)+'\n'
    return MARK.sub(lambda m: f'{m[1] or m[3]}{body}{m[2] or m[4]}', text)


def with_law(
    text, # Of a notebook that tells the order of imports
): # The same, with the line of CONTRIBUTING
    "Put the order of imports into a notebook"
    law = re.search(r'^core < .+$', (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)[0]
    return re.sub(r'`core < [\w< ]+`', lambda _: f'`{law}`', text)


def written(): # (path, its text as it must be) of each file with a map
    "The files with a map, in step with the notebooks"
    index = json.loads((NBS/'index.ipynb').read_text(encoding='utf-8'))
    for cell in index['cells']:
        text = ''.join(cell['source'])
        if '<!-- map: begin -->' in text: cell['source'] = filled(text, readme_table()).splitlines(True)
    yield NBS/'index.ipynb', json.dumps(index, ensure_ascii=False, indent=1)+'\n'
    yield NBS/'how_it_works.ipynb', with_law((NBS/'how_it_works.ipynb').read_text(encoding='utf-8'))
    for path, lines in (ROOT/'CONTRIBUTING.md', contributing_table()), (ROOT/'_quarto.yml', sidebar()):
        yield path, filled(path.read_text(encoding='utf-8'), lines)


def main(): # Exit status
    "Write the maps, or with `--check` name those that are out of step"
    unknown = {path.name for path in NBS.iterdir() if path.is_dir() and path.name[0] not in '._'}
    unknown -= {*SECTIONS, *OTHER, 'images'}
    if unknown: raise SystemExit(f'nbs/{sorted(unknown)[0]} is no section of tools/map.py: add it there')
    stale = [(path, text) for path, text in written() if path.read_text(encoding='utf-8')!=text]
    if '--check' not in sys.argv[1:]:
        for path, text in stale: path.write_text(text, encoding='utf-8')
        return 0
    for path, _ in stale: print(f'{path.relative_to(ROOT)} is out of step with the notebooks: make sync')
    return int(bool(stale))


if __name__=='__main__': sys.exit(main())

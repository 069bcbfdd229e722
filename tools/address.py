"Write what settings.ini says about place and release: addresses, Colab badges, install cells, the lines on releases"
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Notebooks whose lessons need more than the package brings: the extra of settings.ini that has it
EXTRAS = {
    '04_preference': 'trl', 'rewards/04_trainer': 'trl', 'rewards/05_check': 'trl',
    'rows/04_images': 'vision', 'base/03_tiny_vision': 'vision', 'recipes/images': 'vision', 'recipes/rewards': 'trl',
    'tutorials/11_learning_by_reward': 'trl',
    'serving/00_request': 'serve', 'serving/01_chat_api': 'serve', 'serving/03_serve': 'serve',
    'synthetic/00_code_facts': 'code', 'synthetic/01_codebase': 'code',
}
MODULES = {'pillow': 'PIL'}  # where a package is imported under another name
BADGE = '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
INSTALL = '''\
#| eval: false
import subprocess,sys
from importlib.util import find_spec

class NotInstalled(Exception):
    def _render_traceback_(self): return [str(self)]

packages = {{
{packages}
}}
if find_spec('{lib}'): packages = {{name: wanted for name,wanted in packages.items() if not find_spec(name)}}
if packages:
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', *packages.values()],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end='')
    if done.returncode: raise NotInstalled(f'Stopped: pip could not install {{[*packages]}}; its reason is above')
'''
RELEASED = re.compile(r'(<!-- released: begin -->).*?(<!-- released: end -->)', re.S)
CHANGES = re.compile(r'(?:^\[[\w.]+\]: \S+\n)+\Z', re.M)
TEXTS = ('pyproject.toml', 'CHANGELOG.md', 'CONTRIBUTING.md', 'AGENTS.md', 'benchmarks/README.md',
         'sage_finetune/models/sage-tiny/README.md')


def settings(): # The section of settings.ini, its %(…)s filled in
    "What a release edits"
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def archive(
    ini, # From `settings`
): # Address that pip installs from
    "The files of the branch as GitHub packs them"
    return f"{ini['git_url']}/archive/refs/heads/{ini['branch']}.zip"


def module_name(
    requirement, # Such as "pillow>=10.3"
): # Such as "PIL"
    "What a requirement is imported as"
    name = re.match(r'[\w.-]+', requirement)[0]
    return MODULES.get(name, name.replace('-', '_'))


def needed(
    name, # Notebook: its path in `nbs` without ending
    cells, # Its cells
    ini, # From `settings`
): # {module: what pip is given for it}
    "What a notebook needs installed: the package, what its lessons are checked with, its extra"
    found = {ini['lib_name']: f"{ini['dist_name']} @ {archive(ini)}"}
    lessons = any(re.search(r'^from fastcore', ''.join(c['source']), re.M) for c in cells if c['cell_type']=='code')
    extras = [*(['lessons'] if lessons else []), *([EXTRAS[name]] if name in EXTRAS else [])]
    for wanted in ' '.join(ini[f'{extra}_requirements'] for extra in extras).split():
        found[module_name(wanted)] = wanted
    return found


def install_cell(
    name, # Notebook: its path in `nbs` without ending
    cells, # Its cells
    ini, # From `settings`
): # Python
    "The cell that installs what a notebook needs, where it is missing, and stops where that fails"
    packages = '\n'.join(f'    {module!r}: {wanted!r},' for module, wanted in needed(name, cells, ini).items())
    return INSTALL.format(packages=packages, lib=ini['lib_name'])


def badge(name, ini):
    place = f"{ini['user']}/{ini['lib_name']}/blob/{ini['branch']}/nbs/{name}.ipynb"
    return f'{BADGE}(https://colab.research.google.com/github/{place})'


def release_lines(
    ini, # From `settings`
): # Markdown
    "What is released and what is not, and how each is installed"
    here = f"`pip install \"{ini['dist_name']} @ {archive(ini)}\"`"
    if not ini['released'].strip():
        return (f"**Released: nothing yet.** PyPI has no `{ini['dist_name']}`; this is version {ini['version']} before "
                f"its release. The first cell of each notebook installs it as it stands in the repository, on Colab "
                f"too, and in a terminal {here} does.")
    return (f"**Released: {ini['released']}** (`pip install {ini['dist_name']}`). The first cell of each notebook "
            f"installs what stands in the repository, on Colab too, and in a terminal {here} does; what is newer there "
            f"is told by [CHANGELOG]({ini['git_url']}/blob/{ini['branch']}/CHANGELOG.md).")


def addressed(
    text, # Of any file
    ini, # From `settings`
): # The same, with the addresses of settings.ini
    "Put the repository's and the site's address into a text"
    lib = re.escape(ini['lib_name'])
    text = re.sub(rf'https://github\.com/[\w.-]+/{lib}\b', lambda _: ini['git_url'], text)
    return re.sub(rf'https://[\w-]+\.github\.io/{lib}\b', lambda _: ini['doc_host']+ini['doc_baseurl'], text)


def change_links(
    text, # CHANGELOG.md
    ini, # From `settings`
): # The same, its links at the end written anew
    "A version with a date has a tag; the others stand on the branch"
    tagged = re.findall(r'^## \[([\d.]+)\] - \d{4}-', text, re.M)
    branch = f"{ini['git_url']}/commits/{ini['branch']}"
    lines = [f"[Unreleased]: {ini['git_url']}/compare/v{tagged[0]}...HEAD" if tagged else f'[Unreleased]: {branch}']
    for version in re.findall(r'^## \[([\d.]+)\]', text, re.M):
        lines.append(f"[{version}]: {ini['git_url']}/releases/tag/v{version}" if version in tagged
                     else f'[{version}]: {branch}')
    return CHANGES.sub(lambda _: '\n'.join(lines)+'\n', text)


def notebook(
    path, # Notebook
    ini, # From `settings`
): # Its text as it must be
    "A notebook with its addresses, badge, install cell and lines on releases"
    book = json.loads(addressed(path.read_text(encoding='utf-8'), ini))
    name = path.relative_to(ROOT/'nbs').with_suffix('').as_posix()
    for cell in book['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type']=='markdown' and text.startswith(BADGE): text = badge(name, ini)
        elif cell['cell_type']=='code' and re.match(r'#\| eval: false\n(%pip install|import subprocess,sys\n)', text):
            text = install_cell(name, book['cells'], ini).rstrip('\n')
        text = RELEASED.sub(lambda m: f'{m[1]}{release_lines(ini)}{m[2]}', text)
        cell['source'] = text.splitlines(True)
    return json.dumps(book, ensure_ascii=False, indent=1)+'\n'


def written(): # (path, its text as it must be) of each file with an address
    "Every file that says where the project lives"
    ini = settings()
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        hidden = any(part[0] in '._' for part in path.relative_to(ROOT/'nbs').parts)
        if not hidden: yield path, notebook(path, ini)
    for path in (ROOT/name for name in TEXTS):
        text = addressed(path.read_text(encoding='utf-8'), ini)
        yield path, change_links(text, ini) if path.name=='CHANGELOG.md' else text


def main(): # Exit status
    "Write the addresses, or with `--check` name the files that are out of step"
    stale = [(path, text) for path, text in written() if path.read_text(encoding='utf-8')!=text]
    if '--check' not in sys.argv[1:]:
        for path, text in stale: path.write_text(text, encoding='utf-8')
        return 0
    for path, _ in stale: print(f'{path.relative_to(ROOT)} is out of step with settings.ini: make sync')
    return int(bool(stale))


if __name__=='__main__': sys.exit(main())

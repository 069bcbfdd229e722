"The notebooks and modules of the project, as the tests of its form read them"
import ast
import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT/'sage_finetune'
SPINE = '00_config', '01_data', '02_trainer', '03_merge_chat'


@cache
def notebooks(): # {path relative to `nbs`, without ending: its cells}
    "Every notebook of the project"
    found = {}
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        name = path.relative_to(ROOT/'nbs').with_suffix('').as_posix()
        if any(part[0] in '._' for part in Path(name).parts): continue
        found[name] = json.loads(path.read_text(encoding='utf-8'))['cells']
    return found


def source(cell): return ''.join(cell['source'])


def module_of(cells): # Such as "rows.formats", or None
    "The module that a notebook is exported to"
    return next((m[1] for c in cells if (m := re.match(r'#\|\s*default_exp\s+([\w.]+)', source(c)))), None)


def is_exported(cell): return cell['cell_type']=='code' and bool(re.search(r'^#\|\s*export', source(cell), re.M))


def is_shown(cell):
    "Whether a reader sees it run: a code cell that is neither exported nor hidden nor switched off"
    text = source(cell)
    return cell['cell_type']=='code' and not is_exported(cell) and not re.search(
        r'^#\|\s*(hide|eval:\s*false|default_exp)', text, re.M)


def lines_of(cell):
    "The lines of a code cell that hold something, without directives"
    return [line for line in source(cell).splitlines() if line.strip() and not line.startswith('#|')]


def is_imports(cell):
    tree = ast.parse(source(cell))
    return bool(tree.body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)


def modules(): # {module: notebook}
    "Every module that a notebook is exported to"
    return {module: name for name, cells in notebooks().items() if (module := module_of(cells))}


def path_of(module): return PACKAGE/(module.replace('.', '/')+'.py')


def python(text):
    "The code of a cell as Python: shell lines and magics become blank"
    return re.sub(r'^(\s*)[%!].*$', r'\1pass', text, flags=re.M)

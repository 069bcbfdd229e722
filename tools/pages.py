"""Check the documentation site without Quarto: every notebook makes a page, no link, anchor or picture leads nowhere,
and no picture is silent
"""
import ast, base64, os, re, sys
from pathlib import Path
from urllib.parse import unquote

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev import processors
from nbdev.doclinks import nbglob
from nbdev.processors import FilterDefaults

CODE = re.compile(r'^ *(`{3,}|~{3,}).*?^ *\1|`[^`\n]*`', re.S|re.M)
LINK = re.compile(r'\]\(\s*<?([^)\s>]+)|\b(?:src|href)="([^"]+)"')
PICTURE = re.compile(r'!\[([^\]]*)\]\(\s*<?([^)\s>]+)')
SCHEME = re.compile(r'[a-z][\w+.-]*:|//', re.I)


def fault(
    notebook, # As read; it is changed
): # What stopped its page, or None
    "Process one notebook the way the site does"
    try: FilterDefaults()(notebook)
    except Exception as error: return f'{type(error).__name__}: {error}'


def slug(
    heading, # Its Markdown
): # The anchor that Pandoc gives it
    "A heading as an anchor"
    text = re.sub(r'\]\([^)]*\)', '', heading).lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text).strip()))


def exported(
    source, # Of a code cell
): # Names of its functions and classes, as anchors
    "The symbols of which a page shows the documentation"
    if not re.search(r'^#\|\s*export', source, re.M): return set()
    try: return {node.name.lower() for node in ast.parse(source).body if hasattr(node, 'name')}
    except SyntaxError: return set()


def words(
    cell, # Of a notebook
): # Markdown and HTML that a reader sees
    "What a cell puts on the page"
    if cell.cell_type == 'markdown': yield CODE.sub('', ''.join(cell.source))
    for output in cell.get('outputs', []):
        for kind in 'text/html','text/markdown':
            if kind in output.get('data', {}): yield ''.join(output['data'][kind])


def broken_pictures(
    cell, # Of a notebook
): # One phrase for each
    "Pictures in the outputs of a cell that no browser could show"
    for output in cell.get('outputs', []):
        data = ''.join(output.get('data', {}).get('image/png', ''))
        if 'image/png' in output.get('data', {}) and not base64.b64decode(data).startswith(b'\x89PNG'):
            yield 'a stored picture is no PNG'


def silent_pictures(
    cell, # Of a notebook
): # One phrase for each
    "Pictures that say nothing to whoever cannot see them, and what only a mouse can reach"
    for text in words(cell):
        yield from (f'the picture {target} has no alt text' for alt,target in PICTURE.findall(text) if not alt.strip())
        for tag in re.findall(r'<img\b[^>]*>', text):
            if not re.search(r'\balt="[^"]', tag): yield f'a picture has no alt text: {tag[:60]}'
        if found := re.search(r'^<!--.*-->[ \t]*\S.*', text, re.M):
            yield f'what stands behind a comment is shown as it is typed: {found[0][:60]}'
        if found := re.search(r'\bonclick=|\btabindex="-', text): yield f'a keyboard does not reach {found[0]}'
    drawn = any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))
    if drawn and not re.search(r'^#\|\s*fig-alt:[ \t]*\S', ''.join(cell.source), re.M):
        yield f'the picture of a cell has no alt text (`#| fig-alt: …`): {"".join(cell.source)[-40:]!r}'


class Site:
    "The pages and files that a link may lead to"
    def __init__(self, config):
        self.root,self.nbs,self.anchors,self.html = config.config_path,config.nbs_path,{},{}
        self.source,self.address = f'{config.git_url}/blob/{config.branch}/',f'{config.doc_host}{config.doc_baseurl}/'
        self.colab = config.git_url.replace('https://github.com',
                                            'https://colab.research.google.com/github')+f'/blob/{config.branch}/'

    def add(self, path, notebook):
        "Remember the anchors of a page, before its notebook is processed"
        text = '\n'.join(CODE.sub(lambda m: m[0].strip('`') if '\n' not in m[0] else '', ''.join(c.source))
                         for c in notebook.cells if c.cell_type == 'markdown')
        headings = re.findall(r'^#+ +(.+?)(?:\s*\{.*\})?\s*$', text, re.M)
        named = re.findall(r'\{#([\w-]+)|\bid="([^"]+)"', text)
        symbols = set().union(*(exported(''.join(c.source)) for c in notebook.cells if c.cell_type == 'code'))
        self.html[nbpath2html(path.relative_to(self.nbs)).as_posix()] = path
        self.anchors[path] = {*map(slug, headings), *(a or b for a,b in named), *symbols}

    def dead(self, target, page, pictures=()):
        "Why a link on a page leads nowhere, or None"
        if target.startswith('attachment:'): return None if target[11:] in pictures else f'{target} is not attached'
        if target.startswith(self.colab):
            return (None if self.root/unquote(target.removeprefix(self.colab)) == page
                    else f'{target} opens another notebook')
        base = next((b for b in (self.source, self.address) if target.startswith(b)), '')
        if not base and SCHEME.match(target): return None  # of the world outside
        path,_,anchor = target.removeprefix(base).partition('#')
        place = {self.source: self.root, self.address: self.nbs}.get(base, page.parent)/unquote(path)
        file = (page if not (path or base) else self.html.get(path, place) if base == self.address
                else Path(os.path.normpath(place)))
        if not file.exists(): return f'{target} does not exist'
        if anchor and file in self.anchors and unquote(anchor) not in self.anchors[file]:
            return f'{target}: {file.name} has no such heading'


def faults_of(
    path, # Of a page
    notebook, # As read
    site, # A `Site` that knows all pages
): # One phrase for each fault
    "What is wrong with the links and pictures of a page"
    for cell in notebook.cells:
        yield from broken_pictures(cell)
        yield from silent_pictures(cell)
        for text in words(cell):
            for target in (a or b for a,b in LINK.findall(text)):
                if problem := site.dead(target, path, cell.get('attachments', {})): yield problem


def sidebar_faults(
    site, # A `Site` that knows all pages
): # One phrase for each fault
    "Pages that the sidebar lacks, names twice, or has made up"
    def hrefs(part):
        if isinstance(part, str): return [part] if part.endswith('.ipynb') else []
        values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        return [h for value in values for h in hrefs(value)]
    named = hrefs(yaml.safe_load((site.root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'])
    pages = {path.relative_to(site.nbs).as_posix() for path in site.anchors}
    yield from (f'{name} does not exist' for name in sorted({*named}-pages))
    yield from (f'{name} is in no section: add it under the task it belongs to' for name in sorted(pages-{*named}))
    yield from (f'{name} is named twice' for name in sorted({n for n in named if named.count(n) > 1}))


def main(): # Exit status
    "Name each page and what is wrong with it"
    os.environ['IN_TEST'] = '1'  # a notebook's last cell must not export while its page is made
    config = get_config()
    processors.get_config = lambda: config  # it would parse `pyproject.toml` again for every cell
    os.chdir(config.config_path)
    notebooks,site = {path.absolute(): read_nb(path) for path in nbglob(as_path=True).sorted()},Site(config)
    for path,notebook in notebooks.items(): site.add(path, notebook)
    found = {path.relative_to(site.nbs).as_posix(): list(faults_of(path, notebook, site))
             for path,notebook in notebooks.items()}
    found |= {path.name: [p for a,b in LINK.findall(CODE.sub('', path.read_text(encoding='utf-8')))
                          if (p := site.dead(a or b, path))] for path in sorted(site.root.glob('*.md'))}
    found['_quarto.yml'] = list(sidebar_faults(site))
    for path,notebook in notebooks.items():
        found[path.relative_to(site.nbs).as_posix()] += filter(None, [fault(notebook)])
    for name,faults in found.items(): print(f'{name}: {"; ".join(faults) or "ok"}')
    return any(found.values())


if __name__ == '__main__': sys.exit(main())

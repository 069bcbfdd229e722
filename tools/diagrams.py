"Diagrams that JupyterLab and GitHub draw from ```mermaid; Quarto wants ```{mermaid}, so pages are written with it"
import re

FENCE = re.compile(r'^```mermaid$', re.M)


def for_quarto(
    cell, # Of a notebook on its way to a page
): # Nothing: its diagrams are in Quarto's form
    "A processor of nbdev, named in pyproject.toml"
    if cell.cell_type=='markdown': cell.source = FENCE.sub('```{mermaid}', ''.join(cell.source))

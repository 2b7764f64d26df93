"""What a module's documentation comments say, read from its source: nothing is imported."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Param:
    name: str          # with its stars
    type: str = ""
    default: str = ""  # as in the source
    comment: str = ""


@dataclass
class Item:
    "A public name of a module, or a method of a public class."
    name: str
    kind: str                                   # function, class, method, property or data
    lines: tuple                                # first and last in the module's file
    doc: str = ""
    params: list = field(default_factory=list)  # of Param
    returns: Param = None
    note: str = ""                              # a comment on a line that holds parameters and the return type
    cell: str = ""                              # id of the notebook's cell
    value: str = ""                             # of data, as in the source
    members: list = field(default_factory=list)  # of a class


class Source:
    "A module's text with its syntax tree, its comments by line and its notebook cells by line."
    def __init__(self, text):
        self.tree = ast.parse(text)
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        self.comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens}
        self.cells = {line: found[1]
                      for line, said in self.comments.items() if (found := re.match(r"%% \S+ #(\w+)$", said))}

    def cell(self, line):
        return self.cells.get(max((o for o in self.cells if o < line), default=None), "")


def unparsed(node):
    return ast.unparse(node) if node else ""


def parameters(args):
    "(Param, line that its comment would be on) of a function."
    plain = args.posonlyargs + args.args
    found = list(zip(plain, [None] * (len(plain) - len(args.defaults)) + args.defaults, [""] * len(plain)))
    found += [(args.vararg, None, "*")] if args.vararg else []
    found += [(a, d, "") for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    found += [(args.kwarg, None, "**")] if args.kwarg else []
    return [(Param(stars + a.arg, unparsed(a.annotation), unparsed(d)), (d or a).end_lineno) for a, d, stars in found]


def signature(node, source):
    """(params, returns, note) of a function: a comment belongs to all that stands on its line, or to the one that it
    names."""
    pairs, returns = parameters(node.args), Param("returns", unparsed(node.returns)) if node.returns else None
    if pairs and pairs[0][0].name in ("self", "cls"):
        pairs = pairs[1:]
    end = node.returns.end_lineno if node.returns else max((line for _, line in pairs), default=node.lineno)
    note = ""
    for line in range(node.lineno, end + 1):
        comment = source.comments.get(line, "")
        here = [param for param, at in pairs if at == line]
        if not comment or line == node.body[0].lineno:  # a comment behind code is about the code
            continue
        named = re.match(r"(\w+): (.+)", comment)
        if named and named[1] in [p.name for p in here]:
            next(p for p in here if p.name == named[1]).comment = named[2]
        elif returns and line == end and here:
            note = comment
        elif returns and line == end:
            returns.comment = comment
        elif not here:
            note = comment
        for param in here if note != comment and not (named and named[1] in [p.name for p in here]) else []:
            param.comment = comment
    return [param for param, _ in pairs], returns, note


def function(node, source, kind="function"):
    params, returns, note = signature(node, source)
    if any(getattr(d, "id", getattr(d, "attr", "")) in ("property", "cached_property") for d in node.decorator_list):
        kind = "property"
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return Item(node.name, kind, (first, node.end_lineno), ast.get_docstring(node) or "", params, returns, note,
                source.cell(first))


def class_(node, source):
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    item = Item(node.name, "class", (first, node.end_lineno), ast.get_docstring(node) or "", cell=source.cell(first))
    for o in node.body:
        if isinstance(o, ast.FunctionDef) and o.name == "__init__":
            item.params, _, item.note = signature(o, source)
        elif isinstance(o, ast.FunctionDef) and o.name[0] != "_" and ast.get_docstring(o):
            item.members.append(function(o, source, "method"))
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        item.params = [Param(o.target.id, unparsed(o.annotation), unparsed(o.value),
                             source.comments.get(o.end_lineno, ""))
                       for o in node.body if isinstance(o, ast.AnnAssign)]
    return item


def names(target):
    return [target.id] if isinstance(target, ast.Name) else [n for o in getattr(target, "elts", []) for n in names(o)]


def data(node, source):
    "Items of an assignment, one a name."
    found = [name for target in node.targets for name in names(target)]
    value = " ".join(unparsed(node.value).split()) if len(found) == 1 else ""
    return [Item(name, "data", (node.lineno, node.end_lineno), source.comments.get(node.end_lineno, ""), value=value,
                 cell=source.cell(node.lineno)) for name in found]


def public(path):
    """The items of `__all__` in the order of the source; a function whose `self` names a class of the module is its
    method."""
    source, found = Source(Path(path).read_text(encoding="utf-8")), {}
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = function(node, source)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = class_(node, source)
        elif isinstance(node, ast.Assign):
            found |= {item.name: item for item in data(node, source)}
    listed = set(ast.literal_eval(next(o.value for o in source.tree.body if isinstance(o, ast.Assign)
                                       and o.targets[0].id == "__all__")))
    owners = {o.name: unparsed(o.args.args[0].annotation) for o in source.tree.body
              if isinstance(o, ast.FunctionDef) and o.args.args and o.args.args[0].arg == "self"}
    for name, owner in owners.items():
        item = found.pop(name, None)
        if item and item.doc and owner in found and name in listed:
            item.kind = "method"
            found[owner].members.append(item)
    return [item for name, item in found.items() if name in listed and (item.doc or item.kind == "data")]

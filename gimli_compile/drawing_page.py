"""The HTML page of a program: its drawing and its text, side by side, marked together."""

from __future__ import annotations

import re
from collections.abc import Set
from html import escape

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; background: #f8fafc; color: #0f172a;
  font: 13px/1.4 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
header { display: flex; gap: 12px; align-items: center; padding: 8px 16px; background: #fff;
  border-bottom: 1px solid #e2e8f0; }
header h1 { font-size: 14px; font-weight: 600; margin: 0; flex: 1; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
header .hint { color: #64748b; white-space: nowrap; }
button { font: inherit; padding: 2px 10px; border: 1px solid #cbd5e1; border-radius: 4px; background: #fff;
  cursor: pointer; }
button:hover { background: #f1f5f9; }
main { flex: 1; display: flex; min-height: 0; }
#drawing { flex: 1; overflow: auto; min-width: 0; }
#drawing svg { display: block; }
#code { width: 42%; overflow: auto; margin: 0; padding: 10px 0; background: #fff; border-left: 1px solid #e2e8f0;
  font: 11.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
#code div { padding: 0 14px; white-space: pre; min-height: 1.55em; width: max-content; min-width: 100%; }
#code i { color: #64748b; font-style: normal; }
#code b { font-weight: inherit; border-radius: 3px; }
#code div.on { background: #fef3c7; }
#code b.on { background: #fde68a; }
"""

_SCRIPT = """
const svg = document.querySelector('#drawing svg'), box = document.querySelector('#drawing');
const all = (selector) => [...document.querySelectorAll(selector)];
const marked = [];
function collect(selector, keys) {
  const found = new Map();
  for (const element of all(selector)) {
    for (const name of keys(element)) {
      if (!found.has(name)) found.set(name, []);
      found.get(name).push(element);
    }
  }
  return (name) => found.get(name) || [];
}
const nodes = collect('[data-node]', (e) => [e.dataset.node]);
const mentions = collect('[data-name]', (e) => [e.dataset.name]);
const leaving = collect('.wire', (e) => [e.dataset.from]);
const arriving = collect('.wire', (e) => e.dataset.to.split('|'));
function mark(element, style) { element.classList.add(style); marked.push([element, style]); }
function clear() { for (const [element, style] of marked.splice(0)) element.classList.remove(style); }
function show(name) {
  clear();
  nodes(name).forEach((e) => mark(e, 'on'));
  mentions(name).forEach((e) => mark(e, 'on'));
  for (const wire of leaving(name)) {
    mark(wire, 'on');
    wire.dataset.to.split('|').flatMap(nodes).forEach((e) => mark(e, 'near'));
  }
  for (const wire of arriving(name)) {
    mark(wire, 'on');
    nodes(wire.dataset.from).forEach((e) => mark(e, 'near'));
  }
}
function nameOf(target) {
  const element = target.closest('[data-name], [data-node]');
  return element && (element.dataset.name || element.dataset.node);
}
document.addEventListener('mouseover', (event) => {
  const name = nameOf(event.target);
  if (name) show(name); else clear();
});
document.addEventListener('click', (event) => {
  const name = nameOf(event.target);
  if (!name) return;
  const inDrawing = box.contains(event.target);
  const other = nodes(name).find((e) => box.contains(e) !== inDrawing);
  if (other) other.scrollIntoView({behavior: 'smooth', block: 'center', inline: 'center'});
});
const width = svg.width.baseVal.value, height = svg.height.baseVal.value;
let scale = 1;
function zoom(next) {
  scale = Math.min(3, Math.max(0.1, next));
  svg.setAttribute('width', width * scale);
  svg.setAttribute('height', height * scale);
}
all('[data-zoom]').forEach((button) => button.addEventListener('click', () => {
  const by = button.dataset.zoom;
  if (by === 'fit') zoom(Math.min(box.clientWidth / width, box.clientHeight / height));
  else zoom(by === 'full' ? 1 : scale * Number(by));
}));
"""


def render_page(title: str, svg: str, code: str, names: Set[str]) -> str:
    """Returns a self-contained page; `names` are the nodes that the text mentions."""
    lines = "".join(_line(line, names) for line in code.splitlines())
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<header><h1>{escape(title)}</h1><span class="hint">point at a node to follow it, click to find it</span>
<button data-zoom="0.8">&minus;</button><button data-zoom="1.25">+</button>
<button data-zoom="full">1:1</button><button data-zoom="fit">fit</button></header>
<main><div id="drawing">{svg}</div><div id="code">{lines}</div></main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _line(line: str, names: Set[str]) -> str:
    """Returns one line of the program; the line that computes a node, or takes an input, is marked as its own."""
    text, comment = _split_comment(line)
    owner = re.match(r"\s+(\w+)(?: =|,$)", text.rstrip())
    own = f' data-node="{owner[1]}"' if owner and owner[1] in names and not line.startswith(" " * 8) else ""
    body = re.sub(r"(?<![\w.])\w+", lambda match: _word(match[0], names), escape(text))
    return f"<div{own}>{body}{f'<i>{escape(comment)}</i>' if comment else ''}</div>"


def _split_comment(line: str) -> tuple[str, str]:
    at = len(line) - len(line.lstrip()) if line.lstrip().startswith("#") else line.find("  # ")
    return (line, "") if at < 0 else (line[:at], line[at:])


def _word(word: str, names: Set[str]) -> str:
    return f'<b data-name="{word}">{word}</b>' if word in names else word

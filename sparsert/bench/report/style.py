"""The report's stylesheet, and the colours that the PNGs take from it.

Eight slots, each with a colour for light and one for dark pages, chosen by search. Text in every one has a
contrast of at least 4.5 to 1 on its page (WCAG 2.1), and any two stay apart (CIE76 difference of 18 and
more) for readers without red, green or blue cones as for everybody else, as Machado, Oliveira and Fernandes
simulate them ("A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009).
"""

from __future__ import annotations

#: By slot: grey, blue, green, ochre, teal, brown, violet, magenta.
LIGHT = ("#313131", "#244086", "#5f7746", "#806c13", "#0b7c85", "#691600", "#8343d4", "#ad005f")
DARK = ("#a0a0a0", "#5f7bfb", "#aefc9a", "#fae348", "#81fafe", "#e28940", "#b16dbc", "#e1565a")

_NAMES = ("color-scheme", "--page", "--card", "--text", "--soft", "--rule", "--good", "--bad")
_LIGHT_PAGE = ("light", "#f6f7f9", "#ffffff", "#1b2028", "#565e6b", "#dde1e7", "#1a7f37", "#b3243f")
_DARK_PAGE = ("dark", "#0e1116", "#171b22", "#e8ebf0", "#a3adba", "#2b323d", "#5fd07f", "#ff8a9b")

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.wrap{max-width:1240px;margin:0 auto;padding:0 16px 48px}
header{padding:32px 0 8px}
h1{font-size:clamp(1.5rem,1.1rem + 1.6vw,2.2rem);line-height:1.15;margin:0 0 6px;letter-spacing:-.015em}
h2{font-size:1.3rem;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}
h3{font-size:1.02rem;margin:20px 0 8px}
h4{font-size:.95rem;margin:20px 0 6px;font-weight:600}
p{margin:6px 0;max-width:74ch}
.soft,figcaption span,footer{color:var(--soft)}
a{color:var(--c1)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:14px 0 0;font-size:.92rem}
nav a{text-decoration:none;padding:4px 0}
nav a:hover{text-decoration:underline}
section.part{margin-top:36px;padding-top:24px;border-top:1px solid var(--rule)}
.gpus{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:0 32px}
.gpus>*{min-width:0}
.gpu>h3{padding-bottom:4px;border-bottom:2px solid var(--rule)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:12px;margin:12px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:1.9rem;line-height:1.15;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card span{display:block;font-weight:600;font-size:.92rem;margin-bottom:2px}
.card small{display:block;color:var(--soft);font-size:.83rem;line-height:1.4;margin-top:4px}
.gpus:not(.one) .cards{grid-template-columns:repeat(auto-fit,minmax(min(100%,180px),1fr))}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px;margin:12px 0}
.beside>.scroll{margin:0}
.beside{display:grid;grid-template-columns:minmax(0,1fr);gap:16px;margin:12px 0;align-items:start}
@media (min-width:900px){.one .beside{grid-template-columns:minmax(0,392px) minmax(0,1fr)}}
.one .charts.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px 8px}
figcaption{font-weight:600;font-size:.95rem;line-height:1.3;margin-bottom:6px;overflow-wrap:anywhere}
figcaption span{display:block;font-weight:400;font-size:.83rem}
figure>svg{display:block;width:100%;max-width:450px;height:auto;margin:0 auto;overflow:visible}
svg text{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--text);
paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg .tick,svg .name,svg .note{fill:var(--soft);font-variant-numeric:tabular-nums}
svg .note{font-size:11px;font-style:italic}
svg .end,svg .bar{font-weight:600}
svg .inside{fill:var(--card);stroke:none;font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .guide{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:5 4;fill:none}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .leader{fill:none;stroke:var(--c);stroke-width:.8;opacity:.6}
svg .mark{fill:var(--c);stroke:var(--card);stroke-width:.8}
svg .mark.open{fill:var(--card);stroke:var(--c);stroke-width:1.5}
svg .piece{fill:var(--c)}
svg .piece.open{fill:none;stroke:var(--c);stroke-width:1.5}
svg .end{fill:var(--c)}
svg .swatch,.swatch{width:14px;height:14px;flex:none;fill:var(--c)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:0 0 6px;padding:0;font-size:.83rem}
.legend li{display:flex;align-items:center;gap:5px}
.scroll{overflow:auto;margin:12px 0;max-height:34rem;
background:var(--card);border:1px solid var(--rule);border-radius:10px}
.scroll:focus-visible{outline:2px solid var(--c1)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 12px 6px;color:var(--soft);caption-side:top}
th,td{padding:5px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{position:sticky;top:0;background:var(--card);font-weight:600;vertical-align:bottom;z-index:1}
tbody th{font-weight:500;position:sticky;left:0;background:var(--card)}
thead th:first-child{left:0;z-index:2}
th.text,td.text{text-align:left}
tbody tr:last-child>*{border-bottom:0}
tbody tr:hover>*{background:var(--page)}
td small{color:var(--soft)}
.ok{color:var(--good);font-weight:600}
.no{color:var(--bad);font-weight:600}
details{margin:10px 0}
summary{cursor:pointer;padding:6px 0;color:var(--c1);font-size:.92rem}
ul.plain{margin:6px 0;padding-left:20px;max-width:90ch}
ul.plain li{margin:3px 0;overflow-wrap:anywhere}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.facts td{white-space:normal;overflow-wrap:anywhere;min-width:9rem;vertical-align:top}
footer{margin-top:40px;padding-top:14px;border-top:1px solid var(--rule);font-size:.85rem}
@media (max-width:480px){figure{padding:12px 10px 8px}svg text{font-size:12.5px}svg .note{font-size:12px}}
@media print{.scroll{max-height:none;overflow:visible}section.part{break-inside:auto}figure,.card{break-inside:avoid}}
"""


def stylesheet() -> str:
    """The whole stylesheet: light by default, dark where the reader's system asks for it."""
    numbered = "".join(f".s{slot}{{--c:var(--c{slot})}}" for slot in range(len(LIGHT)))
    light, dark = _variables(_LIGHT_PAGE, LIGHT), _variables(_DARK_PAGE, DARK)
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}{numbered}"


def _variables(page: tuple[str, ...], colours: tuple[str, ...]) -> str:
    named = [f"{name}:{value};" for name, value in zip(_NAMES, page, strict=True)]
    return "".join([*named, *(f"--c{slot}:{colour};" for slot, colour in enumerate(colours))])

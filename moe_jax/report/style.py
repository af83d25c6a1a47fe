"""The style of the page; its colours are those of the figures."""

from __future__ import annotations

from moe_jax.report.theme import DARK, LIGHT, Theme, css_variables

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .35rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.75rem 0 .75rem;padding-top:1.25rem;border-top:1px solid var(--grid)}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem}
p{margin:.5rem 0}.sub,figcaption,.note{color:var(--muted)}
.sub{overflow-wrap:anywhere}figcaption,.note{font-size:.875rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;
margin:1.75rem 0 0;padding:0}
.tile{background:var(--tile);border-radius:.6rem;padding:.85rem 1rem;margin:0}
.tile dt{color:var(--muted);font-size:.8125rem}
.tile dd{margin:0}.tile .value{font-size:1.35rem;font-weight:600;
font-variant-numeric:tabular-nums}
.tile .was{color:var(--muted);font-size:.8125rem;font-variant-numeric:tabular-nums}
.warnings{border-left:4px solid var(--removed);background:var(--tile);border-radius:.3rem;
padding:.75rem 1rem;margin:1.5rem 0 0}
.warnings ul{margin:.25rem 0 0;padding-left:1.2rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid var(--grid);
white-space:nowrap}
th{color:var(--muted);font-weight:500}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.ids{white-space:normal;min-width:14rem;text-align:left}th.ids{text-align:left}
tr.total td{font-weight:600}
.wide th{white-space:normal;min-width:5.5rem;vertical-align:bottom}
figure{margin:1.5rem 0}.dark{display:none}
figure svg{display:block;width:100%;min-width:38rem;height:auto;stroke-linejoin:round}
figcaption{margin-top:.4rem}
pre,code{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--tile);border-radius:.5rem;padding:.85rem 1rem;overflow-x:auto}
code{overflow-wrap:anywhere}pre code{overflow-wrap:normal;font-size:1em}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;margin:.75rem 0;
font-size:.9rem}
dl.facts dt{color:var(--muted)}dl.facts dd{margin:0;overflow-wrap:anywhere}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--after)}
@media (max-width:34rem){main{padding:1.5rem 1rem 3rem}h1{font-size:1.5rem}
.tiles{grid-template-columns:repeat(2,1fr)}.tile .value{font-size:1.1rem}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.5rem}}
@media print{main{max-width:none}h2{break-after:avoid}figure,table{break-inside:avoid}}
"""


def page_style() -> str:
    """Light, or dark where the reader's system is."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"{_RULES}"
        "@media (prefers-color-scheme:dark){.light{display:none}.dark{display:inline}}\n"
    )


def _variables(colors: Theme) -> str:
    return ";".join(f"{name}:{value}" for name, value in css_variables(colors).items())

"""HTML from plain values. Every string is escaped unless it is `Html`, which only this module's functions make: text of a model
or a data set cannot become markup, whoever forgets to think of it."""

import base64
import html
import math

DASH = "–"

CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#222;--muted:#6b6b6b;--line:#e2e2e2;--soft:#f6f6f4;--bad:#b0124a}
*{box-sizing:border-box}html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
body>*{max-width:66rem;margin:0 auto;padding:0 1.25rem}header{padding-top:3.5rem}footer{padding-top:2rem;padding-bottom:4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .75rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 1rem;letter-spacing:-.01em}h3{font-size:1rem;margin:1.5rem 0 .5rem}
h4{font-size:.8rem;margin:1rem 0 .15rem;color:var(--muted);font-weight:600;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:46rem}.lede{font-size:1.1rem}small,.note,figcaption,footer{color:var(--muted);font-size:.85rem}
h4 small{font-size:1em}small{font-weight:400}.note b{font-weight:500;color:var(--ink)}
section{border-top:1px solid var(--line);margin-top:2.75rem;padding-top:1.5rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.9rem}header+nav{margin-top:1.5rem}
nav a{color:var(--muted);text-decoration:none}nav a:hover{color:var(--ink);text-decoration:underline}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.5rem;margin:1.25rem 0}
dl>div{display:grid;grid-template-columns:subgrid;grid-column:1/-1}
dt{color:var(--muted);font-size:.85rem}dd{margin:0;font-size:.95rem;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
figure{margin:1.25rem 0;overflow-x:auto}img{display:block;max-width:100%}figcaption{max-width:46rem;margin-top:.4rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
:is(th,td){text-align:right;vertical-align:top;padding:.4rem .6rem;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500;color:var(--muted)}
td small{display:block;font-size:.75rem}.main td{font-size:1.15rem}.prose :is(td,th){text-align:left;white-space:normal}
:is(th,td):first-child{text-align:left!important;padding-left:0;position:sticky;left:0;background:var(--bg)}
.model{color:var(--c);font-weight:600}.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:.1rem 0}
details{border-bottom:1px solid var(--line)}details>:not(summary):last-child{margin-bottom:1.25rem}
summary{cursor:pointer;padding:.55rem 0;overflow-wrap:anywhere}summary:hover{background:var(--soft)}
summary small{margin:0 .3rem}
.bad{color:var(--bad)}.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(13.5rem,1fr));gap:.25rem 1.5rem}
.side>div{min-width:0}.side+.text{margin-top:1rem}.bar{height:3px;background:var(--line);margin:.35rem 0;max-width:46rem}
.bar>div{height:3px;background:var(--ink)}.step{border-left:2px solid var(--line);padding-left:1rem}
pre{overflow-x:auto;font-size:.8rem}
@media (max-width:44rem){img{max-width:none}body>*{padding:0 .9rem}header{padding-top:2rem}}
@media (prefers-color-scheme:dark){
:root{--bg:#141414;--ink:#e6e6e6;--muted:#a0a0a0;--line:#333;--soft:#1d1d1d;--bad:#ff7fa6}
img{filter:invert(.922) hue-rotate(180deg)}.model{color:color-mix(in srgb,var(--c),#fff 45%)}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # even markup that slipped through could load nothing


class Html(str):
    """Text that is HTML already."""


def join(*parts) -> Html:
    """Strings, Html and lists of them in one piece; None is nothing."""
    out = []
    for part in parts:
        if isinstance(part, (list, tuple)):
            out.append(join(*part))
        elif part is not None:
            out.append(part if isinstance(part, Html) else html.escape(str(part)))
    return Html("".join(out))


def tag(kind: str, /, *parts, **attributes) -> Html:
    """<kind attribute="value">parts</kind>. `class_` is the attribute class; True is one without a value, None is none."""
    given = {k.rstrip("_").replace("_", "-"): "" if v is True else v for k, v in attributes.items() if v is not None}
    start = kind + "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items())
    return Html(f"<{start}>" if kind in ("img", "meta") else f"<{start}>{join(*parts)}</{kind}>")


def document(title: str, header, sections: list[tuple], footer) -> Html:
    """A whole page that loads nothing. sections: (id, title, content)."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), header),
        tag("nav", [tag("a", name, href=f"#{key}") for key, name, _ in sections]),
        tag("main", [tag("section", tag("h2", name), content, id=key) for key, name, content in sections]),
        tag("footer", footer),
    )
    return Html(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def table(header: list, rows: list[list], class_: str | None = None) -> Html:
    """Scrolls sideways where it does not fit; the first column stays."""
    head = tag("thead", tag("tr", [tag("th", cell) for cell in header]))
    body = tag("tbody", [tag("tr", [tag("td", cell) for cell in row]) for row in rows])
    return tag("div", tag("table", head, body, class_=class_), class_="wide")


def facts(pairs: list[tuple]) -> Html:
    """Names and values, one pair a line."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs])


def picture(data: bytes, width: int, caption: str) -> Html:
    """A PNG inside the page, `width` CSS pixels wide where there is room."""
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return tag("figure", tag("img", src=source, alt=caption, width=width), tag("figcaption", caption))


def fold(summary, *parts, unfolded: bool = False) -> Html:
    return tag("details", tag("summary", summary), *parts, open=unfolded or None)


def passage(title, text: str, note: str | None = None) -> Html:
    """A text as it was written, line breaks included, under a small heading."""
    return join(tag("h4", title, note and [" ", tag("small", note)]), tag("p", text, class_="text"))


def side_by_side(parts: list) -> Html:
    """Columns; on a narrow screen one below the other."""
    return tag("div", [tag("div", part) for part in parts], class_="side")


def number(x: float | None, top: float = 1) -> str:
    """A share as a percentage, anything else with two decimals, nothing as a dash."""
    if x is None or not math.isfinite(x):
        return DASH
    return f"{100 * x:.1f}%" if top == 1 else f"{x:.2f}"


def plain(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{plain(v)} {k}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)

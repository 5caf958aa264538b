"""The few pages that need nothing but HTML: the login, and what is shown while the page's process is not there."""

from html import escape

_STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--line:#d9dde3;--ink:#1a1f27;--dim:#5b6572;--accent:#1f5fbf;
--on:#fff;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#101418;--card:#181d23;--line:#2c343d;--ink:#e6eaef;--dim:#9aa5b1;
--accent:#7cb0ff;--on:#0d1420;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--bg);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{width:min(26rem,92vw);background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.75rem}
h1{margin:0 0 .25rem;font-size:1.25rem}p{margin:.25rem 0 1rem;color:var(--dim)}
label{display:block;font-weight:600;margin-bottom:.35rem}
input,button{width:100%;font:inherit;padding:.6rem .7rem;border-radius:6px;border:1px solid var(--line)}
input{background:var(--bg);color:inherit}button{margin-top:.9rem;border:0;background:var(--accent);color:var(--on);
font-weight:600;cursor:pointer}:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.bad{color:var(--bad);font-weight:600}
"""


def login(problem: str = "") -> str:
    told = f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else ""
    return _page(
        "Log in",
        "<p>Enter a key of this service. What it may do here is what it may do over REST.</p>"
        f'{told}<form method="post" action="/login"><label for="key">Key</label>'
        '<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>'
        "<button>Log in</button></form>",
    )


def down(why: str) -> str:
    return _page(
        "The page is not there",
        f"<p>{escape(why)}</p><p>Models are served all the same, and REST and the command line answer. "
        "This looks again by itself.</p>",
        '<meta http-equiv="refresh" content="3">',
    )


def crowded(viewers_max: int) -> str:
    return _page(
        "Too many open pages",
        f"<p>{viewers_max} are open already (page.viewers_max). Close one; this looks again by itself.</p>",
        '<meta http-equiv="refresh" content="10">',
    )


def _page(title: str, body: str, head: str = "") -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} · rotator</title>{head}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>"
    )

"""What a model, a user or the storage can put on the page: text, and the elements of markdown.js. Nothing else runs."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from isthmus.engines.local.api.server import STATIC
from tests.support.page_browser import Page, wait
from tests.support.page_server import ending, piece

PREFIX = "isthmus.conversation."
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}

RUN = "window.hacked=1"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<svg/onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<input autofocus onfocus={RUN}>",
    f"<body onload={RUN}><style>*{{display:none}}</style><base href='//evil'>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror={RUN}&gt;'>",
    f"<a href='javascript:{RUN}'>x</a><form action='javascript:{RUN}'><button>x</button></form>",
    f"[x](javascript:{RUN})",
    f"[x](JaVaScRiPt:{RUN})",
    f"[x](java\tscript:{RUN})",
    f"[x](&#106;avascript:{RUN})",
    f"[x](<javascript:{RUN}>)",
    f"[x](\x01javascript:{RUN})",
    f"[x](data:text/html,<script>{RUN}</script>)",
    f"[x](vbscript:{RUN})",
    "[x](blob:null/1)",
    "[x](file:///etc/passwd)",
    f"[x](//evil.example/{RUN})",
    f'[x](https://a.example "\\" onmouseover=\\"{RUN}")',
    f'[x](https://a.example/"onmouseover="{RUN})',
    f"[![x](javascript:{RUN})](javascript:{RUN})",
    f"![x](https://evil.example/pixel.png?{RUN})",
    f"![x](x onerror={RUN})",
    f"<javascript:{RUN}>",
    f"<https://a.example/' onclick='{RUN}>",
    f"[x][1]\n\n[1]: javascript:{RUN}",
    f'``` "><script>{RUN}</script>\n</code></pre><script>{RUN}</script>\n```',
    f'```js" onclick="{RUN}\n{RUN}\n```',
    f"|<img src=x onerror={RUN}>|b|\n|:-:|-|\n|<script>{RUN}</script>|`<b>`|",
    f"`<script>{RUN}</script>` **<img src=x onerror={RUN}>** $<script>{RUN}</script>$",
    f"> - # <script>{RUN}</script>\n> 1. <svg onload={RUN}>",
    f"$$\n<script>{RUN}</script>\n$$",
    "</p></div></article></main><h1 id='log'>x</h1>",
    "<p id='prompt'></p><a id='location' name='hash'></a><form name='body'></form>",
    f"{{{{constructor.constructor('{RUN}')()}}}}${{{RUN}}}",
    "\u202ehttps://evil.example\u202c \u0000 \ufeff",
]
TEXT_ELEMENTS = {"A", "BR", "CODE", "DEL", "EM", "STRONG"}
BLOCK_ELEMENTS = {"BLOCKQUOTE", "BUTTON", "DIV", "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P", "PRE", "SPAN", "UL"}
TABLE_ELEMENTS = {"TABLE", "TBODY", "TD", "TH", "THEAD", "TR"}
ATTRIBUTES = {
    "class",
    "href",
    "title",
    "rel",
    "target",
    "type",
    "tabindex",
    "role",
    "aria-label",
    "scope",
    "start",
    "data-label",
}
INSPECT = (Path(__file__).parent / "inspect.js").read_text(encoding="utf-8")


def check_harmless(page):
    """Nothing ran, nothing was fetched elsewhere, and the page has no element that it does not make itself."""
    found = page.js(INSPECT)
    assert not found["hacked"] and not found["foreign"] and not found["inPlain"] and not found["fetched"]
    assert set(found["elements"]) <= TEXT_ELEMENTS | BLOCK_ELEMENTS | TABLE_ELEMENTS
    assert set(found["attributes"]) <= ATTRIBUTES
    assert set(found["addresses"]) <= {"http:", "https:", "mailto:"}
    assert set(found["rels"]) <= {"noopener noreferrer nofollow _blank"}
    assert found["scripts"] == ["theme.js", "chat.js"]


@pytest.fixture(scope="module")
def in_page(driver, url):
    """The value of an async function's body that has the page's modules at hand."""
    page = Page(driver, url)
    page.open()
    return page.later


# The policy


@pytest.mark.parametrize("path", ["", *sorted(file.name for file in STATIC.iterdir())])
def test_every_file_of_the_page_comes_with_the_policy(url, path):
    with urllib.request.urlopen(f"{url}/{path}") as answer:
        assert answer.status == 200
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_the_files_ask_nobody_else_and_take_no_text_for_markup(file):
    text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text, "an address of another server"
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|setHTMLUnsafe|createContextualFragment|document\.write"
    assert not re.search(rf"{markup}|\beval\(|new Function", text)
    assert not re.search(r"\bstyle=|<style|\son[a-z]+=\"", text)


def test_the_policy_stops_what_would_get_past_the_page(page):
    """Even code that took a text for markup could not run it."""
    attempts = {
        "inline": "const s = document.createElement('script'); s.append('window.hacked = 1'); document.body.append(s)",
        "markup": "document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'",
        "eval": "document.body.setAttribute('onclick', 'window.hacked = 1'); document.body.click()",
        "style": "const s = document.createElement('style'); s.append('* { display: none }'); document.body.append(s)",
        "elsewhere": "const i = new Image(); i.onerror = () => { window.refused = 1 }; i.src = 'http://127.0.0.1:9/'",
    }
    for code in attempts.values():
        page.js(f"try {{ {code} }} catch (error) {{ window.caught = (window.caught ?? 0) + 1 }}")
    wait(lambda: page.js("return window.refused === 1"), "the refusal of an image from elsewhere")
    assert not page.js("return 'hacked' in window") and page.style("body", "display") == "grid"
    assert len(page.complaints()) >= len(attempts) - 1, "the browser reports what it stopped"


# Hostile text


def test_nothing_a_model_says_runs_or_leaves_its_place(page, server):
    for start in range(0, len(PAYLOADS), 10):
        text = "\n\n".join(PAYLOADS[start : start + 10])
        server.script(piece(thought=text), *(piece(text[i : i + 7]) for i in range(0, len(text), 7)), ending())
        page.ask("Attack")
        page.idle()
        check_harmless(page)
        assert page.text(".thought") == text
    page.reload()
    check_harmless(page)
    for opened in page.all(".content a, .copy-code"):
        page.js("arguments[0].dispatchEvent(new MouseEvent('mouseover', { bubbles: true }))", opened)
    check_harmless(page)


def test_nothing_a_server_says_runs(page, server):
    evil = "".join(PAYLOADS[:10])
    server.pages["/health"] = {
        "status": "ok", "model": evil, "format": evil, "seal": evil, "pool": evil, "weight_version": evil,
        "max_model_len": 4096, "rehearsal": {"chip": evil, "statement": evil},
    }  # fmt: skip
    server.pages["/examples"] = PAYLOADS
    page.reload()
    wait(lambda: len(page.all("#examples button")) == len(PAYLOADS))
    assert page.text("#model") == evil
    check_harmless(page)
    server.script(json.dumps({"error": {"message": evil}}).encode(), status=400)
    page.js("document.querySelector('#examples button').click()")
    page.shows(".problem", evil[1:])
    assert page.text(".question .text") == PAYLOADS[0] == page.text(".open")
    check_harmless(page)


def test_nothing_stored_runs(page, server):
    server.script(piece("x"), ending())
    page.ask("Good")
    page.idle()
    [stored] = page.stored()
    evil = "\n\n".join(PAYLOADS)
    answer = stored["turns"][0]["versions"][0]["answer"]
    answer |= {"content": evil, "thought": evil, "problem": evil, "model": evil, "fingerprint": evil, "extra": evil}
    answer["usage"] = {"prompt": 1, "completion": 2, "extra": evil}
    stored |= {"title": evil[:500], "__proto__": {"hacked": 1}}
    stored["turns"][0]["versions"].append({"question": evil, "answer": answer})
    stored["turns"][0]["shown"] = 1
    page.js("localStorage.setItem(arguments[0], arguments[1])", PREFIX + stored["id"], json.dumps(stored))
    page.js("localStorage.setItem(arguments[0], arguments[0])", PREFIX + "<img src=x onerror=window.hacked=1>")
    settings = json.dumps({"version": 1, "system": {"toString": 1}, "seed": PAYLOADS[0]})
    page.js("localStorage.setItem('isthmus.theme', arguments[0])", f'">{PAYLOADS[0]}')
    page.js("localStorage.setItem('isthmus.settings', arguments[0])", settings)
    page.reload()
    page.shows("#notices", "One stored conversation cannot be read")
    assert page.text(".thought") == evil
    check_harmless(page)
    page.open(fragment=f"#{stored['id']}<img src=x onerror=window.hacked=1>")
    check_harmless(page)


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        ("https://a.example/b?c#d", True),
        ("HTTP://a.example", True),
        ("mailto:a@b.example", True),
        (" https://a.example ", True),
        ("javascript:alert(1)", False),
        ("jav\nascript:alert(1)", False),
        ("\u0001javascript:alert(1)", False),
        ("data:text/html,x", False),
        ("blob:https://a.example/1", False),
        ("//a.example", False),
        ("/etc", False),
        ("x", False),
        ("", False),
        ("https://", False),
    ],
)
def test_only_three_schemes_are_followed(in_page, address, safe):
    assert (in_page("return (await import('/markdown.js')).safeAddress(given[0])", address) is not None) == safe


# Markdown, against another implementation


class Canonical(HTMLParser):
    """HTML as a list of tags and texts, without what the page adds to markdown's own elements or leaves out."""

    LEVELS = {"h3": "h1", "h4": "h2", "h5": "h3"}
    BLOCKS = {"p", "ul", "ol", "li", "blockquote", "pre", "hr", "table", "thead", "tbody", "tr", "th", "td"} | {
        f"h{i}" for i in range(1, 7)
    }

    def __init__(self, html: str, ours: bool):
        super().__init__()
        self.parts: list[str] = []
        self._ours, self._skip = ours, 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if self._ours and (tag in ("button", "span") or self._skip):
            self._skip += 1
        elif tag != "div":
            self.parts.append(f"<{self._name(tag)}{self._shown(tag, given)}>")

    def handle_endtag(self, tag):
        if self._skip:
            self._skip -= 1
        elif tag not in ("div", "br", "hr"):
            self.parts.append(f"</{self._name(tag)}>")

    def handle_data(self, data):
        if not self._skip:
            self.parts.append(data)

    def _name(self, tag):
        return self.LEVELS.get(tag, tag) if self._ours else tag

    def _shown(self, tag, given):
        side = {"text-align:right": "right", "text-align:center": "centre"}.get(
            given.get("style", ""), given.get("class", "")
        )
        kept = {"a": given.get("href"), "ol": given.get("start"), "td": side, "th": side}.get(tag)
        return f" {kept}" if kept else ""

    def text(self) -> str:
        """Blank text next to blocks and at the end of code or after a break says nothing."""
        joined = "\x00".join(self.parts).replace("\n\x00</code>", "</code>")
        for tag in self.BLOCKS:
            joined = re.sub(rf"\s*(\x00?</?{tag}(?: [^>]*)?>\x00?)\s*", r"\1", joined)
        return re.sub(r"\x00+", "", re.sub(r"(<br>)\x00?\n", r"\1", joined))


SAMPLES = [
    "One paragraph\nof two lines.\n\nAnother.",
    "# One\n\n## Two\n### Three ###\ntext",
    "#nospace\n\n####### seven",
    "*em* **strong** ***both*** _em_ __strong__ ~~gone~~",
    "**strong *with em* in it** and *em **with strong** in it*",
    "a * b * c, 2 ** 3, snake_case_name, a_b_c, * not em*, ** nor this **",
    "unmatched *star and **two and `tick and _line",
    "`code *not em*` and ``with ` tick`` and `` ` ``",
    "*a `*` b* and **`**`**",
    r"\*not em\* \`not code\` \[not link](x) \\ \# 1\. a\b",
    "[link](https://a.example/b) [**bold**](https://a.example/?q=1&r=2) [t](https://a.example/ \"title\")",
    "[paren](https://a.example/a_(b)) and [angle](<https://a.example/x>)",
    "[x](javascript:alert) [unclosed](b [nested [x]](https://b.example/)",
    "<https://a.example/> and <mailto:a@b.example>",
    "<b>html</b> <script>x</script> <!-- no --> &",
    "- a\n- b\n- c",
    "* a\n+ b",
    "1. a\n2. b\n3. c\n\nafter",
    "7. a\n8. b",
    "- a\n  - b\n    - c\n  - d\n- e",
    "1. a\n   - b\n   - c\n2. d\n   1. e\n   2. f",
    "- a\n\n- b\n\n- c",
    "- a\n\n  second paragraph\n- b",
    "- a\nlazy line\n- b",
    "- ```\n  code\n  ```\n- # heading\n- > quote",
    "text\n- list right after\n\ntext\n1. list\n\ntext\n14. no list",
    "> quote\n> of two lines\n\nafter",
    "> - a\n> - b\n>\n> > nested",
    "```python\ndef f():\n    return 1\n```",
    "~~~\n```\n~~~",
    "````\n```\ninner\n```\n````",
    "```\nnever closed\n\n# still code",
    "  ```\n  indented\n    more\n  ```",
    "text\n```\ncode\n```\ntext",
    "---\n\n***\n\n_ _ _\n\ntext",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
    "a | b | c\n:-- | :-: | --:\n1 | **2** | `3`\n\nafter",
    "| a | b |\n|---|---|\n| 1 |\n| 1 | 2 | 3 |\n| x \\| y | z |",
    "| no | table |\ntext",
    "a | b\n-- | --\n1 | 2\n# heading",
    "é中🙂 **中文** *ünï*",
    "line one  \nline two",
]  # fmt: skip


@pytest.fixture
def rendered(in_page):
    """A function from markdown texts to the page's HTML for them."""
    code = """
        const { render } = await import("/markdown.js");
        return given[0].map((text) => {
          const root = document.createElement("div");
          root.append(render(text));
          return root.innerHTML;
        });
        """
    return lambda texts: in_page(code, texts)


def test_markdown_is_what_another_implementation_makes_of_it(rendered):
    other = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    wrong = []
    for sample, html in zip(SAMPLES, rendered(SAMPLES), strict=True):
        found = Canonical(html, ours=True).text()
        expected = Canonical(other.render(sample).replace("<s>", "<del>").replace("</s>", "</del>"), ours=False).text()
        if found != expected:
            wrong.append(f"{sample!r}\n  page   {found!r}\n  other  {expected!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("3*4*5 = 60 and 2**3**2", "<p>3*4*5 = 60 and 2**3**2</p>"),
        ("$x_1 * y_1$ and $a_2 * b_2$", "<p>$x_1 * y_1$ and $a_2 * b_2$</p>"),
        (r"\(a_1 * b_1 * c\) and \[x_1\]", r"<p>\(a_1 * b_1 * c\) and \[x_1\]</p>"),
        ("$$\na_1 * b_1\n$$", '<p class="verbatim">$$\na_1 * b_1\n$$</p>'),
        ("it costs $5 and *not* $6", "<p>it costs $5 and <em>not</em> $6</p>"),
        ("a<br>b<BR/>c", "<p>a<br>b<br>c</p>"),
        ("- [x] done\n- [ ] open", '<ul><li class="task">☑ done</li><li class="task">☐ open</li></ul>'),
        ("1. a\n  - b", "<ol><li>a<ul><li>b</li></ul></li></ol>"),
        ("这是**重点**内容", "<p>这是<strong>重点</strong>内容</p>"),
    ],
)
def test_where_the_page_goes_its_own_way(rendered, text, html):
    assert rendered([text]) == [html]


def test_addresses_become_links_and_images_only_links(rendered):
    html = rendered(["see https://a.example/b(c). ![pic](https://a.example/p.png) (https://b.example)"])[0]
    assert re.findall(r'href="([^"]*)"[^>]*>([^<]*)', html) == [
        ("https://a.example/b(c)", "https://a.example/b(c)"),
        ("https://a.example/p.png", "pic"),
        ("https://b.example/", "https://b.example"),
    ]
    assert "<img" not in html


def test_a_growing_text_ends_as_the_whole_text_does(in_page):
    """However a text is cut into pieces, and without touching the nodes of blocks that stand."""
    text = "\n\n".join(SAMPLES)
    cuts = sorted(random.Random(0).sample(range(1, len(text)), 300))
    same, kept = in_page(
        """
        const { MarkdownView, render } = await import("/markdown.js"), [text, cuts] = given;
        const root = document.createElement("div"), whole = document.createElement("div");
        const view = new MarkdownView(root);
        for (const cut of cuts.slice(0, 100)) view.update(text.slice(0, cut));
        const first = root.firstElementChild;
        for (const cut of cuts.slice(100)) view.update(text.slice(0, cut));
        view.update(text);
        whole.append(render(text));
        return [root.innerHTML === whole.innerHTML, root.firstElementChild === first];
        """,
        text,
        cuts,
    )
    assert same and kept


@pytest.mark.parametrize("text", ["> " * 99 + "end", "- " * 99 + "end"])
def test_what_is_nested_too_deep_is_text(rendered, text):
    [html] = rendered([text])
    assert 5 < len(re.findall("<(?:blockquote|ul)>", html)) < 20 and "end" in html


@pytest.mark.parametrize(
    "text",
    [
        "*" * 50_000,
        "*a" * 25_000,
        "_a **b " * 10_000,
        "[" * 50_000,
        "[a](" * 15_000,
        "`" * 25_000 + "a" + "`" * 24_999,
        "".join("`" * size + " " for size in range(1, 300)),
        "$" * 50_001,
        "<" * 50_000,
        "https://" * 8_000,
        "> " * 20_000,
        "- " * 20_000,
        "\n".join("  " * depth + "- a" for depth in range(400)),
        "|" * 20_000 + "\n" + "|-" * 20_000,
        "#" * 50_000 + " a",
        "-" * 50_000 + "a",
        "\\" * 50_001,
        "```\n" * 20_000,
    ],
    ids=range(18),
)
def test_no_text_holds_the_page_up(rendered, text):
    began = time.monotonic()
    assert rendered([text])
    assert time.monotonic() - began < 15

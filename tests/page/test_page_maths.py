"""Formulas on the page: what is one, what stays text, how they look, and that an unfinished one disturbs nothing."""

from __future__ import annotations

import re
import threading
from html.parser import HTMLParser

import pytest

from tests.support.page_browser import wait
from tests.support.page_server import ending, piece

ANSWER = r"""The roots of $ax^2 + bx + c = 0$ are \(x_1\) and \(x_2\):

\[
x_{1,2} = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}.
\]

Because
$$
\begin{aligned}
a &= b \\
- c &= d
\end{aligned}
$$

1. One:
   \[ A = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} \]
2. Two: $$y = 1$$ and more, for $5 and $6.

> Quoted $z$
> $$w
> = 1$$

| $a$ | b |
|-----|---|
| $\frac{1}{2}$ | c |

\begin{align}
u &= v
\end{align}

\[

p

\]

```math
q
```

So \boxed{7}.
"""
WIDE = "$$" + " + ".join(f"x_{{{i}}}^{{{i}}}" for i in range(80)) + "$$"


class Formulas(HTMLParser):
    """The formulas of a page: (source, whether on a line of its own), and the text beside them."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, bool]] = []
        self.text = ""
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "math":
            self.found.append((given["alttext"].strip(), given.get("display") == "block"))
        self._depth += tag == "math"

    def handle_endtag(self, tag):
        self._depth -= tag == "math"

    def handle_data(self, data):
        if not self._depth:
            self.text += data


def structure(html: str) -> str:
    """The MathML of the first formula: names and texts, without attributes and without rows that only group."""
    [mathml] = re.findall("<math[^>]*>(.*?)</math>", html)[:1]
    return re.sub("</?(mrow|mstyle)>", "", re.sub("<([a-z]+)[^>]*>", r"<\1>", mathml))


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("a $x$ b", [("x", False)]),
        (r"a \(x\) b", [("x", False)]),
        ("a $$x$$ b", [("x", True)]),
        (r"a \[x\] b", [("x", True)]),
        ("$$x$$", [("x", True)]),
        ("$$x$$ and $$y$$, as said", [("x", True), ("y", True)]),
        ("$$\nx\n$$\ntext", [("x", True)]),
        ("text\n\\[\nx\n\\]\ntext", [("x", True)]),
        ("text\n\\[\nx\n\\].\ntext", [("x\n.", True)]),
        ("$$\na\n- b\n+ c\n> e\n= f\n$$", [("a\n- b\n+ c\n> e\n= f", True)]),
        ("- $$\n  x\n  $$\n- $y$", [("x", True), ("y", False)]),
        ("> \\[\n> x\n> \\]", [("x", True)]),
        ("$x_1 * y_1$ and $a_2 * b_2$", [("x_1 * y_1", False), ("a_2 * b_2", False)]),
        (r"$\{x\}$ $a \$ b$", [(r"\{x\}", False), (r"a \$ b", False)]),
        ("**$y$** [$z$](https://a.example)", [("y", False), ("z", False)]),
        ("| $x$ |\n|---|\n| $y$ |", [("x", False), ("y", False)]),
        ("# $x$", [("x", False)]),
        (r"\(a\) and \(b", [("a", False)]),
        (r"a $ \frac{1}{2} $ b, $ x = 1 $", [(r"\frac{1}{2}", False), ("x = 1", False)]),
        ("a $`x^2`$ b", [("x^2", False)]),
        ("```math\nx\n```", [("x", True)]),
        (r"The answer is \boxed{\frac{1}{2}}.", [(r"\boxed{\frac{1}{2}}", False)]),
        ("so\n\\begin{align*}\na &= b\n\\end{align*}\nand", [("\\begin{align*}\na &= b\n\\end{align*}", True)]),
        ("\\[\n\nx\n\n\\]", [("x", True)]),
        ("设$x$为\\(y\\)。", [("x", False), ("y", False)]),
        ("an angle \\(\\theta\\) by:\n\n\\[\n\\begin{pmatrix}\na & -b \\\\\nc & d\n\\end{pmatrix}\n\\]",
         [("\\theta", False), ("\\begin{pmatrix}\na & -b \\\\\nc & d\n\\end{pmatrix}", True)]),
        ("\\[\n\\text{Power}(f)\n=\n10\\log_{10}\n\\]", [("\\text{Power}(f)\n=\n10\\log_{10}", True)]),
        ("$3$-dimensional, $10$, $2$-adic and $5$ apples per $7$ days",
         [("3", False), ("10", False), ("2", False), ("5", False), ("7", False)]),
        ("$y$：$n\\times 1$ and the $n$th", [("y", False), ("n\\times 1", False), ("n", False)]),
        # mathb 8: the underscores were emphasis
        ("$$\n(Foo)_{a} \\\\\n(Foo)_{a}\n$$", [("(Foo)_{a} \\\\\n(Foo)_{a}", True)]),
    ],
)  # fmt: skip
def test_a_formula_is_found_wherever_a_model_writes_it(rendered, text, formulas):
    assert Formulas(rendered([text])[0]).found == formulas


@pytest.mark.parametrize(
    "text",
    [
        "it costs $5 and $6",
        "it costs $ 5 and then $ 6 more",
        "run $ FOO=1 cmd; then $ ls",
        "a $10$-off coupon",
        "it was $1,299.99$ off",
        "$9$/month, or $5$ per seat",
        "two $20$ bills and a $50$ deposit, $3$ each",
        "export PATH=$HOME/bin:$PATH",
        "$/PR is down but $/session is up",
        "of $AAPL is 123$ left",
        "```math\nx",
        r"\boxed{5",
        "from $5 to $6, or $7/$8, or $9-$10",
        "a $ b $ c",
        "`$x$` and `\\(x\\)`",
        "```\n$$x$$\n```",
        "$$ $$",
        "$",
        "an unfinished $x",
        "an unfinished $$x",
        "an unfinished $$x$",
        "$$\nunfinished",
        "\\[\nunfinished\n\n- text",
        "\\\\(x\\\\)",
        "$x\n\ny$",
        # Markpad 73, opencode 15892, gpt_markdown 52, mark-sharp 66, WP-Editor.md 538, files.md 35
        "from $125K → $108K → $76K (this week's high). The 200W MA at $60-65K",
        "| a | b |\n|---|---|\n| $0.02/GB | $203/month |",
        "$123 - $234",
        r"sets for US\$60 at 10 MHz and US\$90 at 12 MHz",
        "`ROWS($A$1:$A$9)` gives 9, and `ROWS($A$1:A1)` another",
        "This:\n\n    $ mycommand\n\nAnd so is this:\n\n    $ mycommand $",
        "- so:\n  ```yaml\n  a: $B\n  depends_on:\n    - $C # not $D\n  ```",
    ],
)
def test_what_is_no_formula_stays_text(rendered, text):
    assert "<math" not in rendered([text])[0]


@pytest.mark.parametrize(
    ("formula", "mathml"),
    [
        (r"\frac{a}{2}", "<mfrac><mi>a</mi><mn>2</mn></mfrac>"),
        ("x_1^2", "<msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup>"),
        (r"\sqrt[3]{x}", "<mroot><mi>x</mi><mspace></mspace><mn>3</mn></mroot>"),
        (
            r"\begin{matrix} 1 & 2 \\ 3 & 4 \end{matrix}",
            "<mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr>"
            "<mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr></mtable>",
        ),
        (r"\mathbb{R}", "<mi>ℝ</mi>"),
        (r"x \le \infty", "<mi>x</mi><mo>≤</mo><mi>∞</mi>"),
    ],
)
def test_a_formula_is_mathml(rendered, formula, mathml):
    assert structure(rendered([f"${formula}$"])[0]) == mathml


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (r"\unknown{x}", r"\unknown"),
        (r"\frac{1", "end of input"),
        (r"\href{https://a.example}{x}", "Unsupported"),
        (r"\def\a{x}\a", r"\refused"),
        ("x" * 5000, "too long"),
        (r"\sqrt{" * 99 + "x" + "}" * 99, "too large"),
    ],
)
def test_a_formula_that_cannot_be_shown_is_text_that_says_why(rendered, formula, reason):
    html = rendered([f"before ${formula}$ after"])[0]
    assert "<math" not in html and Formulas(html).text == f"before ${formula}$ after"
    assert reason in re.findall('title="Not shown as a formula: ([^"]*)"', html)[0]


def test_an_unfinished_formula_disturbs_nothing(in_page):
    """At every cut: no error is shown, every formula is whole, and at the end it is what the whole text gives."""
    html = in_page(
        """
        const { MarkdownView, render } = await import("/markdown.js"), [text] = given;
        const root = document.createElement("div"), view = new MarkdownView(root), seen = [];
        for (let cut = 1; cut <= text.length; cut += 1) {
          view.update(text.slice(0, cut));
          seen.push(root.innerHTML);
        }
        const whole = document.createElement("div");
        whole.append(render(text));
        return [...seen, whole.innerHTML];
        """,
        ANSWER,
    )
    whole = Formulas(html[-1]).found
    assert html[-2] == html[-1] and len(whole) == 15
    for cut, part in enumerate(html, 1):
        shown = Formulas(part)
        assert [formula for formula in shown.found if formula not in whole] == [], ANSWER[:cut]
        assert "Error" not in shown.text and "Unsupported" not in shown.text
        reasons = set(re.findall('title="Not shown as a formula: ([^"]*)"', part))
        assert reasons <= {"it has no end, or is too long"}, ANSWER[:cut]


def test_a_finished_formula_keeps_its_node_while_the_answer_goes_on(page, server):
    gate = threading.Event()
    server.script(piece("$$x^2$$\n\nThen\n\nand"), gate, piece(" so on, and so on.\n\n$y$"), ending())
    page.ask("Formula")
    page.shows(".content", "and")
    page.js("document.querySelector('.content math').kept = true")
    gate.set()
    page.idle()
    assert page.js("return [...document.querySelectorAll('.content math')].map((node) => node.kept === true)") == [
        True,
        False,
    ]


def test_a_screen_reader_hears_a_formula_as_it_was_written(page, server):
    server.script(piece("So $x^2$ is `even`.\n\nEnd"), ending())
    page.ask("Speak")
    page.idle()
    wait(lambda: "So x^2 is even." in page.texts("#announcer p"))


@pytest.mark.parametrize("width", [360, 1200])
def test_a_wide_formula_scrolls_in_its_own_box(page, server, width):
    page.size(width, 800)
    server.script(piece(f"{WIDE}\n\nInline {WIDE[1:-1]} wraps."), ending())
    page.ask("Wide")
    page.idle()
    wide, log, inline = page.js(
        """
        const box = document.querySelector(".display.maths"), log = document.getElementById("log");
        const inline = document.querySelector("p math").getBoundingClientRect();
        return [box.scrollWidth > box.clientWidth, log.scrollWidth > log.clientWidth, inline.right <= innerWidth];
        """
    )
    assert wide and not log and inline


def test_columns_of_equations_meet_at_their_signs(page, server):
    """Left of & to the right, right of it to the left, and every sign of the column at the same place."""
    server.script(piece("$$\\begin{aligned} a+b+c+d &= e \\\\ a &= b+c+d+e+f \\end{aligned}$$"), ending())
    page.ask("Align")
    page.idle()
    ends, starts = page.js(
        """
        const rows = [...document.querySelectorAll(".content mtr")].map((row) => [...row.children]);
        const box = (cell) => cell.firstElementChild.getBoundingClientRect();
        return [rows.map(([left]) => box(left).right), rows.map(([, right]) => box(right).left)];
        """
    )
    assert ends[0] == pytest.approx(ends[1], abs=1) and starts[0] == pytest.approx(starts[1], abs=1)
    assert 0 <= starts[0] - ends[0] < 12

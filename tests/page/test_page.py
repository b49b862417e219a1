"""The chat page in a browser: asking, stopping, trying again, storage, errors, settings, keys, widths, colours."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.support.page_browser import Page, wait
from tests.support.page_server import DONE, HANG_UP, ending, event, piece

PREFIX = "isthmus.conversation."
DESKTOP, PHONE = (1200, 800), (360, 740)
WIDE = "| a | b |\n|---|---|\n| " + "x" * 300 + " | y |\n\n```\n" + "long " * 100 + "\n```\n\n" + "w" * 400
ANSWER = "First paragraph.\n\nSecond one, with more words.\n\n- a\n- b\n\nThe end."


def say(server, text, thought="", **options):
    """Script one whole answer."""
    server.script(*([piece(thought=thought)] if thought else []), piece(text), ending(**options))


def talk(page, server, question, answer, **options):
    say(server, answer, **options)
    page.ask(question)
    page.idle()


def allow_downloads(page, folder):
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)


def downloaded(folder, name, last):
    """The text of a download that ends with `last`, once it is whole."""
    file = folder / name
    wait(lambda: file.is_file() and file.read_text().rstrip().endswith(last), f"the download {name}")
    return file.read_text()


def roles(asked):
    return [(message["role"], message["content"]) for message in asked.body["messages"]]


# What is served


def test_the_page_says_what_is_served(page, server):
    facts = dict(zip(page.texts("#facts dt"), page.texts("#facts dd"), strict=True))
    expected = {"model": "small", "format": "fp32", "seal": "0f1e2d3c4b5a", "weights": "version 0", "pool": "away"}
    assert facts == expected and page.text("#model") == "small"
    assert page.visible("#thinks") and not page.visible("#rehearsal")
    statement = "rehearsed on CPU with the rules of some-chip"
    health = {"status": "ok", "model": "m", "seal": None, "weight_version": 3, "max_model_len": 4096, "thinks": False}
    server.pages["/health"] = {**health, "rehearsal": {"chip": "some-chip", "statement": statement, "operators": {}}}
    page.reload()
    page.shows("#statement", statement.capitalize().replace("cpu", "CPU"))
    assert page.visible("#rehearsal") and page.texts("#facts dd") == ["m", "none", "version 3"]
    assert not page.visible("#thinks")
    assert page.js("return document.getElementById('history').checked"), "the context has room for earlier turns"


def test_an_example_is_asked_by_a_click(page, server):
    wait(lambda: len(page.all("#examples button")) == 2)
    say(server, "6")
    page.click("#examples button")
    page.shows(".content", "6")
    assert roles(server.asked[0]) == [("user", page.text(".question .text"))] and not page.visible("#welcome")


def test_the_real_engine_answers_and_is_counted(page):
    page.ask("Use 3, 4 and 5 to reach 23.")
    page.idle()
    answer = page.stored()[0]["turns"][0]["versions"][0]["answer"]
    assert answer["state"] in ("done", "cut") and answer["fingerprint"] == "0f1e2d3c4b5a-v0"
    assert answer["thought"] + answer["content"] and answer["usage"]["completion"] > 0
    assert f"{answer['usage']['completion']} out" in page.text(".figures")
    assert page.text(".thought") == answer["thought"]


# An answer on its way


def test_thinking_is_shown_live_and_folded_when_the_answer_comes(page, server):
    thinking, writing = threading.Event(), threading.Event()
    server.script(
        piece(thought="Let me "),
        piece(thought="see."),
        thinking,
        piece("It is "),
        writing,
        piece("**23**."),
        ending(9, 31),
    )
    page.ask("Which?")
    page.shows(".thought", "Let me see.")
    page.shows(".thinking .length", "2 tokens")
    assert page.text(".thinking .state") == "Thinking…" and page.visible(".thought") and page.visible("#stop")
    before = page.text(".thinking .length")
    wait(lambda: page.text(".thinking .length") != before, "the clock of the thinking")
    thinking.set()
    page.shows(".content", "It is")
    assert page.text(".thinking .state") == "Thought" and not page.visible(".thought")
    writing.set()
    page.idle()
    assert page.js("return document.querySelector('.content').innerHTML") == "<p>It is <strong>23</strong>.</p>"
    assert "2 tokens" in page.text(".thinking .length") and "9 tokens in, 31 out" in page.text(".figures")
    assert "tokens/s" in page.text(".figures") and not page.visible("#stop")
    page.click(".thinking summary")
    assert page.visible(".thought")
    body = server.asked[0].body
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_keeps_what_came_and_tells_the_server(page, server, way):
    never = threading.Event()
    script = server.script(piece(thought="Hm."), piece("Half of it"), never, piece("never"), ending())
    page.ask("Go on")
    page.shows(".content", "Half of it")
    if way == "button":
        page.click("#stop")
    else:
        page.press(Keys.ESCAPE)
    page.idle()
    assert script.left.wait(30), "the server is not told"
    assert page.text(".content") == "Half of it" and page.text(".note") == "stopped by you"
    page.reload()
    assert page.text(".content") == "Half of it" and page.text(".note") == "stopped by you"


def test_a_stream_is_read_wherever_it_is_cut(page):
    content = "é中🙂 **fett** ✓"
    data = json.dumps({"choices": [{"delta": {"content": content}}]}, ensure_ascii=False)
    stream = f": comment\r\nevent: x\r\ndata: {data}\r\n\r\n:\n\ndata:{data}\n\n".encode() + ending()
    found = page.later(
        """
        const { complete } = await import("/stream.js"), bytes = Uint8Array.from(given[0]), results = [];
        for (const size of [1, 2, 3, 5, 7, bytes.length]) {
          let text = "";
          globalThis.fetch = async () => new Response(new ReadableStream({
            start(out) {
              for (let at = 0; at < bytes.length; at += size) out.enqueue(bytes.slice(at, at + size));
              out.close();
            },
          }));
          for await (const chunk of complete({}, {}, null)) text += chunk.choices[0]?.delta.content ?? "";
          results.push(text);
        }
        return results;
        """,
        list(stream),
    )
    assert found == [content * 2] * 6


def test_the_parser_of_events_knows_every_line_end_and_cut(page):
    text = "data: a\n\ndata: b\r\rdata: c\r\ndata:  d\r\n\r\n: no\nid: 1\n\ndata\n\ndata: e\n\n"
    found = page.later(
        """
        const { EventParser } = await import("/stream.js"), results = new Set(), text = given[0];
        for (let first = 0; first <= text.length; first += 1) {
          for (let second = first; second <= text.length; second += 1) {
            const parser = new EventParser();
            const parts = [text.slice(0, first), text.slice(first, second), text.slice(second)];
            results.add(JSON.stringify(parts.flatMap((part) => parser.push(part))));
          }
        }
        return [...results];
        """,
        text,
    )
    assert [json.loads(result) for result in found] == [["a", "b", "c\n d", "", "e"]]


def test_broken_bytes_become_replacement_characters(page, server):
    server.script(b'data: {"choices":[{"delta":{"content":"a\xff\xc3', b'(z"}}]}\n\n', ending())
    page.ask("Bytes")
    page.idle()
    assert page.text(".content") == "a��(z"


def test_a_connection_that_breaks_off_keeps_what_came(page, server):
    cut = threading.Event()
    server.script(piece(thought="Hm."), piece("Half of"), cut, HANG_UP)
    page.ask("Go on")
    page.shows(".content", "Half of")
    cut.set()
    page.shows(".problem", "The connection broke off.")
    assert page.text(".content") == "Half of"
    say(server, "All of it")
    page.click(".retry")
    page.shows(".content", "All of it")
    page.idle()
    assert page.text(".place") == "2/2" and not page.visible(".problem")


def test_an_answer_goes_on_while_another_conversation_is_open(page, server):
    gate = threading.Event()
    server.script(piece("one "), gate, piece("two"), ending())
    page.ask("First")
    page.shows(".content", "one")
    page.click("#new")
    assert page.visible("#send") and page.texts(".turn") == []
    talk(page, server, "Second", "other")
    gate.set()
    wait(lambda: not page.all("#conversations .busy"), "the end of the first answer")
    page.js("[...document.querySelectorAll('.open')].find((b) => b.textContent === 'First').click()")
    page.shows(".content", "one two")
    assert page.texts(".question .text") == ["First"]


def test_a_page_that_is_closed_keeps_the_half_answer(page, server):
    never = threading.Event()
    script = server.script(piece("Half of it"), never)
    page.ask("Go on")
    page.shows(".content", "Half of it")
    page.reload()
    assert script.left.wait(30)
    page.shows(".content", "Half of it")
    assert page.text(".note") == "the page was closed while this was written" and page.visible(".retry")


def test_a_screen_reader_hears_paragraphs_and_not_tokens(page, server):
    page.js(
        "window.heard = [];"
        "new MutationObserver((all) => all.forEach((m) => m.addedNodes.forEach((n) => heard.push(n.textContent))))"
        ".observe(document.getElementById('announcer'), { childList: true, subtree: true })"
    )
    gates = [threading.Event() for _ in range(3)]
    thirds = [ANSWER[:20], ANSWER[20:40], ANSWER[40:]]
    steps = [step for gate, part in zip(gates, thirds, strict=True) for step in (*map(piece, part), gate)]
    server.script(*steps, ending())
    page.ask("Speak")
    for part, gate in zip(thirds, gates, strict=True):
        page.shows(".content", part.strip().split("\n")[-1].removeprefix("- "))
        assert page.js("return document.querySelector('.answer').getAttribute('aria-busy')") == "true"
        gate.set()
    page.idle()
    heard = [text.strip() for text in page.js("return heard")]
    assert heard == ["Thinking", "First paragraph.", "Second one, with more words.", "ab", "The end."]
    assert page.js("return document.getElementById('announcer').getAttribute('aria-live')") == "polite"
    assert page.js("return document.getElementById('log').closest('[aria-live]') === null")


# Versions of an answer


def test_trying_again_keeps_the_earlier_version_and_sends_the_one_shown(page, server):
    talk(page, server, "Which?", "one")
    for answer in ("two", "three"):
        say(server, answer)
        page.click(".retry")
        page.shows(".content", answer)
        page.idle()
    assert page.text(".place") == "3/3" and all(roles(asked) == [("user", "Which?")] for asked in server.asked)
    page.click(".earlier")
    assert page.text(".content") == "two" and page.text(".place") == "2/3"
    page.reload()
    assert page.text(".content") == "two" and page.text(".place") == "2/3"
    page.click("#history")
    talk(page, server, "And then?", "four")
    assert roles(server.asked[-1]) == [("user", "Which?"), ("assistant", "two"), ("user", "And then?")]
    page.click(".turn:first-of-type .earlier")
    assert page.js("return document.querySelector('.content').textContent") == "one"
    assert page.texts(".note")[0] == "not part of what follows"
    assert len(page.all(".retry")) == 2 and sum(button.is_displayed() for button in page.all(".retry")) == 1


@pytest.mark.parametrize("way", ["button", "arrow"])
def test_the_last_message_can_be_changed_and_sent_again(page, server, way):
    talk(page, server, "Wich?", "what")
    if way == "button":
        page.js("document.querySelector('.edit').click()")
    else:
        page.click("#prompt")
        page.press(Keys.ARROW_UP)
    wait(lambda: page.focused(".editor textarea"))
    page.press(Keys.ESCAPE)
    assert not page.all(".editor") and page.text(".question .text") == "Wich?"
    page.js("document.querySelector('.edit').click()")
    say(server, "this")
    page.chord(Keys.CONTROL, "a")
    page.press("Which?", Keys.ENTER)
    page.shows(".content", "this")
    page.idle()
    assert page.text(".question .text") == "Which?" and roles(server.asked[-1]) == [("user", "Which?")]
    page.click(".earlier")
    assert (page.text(".question .text"), page.text(".content")) == ("Wich?", "what")


def test_answers_and_code_can_be_copied(page, server):
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    talk(page, server, "Code", "Look:\n\n```python\nprint('1 < 2')\n```")
    page.click(".copy-code")
    page.shows(".copy-code", "Copied")
    assert page.later("return await navigator.clipboard.readText()") == "print('1 < 2')"
    page.click(".copy")
    wait(lambda: page.later("return await navigator.clipboard.readText()") == "Look:\n\n```python\nprint('1 < 2')\n```")
    page.js("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.shows(".copy-code", "Copy")
    page.click(".copy-code")
    page.shows(".copy-code", "Copied")


# Errors


def test_a_busy_server_holds_the_retry_back_for_as_long_as_it_says(page, server):
    error = {"error": {"message": "too many requests are waiting; try again in a second", "code": "overloaded"}}
    refusal = {"status": 503, "headers": {"Content-Type": "application/json", "Retry-After": "2"}}
    server.script(json.dumps(error).encode(), **refusal)
    page.ask("Now")
    page.shows(".problem", "Too many requests are waiting")
    began = time.monotonic()
    assert page.text(".retry") in ("Try again in 2 s", "Try again in 1 s")
    assert not page.find(".retry").is_enabled()
    wait(lambda: page.find(".retry").is_enabled(), "the end of the countdown")
    assert time.monotonic() - began > 1 and page.text(".retry") == "Try again"
    say(server, "Here")
    page.click(".retry")
    page.shows(".content", "Here")
    page.idle()
    assert not page.visible(".versions"), "a refusal is not a version"


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (
            [b'{"error":{"message":"messages: the prompt is too long"}}'],
            {"status": 400},
            "Messages: the prompt is too long",
        ),
        ([b"<h1>oops"], {"status": 500}, "The server failed (500)."),
        ([piece("a"), event({"error": {"message": "the engine failed"}}), DONE], {}, "The engine failed"),
        ([piece("a"), b"data: {broken\n\n"], {}, "The server sent something that is not JSON."),
        ([piece("a")], {}, "The connection broke off."),
        ([piece(finish="stop"), DONE], {}, "It ended without an answer."),
        ([piece(thought="hm"), piece(finish="length"), DONE], {}, "It was still thinking when its tokens ran out."),
    ],
    ids=["refused", "no JSON", "an event", "broken JSON", "no end", "nothing", "only thinking"],
)
def test_an_error_is_told_and_can_be_tried_again(page, server, steps, options, message):
    server.script(*steps, **options)
    page.ask("Now")
    page.shows(".problem", message)
    page.idle()
    say(server, "Here")
    page.click(".retry")
    page.shows(".content", "Here")
    page.idle()
    assert not page.visible(".problem")


def test_a_server_that_is_gone_is_told(page, server):
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.ask("Anyone?")
        page.shows(".problem", "The server does not answer.")
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})
    page.idle()


# Settings


def test_settings_are_sent_and_kept(page, server):
    page.click("#open-settings")
    given = {"system": "Be brief.", "temperature": "0.3", "topP": "0.9", "maxTokens": "17", "seed": "5"}
    for name, value in given.items():
        page.find(f"#settings [name={name}]").send_keys(value)
    page.click("#settings [type=submit]")
    talk(page, server, "One", "1")
    page.reload()
    talk(page, server, "Two", "2")
    for asked, question in zip(server.asked, ("One", "Two"), strict=True):
        assert roles(asked) == [("system", "Be brief."), ("user", question)]
        sent = {name: asked.body.get(name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        assert sent == {"temperature": 0.3, "top_p": 0.9, "max_tokens": 17, "seed": 5}
        assert "authorization" not in asked.headers
    page.click("#open-settings")
    page.find("#settings [name=temperature]").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    page.press(Keys.ENTER)
    talk(page, server, "Three", "3")
    assert "temperature" not in server.asked[-1].body


def test_a_number_out_of_range_is_not_taken(page, server):
    page.click("#open-settings")
    page.find("#settings [name=temperature]").send_keys("7")
    page.click("#settings [type=submit]")
    assert page.js("return document.getElementById('settings').open")
    page.press(Keys.ESCAPE)
    talk(page, server, "One", "1")
    assert "temperature" not in server.asked[0].body


@pytest.mark.parametrize("kept", [False, True])
def test_the_key_is_sent_and_outlives_the_tab_only_if_asked_to(page, server, kept):
    page.click("#open-settings")
    page.find("#settings [name=key]").send_keys("sk-secret")
    if kept:
        page.click("#settings [name=keepKey]")
    page.click("#settings [type=submit]")
    talk(page, server, "One", "1")
    page.reload()
    talk(page, server, "Two", "2")
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer sk-secret"] * 2
    assert ("sk-secret" in page.js("return JSON.stringify(localStorage)")) == kept
    assert ("sk-secret" in page.js("return JSON.stringify(sessionStorage)")) != kept


def test_a_server_that_wants_a_key_leads_to_the_settings(page, server):
    server.script(b'{"error":{"message":"this server needs an API key"}}', status=401)
    page.ask("One")
    page.shows(".problem", "This server answers only those who have a key")
    page.js("document.querySelector('#notices [data-key=key] button').click()")
    assert page.js("return document.getElementById('settings').open") and page.focused("[name=key]")
    page.press("sk-right", Keys.ENTER)
    wait(lambda: not page.visible("#notices [data-key=key]"), "the end of the notice, now that the key is right")
    server.script(b"{}", status=401)
    page.click(".retry")
    page.shows("#notices", "The server does not know this key")
    say(server, "Here")
    page.click(".retry")
    page.shows(".content", "Here")
    wait(lambda: not page.visible("#notices [data-key=key]"))


# Stored conversations


def test_conversations_are_stored_listed_found_and_opened_again(page, server):
    for question, answer in {"Apples?": "red", "Pears?": "green"}.items():
        page.click("#new")
        talk(page, server, question, answer, thought="hm")
    assert page.texts("#conversations .open") == ["Pears?", "Apples?"]
    page.reload()
    assert page.texts("#conversations .open") == ["Pears?", "Apples?"] and page.text(".content") == "green"
    page.find("#search").send_keys("RED")
    assert page.texts("#conversations .open") == ["Apples?"]
    page.click("#conversations .open")
    page.shows(".content", "red")
    assert (
        page.text(".thought") == "hm"
        and page.js("return document.querySelector('[aria-current]').textContent") == "Apples?"
    )
    page.driver.back()
    page.shows(".content", "green")


def test_a_conversation_is_renamed_exported_deleted_and_brought_back(page, server, tmp_path):
    allow_downloads(page, tmp_path)
    talk(page, server, "Apples?", "**red**", thought="hm")
    page.js("document.querySelector('.open').focus()")
    page.press(Keys.F2)
    page.press("Fruit & more", Keys.ENTER)
    assert page.texts("#conversations .open") == ["Fruit & more"]
    page.js("document.querySelector('.save').click()")
    text = downloaded(tmp_path, "Fruit-more.md", last="*small, unsealed-v0*")
    assert (
        text.startswith("# Fruit & more\n") and "## You\n\nApples?\n" in text and "> hm" in text and "**red**" in text
    )
    page.click("#open-settings")
    page.click("#save-all")
    assert json.loads(downloaded(tmp_path, "conversations.json", last="]")) == page.stored()
    page.press(Keys.ESCAPE)
    before = page.stored()
    page.js("document.querySelector('.open').focus()")
    page.press(Keys.DELETE)
    wait(lambda: not page.stored())
    assert page.visible("#welcome")
    page.js("document.querySelector('#notices [data-key=removed] button').click()")
    page.shows(".content", "red")
    assert page.stored() == before


def test_a_damaged_entry_costs_no_other(page, server, tmp_path):
    allow_downloads(page, tmp_path)
    talk(page, server, "Apples?", "red")
    good = page.stored()[0]
    damaged = {
        "cut": json.dumps(good)[:40],
        "newer": json.dumps({**good, "version": 99, "id": "newer"}),
        "none": "null",
    }
    damaged["odd"] = json.dumps({**good, "id": "odd", "turns": [{"versions": [], "shown": 0}]})
    for name, text in damaged.items():
        page.js("localStorage.setItem(arguments[0], arguments[1])", PREFIX + name, text)
    page.js("localStorage.setItem('isthmus.settings', '{')")
    page.reload()
    assert page.texts("#conversations .open") == ["Apples?"] and page.text(".content") == "red"
    page.shows("#notices", "4 stored conversations cannot be read")
    page.js("document.querySelector('#notices [data-key=damaged] button').click()")
    saved = tmp_path / "damaged-conversations.txt"
    wait(lambda: saved.is_file() and all(text in saved.read_text() for text in damaged.values()), "the download")
    assert page.js("return localStorage.length") == 6, "nothing is thrown away unasked"
    page.reload()
    page.js("document.querySelectorAll('#notices [data-key=damaged] button')[1].click()")
    assert [item["title"] for item in page.stored()] == ["Apples?"] and page.js("return localStorage.length") == 2


def test_a_full_storage_is_told_and_costs_only_what_is_new(page, server):
    talk(page, server, "Apples?", "red")
    page.js(
        "let size = 1 << 22; for (let place = 0; size > 0;) {"
        " try { localStorage.setItem('filler' + place, 'x'.repeat(size)); place += 1; } catch { size >>= 1; } }"
    )
    talk(page, server, "Pears?", "green")
    page.shows("#notices", "This browser's storage is full")
    assert page.texts(".content") == ["red", "green"] and len(page.stored()[0]["turns"]) == 1
    page.click("#new")
    talk(page, server, "Plums?", "blue")
    assert page.texts("#conversations .open") == ["Plums?", "Apples?"]
    page.js("[...document.querySelectorAll('.open')][1].click()")
    wait(lambda: page.texts(".content") == ["red", "green"])
    page.js(
        "const fillers = Object.keys(localStorage).filter((key) => key.startsWith('filler'));"
        "fillers.forEach((key) => localStorage.removeItem(key))"
    )
    talk(page, server, "Figs?", "violet")
    assert not page.visible("#notices [data-key=storage]") and len(page.stored()[0]["turns"]) == 3


# Keys


def test_the_keyboard_is_enough(page, server):
    page.js("document.activeElement.blur()")
    page.press("/")
    assert page.focused("#prompt") and page.find("#prompt").get_attribute("value") == ""
    page.press("a/b")
    page.chord(Keys.SHIFT, Keys.ENTER)
    page.press("c")
    assert page.find("#prompt").get_attribute("value") == "a/b\nc" and not server.asked
    say(server, "fine")
    page.press(Keys.ENTER)
    page.shows(".content", "fine")
    page.idle()
    assert roles(server.asked[0]) == [("user", "a/b\nc")] and page.find("#prompt").get_attribute("value") == ""
    for question in ("second", "third"):
        page.js("document.getElementById('new').focus()")
        page.press(Keys.ENTER)
        page.chord(Keys.CONTROL, "k")
        assert page.focused("#prompt")
        talk(page, server, question, question.upper())
    page.js("document.getElementById('search').focus()")
    for key, title in [
        (Keys.ARROW_DOWN, "third"),
        (Keys.ARROW_DOWN, "second"),
        (Keys.END, "a/b"),
        (Keys.ARROW_UP, "second"),
        (Keys.HOME, "third"),
    ]:
        page.press(key)
        assert page.js("return document.activeElement.textContent") == title
    page.press(Keys.ARROW_DOWN, Keys.ENTER)
    page.shows(".content", "SECOND")
    say(server, "AGAIN")
    page.js("document.querySelector('.retry').focus()")
    page.press(Keys.ENTER)
    page.shows(".content", "AGAIN")
    assert page.focused("#prompt"), "the focus does not get lost with the button"


def test_everything_focused_is_seen_and_named(page, server):
    talk(
        page, server, "Apples?", "[red](https://example.org) `x`\n\n```\ncode\n```\n\n|a|b|\n|-|-|\n|1|2|", thought="hm"
    )
    page.js("document.querySelector('#menu').focus(); document.activeElement.blur()")
    seen = {}
    for _ in range(40):
        page.press(Keys.TAB)
        name, outline, label = page.js(
            "const e = document.activeElement, s = getComputedStyle(e), c = getComputedStyle(e.closest('form') ?? e);"
            "return [e.id || e.className || e.tagName, s.outlineStyle !== 'none' || c.boxShadow !== 'none',"
            " Boolean(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)]"
        )
        if name in seen:
            break
        seen[name] = (outline, label)
    assert {"theme", "open-settings", "new", "search", "open", "prompt", "history"} <= seen.keys()
    assert {name: marks for name, marks in seen.items() if marks != (True, True) and name != "BODY"} == {}


# Widths


def overflow(page: Page) -> int:
    return page.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("width", [320, 360, 800, 1200])
def test_nothing_is_wider_than_the_page(page, server, width):
    page.size(width, 740)
    server.pages["/health"] = {
        "status": "ok", "model": "a-model-" + "x" * 60, "format": "w8a8", "seal": "f" * 64, "pool": "away",
        "weight_version": 3, "max_model_len": 4096, "rehearsal": {"chip": "c", "statement": "rehearsed " * 20},
    }  # fmt: skip
    page.reload()
    assert overflow(page) <= 0
    talk(page, server, "q" * 500, WIDE, thought="t" * 500)
    page.click(".thinking summary")
    assert overflow(page) <= 0
    inside = page.js("return document.getElementById('log').scrollWidth - document.getElementById('log').clientWidth")
    assert inside <= 0
    assert page.js("const pre = document.querySelector('pre'); pre.scrollLeft = 50; return pre.scrollLeft") == 50
    page.click("#open-settings")
    assert overflow(page) <= 0
    page.press(Keys.ESCAPE)


def test_on_a_phone_the_list_is_a_drawer(page, server):
    page.open(*PHONE)
    talk(page, server, "Apples?", "red")
    assert not page.visible("#sidebar")
    page.click("#menu")
    wait(lambda: page.visible("#sidebar"))
    assert page.js("return document.getElementById('menu').getAttribute('aria-expanded')") == "true"
    assert page.js("return document.getElementById('log').inert") and page.focused("#new")
    page.press(Keys.ESCAPE)
    wait(lambda: not page.visible("#sidebar"))
    assert page.focused("#menu") and not page.js("return document.getElementById('log').inert")
    page.click("#menu")
    page.click("#new")
    wait(lambda: not page.visible("#sidebar"))
    assert page.visible("#welcome")
    page.click("#menu")
    page.click("#conversations .open")
    page.shows(".content", "red")
    wait(lambda: not page.visible("#sidebar"))
    page.size(*DESKTOP)
    wait(lambda: page.visible("#sidebar"))
    assert not page.visible("#menu")


# Colours and motion

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_in_both_colours(page, server, dark):
    page.open(*DESKTOP, dark=dark)
    say(
        server,
        "# A\n\ntext `code` [link](https://example.org)\n\n> quote\n\n```py\nx\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n###### f",
        thought="hm",
    )
    page.ask("Apples?")
    page.idle()
    page.click(".thinking summary")
    server.script(b'{"error":{"message":"no"}}', status=400)
    page.ask("More?")
    page.shows(".problem", "No")
    page.idle()
    page.js(
        "document.querySelector('#rehearsal').hidden = false; document.querySelector('#statement').textContent = 'x'"
    )
    page.js("document.querySelectorAll('.note').forEach((note) => { note.textContent = 'stopped by you'; })")
    seen, poor = page.js(CONTRAST)
    assert seen > 30 and poor == []
    page.click("#open-settings")
    assert page.js(CONTRAST)[1] == []
    page.press(Keys.ESCAPE)


def test_colours_follow_the_system_until_the_reader_chooses(page):
    light, ink = page.style("body", "backgroundColor"), page.style("body", "color")
    page.prefer(dark=True)
    dark = page.style("body", "backgroundColor")
    assert dark != light and page.style("body", "color") != ink
    page.click("#theme")
    assert page.style("body", "backgroundColor") == light
    page.reload()
    assert page.style("body", "backgroundColor") == light, "the choice is kept"
    page.prefer(dark=False)
    page.click("#theme")
    assert page.style("body", "backgroundColor") == dark
    assert page.js("return document.getElementById('theme').getAttribute('aria-label')") == "Switch to light colours"
    page.click("#open-settings")
    page.find("#settings [name=theme]").send_keys("As")
    page.click("#settings [type=submit]")
    assert page.style("body", "backgroundColor") == light
    page.prefer(dark=True)
    assert page.style("body", "backgroundColor") == dark


def test_nothing_moves_for_who_asked_for_that(page, server):
    page.prefer(reduced=False)
    gate = threading.Event()
    server.script(piece(thought="hm"), gate, piece("done"), ending())
    page.ask("Now")
    page.shows(".thought", "hm")
    assert page.style(".live .state", "animationName") == "breathe"
    page.prefer(reduced=True)
    assert page.style(".live .state", "animationName") == "none"
    gate.set()
    page.idle()


def test_the_log_follows_the_answer_until_the_reader_scrolls_away(page, server):
    gates = [threading.Event() for _ in range(2)]
    text = "line\n\n" * 60
    server.script(piece(text + "one"), gates[0], piece(text + "two"), gates[1], piece(text + "three"), ending())
    page.ask("Long")
    rest = "const log = document.getElementById('log'); return log.scrollHeight - log.scrollTop - log.clientHeight"
    page.shows(".content", "one")
    wait(lambda: page.js(rest) < 5)
    gates[0].set()
    page.shows(".content", "two")
    wait(lambda: page.js(rest) < 5)
    page.js("document.getElementById('log').scrollTop = 100")
    wait(lambda: page.visible("#jump"))
    gates[1].set()
    page.idle()
    assert page.js("return document.getElementById('log').scrollTop") == 100
    page.click("#jump")
    wait(lambda: page.js(rest) < 5 and not page.visible("#jump"))


# What goes on


def test_an_answer_that_was_cut_goes_on_in_its_place(page, server):
    server.script(piece(thought="hm"), piece("One and"), ending(5, 7, finish="length"))
    page.ask("Count")
    page.idle()
    assert page.text(".note") == "cut at the token limit" and page.visible(".go-on")
    server.script(piece(" two"), ending(12, 3, finish="length"))
    page.click(".go-on")
    page.shows(".content", "One and two")
    page.idle()
    say(server, ".\n\nDone", prompt=15, completion=2)
    page.reload()
    page.click(".go-on")
    page.shows(".content", "Done")
    page.idle()
    assert page.texts(".content p") == ["One and two.", "Done"] and not page.visible(".versions")
    assert "5 tokens in, 12 out" in page.text(".figures") and not page.visible(".go-on") and not page.text(".note")
    for asked, begun in zip(server.asked[1:], ("One and", "One and two"), strict=True):
        assert roles(asked) == [("user", "Count"), ("assistant", begun)]
        assert asked.body["continue_final_message"] is True and asked.body["add_generation_prompt"] is False
    assert "continue_final_message" not in server.asked[0].body


def test_thinking_that_was_cut_goes_on_as_thinking(page, server):
    server.script(piece(thought="Let me"), ending(finish="length"))
    page.ask("Think")
    page.shows(".problem", "It was still thinking")
    page.idle()
    server.script(piece(thought=" see."), piece("23"), ending())
    page.click(".go-on")
    page.shows(".content", "23")
    page.idle()
    assert roles(server.asked[1])[-1] == ("assistant", "<think>\nLet me") and not page.visible(".problem")
    assert page.text(".thought") == "Let me see."


OVERFLOW = json.dumps(
    {"error": {"message": "This model's maximum context", "code": "context_length_exceeded"}}
).encode()


def test_a_full_context_offers_to_leave_turns_out_or_to_start_anew(page, server):
    page.click("#history")
    for question in "abcd":
        talk(page, server, question, question.upper())
    server.script(OVERFLOW, status=400)
    page.ask("e")
    page.shows(".problem", "longer than the model can read at once (96 tokens)")
    page.idle()
    server.script(OVERFLOW, status=400)
    say(server, "E")
    page.js("document.querySelector('.turn:last-child .ways button').click()")
    page.shows(".turn:last-child .content", "E")
    page.idle()
    assert roles(server.asked[-1]) == [("user", "d"), ("assistant", "D"), ("user", "e")]
    page.reload()
    assert page.texts(".note") == ["left out of what is sent"] * 3 + ["", ""]
    server.script(OVERFLOW, status=400)
    page.ask("f")
    page.shows(".problem", "longer than the model can read at once")
    page.idle()
    say(server, "F")
    page.js("document.querySelectorAll('.turn:last-child .ways button')[1].click()")
    page.shows(".content", "F")
    page.idle()
    assert page.texts(".question .text") == ["f"] and roles(server.asked[-1]) == [("user", "f")]
    assert sorted(len(item["turns"]) for item in page.stored()) == [1, 5]


def test_a_message_that_is_too_long_alone_can_be_changed(page, server):
    server.script(OVERFLOW, status=400)
    page.ask("long")
    page.shows(".problem", "This message is longer than the model can read at once (96 tokens).")
    page.idle()
    page.js("document.querySelector('.ways button').click()")
    wait(lambda: page.focused(".editor textarea"))


def test_earlier_turns_are_sent_where_the_model_can_hold_them(page, server):
    health = {"status": "ok", "model": "m", "weight_version": 0, "max_model_len": 512}
    shown = "const box = document.getElementById('history'); return [box.checked, box.disabled]"
    for changes, expected in [
        ({"holds_turns": True}, [True, False]),
        ({"holds_turns": True, "max_model_len": 384}, [False, False]),
        ({"holds_turns": False, "max_model_len": 8192}, [False, True]),
    ]:
        server.pages["/health"] = health | changes
        page.reload()
        assert page.js(shown) == expected


def test_exported_conversations_come_back_and_overwrite_nothing_newer(page, server, tmp_path):
    for question in ("Apples?", "Pears?"):
        page.click("#new")
        talk(page, server, question, "red")
    exported = page.stored()
    older = {**exported[0], "title": "older", "updated": exported[0]["updated"] - 1}
    page.js("localStorage.removeItem(arguments[0])", PREFIX + exported[1]["id"])
    file = tmp_path / "conversations.json"
    file.write_text(json.dumps([older, exported[1], {"version": 1}, {**exported[0], "id": "../x"}]))
    page.all("#import-file")[0].send_keys(str(file))
    page.shows("#notices", "1 conversation imported. 1 not, because this browser has them already. 2 not, because")
    assert sorted(page.stored(), key=str) == sorted(exported, key=str)
    file.write_text("# A text")
    page.all("#import-file")[0].send_keys(str(file))
    page.shows("#notices", "“conversations.json” is not a file that this page exported")


# The seal, notes, colours


def test_the_seal_is_explained_and_leads_to_the_dossier(page, server):
    sealed = {"status": "ok", "model": "m", "seal": "0f1e", "state": "sealed", "weight_version": 0, "max_model_len": 96}
    server.pages["/health"] = sealed | {"signer": "ed25519:abc", "checks": {"pass": 28, "caution": 1}, "report": True}
    page.reload()
    assert page.text("#standing") == "sealed"
    page.click("#open-about")
    facts = dict(zip(page.texts("#about-facts dt"), page.texts("#about-facts dd"), strict=True))
    assert facts["signed by"] == "ed25519:abc" and facts["verdict"] == "passed; of 29 checks 28 pass, 1 caution"
    assert "passed the parity gate" in page.text("#explanation") and page.visible("#dossier")
    for changes, words in [
        ({"sealed_weights": False}, "have been replaced"),
        ({"seal": None, "state": "refused"}, "refused it"),
        ({"seal": None, "state": "unsealed"}, "No parity gate"),
    ]:
        server.pages["/health"] = sealed | changes
        page.reload()
        assert page.text("#standing") == "not sealed" and words in page.text("#explanation")
        assert not page.js("return !document.getElementById('dossier').hidden")


def test_on_a_phone_the_header_is_one_line(page, server):
    statement = {"chip": "c", "statement": "rehearsed on CPU with the rules of ascend-910b-313t"}
    server.pages["/health"] = {
        "status": "ok", "model": "m" * 40, "format": "w8a8", "seal": "f" * 16, "pool": "away", "weight_version": 3,
        "max_model_len": 96, "rehearsal": statement,
    }  # fmt: skip
    page.open(390, 844)
    assert page.js("return document.getElementById('log').getBoundingClientRect().top") < 80
    assert page.visible("#statement") and page.visible("#open-about")


def test_a_note_is_reached_from_its_mark(page, server):
    gate = threading.Event()
    server.script(
        piece("So[^a] and[^1], not [^0-9].\n\nThen\n\nthis.\n\n"), gate, piece("[^1]: First\n[^a]: *Why*"), ending()
    )
    page.ask("Notes")
    page.shows(".content", "this.")
    assert page.texts(".content p")[0] == "So[^a] and[^1], not [^0-9]."
    gate.set()
    page.idle()
    assert page.texts(".content p")[0] == "Soa and1, not [^0-9]." and page.texts(".to-note") == ["a", "1"]
    page.js("document.querySelector('.to-note').click()")
    assert page.focused(".note-text") and page.js("return document.activeElement.textContent") == "aWhy"


CODE = "```python\ndef f(x):  # say\n    return 'a<b' + 1\n```\n\n```unknown\ndef\n```\n\n" + "```js\nlet x = 1"


def test_code_has_its_colours_once_it_is_whole(page, server):
    server.script(piece(CODE), ending(finish="length"))
    page.ask("Code")
    page.idle()
    kinds = """
        const parts = (block) => [...block.querySelectorAll("code span")];
        const shown = (block) => parts(block).map((part) => [part.className, part.textContent]);
        return [...document.querySelectorAll(".code")].map(shown);
        """
    wait(lambda: page.js(kinds)[2], "the colours")
    python, unknown, javascript = page.js(kinds)
    expected = [["keyword", "def"], ["name", "f"], ["comment", "# say"], ["keyword", "return"], ["string", "'a<b'"]]
    assert python == [*expected, ["number", "1"]] and unknown == []
    assert javascript == [["keyword", "let"], ["number", "1"]], "a code that was cut has colours too"
    server.script(piece("2;\n```"), ending())
    page.click(".go-on")
    page.idle()
    wait(lambda: page.js(kinds)[2] == [["keyword", "let"], ["number", "12"]])
    assert page.texts(".code code")[0] == "def f(x):  # say\n    return 'a<b' + 1"


@pytest.mark.parametrize("language", ["csharp", "cpp", "java"])
def test_no_code_holds_the_page_up(page, server, language):
    """The slowest grammars, on what they are slowest with: as long as is coloured, and longer."""
    began = time.monotonic()
    lines = ("a" * 249 + "\n") * 46
    server.script(piece(f"```{language}\n{lines}```\n\n```{language}\n{'a' * 50_000}\n```\n\n```py\n1\n```"), ending())
    page.ask("Slow")
    page.idle()
    wait(lambda: page.texts(".code .number") == ["1"], "the colours of the last code")
    assert time.monotonic() - began < 15


def test_the_real_engine_goes_on_where_it_was_cut(page):
    page.click("#open-settings")
    for name, value in {"temperature": "0", "maxTokens": "5"}.items():
        page.find(f"#settings [name={name}]").send_keys(value)
    page.click("#settings [type=submit]")
    page.ask("Use 3, 4 and 5 to reach 23.")
    page.idle()
    first = page.stored()[0]["turns"][0]["versions"][0]["answer"]
    assert first["state"] == "cut"
    page.click(".go-on")
    page.idle()
    whole = page.stored()[0]["turns"][0]["versions"][0]["answer"]
    assert whole["state"] in ("cut", "done") and first["usage"]["completion"] < whole["usage"]["completion"] <= 10
    text = first["thought"] + first["content"]
    assert (whole["thought"] + whole["content"]).startswith(text) and len(whole["thought"] + whole["content"]) > len(
        text
    )
